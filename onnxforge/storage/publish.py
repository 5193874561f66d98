"""Putting a model and its data file in their places, so that a crash never mixes two pairs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["publish"]


def publish(
    model: Path,
    data: Path | None,
    write_model: Callable[[Path, str], None],
    write_data: Callable[[Path], None],
) -> None:
    """Write a model, and its data file if it has one, and move them to their places.

    Whatever the moment of a crash, the model found under its name has its own data: data go
    to a temporary name first; a model that points there is published; then the data get
    their name, which nothing refers to by then; then the model is published again.

    Args:
        model: Where the model goes.
        data: Where its data go, in the same folder.
        write_model: Writes the model to a path, for data in the file of the given name.
        write_data: Writes the data to a path.
    """
    token = secrets.token_hex(4)

    def temporary(target: Path, use: str) -> Path:
        return target.with_name(f".{target.name}.{token}.{use}")

    final = temporary(model, "tmp")
    if data is None:
        with _cleaned([final]):
            write_model(final, "")
            with _alone(model.parent):
                _replace(final, model)
        return
    interim, new_data, linked = (
        temporary(model, "interim"),
        temporary(data, "data"),
        temporary(data, "link"),
    )
    fresh, pointed = True, False
    try:
        # All is written before anything is replaced: the old files may be what is read.
        write_data(new_data)
        write_model(final, data.name)
        with _alone(model.parent):
            fresh = not (model.exists() or data.exists())
            if fresh:
                _replace(new_data, data)
            else:
                write_model(interim, new_data.name)
                pointed = True
                _replace(interim, model)
                _link(new_data, linked)
                _replace(linked, data)
            _replace(final, model)
    finally:
        # A rename may have happened although its flush failed or a signal came: look.
        unfinished = final.exists()
        in_use = unfinished and pointed and not interim.exists()
        if unfinished and fresh and not new_data.exists():
            data.unlink(missing_ok=True)
        for path in [final, interim, linked, *([] if in_use else [new_data])]:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other saves into this folder from publishing meanwhile."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _cleaned(paths: list[Path]) -> Iterator[None]:
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    source.replace(target)
    _flush_folder(target.parent)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links here
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames last; systems that cannot open a folder do not need it."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
