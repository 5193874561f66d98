"""What all tiers of a bundle share: files of others, and golden values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from onnxforge.bundle.place import move_file
from onnxforge.bundle.recipe import Extra
from onnxforge.bundle.tasks import hashed

if TYPE_CHECKING:
    from pathlib import Path

    from onnxforge.bundle.plan import Plan
    from onnxforge.bundle.recipe import Graph

__all__ = ["extras", "is_preserved", "is_put", "put_extra", "put_golden"]


def extras(plan: Plan) -> Iterator[Extra]:
    """All files that the tiers are to share, statistics among them."""
    yield from plan.recipe.extras
    for graph, key in plan.calibrated() if plan.recipe.statistics else ():
        path = plan.statistics_path(graph, key)
        yield Extra(path, plan.recipe.statistics_of(graph), link=False)


def put_extra(plan: Plan, extra: Extra, *, force: bool) -> bool:
    """Put a file into the bundle if it is missing or out of date.

    Args:
        plan: What is to be there.
        extra: The file.
        force: Replace one that is not of this recipe.

    Returns:
        Whether it was put there.

    Raises:
        OnnxforgeError: It cannot be read or put there.
    """
    if is_put(plan, extra):
        return False
    target, name = plan.recipe.output / extra.path, str(extra.path)
    if not _is_itself(plan, extra):
        plan.owned.claim([name], force=force)
        move_file(extra.source, target, link=extra.link)
    plan.state.extras[name] = hashed(target)
    plan.state.know(target, plan.state.extras[name]["sha256"])
    return True


def is_put(plan: Plan, extra: Extra) -> bool:
    """Whether a file is in the bundle as it should be.

    Raises:
        OnnxforgeError: It cannot be read.
    """
    target, sha = plan.recipe.output / extra.path, plan.state.sha256(extra.source)
    known = plan.state.extras.get(str(extra.path))
    if known is None or known["sha256"] != sha or not plan.state.holds(target, sha):
        return False
    return extra.link or _is_itself(plan, extra) or not target.samefile(extra.source)


def _is_itself(plan: Plan, extra: Extra) -> bool:
    return (plan.recipe.output / extra.path).resolve() == extra.source.resolve()


def is_preserved(plan: Plan, graph: Graph) -> bool:
    """Whether the golden values of a graph are there and up to date."""
    known = plan.state.golden.get(graph.name)
    return (
        known is not None
        and known["key"] == plan.golden_key(graph)
        and all(
            plan.state.holds(plan.recipe.output / place, file["sha256"])
            for place, file in known["places"].items()
        )
    )


def put_golden(
    plan: Plan, graph: Graph, key: dict[str, Any], folder: Path, *, force: bool
) -> None:
    """Move golden values of a graph into the bundle.

    Args:
        plan: What is to be there.
        graph: The graph.
        key: What they depend on.
        folder: Where they are.
        force: Replace files that are not of this recipe.

    Raises:
        OnnxforgeError: One cannot be put there.
    """
    recipe, state = plan.recipe, plan.state
    inside = recipe.golden / graph.name
    files = {str(inside / name): folder / name for name in _below(folder)}
    plan.owned.claim(files, force=force)
    places = {}
    for place, file in files.items():
        places[place] = hashed(file)
        move_file(file, recipe.output / place, keep=False)
        state.know(recipe.output / place, places[place]["sha256"])
    state.golden[graph.name] = {"key": key, "places": places}
    state.save()


def _below(folder: Path) -> Sequence[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)
