"""Domains of operators, operator sets, the IR version: what a runtime must know."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from onnxforge.lint.finding import Problem, Rule
from onnxforge.runtime.ceilings import ceiling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model
    from onnxforge.lint.view import Graph, Node

__all__ = ["RULES"]


def foreign_operator(model: Model, options: Options) -> Iterator[Problem]:
    """An operator is neither of ai.onnx nor of an allowed domain.

    What it does:
        Looks at every node, in bodies of If, Loop and Scan and in functions too. A call of a
        function that the model defines is as pure as its body. Nodes of one operator in one
        graph are one finding.

    Why it is bad:
        Only runtimes that know the domain run the model. onnxruntime's own optimizer writes
        nodes of com.microsoft, which neither other runtimes nor older releases need to have.

    Example:
        A model that was saved by onnxruntime after optimization holds
        `com.microsoft::FusedConv`.

    How to mend:
        Export again without optimizing for one runtime. If the domain is meant, allow it:
        `allow = ["com.microsoft"]`.

    Fix:
        None.
    """
    fine = {"", *options.allow}
    for graph in model.graphs:
        foreign: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if node.domain not in fine and node.call not in model.functions:
                foreign.setdefault(node.op, []).append(node)
        for op, nodes in foreign.items():
            more = f", and {len(nodes) - 1} more" if len(nodes) > 1 else ""
            yield Problem(f"is {op}, which is not of ai.onnx{more}", nodes[0].where)


def unused_import(model: Model, options: Options) -> Iterator[Problem]:
    """An operator set is imported that no node uses.

    What it does:
        Compares the imports of the model and of its functions with the domains of their nodes.
        ai.onnx itself may be imported for nothing.

    Why it is bad:
        A runtime may refuse a model for a domain or a version that it would never need, and
        readers believe that the model needs it.

    Example:
        An exporter imports `com.microsoft 1` into every model that it writes.

    How to mend:
        Remove the import.

    Fix:
        None.
    """
    for graph in model.owners:
        used = {node.domain for each in graph.inside for node in each.nodes}
        if graph.call is None:  # the main graph imports for functions as well
            used |= {domain for domain, *_ in model.functions}
        unused = sorted(graph.imports.keys() - used - {""})
        if unused:
            words = ", ".join(f"{domain} {graph.imports[domain]}" for domain in unused)
            yield Problem(f"imports {words}, which no node uses", _name(graph))


def missing_import(model: Model, options: Options) -> Iterator[Problem]:
    """Nodes are of an operator set that is not imported.

    What it does:
        Looks for the domain of every node among the imports of its model or function.

    Why it is bad:
        The model does not say which version of the operators it means. The checker refuses it;
        runtimes refuse it or take the version that they like.

    Example:
        A tool pastes a node of ai.onnx.ml into a model that imports ai.onnx only.

    How to mend:
        Import the operator set at the version that the nodes were written for.

    Fix:
        None.
    """
    for graph in model.owners:
        counts = Counter(node.domain for each in graph.inside for node in each.nodes)
        for domain in sorted(counts.keys() - graph.imports.keys()):
            nodes_are = "node is" if counts[domain] == 1 else "nodes are"
            text = f"{domain or 'ai.onnx'} is not imported, but {counts[domain]} {nodes_are}"
            yield Problem(f"{text} of it", _name(graph))


def ir_too_new(model: Model, options: Options) -> Iterator[Problem]:
    """The IR version is newer than the oldest runtime loads.

    What it does:
        Holds the IR version against what the onnxruntime of `min-ort` loads, by experiment.

    Why it is bad:
        The runtime refuses the file, whatever is in it. Exporters write the newest IR version
        that they know: opset 20 with IR 10 loads on no onnxruntime 1.17, with IR 9 it does.

    Example:
        `IR version 10, onnxruntime 1.17 loads at most 9`

    How to mend:
        `onnxforge run --passes 'set-ir{max=9}' in.onnx out.onnx`, which refuses a model that
        does use what is newer.

    Fix:
        Safe: `set-ir`. No byte of a weight and no node changes.
    """
    version = model.proto.ir_version
    if options.min_ort is not None:
        limit = ceiling(options.min_ort)
        if version > limit.max_ir:
            text = f"IR version {version}, onnxruntime {limit.release} loads at most"
            yield Problem(f"{text} {limit.max_ir}", passes=f"set-ir{{max={limit.max_ir}}}")


def opset_too_new(model: Model, options: Options) -> Iterator[Problem]:
    """The version of ai.onnx is newer than the oldest runtime loads.

    What it does:
        Holds the imported version of ai.onnx, also that of functions, against what the
        onnxruntime of `min-ort` loads, by experiment.

    Why it is bad:
        The runtime refuses the file. There is no pass that lowers an operator set: the
        meaning of operators changes with it.

    Example:
        `imports ai.onnx 21, onnxruntime 1.17 loads at most 20`

    How to mend:
        Export again at a lower version, or claim a newer runtime.

    Fix:
        None.
    """
    if options.min_ort is None:
        return
    limit = ceiling(options.min_ort)
    for graph in model.owners:
        version = graph.imports.get("", 0)
        if version > limit.max_opset:
            text = f"imports ai.onnx {version}, onnxruntime {limit.release} loads at most"
            yield Problem(f"{text} {limit.max_opset}", _name(graph))


def _name(graph: Graph) -> str:
    return graph.path.removesuffix("/")


RULES = (
    Rule("OF401", "foreign-operator", "error", foreign_operator),
    Rule("OF402", "unused-import", "warning", unused_import),
    Rule("OF403", "missing-import", "error", missing_import),
    Rule("OF404", "ir-too-new", "error", ir_too_new),
    Rule("OF405", "opset-too-new", "error", opset_too_new),
)
