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
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["abandoned", "claimed", "fcntl", "temporary"]

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


def abandoned(targets: Sequence[Path]) -> list[Path]:
    """Temporary files for these targets whose process is no more."""
    folder = targets[0].parent
    names = "|".join(re.escape(target.name) for target in targets)
    pattern = re.compile(rf"\.(?:{names})\.([0-9a-f]{{8}})\.(?:{'|'.join(_USES)})")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name) or _LOCK.fullmatch(path.name)
        if match:
            found[match[1]].append(path)
    dead = [token for token in found if not _is_owned(_lock(folder, token))]
    return [path for token in dead for path in found[token]]


def _lock(folder: Path, token: str) -> Path:
    return folder / f".onnxforge.{token}.lock"


def _is_owned(lock: Path) -> bool:
    if fcntl is None:
        return True
    try:
        fd = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # somebody else's
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
