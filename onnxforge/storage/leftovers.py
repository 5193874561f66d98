"""Temporary files, and what is left of them when a process is killed."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: nobody can say whose a temporary file is
    fcntl = None

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

__all__ = ["claimed", "fcntl", "remove_abandoned", "temporary"]

_LOCK = re.compile(r"\.onnxforge\.([0-9a-f]{8})\.lock")
_USES = ("tmp", "interim", "data", "copy", "old")


def temporary(target: Path, token: str, use: str) -> Path:
    """The name of a temporary file for ``target``, by a process that owns ``token``."""
    assert use in _USES
    return target.with_name(f".{target.name}.{token}.{use}")


@contextlib.contextmanager
def claimed(folder: Path, token: str) -> Iterator[None]:
    """Own the temporary files of a token; a lock shows others that they are in use."""
    if fcntl is None:
        yield
        return
    path = _lock(folder, token)
    fd = _locked(path)
    try:
        yield
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        # Before it was locked, somebody may have taken it for abandoned.
        if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
        os.close(fd)


def remove_abandoned(
    folder: Path, bases: Iterable[str], in_use: Callable[[], Collection[Path]]
) -> None:
    """Remove temporary files of saves whose process is no more.

    Args:
        folder: Where they are.
        bases: Names of the models whose saves are meant, in whatever layout.
        in_use: Tells which files are kept all the same; asked only if there are any.
    """
    names = "|".join(re.escape(base) for base in bases)
    layouts, uses = r"_data|\.data\.\d+|\.sha256", "|".join(_USES)
    pattern = re.compile(rf"\.(?:{names})(?:{layouts})?\.([0-9a-f]{{8}})\.(?:{uses})")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in folder.iterdir():
        if match := pattern.fullmatch(path.name) or _LOCK.fullmatch(path.name):
            found[match[1]].append(path)
    for token, paths in found.items():
        with _owned(_lock(folder, token)) as owned:
            kept = in_use() if owned else paths
            for path in [path for path in paths if path not in kept]:
                path.unlink(missing_ok=True)


def _lock(folder: Path, token: str) -> Path:
    return folder / f".onnxforge.{token}.lock"


@contextlib.contextmanager
def _owned(lock: Path) -> Iterator[bool]:
    """Take over from a process that is no more; false if it is there, or nobody can say."""
    if fcntl is None:
        yield False
        return
    try:
        fd = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        yield True
        return
    except OSError:  # somebody else's
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(fd)
