"""Tensors that are read or computed block by block, when they are written and not before."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from onnxforge.errors import ModelError

if TYPE_CHECKING:
    from io import FileIO

__all__ = [
    "BLOCK_BYTES",
    "DataFile",
    "DerivedTensor",
    "FileTensor",
    "Kernel",
    "Reader",
    "Scratch",
    "blocks",
    "identity",
    "reader",
    "root",
    "sha256",
    "stream",
]

BLOCK_BYTES = 1 << 20
"""Work is done in blocks of this many source bytes: they stay in the processor's cache."""

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Reader = Callable[[int, Bytes], None]
"""Fills a buffer with the bytes of a tensor from a byte offset on; safe in many threads."""


class Kernel(Protocol):
    """Computes a block of a derived tensor from the same block of its source.

    Both blocks are flat and hold the same elements, the first of which is element
    ``start`` of the tensor. A kernel must be equal to another one that computes the same.
    It must not use BLAS or float32 transcendentals: their results differ between processors.
    """

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        """Fill ``out``."""

    def __hash__(self) -> int:
        """Equal kernels on the same source make one stored tensor."""


class DataFile:
    """A file that holds weights, opened only while it is read.

    Attributes:
        path: Where it is, absolute.
        size: Its size in bytes when the model was loaded.
    """

    def __init__(self, path: Path) -> None:
        """Remember which file it is, so that a changed file is noticed.

        Raises:
            ModelError: There is no such regular file.
        """
        self.path = path
        try:
            status = path.stat()
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):  # to open a pipe or a device may wait forever
            raise ModelError(f"{path}: is not a regular file")
        self.size = status.st_size
        self._identity = _identity(status)

    @contextlib.contextmanager
    def open(self, tensor: str | None = None) -> Iterator[FileIO]:
        """Open the file unbuffered, for a ``with`` block.

        Args:
            tensor: Name of the tensor that is to be read, for messages.

        Raises:
            ModelError: It cannot be read or is not the file it was when the model was loaded,
                at the beginning of the block or at its end.
        """
        what = self._what(tensor)
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"{what}: {error.strerror}") from None
        with file:
            self._refuse_changed(file, what)
            yield file
            self._refuse_changed(file, what)

    def _what(self, tensor: str | None) -> str:
        return f"{self.path}: tensor {tensor!r}" if tensor else str(self.path)

    def _refuse_changed(self, file: FileIO, what: str) -> None:
        if _identity(os.fstat(file.fileno())) != self._identity:
            raise ModelError(f"{what}: changed since the model was loaded")

    def read_into(self, offset: int, out: Bytes, tensor: str | None = None) -> None:
        """Fill ``out`` with the bytes of ``tensor`` from ``offset`` on."""
        view = out.data
        with self.open(tensor) as file:
            file.seek(offset)
            while len(view) and (count := file.readinto(view)):
                view = view[count:]
        if len(view):
            raise ModelError(f"{self._what(tensor)}: ends before byte {offset + len(out)}")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _LazyTensor(ir.TensorProtocol):
    """What the two kinds of lazy tensors share: everything but where the bytes come from."""

    def __init__(self, dtype: ir.DataType, like: ir.TensorProtocol) -> None:
        self.name = like.name
        self.dtype = dtype
        self.shape = like.shape
        self.doc_string = like.doc_string
        self.metadata_props = dict(like.metadata_props)
        self.meta: dict[str, Any] = {}

    def open_reader(self) -> Reader:
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape.numpy())

    @property
    def nbytes(self) -> int:
        """Number of bytes; elements of less than a byte are packed."""
        return math.ceil(self.size * self.dtype.itemsize)

    @property
    def raw(self) -> Any:
        """The tensor itself; onnx_ir may look at this at any time, so it must cost nothing."""
        return self

    def tobytes(self) -> bytes:
        """All bytes, computed now."""
        out = np.empty(self.nbytes, np.uint8)
        self._fill(out)
        return out.tobytes()

    def _fill(self, out: Bytes) -> None:
        read = self.open_reader()
        for start, stop in blocks(self):
            read(start, out[start:stop])

    def tofile(self, file: Any) -> None:
        """Write all bytes to a file object, block by block."""
        for block in stream(self):
            file.write(block.data)

    def numpy(self) -> np.ndarray:
        """All values, computed now."""
        content = np.empty(self.nbytes, np.uint8)
        self._fill(content)
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(content, self.dtype, shape=self.shape.numpy()).numpy()
        return content.view(self.dtype.numpy()).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All values, for numpy."""
        if copy is False:
            raise ValueError("the values of a lazy tensor are computed, that is a copy")
        return self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        """All values, for array libraries."""
        return self.numpy().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """The processor."""
        return np.empty(0).__dlpack_device__()

    def __repr__(self) -> str:
        """Class, type and shape."""
        return f"{type(self).__name__}<{self.dtype},{self.shape}>({self.name!r})"


class FileTensor(_LazyTensor):
    """A tensor whose bytes lie in a file.

    Attributes:
        file: The file.
        offset: First byte.
        field: Number of the TensorProto field the bytes stand in when they are inline.
        external: The external data entries the model had for it, empty for inline data.
    """

    def __init__(
        self,
        file: DataFile,
        offset: int,
        like: ir.TensorProtocol,
        *,
        field: int = 9,
        external: dict[str, str] | None = None,
    ) -> None:
        """Take name, type, shape, doc string and metadata from ``like``."""
        super().__init__(like.dtype, like)
        self.file = file
        self.offset = offset
        self.field = field
        self.external = external or {}

    def open_reader(self) -> Reader:
        """A reader of the file's bytes."""
        return lambda start, out: self.file.read_into(self.offset + start, out, self.name)


class DerivedTensor(_LazyTensor):
    """A tensor that a kernel computes from another one, element by element.

    Attributes:
        source: The tensor it is computed from.
        kernel: How.
    """

    def __init__(self, source: ir.TensorProtocol, dtype: ir.DataType, kernel: Kernel) -> None:
        """Derive a tensor of the same shape, name and metadata with elements of ``dtype``."""
        if min(dtype.bitwidth, source.dtype.bitwidth) < 8:
            raise TypeError(f"{dtype} from {source.dtype}: packed elements cannot be derived")
        super().__init__(dtype, source)
        self.source = source
        self.kernel = kernel

    def open_reader(self) -> Reader:
        """A reader that computes what it is asked for."""
        read = reader(self.source)
        source_dtype = self.source.dtype.numpy()
        dtype = self.dtype.numpy()
        scratch = Scratch()

        def compute(offset: int, out: Bytes) -> None:
            start, count = offset // dtype.itemsize, out.nbytes // dtype.itemsize
            block = scratch.take(count * source_dtype.itemsize)
            read(start * source_dtype.itemsize, block)
            self.kernel(block.view(source_dtype), out.view(dtype), start)

        return compute


class Scratch(threading.local):
    """A buffer for each thread, used again for each block."""

    def __init__(self) -> None:
        """Start empty."""
        self._buffer = np.empty(0, np.uint8)

    def take(self, size: int) -> Bytes:
        """The first ``size`` bytes; what they hold is gone at the next call."""
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        return self._buffer[:size]


def reader(tensor: ir.TensorProtocol) -> Reader:
    """Open any tensor for reading in blocks; drop the reader to free what it holds.

    Raises:
        ModelError: The tensor does not hold as many bytes as its type and shape need.
    """
    if isinstance(tensor, _LazyTensor):
        return tensor.open_reader()
    if isinstance(tensor, ir.ExternalTensor):  # read, not mapped: mapped pages count as ours
        file, base = DataFile(Path(tensor.path).absolute()), tensor.offset or 0
        return lambda start, out: file.read_into(base + start, out)
    content = np.frombuffer(tensor.tobytes(), np.uint8)
    if len(content) != tensor.nbytes:
        raise ModelError(
            f"tensor {tensor.name!r}: holds {len(content)} bytes, but its shape needs"
            f" {tensor.nbytes}"
        )

    def copy(start: int, out: Bytes) -> None:
        out[:] = content[start : start + len(out)]

    return copy


def blocks(tensor: ir.TensorProtocol) -> list[tuple[int, int]]:
    """Byte ranges in which to read a tensor, each within ``BLOCK_BYTES`` of its source."""
    per_block = BLOCK_BYTES
    if isinstance(tensor, DerivedTensor):
        # Blocks end on elements, and those of the source fit into the cache as well.
        widest = max(tensor.dtype.itemsize, tensor.source.dtype.itemsize)
        per_block = int(BLOCK_BYTES // widest * tensor.dtype.itemsize)
    size = tensor.nbytes
    return [(start, min(start + per_block, size)) for start in range(0, size, per_block)]


def stream(tensor: ir.TensorProtocol) -> Iterator[Bytes]:
    """The bytes of a tensor in blocks; each block is overwritten by the next."""
    read = reader(tensor)
    buffer = np.empty(min(BLOCK_BYTES, tensor.nbytes), np.uint8)
    for start, stop in blocks(tensor):
        block = buffer[: stop - start]
        read(start, block)
        yield block


def root(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor that a derived one is computed from in the end; others are their own."""
    while isinstance(tensor, DerivedTensor):
        tensor = tensor.source
    return tensor


def sha256(tensor: ir.TensorProtocol) -> str:
    """SHA-256 of the bytes of a tensor, read block by block."""
    sha = hashlib.sha256()
    for block in stream(tensor):
        sha.update(block.data)
    return sha.hexdigest()


def identity(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for tensors that certainly have the same bytes, without reading them."""
    if isinstance(tensor, FileTensor):
        return tensor.file.path, tensor.offset, tensor.nbytes
    if isinstance(tensor, DerivedTensor):
        return identity(tensor.source), tensor.dtype, tensor.kernel
    return id(tensor)
