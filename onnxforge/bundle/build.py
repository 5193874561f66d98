"""Building a bundle: what is missing is made, judged, and only then put into its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from onnxforge.bundle.documents import write_documents
from onnxforge.bundle.extras import is_preserved, put_extras, put_golden
from onnxforge.bundle.jobs import Job, Queue
from onnxforge.bundle.place import move_file, move_models
from onnxforge.bundle.plan import Plan, Stage, Status
from onnxforge.bundle.tasks import Calibrate, Judge, Look, Make, Preserve, Pulse, still
from onnxforge.bundle.units import Unit, units
from onnxforge.errors import CheckFailed, OnnxforgeError

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
        failed: Units that keep to no gate, and why.
        errors: What could not be done, and why.
    """

    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def planned(
    recipe: Recipe, state: State, only: Iterable[str] = ()
) -> list[tuple[Unit, Status]]:
    """What a build would do.

    Raises:
        OnnxforgeError: Something that is read is missing.
    """
    plan = Plan(recipe, state)
    found = [(unit, plan.status(unit)) for unit in units(recipe, only)]
    state.save_hashes()
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
    work = _Build(recipe, state, Queue(executor, max_memory, pulse), force, announce)
    return work.run(units(recipe, only))


class _Build:
    """One build."""

    def __init__(
        self, recipe: Recipe, state: State, queue: Queue, force: bool, announce: Announce
    ) -> None:
        self.recipe, self.state, self.queue = recipe, state, queue
        self.force, self.announce = force, announce
        self.plan = Plan(recipe, state)
        self.outcome = Outcome()
        self.settled: dict[Unit, Stage] = {}
        self.begun: set[Unit] = set()
        self.calibrating: dict[str, set[Unit]] = {}

    def run(self, wanted: list[Unit]) -> Outcome:
        self.wanted = wanted
        for unit in wanted:
            self.attempt(unit)
        for graph in self.recipe.graphs.values():
            self.preserve(graph)
        self.queue.run()
        for name in put_extras(self.plan, force=self.force):
            self.done(name)
        self.sweep()
        for name in write_documents(self.plan):
            self.done(name)
        self.state.forget_missing()
        self.state.save_hashes()
        return self.outcome

    def done(self, name: str, what: str = "written") -> None:
        self.outcome.made.append(name)
        self.announce(f"{name}: {what}")

    def error(self, name: str, error: OnnxforgeError) -> None:
        self.outcome.errors[name] = str(error)
        self.announce(f"{name}: {error}")

    def attempt(self, unit: Unit) -> None:
        """Go on with a unit, or give it up."""
        try:
            self.advance(unit)
        except OnnxforgeError as error:
            self.give_up(unit, error)

    def give_up(self, unit: Unit, error: OnnxforgeError) -> None:
        if isinstance(error, CheckFailed):
            self.fail(unit, [str(error)])
        else:
            self.error(str(unit), error)
        self.settle(unit, "failed")

    def fail(self, unit: Unit, reasons: Iterable[str]) -> None:
        self.outcome.failed.setdefault(str(unit), []).extend(reasons)
        for reason in reasons:
            self.announce(f"{unit}: refused, {reason}")

    def advance(self, unit: Unit) -> None:
        """Begin what is next for a unit."""
        status = self.plan.status(unit)
        if status.stage == "calibrate":
            for name in status.graphs:
                self.calibrate(self.recipe.graphs[name], unit)
        elif status.stage == "make":
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
        self.queue.add(Job(name, task, self.heavy(graph), then, failed))

    def heavy(self, graph: Graph) -> int:
        """How much memory it takes to run a graph."""
        return _BASE + _COPIES * self.plan.source(graph)[1]

    def preserve(self, graph: Graph) -> None:
        """Write golden values of a graph, if there are to be some and they are not there."""
        name = f"golden values of {graph.name}"
        try:
            if not graph.golden or is_preserved(self.plan, graph):
                return
            key = self.plan.golden_key(graph)
        except OnnxforgeError as error:
            self.error(name, error)
            return
        folder = self.state.folder / "golden" / graph.name

        def then(result: None) -> None:
            put_golden(self.plan, graph, key, folder, force=self.force)
            self.done(name)

        assert graph.parity is not None
        task = Preserve(graph.source, graph.parity, graph.golden, self.recipe.setup, folder)
        failed = partial(self.error, name)
        self.queue.add(Job(name, task, self.heavy(graph), then, failed))

    def make(self, unit: Unit, status: Status) -> None:
        if unit in self.begun:
            raise OnnxforgeError(f"changed while it was made: {', '.join(status.reasons)}")
        self.begun.add(unit)
        key = self.plan.key(unit)
        graphs = [self.recipe.graphs[name] for name in unit.graphs]
        in_place = self.recipe.is_source(graphs[0], unit.variants[0])
        self.announce(f"{unit}: {', '.join(status.reasons)}")

        def then(found: list[dict[str, Any]]) -> None:
            names = {name for each in found for name in each["files"]}
            record = {
                "key": key,
                "places": sorted(str(unit.folder / name) for name in names),
                "graphs": dict(zip(unit.graphs, found, strict=True)),
            }
            (self.state.published if in_place else self.state.staged)[str(unit)] = record
            folder = self.recipe.output / unit.folder if in_place else self.plan.staging(unit)
            for each in found:
                for name, file in each["files"].items():
                    self.state.know(folder / name, file["sha256"])
            self.state.save()
            size = sum(f["bytes"] for each in found for f in each["files"].values())
            self.announce(f"{unit}: made, {size:,} bytes")
            self.attempt(unit)

        task: Any = Look(graphs[0].source, self.recipe.md5)
        if not in_place:
            task = self.task_of(unit, graphs)
        self.queue.add(Job(str(unit), task, _BASE, then, partial(self.give_up, unit)))

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
            md5=self.recipe.md5,
        )

    def judge(self, unit: Unit, status: Status) -> None:
        """Compare graphs of a unit with their sources."""
        known = self.state.published if status.published else self.state.staged
        place = self.recipe.output / unit.folder
        folder = place if status.published else self.plan.staging(unit)
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
            title = f"parity of {unit.tier.name}/{name}"
            failed = partial(self.give_up, unit)
            self.queue.add(Job(title, task, self.heavy(graph), follow, failed))

    def settle(self, unit: Unit, stage: Stage) -> None:
        """Note how it ended; with the last unit of a tier, put the tier into its place."""
        self.settled[unit] = stage
        mine = [each for each in self.wanted if each.tier is unit.tier]
        ends = [self.settled.get(each, "failed") for each in mine]
        for each, end in zip(mine, ends, strict=True) if "failed" not in ends else ():
            if end == "publish":
                self.publish(each)

    def publish(self, unit: Unit) -> None:
        """Put a unit into its place, and what it replaces away."""
        record, staged = self.state.staged[str(unit)], self.plan.staging(unit)
        folder = self.recipe.output / unit.folder
        graphs = record["graphs"].values()
        files = {name: file for graph in graphs for name, file in graph["files"].items()}
        models = [graph["model"] for graph in graphs]
        data = sorted({name for graph in graphs for name in graph["data"]})
        try:
            self.plan.claim([folder / name for name in files], force=self.force)
            move_models(staged, folder, models, data)
            for name in sorted(files.keys() - {*models, *data}):
                move_file(staged / name, folder / name, keep=False)
        except OnnxforgeError as error:
            self.error(str(unit), error)
            return
        for name, file in files.items():
            self.state.know(folder / name, file["sha256"])
        before = self.state.published.get(str(unit))
        self.state.published[str(unit)] = record
        del self.state.staged[str(unit)]
        self.state.save()
        self.remove_left(before)
        shutil.rmtree(staged, ignore_errors=True)
        self.done(str(unit), "published")

    def remove_left(self, before: Mapping[str, Any] | None) -> None:
        """Remove files that an earlier build made and that nothing has any more."""
        records = self.state.published.values()
        kept = {place for record in records for place in record["places"]}
        for place in before["places"] if before else ():
            if place not in kept:
                (self.recipe.output / place).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what was made in another way; tell of tiers that are no more."""
        known = {str(unit) for unit in units(self.recipe)}
        for name in sorted(self.state.published.keys() - known):
            tier = name.partition("/")[0]
            if tier in self.recipe.tiers:
                self.remove_left(self.state.published.pop(name))
                self.state.save()
            else:
                self.announce(f"{name}: is not in the recipe any more; its files are left")
        for graph in self.recipe.graphs.values():
            if not graph.golden:
                self.remove_left(self.state.golden.pop(graph.name, None))
