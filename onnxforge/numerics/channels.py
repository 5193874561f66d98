"""Which elements of a tensor share a scale, and walks over them block by block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from onnxforge.lazy import Scratch, stream

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Channels", "Piece", "absmax", "walk"]

_scratch = Scratch()


class Piece(NamedTuple):
    """A run of elements that is an array of its own.

    Attributes:
        start: The first element, counted in the tensor.
        stop: The one behind the last.
        shape: Shape of the array.
        scale: What of an array in ``Channels.grid`` shape broadcasts to it.
        along: The axes of the array along which the scale is the same.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    scale: tuple[int | slice, ...]
    along: tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """Which elements of a tensor share a scale: those that differ along some axes only.

    Attributes:
        shape: Shape of the tensor.
        shared: The axes along which elements share a scale; those that a product sums over.
    """

    shape: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales, which broadcasts against the tensor."""
        return tuple(1 if i in self.shared else n for i, n in enumerate(self.shape))

    @property
    def is_worthwhile(self) -> bool:
        """Whether scales are fewer than elements."""
        return 0 < 2 * math.prod(self.scale_shape) <= math.prod(self.shape)

    @cached_property
    def _axes(self) -> tuple[tuple[int, bool], ...]:
        """Length of the axes and whether they share a scale; neighbours alike are one."""
        kinds = [(n, i in self.shared) for i, n in enumerate(self.shape) if n != 1]
        runs = itertools.groupby(kinds, key=lambda kind: kind[1])
        return tuple((math.prod(n for n, _ in run), kind) for kind, run in runs) or (
            (1, True),
        )

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the scales for the pieces: an axis for each run of axes that are alike."""
        return tuple(1 if shared else n for n, shared in self._axes)

    @property
    def summed(self) -> tuple[int, int, int] | None:
        """The tensor as (outer, summed, inner), where only the middle axis shares a scale.

        None if the axes that share a scale are not neighbours.
        """
        kinds = [shared for _, shared in self._axes]
        if kinds.count(True) > 1:
            return None
        at = kinds.index(True) if True in kinds else len(kinds)
        sizes = [n for n, _ in self._axes]
        return math.prod(sizes[:at]), math.prod(sizes[at : at + 1]), math.prod(sizes[at + 1 :])

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Cut a run of elements into arrays: parts of rows at its ends, whole rows between."""
        return self._cut(start, stop, 0, 0, ()) if start < stop else iter(())

    def _cut(
        self, start: int, stop: int, base: int, level: int, at: tuple[int, ...]
    ) -> Iterator[Piece]:
        rest = self._axes[level:]
        shared = rest[0][1]
        row = math.prod(n for n, _ in rest[1:])
        first, last = -(-start // row), stop // row
        if start % row:  # begins inside of a row
            whole = first - 1
            end = min(stop, first * row)
            inside = (*at, 0 if shared else whole)
            low = whole * row
            yield from self._cut(start - low, end - low, base + low, level + 1, inside)
            start = end
        if first < last:
            places: list[int | slice] = [*at, slice(None) if shared else slice(first, last)]
            places += [slice(None)] * len(rest[1:])
            shape = (last - first, *(n for n, _ in rest[1:]))
            along = tuple(i for i, (_, alike) in enumerate(rest) if alike)
            yield Piece(base + first * row, base + last * row, shape, tuple(places), along)
            start = last * row
        if start < stop:  # ends inside of a row
            inside = (*at, 0 if shared else last)
            low = last * row
            yield from self._cut(start - low, stop - low, base + low, level + 1, inside)


def walk(
    tensor: ir.TensorProtocol, channels: Channels
) -> Iterator[tuple[Piece, np.ndarray[Any, np.dtype[np.float32]]]]:
    """The values of a tensor as float32, piece by piece; each is overwritten by the next."""
    dtype, start = tensor.dtype.numpy(), 0
    for content in stream(tensor):
        values = content.view(dtype)
        if dtype != np.float32:
            wide = _scratch.take(4 * len(values)).view(np.float32)
            np.copyto(wide, values, casting="same_kind")
            values = wide
        for piece in channels.pieces(start, start + len(values)):
            part = values[piece.start - start : piece.stop - start]
            yield piece, part.reshape(piece.shape)
        start += len(values)


def absmax(tensor: ir.TensorProtocol, channels: Channels) -> np.ndarray:
    """Largest magnitude in each channel; NaN where a channel holds one.

    Args:
        tensor: The tensor, of any float type.
        channels: Its channels.

    Returns:
        float32 of shape ``channels.grid``.
    """
    found = np.zeros(channels.grid, np.float32)
    buffer = Scratch()
    for piece, values in walk(tensor, channels):
        magnitude = buffer.take(values.nbytes).view(np.float32).reshape(values.shape)
        np.abs(values, out=magnitude)
        here = found[piece.scale]
        largest = magnitude.max(axis=piece.along, keepdims=True) if piece.along else magnitude
        np.maximum(here, largest, out=here)
    return found
