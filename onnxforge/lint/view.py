"""The graphs of a model as rules see them: as they are written, however wrong that is.

onnx_ir refuses much of what rules are about, so this looks at the proto. Names are resolved as
runtimes do: in the graph itself, then in those around it. Weights are not read.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import onnx

if TYPE_CHECKING:
    from onnxforge.storage.wire import Payload

__all__ = ["BITS", "Call", "Graph", "Node", "Tensor", "graphs", "type_name"]

_Type = onnx.TensorProto
BITS: Mapping[int, int] = {
    **dict.fromkeys((_Type.COMPLEX128,), 128),
    **dict.fromkeys((_Type.DOUBLE, _Type.INT64, _Type.UINT64, _Type.COMPLEX64), 64),
    **dict.fromkeys((_Type.FLOAT, _Type.INT32, _Type.UINT32), 32),
    **dict.fromkeys((_Type.FLOAT16, _Type.BFLOAT16, _Type.INT16, _Type.UINT16), 16),
    **dict.fromkeys((_Type.INT8, _Type.UINT8, _Type.BOOL), 8),
    **dict.fromkeys(range(_Type.FLOAT8E4M3FN, _Type.FLOAT8E5M2FNUZ + 1), 8),
    **dict.fromkeys((_Type.UINT4, _Type.INT4, 23), 4),  # 23: float4e2m1
    24: 8,  # float8e8m0
    25: 2,  # uint2
    26: 2,  # int2
}
"""Size in bits of an element, by type; text and unknown types have none."""

Call = tuple[str, str, str]
"""Domain, name and overload of a function; the domain of ai.onnx is empty."""

_SAME = frozenset(
    {
        "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity",
        "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip


@dataclass(eq=False)
class Tensor:
    """A tensor that a model holds.

    Attributes:
        proto: As it is written.
        where: Its path.
        graph: The graph it is in.
        name: The value that has it, empty if it is none.
        payload: Where its bytes are in the model file, if they are many.
    """

    proto: onnx.TensorProto
    where: str
    graph: Graph
    name: str = ""
    payload: Payload | None = None

    @property
    def dtype(self) -> int:
        """Type of the elements."""
        return self.proto.data_type

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Number of elements along each axis."""
        return tuple(self.proto.dims)

    @functools.cached_property
    def nbytes(self) -> int:
        """Size in bytes by type and shape, 0 where that is not known."""
        bits = BITS.get(self.dtype, 0)
        return 0 if min(self.shape, default=0) < 0 else -(-math.prod(self.shape) * bits // 8)

    @property
    def external(self) -> bool:
        """Whether its bytes are in a data file."""
        return self.payload is None and self.proto.data_location == _Type.EXTERNAL

    @property
    def entries(self) -> dict[str, str]:
        """What it says about its data file; of keys that stand twice the last."""
        return {e.key: e.value for e in self.proto.external_data} if self.external else {}


@dataclass(eq=False)
class Node:
    """A node and where it is."""

    proto: onnx.NodeProto
    graph: Graph
    index: int

    @property
    def where(self) -> str:
        """Its path."""
        return self.graph.path + (self.proto.name or f"{self.proto.op_type}#{self.index}")

    @property
    def domain(self) -> str:
        """The domain of its operator; that of ai.onnx is empty."""
        return _domain(self.proto.domain)

    @property
    def op(self) -> str:
        """Its operator, with the domain if that is not ai.onnx."""
        op_type = self.proto.op_type
        return f"{self.domain}::{op_type}" if self.domain else op_type

    @property
    def call(self) -> Call:
        """The function that it calls, if the model has it."""
        return self.domain, self.proto.op_type, self.proto.overload

    @property
    def inputs(self) -> Sequence[str]:
        """Names of its inputs; empty for those left out."""
        return cast("Sequence[str]", self.proto.input)

    @property
    def outputs(self) -> Sequence[str]:
        """Names of its outputs; empty for those left out."""
        return cast("Sequence[str]", self.proto.output)

    def input(self, index: int) -> str:
        """Name of an input, empty if it is left out."""
        return self.proto.input[index] if index < len(self.proto.input) else ""

    def attribute(self, name: str) -> onnx.AttributeProto | None:
        """An attribute by its name."""
        return next((a for a in self.proto.attribute if a.name == name), None)

    def number(self, name: str, default: int) -> int:
        """The value of an attribute that is an integer."""
        found = self.attribute(name)
        return default if found is None else found.i

    def maker(self, index: int) -> Node | None:
        """The node that makes an input."""
        return self.graph.maker(self.input(index))

    def constant(self, index: int) -> Tensor | None:
        """The tensor that is an input."""
        return self.graph.constant(self.input(index))

    def dtype(self, index: int) -> int:
        """Type of the elements of an input, 0 where nothing tells."""
        return self.graph.dtype(self.input(index))


@dataclass(eq=False)
class Graph:
    """A graph, a body or a function.

    Attributes:
        path: Prefix of everything inside, as for `onnxforge.walk.Scope`.
        imports: Version of each operator set that holds here; ai.onnx is "".
        proto: As it is written.
        parent: The graph around it, None for the main graph and for functions.
        holder: The node that runs this body, None also for a default of a function.
        call: How nodes call it, None unless it is a function.
        inside: For the main graph or a function, itself and the bodies in it.
        nodes: In the order they are written.
        tensors: All that it holds, but for those in bodies.
        constants: Those that are values, by name.
        makers: The node that makes a value, by name.
        readers: Who reads a value that belongs to this graph, from bodies as well.
        results: Values that are outputs of this graph or of a body in it.
        missing: Nodes with inputs that nobody makes.
        lost: Outputs that nobody makes.
        types: Types of values, where they are written.
    """

    path: str
    imports: Mapping[str, int]
    proto: onnx.GraphProto | onnx.FunctionProto
    parent: Graph | None = None
    holder: Node | None = None
    call: Call | None = None
    inside: list[Graph] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    makers: dict[str, Node] = field(default_factory=dict)
    readers: dict[str, list[tuple[Node, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    results: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    missing: list[tuple[Node, str]] = field(default_factory=list)
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)

    @functools.cached_property
    def inputs(self) -> Sequence[str]:
        """Names of its inputs."""
        return _names(self.proto.input)

    @functools.cached_property
    def outputs(self) -> Sequence[str]:
        """Names of its outputs."""
        return _names(self.proto.output)

    @functools.cached_property
    def _inputs(self) -> set[str]:
        return set(self.inputs)

    @functools.cached_property
    def root(self) -> Graph:
        """The main graph or the function that it is in, itself if it is one."""
        return self if self.parent is None else self.parent.root

    def owner(self, name: str) -> Graph | None:
        """The graph that makes a value which can be read here; none makes one without name."""
        graph = self if name else None
        while graph is not None and not (
            name in graph.makers or name in graph.constants or name in graph._inputs
        ):
            graph = graph.parent
        return graph

    def maker(self, name: str) -> Node | None:
        """The node that makes a value which can be read here."""
        owner = self.owner(name)
        return owner.makers.get(name) if owner else None

    def constant(self, name: str) -> Tensor | None:
        """The tensor that a value is, None if a caller may replace it."""
        owner = self.owner(name)
        if owner is None or name in owner._inputs:
            return None
        return owner.constants.get(name)

    def dtype(self, name: str) -> int:
        """Type of the elements of a value, 0 where nothing tells."""
        for _ in range(100):  # chains of nodes that keep the type
            owner = self.owner(name)
            if owner is None:
                return 0
            if name in owner.constants:
                return owner.constants[name].dtype
            if name in owner.types:
                return owner.types[name].tensor_type.elem_type
            node = owner.makers.get(name)
            if node is None:
                return 0
            if node.op not in _SAME:
                return _made(node, name)
            name = node.input(0)
        return 0


def _made(node: Node, name: str) -> int:
    """Type of what a node makes that does not keep that of its first input."""
    if node.op == "Cast":
        return node.number("to", 0)
    if node.op == "DynamicQuantizeLinear":
        return _Type.FLOAT if list(node.outputs).index(name) == 1 else _Type.UINT8
    if node.op == "QuantizeLinear":
        return node.dtype(2) if node.input(2) else node.number("output_dtype", _Type.UINT8)
    if node.op in ("MatMulInteger", "ConvInteger"):
        return _Type.INT32
    return 0


def graphs(proto: onnx.ModelProto, payloads: Sequence[Payload], location: str) -> list[Graph]:
    """All graphs of a model: the main one, its bodies, functions.

    Args:
        proto: The model.
        payloads: What was taken out of it.
        location: How tensors are marked that something was taken out of; see
            `onnxforge.storage.wire.excise`.
    """
    reading = _Reading(payloads, location)
    reading.add(Graph("", _imports(proto.opset_import), proto.graph))
    for function in proto.functions:
        path = f"{function.domain}::{function.name}"
        path += f":{function.overload}/" if function.overload else "/"
        call = _domain(function.domain), function.name, function.overload
        reading.add(Graph(path, _imports(function.opset_import), function, call=call))
    for graph in reading.found:
        _link(graph)
    return reading.found


def _imports(entries: Sequence[onnx.OperatorSetIdProto]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in entries:
        domain = _domain(entry.domain)
        if entry.version > 0:  # there is none before the first
            found[domain] = max(entry.version, found.get(domain, 0))
    return found


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _names(ports: Sequence[onnx.ValueInfoProto | str]) -> list[str]:
    """Names of inputs or outputs; those of functions are names alone."""
    return [port if isinstance(port, str) else port.name for port in ports]


def type_name(dtype: int) -> str:
    """What a type of elements is called, its number if it has no name."""
    known = dtype in _Type.DataType.values()
    return _Type.DataType.Name(dtype).lower() if known else f"type {dtype}"


@dataclass
class _Reading:
    """Graphs that are made, and what their tensors need."""

    payloads: Sequence[Payload]
    location: str
    found: list[Graph] = field(default_factory=list)

    def add(self, graph: Graph) -> None:
        """Fill a graph with what its proto has, and add it and its bodies."""
        self.found.append(graph)
        graph.root.inside.append(graph)
        if isinstance(graph.proto, onnx.GraphProto):
            self._values(graph, graph.proto)
        else:
            for attribute in graph.proto.attribute_proto:
                self._attribute(graph, attribute, None, graph.path)
        for index, proto in enumerate(graph.proto.node):
            node = Node(proto, graph, index)
            graph.nodes.append(node)
            for name in filter(None, proto.output):
                graph.makers.setdefault(name, node)
            for attribute in proto.attribute:
                self._attribute(graph, attribute, node, node.where)

    def _values(self, graph: Graph, proto: onnx.GraphProto) -> None:
        for value in (*proto.value_info, *proto.input, *proto.output):
            graph.types[value.name] = value.type
        for tensor in proto.initializer:
            held = self._tensor(tensor, graph.path + tensor.name, graph)
            graph.constants.setdefault(tensor.name, held)
        for sparse in proto.sparse_initializer:
            held = self._tensor(sparse.values, graph.path + sparse.values.name, graph)
            graph.constants.setdefault(sparse.values.name, held)
            self._tensor(sparse.indices, held.where + ".indices", graph)

    def _tensor(self, proto: onnx.TensorProto, where: str, graph: Graph) -> Tensor:
        held = Tensor(proto, where, graph, name=proto.name)
        words = {entry.key: entry.value for entry in proto.external_data}
        if words.get("location") == self.location:
            held.payload = self.payloads[int(words["offset"])]
        graph.tensors.append(held)
        return held

    def _attribute(
        self, graph: Graph, attribute: onnx.AttributeProto, node: Node | None, where: str
    ) -> None:
        tensors = [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        for tensor in tensors:
            held = self._tensor(tensor, f"{where}.{attribute.name}", graph)
            held.name = ""
            if node is not None and node.op == "Constant" and node.outputs:
                held.name = node.outputs[0]
                held.where = graph.path + held.name
                graph.constants.setdefault(held.name, held)
        bodies = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        for body in bodies:
            path = f"{where}/{attribute.name}/"
            self.add(Graph(path, graph.imports, body, parent=graph, holder=node))


def _link(graph: Graph) -> None:
    """Tell each value who reads it."""
    for node in graph.nodes:
        for index, name in enumerate(node.inputs):
            owner = graph.owner(name)
            if owner is not None:
                owner.readers[name].append((node, index))
            elif name:
                graph.missing.append((node, name))
    for name in graph.outputs:
        owner = graph.owner(name)
        if owner is None:
            graph.lost.append(name)
        else:
            owner.results.add(name)
