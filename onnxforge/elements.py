"""Of what type every value of a model is, and what types operators take."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from onnxforge.walk import Scope, bodies, input_of

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "MOVES",
    "TYPE_ATTRIBUTES",
    "Carried",
    "Elements",
    "Signature",
    "carried",
    "signature",
]

_FLOAT = ir.DataType.FLOAT

# The attribute that names the type of the output, and what it is without the attribute: a
# type, or the input that the output is like.
_BY_ATTRIBUTE: Mapping[str, tuple[str, ir.DataType | int | None]] = {
    "Bernoulli": ("dtype", 0),
    "BitCast": ("to", None),
    "BlackmanWindow": ("output_datatype", _FLOAT),
    "Cast": ("to", None),
    "DequantizeLinear": ("output_dtype", 1),
    "EyeLike": ("dtype", 0),
    "HammingWindow": ("output_datatype", _FLOAT),
    "HannWindow": ("output_datatype", _FLOAT),
    "MelWeightMatrix": ("output_datatype", _FLOAT),
    "Multinomial": ("dtype", ir.DataType.INT32),
    "RandomNormal": ("dtype", _FLOAT),
    "RandomNormalLike": ("dtype", 0),
    "RandomUniform": ("dtype", _FLOAT),
    "RandomUniformLike": ("dtype", 0),
}
TYPE_ATTRIBUTES: Mapping[str, str] = {op: name for op, (name, _) in _BY_ATTRIBUTE.items()}
"""Operators whose output has the type that an attribute names, and that attribute."""


MOVES = frozenset(
    {
        "Compress",
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
    }
)
"""Operators that give only values that they were given, or zero."""


@dataclass(frozen=True)
class Signature:
    """What types an operator of ai.onnx takes and gives.

    Attributes:
        inputs: Name of the type of each input; equal names stand for equal types.
        outputs: The same of the outputs.
        allowed: Types that a name may stand for, as ONNX writes them.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: Mapping[str, frozenset[str]]

    def of_input(self, index: int) -> str:
        """Name of the type of an input; the last one stands for all that follow."""
        return self.inputs[min(index, len(self.inputs) - 1)]

    def of_output(self, index: int) -> str:
        """The same of an output."""
        return self.outputs[min(index, len(self.outputs) - 1)]

    def allows(self, name: str, dtype: ir.DataType) -> bool:
        """Whether a name may stand for tensors of a type."""
        return f"tensor({dtype.name.lower()})" in self.allowed.get(name, {name})


def signature(node: ir.Node, version: int) -> Signature | None:
    """The signature of a node's operator, None if ai.onnx has none of that name.

    Args:
        node: The node.
        version: Of ai.onnx where the node is.
    """
    return _signature(node.op_type, version) if node.domain in ("", "ai.onnx") else None


@functools.cache
def _signature(op_type: str, version: int) -> Signature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    return Signature(
        _named(schema.inputs),
        _named(schema.outputs),
        {t.type_param_str: frozenset(t.allowed_type_strs) for t in schema.type_constraints},
    )


def _named(formals: Iterable[onnx.defs.OpSchema.FormalParameter]) -> tuple[str, ...]:
    return tuple(formal.type_str for formal in formals)


@dataclass(frozen=True)
class Carried:
    """Values in and around the bodies of a node that must have one type.

    Attributes:
        inputs: Inputs of the node.
        formals: Inputs of its bodies.
        results: Outputs of its bodies, each as the body and an index.
        outputs: Outputs of the node.
    """

    inputs: tuple[int, ...] = ()
    formals: tuple[ir.Value, ...] = ()
    results: tuple[tuple[ir.Graph, int], ...] = ()
    outputs: tuple[int, ...] = ()


def carried(node: ir.Node, version: int) -> Iterator[Carried]:
    """What If, Loop and Scan hand into their bodies and out of them; of others nothing."""
    graphs = dict(bodies(node))
    if node.domain not in ("", "ai.onnx") or not graphs:
        return
    count = len(node.outputs)
    if node.op_type == "If":
        for k in range(count):
            results = tuple((body, k) for body in graphs.values() if k < len(body.outputs))
            yield Carried(results=results, outputs=(k,))
        return
    body = graphs.get("body")
    if body is None or node.op_type not in ("Loop", "Scan"):
        return
    if node.op_type == "Loop":
        first_in, first_formal, first_result = 2, 2, 1
        states = len(body.inputs) - 2
    else:
        first_in, first_formal, first_result = int(version < 9), 0, 0
        states = len(body.inputs) - node.attributes.get_int("num_scan_inputs", 0)
    for k in range(len(body.inputs) - first_formal):
        given = (first_in + k,) if first_in + k < len(node.inputs) else ()
        formals = (body.inputs[first_formal + k],)
        if k < states:
            results = ((body, first_result + k),)
            yield Carried(given, formals, results, (k,) if k < count else ())
        else:
            yield Carried(given, formals)
    for k in range(states, len(body.outputs) - first_result):
        yield Carried(results=((body, first_result + k),), outputs=(k,) if k < count else ())


class Elements:
    """Types of the values of a model: as they are declared, else as they follow.

    Attributes:
        mixed: Functions that are called with arguments of different types.
    """

    def __init__(self, model: ir.Model, all_scopes: Sequence[Scope]) -> None:
        """Find out the type of every value that the model does not tell of."""
        self._types: dict[ir.Value, ir.TypeProtocol] = {}
        self._scope_of = {scope.graph: scope for scope in all_scopes}
        self._functions = dict(model.functions)
        self._owners: dict[ir.Graph, ir.Node] = {}
        self._calls: dict[ir.OperatorIdentifier, list[ir.Node]] = {}
        self._waiting: list[ir.Node] = []
        self.mixed: set[ir.OperatorIdentifier] = set()
        for scope in all_scopes:
            self._declared(scope)
        while self._waiting:
            self._infer(self._waiting.pop())
        self._find_mixed()

    def type(self, value: ir.Value) -> ir.TypeProtocol | None:
        """The type of a value, None if nothing tells."""
        return self._types.get(value)

    def is_float(self, value: ir.Value | None) -> bool:
        """Whether a value is a tensor of float32."""
        found = None if value is None else self._types.get(value)
        return isinstance(found, ir.TensorType) and found.dtype == _FLOAT

    def is_opaque(self, value: ir.Value | None) -> bool:
        """Whether a value may hold float32 in another form than a tensor, or nobody knows."""
        if value is None:
            return False
        found = self._types.get(value)
        if found is None:
            return True
        return not isinstance(found, ir.TensorType) and found.dtype == _FLOAT

    def outer(self, result: ir.Value, body: ir.Graph) -> ir.Value:
        """What an output of a body really is: it may name a value from outside of it."""
        scope = self._scope_of.get(body)
        if result.producer() is not None or result.is_graph_input() or scope is None:
            return result
        while scope is not None:
            found = self._named_in(scope.graph).get(result.name)
            if found is not None:
                return found
            scope = scope.parent
        return result

    @functools.cache  # noqa: B019 - lives as long as what it was asked about
    def _named_in(self, graph: ir.Graph) -> dict[str | None, ir.Value]:
        values = [*graph.inputs, *graph.initializers.values()]
        values += [output for node in graph for output in node.outputs]
        return {value.name: value for value in values}

    def _declared(self, scope: Scope) -> None:
        """Take over what a graph says of its values, and queue its nodes."""
        graph = scope.graph
        for value in graph.initializers.values():
            if value.const_value is not None:
                self._types[value] = ir.TensorType(value.const_value.dtype)
        for value in (*graph.inputs, *graph.outputs):
            self._tell(value, value.type)
        for node in graph:
            self._calls.setdefault(node.op_identifier(), []).append(node)
            for output in node.outputs:
                self._tell(output, output.type)
            for _, body in bodies(node):
                self._owners[body] = node
        self._waiting += reversed(list(graph))

    def _tell(self, value: ir.Value, type_: ir.TypeProtocol | None) -> None:
        """Note the type of a value that had none, and queue who may learn from it."""
        if type_ is None or value in self._types:
            return
        self._types[value] = type_
        self._waiting += (use.node for use in value.uses())
        graph = value.graph
        if graph is not None and value.is_graph_output():
            self._waiting += [self._owners[graph]] if graph in self._owners else []
            for identifier, function in self._functions.items():
                if function.graph is graph:
                    self._waiting += self._calls.get(identifier, [])

    def _infer(self, node: ir.Node) -> None:
        version = self._version(node)
        function = self._functions.get(node.op_identifier())
        if function is not None:
            for given, formal in zip(node.inputs, function.inputs, strict=False):
                if given is not None:
                    self._tell(formal, self._types.get(given))
            for output, result in zip(node.outputs, function.outputs, strict=False):
                self._tell(output, self._types.get(result))
            return
        for link in carried(node, version):
            self._link(node, link)
        for index, output in enumerate(node.outputs):
            if output not in self._types:
                self._tell(output, self._made(node, index, version))

    def _version(self, node: ir.Node) -> int:
        graph = node.graph
        scope = self._scope_of.get(graph) if isinstance(graph, ir.Graph) else None
        return scope.opset_imports.get("", 0) if scope is not None else 0

    def _link(self, node: ir.Node, link: Carried) -> None:
        values = [*link.formals, *(node.outputs[k] for k in link.outputs)]
        values += [self.outer(body.outputs[k], body) for body, k in link.results]
        given = [value for k in link.inputs if (value := node.inputs[k]) is not None]
        found = next((self._types[v] for v in (*values, *given) if v in self._types), None)
        for value in values:
            self._tell(value, found)

    def _made(self, node: ir.Node, index: int, version: int) -> ir.TypeProtocol | None:
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in ("Constant", "ConstantOfShape"):
            return _constant(node)
        if node.op_type in _BY_ATTRIBUTE:
            return self._by_attribute(node)
        found = signature(node, version)
        if found is None or not found.outputs:
            return None
        name = found.of_output(index)
        if name.startswith("tensor("):
            return ir.TensorType(ir.DataType[name[7:-1].upper()])
        for i, value in enumerate(node.inputs):
            if value in self._types and found.inputs and found.of_input(i) == name:
                return self._types[value]
        only = found.allowed.get(name, frozenset())
        if len(only) == 1 and (word := next(iter(only))).startswith("tensor("):
            return ir.TensorType(ir.DataType[word[7:-1].upper()])
        return None

    def _by_attribute(self, node: ir.Node) -> ir.TypeProtocol | None:
        name, usual = _BY_ATTRIBUTE[node.op_type]
        attribute = node.attributes.get(name)
        if attribute is not None:
            return None if attribute.is_ref() else ir.TensorType(ir.DataType(attribute.value))
        if isinstance(usual, ir.DataType):
            return ir.TensorType(usual)
        given = None if usual is None else input_of(node, usual)
        return None if given is None else self._types.get(given)

    def _find_mixed(self) -> None:
        for identifier, function in self._functions.items():
            calls = self._calls.get(identifier, [])
            if any(self._differs(call, function) for call in calls):
                self.mixed.add(identifier)
        waiting = list(self.mixed)
        while waiting:  # what such a function calls gets its arguments too
            function = self._functions[waiting.pop()]
            inside = [s for s in self._scope_of.values() if s.function is function]
            called = {node.op_identifier() for scope in inside for node in scope.graph}
            new = called & self._functions.keys() - self.mixed
            self.mixed |= new
            waiting += new

    def _differs(self, call: ir.Node, function: ir.Function) -> bool:
        pairs = zip(call.inputs, function.inputs, strict=False)
        return any(
            given is not None and self._types.get(given) != self._types.get(formal)
            for given, formal in pairs
        )


def _constant(node: ir.Node) -> ir.TypeProtocol | None:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            return None
        if attribute.type == ir.AttributeType.TENSOR:
            return ir.TensorType(attribute.as_tensor().dtype)
        kinds = {"float": _FLOAT, "int": ir.DataType.INT64, "string": ir.DataType.STRING}
        for kind, dtype in kinds.items():
            if attribute.name in (f"value_{kind}", f"value_{kind}s"):
                return ir.TensorType(dtype)
    return ir.TensorType(_FLOAT) if node.op_type == "ConstantOfShape" else None
