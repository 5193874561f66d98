"""Symmetric int8 weights: scales, kernels, and what the rounding costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxforge.lazy import BLOCK_BYTES, DerivedTensor, Scratch, reader
from onnxforge.numerics.channels import Channels, absmax, walk
from onnxforge.numerics.streaming import CompensatedSum, Percentiles

__all__ = [
    "Dequantize",
    "Divide",
    "Grid",
    "Quantize",
    "Rounding",
    "ScaleRule",
    "choose",
    "loudness",
    "rounding",
    "saturating_pairs",
]

ScaleRule = Literal["absmax", "mse"]

_NORMAL = np.float32(2.0**-126)  # the smallest float32 that no processor flushes to zero
_HIGHEST = np.float32(2.0**128 - 2.0**105)  # 127 times its 127th part is finite still
_CLIPS = tuple(1 - i / 50 for i in range(21))
_PERCENTILE_LIMIT = 1 << 16
_scratch = Scratch()


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales of a weight, and the integers it is rounded to.

    An element is stored as ``round(w / scale)``, ties to even, within -limit and limit.

    Attributes:
        channels: Which elements share a scale.
        scale: float32 of shape ``channels.grid``.
        limit: Largest integer: 127, or 64 where two products must fit into 16 bits.
        clips: Whether some elements are beyond that.
    """

    channels: Channels
    scale: np.ndarray
    limit: int = 127
    clips: bool = True

    @property
    def scales(self) -> np.ndarray:
        """The scales, of a shape that broadcasts against the weight."""
        return self.scale.reshape(self.channels.scale_shape)

    def _key(self) -> tuple[object, ...]:
        return self.channels, self.scale.tobytes(), self.limit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True)
class Quantize:
    """Kernel: floats to int8, or to uint8 around a zero point of 128.

    Attributes:
        grid: The scales.
        zero_point: 0 for int8, 128 for uint8.
    """

    grid: Grid
    zero_point: int = 0

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        """Fill ``out``."""
        grid = self.grid
        levels = _scratch.take(4 * len(block)).view(np.float32)
        if block.dtype != np.float32:
            np.copyto(levels, block, casting="same_kind")
            block = levels
        for piece in grid.channels.pieces(start, start + len(block)):
            here = slice(piece.start - start, piece.stop - start)
            part = levels[here].reshape(piece.shape)
            np.divide(block[here].reshape(piece.shape), grid.scale[piece.scale], out=part)
        np.rint(levels, out=levels)
        if grid.clips:
            np.clip(levels, -grid.limit, grid.limit, out=levels)
        if self.zero_point:
            np.add(levels, np.float32(self.zero_point), out=levels)
        np.copyto(out, levels, casting="unsafe")


@dataclass(frozen=True)
class Divide:
    """Kernel: floats divided by the scales of a grid, as float32.

    Attributes:
        grid: The scales.
    """

    grid: Grid

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        """Fill ``out``."""
        with np.errstate(invalid="ignore"):  # infinity by infinity, which `choose` finds
            _by_channel(np.divide, self.grid, block, out, start)


@dataclass(frozen=True)
class Dequantize:
    """Kernel: integers or floats times the scales of a grid, as float32.

    Attributes:
        grid: The scales.
    """

    grid: Grid

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        """Fill ``out``."""
        _by_channel(np.multiply, self.grid, block, out, start)


def _by_channel(
    operation: np.ufunc, grid: Grid, block: np.ndarray, out: np.ndarray, start: int
) -> None:
    """Fill ``out`` with a block, as float32, and the scales of its channels."""
    np.copyto(out, block)
    for piece in grid.channels.pieces(start, start + len(block)):
        part = out[piece.start - start : piece.stop - start].reshape(piece.shape)
        operation(part, grid.scale[piece.scale], out=part)


def choose(
    tensor: ir.TensorProtocol, channels: Channels, rule: ScaleRule = "absmax", limit: int = 127
) -> Grid | None:
    """The scales of a weight.

    Args:
        tensor: The weight, of any float type.
        channels: Which elements share a scale.
        rule: ``absmax`` maps the largest magnitude of a channel to ``limit``; ``mse`` takes
            of 21 clips from there down to 0.6 of it the one with the least squared error.
        limit: Largest integer.

    Returns:
        The scales; None if the weight holds NaN or infinity. A channel whose scale would be
        subnormal, which processors may flush to zero, gets 1, and its weights round to zero.
    """
    largest = absmax(tensor, channels)
    if not np.isfinite(largest).all():
        return None
    if rule == "mse":
        largest = largest * _best_clip(tensor, channels, largest, limit)
    return Grid(channels, _scale(largest, limit), limit, clips=rule == "mse")


def _scale(largest: np.ndarray, limit: int) -> np.ndarray:
    scale: np.ndarray = np.minimum(largest, _HIGHEST) / np.float32(limit)
    scale[scale < _NORMAL] = 1
    return scale


def _best_clip(
    tensor: ir.TensorProtocol, channels: Channels, largest: np.ndarray, limit: int
) -> np.ndarray:
    """The factor of the largest magnitude with the least squared error, by channel."""
    clips = np.array(_CLIPS, np.float32)
    scales = [_scale(largest * clip, limit) for clip in clips]
    errors = np.zeros((len(clips), *channels.grid))
    for piece, values in walk(tensor, channels):
        for scale, total in zip(scales, errors, strict=True):
            here = scale[piece.scale]
            levels = np.clip(np.rint(values / here), -limit, limit)
            lost = np.subtract(values, levels * here, dtype=np.float64)
            total[piece.scale] += np.square(lost).sum(axis=piece.along, keepdims=True)
    best: np.ndarray = clips[errors.argmin(axis=0)]
    return best


def loudness(tensor: ir.TensorProtocol, channels: Channels) -> Grid | None:
    """The root mean square of the weights that one input channel is multiplied with.

    Trained networks keep the weights of a loud input small. To divide by this before weights
    are rounded keeps the relative error of those weights that of all others.

    Args:
        tensor: The weight, of any float type.
        channels: Which elements share a scale; the first axis along which they do is that of
            the input channels.

    Returns:
        The root mean squares, to 8 significant bits, so that sums which differ in the last
        bit give the same on every processor; None where there is one input channel.
    """
    axis = channels.shared[0]
    if channels.shape[axis] == 1:
        return None
    inputs = Channels(
        channels.shape, tuple(i for i in range(len(channels.shape)) if i != axis)
    )
    total = np.zeros(inputs.grid)
    for piece, values in walk(tensor, inputs):
        squares = np.square(values, dtype=np.float64)
        total[piece.scale] += squares.sum(axis=piece.along, keepdims=True)
    mantissa, exponent = np.frexp(np.sqrt(total * channels.shape[axis] / tensor.size))
    rounded = np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)
    rounded[rounded < _NORMAL] = 1
    return Grid(inputs, rounded)


@dataclass(frozen=True)
class Rounding:
    """How far stored values are from the weight.

    Attributes:
        max_abs: Largest error.
        mean_abs: Mean of the absolute errors.
        p99_abs: 99th percentile of the absolute errors, to 0.4 % in large tensors.
    """

    max_abs: float
    mean_abs: float
    p99_abs: float

    def __str__(self) -> str:
        return f"max {self.max_abs:.2e}, mean {self.mean_abs:.2e}, p99 {self.p99_abs:.2e}"


def rounding(tensor: ir.TensorProtocol, grid: Grid) -> Rounding:
    """Compare a float32 weight with what its integers stand for."""
    total, order, largest = CompensatedSum(), Percentiles(_PERCENTILE_LIMIT), 0.0
    quantize, dequantize = Quantize(grid), Dequantize(grid)
    for piece, values in walk(tensor, Channels(grid.channels.shape, ())):
        flat = values.reshape(-1)
        levels, decoded = np.empty(flat.size, np.int8), np.empty(flat.size, np.float32)
        quantize(flat, levels, piece.start)
        dequantize(levels, decoded, piece.start)
        lost = np.abs(np.subtract(flat, decoded, dtype=np.float64))
        largest = max(largest, float(lost.max(initial=0)))
        total.add(float(lost.sum()))
        order.add(lost)
    return Rounding(largest, total.value / max(1, tensor.size), order.at(0.99))


def saturating_pairs(tensor: ir.TensorProtocol, grid: Grid) -> tuple[int, int]:
    """How many products of two can saturate, of how many.

    Processors without VNNI add the products of two neighbours along the summed axis in 16
    bits: 255 * (|a| + |b|) exceeds 32767 from |a| + |b| = 129 on.

    Args:
        tensor: The weight.
        grid: Its scales. None is counted where the axes that share one are not neighbours,
            as of a matrix that is transposed and reshaped from more axes.
    """
    if grid.channels.summed is None:
        return 0, 0
    outer, summed, inner = grid.channels.summed
    read = reader(DerivedTensor(tensor, ir.DataType.INT8, Quantize(grid)))
    over, levels, sums = 0, Scratch(), Scratch()
    for start, stop, rows in _whole_pairs(outer, summed, inner):
        content = levels.take(stop - start)
        read(start, content)
        np.abs(content.view(np.int8), out=content.view(np.int8))  # at most 127
        pairs = content.reshape(-1, rows, inner)
        even, odd = pairs[:, 0 : rows - 1 : 2], pairs[:, 1:rows:2]
        total = sums.take(even.size).reshape(even.shape)
        np.add(even, odd, out=total)
        np.greater(total, 128, out=total.view(np.bool_))
        over += int(np.count_nonzero(total))
    return over, outer * (summed // 2) * inner


def _whole_pairs(outer: int, summed: int, inner: int) -> Iterator[tuple[int, int, int]]:
    """Runs of elements that tear no pair apart, and the rows of each."""
    block = BLOCK_BYTES // 4
    slab = summed * inner
    if 0 < slab <= block:
        step = block // slab * slab
        for start in range(0, outer * slab, step):
            yield start, min(start + step, outer * slab), summed
        return
    rows = max(1, block // (2 * inner)) * 2 if inner else 2
    for base in range(0, outer * slab, slab or 1):
        for row in range(0, summed, rows):
            count = min(rows, summed - row)
            yield base + row * inner, base + (row + count) * inner, count
