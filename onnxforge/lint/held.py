"""Where the weights of models lie in data files, as the models say."""

from __future__ import annotations

import math
import posixpath
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from onnxforge.lint.files import Files
    from onnxforge.lint.model import Model
    from onnxforge.lint.view import Tensor

__all__ = ["Held", "by_file", "held", "holes", "is_padding"]

_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class Held:
    """A tensor whose bytes are in a data file.

    Attributes:
        model: The model that says so.
        tensor: The tensor.
        location: Where it says they are.
        file: That place among the files of the bundle, None if no location may name it.
        offset: First byte, None if that is no number.
        length: Number of bytes that it says, None if it says none or no number.
        faults: What is wrong with the numbers as they are written.
    """

    model: Model
    tensor: Tensor
    location: str
    file: str | None
    offset: int | None
    length: int | None
    faults: tuple[str, ...] = ()

    @property
    def range(self) -> tuple[int, int]:
        """Its first byte, and the one behind the last."""
        start = self.offset or 0
        return start, start + self.tensor.nbytes

    @property
    def stop(self) -> int:
        """The byte behind the last."""
        return self.range[1]


def held(model: Model) -> list[Held]:
    """The tensors of a model that lie in data files."""
    return [_held(model, tensor) for tensor in model.tensors if tensor.external]


def _held(model: Model, tensor: Tensor) -> Held:
    entries = tensor.entries
    location = entries.get("location", "")
    offset, length = _number(entries.get("offset", "0")), _number(entries.get("length", ""))
    numbers = {"offset": offset, "length": length}
    faults = tuple(
        f"{key} {entries[key]!r} is not a number of bytes"
        for key, number in numbers.items()
        if key in entries and number is None
    )
    return Held(model, tensor, location, _place(model, location), offset, length, faults)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _place(model: Model, location: str) -> str | None:
    """A location among the files of the bundle, None if it leaves the folder of its model."""
    absolute = location.startswith(("/", "\\")) or _DRIVE.match(location)
    if not location or "\0" in location or absolute or location.startswith("*/"):
        return None
    path = posixpath.normpath(location)
    if path.split("/")[0] == ".." or path == ".":
        return None
    return model.folder + path


def by_file(models: Iterable[Model]) -> Mapping[str, list[Held]]:
    """What models hold in each data file, by its name."""
    found: dict[str, list[Held]] = defaultdict(list)
    for model in models:
        for each in model.held if model.broken is None else ():
            if each.file is not None:
                found[each.file].append(each)
    return found


def holes(owners: Iterable[Held], size: int) -> list[tuple[int, int]]:
    """Ranges of a file that nobody owns."""
    found = []
    end = 0
    for start, stop in sorted({each.range for each in owners if each.offset is not None}):
        if start > end:
            found.append((end, start))
        end = max(end, stop)
    if end < size:
        found.append((end, size))
    return found


def is_padding(start: int, stop: int, size: int, files: Files, name: str) -> bool:
    """Whether a range only aligns what follows it: it is short and, if it is here, zeros."""
    if stop == size or stop - start >= math.gcd(stop, _MAX_ALIGNMENT):
        return False
    if files.local(name) is None:
        return True
    with files.slices(name) as content:
        return not any(content[start:stop])
