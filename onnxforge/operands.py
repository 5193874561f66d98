"""Constant operands of products, traced to the tensors that are stored for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxforge.numerics.channels import Channels
from onnxforge.walk import input_of
from onnxforge.weights import Weight, Weights

__all__ = ["PRODUCTS", "Operand", "channel_axes", "ends", "trace", "weight_channels"]

PRODUCTS = ("MatMul", "Gemm", "Conv")
"""The operators whose constant operand can be multiplied as integers."""

_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_Shape = tuple[int, ...]
_Axes = frozenset[int]


@dataclass(frozen=True)
class Operand:
    """A constant that a node reads, perhaps through nodes that only move its elements.

    Attributes:
        node: Who reads it.
        index: At which input.
        weight: The tensor that is stored.
        path: The nodes between, from the stored tensor on: Identity, Transpose, Reshape,
            Squeeze, Unsqueeze, and Cast from half precision.
        shapes: Shape of the stored tensor and behind each node of the path.
        scale: The scale of a weight that is stored as int8 and multiplied with it.
        restored: The Cast and the Mul that do so.
    """

    node: ir.Node
    index: int
    weight: Weight
    path: tuple[ir.Node, ...]
    shapes: tuple[_Shape, ...]
    scale: Weight | None = None
    restored: tuple[ir.Node, ...] = ()

    @property
    def shape(self) -> _Shape:
        """Shape that the node sees."""
        return self.shapes[-1]

    def array(self) -> np.ndarray:
        """All values, in memory, as the node sees them."""
        found = self.weight.tensor.numpy()
        for node, shape in zip(self.path, self.shapes[1:], strict=True):
            if node.op_type == "Transpose":
                found = found.transpose(_order(node, found.ndim))
            found = found.reshape(shape)
        return found

    def channels(self, shared: Iterable[int]) -> Channels | None:
        """Which elements of the stored tensor share a scale, if those of the operand do.

        Args:
            shared: The axes of the operand along which they share a scale.

        Returns:
            The same for the stored tensor; None if a Reshape tears an axis, or if there are
            about as many scales as elements.
        """
        steps = self._shared(frozenset(shared))
        if steps is None:
            return None
        found = Channels(self.shapes[0], tuple(sorted(steps[0])))
        return found if found.is_worthwhile else None

    def seen(self, scales: np.ndarray, shared: Iterable[int]) -> np.ndarray:
        """Scales of the stored tensor as those of the operand, both in shapes that broadcast.

        Args:
            scales: Of ``scale_shape`` of `channels`.
            shared: The axes of the operand along which elements share a scale.
        """
        steps = self._shared(frozenset(shared)) or ()
        for node, shape, axes in zip(self.path, self.shapes[1:], steps[1:], strict=True):
            if node.op_type == "Transpose":
                scales = scales.transpose(_order(node, scales.ndim))
            scales = scales.reshape([1 if i in axes else n for i, n in enumerate(shape)])
        return scales

    def _shared(self, axes: _Axes) -> list[_Axes] | None:
        """The axes that share a scale, of the stored tensor and behind each node."""
        if not math.prod(self.shape):
            return None
        steps = [axes]
        pairs = list(itertools.pairwise(self.shapes))
        for node, (before, after) in zip(reversed(self.path), reversed(pairs), strict=True):
            if node.op_type == "Transpose":
                order = _order(node, len(before))
                steps.append(frozenset(order[i] for i in steps[-1]))
            elif (back := _through_reshape(before, after, steps[-1])) is not None:
                steps.append(back)
            else:
                return None
        return steps[::-1]


def trace(reader: ir.Node, index: int, weights: Weights) -> Operand | None:
    """The constant that a node reads at an input, None if it is computed when the model runs.

    Looks through what only moves elements, widens half precision to float32, or multiplies an
    int8 weight with its scale.
    """
    value = input_of(reader, index)
    path: list[ir.Node] = []
    scale: Weight | None = None
    restored: tuple[ir.Node, ...] = ()
    while value is not None and (weight := weights.of(value)) is None:
        node = value.producer()
        if node is None or node.domain:
            return None
        if node.op_type == "Mul" and scale is None and (pair := _scaled(node, weights)):
            weight, scale, restored = pair
            break
        if node.op_type not in _MOVES:
            return None
        path.insert(0, node)
        value = node.inputs[0] if node.inputs else None
    if value is None or weight is None:
        return None
    shapes = _shapes(weight, path, weights)
    if shapes is None:
        return None
    return Operand(reader, index, weight, tuple(path), shapes, scale, restored)


def _scaled(
    node: ir.Node, weights: Weights
) -> tuple[Weight, Weight, tuple[ir.Node, ...]] | None:
    """The int8 weight and its scale that a Mul restores a float32 weight from, and how."""
    if len(node.inputs) != 2 or node.inputs[0] is None:
        return None
    cast, scale = node.inputs[0].producer(), weights.of(node.inputs[1])
    if cast is None or cast.op_type != "Cast" or cast.domain or len(cast.inputs) != 1:
        return None
    weight = weights.of(cast.inputs[0])
    if weight is None or scale is None or weight.dtype != ir.DataType.INT8:
        return None
    relied_on = scale.dtype == ir.DataType.FLOAT and not scale.is_overridable
    return (weight, scale, (cast, node)) if relied_on else None


def _shapes(
    weight: Weight, path: Iterable[ir.Node], weights: Weights
) -> tuple[_Shape, ...] | None:
    shapes = [tuple(weight.tensor.shape.numpy())]
    for node in path:
        shape = _MOVES[node.op_type](node, shapes[-1], weights)
        if shape is None or math.prod(shape) != math.prod(shapes[-1]):
            return None
        shapes.append(shape)
    return tuple(shapes)


def _same(node: ir.Node, shape: _Shape, weights: Weights) -> _Shape:
    return shape


def _cast(node: ir.Node, shape: _Shape, weights: Weights) -> _Shape | None:
    """Casts that lose nothing: of half precision, or of float32 to itself."""
    target = node.attributes.get("to")
    if target is None or target.is_ref() or target.as_int() != ir.DataType.FLOAT:
        return None
    weight = weights.behind(node.inputs[0])
    narrow = weight is not None and weight.weight.dtype in (*_HALVES, ir.DataType.FLOAT)
    return shape if narrow else None


def _transposed(node: ir.Node, shape: _Shape, weights: Weights) -> _Shape | None:
    order = _order(node, len(shape))
    fits = sorted(order) == list(range(len(shape)))
    return tuple(shape[i] for i in order) if fits else None


def _order(node: ir.Node, rank: int) -> tuple[int, ...]:
    perm = node.attributes.get("perm")
    if perm is None:
        return tuple(reversed(range(rank)))
    return () if perm.is_ref() else tuple(perm.as_ints())


def _reshaped(node: ir.Node, shape: _Shape, weights: Weights) -> _Shape | None:
    wanted = _numbers(node, "shape", weights)
    if wanted is None:
        return None
    keeps_zero = node.attributes.get("allowzero")
    if keeps_zero is None or keeps_zero.value == 0:
        wanted = [shape[i] if n == 0 and i < len(shape) else n for i, n in enumerate(wanted)]
    known = math.prod(n for n in wanted if n >= 0)
    rest = math.prod(shape) // known if known else 0
    return tuple(rest if n < 0 else n for n in wanted)


def _squeezed(node: ir.Node, shape: _Shape, weights: Weights) -> _Shape | None:
    if not any(node.inputs[1:]) and "axes" not in node.attributes:
        return tuple(n for n in shape if n != 1)
    axes = _numbers(node, "axes", weights)
    if axes is None:
        return None
    gone = {axis % max(1, len(shape)) for axis in axes}
    return tuple(n for i, n in enumerate(shape) if i not in gone)


def _unsqueezed(node: ir.Node, shape: _Shape, weights: Weights) -> _Shape | None:
    axes = _numbers(node, "axes", weights)
    if axes is None:
        return None
    rank, old = len(shape) + len(axes), iter(shape)
    new = {axis % rank for axis in axes}
    if len(new) != len(axes):
        return None
    return tuple(1 if i in new else next(old) for i in range(rank))


_MOVES: Mapping[str, Callable[[ir.Node, _Shape, Weights], _Shape | None]] = {
    "Cast": _cast,
    "Identity": _same,
    "Reshape": _reshaped,
    "Squeeze": _squeezed,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}


def _numbers(node: ir.Node, name: str, weights: Weights) -> list[int] | None:
    """A list of numbers that is an attribute in old opsets and an input in new ones."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return None if attribute.is_ref() else [int(n) for n in attribute.as_ints()]
    found = weights.of(input_of(node, 1))
    if found is None or found.is_overridable:
        return None
    return [int(n) for n in found.tensor.numpy().reshape(-1)]


def _through_reshape(before: _Shape, after: _Shape, axes: _Axes) -> _Axes | None:
    """Axes of a shape that hold the elements of axes of its reshaped form."""
    found: set[int] = set()
    for ours, theirs in _matching(before, after):
        kinds = {i in axes for i in theirs if after[i] != 1}
        if len(kinds) > 1:
            return None
        if True in kinds:
            found.update(ours)
    return frozenset(found)


def _matching(before: _Shape, after: _Shape) -> Iterable[tuple[list[int], list[int]]]:
    """The finest runs of axes of two shapes that hold the same elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        ours: list[int] = []
        theirs: list[int] = []
        left = right = 1
        while left != right or not (ours or theirs):
            if j >= len(after) or (left <= right and i < len(before)):
                ours.append(i)
                left *= before[i]
                i += 1
            else:
                theirs.append(j)
                right *= after[j]
                j += 1
        yield ours, theirs


def channel_axes(node: ir.Node, index: int, rank: int) -> tuple[int, ...] | None:
    """The axes of a constant operand that share a scale: those that its reader sums over.

    Args:
        node: The reader.
        index: At which input it reads.
        rank: Number of axes of the operand.

    Returns:
        The axes; None if the operator or the input is none that sums over axes of a weight.
    """
    summed = None if node.domain else _SUMMED.get((node.op_type, index))
    if summed is None or rank < 2 or any(a.is_ref() for a in node.attributes.values()):
        return None
    return tuple(summed(node, rank))


def _but(axis: int, rank: int) -> Iterable[int]:
    return (i for i in range(rank) if i != axis % rank)


_SUMMED: Mapping[tuple[str, int], Callable[[ir.Node, int], Iterable[int]]] = {
    ("MatMul", 0): lambda node, rank: [rank - 1],
    ("MatMul", 1): lambda node, rank: [rank - 2],
    ("Gemm", 0): lambda node, rank: [0 if node.attributes.get_int("transA", 0) else 1],
    ("Gemm", 1): lambda node, rank: [1 if node.attributes.get_int("transB", 0) else 0],
    ("Conv", 1): lambda node, rank: _but(0, rank),
    ("ConvTranspose", 1): lambda node, rank: _but(1, rank),
    ("Gather", 0): lambda node, rank: _but(node.attributes.get_int("axis", 0), rank),
    **{(op, i): lambda node, rank: [2] for op in ("GRU", "LSTM", "RNN") for i in (1, 2)},
}


def ends(weight: Weight, weights: Weights) -> list[tuple[ir.Node, int] | None]:
    """Who reads a weight in the end, behind what `trace` looks through.

    Returns:
        Nodes and inputs; None stands for a graph output.
    """
    found: list[tuple[ir.Node, int] | None] = []
    waiting = [weight.value]
    for value in waiting:
        if value is None:
            continue
        if weights.is_output(value):
            found.append(None)
        for node, index in value.uses():
            if index == 0 and not node.domain and _goes_on(node, weights):
                waiting.append(node.outputs[0])
            else:
                found.append((node, index))
    return found


def _goes_on(node: ir.Node, weights: Weights) -> bool:
    if node.op_type == "Mul":
        return _scaled(node, weights) is not None
    if node.op_type == "Cast":
        source = weights.of(node.inputs[0])
        stored = source is not None and source.dtype == ir.DataType.INT8
        return stored or _cast(node, (), weights) is not None
    return node.op_type in _MOVES


def weight_channels(weight: Weight, weights: Weights) -> Channels | None:
    """The channels that the first of its readers sees that sums over some axes of it."""
    for node, index in filter(None, ends(weight, weights)):
        operand = trace(node, index, weights)
        axes = operand and channel_axes(node, index, len(operand.shape))
        if operand and axes and (found := operand.channels(axes)):
            return found
    return None
