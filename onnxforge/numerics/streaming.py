"""Sums and percentiles of a stream of numbers, in bounded memory."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["HISTOGRAM_ERROR", "CompensatedSum", "Floats", "Percentiles"]

HISTOGRAM_ERROR: Final = 2.0**-8
"""A percentile taken from the histogram is off by at most this fraction of itself."""

Floats = npt.NDArray[np.float64]

_MANTISSA_BITS: Final = 7
_SHIFT: Final = 52 - _MANTISSA_BITS
_INFINITE_BIN: Final = 0x7FF << _MANTISSA_BITS
_FIRST_CAPACITY: Final = 1 << 10


class CompensatedSum:
    """A sum that carries its rounding error along.

    Neumaier, Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen,
    ZAMM 54 (1974).
    """

    __slots__ = ("_high", "_low")

    def __init__(self) -> None:
        self._high = 0.0
        self._low = 0.0

    def add(self, value: float) -> None:
        """Add one number."""
        total = self._high + value
        if abs(self._high) >= abs(value):
            self._low += (self._high - total) + value
        else:
            self._low += (value - total) + self._high
        self._high = total

    def merge(self, other: CompensatedSum) -> None:
        """Add another sum; it stays as it is."""
        high, low = other._high, other._low
        self.add(high)
        self.add(low)

    @property
    def value(self) -> float:
        """The sum so far."""
        return self._high + self._low if math.isfinite(self._high) else self._high


class Percentiles:
    """Order statistics of non-negative numbers: all of them, or a histogram of them.

    A bin of the histogram is the exponent and the first seven bits of the mantissa of a
    float64, so it is at most 2^-7 of its lower end wide, and its middle at most 2^-8 of any
    value in it away. Below 2^-1022 a value counts as 0.

    Attributes:
        limit: Up to so many values are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = 0
        self._kept: Floats = np.empty(min(limit, _FIRST_CAPACITY))
        self._bins: npt.NDArray[np.int64] | None = None

    @property
    def exact(self) -> bool:
        """Whether all values are still kept."""
        return self._bins is None

    def add(self, values: Floats) -> None:
        """Take in non-negative values, without NaN."""
        total = self._count + values.size
        if self._bins is None and total <= self.limit:
            if total > self._kept.size:
                self._kept = np.resize(self._kept, min(self.limit, 2 * total))
            self._kept[self._count : total] = values
        else:
            _count_bins(self._spilled(), values)
        self._count = total

    def merge(self, other: Percentiles) -> None:
        """Take in all values of another; it stays as it is."""
        if other._bins is None:
            self.add(other._kept[: other._count])
            return
        bins = self._spilled()
        bins += other._bins
        self._count += other._count

    def at(self, fraction: float) -> float:
        """Percentile ``100 * fraction``, linear between neighbours as numpy does it."""
        if self._count == 0:
            return 0.0
        place = fraction * (self._count - 1)
        below = math.floor(place)
        low, high = self._ranked(below), self._ranked(min(below + 1, self._count - 1))
        if place == below or low == high:
            return low
        return low + (high - low) * (place - below)

    def _spilled(self) -> npt.NDArray[np.int64]:
        if self._bins is None:
            self._bins = np.zeros(_INFINITE_BIN + 1, np.int64)
            _count_bins(self._bins, self._kept[: self._count])
            self._kept = np.empty(0)
        return self._bins

    def _ranked(self, rank: int) -> float:
        if self._bins is None:
            return float(np.partition(self._kept[: self._count], rank)[rank])
        found = int(np.searchsorted(self._bins.cumsum(), rank, side="right"))
        if found in (0, _INFINITE_BIN):
            return math.inf if found else 0.0
        middle = np.int64((found << _SHIFT) + (1 << (_SHIFT - 1)))
        return float(middle.view(np.float64))


def _count_bins(bins: npt.NDArray[np.int64], values: Floats) -> None:
    if values.size:
        numbers = values.view(np.int64) >> _SHIFT
        first = int(numbers.min())
        counts = np.bincount(numbers - first)
        bins[first : first + counts.size] += counts
