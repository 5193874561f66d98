"""float32 to float16 and bfloat16, block by block, with the same bits on every processor."""

from __future__ import annotations

import numpy as np

from onnxforge.lazy import Scratch

__all__ = ["OVERFLOW", "SMALLEST_NORMAL", "narrow", "narrow_bfloat16", "narrow_finite"]

OVERFLOW = 65520.0
"""From here on float16 rounds to infinity: halfway from 65504, its largest, to 2^16."""

SMALLEST_NORMAL = 2.0**-14
"""Below, float16 is subnormal and has less than 11 significant bits."""

_REBIAS = np.uint32(-((127 - 15) << 23) & 0xFFFFFFFF)  # exponent bias of float16 for float32's
_scratch = Scratch()


def narrow(values: np.ndarray, out: np.ndarray) -> None:
    """Round float32 to the nearest float16, ties to even (IEEE 754, binary16).

    Infinities stay and large values become infinite. Processors disagree on what a NaN
    becomes, so those are made here: sign and upper payload stay, the quiet bit is set.

    Args:
        values: float32, of any shape.
        out: float16 of the same shape, is filled.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.copyto(out, values, casting="same_kind")
    at = np.isnan(values)
    bits = values.view(np.uint32)[at]
    out.view(np.uint16)[at] = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x3FF)


def narrow_finite(values: np.ndarray, out: np.ndarray) -> None:
    """The same as `narrow`, at twice the speed, for magnitudes below `OVERFLOW` only.

    float32 drops to float16 by integer arithmetic: the exponent gets its new bias, and the
    13 bits that go are rounded by adding just less than half, and one more where the last bit
    that stays is odd. Subnormal results, rare in weights, are left to numpy.

    Args:
        values: float32, one axis.
        out: float16 of the same length, is filled.
    """
    count = len(values)
    buffer = _scratch.take(9 * count)
    halves, signs = buffer[: 8 * count].view(np.uint32).reshape(2, count)
    small = buffer[8 * count :].view(np.bool_)
    np.abs(values, out=halves.view(np.float32))
    np.less(halves.view(np.float32), np.float32(SMALLEST_NORMAL), out=small)
    subnormal = np.flatnonzero(small)
    if len(subnormal) > count // 16:
        narrow(values, out)
        return
    bits = values.view(np.uint32)
    np.right_shift(bits, 16, out=signs)
    np.bitwise_and(signs, 0x8000, out=signs)
    odd = np.right_shift(halves, 13, out=halves)
    np.bitwise_and(odd, 1, out=odd)
    np.add(halves, bits, out=halves)
    np.add(halves, _REBIAS + np.uint32(0xFFF), out=halves)
    np.right_shift(halves, 13, out=halves)
    np.bitwise_and(halves, 0x7FFF, out=halves)
    np.bitwise_or(halves, signs, out=halves)
    np.copyto(out.view(np.uint16), halves, casting="same_kind")
    with np.errstate(under="ignore"):
        out[subnormal] = values[subnormal]


def narrow_bfloat16(values: np.ndarray, out: np.ndarray) -> None:
    """Round float32 to the nearest bfloat16, ties to even.

    Infinities stay and what is nearer to 2^128 than to the largest bfloat16 becomes infinite.
    A NaN keeps its sign and upper payload, and its quiet bit is set.

    Args:
        values: float32, one axis.
        out: bfloat16 of the same length, is filled.
    """
    bits = values.view(np.uint32)
    buffer = _scratch.take(4 * len(values)).view(np.uint32)
    np.right_shift(bits, 16, out=buffer)
    np.bitwise_and(buffer, 1, out=buffer)
    np.add(buffer, np.uint32(0x7FFF), out=buffer)
    np.add(buffer, bits, out=buffer)
    np.right_shift(buffer, 16, out=buffer)
    np.copyto(out.view(np.uint16), buffer, casting="same_kind")
    at = np.isnan(values)
    out.view(np.uint16)[at] = bits[at] >> 16 | 0x40
