"""Inputs for a model, made from what it says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxforge.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["random_inputs"]


def random_inputs(
    inputs: Iterable[ir.Value], *, size: int = 8, seed: int = 0
) -> dict[str, np.ndarray]:
    """Draw a value for each input.

    Floats are normal with mean 0 and deviation 1, integers are 0 or 1, booleans are fair.

    Args:
        inputs: The graph inputs to fill; give those without a default value.
        size: Length of every axis that the model leaves open.
        seed: Equal seeds give equal values.

    Raises:
        Refused: An input is no tensor of numbers.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray] = {}
    for value in inputs:
        if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
            raise Refused(f"no values can be drawn for the input {value.name!r}: {value.type}")
        dims = [] if value.shape is None else list(value.shape)
        shape = [dim if isinstance(dim, int) else size for dim in dims]
        dtype = value.type.dtype
        if dtype.is_floating_point():
            array = rng.standard_normal(shape).astype(dtype.numpy())
        else:
            array = rng.integers(0, 2, shape).astype(dtype.numpy())
        drawn[value.name or ""] = array
    return drawn
