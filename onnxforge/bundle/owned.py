"""Which files of a bundle builds of this recipe put there, and which of them go again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from onnxforge.bundle.recipe import DOCUMENTS, MANIFEST, METADATA
from onnxforge.bundle.units import units
from onnxforge.errors import OnnxforgeError, from_system

if TYPE_CHECKING:
    from onnxforge.bundle.recipe import Recipe
    from onnxforge.bundle.state import State

__all__ = ["Owned", "files_of", "folder_of", "places_of"]


def folder_of(record: Mapping[str, Any]) -> PurePosixPath:
    """Where in the bundle the files of a unit are, or go."""
    return PurePosixPath(record["key"]["layout"][1]).parent


def files_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of each file of a unit, by its place in the folder of the unit."""
    graphs = record["graphs"].values()
    return {name: file for each in graphs for name, file in each["files"].items()}


def places_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same by its place in the bundle."""
    folder = folder_of(record)
    return {str(folder / name): file for name, file in files_of(record).items()}


class Owned:
    """The files that builds of a recipe put into the bundle."""

    def __init__(self, recipe: Recipe, state: State) -> None:
        """Take the recipe and what is known from before."""
        self._recipe, self._state = recipe, state

    def claim(self, places: Iterable[str], *, force: bool) -> None:
        """Note, before it happens, that files are about to be put into the bundle.

        Args:
            places: Where they go.
            force: Claim what no build of this recipe put there as well.

        Raises:
            OnnxforgeError: There is such a file, and ``force`` is off.
        """
        new = [place for place in places if place not in self._state.claims]
        for place in new if not force else ():
            path = self._recipe.output / place
            if os.path.lexists(path) and not self._is_listed(place, path):
                raise OnnxforgeError(f"{path}: is not of this recipe; --force replaces it")
        self._state.claims.update(dict.fromkeys(new, True))
        self._state.save()

    def _is_listed(self, place: str, path: Path) -> bool:
        return place in self._listed and self._state.holds(path, self._listed[place])

    @functools.cached_property
    def _listed(self) -> dict[str, str]:
        """The hashes in the manifest that is there: what was known may have been lost."""
        try:
            text = (self._recipe.output / MANIFEST).read_bytes()
            found = json.loads(text)["files"]
            told = json.loads((self._recipe.output / METADATA).read_bytes())
            if told["name"] != self._recipe.name:
                return {}
            listed = {str(name): str(file["sha256"]) for name, file in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return listed | {MANIFEST: hashlib.sha256(text).hexdigest()}

    def forget(self, *, whole: bool) -> None:
        """Drop what is known of graphs of tiers that another unit replaced.

        Args:
            whole: Whether all that the recipe wants is in its place; then what it does not
                want any more is dropped as well.
        """
        published = self._state.published
        now = {
            (unit.tier.name, name): str(unit)
            for unit in units(self._recipe)
            for name in unit.graphs
        }
        for unit in published.keys() - now.values():
            tier, graphs = unit.partition("/")[0], published[unit]["graphs"]
            for name in list(graphs):
                if whole or now.get((tier, name)) in published:
                    del graphs[name]
            if not graphs:
                del published[unit]
        for unit in self._state.staged.keys() - now.values():
            del self._state.staged[unit]
        golden = {graph.name for graph in self._recipe.graphs.values() if graph.golden}
        for name in self._state.golden.keys() - golden:
            del self._state.golden[name]

    def sweep(self) -> Iterator[str]:
        """Remove what builds put into the bundle and nothing there is any more.

        Yields:
            The place of each file that was removed.

        Raises:
            OnnxforgeError: One cannot be removed.
        """
        kept = set(self._kept())
        for place in sorted(self._state.claims.keys() - kept):
            path = self._recipe.output / place
            if path.resolve() not in self._read and (path.is_file() or path.is_symlink()):
                with from_system():
                    path.unlink()
                self._remove_empty(path.parent)
                yield place
            del self._state.claims[place]

    def _kept(self) -> Iterator[str]:
        """Places of all that is in the bundle, or was about to be put there."""
        state = self._state
        for record in (*state.published.values(), *state.staged.values()):
            yield from places_of(record)
        for each in state.golden.values():
            yield from each["places"]
        yield from state.extras
        yield from DOCUMENTS

    @functools.cached_property
    def _read(self) -> set[Path]:
        """Files that the recipe reads: one may be what an earlier recipe made."""
        recipe, known = self._recipe, self._state.sources
        graphs = recipe.graphs.values()
        data = (
            each for graph in graphs for each in known.get(graph.name, {}).get("files", ())
        )
        models = (graph.source for graph in graphs)
        extras = (extra.source for extra in recipe.extras)
        return {path.resolve() for path in (*models, *extras, *map(Path, data))}

    def _remove_empty(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # there is something in it
            while folder != self._recipe.output:
                folder.rmdir()
                folder = folder.parent
