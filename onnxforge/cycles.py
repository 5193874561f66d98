"""What would never end: values that need themselves, functions that call themselves."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, TypeVar

from onnxforge.errors import ModelError
from onnxforge.walk import Scope, bodies, label, scopes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    import onnx_ir as ir

__all__ = ["refuse_cycles"]

_MOST_NODES = 1_000_000  # a few lines of calls can come to more than there is memory for
_T = TypeVar("_T", bound="Hashable")


def refuse_cycles(model: ir.Model) -> None:
    """Raise ModelError if a node needs its own result, or calls of functions do not end.

    Takes linear time and no recursion but that into bodies.
    """
    all_scopes = list(scopes(model))
    # Inner graphs first: then nothing has to wait in a model whose nodes are sorted.
    nodes = (node for scope in reversed(all_scopes) for node in scope.graph)
    stuck = _in_order(nodes, _before)[1]
    if stuck is not None:
        scope = next(scope for scope in all_scopes if scope.graph is stuck.graph)
        name = scope.path + label(stuck, list(scope.graph).index(stuck))
        raise ModelError(f"node {name!r}: needs its own result (the graph has a cycle)")
    _refuse_endless_calls(all_scopes)


def _before(node: ir.Node) -> list[ir.Node]:
    """What runs before a node ends: what makes its inputs, and all that its bodies hold."""
    return [*node.predecessors(), *(inner for _, body in bodies(node) for inner in body)]


def _refuse_endless_calls(all_scopes: Iterable[Scope]) -> None:
    held: defaultdict[ir.OperatorIdentifier, list[ir.OperatorIdentifier]] = defaultdict(list)
    for scope in all_scopes:
        if scope.function is not None:
            operators = (node.op_identifier() for node in scope.graph)
            held[scope.function.identifier()] += operators
    called = {name: [i for i in dict.fromkeys(ops) if i in held] for name, ops in held.items()}
    order, stuck = _in_order(called, called.__getitem__)
    if stuck is not None:
        raise ModelError(f"function {'::'.join(stuck[:2])!r}: calls itself")
    sizes: dict[ir.OperatorIdentifier, int] = {}
    for name in order:
        sizes[name] = sum(sizes.get(operator, 1) for operator in held[name])
        if sizes[name] > _MOST_NODES:
            raise ModelError(
                f"function {'::'.join(name[:2])!r}: comes to {sizes[name]} nodes with all that"
                f" it calls, at most {_MOST_NODES} are read"
            )


def _in_order(
    items: Iterable[_T], before: Callable[[_T], Iterable[_T]]
) -> tuple[list[_T], _T | None]:
    """Items after all that comes before them, and one on a cycle if there is any.

    Args:
        items: All of them.
        before: What comes before an item, each once.
    """
    done: dict[_T, None] = {}
    missing: dict[_T, int] = {}
    waiting: defaultdict[_T, list[_T]] = defaultdict(list)
    for item in items:
        lacking = [other for other in before(item) if other not in done]
        if lacking:
            missing[item] = len(lacking)
            for other in lacking:
                waiting[other].append(item)
        else:
            done[item] = None
    ready = [item for item in waiting if item in done]
    while ready:
        for item in waiting[ready.pop()]:
            missing[item] -= 1
            if not missing[item]:
                del missing[item]
                done[item] = None
                ready.append(item)
    if not missing:
        return list(done), None
    seen: set[_T] = set()
    item = next(iter(missing))
    while item not in seen:
        seen.add(item)
        item = next(other for other in before(item) if other in missing)
    return list(done), item
