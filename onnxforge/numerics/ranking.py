"""How far two sets of scores agree about the best choices: argmax, top-k and softmax."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from onnxforge.numerics.streaming import CompensatedSum, Floats

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Choice", "Ranker", "Ranking", "rank"]

_KEPT: Final = 16
_BLOCK: Final = 1 << 18


@dataclasses.dataclass(frozen=True)
class Choice:
    """A row in which the candidate chose another element.

    Attributes:
        row: Which, counted over everything fed.
        expected: The largest element of the reference.
        chosen: The largest element of the candidate.
        margin: How far, in the reference, the chosen one lies below the expected one.
    """

    row: int
    expected: int
    chosen: int
    margin: float


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What was found between scores of a reference and of a candidate, row by row.

    To numpy a NaN is the largest element; being wrong about one is an infinite margin.

    Attributes:
        rows: Rows compared.
        mismatches: Rows whose largest element is another one.
        margin: Largest margin of those; 0 where all of them are ties.
        mismatches_at: The first of them, at most 16.
        top: How many of the largest elements are compared as a set.
        overlap: Which part of these is in both sets, in the mean over rows.
        overlap_min: The same in the worst row.
        kl_mean: Kullback-Leibler divergence ``sum(p log(p / q))`` of the candidate's softmax
            from that of the reference, in nats, mean over rows (``scipy.stats.entropy``).
        kl_max: The same in the worst row.
    """

    rows: int
    mismatches: int
    margin: float
    mismatches_at: tuple[Choice, ...]
    top: int
    overlap: float
    overlap_min: float
    kl_mean: float
    kl_max: float

    @property
    def rate(self) -> float:
        """Fraction of rows with another largest element."""
        return self.mismatches / self.rows if self.rows else 0.0


def rank(
    reference: npt.ArrayLike, candidate: npt.ArrayLike, axis: int = -1, top: int = 5
) -> Ranking:
    """Compare the choices in two arrays of one shape; see `Ranker`."""
    ranker = Ranker(axis, top)
    ranker.update(reference, candidate)
    return ranker.result()


class Ranker:
    """Compares two streams of scores in a memory that does not grow with them."""

    def __init__(self, axis: int = -1, top: int = 5) -> None:
        """Start empty.

        Args:
            axis: The axis along which elements compete; all that is fed is whole along it.
            top: How many of the largest elements are compared as a set.
        """
        self._axis = axis
        self._top = top
        self._rows = 0
        self._mismatches = 0
        self._margin = 0.0
        self._choices: tuple[Choice, ...] = ()
        self._overlap, self._overlap_min = CompensatedSum(), 1.0
        self._kl, self._kl_max = CompensatedSum(), 0.0

    def update(self, reference: npt.ArrayLike, candidate: npt.ArrayLike) -> None:
        """Take in one more pair of arrays.

        Args:
            reference: The right scores.
            candidate: The scores to judge, of the same shape; the type may be another.

        Raises:
            ValueError: The shapes differ, or have no such axis.
        """
        left, right = np.asarray(reference), np.asarray(candidate)
        if left.shape != right.shape:
            raise ValueError(f"shapes differ: reference {left.shape}, candidate {right.shape}")
        with np.errstate(all="ignore"):
            for block in zip(_rows(left, self._axis), _rows(right, self._axis), strict=True):
                self._add(*block)

    def merge(self, other: Ranker) -> None:
        """Take in all that ``other`` has seen, after the rest; it stays as it is."""
        moved = (dataclasses.replace(c, row=c.row + self._rows) for c in other._choices)
        self._choices = (*self._choices, *moved)[:_KEPT]
        self._rows += other._rows
        self._mismatches += other._mismatches
        self._margin = max(self._margin, other._margin)
        self._overlap.merge(other._overlap)
        self._overlap_min = min(self._overlap_min, other._overlap_min)
        self._kl.merge(other._kl)
        self._kl_max = max(self._kl_max, other._kl_max)

    def result(self) -> Ranking:
        """What has been found so far."""
        rows = max(1, self._rows)
        return Ranking(
            rows=self._rows,
            mismatches=self._mismatches,
            margin=self._margin,
            mismatches_at=self._choices,
            top=self._top,
            overlap=self._overlap.value / rows if self._rows else 1.0,
            overlap_min=self._overlap_min,
            kl_mean=self._kl.value / rows,
            kl_max=self._kl_max,
        )

    def _add(self, left: Floats, right: Floats) -> None:
        self._add_choices(left, right)
        overlap = _overlap(left, right, min(self._top, left.shape[1]))
        self._overlap.add(float(overlap.sum()))
        self._overlap_min = min(self._overlap_min, float(overlap.min()))
        divergence = _divergence(left, right)
        self._kl.add(float(divergence.sum()))
        self._kl_max = max(self._kl_max, float(divergence.max()))
        self._rows += len(left)

    def _add_choices(self, left: Floats, right: Floats) -> None:
        expected, chosen = left.argmax(1), right.argmax(1)
        wrong = np.flatnonzero(expected != chosen)
        margins = left[wrong, expected[wrong]] - left[wrong, chosen[wrong]]
        margins[np.isnan(margins)] = math.inf
        self._mismatches += wrong.size
        self._margin = max(self._margin, float(margins.max(initial=0)))
        for row, margin in zip(wrong[:_KEPT].tolist(), margins.tolist(), strict=False):
            choice = Choice(self._rows + row, int(expected[row]), int(chosen[row]), margin)
            self._choices = (*self._choices, choice)[:_KEPT]


def _rows(array: npt.NDArray[Any], axis: int) -> Iterator[Floats]:
    """Rows along an axis in blocks."""
    moved = np.moveaxis(array, axis, -1)
    if not moved.size:
        return
    width = moved.shape[-1]
    if moved.flags.c_contiguous:
        moved = moved.reshape(-1, width)  # a view; else all is cut along the first axis
    else:
        moved = moved.squeeze(tuple(i for i, n in enumerate(moved.shape[:-1]) if n == 1))
        moved = moved.reshape(-1, width) if moved.ndim < 2 else moved
    step = max(1, _BLOCK * len(moved) // moved.size)
    for start in range(0, len(moved), step):
        yield moved[start : start + step].reshape(-1, width).astype(np.float64)


def _overlap(left: Floats, right: Floats, top: int) -> Floats:
    """Which part of the ``top`` largest elements of each row are so on both sides."""
    first = left.shape[1] - top
    best = [np.argpartition(side, first, 1)[:, first:] for side in (left, right)]
    found = (best[0][:, :, None] == best[1][:, None, :]).any(2)
    return np.asarray(found.mean(1))


def _divergence(left: Floats, right: Floats) -> Floats:
    p, q = _log_softmax(left), _log_softmax(right)
    terms = np.exp(p) * (p - q)
    terms[np.isneginf(p)] = 0
    found = np.maximum(terms.sum(1), 0)
    found[np.isnan(found)] = math.inf
    same = ((left == right) | (np.isnan(left) & np.isnan(right))).all(1)
    found[same] = 0
    return np.asarray(found)


def _log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
