"""A histogram that widens as values come, and quantization ranges taken from it."""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "LEAST_EXPONENT", "Histogram", "RangeMethod", "exponent_for"]

RangeMethod = Literal["minmax", "percentile", "entropy", "mse"]

BINS: Final = 2048
"""Bins on each side of zero."""

LEAST_EXPONENT: Final = -160
"""Of the width of a bin; float32 needs none that small."""

_LEVELS: Final = 255  # steps between the least and the largest of 8 bits
# Of a range, to try. Below, 8 bits have more levels than the part has bins.
_CUTS: Final = np.geomspace(1.0, 1 / 16, 41)
_BLOCK: Final = 1 << 18  # values counted at a time
_Counts = npt.NDArray[np.int64]


def exponent_for(largest: float) -> int:
    """The width of bins that hold a magnitude is two to the power of this.

    Args:
        largest: The largest of all magnitudes.
    """
    if not largest:
        return LEAST_EXPONENT
    return math.frexp(largest)[1] - (BINS.bit_length() - 1)  # largest < 2 ** first


class Histogram:
    """Counts of values in bins whose width is a power of two.

    Bin ``i`` holds the values from ``i * width`` on, for i from -BINS to BINS - 1. When a
    value lies beyond, two neighbours become one bin, of twice the width. The width so depends
    on the largest magnitude alone: the counts are the same in whatever order values come, and
    the sum of two histograms is that of all values.

    Attributes:
        exponent: The width of a bin is two to the power of this.
        counts: How many values are in each, int64 of 2 * BINS.
    """

    def __init__(self, exponent: int = LEAST_EXPONENT, counts: _Counts | None = None) -> None:
        """Start empty, or with counts."""
        self.exponent = exponent
        self.counts = np.zeros(2 * BINS, np.int64) if counts is None else counts

    @property
    def width(self) -> float:
        """Width of a bin."""
        return float(2.0**self.exponent)

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def middles(self) -> npt.NDArray[np.float64]:
        """The middle of each bin."""
        return np.ldexp(np.arange(-BINS, BINS, dtype=np.float64) + 0.5, self.exponent)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Take in finite values."""
        if not values.size:
            return
        self.widen(exponent_for(max(float(values.max()), -float(values.min()))))
        flat = values.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            bins = np.floor(np.ldexp(block, -self.exponent)).astype(np.int64) + BINS
            self.counts += np.bincount(bins, minlength=2 * BINS)

    def widen(self, exponent: int) -> None:
        """Make bins at least two to the power of ``exponent`` wide."""
        shift = exponent - self.exponent
        if shift <= 0:
            return
        bins = (np.arange(-BINS, BINS) >> min(shift, 62)) + BINS
        merged = np.zeros_like(self.counts)
        np.add.at(merged, bins, self.counts)
        self.counts, self.exponent = merged, exponent

    def merge(self, other: Histogram) -> None:
        """Take in all values of another; it stays as it is."""
        self.widen(other.exponent)
        twin = Histogram(other.exponent, other.counts.copy())
        twin.widen(self.exponent)
        self.counts += twin.counts

    def percentile(self, percent: float) -> tuple[float, float]:
        """A range that leaves out at most ``100 - percent`` percent of the values.

        Half of those may lie at each end. The ends are those of bins, zero is always inside.
        """
        places = np.flatnonzero(self.counts)
        if not len(places):
            return 0.0, 0.0
        below = self.counts.cumsum()
        left_out = (100 - percent) / 200 * below[-1]
        first = int(np.searchsorted(below, left_out, side="right"))
        above = self.counts[::-1].cumsum()
        last = 2 * BINS - 1 - int(np.searchsorted(above, left_out, side="right"))
        low, high = (first - BINS) * self.width, (last + 1 - BINS) * self.width
        return min(low, 0.0), max(high, 0.0)

    def mse(self, low: float, high: float) -> tuple[float, float]:
        """The part of a range in which 8 bits have the least squared error.

        Args:
            low: Least value, at most 0.
            high: Largest value, at least 0.
        """
        values, counts = self._occupied()
        best, found = np.inf, (low, high)
        for left in _CUTS if low < 0 else _CUTS[:1]:
            for right in _CUTS if high > 0 else _CUTS[:1]:
                lost = values - _quantized(values, low * left, high * right)
                error = float((counts * np.square(lost)).sum())
                if error < best:
                    best, found = error, (float(low * left), float(high * right))
        return found

    def entropy(self, low: float, high: float) -> tuple[float, float]:
        """The part of a range in which 8 bits keep most of the information.

        The least Kullback-Leibler divergence between the clipped distribution and what is
        left of it in 255 levels (S. Migacz, 8-bit Inference with TensorRT, GTC 2017), of
        ranges that are cut alike at both ends.
        """
        values, counts = self._occupied()
        best, found = np.inf, (low, high)
        for cut in _CUTS:
            ends = float(low * cut), float(high * cut)
            divergence = _divergence(values, counts, *ends)
            if divergence < best:
                best, found = divergence, ends
        return found

    def _occupied(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        places = np.flatnonzero(self.counts)
        return self.middles[places], self.counts[places].astype(np.float64)


def _quantized(
    values: npt.NDArray[np.float64], low: float, high: float
) -> npt.NDArray[np.float64]:
    """Values after 8 bits: uint8 with a zero point, as QuantizeLinear has it."""
    if high <= low:
        return np.zeros_like(values)
    scale = (high - low) / _LEVELS
    zero = np.rint(-low / scale)
    rounded: npt.NDArray[np.float64] = (
        np.clip(np.rint(values / scale) + zero, 0, _LEVELS) - zero
    ) * scale
    return rounded


def _divergence(
    values: npt.NDArray[np.float64],
    counts: npt.NDArray[np.float64],
    low: float,
    high: float,
) -> float:
    """Of the distribution clipped to a range from that in 8 bits."""
    if high <= low:
        return float("inf")
    scale = (high - low) / _LEVELS
    inside = (values >= low) & (values <= high)
    if not inside.any():
        return float("inf")
    kept = np.where(inside, counts, 0.0)
    clipped = kept.copy()
    places = np.flatnonzero(inside)
    clipped[places[0]] += counts[: places[0]].sum()
    clipped[places[-1]] += counts[places[-1] + 1 :].sum()
    levels = np.clip(np.rint((values - low) / scale), 0, _LEVELS).astype(np.int64)
    sums = np.bincount(levels[places], kept[places], _LEVELS + 1)
    bins = np.bincount(levels[places], minlength=_LEVELS + 1)
    spread = sums[levels[places]] / bins[levels[places]]
    p, q = clipped[places] / clipped.sum(), spread / spread.sum()
    return float((p * np.log(p / q)).sum())
