"""What a model's activations look like, in a form that adds up exactly and takes no room."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxforge.errors import DataError
from onnxforge.numerics.histogram import Histogram, RangeMethod

__all__ = ["PARTS", "ROWS", "ActivationStats", "Part", "Statistics", "sample_key"]

ROWS: Final = 256
"""Rows of an activation that are kept."""

PARTS: Final = 4
"""Parts that samples are divided into, by their keys, to tell what ranges hold for others."""

_ZERO: Final = np.float32(0)
_Floats = npt.NDArray[np.float32]
_Keys = npt.NDArray[np.uint64]


class Part(NamedTuple):
    """Rows of some samples, and what is known of all others.

    Attributes:
        low: Least value of each channel in the others.
        high: Largest value of each channel in the others.
        others: Rows kept of the others, rows by channels.
        rows: Rows kept of the samples of this part.
    """

    low: _Floats
    high: _Floats
    others: _Floats
    rows: _Floats


@dataclass
class ActivationStats:
    """Statistics of one activation, channel by channel.

    Statistics of two sets of samples merge to those of both, bit for bit, in any order.

    Attributes:
        channel_axis: The axis of the activation that a product sums over.
        lows: Least value of each channel in each part of the samples, float32 of parts by
            channels; +infinity where there was none.
        highs: Largest value of each channel in each part; -infinity where there was none.
        count: Number of rows seen: all of the activation but for its channels.
        histogram: Of all values.
        keys: Of the rows that are kept, uint64, ascending.
        rows: Those rows, float32 of keys by channels: the ones with the least keys, which
            are a random choice of all rows that does not depend on their order.
        limit: Most rows to keep.
    """

    channel_axis: int
    lows: _Floats
    highs: _Floats
    count: int = 0
    histogram: Histogram = field(default_factory=Histogram)
    keys: _Keys = field(default_factory=lambda: np.empty(0, np.uint64))
    rows: _Floats = field(default_factory=lambda: np.empty((0, 0), np.float32))
    limit: int = ROWS

    @classmethod
    def empty(cls, channel_axis: int, channels: int, limit: int = ROWS) -> ActivationStats:
        """Statistics of nothing yet.

        Args:
            channel_axis: The axis of channels.
            channels: How many there are.
            limit: Most rows to keep.
        """
        lows = np.full((PARTS, channels), np.inf, np.float32)
        rows = np.empty((0, channels), np.float32)
        return cls(channel_axis, lows, -lows, rows=rows, limit=limit)

    @property
    def low(self) -> _Floats:
        """Least value of each channel, float32; +infinity where there was none."""
        found: _Floats = self.lows.min(axis=0)
        return found

    @property
    def high(self) -> _Floats:
        """Largest value of each channel, float32; -infinity where there was none."""
        found: _Floats = self.highs.max(axis=0)
        return found

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return int(self.lows.shape[1])

    @property
    def whole(self) -> Part:
        """All rows kept, with the ranges of all samples."""
        return Part(self.low, self.high, self.rows, self.rows)

    def parts(self) -> list[Part]:
        """Rows kept, each with the ranges that samples of other parts have.

        What a choice costs on samples that it was not made for shows only there: ranges that
        fit all samples seen have no place for a channel that goes further. Where the samples
        are of one part, that is all with its own ranges.
        """
        seen = np.isfinite(self.lows).all(axis=1)
        if seen.sum() < 2:
            return [self.whole]
        mine = self.keys % np.uint64(PARTS)
        return [
            Part(
                np.delete(self.lows, part, axis=0).min(axis=0),
                np.delete(self.highs, part, axis=0).max(axis=0),
                self.rows[mine != part],
                self.rows[mine == part],
            )
            for part in range(PARTS)
            if (mine == part).any()
        ]

    def add(self, values: _Floats, key: int) -> None:
        """Take in one value of the activation.

        Args:
            values: float32 or narrower, of any rank; channels are along ``channel_axis``.
            key: What tells the sample from all others, see `sample_key`.

        Raises:
            DataError: A value is NaN or infinite, or there are other channels than before.
        """
        rows = np.moveaxis(np.asarray(values, np.float32), self.channel_axis, -1)
        if rows.shape[-1] != self.channels:
            raise DataError(f"has {rows.shape[-1]} channels, not {self.channels}")
        rows = rows.reshape(-1, self.channels)
        if not rows.size:
            return
        # Of the two zeros, the one that comes first would win: -0 + 0 is 0.
        low, high = rows.min(axis=0) + _ZERO, rows.max(axis=0) + _ZERO
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise DataError("holds NaN or infinity")
        part = key % PARTS
        np.minimum(self.lows[part], low, out=self.lows[part])
        np.maximum(self.highs[part], high, out=self.highs[part])
        self.histogram.add(rows)
        self.count += len(rows)
        keys = _row_keys(key, len(rows))
        kept = np.argsort(keys, kind="stable")[: self.limit]
        self._keep(keys[kept], rows[kept])

    def merge(self, other: ActivationStats) -> None:
        """Take in all that another one has seen; it stays as it is.

        Raises:
            DataError: The two are not of one activation, or keep another number of rows.
        """
        self.check(other)
        np.minimum(self.lows, other.lows, out=self.lows)
        np.maximum(self.highs, other.highs, out=self.highs)
        self.histogram.merge(other.histogram)
        self.count += other.count
        self._keep(other.keys, other.rows)

    def check(self, other: ActivationStats) -> None:
        """Refuse what cannot be merged.

        Raises:
            DataError: As `merge` does.
        """
        if (self.channel_axis, self.channels) != (other.channel_axis, other.channels):
            raise DataError("has other channels")
        if self.limit != other.limit:
            raise DataError(f"keeps {other.limit} rows, not {self.limit}")

    def _keep(self, keys: _Keys, rows: _Floats) -> None:
        """Of the rows kept so far and these, keep those with the least keys."""
        both = np.concatenate([self.keys, keys])
        kept = np.argsort(both, kind="stable")[: self.limit]
        self.keys = both[kept]
        self.rows = np.concatenate([self.rows, rows])[kept]

    def range(self, method: RangeMethod, percent: float = 99.999) -> tuple[float, float]:
        """A range for all channels together; zero is always inside.

        Args:
            method: ``minmax``, or what the histogram gives.
            percent: Of ``percentile``: how many percent of the values are inside.

        Returns:
            The least and the largest value that 8 bits are to hold.

        Raises:
            DataError: ``percent`` is none of 0 to 100.
        """
        if not 0 <= percent <= 100:
            raise DataError(f"percent: wanted 0 to 100, not {percent}")
        low = min(0.0, float(self.low.min(initial=0)))
        high = max(0.0, float(self.high.max(initial=0)))
        match method:
            case "minmax":
                return low, high
            case "percentile":
                left, right = self.histogram.percentile(percent)
                return max(low, left), min(high, right)
            case "mse":
                return self.histogram.mse(low, high)
            case "entropy":
                return self.histogram.entropy(low, high)


@dataclass
class Statistics:
    """Statistics of the activations of a model.

    Attributes:
        digest: SHA-256 of what computes them: nodes, attributes and weights.
        activations: By the name of the value.
        samples: The keys of the samples that went in.
    """

    digest: str
    activations: dict[str, ActivationStats]
    samples: set[int] = field(default_factory=set)

    def merge(self, other: Statistics) -> None:
        """Take in all that another one has seen; it stays as it is.

        Where all its samples are known already, nothing changes.

        Raises:
            DataError: The two are not of one model, not of the same activations, or have some
                samples in common, which would count twice; nothing changed.
        """
        if self.digest != other.digest:
            raise DataError("is of another model")
        if odd := sorted(self.activations.keys() ^ other.activations.keys()):
            raise DataError(f"only one of the two knows {odd[0]!r}")
        both = self.samples & other.samples
        if 0 < len(both) < len(other.samples):
            raise DataError(f"{len(both)} of its {len(other.samples)} samples are known")
        for name, stats in self.activations.items():
            try:
                stats.check(other.activations[name])
            except DataError as error:
                raise DataError(f"activation {name!r} {error}") from None
        if both:
            return
        for name, stats in self.activations.items():
            stats.merge(other.activations[name])
        self.samples |= other.samples


def sample_key(feeds: Mapping[str, np.ndarray]) -> int:
    """64 bits that tell a sample from others by what is in it, not by its name or place."""
    sha = hashlib.sha256()
    for name in sorted(feeds):
        array = feeds[name]
        sha.update(f"{name}:{array.dtype.name}{array.shape}".encode())
        # As bytes: types that numpy lacks have no buffer.
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return int.from_bytes(sha.digest()[:8], "little")


def _row_keys(key: int, count: int) -> _Keys:
    """A hash of the sample and the number of each row, which ends in the part of the sample.

    The finalizer of SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number
    Generators, OOPSLA 2014) on a Weyl sequence that starts at the sample's key.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z - z % np.uint64(PARTS) + np.uint64(key % PARTS)
