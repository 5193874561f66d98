"""What a build does, piece by piece, each in any thread or process."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from onnxforge.bundle.describe import coverage, described, gates, parity
from onnxforge.errors import CheckFailed, DataError, RuntimeFailed, about
from onnxforge.storage.whole import copy_file, digest

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxforge.bundle.recipe import Calibration, Parity
    from onnxforge.compare.gates import Gate
    from onnxforge.core import Pass
    from onnxforge.runtime.session import ArrayFile, Setup

__all__ = ["Calibrate", "Judge", "Look", "Make", "Preserve", "Pulse", "hashed", "still"]

_SAVE_EVERY = 30.0  # seconds

Pulse = Callable[[], None]
"""Called often; it raises where the work is to end."""


def still() -> None:
    """The pulse of work that nobody ends early."""


@dataclass(frozen=True)
class Calibrate:
    """Take statistics.

    Attributes:
        source: The model.
        how: The samples, and what to keep.
        setup: How the model is run.
        target: The file to write; what is there half done has a name with ``.part``.
    """

    source: Path
    how: Calibration
    setup: Setup
    target: Path

    def __call__(self, pulse: Pulse = still) -> dict[str, Any]:
        """Do it; gives the SHA-256 of the file and the number of samples."""
        from onnxforge.calibrate import Options, calibrate
        from onnxforge.stats_file import write_statistics

        part = self.target.with_name(f"{self.target.name}.part")
        options = Options(self.setup, self.how.op_types, self.how.rows)
        known = _left(part)
        with about(self.source):
            found = calibrate(
                self.source,
                self.how.data,
                options,
                known=known,
                progress=_kept(part, pulse),
            )
        write_statistics(found, self.target)
        part.unlink(missing_ok=True)
        return {"sha256": digest(self.target), "samples": len(found.samples)}


def _left(part: Path) -> Any:
    """What a build that ended left of statistics; None if that is nothing, or damaged."""
    from onnxforge.stats_file import read_statistics

    with contextlib.suppress(DataError):
        return read_statistics(part)
    return None


def _kept(part: Path, pulse: Pulse) -> Callable[[int, Any], None]:
    """What writes down statistics, now and then, so that a build that is killed goes on."""
    from onnxforge.stats_file import write_statistics

    saved = time.monotonic()

    def progress(done: int, found: Any) -> None:
        nonlocal saved
        if time.monotonic() - saved > _SAVE_EVERY:
            write_statistics(found, part)
            saved = time.monotonic()
        pulse()

    return progress


@dataclass(frozen=True)
class Make:
    """Run passes on models that are written together.

    Attributes:
        sources: The models; one alone unless they share their data.
        passes: For each; statistics are named by their SHA-256.
        statistics: Files of these.
        names: What the results are called.
        folder: Where they go; all that is in it goes first.
        weights: See `onnxforge.bundle.recipe.Tier`.
    """

    sources: tuple[Path, ...]
    passes: tuple[tuple[Pass, ...], ...]
    statistics: tuple[Path, ...]
    names: tuple[str, ...]
    folder: Path
    weights: Any

    def __call__(self, pulse: Pulse = still) -> list[dict[str, Any]]:
        """Do it; gives for each model what metadata say of it, and of its files."""
        from onnxforge.manager import PassManager
        from onnxforge.model_io import load
        from onnxforge.saving import save_shared

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        targets = [self.folder / name for name in self.names]
        models, reports = [], []
        for source, passes in zip(self.sources, self.passes, strict=True):
            with about(source):
                models.append(load(source))
                manager = PassManager(passes, statistics=self.statistics)
                reports.append(manager.apply(models[-1])[1])
        pairs = list(zip(models, targets, strict=True))
        if self.weights == "shared":
            save_shared(pairs, progress=lambda written, total: pulse())
        else:
            ((model, target),) = pairs
            self._write(model, target, pulse)
        others = set(self.folder.iterdir()) - {*targets}
        return [
            {
                **_looked_at(target, others),
                "pipeline": ",".join(str(step.spec(full=True)) for step in passes),
                "coverage": coverage(report),
            }
            for target, report, passes in zip(targets, reports, self.passes, strict=True)
        ]

    def _write(self, model: ir.Model, target: Path, pulse: Pulse) -> None:
        """Write a model that is alone; one that nothing is done to byte by byte."""
        from onnxforge.model_io import files
        from onnxforge.saving import save

        (source,), (passes,) = self.sources, self.passes
        if not passes and self.weights == "keep" and len(files(model)) == 1:
            copy_file(source, target)
            return
        with about(source):
            save(model, target, layout=self.weights, progress=lambda written, total: pulse())


@dataclass(frozen=True)
class Look:
    """See what a model is that is in its place already.

    Attributes:
        source: The model.
    """

    source: Path

    def __call__(self, pulse: Pulse = still) -> list[dict[str, Any]]:
        """Do it; gives what `Make` gives."""
        return [{**_looked_at(self.source), "pipeline": "", "coverage": []}]


def _looked_at(path: Path, others: Iterable[Path] = ()) -> dict[str, Any]:
    """What a model is, and the hashes of its files by their place beside it."""
    from onnxforge.model_io import files, load

    model, folder = load(path, editable=False), path.parent.resolve()
    _, *beside = files(model)  # the first is the model itself
    data = sorted(_place(file, folder) for file in beside)
    names = sorted({path.name, *data, *(file.name for file in others)})
    return {
        "model": path.name,
        "data": data,
        "files": {name: hashed(folder / name) for name in names},
        **described(model),
    }


def _place(file: Path, folder: Path) -> str:
    try:
        return file.resolve().relative_to(folder).as_posix()
    except ValueError:
        raise DataError(f"{file}: is not in the folder of its model, {folder}") from None


def hashed(path: Path, *, md5: bool = False) -> dict[str, Any]:
    """Size and hashes of a file, as a manifest has them."""
    hashes = {"sha256": digest(path)} | ({"md5": digest(path, "md5")} if md5 else {})
    return {"bytes": path.stat().st_size, **hashes}


@dataclass(frozen=True)
class Judge:
    """Compare a model with its source.

    Attributes:
        source: The right model.
        candidate: The one to judge.
        parity: The samples, and what to compare.
        setup: How both are run.
        gates: What must hold.
    """

    source: Path
    candidate: Path
    parity: Parity
    setup: Setup
    gates: Sequence[Gate]

    def __call__(self, pulse: Pulse = still) -> dict[str, Any]:
        """Do it; gives what metadata say, and why it is refused if it is.

        Raises:
            CheckFailed: It does not run; what fails may be the time, so that is not kept.
            RuntimeFailed: The source does not.
        """
        from onnxforge.compare.engine import Options, compare

        options = Options(
            self.setup, argmax=self.parity.argmax, top=self.parity.top, gates=self.gates
        )
        found = compare(
            self.source,
            self.candidate,
            self.parity.data,
            options,
            progress=lambda stage, done: pulse(),
        )
        if failure := found.reference.failure:
            raise RuntimeFailed(f"{self.source}: did not run to the end: {failure}")
        if failure := found.candidate.failure:
            raise CheckFailed(f"{self.candidate.name} did not run to the end: {failure}", ())
        reasons = [f"{g.gate} for {g.output}: {g.reason}" for g in found.gates if not g.passed]
        return {"parity": parity(found), "gates": gates(found), "reasons": reasons}


@dataclass(frozen=True)
class Preserve:
    """Write samples and what a model makes of them.

    Attributes:
        source: The model.
        parity: The samples.
        count: How many of them.
        setup: How the model is run.
        folder: Where they go, in folders by number; all that is in it goes first.
    """

    source: Path
    parity: Parity
    count: int
    setup: Setup
    folder: Path

    def __call__(self, pulse: Pulse = still) -> None:
        """Do it."""
        from onnxforge.compare.samples import fit, samples
        from onnxforge.model_io import load
        from onnxforge.runtime.session import Session, write_all

        shutil.rmtree(self.folder, ignore_errors=True)
        scratch = self.folder / "scratch"
        scratch.mkdir(parents=True)
        model = load(self.source, editable=False)
        drawn = samples(model, self.parity.data, timeout=self.setup.timeout)
        with about(self.source), Session(self.source, scratch, self.setup) as session:
            for number, sample in enumerate(itertools.islice(drawn, self.count)):
                pulse()
                feeds = write_all(scratch, "in", fit(sample, model))
                outputs = session.run(feeds)
                _preserve(self.folder / str(number) / "inputs", feeds)
                _preserve(self.folder / str(number) / "outputs", outputs)
        shutil.rmtree(scratch)
        if not (self.folder / str(self.count - 1)).exists():
            raise DataError(f"{self.source}: there are less than {self.count} golden samples")


def _preserve(folder: Path, arrays: Mapping[str, ArrayFile]) -> None:
    folder.mkdir(parents=True)
    for name, file in arrays.items():
        file.path.replace(folder / f"{quote(name, safe='')}.npy")
