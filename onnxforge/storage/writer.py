"""Writing a file from literal bytes and tensors, in blocks, on several threads."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxforge.lazy import BLOCK_BYTES, FileTensor, Reader, blocks, reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = ["Part", "default_workers", "write_file"]

_COPY_BYTES = 64 << 20
_FLUSH_BYTES = 128 << 20
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class Part:
    """What stands at one place of a file.

    Attributes:
        offset: First byte.
        content: Literal bytes or a tensor.
    """

    offset: int
    content: bytes | ir.TensorProtocol


def default_workers() -> int:
    """Threads that write: more do not help, the disk is the limit."""
    return min(4, os.cpu_count() or 1)


class _Output:
    """A new file that many threads write at once."""

    def __init__(self, path: Path, size: int) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        self.fd = os.open(path, flags, 0o644)
        self._lock = threading.Lock()
        self._kernel_copy = hasattr(os, "copy_file_range")
        if hasattr(os, "fchmod"):
            os.fchmod(self.fd, 0o644)  # whatever the umask: a bundle is there to be read
        self._reserve(size)

    def _reserve(self, size: int) -> None:
        """Take the room at once: a full disk is noticed before the work, not after."""
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self.fd, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(self.fd, size)

    def write_at(self, offset: int, content: memoryview) -> None:
        while content:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self.fd, content, offset)
            else:
                with self._lock:
                    os.lseek(self.fd, offset, os.SEEK_SET)
                    count = os.write(self.fd, content)
            content, offset = content[count:], offset + count

    def copy(self, tensor: FileTensor, start: int, stop: int, offset: int) -> bool:
        """Copy inside the kernel; False where the system cannot."""
        if not self._kernel_copy:
            return False
        with tensor.file.open(tensor.name) as file:
            source, at = tensor.offset + start, offset
            while at < offset + stop - start:
                count = self._copy_some(file.fileno(), source, at, offset + stop - start - at)
                if not count:  # a plain copy works, or tells what is wrong
                    return False
                source, at = source + count, at + count
        return True

    def _copy_some(self, fd: int, source: int, target: int, size: int) -> int:
        try:
            return os.copy_file_range(fd, self.fd, size, source, target)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            self._kernel_copy = False
            return 0


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.block = np.empty(BLOCK_BYTES, np.uint8)


class _Job:
    """The writing of one file: hands blocks to a pool, never many at a time."""

    def __init__(
        self, output: _Output, workers: int, progress: Callable[[int], None] | None
    ) -> None:
        self.output = output
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="onnxforge-write")
        self.slots = threading.BoundedSemaphore(4 * workers)
        self.buffers = _Buffers()
        self.progress = progress
        self.failed: BaseException | None = None
        self.flusher = ThreadPoolExecutor(1, thread_name_prefix="onnxforge-flush")
        self.flushes: list[Future[None]] = []
        self.unflushed = 0

    def run(self, parts: Iterable[Part]) -> None:
        try:
            for part in parts:
                if isinstance(part.content, bytes):
                    self.output.write_at(part.offset, memoryview(part.content))
                else:
                    self._tensor(part.content, part.offset)
        except BaseException as error:
            self.failed = error  # threads notice no signal themselves
            raise
        finally:
            self.pool.shutdown(wait=True)
            self.flusher.shutdown(wait=True)
        for flush in self.flushes:
            flush.result()  # the system reports a failed write once only
        if self.failed is not None:
            raise self.failed

    def _tensor(self, tensor: ir.TensorProtocol, offset: int) -> None:
        if isinstance(tensor, FileTensor) and tensor.nbytes >= BLOCK_BYTES:
            for start in range(0, tensor.nbytes, _COPY_BYTES):
                stop = min(start + _COPY_BYTES, tensor.nbytes)
                self._submit(self._copy, tensor, start, stop, offset + start)
            return
        read = reader(tensor)
        for start, stop in blocks(tensor):
            self._submit(self._block, read, start, stop, offset + start)

    def _submit(self, work: Callable[..., None], *arguments: object) -> None:
        self.slots.acquire()
        if self.failed is not None:
            self.slots.release()
            raise self.failed
        self.pool.submit(work, *arguments).add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        if (error := future.exception()) is not None and self.failed is None:
            self.failed = error
        self.slots.release()

    def _copy(self, tensor: FileTensor, start: int, stop: int, offset: int) -> None:
        if self.failed is not None:
            return
        if self.output.copy(tensor, start, stop, offset):
            self._count(stop - start)
            return
        read = reader(tensor)
        for at in range(start, stop, BLOCK_BYTES):
            end = min(at + BLOCK_BYTES, stop)
            self._block(read, at, end, offset + at - start)

    def _block(self, read: Reader, start: int, stop: int, offset: int) -> None:
        if self.failed is not None:
            return
        block = self.buffers.block[: stop - start]
        read(start, block)
        self.output.write_at(offset, block.data)
        self._count(stop - start)

    def _count(self, written: int) -> None:
        if self.progress is not None:
            self.progress(written)
        # The disk works while we compute, so that the flush at the end has little to do.
        self.unflushed += written
        idle = not self.flushes or self.flushes[-1].done()
        if self.unflushed >= _FLUSH_BYTES and idle and hasattr(os, "fdatasync"):
            self.unflushed = 0
            self.flushes.append(self.flusher.submit(os.fdatasync, self.output.fd))


def write_file(
    path: Path,
    parts: Sequence[Part],
    size: int,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a new file and flush it to the disk.

    Every tensor is evaluated once, in blocks; what no part covers is zero.

    Args:
        path: The file; it must not exist.
        parts: What to write where.
        size: Size of the file in bytes.
        workers: Number of threads.
        progress: Called with the number of tensor bytes after each block, on any thread.

    Raises:
        OSError: The file cannot be written; what there is of it is left to the caller.
    """
    output = _Output(path, size)
    try:
        _Job(output, workers or default_workers(), progress).run(parts)
        os.fsync(output.fd)
    finally:
        os.close(output.fd)
