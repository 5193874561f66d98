"""Statistics of activations as a file of safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxforge import laws
from onnxforge.errors import DataError, OnnxforgeError, Refused
from onnxforge.numerics.calibration import PARTS, ActivationStats, Statistics
from onnxforge.numerics.histogram import BINS, Histogram, exponent_for
from onnxforge.storage.whole import write_bytes

__all__ = ["Known", "read_statistics", "write_statistics"]

_DAMAGE = (KeyError, TypeError, ValueError, RecursionError)
_FORMAT = "onnxforge statistics 1"
_ARRAYS = {
    "lows": np.float32,
    "highs": np.float32,
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
        values = [stats.lows, stats.highs, stats.histogram.counts, stats.keys, stats.rows]
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
    write_bytes(path, _library().save(arrays, metadata))


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
            if not isinstance(about, dict) or about.get("format") != _FORMAT:
                raise DataError(f"{path}: holds no statistics that this version knows")
            told = about["activations"]
            samples = set(map(int, _array(file, "samples", np.uint64)))
            activations = {one["name"]: _read(file, i, one) for i, one in enumerate(told)}
            if len(activations) < len(told):
                raise ValueError("two activations have one name")
            return Statistics(str(about["digest"]), activations, samples)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (library.SafetensorError, *_DAMAGE) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path}: damaged statistics: {why}") from None


def _read(file: Any, number: int, told: dict[str, Any]) -> ActivationStats:
    lows, highs, counts, keys, rows = (
        _array(file, f"{number:05}.{word}", dtype) for word, dtype in _ARRAYS.items()
    )
    found = ActivationStats(
        _number(told, "channel_axis"),
        lows,
        highs,
        _number(told, "count"),
        Histogram(_number(told, "exponent"), counts),
        keys,
        rows,
        _number(told, "limit"),
    )
    if not isinstance(told["name"], str) or not _is_sound(found):
        raise ValueError(f"what is told of {told['name']!r} does not go together")
    return found


def _array(file: Any, name: str, dtype: Any) -> np.ndarray:
    found: np.ndarray = file.get_tensor(name)
    if found.dtype != dtype:
        raise ValueError(f"{name} is {found.dtype}")
    return found


def _number(told: dict[str, Any], word: str) -> int:
    if type(told[word]) is not int:
        raise ValueError(f"{word} is {told[word]!r}")
    return int(told[word])


def _is_sound(stats: ActivationStats) -> bool:
    """Whether all parts are of one activation."""
    lows, highs, counts, keys = stats.lows, stats.highs, stats.histogram.counts, stats.keys
    kept, channels = min(stats.count, stats.limit), lows.shape[-1] if lows.ndim else 0
    shapes = [lows.shape, highs.shape, counts.shape, keys.shape, stats.rows.shape]
    parts = (PARTS, channels)
    if shapes != [parts, parts, (2 * BINS,), (kept,), (kept, channels)]:
        return False
    finite = (lows <= highs) & np.isfinite(lows) & np.isfinite(highs)
    empty = np.isposinf(lows) & np.isneginf(highs)
    whole = finite.all(axis=1) | empty.all(axis=1)
    return bool(
        whole.all()
        and bool(stats.count) == bool(finite.any())
        and stats.histogram.exponent == exponent_for(max(map(abs, stats.range("minmax"))))
        and (counts >= 0).all()
        and stats.histogram.total == stats.count * channels
        and (keys[1:] >= keys[:-1]).all()
        and np.isfinite(stats.rows).all()
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
