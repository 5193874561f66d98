"""Where external data may lie, and whether it is all there."""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxforge.errors import ModelError
from onnxforge.lazy import DataFile, FileTensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from onnxforge.storage.remote import Server

__all__ = ["DataFolder", "RemoteFolder", "external_numbers", "refuse_unsized"]

_KEYS = frozenset({"location", "offset", "length", "checksum"})


class DataFolder:
    """The data files of one model.

    A location must stay inside the folder of the model or inside the folder of the file that
    the model really is, so that a download cache made of symbolic links works. A data file
    must not have names (hard links) elsewhere: it would not be the model's own.
    """

    def __init__(self, folder: str | os.PathLike[str], model: Path | None = None) -> None:
        """Name the folder, and the model file when there is one."""
        self.folder = Path(folder).absolute()
        roots = [self.folder.resolve()]
        if model is not None:
            roots.append(model.resolve().parent)
        self._roots = tuple(roots)
        self._files: dict[str, DataFile] = {}
        self._names: dict[Path, Counter[tuple[int, int]]] = {}

    def tensor(self, entries: Mapping[str, str], like: ir.TensorProtocol) -> FileTensor:
        """The tensor that external data entries describe.

        Args:
            entries: The external_data of the TensorProto.
            like: Gives name, type and shape.

        Raises:
            ModelError: The entries are malformed, or the bytes are not there.
        """
        refuse_unsized(like)
        name = like.name
        given_offset, length = external_numbers(entries, name)
        location, offset = entries.get("location", ""), given_offset or 0
        file = self._file(location, name)
        if length not in (None, 0, like.nbytes):
            raise ModelError(
                f"tensor {name!r}: {length} bytes in {location!r}, but its shape needs"
                f" {like.nbytes}"
            )
        if offset + like.nbytes > file.size:
            raise ModelError(
                f"tensor {name!r}: bytes {offset} to {offset + like.nbytes} are not in"
                f" {location!r}, which has {file.size}"
            )
        return FileTensor(file, offset, like, external=dict(entries))

    def _file(self, location: str, name: str | None) -> DataFile:
        if location not in self._files:
            what = f"tensor {name!r}: data location {location!r}"
            try:
                self._files[location] = self._checked(location, what)
            except RuntimeError:  # what a loop of links is before Python 3.13
                raise ModelError(f"{what} is a loop of links") from None
            except OSError as error:
                raise ModelError(f"{what}: {error.strerror}") from None
        return self._files[location]

    def _refuse_astray(self, location: str, what: str) -> None:
        named = isinstance(location, str) and location and "\0" not in location
        if not named or location.startswith("*/"):
            raise ModelError(f"{what} is not a file name")
        if Path(location).is_absolute() or location.startswith(("/", "\\")):
            raise ModelError(f"{what} is absolute")
        if Path(os.path.normpath(location)).parts[:1] == ("..",):
            raise ModelError(f"{what} leaves the folder of the model")

    def _checked(self, location: str, what: str) -> DataFile:
        self._refuse_astray(location, what)
        path = self.folder / location
        real = path.resolve(strict=True)
        if not any(real.is_relative_to(root) for root in self._roots):
            raise ModelError(f"{what} leads out of the folder of the model")
        status = real.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{what} is not a regular file")
        if status.st_nlink > 1:
            known = self._names_of(real, status)
            # Again: whoever publishes the file this moment may have dropped a name of it.
            if known < min(status.st_nlink, real.stat().st_nlink):
                raise ModelError(f"{what} has another name outside of the folder (hard link)")
        if not os.access(real, os.R_OK):
            raise ModelError(f"{what}: Permission denied")
        return DataFile(path)

    def _names_of(self, real: Path, status: os.stat_result) -> int:
        """How many names a file has beside it and in the folders of the model."""
        folders = {real.parent, *self._roots}
        for folder in folders - self._names.keys():
            device = folder.stat().st_dev
            with os.scandir(folder) as entries:
                self._names[folder] = Counter((device, entry.inode()) for entry in entries)
        key = status.st_dev, status.st_ino
        return sum(self._names[folder][key] for folder in folders)


class RemoteFolder(DataFolder):
    """The data files of a model behind an address of http; only their sizes are known.

    Attributes:
        sizes: What was found, by address.
    """

    def __init__(self, server: Server) -> None:
        """Name the folder."""
        super().__init__("")
        self._server = server
        self.sizes: dict[str, int] = {}

    def file(self, name: str, size: int) -> RemoteFile:
        """A file of a known size."""
        self.sizes[self._server.address(name)] = size
        return RemoteFile(Path(name), size)

    def _checked(self, location: str, what: str) -> DataFile:
        self._refuse_astray(location, what)
        size = self._server.size(location)
        if size is None:
            raise ModelError(f"{what}: no such file")
        return self.file(location, size)


class RemoteFile(DataFile):
    """A file that cannot be read from here."""

    def __init__(self, path: Path, size: int) -> None:
        """Say what is known of it."""
        self.path = path
        self.size = size

    def open(self, tensor: str | None = None) -> NoReturn:
        """Refuse: weights are not read over http.

        Raises:
            ModelError: Always.
        """
        raise ModelError(f"{self.path}: weights are not read over http")


def refuse_unsized(tensor: ir.TensorProtocol) -> None:
    """Raise ModelError for a tensor whose size in bytes its type and shape do not tell."""
    if tensor.dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        raise ModelError(f"tensor {tensor.name!r}: {tensor.dtype.name} has no size in bytes")
    if any(dim < 0 for dim in tensor.shape.numpy()):
        raise ModelError(f"tensor {tensor.name!r}: has a negative dimension")


def external_numbers(
    entries: Mapping[str, str], name: str | None
) -> tuple[int | None, int | None]:
    """Offset and length that external data entries give.

    Raises:
        ModelError: A key is unknown or a number is none.
    """
    if unknown := sorted(set(entries) - _KEYS, key=repr):
        location = entries.get("location", "")
        raise ModelError(
            f"tensor {name!r}: unknown external data key {unknown[0]!r} for {location!r}"
        )
    return _number(entries, "offset", name), _number(entries, "length", name)


def _number(entries: Mapping[str, str], key: str, name: str | None) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        location = entries.get("location", "")
        raise ModelError(
            f"tensor {name!r}: external data {key} {text!r} is not a byte count"
            f", for {location!r}"
        )
    return int(text)
