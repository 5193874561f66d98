"""Files of a bundle, by their names below its root."""

from __future__ import annotations

import abc
import contextlib
import functools
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.errors import ModelError
from onnxforge.storage.wire import FileSlices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxforge.storage.wire import Slices

__all__ = ["Files", "LocalFiles", "is_path"]

_MOST = 64 << 20  # bytes of a text that is read whole


def is_path(name: str) -> bool:
    """Whether what a list calls a file is a path that stays in the folder."""
    parts = name.split("/")
    return "\\" not in name and not {"", ".", ".."} & set(parts)


class Files(abc.ABC):
    """Where the files of a bundle are.

    Attributes:
        root: The folder or address that names are below.
        complete: Whether all files are known that are there.
    """

    root: str
    complete: bool = True

    @property
    @abc.abstractmethod
    def names(self) -> Mapping[str, int]:
        """All files that are known to be there, with their sizes; names with slashes."""

    @abc.abstractmethod
    def size(self, name: str) -> int | None:
        """Size of a file in bytes, None if it is not there."""

    @abc.abstractmethod
    def slices(self, name: str) -> contextlib.AbstractContextManager[Slices]:
        """A file to be read in parts."""

    @abc.abstractmethod
    def shown(self, name: str) -> str:
        """A name as the caller would write it."""

    def local(self, name: str) -> Path | None:
        """Where a file is on this machine, None if it is not."""
        return None

    def read(self, name: str) -> bytes:
        """A small file as a whole.

        Raises:
            ModelError: It is not there, or it is not small.
        """
        size = self.size(name)
        if size is None:
            raise ModelError(f"{self.shown(name)}: no such file")
        if size > _MOST:
            raise ModelError(f"{self.shown(name)}: {size:,} bytes, too much for what it is")
        with self.slices(name) as content:
            return content[0:size]


class LocalFiles(Files):
    """Files of this machine."""

    def __init__(self, root: Path, *, deep: bool = True) -> None:
        """Name the folder; only what stands in it itself counts unless ``deep``."""
        self.root = str(root)
        self._folder = root
        self._deep = deep
        self._sizes: dict[str, int | None] = {}

    @functools.cached_property
    def names(self) -> Mapping[str, int]:
        """All regular files, but for hidden ones."""
        found: dict[str, int] = {}
        for folder, folders, files in os.walk(self._folder):
            folders[:] = sorted(f for f in folders if not f.startswith(".")) * self._deep
            for file in sorted(files):
                name = (Path(folder) / file).relative_to(self._folder).as_posix()
                size = None if file.startswith(".") else self.size(name)
                if size is not None:
                    found[name] = size
        return found

    def size(self, name: str) -> int | None:
        """Size of a regular file or of what a link leads to, asked once."""
        if name not in self._sizes:
            self._sizes[name] = _size(self._folder / name)
        return self._sizes[name]

    @contextlib.contextmanager
    def slices(self, name: str) -> Iterator[Slices]:
        """Through a window, so that what is skipped is not read."""
        path = self._folder / name
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from None
        try:
            yield FileSlices(fd)
        finally:
            os.close(fd)

    def shown(self, name: str) -> str:
        """The path."""
        return str(self._folder / name)

    def local(self, name: str) -> Path:
        """The path."""
        return self._folder / name


def _size(path: Path) -> int | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # also a NUL in the name
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
