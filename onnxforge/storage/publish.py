"""Putting models and data files in their places, so that a crash never mixes old and new."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from onnxforge.storage.leftovers import claimed, fcntl, temporary
from onnxforge.storage.whole import copy_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["publish"]

_BLOCK = 1 << 20


def publish(
    models: Sequence[Path],
    data: Sequence[Path],
    write_model: Callable[[int, Path, Sequence[str]], None],
    write_data: Callable[[int, Path], None],
    *,
    manifest: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write models and the data files they read, and move them to their places.

    Whatever the moment of a crash, each model found under its name has its own data: data go
    to temporary names first; models that point there are published; then copies of the data
    get their names, which nothing refers to by then; then the models are published again.
    Copies and not links: readers refuse data that have two names. Where no data are replaced
    nothing is copied.

    Args:
        models: Where the models go.
        data: Where their data go, in the same folder.
        write_model: Writes the model of a number to a path, for data files of given names.
        write_data: Writes the data file of a number to a path.
        manifest: Where the SHA-256 of each file goes; there is none while it would be wrong.
        check: Called last before anything is replaced, while no other save publishes.
    """
    token = secrets.token_hex(4)
    move = _Move(models, data, manifest, token)
    with claimed(models[0].parent, token):
        try:
            # All is written before anything is replaced: the old files may be what is read.
            for i, path in enumerate(move.fresh):
                write_data(i, path)
            for i, path in enumerate(move.final):
                write_model(i, path, [target.name for target in data])
            move.sum_up()
            with _alone(models[0].parent):
                check()
                move.run(write_model)
        finally:
            move.clean_up()


class _Move:
    """Temporary files on their way to their places."""

    def __init__(
        self, models: Sequence[Path], data: Sequence[Path], manifest: Path | None, token: str
    ) -> None:
        def temporaries(targets: Sequence[Path], use: str) -> list[Path]:
            return [temporary(target, token, use) for target in targets]

        self.models, self.data = models, data
        self.manifests = [] if manifest is None else [manifest]
        self.final, self.interim = temporaries(models, "tmp"), temporaries(models, "interim")
        self.fresh, self.copies = temporaries(data, "data"), temporaries(data, "copy")
        self.sums = temporaries(self.manifests, "tmp")
        self.aside = temporaries(self.manifests, "old")
        self.pointed = False  # whether a model may be read that points to temporary data

    def sum_up(self) -> None:
        """Write the hashes of all files, as ``sha256sum --check`` reads them."""
        files = [*zip(self.final, self.models, strict=True)]
        files += zip(self.fresh, self.data, strict=True)
        for path in self.sums:
            hashes = _hashes([source for source, _ in files])
            with path.open("x", encoding="utf-8") as file:
                path.chmod(0o644)  # whatever the umask, as all files of a bundle
                lines = zip(hashes, files, strict=True)
                file.writelines(f"{sha}  {target.name}\n" for sha, (_, target) in lines)
                file.flush()
                os.fsync(file.fileno())

    def run(self, write_model: Callable[[int, Path, Sequence[str]], None]) -> None:
        """Put everything into its place."""
        for path, aside in zip(self.manifests, self.aside, strict=True):
            if path.exists():
                _replace([path], [aside])
        if any(target.exists() for target in self.data):
            for source, copy in zip(self.fresh, self.copies, strict=True):
                copy_file(source, copy)
            for i, path in enumerate(self.interim):
                write_model(i, path, [source.name for source in self.fresh])
            self.pointed = True
            _replace(self.interim, self.models)
            _replace(self.copies, self.data)
        else:
            _replace(self.fresh, self.data)
        _replace(self.final, self.models)
        _replace(self.sums, self.manifests)

    def clean_up(self) -> None:
        """Remove what is left; a rename may have happened although it failed: look."""
        waiting = [path.exists() for path in self.final]
        pairs = zip(waiting, self.interim, strict=True)
        if self.pointed and any(old and not path.exists() for old, path in pairs):
            # New models are read already: there is no way back, but one to the end.
            _replace_rest(self.interim, self.models)
            _replace_rest(self.copies, self.data)
            _replace_rest(self.final, self.models)
            _replace_rest(self.sums, self.manifests)
        elif all(waiting):
            _replace_rest(self.aside, self.manifests)  # it is true still
            for path, target in zip(self.fresh, self.data, strict=True):
                if not path.exists() and not self.pointed:  # its place was free
                    target.unlink(missing_ok=True)
        left = [*self.final, *self.interim, *self.copies, *self.sums, *self.aside, *self.fresh]
        with contextlib.ExitStack() as stack:  # a signal meanwhile does not skip the others
            for path in left:
                stack.callback(path.unlink, missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other saves into this folder from publishing meanwhile."""
    if fcntl is None:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _hashes(paths: Sequence[Path]) -> list[str]:
    stopped = threading.Event()  # threads notice no signal themselves

    def sha256(path: Path) -> str:
        sha = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while not stopped.is_set() and (block := file.read(_BLOCK)):
                sha.update(block)
        return sha.hexdigest()

    with ThreadPoolExecutor() as pool:
        try:
            return list(pool.map(sha256, paths))
        finally:
            stopped.set()


def _replace(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    for source, target in zip(sources, targets, strict=True):
        source.replace(target)
        _flush_folder(target.parent)


def _replace_rest(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source.exists():
            _replace([source], [target])


def _flush_folder(folder: Path) -> None:
    """Make renames last; systems that cannot open a folder do not need it."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
