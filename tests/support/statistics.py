"""Statistics of models, for passes that read them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx

from onnxforge import laws, load
from onnxforge.calibrate import Options, calibrate
from onnxforge.compare.samples import Sample
from onnxforge.errors import DataError, Refused, RuntimeFailed
from onnxforge.numerics.calibration import Statistics
from onnxforge.stats_file import write_statistics
from onnxforge.testing import give
from support import fixtures

__all__ = ["STATS", "give", "of_fixture", "of_model", "placed", "taken"]

STATS = "STATS"
"""Stands for the file of a fixture in the text of a pass."""


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="statistics-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def taken(
    model: Path, samples: Iterable[Mapping[str, np.ndarray]], options: Options | None = None
) -> Statistics:
    """Statistics of a model on samples; none where it has nothing to watch or does not run."""
    named = [Sample(f"sample {i}", dict(sample)) for i, sample in enumerate(samples)]
    try:
        return calibrate(model, named, options)
    except (DataError, Refused, RuntimeFailed):
        return Statistics(laws.content(load(model, editable=False)), {})


@cache
def of_fixture(name: str) -> Path:
    """A file of the statistics of a fixture on its samples."""
    path = _folder() / f"{name}.safetensors"
    write_statistics(taken(fixtures.built(name), fixtures.samples(name)), path)
    return path


def of_model(
    model: onnx.ModelProto,
    samples: Iterable[Mapping[str, np.ndarray]],
    folder: Path,
    options: Options | None = None,
) -> Path:
    """A file of the statistics of a model on samples, which must be there."""
    source, path = folder / "watched.onnx", folder / "stats.safetensors"
    onnx.save(model, source)
    named = [Sample(f"sample {i}", dict(sample)) for i, sample in enumerate(samples)]
    write_statistics(calibrate(source, named, options), path)
    return path


def placed(text: str, name: str) -> str:
    """The text of a pass with the file of a fixture in it."""
    return text.replace(STATS, str(of_fixture(name))) if STATS in text else text
