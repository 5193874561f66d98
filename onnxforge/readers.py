"""Which models in a folder read which data files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.errors import ModelError
from onnxforge.model_io import read_skeleton
from onnxforge.walk import proto_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["data_of", "readers"]


def readers(folder: Path, but: Iterable[Path] = ()) -> dict[Path, Path]:
    """For each data file that models in a folder read, one of them.

    Only files called ``.onnx`` are looked at.

    Args:
        folder: The folder.
        but: Models to leave out.
    """
    left_out = {path.resolve() for path in but if path.exists()}
    models = (path for path in folder.iterdir() if path.suffix.lower() == ".onnx")
    return {
        data: model
        for model in sorted(models)
        if model.resolve() not in left_out
        for data in data_of(model)
    }


def data_of(model: Path) -> set[Path]:
    """The data files of a model, links resolved; none if it is no model."""
    try:
        proto, _, location = read_skeleton(model)
    except ModelError:
        return set()
    entries = (entry for tensor in proto_tensors(proto) for entry in tensor.external_data)
    found = set()
    for place in {e.value for e in entries if e.key == "location"} - {location}:
        try:
            found.add((model.parent / place).resolve())
        except (OSError, ValueError, RuntimeError):  # no name that a file can have
            continue
    return found
