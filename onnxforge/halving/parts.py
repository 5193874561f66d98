"""A model as parts, each of which has one precision, and the float32 values between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir

from onnxforge.elements import (
    TYPE_ATTRIBUTES,
    Carried,
    Elements,
    Signature,
    carried,
    signature,
)
from onnxforge.walk import Scope, bodies, label

if TYPE_CHECKING:
    from onnxforge.weights import Weights

__all__ = ["Part", "Parts", "Read", "Reason"]


class Reason(NamedTuple):
    """Why a part stays float32."""

    code: str
    message: str


@dataclass(eq=False)
class Part:
    """Something that makes and reads all its float32 values in one precision.

    Attributes:
        where: Its path.
        node: The operator, None for what links values that must have one type.
        scope: The graph of the node.
        reason: Why it stays float32, None if it need not.
        fixed: Whether it is in half precision whatever its neighbours are.
        reads: The float32 values it reads, in order, weights among them.
        makes: The float32 values it makes.
        turned: Inputs and outputs of an operator that it has in half precision if it is.
        half: Whether it is in half precision.
    """

    where: str
    node: ir.Node | None = None
    scope: Scope | None = None
    reason: Reason | None = None
    fixed: bool = False
    reads: list[ir.Value] = field(default_factory=list)
    makes: list[ir.Value] = field(default_factory=list)
    turned: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))
    half: bool = False

    @property
    def op_type(self) -> str:
        """The operator, empty for a link."""
        return self.node.op_type if self.node is not None else ""

    def keep(self, code: str, message: str) -> None:
        """Leave the part in float32; the first reason counts."""
        if self.reason is None:
            self.reason = Reason(code, message)


@dataclass(frozen=True, eq=False)
class Read:
    """One reading of a float32 value.

    Attributes:
        part: Who reads.
        node: The node, None where a graph gives the value out.
        index: At which input of the node, or as which output of the graph.
        graph: The graph of the node, or the one that gives out.
    """

    part: Part
    node: ir.Node | None
    index: int
    graph: ir.Graph


class Parts:
    """All parts of a model.

    Attributes:
        elements: Types of all values.
        dtype: The half type.
        always: What is float32 whoever makes or reads it, such as the scales of Resize.
        inputs: The parts that are inputs of the model.
        outputs: The parts that are outputs of the model.
    """

    def __init__(self, weights: Weights, dtype: ir.DataType) -> None:
        """Find the parts of the model of these weights."""
        model, all_scopes = weights.model, weights.scopes
        self.model = model
        self.dtype = dtype
        self.elements = Elements(model, all_scopes)
        self._functions = dict(model.functions)
        self._constants = {
            w.value: w.tensor for w in weights if w.value and not w.is_overridable
        }
        self.makers: dict[ir.Value, Part] = {}
        self.readers: dict[ir.Value, list[Read]] = {}
        self._all: list[Part] = []

        self.always = self._new("")
        self.always.keep("OF265", "is float32 at all times")
        self.inputs: list[Part] = []
        self.outputs: list[Part] = []
        self._interface()
        self._calls(all_scopes)
        for scope in all_scopes:
            for position, node in enumerate(scope.graph):
                self._node(scope, node, scope.path + label(node, position))

    def __iter__(self) -> Iterator[Part]:
        """All parts."""
        return iter(self._all)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a value is a weight that nobody can override."""
        return value in self._constants

    def matrix(self, value: ir.Value) -> int:
        """Number of elements of such a weight if it has more than one axis, else 0."""
        tensor = self._constants.get(value)
        return tensor.size if tensor is not None and len(tensor.shape) > 1 else 0

    def before(self, part: Part) -> Iterator[Part]:
        """The parts that make what a part reads."""
        return (self.makers[value] for value in part.reads if value in self.makers)

    def after(self, part: Part) -> Iterator[Part]:
        """The parts that read what a part makes."""
        return (read.part for value in part.makes for read in self.readers.get(value, ()))

    def _new(
        self, where: str, node: ir.Node | None = None, scope: Scope | None = None
    ) -> Part:
        part = Part(where, node, scope)
        self._all.append(part)
        return part

    def _make(self, part: Part, value: ir.Value) -> None:
        if self.elements.is_float(value):
            part.makes.append(value)
            self.makers[value] = part

    def _read(
        self,
        part: Part,
        value: ir.Value | None,
        site: tuple[ir.Node | None, int],
        graph: ir.Graph,
    ) -> None:
        if value is not None and self.elements.is_float(value):
            part.reads.append(value)
            self.readers.setdefault(value, []).append(Read(part, *site, graph))

    def _give(self, part: Part, graph: ir.Graph, index: int) -> None:
        """A graph gives out a value, which may be one from outside of it."""
        value = self.elements.outer(graph.outputs[index], graph)
        self._read(part, value, (None, index), graph)

    def _interface(self) -> None:
        graph = self.model.graph
        for value in graph.inputs:
            part = self._new(value.name or "")
            self._make(part, value)
            self.inputs += [part] if part.makes else []
        for index, value in enumerate(graph.outputs):
            part = self._new(value.name or "")
            self._give(part, graph, index)
            self.outputs += [part] if part.reads else []

    def _calls(self, all_scopes: Sequence[Scope]) -> None:
        """Link the arguments of functions to what their bodies read, and the results."""
        calls: dict[ir.OperatorIdentifier, list[tuple[ir.Graph, ir.Node]]] = {}
        for scope in all_scopes:
            for node in scope.graph:
                calls.setdefault(node.op_identifier(), []).append((scope.graph, node))
        for identifier, function in self._functions.items():
            mine = calls.get(identifier, [])
            where = f"{function.domain}::{function.name}"
            for index, value in enumerate(function.inputs):
                given = [call for call in mine if index < len(call[1].inputs)]
                around = [value, *(node.inputs[index] for _, node in given)]
                part = self._link(identifier, f"{where}/{value.name}", around)
                self._make(part, value)
                for graph, node in given:
                    self._read(part, node.inputs[index], (node, index), graph)
            for index, value in enumerate(function.outputs):
                made = [o for _, node in mine for o in node.outputs[index : index + 1]]
                part = self._link(identifier, f"{where}/{value.name}", [value, *made])
                self._give(part, function.graph, index)
                for output in made:
                    self._make(part, output)

    def _link(
        self, identifier: ir.OperatorIdentifier, where: str, linked: Iterable[ir.Value | None]
    ) -> Part:
        part = self._new(where)
        if identifier in self.elements.mixed:
            part.keep("OF271", "its function is called with arguments of other types")
        self._refuse_opaque(part, linked)
        return part

    def _refuse_opaque(self, part: Part, values: Iterable[ir.Value | None]) -> None:
        if any(map(self.elements.is_opaque, values)):
            part.keep("OF271", "is no tensor, or nothing tells its type")

    def _node(self, scope: Scope, node: ir.Node, where: str) -> None:
        if node.op_identifier() in self._functions:
            return
        version = scope.opset_imports.get("", 0)
        links = list(carried(node, version))
        for link in links:
            part = self._new(where)
            for index in link.inputs:
                self._read(part, node.inputs[index], (node, index), scope.graph)
            for body, index in link.results:
                self._give(part, body, index)
            for value in (*link.formals, *(node.outputs[k] for k in link.outputs)):
                self._make(part, value)
            self._refuse_opaque(part, self._linked(node, link))
            self._refuse_mixed(part, scope)
            found = signature(node, version)
            if found is not None and not found.allows(found.of_output(0), self.dtype):
                self._refuse_old(part, node)
        if not links:
            self._operator(scope, node, where, version)

    def _linked(self, node: ir.Node, link: Carried) -> Iterator[ir.Value | None]:
        yield from (node.inputs[k] for k in link.inputs)
        yield from (node.outputs[k] for k in link.outputs)
        yield from link.formals

    def _refuse_mixed(self, part: Part, scope: Scope) -> None:
        function = scope.function
        if function is not None and function.identifier() in self.elements.mixed:
            part.keep("OF271", "its function is called with arguments of other types")

    def _refuse_old(self, part: Part, node: ir.Node) -> None:
        what = self.dtype.name.lower()
        part.keep("OF265", f"{node.op_type} takes no {what} at this opset")

    def _operator(self, scope: Scope, node: ir.Node, where: str, version: int) -> None:
        elements = self.elements
        if node.op_type == "Constant" and not node.domain:
            return
        values = [*node.inputs, *node.outputs]
        inside = [body for _, body in bodies(node)]
        if not inside and not any(map(elements.is_float, values)):
            return
        part = self._new(where, node=node, scope=scope)
        self._refuse_mixed(part, scope)
        found = signature(node, version)
        if found is None or inside:
            part.keep("OF265", f"{node.op_type} is no operator of ai.onnx that takes halves")
        elif any(map(elements.is_opaque, values)) or node.op_type == "BitCast":
            part.keep("OF271", "has a value that is no tensor, or whose type nothing tells")
        for body in inside:
            for formal in body.inputs:
                self._make(part, formal)
            for index in range(len(body.outputs)):
                self._give(part, body, index)
        self._slots(part, node, scope.graph, found)

    def _slots(
        self, part: Part, node: ir.Node, graph: ir.Graph, found: Signature | None
    ) -> None:
        """Give an operator what it reads and makes; what never is a half is not its own."""
        turned = self._turned(node, found) if found is not None else None
        if turned is None:
            self._refuse_old(part, node)
        else:
            part.turned = turned
        for index, value in enumerate(node.inputs):
            own = part.reason or turned is None or index in turned[0]
            self._read(part if own else self.always, value, (node, index), graph)
        for index, value in enumerate(node.outputs):
            own = part.reason or turned is None or index in turned[1]
            self._make(part if own else self.always, value)

    def _turned(self, node: ir.Node, found: Signature) -> tuple[set[int], set[int]] | None:
        """Inputs and outputs that an operator has in half precision, None if it cannot."""
        is_float, allows = self.elements.is_float, found.allows
        given = {i: found.of_input(i) for i, v in enumerate(node.inputs) if is_float(v)}
        made = {i: found.of_output(i) for i, v in enumerate(node.outputs) if is_float(v)}
        inputs = {i for i, name in given.items() if allows(name, self.dtype)}
        bound = {given[i] for i in inputs}
        if node.op_type in TYPE_ATTRIBUTES or node.op_type == "ConstantOfShape":
            bound |= set(made.values())
        # The others, such as the mean that a LayerNormalization gives, have a type apart.
        outputs = {i for i, name in made.items() if name in bound | set(given.values())}
        can = all(
            name in bound and allows(name, self.dtype) for name in map(made.get, outputs)
        )
        return (inputs, outputs) if can and (inputs or outputs) else None
