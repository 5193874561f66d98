"""What a build knows from before: hashes of files, and what it made of what."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from onnxforge.errors import DataError, OnnxforgeError, from_system
from onnxforge.storage.leftovers import fcntl
from onnxforge.storage.whole import digest, write_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

__all__ = ["State", "fingerprint", "opened"]

_VERSION = 2  # an older or newer one is not read


def fingerprint(content: Any) -> str:
    """The SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class State:
    """What is kept between builds, in one file that is written whole after each step.

    Attributes:
        folder: Where it is, and what is made before it has its place.
        sources: Files of each source, by graph.
        statistics: Statistics that were taken, by graph.
        golden: Golden values that were written, by graph.
        staged: What is made and not in its place yet, by unit.
        published: What is in its place, by unit.
        extras: Files that all tiers share, by path in the bundle.
        md5: The MD5 of files by their SHA-256.
        claims: All that was ever put, or about to be put, into the bundle, by path in it.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is there, or begin afresh."""
        self.folder = folder
        self._path = folder / "state"
        self._text = _read(self._path)
        content = json.loads(self._text) if self._text else {}
        if content.get("version") != _VERSION:
            content = {}
        self._hashes: dict[str, list[Any]] = content.get("hashes", {})
        self._parts: dict[str, dict[str, Any]] = content.get("parts", {})
        self._output: str | None = content.get("output")
        self.sources = self._part("sources")
        self.statistics = self._part("statistics")
        self.golden = self._part("golden")
        self.staged = self._part("staged")
        self.published = self._part("published")
        self.extras = self._part("extras")
        self.md5 = self._part("md5")
        self.claims = self._part("claims")

    def begin(self, output: Path) -> None:
        """Forget what is in the bundle, if that was in another folder."""
        place = os.path.relpath(output, self.folder)  # all of it may be moved together
        if self._output != place:
            for part in (self.golden, self.published, self.extras, self.claims):
                part.clear()
            self._output = place

    def _part(self, name: str) -> dict[str, Any]:
        return self._parts.setdefault(name, {})

    def save(self) -> None:
        """Write it, if there is something new."""
        content = {"output": self._output, "hashes": self._hashes, "parts": self._parts}
        text = json.dumps({"version": _VERSION, **content}, indent=1)
        if text != self._text:
            sha = hashlib.sha256(text.encode()).hexdigest()
            write_text(self._path, f"{sha}\n{text}")
            self._text = text

    def hashes(self, paths: Iterable[Path]) -> list[str]:
        """The SHA-256 of files; a file of the same size, time and inode is not read again.

        Raises:
            DataError: A file cannot be read.
        """
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.sha256, paths))

    def sha256(self, path: Path) -> str:
        """The SHA-256 of one file."""
        stamp = _stamp(path)
        known = self._hashes.get(str(path.absolute()))
        if known is not None and known[:3] == stamp:
            return str(known[3])
        found = digest(path)
        if _stamp(path) != stamp:
            raise DataError(f"{path}: changed while it was read")
        self._hashes[str(path.absolute())] = [*stamp, found]
        return found

    def know(self, path: Path, sha256: str) -> None:
        """Note the hash of a file that was just written or moved."""
        self._hashes[str(path.absolute())] = [*_stamp(path), sha256]

    def holds(self, path: Path, sha256: str) -> bool:
        """Whether a file is there and has this hash."""
        return path.is_file() and self.sha256(path) == sha256

    def clear(self, kept: Collection[str]) -> None:
        """Remove what is in the folder beside the state and files of some names."""
        for path in self.folder.iterdir():
            if path.name not in {"lock", self._path.name, *kept}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def forget_missing(self) -> None:
        """Forget the hashes of files that are gone."""
        gone = [path for path in self._hashes if not os.path.lexists(path)]
        for path in gone:
            del self._hashes[path]


def _read(path: Path) -> str:
    """What was written; nothing if it is damaged."""
    try:
        sha, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return ""
    return text if hashlib.sha256(text.encode()).hexdigest() == sha else ""


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[State]:
    """The state in a folder, which no other build uses meanwhile.

    Raises:
        OnnxforgeError: Another one does, or the folder cannot be made.
    """
    with from_system():
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        if fcntl is not None:
            _lock(fd, folder)
        yield State(folder)
    finally:
        os.close(fd)


def _lock(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OnnxforgeError(f"{folder}: another build is at work here") from None
    except OSError:  # a file system without locks
        return
