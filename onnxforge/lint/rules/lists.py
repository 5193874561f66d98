"""The list of hashes of a bundle: manifest.json, and lists that sha256sum reads."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxforge.lint.bundle import MANIFEST
from onnxforge.lint.files import is_path
from onnxforge.lint.finding import Problem, Rule
from onnxforge.storage.whole import digest

if TYPE_CHECKING:
    from pathlib import Path

    from onnxforge.lint.bundle import Bundle
    from onnxforge.lint.config import Options

__all__ = ["RULES"]

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_HEX = {"sha256": re.compile("[0-9a-f]{64}"), "md5": re.compile("[0-9a-f]{32}")}
_READERS = 8


@dataclass(frozen=True)
class _Entry:
    """What a list says of a file.

    Attributes:
        listed: The list.
        name: The file.
        size: Its size in bytes, if the list gives it.
        hashes: Its hashes, by algorithm.
    """

    listed: str
    name: str
    size: int | None
    hashes: Mapping[str, str]


def manifest_malformed(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """manifest.json, or a list of SHA-256, is not in its form.

    What it does:
        Reads manifest.json as `onnxforge build` writes it, and files like `encoder.sha256`
        line by line. Paths have to be relative and to stay in the folder.

    Why it is bad:
        Nobody can check a download.

    Example:
        `files.'int8/encoder.onnx'.sha256 is no SHA-256`

    How to mend:
        Write it again: `onnxforge build`, or `sha256sum * > SHA256SUMS`.

    Fix:
        None.
    """
    for text in _faults(bundle.manifest):
        yield Problem(text, file=MANIFEST)
    for name, lines in bundle.sums.items():
        full = ((i, line) for i, line in enumerate(lines, 1) if line.strip())
        wrong = [i for i, line in full if not _LINE.fullmatch(line)]
        if wrong:
            yield Problem(f"line {wrong[0]} is no line of sha256sum", file=name)


def listed_file_missing(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A file in a list of hashes is not there.

    What it does:
        Looks for each file that manifest.json or a list of SHA-256 names.

    Why it is bad:
        The upload is not complete, or the list is old.

    Example:
        `int8/encoder.onnx_data is not there`

    How to mend:
        Put the file back, or write the list again.

    Fix:
        None.
    """
    for entry in _entries(bundle):
        if bundle.files.size(entry.name) is None:
            yield Problem(f"{entry.name} is not there", file=entry.listed)


def size_differs(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A file has another size than manifest.json says.

    What it does:
        Compares sizes; no file is read.

    Why it is bad:
        The file was changed after the list was written, or a transfer broke off.

    Example:
        `4,096 bytes, manifest.json says 8,192`

    How to mend:
        Fetch the file again, or write the list again: `onnxforge build`.

    Fix:
        None.
    """
    for entry in _entries(bundle):
        size = bundle.files.size(entry.name)
        if size is not None and entry.size not in (None, size):
            text = f"{size:,} bytes, {entry.listed} says {entry.size:,}"
            yield Problem(text, file=entry.name)


def unlisted_file(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A file of the bundle is not in manifest.json.

    What it does:
        Compares the files that are there with those that the list names. Hidden files are
        nobody's, and README.md in the folder itself is written by people.

    Why it is bad:
        It is published and nobody can check it; mostly it is there by accident.

    Example:
        `int8/encoder_old.onnx`

    How to mend:
        Remove it, or name it in the recipe and build again.

    Fix:
        None.
    """
    listed = {entry.name for entry in _entries(bundle) if entry.listed == MANIFEST}
    if listed:
        for name in bundle.files.names:
            if name not in listed and name not in (MANIFEST, "README.md"):
                yield Problem(f"is not in {MANIFEST}", file=name)


def hash_differs(bundle: Bundle, options: Options) -> Iterator[Problem]:
    """A file has other content than a list of hashes says.

    What it does:
        Reads every file that manifest.json or a list of SHA-256 names, several at once and in
        blocks. Left out with `--no-hash` and over http.

    Why it is bad:
        The file is damaged, was changed, or is not the one that was published.

    Example:
        `SHA-256 is 9f86d081..., manifest.json says 2c26b46b...`

    How to mend:
        Fetch the file again, or write the list again: `onnxforge build`.

    Fix:
        None.
    """
    work = []
    for entry in _entries(bundle):
        path, size = bundle.files.local(entry.name), bundle.files.size(entry.name)
        if path is not None and size is not None and entry.size in (None, size):
            work.append((entry, path))
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        for (entry, _), found in zip(work, pool.map(_hashes, work), strict=True):
            for kind in [kind for kind in found if found[kind] != entry.hashes[kind]]:
                said = f"{entry.listed} says {entry.hashes[kind][:12]}..."
                yield Problem(f"{kind} is {found[kind][:12]}..., {said}", file=entry.name)


def _hashes(work: tuple[_Entry, Path]) -> dict[str, str]:
    entry, path = work
    return {kind: digest(path, kind) for kind in entry.hashes}


def _entries(bundle: Bundle) -> Iterator[_Entry]:
    """All files that lists name."""
    manifest = bundle.manifest
    files = manifest.get("files") if isinstance(manifest, dict) else None
    for name, said in files.items() if isinstance(files, dict) else ():
        if is_path(name) and isinstance(said, dict) and not list(_faults_of(name, said)):
            hashes = {kind: said[kind] for kind in _HEX if kind in said}
            yield _Entry(MANIFEST, name, said["bytes"], hashes)
    for listed, lines in bundle.sums.items():
        for match in filter(None, map(_LINE.fullmatch, lines)):
            if is_path(match[2]):
                name = posixpath.join(posixpath.dirname(listed), match[2])
                yield _Entry(listed, name, None, {"sha256": match[1].lower()})


def _faults(manifest: object) -> Iterator[str]:
    """What is wrong with manifest.json."""
    if manifest is None:
        return
    if isinstance(manifest, str):
        yield manifest
        return
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or manifest.get("schema") != 1:
        yield "schema is not 1"
    elif not isinstance(files, dict):
        yield "files is not a table"
    else:
        for name, said in files.items():
            if not is_path(name):
                yield f"{name!r} is no path in the folder"
            else:
                yield from _faults_of(name, said)


def _faults_of(name: str, said: object) -> Iterator[str]:
    if not isinstance(said, dict):
        yield f"files.{name!r} is not a table"
        return
    size = said.get("bytes")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        yield f"files.{name!r}.bytes is no size"
    if "sha256" not in said:
        yield f"files.{name!r} has no sha256"
    for kind, form in _HEX.items():
        value = said.get(kind)
        if kind in said and not (isinstance(value, str) and form.fullmatch(value)):
            yield f"files.{name!r}.{kind} is no {kind}"


RULES = (
    Rule("OF480", "manifest-malformed", "error", manifest_malformed, of="bundle"),
    Rule("OF481", "listed-file-missing", "error", listed_file_missing, of="bundle"),
    Rule("OF482", "size-differs", "error", size_differs, of="bundle"),
    Rule("OF483", "unlisted-file", "warning", unlisted_file, of="bundle"),
    Rule("OF484", "hash-differs", "error", hash_differs, of="bundle", reads=True),
)
