"""How far a tensor is from the one it should be, measured block by block."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from onnxforge.numerics.streaming import CompensatedSum, Floats, Percentiles

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EXACT_LIMIT", "Accumulator", "Comparison", "compare"]

EXACT_LIMIT: Final = 1 << 20
"""Up to so many elements percentiles are exact."""

_CHUNK: Final = 1 << 16
_POSITIONS: Final = 16
_Raw = npt.NDArray[Any]
_Mask = npt.NDArray[np.bool_]
_Range = tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found between a reference and a candidate.

    A pair is *finite* when both sides are. NaN against NaN and an infinity against the same
    infinity agree and count in no error. Every other pair that is not finite is a
    disagreement and counts as an infinite error: maximum and mean are then inf, SQNR is
    -inf and cosine 0, so that no threshold on one number alone lets it pass.

    Positions are flat indices into everything fed, in the order it was fed.

    Attributes:
        count: Pairs of elements.
        finite: Pairs that are finite on both sides.
        bit_equal: Same types and same bits everywhere, also in zeros and NaNs.
        max_abs: Largest ``|reference - candidate|``.
        max_abs_at: First position of the largest error, None where there is no error.
        mean_abs: Mean of ``|reference - candidate|`` over finite pairs.
        p99_abs: 99th percentile of the error, as numpy's ``linear`` method defines it.
        p999_abs: The 99.9th percentile.
        exact_percentiles: Whether the percentiles are exact; otherwise each is within
            2^-8 of itself (``onnxforge.numerics.streaming.HISTOGRAM_ERROR``).
        max_reference: Largest ``|reference|`` over finite pairs.
        range_reference: Least and largest finite value of the reference, None if it has none.
        range_candidate: The same of the candidate.
        sqnr_db: Signal to quantization noise ratio in dB,
            ``10 log10(sum(reference^2) / sum((reference - candidate)^2))`` over finite pairs
            (Oppenheim and Schafer, Discrete-Time Signal Processing, on quantization errors;
            onnxruntime's ``compute_signal_to_quantization_noice_ratio``). inf without
            noise, -inf for noise on a reference of zeros.
        cosine: ``sum(r c) / sqrt(sum(r^2) sum(c^2))`` over finite pairs; 1 minus
            ``scipy.spatial.distance.cosine``. 1 between two zero vectors, 0 where only one
            is zero.
        nan_reference: NaNs in the reference.
        nan_candidate: NaNs in the candidate.
        inf_reference: Infinities in the reference.
        inf_candidate: Infinities in the candidate.
        nonfinite_mismatches: Disagreements about NaN and infinity.
        nonfinite_mismatches_at: The first positions of these, at most 16.
    """

    count: int
    finite: int
    bit_equal: bool
    max_abs: float
    max_abs_at: int | None
    mean_abs: float
    p99_abs: float
    p999_abs: float
    exact_percentiles: bool
    max_reference: float
    range_reference: tuple[float, float] | None
    range_candidate: tuple[float, float] | None
    sqnr_db: float
    cosine: float
    nan_reference: int
    nan_candidate: int
    inf_reference: int
    inf_candidate: int
    nonfinite_mismatches: int
    nonfinite_mismatches_at: tuple[int, ...]

    @property
    def equal(self) -> bool:
        """Whether all values are equal; signs of zeros and bits of NaNs may differ."""
        return self.max_abs == 0

    @property
    def max_relative(self) -> float:
        """Largest error over the largest reference; inf for errors on zeros alone."""
        if self.max_abs == 0:
            return 0.0
        return self.max_abs / self.max_reference if self.max_reference else math.inf


def compare(reference: npt.ArrayLike, candidate: npt.ArrayLike) -> Comparison:
    """Compare two arrays of one shape.

    Args:
        reference: The right values.
        candidate: The values to judge.

    Returns:
        Everything measured.

    Raises:
        ValueError: The shapes differ.
        TypeError: An array does not hold real numbers.
    """
    accumulator = Accumulator()
    accumulator.update(reference, candidate)
    return accumulator.result()


class Accumulator:
    """Compares two streams of arrays in a memory that does not grow with them.

    Differently cut streams give the same counts, maxima, positions and percentiles, and
    sums that agree to rounding: blocks are summed pairwise in float64, and their sums with
    compensation. Where squares of float64 values overflow, beyond 1e154, or vanish,
    SQNR is -inf and cosine 0, unless all values are equal.

    Example:
        >>> import numpy as np
        >>> accumulator = Accumulator()
        >>> for block in range(3):
        ...     accumulator.update(np.full(4, block), np.full(4, block))
        >>> accumulator.result().equal
        True
    """

    def __init__(self, *, exact_limit: int = EXACT_LIMIT) -> None:
        """Start empty.

        Args:
            exact_limit: Up to so many elements are kept, for exact percentiles.
        """
        self._count = 0
        self._finite = 0
        self._bit_equal = True
        self._max_abs = 0.0
        self._max_abs_at: int | None = None
        self._max_reference = 0.0
        self._ranges: tuple[_Range, _Range] = (None, None)
        self._errors, self._squares = CompensatedSum(), CompensatedSum()
        self._references, self._candidates, self._products = (
            CompensatedSum(),
            CompensatedSum(),
            CompensatedSum(),
        )
        self._percentiles = Percentiles(exact_limit)
        self._nonfinite = np.zeros(4, np.int64)
        self._mismatches = 0
        self._mismatches_at: tuple[int, ...] = ()

    def update(self, reference: npt.ArrayLike, candidate: npt.ArrayLike) -> None:
        """Take in one more pair of arrays.

        Args:
            reference: The right values.
            candidate: The values to judge, of the same shape; the type may be another.

        Raises:
            ValueError: The shapes differ.
            TypeError: An array does not hold real numbers.
        """
        ref, cand = _real(reference), _real(candidate)
        if ref.shape != cand.shape:
            msg = f"shapes differ: reference {ref.shape}, candidate {cand.shape}"
            raise ValueError(msg)
        with np.errstate(over="ignore", invalid="ignore"):
            for left, right in _chunks(ref.reshape(-1), cand.reshape(-1)):
                self._add(left, right)

    def merge(self, other: Accumulator) -> None:
        """Take in all that ``other`` has seen, as if it had been fed here, after the rest.

        Args:
            other: An accumulator with the same settings; it stays as it is.

        Raises:
            ValueError: The settings differ.
        """
        limits = self._percentiles.limit, other._percentiles.limit
        if limits[0] != limits[1]:
            msg = "settings differ: exact_limit is {} and {}".format(*limits)
            raise ValueError(msg)
        if other._max_abs > self._max_abs and other._max_abs_at is not None:
            self._max_abs, self._max_abs_at = other._max_abs, self._count + other._max_abs_at
        self._note_mismatches([self._count + at for at in other._mismatches_at])
        self._mismatches += other._mismatches - len(other._mismatches_at)
        self._bit_equal &= other._bit_equal
        self._max_reference = max(self._max_reference, other._max_reference)
        self._widen(*other._ranges)
        self._count += other._count
        self._finite += other._finite
        self._nonfinite = self._nonfinite + other._nonfinite
        self._percentiles.merge(other._percentiles)
        for mine, its in zip(self._sums, other._sums, strict=True):
            mine.merge(its)

    def result(self) -> Comparison:
        """What has been found so far."""
        broken = self._mismatches > 0
        nan_reference, nan_candidate, inf_reference, inf_candidate = map(int, self._nonfinite)
        return Comparison(
            count=self._count,
            finite=self._finite,
            bit_equal=self._bit_equal,
            max_abs=self._max_abs,
            max_abs_at=self._max_abs_at,
            mean_abs=math.inf if broken else self._errors.value / max(1, self._finite),
            p99_abs=min(self._percentiles.at(0.99), self._max_abs),
            p999_abs=min(self._percentiles.at(0.999), self._max_abs),
            exact_percentiles=self._percentiles.exact,
            max_reference=self._max_reference,
            range_reference=self._ranges[0],
            range_candidate=self._ranges[1],
            sqnr_db=-math.inf if broken else self._sqnr(),
            cosine=0.0 if broken else self._cosine(),
            nan_reference=nan_reference,
            nan_candidate=nan_candidate,
            inf_reference=inf_reference,
            inf_candidate=inf_candidate,
            nonfinite_mismatches=self._mismatches,
            nonfinite_mismatches_at=self._mismatches_at,
        )

    @property
    def _sums(self) -> tuple[CompensatedSum, ...]:
        return (
            self._errors,
            self._squares,
            self._references,
            self._candidates,
            self._products,
        )

    def _add(self, ref: _Raw, cand: _Raw) -> None:
        self._bit_equal = self._bit_equal and _same_bits(ref, cand)
        left, right = ref.astype(np.float64), cand.astype(np.float64)
        errors = _differences(ref, cand, left, right)
        finite = np.isfinite(left) & np.isfinite(right)
        if not finite.all():
            agreed = self._add_nonfinite(left, right, finite)
            errors[~finite] = np.inf
            errors[agreed] = 0
            self._percentiles.add(errors[~agreed])
        else:
            self._percentiles.add(errors)
            self._widen(_range(left), _range(right))
        self._add_worst(errors)
        if not finite.all():
            left, right, errors = left[finite], right[finite], errors[finite]
        self._add_finite(left, right, errors)
        self._count += ref.size

    def _add_nonfinite(self, left: Floats, right: Floats, finite: _Mask) -> _Mask:
        """Count what is not finite, and say where both sides agree about it."""
        self._widen(*(_range(side[np.isfinite(side)]) for side in (left, right)))
        nans = np.isnan(left), np.isnan(right)
        infs = np.isinf(left), np.isinf(right)
        self._nonfinite += np.array([np.count_nonzero(mask) for mask in (*nans, *infs)])
        agreed = ~finite & ((left == right) | (nans[0] & nans[1]))
        wrong = np.flatnonzero(~finite & ~agreed)
        self._note_mismatches((self._count + wrong[:_POSITIONS]).tolist())
        self._mismatches += max(0, wrong.size - _POSITIONS)
        return np.asarray(agreed)

    def _widen(self, reference: _Range, candidate: _Range) -> None:
        self._ranges = _union(self._ranges[0], reference), _union(self._ranges[1], candidate)

    def _note_mismatches(self, positions: list[int]) -> None:
        self._mismatches += len(positions)
        self._mismatches_at = (*self._mismatches_at, *positions)[:_POSITIONS]

    def _add_worst(self, errors: Floats) -> None:
        worst = int(errors.argmax())
        if errors[worst] > self._max_abs:
            self._max_abs = float(errors[worst])
            self._max_abs_at = self._count + worst

    def _add_finite(self, left: Floats, right: Floats, errors: Floats) -> None:
        self._finite += left.size
        if left.size:
            self._max_reference = max(self._max_reference, float(np.abs(left).max()))
        self._errors.add(float(errors.sum()))
        self._squares.add(float((errors * errors).sum()))
        self._references.add(float((left * left).sum()))
        self._candidates.add(float((right * right).sum()))
        self._products.add(float((left * right).sum()))

    def _sqnr(self) -> float:
        signal, noise = self._references.value, self._squares.value
        if not self._max_abs:
            return math.inf
        if signal == 0 or math.isinf(signal) or math.isinf(noise):
            return -math.inf  # so too where squares overflow or vanish and nobody knows
        return math.inf if noise == 0 else 10 * (math.log10(signal) - math.log10(noise))

    def _cosine(self) -> float:
        left, right = self._references.value, self._candidates.value
        if not self._max_abs:
            return 1.0
        if left == 0 or right == 0:
            return 0.0
        # In this form no product of sums overflows.
        cosine = self._products.value / left * math.sqrt(left / right)
        return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else 0.0


def _range(values: Floats) -> _Range:
    return (float(values.min()), float(values.max())) if values.size else None


def _union(first: _Range, second: _Range) -> _Range:
    if first is None or second is None:
        return first or second
    return min(first[0], second[0]), max(first[1], second[1])


def _real(values: npt.ArrayLike) -> _Raw:
    array = np.asarray(values)
    if not np.can_cast(array.dtype, np.float64):
        msg = f"cannot compare {array.dtype}: float64 does not hold its values"
        raise TypeError(msg)
    return array


def _chunks(ref: _Raw, cand: _Raw) -> Iterator[tuple[_Raw, _Raw]]:
    for start in range(0, ref.size, _CHUNK):
        here = slice(start, start + _CHUNK)
        yield np.ascontiguousarray(ref[here]), np.ascontiguousarray(cand[here])


def _same_bits(ref: _Raw, cand: _Raw) -> bool:
    if ref.dtype != cand.dtype:
        return False
    return np.array_equal(ref.view(np.uint8), cand.view(np.uint8))


def _differences(ref: _Raw, cand: _Raw, left: Floats, right: Floats) -> Floats:
    if ref.dtype == cand.dtype and ref.dtype.kind in "iu" and ref.dtype.itemsize == 8:
        # float64 would take neighbouring integers beyond 2^53 for equal.
        larger, smaller = np.maximum(ref, cand), np.minimum(ref, cand)
        return (larger.view(np.uint64) - smaller.view(np.uint64)).astype(np.float64)
    return np.abs(left - right)
