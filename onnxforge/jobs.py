"""What must not meet among the files that one command reads and writes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.errors import ModelError, OnnxforgeError
from onnxforge.model_io import files, load
from onnxforge.saving import data_path, refuse_to_overwrite

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["refuse_entangled", "refuse_report"]

Job = tuple[Path, Path | None]
"""A model and where its result goes."""


def refuse_entangled(jobs: Sequence[Job]) -> None:
    """Raise OnnxforgeError if the result of one job would replace what another one reads."""
    if len(jobs) < 2:
        return
    read = [_read(source) for source, _ in jobs]
    written = [_written(target) for _, target in jobs]
    for (i, ours), (j, theirs) in itertools.product(enumerate(written), enumerate(read)):
        if i != j and (both := sorted(ours & theirs)):
            source, other = jobs[i][0], jobs[j][0]
            raise OnnxforgeError(f"{source}: its result {both[0]} is read for {other}")


def refuse_report(report: Path, jobs: Sequence[Job], *, force: bool) -> None:
    """Raise OnnxforgeError where a report would cost a model or cannot be written."""
    taken = {path for source, target in jobs for path in _read(source) | _written(target)}
    if report.resolve() in taken:
        raise OnnxforgeError(f"--report {report}: is the place of a model")
    refuse_to_overwrite([report.absolute()], force=force)


def _read(source: Path) -> set[Path]:
    try:
        return {path.resolve() for path in files(load(source, editable=False))}
    except ModelError:  # its own job will say what is wrong with it
        return {source.resolve()}


def _written(target: Path | None) -> set[Path]:
    return set() if target is None else {target.resolve(), data_path(target).resolve()}
