"""What the commands have in common."""

from __future__ import annotations

from pathlib import Path

import click

from onnxforge.errors import OnnxforgeError

__all__ = ["FORMAT", "PATH", "writable", "write_text"]

PATH = click.Path(path_type=Path, readable=False)  # we say ourselves what is wrong with it
FORMAT = click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What to print on stdout.",
)


def writable(
    context: click.Context, option: click.Parameter, path: Path | None
) -> Path | None:
    """Refuse a file that cannot be written before the work is done, not after."""
    if path is not None and path.is_dir():
        raise OnnxforgeError(f"{path}: is a folder")
    if path is not None and not path.parent.is_dir():
        raise OnnxforgeError(f"{path.parent}: no such folder")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, or leave what is there."""
    new = path.parent / f".{path.name}.tmp"
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OnnxforgeError(f"{path}: {error.strerror}") from None
