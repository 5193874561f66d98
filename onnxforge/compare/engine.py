"""Comparing two models: each in a process of its own, one after the other."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import (
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.compare.evidence import Evidence, Localization, OutputEvidence, Side
from onnxforge.compare.gates import Gate, evaluate
from onnxforge.compare.localize import Half, localize
from onnxforge.compare.outputs import OutputMeter
from onnxforge.compare.samples import Data, Sample, fit, samples
from onnxforge.emulation import computes_in, emulate
from onnxforge.errors import DataError, RuntimeFailed, SpecError
from onnxforge.model_io import load
from onnxforge.runtime.session import ArrayFile, Session, Setup, write_all
from onnxforge.saving import save
from onnxforge.walk import scopes

if TYPE_CHECKING:
    import os

__all__ = ["Options", "Progress", "compare"]

Progress = Callable[[str, int], None]
"""Told what is done (``reference``, ``candidate`` or ``localize``), and how many samples or
values of it are."""

_Feeds = Mapping[str, ArrayFile]
_MOST = 100  # choices compared as a set
_PROCESSOR = "CPUExecutionProvider"
_RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


@dataclass(frozen=True)
class Options:
    """How to compare.

    Attributes:
        reference: How the reference is run.
        candidate: How the candidate is run; None for the same way.
        argmax: Axis along which choices are compared, by output.
        top: How many of the best choices are compared as a set.
        gates: Limits to keep.
        localize: Also find out where error enters, on the worst sample.
        emulate: Run a model that computes in a half type on processors as float32 that is
            rounded as it is; false leaves to the runtime what it does, if anything.
    """

    reference: Setup = field(default_factory=Setup)
    candidate: Setup | None = None
    argmax: Mapping[str, int] = field(default_factory=dict)
    top: int = 5
    gates: Sequence[Gate] = ()
    localize: bool = False
    emulate: bool = True

    def __post_init__(self) -> None:
        """Refuse sets that take too much memory to compare.

        Raises:
            SpecError: ``top`` is out of range.
        """
        if not 1 <= self.top <= _MOST:
            raise SpecError(f"top: wanted 1 to {_MOST} choices, not {self.top}")


def compare(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    data: Data | Iterable[Sample],
    options: Options | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Run two models on the same samples and compare what comes out.

    The reference runs first and its outputs wait on disk; then the candidate runs and each
    sample is compared at once. Only one model is open at any time, and neither in this
    process. A model that does not load, raises, crashes or hangs is a result, not an error.

    Args:
        reference: The right model.
        candidate: The model to judge.
        data: The samples, or where they come from. They are asked for one by one.
        options: How to compare.
        progress: Called after each step.

    Raises:
        ModelError: A model cannot be read.
        DataError: There are no samples, or one does not fit the models.
        SpecError: A gate or an option names an output that is not in both models.
        RuntimeFailed: onnxruntime is not installed, or a preprocessor fails.
    """
    wanted = options or Options()
    setups = wanted.reference, wanted.candidate or wanted.reference
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
        sides = (
            _Input(
                Path(reference), setups[0], Path(folder, "r.onnx"), emulates=wanted.emulate
            ),
            _Input(
                Path(candidate), setups[1], Path(folder, "c.onnx"), emulates=wanted.emulate
            ),
        )
        work = _Work(Path(folder), sides, wanted, progress or (lambda stage, done: None))
        if isinstance(data, Data):
            data = samples(sides[0].model, data, timeout=wanted.reference.timeout)
        return work.run(data)


class _Input:
    """A model file, without its weights.

    Attributes:
        path: The file.
        runs: The file that runs in its place, perhaps itself.
        emulated: The half type that ``runs`` is rounded to in its place, else empty.
        model: What is in ``runs``.
    """

    def __init__(self, path: Path, setup: Setup, place: Path, *, emulates: bool) -> None:
        """Load a model; ``place`` is where its emulation goes if it needs one."""
        self.path = self.runs = path
        self.emulated = ""
        self.model = load(path, editable=False)
        if emulates and all(name == _PROCESSOR for name in setup.providers):
            self._emulate(place)
        self.inputs = {v.name or "": v for v in self.model.graph.inputs}
        self.needed = {n for n, v in self.inputs.items() if not v.is_initializer()}
        self.outputs = [value.name or "" for value in self.model.graph.outputs]

    def _emulate(self, place: Path) -> None:
        halves = computes_in(self.model)
        if halves:
            emulated = load(self.path)
            emulate(emulated)
            save(emulated, place)
            self.runs, self.model = place, load(place, editable=False)
            self.emulated = " and ".join(sorted(dtype.name.lower() for dtype in halves))


@dataclass(frozen=True)
class _Staged:
    """A sample on disk, as each side takes it."""

    name: str
    reference: _Feeds
    candidate: _Feeds


class _Work:
    """One comparison, in a folder of its own."""

    def __init__(
        self, folder: Path, sides: tuple[_Input, _Input], options: Options, progress: Progress
    ) -> None:
        self._folder = folder
        self._reference, self._candidate = sides
        self._options = options
        self._progress = progress
        both = set(self._candidate.outputs)
        self._common = [name for name in self._reference.outputs if name in both]
        self._axes = {**options.argmax}
        for gate in options.gates:
            if gate.metric == "max-argmax-rate" and gate.output is not None:
                self._axes.setdefault(gate.output, -1)
        self._refuse_unknown()
        self._casts: dict[str, str] = {}

    def _refuse_unknown(self) -> None:
        named = [*self._axes, *(gate.output for gate in self._options.gates if gate.output)]
        if unknown := [name for name in named if name not in self._common]:
            known = ", ".join(self._common)
            raise SpecError(f"the models share no output {unknown[0]!r}, but {known}")
        if not self._common:
            raise DataError(f"{self._candidate.path}: no output is called as in the reference")
        metrics = {gate.metric for gate in self._options.gates}
        if "max-argmax-rate" in metrics and not self._axes:
            raise SpecError("--max-argmax-rate needs an output: --argmax OUTPUT")
        if lacking := sorted(self._candidate.needed - self._reference.inputs.keys()):
            path = self._candidate.path
            raise DataError(f"{path}: takes {lacking[0]!r}, which the reference does not")

    def run(self, drawn: Iterable[Sample]) -> Evidence:
        options = self._options
        setups = options.reference, options.candidate or options.reference
        first = _Runner(self._reference, self._folder / "reference", setups[0])
        second = _Runner(self._candidate, self._folder / "candidate", setups[1])
        staged, expected = self._expected(first, drawn)
        if not staged and not first.failure:
            raise DataError("there are no samples")
        staged = staged[: len(expected)]
        meters = [OutputMeter(n, self._axes.get(n), options.top) for n in self._common]
        ran = self._measure(second, staged, expected, meters)
        outputs = [found for meter in meters if (found := meter.evidence()) is not None]
        measured = {output.name for output in outputs}
        localization = None
        if options.localize and ran and not first.failure and not second.failure:
            localization = self._localize(_worst(staged, outputs), setups)
        return Evidence(
            reference=first.side(),
            candidate=second.side(tuple(self._casts.values())),
            samples=tuple(sample.name for sample in staged[:ran]),
            outputs=tuple(outputs),
            only_reference=_without(self._reference.outputs, self._common),
            only_candidate=_without(self._candidate.outputs, self._common),
            not_compared=_without(self._common, measured) if ran else (),
            gates=evaluate(options.gates, outputs, sorted(measured) or self._common),
            localization=localization,
            notes=(*self._notes(), *first.notes(), *second.notes()),
        )

    def _localize(self, sample: _Staged, setups: tuple[Setup, Setup]) -> Localization:
        folder = self._folder / "localize"
        folder.mkdir()
        return localize(
            Half(self._reference.model, sample.reference, setups[0]),
            Half(self._candidate.model, sample.candidate, setups[1]),
            sample.name,
            folder,
            functools.partial(self._progress, "localize"),
        )

    def _notes(self) -> Iterator[str]:
        for side in (self._reference, self._candidate):
            ops = {node.op_type for scope in scopes(side.model) for node in scope.graph}
            if side.emulated:
                yield (
                    f"{side.path} was emulated: float32 that is rounded as its"
                    f" {side.emulated} is, which processors do not compute in"
                )
            if random := ", ".join(sorted(ops & _RANDOM)):
                yield f"{side.path} draws random numbers ({random}): no two runs are alike"
        for name in self._reference.inputs.keys() - self._candidate.inputs.keys():
            yield f"{self._candidate.path} does not take the input {name!r}"

    def _expected(
        self, runner: _Runner, drawn: Iterable[Sample]
    ) -> tuple[list[_Staged], list[_Feeds]]:
        """Run the reference on all samples; what it makes of them stays on disk."""
        staged: list[_Staged] = []

        def feeds() -> Iterator[tuple[str, _Feeds]]:
            for sample in drawn:
                staged.append(self._stage(len(staged), sample))
                yield sample.name, staged[-1].reference

        expected: list[_Feeds] = []
        with contextlib.closing(runner.outputs(feeds())) as outputs:
            for output in outputs:
                expected.append(output)
                self._progress("reference", len(expected))
        return staged, expected

    def _stage(self, number: int, sample: Sample) -> _Staged:
        arrays = fit(sample, self._reference.model)
        reference = write_all(self._folder, f"{number}-", arrays)
        candidate, casts = dict(reference), {}
        for name, array in arrays.items():
            value = self._candidate.inputs.get(name)
            if value is None:
                del candidate[name]
            elif value.dtype not in (None, reference[name].dtype):
                self._casts[name] = f"{name}: {reference[name].dtype} -> {value.dtype}"
                casts[name] = array.astype(value.dtype.numpy())
        candidate |= write_all(self._folder, f"{number}-cast", casts)
        return _Staged(sample.name, reference, candidate)

    def _measure(
        self,
        runner: _Runner,
        staged: Sequence[_Staged],
        expected: Sequence[_Feeds],
        meters: Sequence[OutputMeter],
    ) -> int:
        """Run the candidate and compare each sample at once; gives how many it ran on."""
        ran = 0
        feeds = ((sample.name, sample.candidate) for sample in staged)
        with contextlib.closing(runner.outputs(feeds)) as outputs:
            for sample, reference, candidate in zip(staged, expected, outputs, strict=False):
                for meter in meters:
                    name = meter.name
                    meter.add(sample.name, reference.get(name), candidate.get(name))
                for file in (*reference.values(), *candidate.values()):
                    file.path.unlink()
                ran += 1
                self._progress("candidate", ran)
        return ran


class _Runner:
    """Runs one side.

    Attributes:
        failure: Why it did not run to the end, empty if it did.
    """

    def __init__(self, side: _Input, folder: Path, setup: Setup) -> None:
        folder.mkdir()
        self._path = side.path
        self._emulated = side.emulated
        self._setup = setup
        self._session = Session(side.runs, folder, setup)
        self.failure = ""

    def outputs(self, feeds: Iterable[tuple[str, _Feeds]]) -> Generator[_Feeds]:
        """What comes out for each sample, until there are no more or the model fails."""
        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(self._session)
            except RuntimeFailed as error:
                self.failure = str(error)
                return
            for name, values in feeds:
                try:
                    found = session.run(values)
                except RuntimeFailed as error:
                    self.failure = f"{name}: {error}"
                    return
                yield found

    def notes(self) -> Iterator[str]:
        """Which providers were asked for in vain: the runtime itself falls back in silence."""
        used = self._session.providers
        if used and (missing := [n for n in self._setup.providers if n not in used]):
            yield f"{self._path} ran on {', '.join(used)}, not on {', '.join(missing)}"

    def side(self, casts: tuple[str, ...] = ()) -> Side:
        """How it went."""
        session = self._session
        return Side(
            path=str(self._path),
            runtime=session.version,
            providers=session.providers,
            threads=self._setup.threads,
            optimization=self._setup.optimization,
            load_seconds=session.load_seconds,
            run_seconds=tuple(session.run_seconds),
            peak_memory=session.peak_memory,
            casts=casts,
            emulated=self._emulated,
            failure=self.failure,
        )


def _without(names: Iterable[str], known: Container[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in known)


def _worst(staged: Sequence[_Staged], outputs: Iterable[OutputEvidence]) -> _Staged:
    """The sample on which an output is furthest from the reference."""
    lowest: dict[str, float] = {}
    for found in (found for output in outputs for found in output.samples):
        sqnr = -math.inf if found.comparison is None else found.comparison.sqnr_db
        lowest[found.sample] = min(sqnr, lowest.get(found.sample, math.inf))
    return min(staged, key=lambda sample: lowest.get(sample.name, math.inf))
