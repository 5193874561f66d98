"""Graphs: order, names, and what computes nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import onnx

from onnxforge.lint.finding import Problem, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model
    from onnxforge.lint.view import Graph, Node

__all__ = ["RULES", "live"]


def unsorted(model: Model, options: Options) -> Iterator[Problem]:
    """A node stands before one whose output it reads.

    What it does:
        Looks at the order of nodes in every graph; what a body reads from outside counts for
        the node that runs the body.

    Why it is bad:
        ONNX wants nodes sorted. onnxruntime sorts those of the main graph itself and refuses
        bodies and functions that are not; others read from first to last and fail; the
        checker refuses the model.

    Example:
        onnxruntime's float16 converter puts its Cast nodes at the end of the graph.

    How to mend:
        Sort the nodes: `onnxforge run --passes tidy in.onnx out.onnx`.

    Fix:
        Safe: `tidy`.
    """
    for node in model.nodes:
        for name in node.inputs:
            if late := _late(node, name):
                text = f"reads {name!r}, which {late.where} makes later"
                yield Problem(text, node.where, passes="tidy")


def _late(node: Node, name: str) -> Node | None:
    """The node that makes an input, if it comes too late."""
    maker = node.graph.maker(name)
    reader = _inside(maker.graph, node) if maker else None
    return maker if maker and reader and maker.index >= reader.index else None


def _inside(graph: Graph, node: Node) -> Node | None:
    """The node of a graph that a node is, or is run by; None in a default of a function."""
    found: Node | None = node
    while found is not None and found.graph is not graph:
        found = found.graph.holder
    return found


def duplicate_value(model: Model, options: Options) -> Iterator[Problem]:
    """Two nodes, inputs or initializers of a graph make values of the same name.

    What it does:
        Counts the names that inputs, initializers and nodes of each graph give. An
        initializer may have the name of an input, whose default it is then.

    Why it is bad:
        Nobody knows which of them a reader means; runtimes refuse the model.

    Example:
        Two models were merged without a prefix for the names of one.

    How to mend:
        Rename one of them and its readers.

    Fix:
        None.
    """
    for graph in model.graphs:
        made = Counter(name for node in graph.nodes for name in node.outputs if name)
        made.update(set(graph.inputs))
        if isinstance(graph.proto, onnx.GraphProto):
            made.update(Counter(tensor.name for tensor in graph.proto.initializer))
            made.subtract(set(graph.inputs) & {t.name for t in graph.proto.initializer})
        for name, count in made.items():
            if count > 1:
                yield Problem(f"is made {count} times", graph.path + name)
        for name, count in Counter(graph.inputs).items():
            if count > 1:
                yield Problem(f"is an input {count} times", graph.path + name)


def duplicate_node_name(model: Model, options: Options) -> Iterator[Problem]:
    """Nodes of one graph have the same name.

    What it does:
        Counts the names of nodes in each graph; nodes may have none.

    Why it is bad:
        A tool that is told to leave a node alone, a profile, a message: each means them all.

    Example:
        A tool copies a layer and renames its values only.

    How to mend:
        Rename them; nothing in a graph refers to the names of nodes.

    Fix:
        None.
    """
    for graph in model.graphs:
        counts = Counter(node.proto.name for node in graph.nodes if node.proto.name)
        for name, count in counts.items():
            if count > 1:
                yield Problem(f"{count} nodes have this name", graph.path + name)


def missing_value(model: Model, options: Options) -> Iterator[Problem]:
    """A node reads a value, or a graph gives one out, that nothing makes.

    What it does:
        Looks every name up in its graph and in those around it.

    Why it is bad:
        The model does not load.

    Example:
        A weight was removed because no tool knew that a body reads it.

    How to mend:
        Export again.

    Fix:
        None.
    """
    for graph in model.graphs:
        for node, name in graph.missing:
            yield Problem(f"reads {name!r}, which nothing makes", node.where)
        for name in graph.lost:
            yield Problem("is an output that nothing makes", graph.path + name)


def dead_node(model: Model, options: Options) -> Iterator[Problem]:
    """A node computes what nobody reads.

    What it does:
        Goes back from the outputs of each graph; what is not reached is dead.

    Why it is bad:
        It may keep weights in the file that nobody needs, and tools treat it like any other
        node. Runtimes remove it.

    Example:
        A Shape that an exporter wrote and a later step replaced.

    How to mend:
        Remove it: `onnxforge run --passes tidy in.onnx out.onnx`.

    Fix:
        Safe: `tidy`.
    """
    for graph in model.graphs:
        alive = live(graph)
        for node in graph.nodes:
            unique = all(graph.makers[name] is node for name in node.outputs if name)
            if node.index not in alive and unique:
                yield Problem(
                    f"nobody reads what this {node.op} makes", node.where, passes="tidy"
                )


def live(graph: Graph) -> set[int]:
    """Numbers of the nodes of a graph that its outputs, or bodies that are run, need."""
    found: set[int] = set()
    needs: dict[int | None, list[str]] = defaultdict(list)
    for name, readers in graph.readers.items():
        for reader, _ in readers:
            holder = _inside(graph, reader)
            needs[holder.index if holder else None].append(name)
    waiting = [*graph.results, *needs[None]]  # any node may run a default
    while waiting:
        node = graph.makers.get(waiting.pop())
        if node is not None and node.index not in found:
            found.add(node.index)
            waiting += needs[node.index]
    return found


def unused_initializer(model: Model, options: Options) -> Iterator[Problem]:
    """A weight is read by nobody.

    What it does:
        Looks for readers of every initializer, in bodies too; an output of a graph and a
        quantization annotation read as well.

    Why it is bad:
        It is downloaded and loaded for nothing.

    Example:
        A tool stores an int8 copy of a weight and leaves the float32 one.

    How to mend:
        Remove it: `onnxforge run --passes tidy in.onnx out.onnx`.

    Fix:
        Safe: `tidy`, unless a caller may give the value, as for an initializer that is an
        input.
    """
    for graph in model.graphs:
        if isinstance(graph.proto, onnx.GraphProto):
            for name in _unread(graph, graph.proto):
                held = graph.constants[name]
                text = f"nobody reads its {held.nbytes:,} bytes"
                passes = None if name in graph.inputs else "tidy"
                yield Problem(text, held.where, passes=passes)


def _unread(graph: Graph, proto: onnx.GraphProto) -> Iterator[str]:
    annotated = {
        entry.value
        for annotation in proto.quantization_annotation
        for entry in annotation.quant_parameter_tensor_names
    }
    used = graph.readers.keys() | graph.results | annotated
    return (tensor.name for tensor in proto.initializer if tensor.name not in used)


RULES = (
    Rule("OF430", "unsorted", "error", unsorted),
    Rule("OF431", "duplicate-value", "error", duplicate_value),
    Rule("OF432", "duplicate-node-name", "warning", duplicate_node_name),
    Rule("OF433", "missing-value", "error", missing_value),
    Rule("OF434", "dead-node", "warning", dead_node),
    Rule("OF435", "unused-initializer", "warning", unused_initializer),
)
