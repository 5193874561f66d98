"""What must not meet among the files that one command reads and writes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.errors import ModelError, OnnxforgeError
from onnxforge.model_io import files, load
from onnxforge.saving import SHARED, may_write, refuse_to_overwrite

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Job", "refuse_entangled", "refuse_report"]

Job = tuple[Path, Path | None]
"""A model and where its result goes."""


def refuse_entangled(jobs: Sequence[Job]) -> None:
    """Raise OnnxforgeError if the result of one job would replace what another one reads."""
    if len(jobs) < 2:
        return
    read = [_read(source) for source, _ in jobs]
    for (i, (source, target)), (j, theirs) in itertools.product(
        enumerate(jobs), enumerate(read)
    ):
        if i != j and (both := sorted(path for path in theirs if _writes(target, path))):
            raise OnnxforgeError(f"{source}: its result {both[0]} is read for {jobs[j][0]}")


def refuse_report(
    report: Path, jobs: Sequence[Job], *, force: bool, shared: bool = False
) -> None:
    """Raise OnnxforgeError where a report would cost a model or cannot be written."""
    place = report.resolve()
    targets = [target for _, target in jobs]
    if shared:
        targets += [target.with_name(SHARED) for target in targets if target is not None]
    read = any(place in _read(source) for source, _ in jobs)
    if read or any(_writes(target, place) for target in targets):
        raise OnnxforgeError(f"--report {report}: is the place of a model")
    refuse_to_overwrite([report.absolute()], force=force)


def _read(source: Path) -> set[Path]:
    try:
        found = list(files(load(source, editable=False)))
    except ModelError:  # its own job will say what is wrong with it
        found = [source]
    return {path.resolve() for path in found} | {_place(path) for path in found}


def _writes(target: Path | None, path: Path) -> bool:
    return target is not None and may_write(path, _place(target))


def _place(path: Path) -> Path:
    """Where a file is, itself perhaps a link: writing replaces links."""
    return path.parent.resolve() / path.name
