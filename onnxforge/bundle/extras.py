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

__all__ = ["is_preserved", "put_extras", "put_golden"]


def put_extras(plan: Plan, *, force: bool) -> Iterator[str]:
    """Put files into the bundle that are missing or out of date.

    Args:
        plan: What is to be there.
        force: Replace files that are not of this recipe.

    Yields:
        The path of each that was put there.

    Raises:
        OnnxforgeError: One cannot be read or put there.
    """
    recipe, state = plan.recipe, plan.state
    extras = [*recipe.extras, *_statistics(plan)]
    for extra in extras:
        target, name = recipe.output / extra.path, str(extra.path)
        sha = state.sha256(extra.source)
        known = state.extras.get(name)
        expected = sha, recipe.md5
        is_known = known is not None and (known["sha256"], "md5" in known) == expected
        if is_known and state.holds(target, sha):
            continue
        if target.resolve() != extra.source.resolve():
            plan.claim([target], force=force)
            move_file(extra.source, target, link=extra.link)
        state.extras[name] = hashed(target, md5=recipe.md5)
        state.know(target, sha)
        yield name
    for name in state.extras.keys() - {str(extra.path) for extra in extras}:
        known = state.extras.pop(name)
        if name in state.claims and state.holds(recipe.output / name, known["sha256"]):
            (recipe.output / name).unlink()
        state.save()


def _statistics(plan: Plan) -> Iterator[Extra]:
    for graph in plan.recipe.graphs.values() if plan.recipe.statistics else ():
        if (known := plan.used_statistics(graph)) is not None:
            path = plan.statistics_path(graph, known["key"])
            yield Extra(path, plan.recipe.statistics_of(graph), link=False)


def is_preserved(plan: Plan, graph: Graph) -> bool:
    """Whether the golden values of a graph are there and up to date."""
    known = plan.state.golden.get(graph.name)
    return (
        known is not None
        and known["key"] == plan.golden_key(graph)
        and all(
            plan.state.holds(plan.recipe.output / place, file["sha256"])
            and ("md5" in file) == plan.recipe.md5
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
    plan.claim([recipe.output / place for place in files], force=force)
    before = state.golden.get(graph.name, {"places": {}})["places"]
    places = {}
    for place, file in files.items():
        places[place] = hashed(file, md5=recipe.md5)
        move_file(file, recipe.output / place, keep=False)
        state.know(recipe.output / place, places[place]["sha256"])
    for place in before.keys() - places.keys():
        (recipe.output / place).unlink(missing_ok=True)
    state.golden[graph.name] = {"key": key, "places": places}
    state.save()


def _below(folder: Path) -> Sequence[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)
