"""Files as a whole: written or left as they are, copied, and hashed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from functools import partial
from typing import TYPE_CHECKING

from onnxforge.errors import DataError, OnnxforgeError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["copy_file", "digest", "write_bytes", "write_text"]

_BLOCK = 1 << 20


def digest(path: Path, algorithm: str = "sha256") -> str:
    """The hash of a file, read block by block.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            new = partial(hashlib.new, algorithm, usedforsecurity=False)
            return hashlib.file_digest(file, new).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to a name that is free, readable for all, and make it last."""
    with source.open("rb", buffering=0) as reader, target.open("xb") as writer:
        target.chmod(0o644)
        with contextlib.suppress(AttributeError, OSError):
            # Inside the kernel, which shares the blocks where the file system can.
            while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
                pass
        shutil.copyfileobj(reader, writer, _BLOCK)  # what it left, perhaps all
        writer.flush()
        os.fsync(writer.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole, or leave what is there.

    What a killed process left of it is overwritten by the next one, and gone then.

    Raises:
        OnnxforgeError: It cannot be written.
    """
    new = path.parent / f".{path.name}.tmp"
    try:
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        raise OnnxforgeError(f"{path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does.

    Raises:
        OnnxforgeError: It cannot be written.
    """
    write_bytes(path, text.encode())
