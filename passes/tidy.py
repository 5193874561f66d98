"""Remove what computes nothing, and sort the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxforge.core import Effect, Fate, Finding, Pass, Result
from onnxforge.errors import Refused
from onnxforge.walk import bodies, scopes
from onnxforge.weights import Weight, Weights

__all__ = ["TidyPass"]

_ANNOTATIONS = "quant_parameter_tensor_names"  # where onnx_ir keeps them


@dataclass(frozen=True)
class TidyPass(Pass):
    """Remove nodes and weights that nobody reads, and sort nodes.

    A node goes if nothing reads any of its outputs and none is an output of a graph, then what
    only that node needed, and so on; initializers go the same way. Nodes are sorted where one
    stands before what it reads; the order stays as it is where it is good. Bodies of If, Loop
    and Scan and functions are treated too. What is computed stays the same, bit for bit.

    An initializer that is a graph input stays, since callers may give it. Functions that
    nobody calls stay. The pass refuses a graph whose order hangs on a body that gives out a
    value of the graph around it before that is made.

    Attributes:
        sort: Sort nodes; false only removes.

    Example:
        onnxforge run --passes tidy in.onnx out.onnx
    """

    name: ClassVar[str] = "tidy"
    effect: ClassVar[Effect] = Effect.STORAGE
    codes: ClassVar[Mapping[str, str]] = {
        "OF281": "Nothing reads the weight, or only nodes that are removed; it is removed.",
        "OF282": "The weight is needed.",
    }

    sort: bool = True

    def call(self, model: ir.Model) -> Result:
        """Remove, then sort."""
        before = [(weight, weight.where, weight.nbytes) for weight in Weights(model)]
        gone = _Gone()
        while gone.take(model):
            pass
        unsorted = [scope for scope in scopes(model) if not _is_sorted(scope.graph)]
        if unsorted and self.sort:
            _sort(model)
        findings = tuple(
            Finding("OF281", where, "removed, nothing needs it", size, Fate.TREATED)
            if gone.has(weight)
            else Finding("OF282", where, "is needed", size, Fate.SKIPPED)
            for weight, where, size in before
        )
        stats = {
            "nodes_removed": len(gone.nodes),
            "initializers_removed": len(gone.values),
            "graphs_sorted": len(unsorted) * self.sort,
        }
        return Result(model, any(stats.values()), stats, findings)


class _Gone:
    """What was removed.

    Attributes:
        nodes: Nodes, but for those in bodies of them.
        values: Values of initializers.
    """

    def __init__(self) -> None:
        self.nodes: set[ir.Node] = set()
        self.values: set[ir.Value] = set()
        self._graphs: set[int] = set()

    def has(self, weight: Weight) -> bool:
        """Whether a weight was removed, with its node or with the body it was in."""
        graph = id(weight.scope.graph)
        return (
            graph in self._graphs or weight.node in self.nodes or weight.value in self.values
        )

    def take(self, model: ir.Model) -> bool:
        """Remove what nobody reads now; whether there was anything."""
        weights = Weights(model)
        count = len(self.nodes) + len(self.values)
        for scope in reversed(weights.scopes):
            if id(scope.graph) not in self._graphs:
                self._from(scope.graph, weights)
        return len(self.nodes) + len(self.values) > count

    def _from(self, graph: ir.Graph, weights: Weights) -> None:
        for node in reversed(graph):
            if not any(out.uses() or weights.is_output(out) for out in node.outputs):
                self._detach(node)
                graph.remove(node, safe=True)
                self.nodes.add(node)
        annotated = _annotated(graph)
        for name, value in list(graph.initializers.items()):
            read = value.uses() or weights.is_output(value) or name in annotated
            if not read and not value.is_graph_input():
                del graph.initializers[name]
                self.values.add(value)

    def _detach(self, node: ir.Node) -> None:
        """Make the bodies of a node read nothing any more."""
        for _, body in bodies(node):
            self._graphs.add(id(body))
            for inner in body:
                self._detach(inner)
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)


def _annotated(graph: ir.Graph) -> set[str]:
    """Names that quantization annotations of a graph mention."""
    values = [*graph.inputs, *graph.initializers.values()]
    values += [output for node in graph for output in node.outputs]
    return {name for v in values for name in dict(v.meta.get(_ANNOTATIONS, {})).values()}


def _sort(model: ir.Model) -> None:
    model.graph.sort()
    for function in model.functions.values():
        function.sort()
    for scope in scopes(model):
        if not _is_sorted(scope.graph):
            where = scope.path.removesuffix("/") or "the main graph"
            raise Refused(f"{where}: cannot be sorted")


def _is_sorted(graph: ir.Graph) -> bool:
    place = {node: index for index, node in enumerate(graph)}
    makers = {output.name or "": node for node in place for output in node.outputs}
    return all(
        place[maker] < index
        for node, index in place.items()
        for maker in _read(node, makers)
        if maker in place
    )


def _read(node: ir.Node, makers: Mapping[str, ir.Node]) -> Iterator[ir.Node]:
    """The nodes that make what a node or its bodies read.

    onnx_ir links what a body gives out as it is to no value around it: those go by name.
    """
    yield from filter(None, (value.producer() for value in node.inputs if value is not None))
    for _, body in bodies(node):
        for output in body.outputs:
            made = output.producer() or output.is_graph_input() or output.is_initializer()
            if not made and (output.name or "") in makers:
                yield makers[output.name or ""]
        for inner in body:
            yield from _read(inner, makers)
