"""Running passes: in order, verified after each, observed, and stamped on the result."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx
import onnx_ir as ir

from onnxforge import laws, model_io
from onnxforge.core import FILES, Effect, Fate, Finding, Pass, Result
from onnxforge.errors import BrokenPass, CheckFailed, about
from onnxforge.known import BY_HASH, Known, KnownSample, hand_over, named
from onnxforge.placement import Layout
from onnxforge.registry import parse
from onnxforge.saving import Progress, Saved, refuse_to_overwrite, save, save_shared
from onnxforge.storage.extents import overlapping
from onnxforge.verify import interface, problem
from onnxforge.walk import tensors

__all__ = [
    "PIPELINE_KEY",
    "VERSION_KEY",
    "Observer",
    "PassManager",
    "PassReport",
    "Report",
]

PIPELINE_KEY = "onnxforge.pipeline"
"""Key of the metadata in which a model says what passes it went through."""

VERSION_KEY = "onnxforge.version"


class Observer(Protocol):
    """Is told what a PassManager does."""

    def before(self, step: Pass, model: ir.Model) -> None:
        """``step`` is about to run."""

    def after(self, step: Pass, result: Result) -> None:
        """``step`` has run and its result is verified."""

    def failed(self, step: Pass, error: Exception) -> None:
        """``step`` raised, or broke a law."""


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        text: The pass with all its options.
        effect: What it may do.
        modified: Whether the model changed.
        seconds: How long it ran, its verification included.
        stats: Its own numbers.
        findings: Its findings.
    """

    text: str
    effect: str
    modified: bool
    seconds: float
    stats: dict[str, int]
    findings: tuple[Finding, ...]

    def tally(self, fate: Fate) -> tuple[int, int]:
        """Number and bytes of the weights that met a fate."""
        sizes = [f.nbytes for f in self.findings if f.fate is fate and not f.op]
        return len(sizes), sum(sizes)


@dataclass
class Report:
    """What a PassManager did.

    Attributes:
        passes: One entry for each pass.
        findings: Remarks on the model itself.
        source: Sizes in bytes of the files read, by path.
        written: Sizes in bytes of the files written, by path.
        layout: ``inline``, ``sidecar`` or ``shards``, None when nothing was written.
    """

    passes: list[PassReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    source: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    layout: str | None = None

    @property
    def modified(self) -> bool:
        """Whether any pass changed the model."""
        return any(step.modified for step in self.passes)


class PassManager:
    """Runs passes one after the other and holds them to what they promise.

    After every pass the model is verified: its interface is as before, and a model that the
    ONNX checker accepted is still accepted. A model that it did not accept to begin with is
    reported, and only its interface is held.

    Attributes:
        passes: The passes, in order.
        observers: Are told before and after each pass.
        verify: Whether to verify; false saves time on a pipeline known to be good.
        check_laws: Also hold each pass to the law of its effect, on the model at hand.
        inputs: Values to run the model on for that; drawn at random if None.
        statistics: Files of statistics that passes may name by ``sha256:`` and their SHA-256.
    """

    codes: ClassVar[Mapping[str, str]] = {
        "OF901": "The ONNX checker does not accept the input; runtimes may load it still.",
        "OF903": "The law of an approx pass is held node by node in tests, not on your model.",
        "OF902": "A file of the model that was replaced, of no use to the new one.",
        "OF904": "Tensors lie partly in the same bytes of a data file. Those that no pass"
        " converts still do in the result.",
    }

    def __init__(
        self,
        passes: str | Iterable[Pass],
        *,
        observers: Sequence[Observer] = (),
        verify: bool = True,
        check_laws: bool = False,
        inputs: Mapping[str, np.ndarray] | None = None,
        statistics: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        """Take a pipeline text or passes.

        Raises:
            SpecError: The text is wrong.
        """
        self.passes = parse(passes) if isinstance(passes, str) else tuple(passes)
        self.observers = tuple(observers)
        self.verify = verify
        self.check_laws = check_laws
        self.inputs = inputs
        self.statistics = tuple(Path(path) for path in statistics)

    def __str__(self) -> str:
        """The pipeline text."""
        return ",".join(str(step) for step in self.passes)

    def apply(self, model: Any, base_dir: str | os.PathLike[str] | None = None) -> Any:
        """Run the passes on a model in memory.

        Args:
            model: An ``onnx.ModelProto`` or ``onnx_graphsurgeon.Graph``, which is never
                changed, an ``onnx_ir.Model``, which is changed in place, or a path.
            base_dir: The folder of a proto's external data.

        Returns:
            The result and the report. The result is of the same kind as the model; for a path
            it is an ``onnx_ir.Model``.

        Raises:
            OnnxforgeError: A pass refuses the model or a check says no.
            TypeError: The model is of none of these kinds.
        """
        if isinstance(model, ir.Model):
            return model, self._run(model)
        if isinstance(model, str | os.PathLike):
            loaded = model_io.load(model, editable=self._edits)
            return loaded, self._run(loaded)
        if isinstance(model, onnx.ModelProto):
            wrapped = model_io.from_proto(model, base_dir)
            report = self._run(wrapped)
            return model_io.to_proto(wrapped), report
        if type(model).__module__.partition(".")[0] == "onnx_graphsurgeon":
            import onnx_graphsurgeon as gs

            proto, report = self.apply(gs.export_onnx(model), base_dir)
            return gs.import_onnx(proto), report
        raise TypeError(f"cannot run passes on {type(model).__name__}")

    def run(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str] | None,
        *,
        layout: Layout = "keep",
        force: bool = False,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """Run the passes on a file; nothing is written if one of them fails.

        Args:
            source: The model file.
            target: Where the result goes, perhaps ``source`` itself; None for a dry run.
            layout: See `onnxforge.saving.save`.
            force: Overwrite what is there.
            workers: Number of threads that write.
            progress: Called on any thread after each block written.

        Raises:
            OnnxforgeError: A pass refuses the model, a check says no, or a file cannot be
                read or written.
        """
        if target is not None:
            refuse_to_overwrite([Path(target).absolute()], force=force)
        with about(Path(source)):
            model, report = self._loaded(source, writes=target is not None)
            if target is not None:
                options: Any = {"force": force, "workers": workers, "progress": progress}
                _tell(report, save(model, target, layout=layout, **options))
        return report

    def run_shared(
        self,
        jobs: Sequence[tuple[str | os.PathLike[str], str | os.PathLike[str]]],
        *,
        force: bool = False,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> list[Report]:
        """Run the passes on several files; the results share their data files.

        Args:
            jobs: Model files and where the results go, all into one folder.
            force: Overwrite what is there.
            workers: Number of threads that write.
            progress: Called on any thread after each block written.

        Returns:
            A report for each model; each names the data files that all share.

        Raises:
            OnnxforgeError: See `run`; then nothing is written at all.
        """
        refuse_to_overwrite([Path(target).absolute() for _, target in jobs], force=force)
        models, reports = [], []
        for source, target in jobs:
            with about(Path(source)):
                model, report = self._loaded(source, writes=True)
            models.append((model, target))
            reports.append(report)
        saved = save_shared(models, force=force, workers=workers, progress=progress)
        targets = {Path(target).absolute() for _, target in jobs}
        for report, (_, target) in zip(reports, jobs, strict=True):
            _tell(report, saved, but=targets - {Path(target).absolute()})
            saved = replace(saved, left=())  # said once
        return reports

    def _loaded(
        self, source: str | os.PathLike[str], *, writes: bool
    ) -> tuple[ir.Model, Report]:
        """A model that went through the passes."""
        model = model_io.load(source, editable=self._edits or writes)
        sizes = {str(path): size for path, size in model_io.files(model).items()}
        report = self._run(model)
        report.source = sizes
        return model, report

    @property
    def _edits(self) -> bool:
        return any(step.effect is not Effect.CHECK for step in self.passes)

    def _run(self, model: ir.Model) -> Report:
        report = Report()
        sound = False
        if self.verify and self._edits:
            reason = problem(model)
            sound = reason is None
            if reason is not None:
                report.findings.append(Finding("OF901", "model", reason, level="warning"))
            report.findings += _overlaps(model)
        waiting: list[Pass] = []
        for step in self.passes:
            modified = self._observed(step, model, report, waiting, sound=sound)
            for earlier in [*waiting] if modified else ():
                if earlier is not step:
                    self._observed(earlier, model, report, waiting, sound=sound)
        _stamp(model, report)
        return report

    def _observed(
        self, step: Pass, model: ir.Model, report: Report, waiting: list[Pass], *, sound: bool
    ) -> bool:
        """Run a pass and report on it; whether it changed the model."""
        if self.check_laws and step.effect is Effect.APPROX:
            unheld = Finding("OF903", step.name, "its law is not held here", level="warning")
            report.findings.append(unheld)
        for observer in self.observers:
            observer.before(step, model)
        try:
            result, seconds = self._step(step, model, sound=sound)
        except Exception as error:
            for observer in self.observers:
                observer.failed(step, error)
            if isinstance(error, CheckFailed):
                no = Result(model, modified=False, findings=error.findings)
                report.passes.append(_told(step, no, 0.0))
                error.report = report
            raise
        for observer in self.observers:
            observer.after(step, result)
        report.passes.append(_told(step, result, seconds))
        if step in waiting:
            waiting.remove(step)
        if result.again:
            waiting.append(step)
        return result.modified

    def _step(self, step: Pass, model: ir.Model, *, sound: bool) -> tuple[Result, float]:
        start = time.perf_counter()
        before, types = interface(model), _types(model)
        hand_over(step, model, self.statistics)
        law = laws.Witness(step, model, self.inputs) if self.check_laws else None
        result = step(model)
        if not isinstance(result, Result):
            raise BrokenPass(f"{step.name} did not give back a Result")
        as_before = {name: types[name] for name in result.retyped}
        if self.verify and interface(model, as_before) != before:
            raise BrokenPass(f"{step.name} changed the inputs or outputs of the model")
        if sound and result.modified and (reason := problem(model)):
            raise BrokenPass(f"{step.name} made an invalid model: {reason}")
        if law is not None:
            law.hold(result)
        return result, time.perf_counter() - start


def _types(model: ir.Model) -> dict[str, ir.DataType]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return {v.name: v.type.dtype for v in values if v.name and v.type is not None}


def _tell(report: Report, saved: Saved, but: Collection[Path] = ()) -> None:
    """Complete a report by what was written, but for the files of others."""
    report.written = {str(p): size for p, size in saved.files.items() if p not in but}
    report.layout = saved.layout
    report.findings += [
        Finding("OF902", str(path), "belongs to what was replaced", level="warning")
        for path in saved.left
    ]


def _overlaps(model: ir.Model) -> Iterator[Finding]:
    for group in overlapping(tensors(model)):
        names = sorted({repr(tensor.name) for tensor in group})
        yield Finding(
            "OF904",
            group[0].file.path.name,
            "tensors overlap; what they share stays shared",
            level="warning",
            detail=", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else ""),
        )


def _told(step: Pass, result: Result, seconds: float) -> PassReport:
    read: Mapping[str, Known | KnownSample] = result.model.meta.get(FILES, {})
    hashes: dict[str, Any] = {}
    for option, names in named(step).items():
        words = tuple(f"{BY_HASH}{read[name].sha256}" for name in names)
        hashes[option] = words[0] if isinstance(getattr(step, option), str) else words
    recorded = replace(step, **hashes) if hashes else step
    text, effect = str(recorded.spec(full=True)), step.effect.value
    stats, findings = dict(result.stats), result.findings
    return PassReport(text, effect, result.modified, seconds, stats, findings)


def _stamp(model: ir.Model, report: Report) -> None:
    """Write on a changed model how it was made."""
    made = [step.text for step in report.passes if step.modified]
    if made:
        earlier = model.metadata_props.get(PIPELINE_KEY)
        model.metadata_props[PIPELINE_KEY] = ",".join([*([earlier] if earlier else []), *made])
        model.metadata_props[VERSION_KEY] = importlib.metadata.version("onnxforge")
