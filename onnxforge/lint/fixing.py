"""Mending what can be mended without a change of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxforge.bundle.describe import described
from onnxforge.bundle.documents import as_json
from onnxforge.bundle.tasks import hashed
from onnxforge.errors import OnnxforgeError
from onnxforge.lint.bundle import MANIFEST, METADATA, told_graphs
from onnxforge.manager import PassManager
from onnxforge.model_io import files, load
from onnxforge.storage.whole import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxforge.lint.finding import Report

__all__ = ["fix"]


def fix(report: Report) -> tuple[dict[str, str], list[str]]:
    """Run the pipelines that findings name, each file in its place, whole or not at all.

    Where manifest.json and metadata.json of a bundle told the truth of a file, they do so
    afterwards; what they told wrongly stays a finding.

    Args:
        report: What was found.

    Returns:
        What was run, by file, and what could not be mended and why.
    """
    wanted: dict[str, dict[str, None]] = {}
    for finding in report.findings:
        if finding.passes is not None:
            wanted.setdefault(finding.path, {})[finding.passes] = None
    done: dict[str, list[str]] = {}
    notes: list[str] = []
    waiting = [(path, list(steps)) for path, steps in wanted.items()]
    while waiting:
        path, steps = waiting.pop(0)
        try:
            told = _mended(path, ",".join(filter(None, steps)))
        except OnnxforgeError as error:
            if len(steps) == 1:
                notes.append(f"not mended: {error}")
            else:  # what refuses the model holds up no other
                waiting += [(path, [step]) for step in steps]
            continue
        for file, what in told.items():
            done.setdefault(file, []).append(what)
    return {file: ",".join(dict.fromkeys(what)) for file, what in done.items()}, notes


def _mended(path: str, passes: str) -> dict[str, str]:
    """Run a pipeline on a file in its place; what was done, by file."""
    listed = _Listed.find(Path(path))
    PassManager(passes or ()).run(Path(path), Path(path), force=True)
    done = {path: passes or "being written anew"}
    if listed is not None:
        listed.renew()
        done[str(listed.folder / MANIFEST)] = "the hashes of what was mended"
    return done


class _Listed:
    """A model of which a bundle tells the truth.

    Attributes:
        folder: That of the bundle.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        self._model = model
        self._name = model.relative_to(folder).as_posix()
        self._names, self._said = self._look()

    @classmethod
    def find(cls, model: Path) -> _Listed | None:
        """What tells of a model; None without manifest.json, or if that is not true."""
        model = model.absolute()
        listing = (each for each in model.parents if (each / MANIFEST).is_file())
        if (folder := next(listing, None)) is None:
            return None
        found, listed = cls(model, folder), _read(folder / MANIFEST).get("files")
        for name in found._names:
            said = listed.get(name) if isinstance(listed, dict) else None
            if not isinstance(said, dict) or said != hashed(folder / name, md5="md5" in said):
                return None
        return found

    def _look(self) -> tuple[set[str], dict[str, Any]]:
        """The files of the model, as the bundle names them, and what metadata should say."""
        model, root = load(self._model, editable=False), self.folder.resolve()
        found = [file.resolve() for file in files(model)]
        inside = {file.relative_to(root).as_posix() for file in found if root in file.parents}
        names = {self._name, *inside}
        return names, {
            **described(model),
            "data": sorted(names - {self._name}),
            "bytes": sum((self.folder / name).stat().st_size for name in names),
        }

    def renew(self) -> None:
        """Tell of the model as it is now."""
        manifest = _read(self.folder / MANIFEST)
        now, facts = self._look()
        listed, names = manifest["files"], now | self._names
        if self._tell_metadata(facts) and METADATA in listed:
            names.add(METADATA)
        md5 = "md5" in listed[self._name]
        for name in names:
            listed.pop(name, None)
            if (self.folder / name).is_file():
                listed[name] = hashed(self.folder / name, md5=md5)
        manifest["files"] = dict(sorted(listed.items()))
        write_text(self.folder / MANIFEST, as_json(manifest))

    def _tell_metadata(self, now: Mapping[str, Any]) -> bool:
        """Write what changed of the model into metadata.json; whether something did."""
        metadata, changed = _read(self.folder / METADATA), False
        for _, graph in told_graphs(metadata):
            if graph.get("model") == self._name:
                true = {key: now[key] for key in now if graph.get(key) == self._said[key]}
                changed = changed or graph != graph | true
                graph |= true
        if changed:
            write_text(self.folder / METADATA, as_json(metadata))
        return changed


def _read(path: Path) -> dict[str, Any]:
    """A file of the bundle; empty if it is not in the form of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(found, dict) and found.get("schema") == 1
    return found if is_ours else {}
