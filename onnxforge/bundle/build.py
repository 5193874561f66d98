"""Building a bundle: what is missing is made, judged, and only then put into its place."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from onnxforge.bundle.documents import write_documents
from onnxforge.bundle.extras import extras, is_preserved, is_put, put_extra, put_golden
from onnxforge.bundle.jobs import Job, Queue
from onnxforge.bundle.owned import files_of, places_of
from onnxforge.bundle.place import move_file, move_models
from onnxforge.bundle.plan import Plan, Stage, Status
from onnxforge.bundle.recipe import DOCUMENTS
from onnxforge.bundle.tasks import Calibrate, Judge, Look, Make, Preserve, Pulse, still
from onnxforge.bundle.units import Unit, units
from onnxforge.errors import CheckFailed, OnnxforgeError, from_system

if TYPE_CHECKING:
    from onnxforge.bundle.recipe import Graph, Recipe
    from onnxforge.bundle.state import State

__all__ = ["Announce", "Outcome", "build", "planned"]

Announce = Callable[[str], None]
"""Told in a line what was done."""

_BASE = 256 << 20  # bytes that a piece of work takes, whatever the model
_COPIES = 2  # of its weights that a runtime has in memory


@dataclass
class Outcome:
    """What a build did.

    Attributes:
        made: Units and documents that were put into their place.
        kept: Units that were up to date.
        removed: Files that are of the bundle no more.
        failed: Units that keep to no gate, and why.
        errors: What could not be done, and why.
    """

    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def planned(
    recipe: Recipe, state: State, only: Iterable[str] = ()
) -> list[tuple[str, Status]]:
    """What a build would do, by what it would do it to.

    Raises:
        OnnxforgeError: Something that is read is missing.
    """
    plan = Plan(recipe, state)
    found = [(str(unit), plan.status(unit)) for unit in units(recipe, only)]
    late = Status("make", ("missing or out of date",))
    graphs = (graph for graph in recipe.graphs.values() if graph.golden)
    missing = (graph.name for graph in graphs if not is_preserved(plan, graph))
    found += [(f"golden values of {name}", late) for name in missing]
    found += [(str(extra.path), late) for extra in extras(plan) if not is_put(plan, extra)]
    gone = sorted(state.published.keys() - {str(unit) for unit in units(recipe)})
    found += [(unit, Status("remove", ("is not in the recipe",))) for unit in gone]
    state.save()
    return found


def build(
    recipe: Recipe,
    state: State,
    executor: Executor,
    *,
    only: Iterable[str] = (),
    force: bool = False,
    max_memory: int | None = None,
    pulse: Pulse = still,
    announce: Announce = lambda line: None,
) -> Outcome:
    """Make what is missing or out of date, and write what the bundle says of itself.

    A tier is put into its place when all that is wanted of it keeps to its gates; until then,
    what was there before stays. What is made is known to the next build at once.

    Args:
        recipe: What to make.
        state: What is known from before.
        executor: Where the work is done.
        only: Names of tiers, or ``tier/graph``; all if there are none.
        force: Replace files that are not of this recipe.
        max_memory: What all that runs at a time may take, in bytes.
        pulse: Called often by the work; it may raise.
        announce: Told what was done.

    Raises:
        OnnxforgeError: Something that is read is missing.
    """
    plan, queue = Plan(recipe, state), Queue(executor, max_memory, pulse)
    return _Build(plan, units(recipe, only), queue, force, announce).run()


class _Build:
    """One build."""

    def __init__(
        self, plan: Plan, wanted: list[Unit], queue: Queue, force: bool, announce: Announce
    ) -> None:
        self.plan, self.wanted, self.queue = plan, wanted, queue
        self.force, self.announce = force, announce
        self.recipe, self.state = plan.recipe, plan.state
        self.outcome = Outcome()
        self.settled: dict[Unit, Stage] = {}
        self.begun: set[Unit] = set()
        self.calibrating: dict[str, set[Unit]] = {}

    def run(self) -> Outcome:
        self.plan.owned.claim(DOCUMENTS, force=self.force)
        for unit in self.wanted:
            self.attempt(unit)
        for graph in self.recipe.graphs.values():
            self.preserve(graph)
        self.queue.run()
        self.put_extras()
        with self.trying("what is not in the recipe"):
            self.sweep()
        with self.trying("metadata and manifest"):
            for name in write_documents(self.plan):
                self.done(name)
        self.state.forget_missing()
        self.state.save()
        return self.outcome

    def put_extras(self) -> None:
        """Put files that all tiers share into the bundle."""
        found = list(extras(self.plan))
        for extra in found:
            name = str(extra.path)
            with self.trying(f"shared file {name}"):
                if put_extra(self.plan, extra, force=self.force):
                    self.done(name)
        for name in self.state.extras.keys() - {str(extra.path) for extra in found}:
            del self.state.extras[name]

    def done(self, name: str, what: str = "written") -> None:
        self.outcome.made.append(name)
        self.announce(f"{name}: {what}")

    def error(self, name: str, error: OnnxforgeError) -> None:
        self.outcome.errors[name] = str(error)
        self.announce(f"{name}: {error}")

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Note what cannot be done in this block, and go on behind it."""
        try:
            with from_system():
                yield
        except OnnxforgeError as error:
            self.error(name, error)

    def attempt(self, unit: Unit) -> None:
        """Go on with a unit, or give it up."""
        try:
            with from_system():
                self.advance(unit)
        except OnnxforgeError as error:
            self.give_up(unit, error)

    def give_up(self, unit: Unit, error: OnnxforgeError) -> None:
        if isinstance(error, CheckFailed):
            self.fail(unit, [str(error)])
        else:
            self.error(str(unit), error)
        self.settle(unit, "failed")

    def fail(self, unit: Unit, reasons: Sequence[str]) -> None:
        self.outcome.failed.setdefault(str(unit), []).extend(reasons)
        for reason in reasons:
            self.announce(f"{unit}: refused, {reason}")

    def advance(self, unit: Unit) -> None:
        """Begin what is next for a unit."""
        status = self.plan.status(unit)
        if status.stage == "calibrate":
            for name in status.graphs:
                self.calibrate(self.recipe.graphs[name], unit)
        elif status.stage in ("make", "look"):
            self.make(unit, status)
        elif status.stage == "judge":
            self.judge(unit, status)
        elif status.stage == "failed":
            self.fail(unit, status.reasons)
            self.settle(unit, "failed")
        else:
            if status.stage == "done":
                self.outcome.kept.append(str(unit))
            self.settle(unit, status.stage)

    def calibrate(self, graph: Graph, unit: Unit) -> None:
        """Take the statistics of a graph, once for all units that wait for them."""
        if graph.name in self.calibrating:
            self.calibrating[graph.name].add(unit)
            return
        waiting = self.calibrating[graph.name] = {unit}
        key = self.plan.statistics_key(graph)
        path = self.plan.statistics_path(graph, key)
        assert graph.calibration is not None
        name = f"statistics of {graph.name}"

        def then(result: Mapping[str, Any]) -> None:
            self.state.statistics[graph.name] = {"key": key, **result}
            self.state.know(path, result["sha256"])
            self.state.save()
            self.announce(f"{name}: {result['samples']} samples")
            for each in sorted(waiting, key=str):
                self.attempt(each)

        def failed(error: OnnxforgeError) -> None:
            for each in sorted(waiting, key=str):
                self.give_up(each, error)

        task = Calibrate(graph.source, graph.calibration, self.recipe.setup, path)
        self.queue.add(Job(task, self.heavy(graph), then, failed))

    def heavy(self, graph: Graph) -> int:
        """How much memory it takes to run a graph."""
        return _BASE + _COPIES * self.plan.source(graph)[1]

    def preserve(self, graph: Graph) -> None:
        """Write golden values of a graph, if there are to be some and they are not there."""
        name = f"golden values of {graph.name}"
        folder = self.state.folder / "golden" / graph.name
        with self.trying(name):
            if not graph.golden or is_preserved(self.plan, graph):
                return
            key = self.plan.golden_key(graph)

            def then(result: None) -> None:
                put_golden(self.plan, graph, key, folder, force=self.force)
                self.done(name)

            assert graph.parity is not None
            task = Preserve(
                graph.source, graph.parity, graph.golden, self.recipe.setup, folder
            )
            failed = partial(self.error, name)
            self.queue.add(Job(task, self.heavy(graph), then, failed))

    def make(self, unit: Unit, status: Status) -> None:
        if unit in self.begun:
            raise OnnxforgeError(f"changed while it was made: {', '.join(status.reasons)}")
        self.begun.add(unit)
        key = self.plan.key(unit)
        graphs = [self.recipe.graphs[name] for name in unit.graphs]
        in_place = status.stage == "look"
        self.announce(f"{unit}: {', '.join(status.reasons)}")

        def then(found: list[dict[str, Any]]) -> None:
            record = {"key": key, "graphs": dict(zip(unit.graphs, found, strict=True))}
            (self.state.published if in_place else self.state.staged)[str(unit)] = record
            folder = self.recipe.output / unit.folder if in_place else self.plan.staging(unit)
            files = files_of(record)
            for name, file in files.items():
                self.state.know(folder / name, file["sha256"])
            self.state.save()
            size = sum(file["bytes"] for file in files.values())
            self.announce(f"{unit}: {'looked at' if in_place else 'made'}, {size:,} bytes")
            self.attempt(unit)

        task = Look(graphs[0].source) if in_place else self.task_of(unit, graphs)
        self.queue.add(Job(task, _BASE, then, partial(self.give_up, unit)))

    def task_of(self, unit: Unit, graphs: list[Graph]) -> Make:
        passes = [
            self.plan.passes(graph, variant)
            for graph, variant in zip(graphs, unit.variants, strict=True)
        ]
        return Make(
            sources=tuple(graph.source for graph in graphs),
            passes=tuple(steps for steps, _ in passes),
            statistics=tuple(path for _, paths in passes for path in paths),
            names=tuple(variant.path.name for variant in unit.variants),
            folder=self.plan.staging(unit),
            weights=unit.tier.weights,
        )

    def judge(self, unit: Unit, status: Status) -> None:
        """Compare graphs of a unit with their sources."""
        known, folder = self.state.staged, self.plan.staging(unit)
        if status.published:
            known, folder = self.state.published, self.recipe.output / unit.folder
        left = set(status.graphs)

        def then(name: str, key: str, result: dict[str, Any]) -> None:
            if status.published and result["reasons"]:  # it keeps what it was published with
                self.fail(unit, [f"{name}: {reason}" for reason in result["reasons"]])
                self.settle(unit, "failed")
                return
            known[str(unit)]["graphs"][name]["judged"] = {"key": key, **result}
            self.state.save()
            self.announce(f"{unit}: {name} compared on {result['parity']['samples']} samples")
            left.discard(name)
            if not left:
                self.attempt(unit)

        for name in status.graphs:
            graph, variant = self.recipe.graphs[name], unit.tier.graphs[name]
            assert graph.parity is not None
            candidate = folder / variant.path.name
            task = Judge(
                graph.source, candidate, graph.parity, self.recipe.setup, variant.gates
            )
            follow = partial(then, name, self.plan.judge_key(unit, name))
            failed = partial(self.give_up, unit)
            self.queue.add(Job(task, self.heavy(graph), follow, failed))

    def settle(self, unit: Unit, stage: Stage) -> None:
        """Note how it ended; with the last unit of a tier, put the tier into its place."""
        self.settled[unit] = stage
        mine = [each for each in self.wanted if each.tier is unit.tier]
        ends = {each: self.settled.get(each) for each in mine}
        ready = [each for each in mine if ends[each] == "publish"]
        if not {"failed", None}.isdisjoint(ends.values()) or not ready:
            return
        with self.trying(unit.tier.name):
            self.plan.hold(ready)
            records = [self.state.staged[str(each)] for each in ready]
            places = [place for record in records for place in places_of(record)]
            self.plan.owned.claim(places, force=self.force)
            for each in ready:
                with self.trying(str(each)):
                    self.publish(each)

    def publish(self, unit: Unit) -> None:
        """Put a unit into its place."""
        record, staged = self.state.staged[str(unit)], self.plan.staging(unit)
        folder = self.recipe.output / unit.folder
        graphs, files = record["graphs"].values(), files_of(record)
        models = [graph["model"] for graph in graphs]
        data = sorted({name for graph in graphs for name in graph["data"]})
        move_models(staged, folder, models, data)
        for name in sorted(files.keys() - {*models, *data}):
            move_file(staged / name, folder / name, keep=False)
        for name, file in files.items():
            self.state.know(folder / name, file["sha256"])
        self.state.published[str(unit)] = record
        del self.state.staged[str(unit)]
        self.state.save()
        shutil.rmtree(staged, ignore_errors=True)
        self.done(str(unit), "published")

    def sweep(self) -> None:
        """Remove what is of the bundle no more, and what no build needs any more."""
        state, wanted = self.state, {str(unit) for unit in units(self.recipe)}
        is_well = not self.outcome.failed and not self.outcome.errors
        whole = is_well and wanted <= state.published.keys()
        self.plan.owned.forget(whole=whole)
        state.save()
        for place in self.plan.owned.sweep():
            self.outcome.removed.append(place)
            self.announce(f"{place}: removed")
        if whole and not state.staged:
            kept = {self.plan.statistics_path(*each).name for each in self.plan.calibrated()}
            state.clear(kept)
