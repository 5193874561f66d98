"""Moving what was made, and judged, to its place in the bundle."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from onnxforge.errors import from_system
from onnxforge.readers import readers
from onnxforge.skeleton import set_external
from onnxforge.storage.leftovers import remove_abandoned
from onnxforge.storage.publish import publish
from onnxforge.storage.whole import copy_file
from onnxforge.walk import proto_tensors

__all__ = ["move_file", "move_models"]


def move_models(
    staged: Path, folder: Path, models: Sequence[str], data: Sequence[str]
) -> None:
    """Move models and the data files they read, so that a crash never mixes old and new.

    Args:
        staged: The folder they are in.
        folder: The folder they go to.
        models: Names of the models.
        data: Names of their data files.

    Raises:
        OnnxforgeError: A file cannot be moved.
    """

    def write_model(number: int, to: Path, names: Sequence[str]) -> None:
        source = staged / models[number]
        if list(names) == list(data):
            copy_file(source, to) if data else _move(source, to)
        else:
            _point(source, to, dict(zip(data, names, strict=True)))

    def write_data(number: int, to: Path) -> None:
        _move(staged / data[number], to)

    targets = [folder / name for name in models], [folder / name for name in data]
    with from_system():
        folder.mkdir(parents=True, exist_ok=True)
        publish(*targets, write_model, write_data)
        remove_abandoned(folder, models, lambda: readers(folder))


def _point(source: Path, to: Path, names: Mapping[str, str]) -> None:
    """Write a model that reads data files of other names, for the time of a few renames."""
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto_tensors(proto):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") in names:
            set_external(tensor, entries | {"location": names[entries["location"]]})
    to.write_bytes(proto.SerializeToString())


def move_file(source: Path, target: Path, *, link: bool = False, keep: bool = True) -> None:
    """Put a file into its place, whole.

    Args:
        source: The file.
        target: Where it goes.
        link: Give it a second name where the file system can.
        keep: Leave it where it was.

    Raises:
        OnnxforgeError: It cannot be moved.
    """
    new = target.with_name(f".{target.name}.tmp")
    with from_system():
        target.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        try:
            if not keep:
                _move(source, new)
            elif not (link and _linked(source, new)):
                copy_file(source, new)
            new.replace(target)
        finally:  # rename does nothing where both are names of one file
            new.unlink(missing_ok=True)


def _move(source: Path, to: Path) -> None:
    try:
        source.replace(to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_file(source, to)  # to another disk


def _linked(source: Path, new: Path) -> bool:
    try:
        os.link(source, new)
    except OSError:  # another disk, or a file system without links
        return False
    return True
