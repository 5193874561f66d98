"""Files that options of passes name, read for the passes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.errors import DataError, Refused
from onnxforge.numerics.samples import read_archive
from onnxforge.stats_file import Known

if TYPE_CHECKING:
    import numpy as np

    from onnxforge.core import Pass

__all__ = ["BY_HASH", "KnownSample", "known", "named"]

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


def named(step: Pass) -> dict[str, tuple[str, ...]]:
    """The files that a pass names, by option."""
    found = {option: getattr(step, option) for option in step.files}
    return {k: (v,) if isinstance(v, str) else tuple(v) for k, v in found.items()}


def known(name: str, given: Sequence[Path]) -> Known | KnownSample:
    """What is in a file: statistics, or a sample where its name ends in ``.npz``.

    Args:
        name: Its path, or its SHA-256.
        given: Where to look for a file that is named by its SHA-256.

    Raises:
        DataError: It cannot be read.
        Refused: None of the files given has the SHA-256.
    """
    path = Path(name)
    if name.startswith(BY_HASH):
        wanted = name.removeprefix(BY_HASH)
        found = next((path for path in given if _sha256(path) == wanted), None)
        if found is None:
            raise Refused(f"no file given has {name}: --stats names their file")
        path = found
    if path.is_dir():
        raise DataError(f"{path}: is a folder, name a file in it")
    if path.suffix.lower() == ".npz":
        return KnownSample(path, _sha256(path), read_archive(path))
    return Known.read(path)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
