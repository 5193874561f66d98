"""What constants a model holds, where they are, and who reads them.

A weight is a constant tensor: an initializer, the value of a Constant node, or a tensor that
another node carries as an attribute; in the main graph, in the bodies of If, Loop and Scan,
and in functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx_ir as ir

from onnxforge import remarks
from onnxforge.errors import ModelError
from onnxforge.needs import needed_constants
from onnxforge.storage.writer import default_workers
from onnxforge.walk import Scope, label, scopes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Origin",
    "Use",
    "Weight",
    "Weights",
    "for_each",
]

_T = TypeVar("_T")
_R = TypeVar("_R")

# Operators that a constant stays a constant behind; the value is their first input.
_PASSES_CONSTANTS = frozenset(
    {
        "Cast",
        "DequantizeLinear",
        "Identity",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


@dataclass(frozen=True, eq=False)
class Use:
    """One reading of a weight.

    Attributes:
        node: Who reads.
        index: At which input.
        scope: The graph the node is in, not always that of the weight.
        position: Place of the node in its graph.
    """

    node: ir.Node
    index: int
    scope: Scope
    position: int

    @property
    def where(self) -> str:
        """Path of the node."""
        return self.scope.path + label(self.node, self.position)


@dataclass(eq=False)
class Weight:
    """A constant of a model.

    Attributes:
        scope: The graph that holds it.
        tensor: Its values, perhaps still on disk.
        value: What its users read; None for a tensor in an attribute of another node.
        node: The Constant node, or the node whose attribute it is; None for an initializer
            and for the default of a function's attribute.
        where: Its path.
        uses: Who reads it, in order of the graphs.
        is_output: Whether it is an output of its graph or of a body inside it.
        is_needed_constant: Whether a runtime needs the value when it loads the model.
    """

    scope: Scope
    tensor: ir.TensorProtocol
    value: ir.Value | None
    node: ir.Node | None
    where: str
    uses: tuple[Use, ...] = ()
    is_output: bool = False
    is_needed_constant: bool = False

    @property
    def dtype(self) -> ir.DataType:
        """Type of the elements."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.nbytes

    @property
    def is_overridable(self) -> bool:
        """Whether it is a default for a graph input."""
        return self.value is not None and self.value.is_graph_input()

    @property
    def opset(self) -> int:
        """Lowest version of ai.onnx where it is held or read, 0 where there is none."""
        scopes = [self.scope, *(use.scope for use in self.uses)]
        return min(scope.opset_imports.get("", 0) for scope in scopes)

    @property
    def readers(self) -> Iterator[ir.Node]:
        """The nodes that read it, directly or through what a constant stays one behind."""
        return (node for node, _ in self._reads())

    @property
    def consumers(self) -> Iterator[ir.Node]:
        """Those of its readers behind which it is no constant any more."""
        return (node for node, further in self._reads() if not further)

    def _reads(self) -> Iterator[tuple[ir.Node, bool]]:
        """Its readers, each with whether there are more behind it."""
        reads = [(use.node, use.index) for use in self.uses]
        seen: set[tuple[ir.Node, int]] = set()
        for node, index in reads:
            if (node, index) in seen:
                continue
            seen.add((node, index))
            further = _behind(node, index)
            yield node, bool(further)
            reads += further

    def store(self, tensor: ir.TensorProtocol) -> None:
        """Put another tensor in its place; the value gets its type."""
        assert self.value is not None, "a tensor in an attribute stays"
        tensor.name = self.value.name
        if self.node is None:
            self.value.const_value = tensor
        else:
            for name in _CONSTANT_FORMS.keys() & self.node.attributes.keys():
                del self.node.attributes[name]
            self.node.attributes.add(ir.AttrTensor("value", tensor))
        self.value.type = ir.TensorType(tensor.dtype)
        self.tensor = tensor


@dataclass(frozen=True)
class Origin:
    """The weight that a value is made from.

    Attributes:
        weight: The weight.
        path: The nodes between them, from the weight on.
    """

    weight: Weight
    path: tuple[ir.Node, ...] = ()


class Weights:
    """All weights of a model; build it anew after the graph was changed.

    Attributes:
        model: The model.
    """

    def __init__(self, model: ir.Model) -> None:
        """Walk the model once."""
        self.model = model
        self._scopes = list(scopes(model))
        uses = _uses(self._scopes)
        self._outputs = _output_names(self._scopes)
        needed = needed_constants(model, self._scopes)
        self._all = [w for scope in self._scopes for w in _weights_in(scope)]
        self._by_value: dict[ir.Value, Weight] = {}
        self._constant: dict[ir.Value, bool] = {}
        for weight in self._all:
            if weight.value is not None:
                weight.uses = tuple(uses.get(weight.value, ()))
                weight.is_needed_constant = weight.value in needed
                weight.is_output = self.is_output(weight.value)
                self._by_value[weight.value] = weight
        self._names = _names(self._scopes)

    def __iter__(self) -> Iterator[Weight]:
        """All weights, outer graphs first."""
        return iter(self._all)

    def __len__(self) -> int:
        """Number of weights."""
        return len(self._all)

    @property
    def scopes(self) -> Sequence[Scope]:
        """The graphs of the model, outer ones first."""
        return self._scopes

    def is_output(self, value: ir.Value) -> bool:
        """Whether a value is an output of its graph or of a body inside it."""
        return value.is_graph_output() or value.name in self._outputs

    def of(self, value: ir.Value | None) -> Weight | None:
        """The weight that is this value, if it is one."""
        return None if value is None else self._by_value.get(value)

    def behind(self, value: ir.Value | None) -> Origin | None:
        """The weight a value is made from without arithmetic, or None.

        Looks through Identity, Cast, Transpose, Reshape, Squeeze, Unsqueeze and
        DequantizeLinear, as far as their other inputs are constants too.
        """
        path: list[ir.Node] = []
        while value is not None:
            if (weight := self.of(value)) is not None:
                return Origin(weight, tuple(reversed(path)))
            node = value.producer()
            if node is None or node.domain or node.op_type not in _PASSES_CONSTANTS:
                return None
            if not all(self._is_constant(extra) for extra in node.inputs[1:]):
                return None
            path.append(node)
            value = node.inputs[0] if node.inputs else None
        return None

    def _is_constant(self, value: ir.Value | None) -> bool:
        if value is not None and value not in self._constant:
            self._constant[value] = self.behind(value) is not None
        return value is None or self._constant[value]

    def unique(self, name: str) -> str:
        """A name that no value or node of the model has; it is taken from then on."""
        candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        found = next(c for c in candidates if c not in self._names)
        self._names.add(found)
        return found


def _behind(node: ir.Node, index: int) -> list[tuple[ir.Node, int]]:
    """Who reads a constant that goes into a node, if it is still one when it comes out."""
    if node.domain or node.op_type not in _PASSES_CONSTANTS:
        return []
    if index and node.op_type != "DequantizeLinear":  # there a scale goes into the values
        return []
    return [(use.node, use.idx) for output in node.outputs for use in output.uses()]


def _strings(attribute: ir.Attr) -> ir.TensorProtocol:
    words = [attribute.value] if isinstance(attribute.value, str) else list(attribute.value)
    content = [word.encode() if isinstance(word, str) else word for word in words]
    shape = [] if attribute.name == "value_string" else [len(content)]
    return ir.StringTensor(content, shape=ir.Shape(shape))


_Kind = ir.AttributeType
_CONSTANT_FORMS: Mapping[str, tuple[_Kind, Callable[[ir.Attr], ir.TensorProtocol]]] = {
    "value": (_Kind.TENSOR, lambda a: a.as_tensor()),
    "value_float": (_Kind.FLOAT, lambda a: ir.tensor(np.array(a.value, np.float32))),
    "value_floats": (_Kind.FLOATS, lambda a: ir.tensor(np.array(a.value, np.float32))),
    "value_int": (_Kind.INT, lambda a: ir.tensor(np.array(a.value, np.int64))),
    "value_ints": (_Kind.INTS, lambda a: ir.tensor(np.array(a.value, np.int64))),
    "value_string": (_Kind.STRING, _strings),
    "value_strings": (_Kind.STRINGS, _strings),
}


def _weights_in(scope: Scope) -> Iterator[Weight]:
    for name, value in scope.graph.initializers.items():
        if value.const_value is not None:
            yield Weight(scope, value.const_value, value, None, scope.path + name)
    if scope.function is not None and scope.parent is None:
        for attribute in scope.function.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:
                where = f"{scope.path}.{attribute.name}"
                yield Weight(scope, attribute.as_tensor(), None, None, where)
    for position, node in enumerate(scope.graph):
        for attribute in node.attributes.values():
            if not attribute.is_ref():
                yield from _in_attribute(scope, node, position, attribute)


def _in_attribute(
    scope: Scope, node: ir.Node, position: int, attribute: ir.Attr
) -> Iterator[Weight]:
    where = scope.path + label(node, position)
    constant = node.op_type == "Constant" and not node.domain and node.outputs
    if constant and attribute.name in _CONSTANT_FORMS:
        value, (kind, form) = node.outputs[0], _CONSTANT_FORMS[attribute.name]
        if attribute.type != kind:
            raise ModelError(f"{where}: attribute {attribute.name!r} is no {kind.name}")
        tensor = form(attribute)
        yield Weight(scope, tensor, value, node, scope.path + (value.name or where))
    elif attribute.type == ir.AttributeType.TENSOR:
        yield Weight(scope, attribute.as_tensor(), None, node, f"{where}.{attribute.name}")
    elif attribute.type == ir.AttributeType.TENSORS:
        for i, tensor in enumerate(attribute.as_tensors()):
            yield Weight(scope, tensor, None, node, f"{where}.{attribute.name}[{i}]")


def _uses(all_scopes: Iterable[Scope]) -> dict[ir.Value, list[Use]]:
    found: dict[ir.Value, list[Use]] = {}
    for scope in all_scopes:
        for position, node in enumerate(scope.graph):
            read = [(i, value) for i, value in enumerate(node.inputs) if value is not None]
            for index, value in read:
                found.setdefault(value, []).append(Use(node, index, scope, position))
    return found


def _output_names(all_scopes: Iterable[Scope]) -> set[str]:
    """Names of body outputs that are not made in the body: values captured from outside.

    onnx_ir does not link those to the outer value, so names are all there is.
    """
    return {
        value.name
        for scope in all_scopes
        for value in scope.graph.outputs
        if value.name
        and value.producer() is None
        and not value.is_graph_input()
        and not value.is_initializer()
    }


def _names(all_scopes: Iterable[Scope]) -> set[str]:
    names: set[str] = set()
    for scope in all_scopes:
        graph = scope.graph
        names |= remarks.names(graph)
        values: list[ir.Value | None] = [
            *graph.inputs,
            *graph.outputs,
            *graph.initializers.values(),
        ]
        for node in graph:
            values += [*node.inputs, *node.outputs]
            names.add(node.name or "")
        names.update(value.name or "" for value in values if value is not None)
    return names


def for_each(work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Do independent work on several threads; results in order of the items."""
    with ThreadPoolExecutor(default_workers(), thread_name_prefix="onnxforge-scan") as pool:
        return list(pool.map(work, items))
