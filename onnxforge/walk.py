"""Every graph, every tensor of a model, with a path that a person can follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Scope",
    "bodies",
    "input_of",
    "label",
    "named_tensors",
    "proto_graphs",
    "proto_tensors",
    "replace_tensors",
    "scopes",
    "tensors",
]


@dataclass(frozen=True, eq=False)
class Scope:
    """A graph and where it is.

    Attributes:
        graph: The main graph, a body of If, Loop or Scan, or the body of a function.
        path: Prefix of everything inside, empty for the main graph, else with a trailing
            slash, such as ``If_7/then_branch/``.
        parent: The scope whose values this one can see, None for the main graph and functions.
        function: The function this scope is in, None outside of functions.
    """

    graph: ir.Graph
    path: str
    parent: Scope | None = None
    function: ir.Function | None = None

    @property
    def opset_imports(self) -> dict[str, int]:
        """Domain and version of the operator sets that hold here."""
        scope = self
        while scope.parent is not None:
            scope = scope.parent
        owner = scope.function if scope.function is not None else scope.graph
        imports = dict(owner.opset_imports)
        if "ai.onnx" in imports:  # the long name of the standard domain
            imports[""] = max(imports.pop("ai.onnx"), imports.get("", 0))
        return imports


def label(node: ir.Node | onnx.NodeProto, index: int) -> str:
    """The name of a node, or its operator and position in its graph when it has none."""
    return node.name or f"{node.op_type}#{index}"


def scopes(model: ir.Model) -> Iterator[Scope]:
    """All graphs of a model, outer before inner: main graph, its bodies, functions."""
    yield from _inside(Scope(model.graph, ""))
    for function in model.functions.values():
        name = f"{function.domain}::{function.name}"
        if function.overload:
            name += f":{function.overload}"
        yield from _inside(Scope(function.graph, f"{name}/", function=function))


def _inside(scope: Scope) -> Iterator[Scope]:
    yield scope
    for index, node in enumerate(scope.graph):
        for name, body in bodies(node) if node.attributes else ():
            path = f"{scope.path}{label(node, index)}/{name}/"
            yield from _inside(Scope(body, path, scope, scope.function))


def bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The graphs that a node runs, each with the name of its attribute."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((attribute.name, body) for body in attribute.as_graphs())


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, None if it is left out or there are not so many."""
    return node.inputs[index] if index < len(node.inputs) else None


def replace_tensors(
    model: ir.Model, replace: Callable[[ir.TensorProtocol], ir.TensorProtocol]
) -> None:
    """Put ``replace(tensor)`` in the place of every tensor of a model."""
    for scope in scopes(model):
        for value in scope.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.name = value.name
                value.const_value = replace(value.const_value)
        for node in scope.graph:
            if node.attributes:
                _replace_in(node.attributes, replace)
    for function in model.functions.values():
        _replace_in(function.attributes, replace)


def tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    """Every tensor of a model, in the order of its places."""
    found: list[ir.TensorProtocol] = []

    def note(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        found.append(tensor)
        return tensor

    replace_tensors(model, note)
    return found


def _replace_in(
    attributes: MutableMapping[str, ir.Attr],
    replace: Callable[[ir.TensorProtocol], ir.TensorProtocol],
) -> None:
    changed = [_replaced(a, replace) for a in attributes.values()]
    attributes.update({a.name: a for a in changed if a is not None})


def _replaced(
    attribute: ir.Attr, replace: Callable[[ir.TensorProtocol], ir.TensorProtocol]
) -> ir.Attr | None:
    if attribute.is_ref():
        return None
    if attribute.type == ir.AttributeType.TENSOR:
        old: list[ir.TensorProtocol] = [attribute.as_tensor()]
    elif attribute.type == ir.AttributeType.TENSORS:
        old = list(attribute.as_tensors())
    else:
        return None
    new = [replace(tensor) for tensor in old]
    if all(a is b for a, b in zip(old, new, strict=True)):
        return None
    value = new[0] if attribute.type == ir.AttributeType.TENSOR else new
    return ir.Attr(attribute.name, attribute.type, value, doc_string=attribute.doc_string)


def proto_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of a proto, sparse ones and training graphs aside."""
    return (tensor for _, tensor in named_tensors(model))


def named_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The same, each with its name; without one, after the node and attribute it is in."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        for attribute in function.attribute_proto:
            yield from _attribute_tensors(attribute, function.name)


def proto_graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph of a proto and all bodies, also those in functions."""
    yield model.graph
    yield from _bodies(model.graph.node)
    for function in model.functions:
        yield from _bodies(function.node)


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            for graph in [
                *([attribute.g] if attribute.HasField("g") else []),
                *attribute.graphs,
            ]:
                yield graph
                yield from _bodies(graph.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    yield from _node_tensors(graph.node)


def _node_tensors(
    nodes: Iterable[onnx.NodeProto],
) -> Iterator[tuple[str, onnx.TensorProto]]:
    for index, node in enumerate(nodes):
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute, label(node, index))


def _attribute_tensors(
    attribute: onnx.AttributeProto, owner: str
) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
        yield tensor.name or f"{owner}.{attribute.name}", tensor
    if attribute.HasField("g"):
        yield from _graph_tensors(attribute.g)
    for graph in attribute.graphs:
        yield from _graph_tensors(graph)
