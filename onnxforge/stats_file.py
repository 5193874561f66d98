"""Statistics of activations as a file of safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxforge import laws
from onnxforge.errors import DataError, OnnxforgeError, Refused
from onnxforge.numerics.calibration import ActivationStats, Statistics
from onnxforge.numerics.histogram import BINS, Histogram

__all__ = ["Known", "read_statistics", "write_statistics"]

_FORMAT = "onnxforge statistics 1"
_ARRAYS = {
    "low": np.float32,
    "high": np.float32,
    "counts": np.int64,
    "keys": np.uint64,
    "rows": np.float32,
}


@dataclass(frozen=True)
class Known:
    """Statistics that a pass was given.

    Attributes:
        path: The file.
        sha256: Of the file.
        statistics: What is in it.
    """

    path: Path
    sha256: str
    statistics: Statistics

    @classmethod
    def read(cls, path: Path) -> Known:
        """Read a file; see `read_statistics`."""
        statistics = read_statistics(path)
        return cls(path, hashlib.sha256(path.read_bytes()).hexdigest(), statistics)

    def refuse_other(self, model: ir.Model) -> None:
        """Refuse a model that the statistics are not of.

        Raises:
            Refused: Its graph or weights are others.
        """
        if laws.content(model) != self.statistics.digest:
            raise Refused(f"{self.path}: the statistics are of another model")


def write_statistics(statistics: Statistics, path: Path) -> None:
    """Write statistics; equal ones give equal bytes. What was there before is replaced whole.

    Args:
        statistics: What to write.
        path: The file.

    Raises:
        OnnxforgeError: safetensors is missing, or the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {"samples": _keys(sorted(statistics.samples))}
    told = []
    for i, (name, stats) in enumerate(sorted(statistics.activations.items())):
        values = [stats.low, stats.high, stats.histogram.counts, stats.keys, stats.rows]
        for word, array in zip(_ARRAYS, values, strict=True):
            arrays[f"{i:05}.{word}"] = np.ascontiguousarray(array)
        told.append(
            {
                "name": name,
                "channel_axis": stats.channel_axis,
                "count": stats.count,
                "exponent": stats.histogram.exponent,
                "limit": stats.limit,
            }
        )
    # One entry: safetensors writes several in any order.
    about = {"format": _FORMAT, "digest": statistics.digest, "activations": told}
    metadata = {"onnxforge": json.dumps(about)}
    content: bytes = _library().save(arrays, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OnnxforgeError(f"{path}: {error.strerror}") from None


def read_statistics(path: Path) -> Statistics:
    """Read statistics.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be read, or holds something else.
        OnnxforgeError: safetensors is missing.
    """
    library = _library()
    try:
        with library.safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get("onnxforge", "{}"))
            if about.get("format") != _FORMAT:
                raise DataError(f"{path}: holds no statistics that this version knows")
            told = about["activations"]
            samples = {int(key) for key in file.get_tensor("samples")}
            activations = {one["name"]: _read(file, i, one) for i, one in enumerate(told)}
            return Statistics(about["digest"], activations, samples)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (library.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged statistics: {error}") from None


def _read(file: Any, number: int, told: dict[str, Any]) -> ActivationStats:
    arrays = {word: file.get_tensor(f"{number:05}.{word}") for word in _ARRAYS}
    for word, dtype in _ARRAYS.items():
        if arrays[word].dtype != dtype:
            raise ValueError(f"{word} of {told['name']!r} is {arrays[word].dtype}")
    low, high, counts, keys, rows = arrays.values()
    fits = low.ndim == 1 and low.shape == high.shape and counts.shape == (2 * BINS,)
    if not fits or rows.shape != (*keys.shape, *low.shape):
        raise ValueError(f"shapes of {told['name']!r} disagree")
    return ActivationStats(
        int(told["channel_axis"]),
        low,
        high,
        int(told["count"]),
        Histogram(int(told["exponent"]), counts),
        keys,
        rows,
        int(told["limit"]),
    )


def _keys(keys: list[int]) -> np.ndarray:
    return np.array(keys, np.uint64)


def _library() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise OnnxforgeError(
            "safetensors is missing: pip install 'onnxforge[calibrate]'"
        ) from None

    class Library:
        save = staticmethod(safetensors.numpy.save)
        safe_open = staticmethod(safetensors.safe_open)
        SafetensorError = safetensors.SafetensorError

    return Library
