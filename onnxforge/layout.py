"""What lies where in the data files of a model, who owns it, and what nobody owns."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onnxforge import model_io
from onnxforge.errors import ModelError
from onnxforge.lazy import DataFile, FileTensor
from onnxforge.weights import Weight, Weights

if TYPE_CHECKING:
    from io import FileIO

__all__ = ["FileLayout", "Kind", "ModelLayout", "Range", "layout"]

Kind = Literal["owned", "shared", "overlap", "padding", "orphaned"]
_MAX_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class Range:
    """Bytes of a data file that stand together.

    Attributes:
        start: Offset of the first.
        stop: Offset behind the last.
        kind: ``owned`` by one weight or ``shared`` by several; the ``overlap`` of a range with
            one before it; or nobody's: ``padding``, zeros that align the range that follows,
            or ``orphaned``.
        owners: Paths of the weights; those in other models are named ``other.onnx: path``.
        element: Size in bytes of the largest element of its owners, 0 if it has no weight.
    """

    start: int
    stop: int
    kind: Kind
    owners: tuple[str, ...] = ()
    element: int = 0

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class FileLayout:
    """A data file from its first byte to its last.

    Attributes:
        path: Where it is.
        size: Its size in bytes.
        ranges: What it is made of, by offset. Each byte is in weights, in padding or in an
            orphaned range; overlaps stand behind the range that overlaps.
        empty: Paths of the weights in it that have no elements, and so no bytes.
    """

    path: Path
    size: int
    ranges: Sequence[Range]
    empty: Sequence[str]

    @property
    def weights(self) -> Sequence[Range]:
        """The ranges that weights own."""
        return [part for part in self.ranges if part.kind in ("owned", "shared")]

    @property
    def alignment(self) -> int:
        """Largest power of two, at most 65536, that divides the offsets of all weights."""
        return math.gcd(_MAX_ALIGNMENT, *(part.start for part in self.weights))

    @property
    def misaligned(self) -> int:
        """Number of ranges whose offset is no multiple of the size of their elements."""
        return sum(part.start % part.element > 0 for part in self.weights)

    @property
    def owned(self) -> int:
        """Bytes that belong to weights."""
        return self.size - self.padding - self.orphaned

    @property
    def padding(self) -> int:
        """Bytes of padding."""
        return self._total("padding")

    @property
    def orphaned(self) -> int:
        """Bytes that nobody owns and no alignment needs."""
        return self._total("orphaned")

    @property
    def saved(self) -> int:
        """Bytes that the weights would need more if each had its own."""
        return sum(part.size * len(part.owners) for part in self.weights) - self.owned

    def _total(self, kind: Kind) -> int:
        return sum(part.size for part in self.ranges if part.kind == kind)


@dataclass(frozen=True)
class ModelLayout:
    """Where the weights of a model lie.

    Attributes:
        path: The model.
        files: Its data files.
        inline: Number of weights that stand in the model itself.
        inline_bytes: Their size.
        remarks: What may be missing on the maps.
    """

    path: Path
    files: Sequence[FileLayout]
    inline: int
    inline_bytes: int
    remarks: Sequence[str]


# The owners of each range, and the size of their elements.
_Places = dict[tuple[int, int], list[tuple[str, int]]]


def layout(path: str | os.PathLike[str]) -> ModelLayout:
    """Map the data files of a model; of their content only what may be padding is read.

    Weights of other models count as owners too if those models lie in the folder of this one
    or of the data file.

    Raises:
        ModelError: The model cannot be read.
    """
    model = Path(path).absolute()
    inline, outside = _weights(model)
    real: Callable[[DataFile], Path] = functools.cache(lambda file: file.path.resolve())
    files: dict[Path, DataFile] = {}
    places: dict[Path, _Places] = {}
    for weight, tensor in outside:
        key = real(tensor.file)
        files.setdefault(key, tensor.file)
        _note(places.setdefault(key, {}), weight.where, tensor)
    remarks = []
    for other in _others(model, {file.path.parent for file in files.values()}):
        try:
            _, theirs = _weights(other)
        except ModelError as error:
            remarks.append(f"what this model owns is not on the maps: {error}")
            continue
        name = os.path.relpath(other, model.parent)
        for weight, tensor in theirs:
            if (key := real(tensor.file)) in files:
                _note(places[key], f"{name}: {weight.where}", tensor)
    maps = [_map(file, places[key]) for key, file in files.items()]
    return ModelLayout(model, maps, len(inline), sum(w.nbytes for w in inline), remarks)


def _weights(model: Path) -> tuple[list[Weight], list[tuple[Weight, FileTensor]]]:
    """The weights inside of a model and those in its data files."""
    inline, outside = [], []
    for weight in Weights(model_io.load(model, editable=False)):
        if isinstance(weight.tensor, FileTensor) and weight.tensor.external:
            outside.append((weight, weight.tensor))
        else:
            inline.append(weight)
    return inline, outside


def _others(model: Path, folders: set[Path]) -> list[Path]:
    """The other models in the folders of the data and of the model, each once."""
    models = (other for f in sorted({*folders, model.parent}) for other in f.glob("*.onnx"))
    found = {other.resolve(): other for other in models if other.is_file()}
    found.pop(model.resolve(), None)
    return sorted(found.values())


def _note(places: _Places, name: str, tensor: FileTensor) -> None:
    owners = places.setdefault((tensor.offset, tensor.offset + tensor.nbytes), [])
    owners.append((name, math.ceil(tensor.dtype.itemsize)))


def _map(file: DataFile, places: _Places) -> FileLayout:
    held: list[Range] = []
    empty: list[str] = []
    for (start, stop), owners in sorted(places.items()):
        names = tuple(name for name, _ in owners)
        if start == stop:
            empty += names
        else:
            kind: Kind = "shared" if len(names) > 1 else "owned"
            held.append(Range(start, stop, kind, names, max(size for _, size in owners)))
    with file.open() as content:
        return FileLayout(file.path, file.size, list(_filled(held, content, file.size)), empty)


def _filled(held: Sequence[Range], content: FileIO, size: int) -> Iterator[Range]:
    """The ranges of weights, with what lies between them and where they overlap."""
    last = Range(0, 0, "owned")  # the one that reaches furthest
    for part in held:
        if last.stop < part.start:
            yield _hole(last.stop, part.start, content)
        yield part
        if part.start < last.stop:
            both = last.owners + part.owners
            yield Range(part.start, min(part.stop, last.stop), "overlap", both)
        last = max(last, part, key=lambda one: one.stop)
    if last.stop < size:
        yield Range(last.stop, size, "orphaned")


def _hole(start: int, stop: int, content: FileIO) -> Range:
    """What nobody owns before a range: padding if zeros, and no more than alignment needs."""
    length = stop - start
    is_short = length < math.gcd(stop, _MAX_ALIGNMENT)
    content.seek(start)
    is_padding = is_short and content.read(length) == bytes(length)
    return Range(start, stop, "padding" if is_padding else "orphaned")
