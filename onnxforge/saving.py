"""Models out: written, checked for what they would overwrite, and published."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.errors import ModelError
from onnxforge.lazy import identity
from onnxforge.model_io import files
from onnxforge.placement import PLACEMENT, Division, Layout, Placement, divide, pack
from onnxforge.readers import data_of, readers
from onnxforge.skeleton import SOURCE, Source
from onnxforge.storage import wire
from onnxforge.storage.leftovers import remove_abandoned
from onnxforge.storage.publish import publish
from onnxforge.storage.sharing import by_content
from onnxforge.storage.writer import Part, write_file

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "SHARED",
    "Progress",
    "Saved",
    "may_write",
    "refuse_to_overwrite",
    "save",
    "save_shared",
]

Progress = Callable[[int, int], None]
"""Told the number of weight bytes just written, and of all that will be."""

SHARED = "shared.onnx"
"""What the data files of several models are named after."""

_RAW_DATA = 9


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        files: Size in bytes of each file, by path.
        layout: ``inline``, ``sidecar`` or ``shards``.
        left: Data files of what was replaced that nothing written reads.
    """

    files: Mapping[Path, int]
    layout: str
    left: tuple[Path, ...] = ()


def may_write(path: Path, target: Path) -> bool:
    """Whether saving a model to ``target`` may write ``path``, in whatever layout."""
    written = (target.name, f"{target.name}_data", f"{target.name}.sha256")
    shard = path.name.startswith(f"{target.name}.data.")
    return path.parent == target.parent and (path.name in written or shard)


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "keep",
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Write a model; lazy weights are evaluated on the way, block by block.

    Args:
        model: The model. A `Placement` in its ``meta`` says where its weights go.
        path: Where it goes; data files are named after it and go beside it.
        layout: ``keep`` writes a data file if the model was loaded from one or more, or if
            it would not fit into one file of 2 GB.
        force: Overwrite what is there.
        workers: Number of threads.
        progress: Called on any thread after each block of weights.

    Raises:
        ModelError: The output exists and ``force`` is off, or cannot be written, or does not
            fit the layout. What was there before is still there then.
    """
    target = Path(path).absolute()
    work = _Work([(model, target)], target, layout)
    return work.save(force=force, workers=workers, progress=progress)


def save_shared(
    models: Sequence[tuple[ir.Model, str | os.PathLike[str]]],
    *,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Write several models into one folder, with data files that all of them read.

    Tensors of equal bytes are stored once, in ``shared.onnx_data`` or its shards; to know
    them, tensors of equal size are read once more.

    Args:
        models: The models and where they go, in one folder.
        force: Overwrite what is there.
        workers: Number of threads.
        progress: Called on any thread after each block of weights.

    Raises:
        ModelError: See `save`; or the models go to different folders.
    """
    jobs = [(model, Path(path).absolute()) for model, path in models]
    folders = {target.parent for _, target in jobs}
    if len(folders) != 1:
        raise ModelError("models that share data files go into one folder")
    work = _Work(jobs, folders.pop() / SHARED, None)
    return work.save(force=force, workers=workers, progress=progress)


class _Work:
    """Models to be written together, and the data files that all of them read."""

    def __init__(
        self, jobs: Sequence[tuple[ir.Model, Path]], base: Path, layout: Layout | None
    ) -> None:
        """Plan the files; None for a layout makes equal tensors share their place."""
        self.jobs = jobs
        self.targets = [target for _, target in jobs]
        self.divisions = []
        for model, _ in jobs:
            asks = PLACEMENT in model.meta
            self.divisions.append(divide(model, layout or ("keep" if asks else "sidecar")))
        self.placement: Placement = jobs[0][0].meta.get(PLACEMENT, Placement())
        same = by_content(_outside(self.divisions)) if layout is None else identity
        self.files = pack(self.divisions, self.placement, same)
        names = self.placement.names(base.name, len(self.files))
        self.data = [base.with_name(name) for name in names]
        self.base = base
        self.manifest = base.with_name(f"{base.name}.sha256")
        self.manifests = [self.manifest] if self.placement.manifest else []
        self.sizes: dict[Path, int] = {}
        for path, times in Counter([*self.targets, *self.data, *self.manifests]).items():
            if times > 1:
                raise ModelError(f"{path}: is the place of two files")

    def save(self, *, force: bool, workers: int | None, progress: Progress | None) -> Saved:
        targets = [*self.targets, *self.data]
        manifest = self.manifest if self.placement.manifest else None

        def check() -> None:
            refuse_to_overwrite([*targets, *self.manifests], force=force)

        check()
        left = self._left()
        total = sum(self._written_bytes())

        def count(written: int) -> None:
            if progress is not None:
                progress(written, total)

        def write_model(number: int, to: Path, names: Sequence[str]) -> None:
            for file, name in zip(self.files, names, strict=True):
                file.point(name)
            size = _write_model(self.divisions[number], to, workers, count)
            self.sizes[self.targets[number]] = size

        def write_data(number: int, to: Path) -> None:
            file = self.files[number]
            write_file(to, file.parts, file.size, workers=workers, progress=count)
            self.sizes[self.data[number]] = file.size

        writers = (write_model, write_data)
        try:
            publish(self.targets, self.data, *writers, manifest=manifest, check=check)
            bases = [self.base.name, *(target.name for target in self.targets)]
            remove_abandoned(self.base.parent, bases, lambda: readers(self.base.parent))
        except OSError as error:
            raise ModelError(
                f"{error.filename2 or self.targets[0]}: {error.strerror}"
            ) from error
        if manifest is not None:  # 64 digits, two blanks, the name, the end of the line
            self.sizes[manifest] = sum(67 + len(path.name.encode()) for path in targets)
        layout = "sidecar" if self.placement.single else "shards"
        return Saved(self.sizes, layout if self.files else "inline", left)

    def _left(self) -> tuple[Path, ...]:
        """What the models now at the targets read, and nobody will read any more.

        Raises:
            ModelError: Another model would lose its data.
        """
        folder = self.base.parent
        for model, target in self.jobs:
            _refuse_input(model, target, [*self.targets, *self.data])
        old = [target for target in self.targets if target.exists()]
        taken = [path for path in self.data if path.exists()]
        if not (old or taken):
            return ()
        read = {data for target in old for data in data_of(target)}
        # There may be thousands of others: they are read where there is something to lose.
        others = readers(folder, but=self.targets) if read or taken else {}
        for path in taken:
            if other := others.get(path.resolve()):
                raise ModelError(f"{path}: holds data of {other} as well, which would be lost")
        read -= others.keys()
        if not self.placement.manifest:
            read.add(self.manifest)
        gone = read - {path.resolve() for path in [*self.targets, *self.data]}
        inside = folder.resolve()
        return tuple(sorted(p for p in gone if p.parent in (inside, folder) and p.exists()))

    def _written_bytes(self) -> Iterator[int]:
        for division in self.divisions:
            tensors = enumerate(division.content.tensors)
            yield sum(tensor.nbytes for i, tensor in tensors if i not in division.outside)
        yield from (file.payload for file in self.files)


def _outside(divisions: Iterable[Division]) -> Iterator[ir.TensorProtocol]:
    for division in divisions:
        yield from (division.content.tensors[i] for i in division.outside)


def refuse_to_overwrite(paths: Iterable[Path], *, force: bool) -> None:
    """Raise ModelError if a path is taken, or by no regular file even with ``force``."""
    for path in paths:
        try:
            _refuse_taken(path, force=force)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from None


def _refuse_taken(path: Path, *, force: bool) -> None:
    if not path.name.isprintable():  # models and lists of hashes could not say it
        raise ModelError(f"{str(path)!r}: is no name for a file")
    if not path.parent.is_dir():
        raise ModelError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: is not a regular file")
    if os.path.lexists(path) and not force:
        raise ModelError(f"{path}: exists; --force overwrites it")


def _refuse_input(model: ir.Model, target: Path, written: Sequence[Path]) -> None:
    """Refuse to replace files that the model is read from, unless it replaces itself."""
    path = model.meta.get(SOURCE, Source()).path
    if path is None or _is_same(path, target):
        return
    for place in written:
        if any(_is_same(read, place) for read in files(model)):
            raise ModelError(f"{place}: holds data of {path}, which would be lost")


def _is_same(a: Path, b: Path) -> bool:
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def _write_model(
    division: Division, to: Path, workers: int | None, count: Callable[[int], None]
) -> int:
    """Write a model file with the payloads that stay inside; gives its size in bytes."""
    content = division.content
    inline = {
        i: wire.Payload(0, tensor.nbytes, getattr(tensor, "field", _RAW_DATA))
        for i, tensor in enumerate(content.tensors)
        if i not in division.outside
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
