"""The operators that a model uses, each with the types of what goes in and comes out."""

from __future__ import annotations

import functools
import graphlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from onnxforge.runtime.expansion import as_node, function
from onnxforge.runtime.kernels import Signature, signature
from onnxforge.runtime.types import element, of_proto, of_value, to_proto
from onnxforge.walk import bodies, label

__all__ = ["Use", "uses"]

Types = Sequence["str | None"]
Imports = Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Use:
    """A node and the types around it.

    Attributes:
        where: Path of the node; a node in a function has the function's path, once for each
            call with other types.
        node: The node.
        imports: Versions of the operator sets that hold there.
        inputs: Types of the inputs, "" for one left out, None for one that is not known.
        outputs: Types of the outputs, likewise.
        attributes: Its attributes, where a function's node takes them from the call.
    """

    where: str
    node: ir.Node
    imports: Imports
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    attributes: Mapping[str, ir.Attr]

    @property
    def domain(self) -> str:
        """Domain of the operator, "" for ai.onnx."""
        return _standard(self.node.domain)

    @property
    def version(self) -> int | None:
        """Version of the operator set, None where it is not imported."""
        return self.imports.get(self.domain)

    @functools.cached_property
    def parts(self) -> tuple[Use, ...]:
        """The nodes that onnx makes of it, none for an operator that is made of nothing."""
        if self.version is None:
            return ()
        operator = self.domain, self.node.op_type, self.version
        shapes = [None if value is None else value.shape for value in self.node.inputs]
        body = function(operator, self.inputs, self.outputs, self.attributes, shapes)
        if body is None:
            return ()
        walk = _Walk({}, {**_imports(body.opset_imports), **self.imports})
        return tuple(walk.function(body, f"{self.where}/", self.inputs, self.attributes))


def uses(model: ir.Model) -> Iterator[Use]:
    """Every node of a model, in bodies and in functions as they are called.

    Constant nodes are left out: runtimes make weights of them.
    """
    walk = _Walk(model.functions, _imports(model.opset_imports))
    yield from walk.graph(model.graph, "", {})


def _standard(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _imports(imports: Mapping[str, int]) -> Imports:
    found: dict[str, int] = {}
    for domain, version in imports.items():
        found[_standard(domain)] = max(version, found.get(_standard(domain), 0))
    return found


class _Walk:
    """One walk through a graph, or through one call of a function."""

    def __init__(
        self,
        functions: Mapping[ir.OperatorIdentifier, ir.Function],
        imports: Imports,
        attributes: Mapping[str, ir.Attr] | None = None,
    ) -> None:
        self._functions = functions
        self._imports = imports
        self._given = attributes or {}
        self._types: dict[ir.Value, str | None] = {}
        self._seen: set[tuple[Any, ...]] = set()

    def graph(
        self, graph: ir.Graph, path: str, given: Mapping[ir.Value, str | None]
    ) -> Iterator[Use]:
        for value in graph.inputs:
            self._types[value] = given.get(value) or of_value(value.type)
        for value in graph.initializers.values():
            if value.const_value is not None:
                self._types[value] = element(value.const_value.dtype)
        positions = {node: i for i, node in enumerate(graph)}
        for node in _in_order(graph):
            yield from self._node(node, path, f"{path}{label(node, positions[node])}")

    def function(
        self,
        function: ir.Function,
        path: str,
        inputs: Types,
        attributes: Mapping[str, ir.Attr],
    ) -> Iterator[Use]:
        defaults = (a for a in function.attributes.values() if a.value is not None)
        self._given = {**{a.name: a for a in defaults}, **attributes}
        known = dict(zip(function.inputs, inputs, strict=False))
        yield from self.graph(function.graph, path, known)

    def types(self, values: Sequence[ir.Value | None]) -> tuple[str | None, ...]:
        return tuple("" if value is None else self._type(value) for value in values)

    def _type(self, value: ir.Value) -> str | None:
        return self._types.get(value) or of_value(value.type)

    def _node(self, node: ir.Node, path: str, where: str) -> Iterator[Use]:
        inputs = self.types(node.inputs)
        attributes = self._attributes(node)
        function = self._functions.get(node.op_identifier())
        if function is not None:
            outputs = yield from self._call(function, inputs, attributes)
        elif node.attributes and next(bodies(node), None):
            outputs = yield from self._with_bodies(node, inputs, where)
        else:
            outputs = self._outputs(node, inputs, attributes)
        for value, kind in zip(node.outputs, outputs, strict=False):
            self._types[value] = kind or of_value(value.type)
        if function is None and node.op_type != "Constant":
            found = tuple(self._type(value) if value.name else "" for value in node.outputs)
            yield Use(where, node, self._imports, inputs, found, attributes)

    def _attributes(self, node: ir.Node) -> Mapping[str, ir.Attr]:
        if not any(attribute.is_ref() for attribute in node.attributes.values()):
            return node.attributes
        found = {}
        for name, attribute in node.attributes.items():
            if not attribute.is_ref():
                found[name] = attribute
            elif (value := self._given.get(attribute.ref_attr_name or "")) is not None:
                found[name] = ir.Attr(name, value.type, value.value)
        return found

    def _call(
        self, function: ir.Function, inputs: Types, attributes: Mapping[str, ir.Attr]
    ) -> Generator[Use, None, Types]:
        inner = _Walk(self._functions, _imports(function.opset_imports))
        path = f"{function.domain}::{function.name}"
        path += f":{function.overload}/" if function.overload else "/"
        found = list(inner.function(function, path, inputs, attributes))
        key = (id(function), tuple(inputs), repr(sorted(attributes.items())))
        if key not in self._seen:
            self._seen.add(key)
            yield from found
        return inner.types(function.outputs)

    def _with_bodies(
        self, node: ir.Node, inputs: Types, where: str
    ) -> Generator[Use, None, Types]:
        outputs: Types = ()
        for name, body in bodies(node):
            given = dict(zip(body.inputs, _handed(node, inputs), strict=False))
            yield from self.graph(body, f"{where}/{name}/", given)
            types = self.types(body.outputs)
            if node.op_type == "Loop":
                types = types[1:]
            elif node.op_type == "SequenceMap":
                types = tuple(None if kind is None else f"seq({kind})" for kind in types)
            outputs = outputs or types
        return outputs

    def _outputs(
        self, node: ir.Node, inputs: Types, attributes: Mapping[str, ir.Attr]
    ) -> Types:
        if node.op_type == "Constant":
            return (_constant({**node.attributes, **attributes}),)
        domain = _standard(node.domain)
        known = signature(domain, node.op_type, self._imports.get(domain, 1))
        if known is None:
            return [None] * len(node.outputs)
        found = [_output(known, i, known.bound(inputs, ())) for i in range(len(node.outputs))]
        if None in found and domain in _INFERRED:
            told = _inferred(node, inputs, self._imports, attributes)
            found = [a or b for a, b in zip(found, told, strict=True)]
        return found


_INFERRED = ("", "ai.onnx.ml")
_ELEMENTS = {element(dtype) for dtype in ir.DataType}


def _output(known: Signature, i: int, bound: Mapping[str, set[str | None]]) -> str | None:
    """The type of an output: its own, or that of inputs of the same type, or the only one."""
    if not known.outputs:
        return None
    kind = known.outputs[min(i, len(known.outputs) - 1)].type
    if kind in _ELEMENTS or "(" in kind:
        return kind
    types = bound.get(kind, {None})
    if types == {None} and len(known.choices.get(kind, ())) == 1:
        return known.choices[kind][0]
    return next(iter(types)) if len(types) == 1 else None


def _handed(node: ir.Node, inputs: Types) -> Types:
    """Types of what a node hands to its body."""
    if node.op_type == "Loop":
        return ["int64", "bool", *inputs[2:]]
    if node.op_type == "Scan":
        # The first version of it took the lengths of sequences first.
        extra = len(inputs) - len(next(bodies(node))[1].inputs)
        return inputs[max(extra, 0) :]
    if node.op_type == "SequenceMap":
        return [kind[4:-1] if kind and kind.startswith("seq(") else kind for kind in inputs]
    return []


def _constant(attributes: Mapping[str, ir.Attr]) -> str | None:
    kinds = {"value_int": "int64", "value_float": "float", "value_string": "string"}
    for name, attribute in attributes.items():
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
            return element(attribute.as_tensor().dtype)
        if kind := kinds.get(name.removesuffix("s")):
            return kind
        if name == "sparse_value":
            return None
    return None


def _inferred(
    node: ir.Node, inputs: Types, imports: Imports, attributes: Mapping[str, ir.Attr]
) -> list[str | None]:
    """Types of the outputs as onnx infers them, where attributes decide."""
    domain = _standard(node.domain)
    outputs: list[str | None] = [None] * len(node.outputs)
    proto = as_node((domain, node.op_type), inputs, outputs, attributes)
    given = {
        f"in{i}": to_proto(kind or "") or onnx.TypeProto()
        for i, kind in enumerate(inputs)
        if kind != ""
    }
    opsets = [onnx.helper.make_opsetid(*item) for item in imports.items()]
    try:
        schema = onnx.defs.get_schema(node.op_type, imports.get(domain, 1), domain)
        found = onnx.shape_inference.infer_node_outputs(
            schema, proto, given, opset_imports=opsets
        )
    except (
        onnx.checker.ValidationError,
        onnx.defs.SchemaError,
        onnx.shape_inference.InferenceError,
    ):
        return outputs
    return [of_proto(found.get(f"out{i}")) for i in range(len(outputs))]


def _in_order(graph: ir.Graph) -> Sequence[ir.Node]:
    """The nodes, each behind those that make its inputs."""
    nodes = list(graph)
    needs: dict[ir.Node, list[ir.Node]] = {}
    done: set[ir.Node] = set()
    is_sorted = True
    for node in nodes:
        needs[node] = [
            maker
            for value in _read(node)
            if (maker := value.producer()) is not None and maker.graph is graph
        ]
        is_sorted = is_sorted and all(maker in done for maker in needs[node])
        done.add(node)
    return nodes if is_sorted else list(graphlib.TopologicalSorter(needs).static_order())


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, and what its bodies do."""
    yield from (value for value in node.inputs if value is not None)
    if node.attributes:
        for _, body in bodies(node):
            yield from (value for value in body.outputs)
            for inner in body:
                yield from _read(inner)
