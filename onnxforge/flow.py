"""What lies before and behind what in a model, across bodies and functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxforge.walk import Scope, bodies

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["between"]


def between(
    model: ir.Model, scopes: Iterable[Scope], kind: Collection[str]
) -> tuple[set[ir.Node], set[ir.Node]]:
    """Nodes that lie behind an operator of some kinds, and nodes that lie before one.

    A body lies between what its node reads and what reads its node, the body of a function
    so for each call. Bodies of Loop and Scan feed themselves.

    Args:
        model: The model.
        scopes: All its scopes.
        kind: Operators of ai.onnx.

    Returns:
        The nodes behind one, and those before one.
    """
    all_scopes = list(scopes)
    feeds = _feeds(model, all_scopes)
    starts = [
        node
        for scope in all_scopes
        for node in scope.graph
        if node.op_type in kind and not node.domain
    ]
    fed: dict[ir.Node, list[ir.Node]] = {}
    for node, makers in feeds.items():
        for maker in makers:
            fed.setdefault(maker, []).append(node)
    return _reached(starts, fed), _reached(starts, feeds)


def _reached(starts: Iterable[ir.Node], edges: dict[ir.Node, list[ir.Node]]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = list(starts)
    while waiting:
        for node in edges.get(waiting.pop(), ()):
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def _feeds(model: ir.Model, scopes: list[Scope]) -> dict[ir.Node, list[ir.Node]]:
    """For each node those that make what it reads."""
    owners: dict[ir.Graph, list[ir.Node]] = {}
    calls: dict[Hashable, list[ir.Node]] = {}
    for scope in scopes:
        for node in scope.graph:
            calls.setdefault(node.op_identifier(), []).append(node)
            for _, body in bodies(node):
                owners.setdefault(body, []).append(node)
    for function in model.functions.values():
        owners[function.graph] = calls.get(function.identifier(), [])
    insides: dict[ir.Node, list[ir.Graph]] = {}
    for graph, nodes in owners.items():
        for node in nodes:
            insides.setdefault(node, []).append(graph)
    return {
        node: [
            *_makers(node.inputs, owners),
            *(m for graph in insides.get(node, ()) for m in _makers(graph.outputs, owners)),
        ]
        for scope in scopes
        for node in scope.graph
    }


def _makers(
    values: Iterable[ir.Value | None], owners: dict[ir.Graph, list[ir.Node]]
) -> Iterator[ir.Node]:
    for value in values:
        if value is None:
            continue
        if (producer := value.producer()) is not None:
            yield producer
        elif value.is_graph_input() and value.graph in owners:
            yield from _arguments(value.graph, owners)


def _arguments(
    graph: ir.Graph | None, owners: dict[ir.Graph, list[ir.Node]]
) -> Iterator[ir.Node]:
    """What may feed an input of a body: what its node reads, and its own outputs in a loop."""
    assert graph is not None, "an input belongs to a graph"
    for owner in owners[graph]:
        values = [*owner.inputs, *(graph.outputs if owner.op_type in ("Loop", "Scan") else ())]
        for value in values:
            if value is None:
                continue
            if (producer := value.producer()) is not None:
                yield producer
            elif value.is_graph_input() and value.graph in owners and value.graph is not graph:
                yield from _arguments(value.graph, owners)
