"""Files that options of passes name, read for the passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from onnxforge.core import FILES
from onnxforge.errors import DataError, Refused
from onnxforge.numerics.samples import read_archive
from onnxforge.stats_file import Known, read_statistics
from onnxforge.storage.whole import digest

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from onnxforge.core import Pass

__all__ = ["BY_HASH", "Known", "KnownSample", "hand_over", "handed", "named"]

BY_HASH = "sha256:"
"""How the name of a file begins that is known by its SHA-256 only."""


@dataclass(frozen=True)
class KnownSample:
    """A sample that a pass was given.

    Attributes:
        path: The file.
        sha256: Of the file.
        feeds: Value of each input, by name.
    """

    path: Path
    sha256: str
    feeds: Mapping[str, np.ndarray]


T = TypeVar("T", Known, KnownSample)
_KINDS: Final = {Known: ("statistics", "statistics"), KnownSample: ("a sample", "sample")}


def named(step: Pass) -> dict[str, tuple[str, ...]]:
    """The files that a pass names, by option."""
    found = {option: getattr(step, option) for option in step.files}
    return {k: (v,) if isinstance(v, str) else tuple(v) for k, v in found.items()}


def hand_over(step: Pass, model: ir.Model, given: Sequence[Path] = ()) -> None:
    """Read the files that a pass names, where it finds them: in ``Model.meta[FILES]``.

    Args:
        step: The pass.
        model: The model that it is to have.
        given: Where to look for a file that is named by its SHA-256.

    Raises:
        DataError: One cannot be read.
        Refused: None of the files given has the SHA-256.
    """
    names = [name for words in named(step).values() for name in words]
    model.meta[FILES] = {name: _read(name, given) for name in names}


def handed(model: ir.Model, name: str, kind: type[T]) -> T:
    """What a file holds that a pass names.

    Args:
        model: The model that it was handed over with.
        name: What the pass calls it.
        kind: What it has to be: `Known` or `KnownSample`.

    Raises:
        Refused: It is of the other kind.
    """
    found = model.meta[FILES][name]
    if not isinstance(found, kind):
        holds, wanted = (_KINDS[each] for each in (type(found), kind))
        raise Refused(f"{found.path}: holds {holds[0]}, no {wanted[1]}")
    return found


def _read(name: str, given: Sequence[Path]) -> Known | KnownSample:
    """Statistics, or a sample where the name of the file ends in ``.npz``."""
    path = Path(name)
    if name.startswith(BY_HASH):
        wanted = name.removeprefix(BY_HASH)
        found = next((path for path in given if digest(path) == wanted), None)
        if found is None:
            raise Refused(f"no file given has {name}: --stats names their file")
        path = found
    if path.is_dir():
        raise DataError(f"{path}: is a folder, name a file in it")
    if path.suffix.lower() == ".npz":
        return KnownSample(path, digest(path), read_archive(path))
    return Known(path, digest(path), read_statistics(path))
