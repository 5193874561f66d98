"""Measuring one output over many samples, block by block from disk."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxforge.compare.evidence import OutputEvidence, SampleEvidence, Worst
from onnxforge.errors import SpecError
from onnxforge.numerics.metrics import Accumulator, Comparison
from onnxforge.numerics.ranking import Ranker
from onnxforge.runtime.session import ArrayFile

__all__ = ["OutputMeter", "distance", "is_real"]

_BLOCK = 1 << 20  # elements that are mapped at a time
_EXACT = 1 << 16  # errors kept for percentiles, for each output


def distance(expected: ArrayFile, found: ArrayFile) -> Accumulator:
    """Compare two arrays of one shape."""
    accumulator = Accumulator(exact_limit=_EXACT)
    for left, right in _blocks(expected, found, 1):
        accumulator.update(left, right)
    return accumulator


class OutputMeter:
    """Compares the values of one output, sample after sample."""

    def __init__(self, name: str, axis: int | None = None, top: int = 5) -> None:
        """Start empty.

        Args:
            name: The output.
            axis: The axis along which choices are compared, None for not at all.
            top: How many of the best choices are compared as a set.
        """
        self.name = name
        self._axis = axis
        self._top = top
        self._types: tuple[str, str] | None = None
        self._overall = Accumulator(exact_limit=_EXACT)
        self._ranker = None if axis is None else Ranker(-1, top)
        self._worst: Worst | None = None
        self._largest = 0.0
        self._samples: list[SampleEvidence] = []

    def add(self, sample: str, expected: ArrayFile | None, found: ArrayFile | None) -> None:
        """Compare the values in one sample, if they are real numbers on a side.

        Args:
            sample: Name of the sample.
            expected: Value in the reference, None if it is no tensor of numbers.
            found: Value in the candidate, likewise.

        Raises:
            SpecError: The output has no such axis.
        """
        left, right = is_real(expected), is_real(found)
        if not left and not right:
            return
        self._types = _type(expected), _type(found)
        shapes = tuple(() if f is None else f.open().shape for f in (expected, found))
        problem = ""
        if not left or not right:
            problem = f"no real numbers in the {'candidate' if left else 'reference'}"
        elif shapes[0] != shapes[1]:
            problem = f"shapes differ: reference {shapes[0]}, candidate {shapes[1]}"
        if problem or expected is None or found is None:
            self._samples.append(SampleEvidence(sample, shapes[0], None, None, problem))
            return
        accumulator = distance(expected, found)
        comparison = accumulator.result()
        self._overall.merge(accumulator)
        self._note_worst(sample, comparison, expected, found)
        ranker = self._rank(expected, found)
        ranking = None if ranker is None else ranker.result()
        self._samples.append(SampleEvidence(sample, shapes[0], comparison, ranking))

    def _note_worst(
        self, sample: str, comparison: Comparison, expected: ArrayFile, found: ArrayFile
    ) -> None:
        if comparison.max_abs_at is None or comparison.max_abs <= self._largest:
            return
        self._largest = comparison.max_abs
        left, right = expected.open(), found.open()
        at = tuple(int(i) for i in np.unravel_index(comparison.max_abs_at, left.shape))
        self._worst = Worst(sample, at, float(left[at]), float(right[at]))

    def _rank(self, expected: ArrayFile, found: ArrayFile) -> Ranker | None:
        if self._axis is None or self._ranker is None:
            return None
        shape = expected.open().shape
        if not -len(shape) <= self._axis < len(shape):
            raise SpecError(
                f"output {self.name!r} has the shape {shape}, no axis {self._axis}"
            )
        if self._axis in (-1, len(shape) - 1):
            ranker = Ranker(-1, self._top)
            for left, right in _blocks(expected, found, shape[-1]):
                ranker.update(left.reshape(-1, shape[-1]), right.reshape(-1, shape[-1]))
        else:
            ranker = Ranker(self._axis, self._top)
            ranker.update(expected.open(), found.open())
        self._ranker.merge(ranker)
        return ranker

    def evidence(self) -> OutputEvidence | None:
        """What was found; None if nothing could be compared."""
        if self._types is None:
            return None
        return OutputEvidence(
            name=self.name,
            types=self._types,
            overall=self._overall.result(),
            ranking=None if self._ranker is None else self._ranker.result(),
            worst=self._worst,
            samples=tuple(self._samples),
        )


def is_real(file: ArrayFile | None) -> bool:
    """Whether there is a tensor of real numbers."""
    return file is not None and np.can_cast(file.dtype.numpy(), np.float64)


def _type(file: ArrayFile | None) -> str:
    return "NONE" if file is None else str(file.dtype)


def _blocks(
    expected: ArrayFile, found: ArrayFile, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same pieces of two arrays, flat; ``width`` elements stay together."""
    size = expected.open().size
    step = max(1, _BLOCK // max(1, width)) * width
    for start in range(0, size, max(1, step)):
        # Mapped anew each time: what was read before leaves the memory of this process.
        here = slice(start, start + step)
        yield expected.open().reshape(-1)[here], found.open().reshape(-1)[here]
