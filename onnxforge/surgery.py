"""Edits of a graph that passes over weights have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from onnxforge.weights import Weight, Weights

__all__ = ["Surgery", "take_over"]


class Surgery:
    """Adds constants and nodes to a model under names that are free."""

    def __init__(self, weights: Weights) -> None:
        """Edit the model of these weights."""
        self.weights = weights
        self._companions: dict[ir.Graph, dict[str, list[ir.Value]]] = {}
        self._retired: list[ir.Value] = []
        self._last: dict[ir.Node, ir.Node] = {}

    def constant(self, beside: Weight, name: str, content: np.ndarray) -> ir.Value:
        """Add a constant next to a weight, in the form that the weight has.

        Args:
            beside: The weight; its graph gets the constant.
            name: The name, if it is free, else the next one like it.
            content: The values.
        """
        assert beside.value is not None, "a tensor in an attribute has no companions"
        graph = beside.scope.graph
        if beside.node is None:
            value = self.initializer(graph, name, content)
            companions = self._companions.setdefault(graph, {})
            companions.setdefault(beside.value.name or "", []).append(value)
            return value
        free = self.weights.unique(name)
        tensor = ir.tensor(content, name=free)
        node = self.node("Constant", [], free, tensor.dtype, {"value": tensor})
        node.outputs[0].shape = ir.Shape(content.shape)
        graph.insert_after(self._last.get(beside.node, beside.node), node)
        self._last[beside.node] = node
        return node.outputs[0]

    def initializer(self, graph: ir.Graph, name: str, content: np.ndarray) -> ir.Value:
        """Add an initializer to a graph, behind all others.

        Args:
            graph: The main graph or a body.
            name: The name, if it is free, else the next one like it.
            content: The values.
        """
        free = self.weights.unique(name)
        tensor = ir.tensor(content, name=free)
        value = ir.Value(
            name=free,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(content.shape),
            const_value=tensor,
        )
        graph.initializers.add(value)
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        output: str,
        dtype: ir.DataType,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Node:
        """A node of one output, not in a graph yet; ``output`` is a name that is free."""
        made = ir.Value(name=output, type=ir.TensorType(dtype))
        name = self.weights.unique(f"{output}_{operator}")
        return ir.node(operator, inputs, attributes, name=name, outputs=[made])

    def insert_behind(self, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Put nodes right behind where a value is made, so before all its readers."""
        graph, producer = value.graph, value.producer()
        assert graph is not None, "a value that is read belongs to a graph"
        if producer is not None:
            graph.insert_after(producer, nodes)
        else:
            graph.insert_before(graph[0], nodes)

    def drop_dead(self, nodes: Sequence[ir.Node]) -> None:
        """Remove those of the nodes that nobody reads, the last first."""
        for node in reversed(nodes):
            read = any(o.uses() or self.weights.is_output(o) for o in node.outputs)
            if node.graph is not None and not read:
                node.graph.remove(node, safe=True)

    def drop_unread(self, constants: Iterable[ir.Value | None]) -> None:
        """Remove those of the constants that nobody reads and that are no graph input."""
        for value in constants:
            weight = self.weights.of(value)
            if value is None or weight is None or weight.is_overridable or value.uses():
                continue
            if weight.node is not None:
                self.drop_dead([weight.node])
            elif not self.weights.is_output(value):
                weight.scope.graph.initializers.pop(value.name or "", None)

    def retire(self, constant: ir.Value) -> None:
        """Remove a constant in the end, if nobody reads it then."""
        self._retired.append(constant)

    def settle(self) -> None:
        """Give initializers their order: companions stand behind their weight.

        So the order does not depend on which of several passes came first.
        """
        for graph, companions in self._companions.items():
            added = {id(v) for values in companions.values() for v in values}
            ordered = [v for v in graph.initializers.values() if id(v) not in added]
            data = graph.initializers.data
            data.clear()
            for value in ordered:
                data[value.name or ""] = value
                for companion in companions.get(value.name or "", ()):
                    data[companion.name or ""] = companion
        self.drop_unread(self._retired)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Make a value stand where another one stood: its users, name, type and remarks.

    The old value is left without a name; whoever keeps it gives it one.
    """
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None
    new.shape = None if old.shape is None else old.shape.copy()
    new.type, new.doc_string = old.type, old.doc_string
    new.meta.update(old.meta)
    new.metadata_props.update(old.metadata_props)
    old.doc_string = None
    old.meta.clear()
    old.metadata_props.clear()
