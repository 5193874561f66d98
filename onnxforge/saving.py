"""Models out: which tensor goes into which file, and in which place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from onnxforge.errors import ModelError
from onnxforge.lazy import DerivedTensor, FileTensor, identity
from onnxforge.model_io import MAX_PROTO_BYTES, files, read_skeleton
from onnxforge.skeleton import SOURCE, Skeleton, Source, set_external, skeleton
from onnxforge.storage import wire
from onnxforge.storage.publish import publish
from onnxforge.storage.writer import Part, write_file
from onnxforge.walk import proto_tensors
from onnxforge.weights import needed_constants

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    import onnx

__all__ = ["Layout", "Progress", "Saved", "data_path", "refuse_to_overwrite", "save"]

Layout = Literal["keep", "inline", "sidecar"]
Progress = Callable[[int, int], None]
"""Told the number of weight bytes just written, and of all that will be."""

_RAW_DATA = 9


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        files: Size in bytes of each file, by path.
        layout: ``inline`` or ``sidecar``.
    """

    files: Mapping[Path, int]
    layout: str


def data_path(path: Path) -> Path:
    """Where the weights of a model at ``path`` go when they go outside."""
    return path.with_name(path.name + "_data")


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "keep",
    force: bool = False,
    align: int = 64,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Write a model; lazy weights are evaluated on the way, block by block.

    Args:
        model: The model.
        path: Where it goes; a sidecar is called ``<path>_data``.
        layout: ``keep`` writes a sidecar if the model was loaded from one or more, or if
            it would not fit into one file of 2 GB.
        force: Overwrite what is there.
        align: Offsets in the sidecar are multiples of this many bytes.
        workers: Number of threads.
        progress: Called on any thread after each block of weights.

    Raises:
        ModelError: The output exists and ``force`` is off, or cannot be written, or does not
            fit the layout. What was there before is still there then.
    """
    target = Path(path).absolute()
    content = skeleton(model)
    outside = _outside(model, content, layout)
    data = _DataFile(content, outside, align) if outside else None
    data_target = data_path(target) if outside else None
    targets = [target, *([data_target] if data_target else [])]
    refuse_to_overwrite(targets, force=force)
    _refuse_input(model, targets)
    if data_target is not None and data_target.exists():
        _refuse_shared(target, data_target)
    sizes: dict[Path, int] = {}
    total = sum(tensor.nbytes for tensor in content.tensors)

    def count(written: int) -> None:
        if progress is not None:
            progress(written, total)

    def write_model(to: Path, location: str) -> None:
        if data is not None:
            data.place(location)
        sizes[target] = _write_model(content, outside, to, workers, count)

    def write_data(to: Path) -> None:
        assert data is not None
        assert data_target is not None
        write_file(to, data.parts, data.size, workers=workers, progress=count)
        sizes[data_target] = data.size

    try:
        publish(target, data_target, write_model, write_data)
    except OSError as error:
        raise ModelError(f"{target}: {error.strerror}") from error
    return Saved(sizes, "sidecar" if outside else "inline")


def refuse_to_overwrite(paths: Iterable[Path], *, force: bool) -> None:
    """Raise ModelError if a path is taken, or by no regular file even with ``force``."""
    for path in paths:
        if not path.parent.is_dir():
            raise ModelError(f"{path.parent}: no such folder")
        if path.is_dir():
            raise ModelError(f"{path}: is a folder")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: is not a regular file")
        if os.path.lexists(path) and not force:
            raise ModelError(f"{path}: exists; --force overwrites it")


def _refuse_shared(target: Path, data: Path) -> None:
    """Refuse to replace a data file that another model in its folder reads as well."""
    for other in sorted(data.parent.glob("*.onnx")):
        if not _is_same(other, target) and data.name in _data_names(other):
            raise ModelError(f"{data}: holds data of {other} as well, which would be lost")


def _data_names(path: Path) -> set[str]:
    """Names of the data files of a model; none if it is no model."""
    try:
        proto, _, location = read_skeleton(path)
    except ModelError:
        return set()
    places = (e.value for t in proto_tensors(proto) for e in t.external_data)
    return {os.path.normpath(place) for place in places if place != location}


def _refuse_input(model: ir.Model, targets: Sequence[Path]) -> None:
    """Refuse to replace files that the model is read from, unless it replaces itself."""
    path = model.meta.get(SOURCE, Source()).path
    if path is None or _is_same(path, targets[0]):
        return
    for written in targets:
        if any(_is_same(read, written) for read in files(model)):
            raise ModelError(f"{written}: holds data of {path}, which would be lost")


def _is_same(a: Path, b: Path) -> bool:
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def _write_model(
    content: Skeleton,
    outside: set[int],
    to: Path,
    workers: int | None,
    count: Callable[[int], None],
) -> int:
    inline = {
        i: wire.Payload(0, tensor.nbytes, getattr(tensor, "field", _RAW_DATA))
        for i, tensor in enumerate(content.tensors)
        if i not in outside
    }
    serialized = content.proto.SerializeToString(deterministic=True)
    parts: list[Part] = []
    at = 0
    for piece in wire.splice(serialized, content.location, inline):
        whole = piece if isinstance(piece, bytes) else content.tensors[piece]
        parts.append(Part(at, whole))
        at += len(piece) if isinstance(piece, bytes) else inline[piece].length
    write_file(to, parts, at, workers=workers, progress=count)
    return at


class _DataFile:
    """The sidecar: each tensor has one place, however many names it has."""

    def __init__(self, content: Skeleton, outside: set[int], align: int) -> None:
        self.size = 0
        self.parts: list[Part] = []
        self._stubs: list[tuple[onnx.TensorProto, int, int]] = []
        places: dict[Hashable, int] = {}
        for i in sorted(outside):
            tensor = content.tensors[i]
            key = identity(tensor)
            if key not in places:
                places[key] = -(-self.size // align) * align
                self.parts.append(Part(places[key], tensor))
                self.size = places[key] + tensor.nbytes
            self._stubs.append((content.stubs[i], places[key], tensor.nbytes))

    def place(self, location: str) -> None:
        """Point the tensors of the model to the sidecar."""
        for stub, offset, length in self._stubs:
            entries = {"location": location, "offset": str(offset), "length": str(length)}
            set_external(stub, entries)


def _outside(model: ir.Model, content: Skeleton, layout: Layout) -> set[int]:
    """The tensors that go into the sidecar, by number."""
    external = model.meta.get(SOURCE, Source()).external
    inside = _fits(content, set())
    if layout == "inline" and not inside:
        raise ModelError(
            "the weights do not fit into one file of 2 GB: use the sidecar layout"
        )
    if layout == "inline" or (layout == "keep" and not external and inside):
        return set()
    fixed = {value.name for value in needed_constants(model)}
    names = Counter(identity(tensor) for tensor in content.tensors)

    def worth_it(tensor: ir.TensorProtocol) -> bool:
        # Inside, a tensor with two names is stored twice, however small it has become.
        tied = names[identity(tensor)] > 1 and _was_outside(tensor)
        return tensor.nbytes >= (1 if tied else wire.PAYLOAD_BYTES)

    able = {
        i
        for i, tensor in enumerate(content.tensors)
        if worth_it(tensor) and content.stubs[i].name not in fixed
    }
    initializers = {
        int(tensor.external_data[1].value)
        for tensor in content.proto.graph.initializer
        if tensor.external_data and tensor.external_data[0].value == content.location
    }
    # Bodies and Constant nodes keep theirs inside: browsers load those from nowhere else.
    usual = {i for i in able if i in initializers or _was_outside(content.tensors[i])}
    return usual if _fits(content, usual) else able


def _was_outside(tensor: ir.TensorProtocol) -> bool:
    while isinstance(tensor, DerivedTensor):
        tensor = tensor.source
    return isinstance(tensor, FileTensor) and bool(tensor.external)


def _fits(content: Skeleton, outside: set[int]) -> bool:
    inside = sum(t.nbytes for i, t in enumerate(content.tensors) if i not in outside)
    size: int = content.proto.ByteSize()
    return size + inside + 16 * len(content.tensors) <= MAX_PROTO_BYTES
