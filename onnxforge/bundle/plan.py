"""What is up to date, what is to be made, and why."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnxforge.bundle.owned import Owned, files_of
from onnxforge.bundle.recipe import CALIBRATION
from onnxforge.bundle.state import fingerprint
from onnxforge.errors import DataError
from onnxforge.known import BY_HASH, named
from onnxforge.model_io import files, load
from onnxforge.registry import entries
from onnxforge.runtime.ceilings import ceiling

if TYPE_CHECKING:
    from onnxforge.bundle.recipe import Graph, Recipe, Targets, Variant
    from onnxforge.bundle.state import State
    from onnxforge.bundle.units import Unit
    from onnxforge.compare.samples import Data
    from onnxforge.core import Pass

__all__ = ["Plan", "Stage", "Status"]

Stage = Literal["calibrate", "make", "look", "judge", "publish", "failed", "done", "remove"]

_TOOLS = "onnxforge", "onnx", "onnx-ir", "numpy"
_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Status:
    """What is next for a unit.

    Attributes:
        stage: What is to be done.
        reasons: Why; for ``failed`` what does not hold.
        graphs: Those which it is to be done for.
        published: Whether what is judged is in its place already.
    """

    stage: Stage
    reasons: tuple[str, ...] = ()
    graphs: tuple[str, ...] = ()
    published: bool = False


class Plan:
    """Compares a recipe with what is there."""

    def __init__(self, recipe: Recipe, state: State) -> None:
        """Take the recipe and what is known from before."""
        self.recipe = recipe
        self.state = state
        state.begin(recipe.output)
        self.owned = Owned(recipe, state)
        self.tools = {name: importlib.metadata.version(name) for name in _TOOLS}
        self._sources: dict[str, tuple[str, int]] = {}
        self._hashed: dict[int, list[Any]] = {}

    def source(self, graph: Graph) -> tuple[str, int]:
        """Hash and size of the files of a source.

        Raises:
            OnnxforgeError: It cannot be read.
        """
        if graph.name not in self._sources:
            known = self._files(graph)
            paths = [Path(path) for path in known["files"]]
            hashes = self.state.hashes(paths)
            lines = sorted((path.name, sha) for path, sha in zip(paths, hashes, strict=True))
            text = "".join(f"{sha}  {name}\n" for name, sha in lines)
            size = sum(path.stat().st_size for path in paths)
            sha = hashlib.sha256(text.encode()).hexdigest()
            self._sources[graph.name] = sha, size
            self.state.sources[graph.name] = {**known, "digest": sha, "bytes": size}
        return self._sources[graph.name]

    def hold(self, ready: Iterable[Unit]) -> None:
        """See that sources are what they were when the build first read them.

        Raises:
            OnnxforgeError: One is not, or cannot be read any more.
        """
        now = Plan(self.recipe, self.state)
        for graph in (graph for unit in ready for graph, _ in self._each(unit)):
            if now.source(graph) != self.source(graph):
                raise DataError(f"{graph.source}: changed during the build; build again")

    def _files(self, graph: Graph) -> dict[str, Any]:
        """The model file and its data files, which the model file tells."""
        known, path = self.state.sources.get(graph.name), str(graph.source.absolute())
        sha = self.state.sha256(graph.source) if graph.source.is_file() else None
        if known is None or known["sha256"] != sha or known["path"] != path:
            found = files(load(graph.source, editable=False))
            known = {"sha256": sha, "path": path, "files": [str(path) for path in found]}
        return known

    def statistics_key(self, graph: Graph) -> dict[str, Any]:
        """What the statistics of a graph depend on."""
        assert graph.calibration is not None
        return {
            "source": self.source(graph)[0],
            "data": self._samples(graph.calibration.data),
            "keep": [*graph.calibration.op_types, graph.calibration.rows],
            "runtime": self.runtime(),
            "tools": self.tools,
        }

    def statistics(self, graph: Graph) -> tuple[Path, str] | None:
        """The file of the statistics of a graph and its hash, None if it is to be made."""
        known = self.state.statistics.get(graph.name)
        if known is None or known["key"] != self.statistics_key(graph):
            return None
        path = self.statistics_path(graph, known["key"])
        return (path, known["sha256"]) if self.state.holds(path, known["sha256"]) else None

    def statistics_path(self, graph: Graph, key: Mapping[str, Any]) -> Path:
        """Where the statistics of a graph go that depend on a key."""
        return self.state.folder / f"{graph.name}.{fingerprint(key)[:12]}.safetensors"

    def used_statistics(self, graph: Graph) -> dict[str, Any] | None:
        """What is known of the statistics of a graph, None if no tier needs any."""
        variants = [tier.graphs[graph.name] for tier in self.recipe.tiers.values()]
        needed = any(variant.is_calibrated for variant in variants)
        return self.state.statistics.get(graph.name) if needed else None

    def calibrated(self) -> Iterator[tuple[Graph, dict[str, Any]]]:
        """Graphs of which statistics are known and needed, and what these depend on."""
        for graph in self.recipe.graphs.values():
            if known := self.used_statistics(graph):
                yield graph, known["key"]

    def passes(self, graph: Graph, variant: Variant) -> tuple[tuple[Pass, ...], list[Path]]:
        """The passes of a graph in a tier as they are run, and files of statistics."""
        paths: list[Path] = []
        steps: list[Pass] = []
        for step in variant.passes:
            given: dict[str, str | tuple[str, ...]] = {}
            for option, names in named(step).items():
                found = [self._file(graph, name) for name in names]
                paths += [path for path, _ in found]
                hashes = tuple(f"{BY_HASH}{sha}" for _, sha in found)
                is_one = isinstance(getattr(step, option), str)
                given[option] = hashes[0] if is_one else hashes
            steps.append(replace(step, **given) if given else step)
        return tuple(steps), paths

    def _file(self, graph: Graph, name: str) -> tuple[Path, str]:
        if name != CALIBRATION:
            path = self.recipe.path.parent / name
            return path, self.state.sha256(path)
        found = self.statistics(graph)
        assert found is not None
        return found

    def _each(self, unit: Unit) -> list[tuple[Graph, Variant]]:
        return [(self.recipe.graphs[name], unit.tier.graphs[name]) for name in unit.graphs]

    def key(self, unit: Unit) -> dict[str, Any]:
        """What the files of a unit depend on, by what a person calls it."""
        third_parties: dict[str, str | None] = {}
        pipelines = []
        for graph, variant in self._each(unit):
            steps, _ = self.passes(graph, variant)
            pipelines.append(",".join(str(step.spec(full=True)) for step in steps))
            names = {step.name for step in steps}
            third_parties |= {n: v for n, v in self._third_parties.items() if n in names}
        return {
            "source": [self.source(graph)[0] for graph, _ in self._each(unit)],
            "pipeline": pipelines,
            "layout": [unit.tier.weights, *(str(variant.path) for variant in unit.variants)],
            "toolchain": self.tools | third_parties,
        }

    def judge_key(self, unit: Unit, name: str) -> str:
        """What the parity of a graph in a tier depends on, but for its own files."""
        graph, variant = self.recipe.graphs[name], unit.tier.graphs[name]
        assert graph.parity is not None
        return fingerprint(
            {
                "source": self.source(graph)[0],
                "data": self._samples(graph.parity.data),
                "argmax": dict(graph.parity.argmax),
                "top": graph.parity.top,
                "gates": [str(gate) for gate in variant.gates],
                "runtime": self.runtime(),
                "tools": self.tools,
            }
        )

    def golden_key(self, graph: Graph) -> dict[str, Any]:
        """What the golden values of a graph depend on."""
        assert graph.parity is not None
        return {
            "source": self.source(graph)[0],
            "data": self._samples(graph.parity.data),
            "count": graph.golden,
            "place": str(self.recipe.golden),
            "runtime": self.runtime(),
        }

    def runtime(self) -> list[Any]:
        """What results of a runtime depend on."""
        setup = self.recipe.setup
        return [_version(_RUNTIME), list(setup.providers), setup.threads]

    @functools.cached_property
    def _third_parties(self) -> dict[str, str | None]:
        """The packages of passes that are not built in."""
        return {name: entry.distribution for name, entry in entries().items() if entry.point}

    def _samples(self, data: Data) -> list[Any]:
        if id(data) not in self._hashed:
            self._hashed[id(data)] = self._hash(data)
        return self._hashed[id(data)]

    def _hash(self, data: Data) -> list[Any]:
        fields = dataclasses.asdict(data)
        given = [*data.paths, *([data.preprocessor] if data.preprocessor else [])]
        del fields["paths"], fields["preprocessor"]
        paths = [file for path in given for file in _inside(path)]
        names = [path.name for path in paths]
        hashes = self.state.hashes(paths)
        return [list(pair) for pair in zip(names, hashes, strict=True)] + [fields]

    def status(self, unit: Unit) -> Status:
        """What is next for a unit.

        Raises:
            OnnxforgeError: A source or a sample cannot be read.
        """
        waiting = tuple(
            graph.name
            for graph, variant in self._each(unit)
            if variant.is_calibrated and self.statistics(graph) is None
        )
        if waiting:
            return Status("calibrate", ("statistics are missing or out of date",), waiting)
        key = self.key(unit)
        published = self.state.published.get(str(unit))
        reasons = _changes(published, key)
        if published is not None and not reasons:
            reasons = self.lost(published, self.recipe.output / unit.folder)
            if not reasons:
                return self._judged(unit, published, published=True)
        staged = self.state.staged.get(str(unit))
        if staged is None or staged["key"] != key or self.lost(staged, self.staging(unit)):
            if self.recipe.is_source(*self._each(unit)[0]):
                why = reasons if published else ("is in its place",)
                return Status("look", why, unit.graphs)
            return Status("make", reasons, unit.graphs)
        return self._judged(unit, staged, published=False)

    def _judged(self, unit: Unit, record: Mapping[str, Any], *, published: bool) -> Status:
        reasons: list[str] = []
        pending: list[str] = []
        for graph, variant in self._each(unit):
            entry = record["graphs"][graph.name]
            judged = entry.get("judged")
            beyond = _beyond(entry, unit.tier.targets)
            reasons += [f"{graph.name}: {reason}" for reason in beyond]
            if graph.parity is None or not variant.passes:
                continue
            if judged is None or judged["key"] != self.judge_key(unit, graph.name):
                pending.append(graph.name)
            else:
                reasons += [f"{graph.name}: {reason}" for reason in judged["reasons"]]
        if pending:
            why = ("parity is unknown or out of date",)
            return Status("judge", why, tuple(pending), published)
        if reasons:
            return Status("failed", tuple(reasons))
        return Status("done" if published else "publish")

    def lost(self, record: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        """Files of a unit that are not there, or not as they were."""
        return tuple(
            f"{name} is missing or changed"
            for name, file in files_of(record).items()
            if not self.state.holds(folder / name, file["sha256"])
        )

    def staging(self, unit: Unit) -> Path:
        """Where a unit is made."""
        return self.state.folder / "staged" / str(unit).replace("*", "shared")


def _beyond(entry: Mapping[str, Any], targets: Targets) -> Iterator[str]:
    """Why the oldest runtime that a model is meant for does not load it."""
    for oldest in targets.onnxruntime[:1]:
        most = ceiling(oldest)
        for what, seen, limit in (
            ("IR", entry["ir_version"], most.max_ir),
            ("opset", entry["opsets"].get("ai.onnx", 0), most.max_opset),
        ):
            if seen > limit:
                yield f"is {what} {seen}, and onnxruntime {oldest} loads {limit} at most"


def _changes(record: Mapping[str, Any] | None, key: Mapping[str, Any]) -> tuple[str, ...]:
    if record is None:
        return ("missing",)
    before = record["key"]
    return tuple(f"{name} changed" for name in key if key[name] != before.get(name))


def _inside(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
