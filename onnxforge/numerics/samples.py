"""Inputs for a model: read from files, or made from what it says of them."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxforge.errors import DataError, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["random_inputs", "read_archive", "read_array"]

# What numpy and zipfile raise for damaged files; a RuntimeError where they do not know how.
_UNREADABLE = (
    EOFError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def random_inputs(
    inputs: Iterable[ir.Value],
    *,
    size: int = 8,
    seed: int | Sequence[int] = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    below: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Draw a value for each input.

    Floats are normal with mean 0 and deviation 1, integers are 0 or 1, booleans are fair.

    Args:
        inputs: The graph inputs to fill; give those without a default value.
        size: Length of every axis that the model leaves open.
        seed: Equal seeds give equal values.
        shapes: Shapes of the inputs that have another one, by name.
        below: What integers stay below where that is not 2, by name.

    Raises:
        Refused: An input is no tensor of numbers, or too large.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray] = {}
    for value in inputs:
        name = value.name or ""
        if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
            raise Refused(f"no values can be drawn for the input {name!r}: {value.type}")
        dims = [] if value.shape is None else list(value.shape)
        usual = [dim if isinstance(dim, int) else size for dim in dims]
        shape = (shapes or {}).get(name, usual)
        highest = (below or {}).get(name, 2)
        try:
            drawn[name] = _random(rng, value.type.dtype, shape, highest)
        except (MemoryError, ValueError) as error:
            raise Refused(
                f"the input {name!r} cannot have the shape {shape}: {error}"
            ) from None
    return drawn


def _random(
    rng: np.random.Generator, dtype: ir.DataType, shape: Sequence[int], highest: int
) -> npt.NDArray[Any]:
    if dtype.is_floating_point():
        return rng.standard_normal(shape).astype(dtype.numpy())
    return rng.integers(0, highest, shape).astype(dtype.numpy())


def read_array(path: Path) -> npt.NDArray[Any]:
    """Read a .npy file.

    Raises:
        DataError: It cannot be read, or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file)
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def read_archive(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read a .npz file.

    Raises:
        DataError: It cannot be read, or holds what is no array.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return {
                name.removesuffix(".npy"): _member(archive, name)
                for name in archive.namelist()
            }
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(name) as file:
        return np.lib.format.read_array(file)
