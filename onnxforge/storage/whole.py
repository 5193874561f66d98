"""Small files, written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxforge.errors import OnnxforgeError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, or leave what is there.

    Raises:
        OnnxforgeError: It cannot be written.
    """
    new = path.parent / f".{path.name}.tmp"
    try:
        new.write_text(text, encoding="utf-8", newline="\n")
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OnnxforgeError(f"{path}: {error.strerror}") from None
