"""The two half formats: their limits, and weights in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxforge.lazy import DerivedTensor, stream
from onnxforge.numerics.half import OVERFLOW, SMALLEST_NORMAL, narrow, narrow_bfloat16

__all__ = ["BFLOAT16", "FLOAT16", "Content", "Format", "content", "halved", "strained"]

_TINY = 16  # elements; a tensor this small is a constant of a formula, not learned


@dataclass(frozen=True)
class Format:
    """A half format.

    Attributes:
        dtype: The type.
        word: What new names end in.
        overflow: From here on a value rounds to infinity.
        lowest: The lowest finite value.
        smallest: Below, values lose more than rounding.
        opset: The first opset whose Cast knows the type.
    """

    dtype: ir.DataType
    word: str
    overflow: float
    lowest: float
    smallest: float
    opset: int


FLOAT16 = Format(ir.DataType.FLOAT16, "fp16", OVERFLOW, -65504.0, SMALLEST_NORMAL, 6)
BFLOAT16 = Format(
    ir.DataType.BFLOAT16, "bf16", 2.0**128 - 2.0**119, -(2.0**128 - 2.0**120), 2.0**-126, 13
)


@dataclass(frozen=True)
class Content:
    """What a weight holds that a half format may not.

    Attributes:
        highest: The largest finite value that overflows, None if none does.
        lowest: The lowest one.
        lost: The smallest value of a constant of a formula that is not kept, None if all are.
    """

    highest: float | None = None
    lowest: float | None = None
    lost: float | None = None

    @property
    def overflows(self) -> bool:
        """Whether a finite value would become infinite."""
        return self.highest is not None or self.lowest is not None


def content(tensor: ir.TensorProtocol, form: Format) -> Content:
    """Look a float32 weight through."""
    highest = lowest = lost = None
    for raw in stream(tensor):
        block = raw.view(np.float32)
        # NaN makes both extremes NaN, so this settles blocks of usual weights.
        if (
            tensor.size > _TINY
            and block.min() > -form.overflow
            and block.max() < form.overflow
        ):
            continue
        finite = block[np.isfinite(block)]
        wide = finite[np.abs(finite) >= form.overflow]
        if wide.size and wide.max() > 0:
            highest = max(highest or 0.0, float(wide.max()))
        if wide.size and wide.min() < 0:
            lowest = min(lowest or 0.0, float(wide.min()))
        small = np.abs(finite[(finite != 0) & (np.abs(finite) < form.smallest)])
        if small.size and tensor.size <= _TINY:
            lost = float(small.min())
    return Content(highest, lowest, lost)


def strained(peak: float, form: Format) -> str:
    """What is wrong with a largest magnitude in a half type; empty if nothing is."""
    if peak >= form.overflow:
        return "overflows"
    return "is too small" if 0 < peak < form.smallest else ""


def halved(
    tensor: ir.TensorProtocol, form: Format, saturated: float | None = None
) -> ir.TensorProtocol:
    """A float32 tensor in a half format, computed when it is written.

    Args:
        tensor: The tensor.
        form: The format.
        saturated: What stands for finite values below the lowest one; infinity if None.
    """
    return DerivedTensor(tensor, form.dtype, _Narrow(form, saturated))


@dataclass(frozen=True)
class _Narrow:
    form: Format
    saturated: float | None

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        if self.saturated is not None:
            low = np.isfinite(block) & (block < self.form.lowest)
            block = np.where(low, np.float32(self.saturated), block)
        if self.form.dtype == ir.DataType.FLOAT16:
            narrow(block, out)
        else:
            narrow_bfloat16(block, out)
