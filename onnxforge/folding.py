"""Dividing the channels of a value where it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxforge.lazy import DerivedTensor
from onnxforge.numerics.channels import Channels
from onnxforge.numerics.int8 import Dequantize, Divide, Grid
from onnxforge.surgery import Surgery
from onnxforge.walk import input_of
from onnxforge.weights import Weight, Weights

__all__ = ["Fold", "Place", "fold", "scale_weight"]

_REAL = ir.DataType.FLOAT
_Uses = Collection[tuple[ir.Node, int]]


@dataclass(frozen=True)
class Place:
    """Where the channels of a value are.

    Attributes:
        axis: Their axis, counted from the end: negative.
        count: How many there are.
        size: Length of the axis: more than these where they are split off it.
        start: Where they start along it.
    """

    axis: int
    count: int
    size: int
    start: int = 0

    def spread(self, factors: np.ndarray) -> np.ndarray:
        """Factors for the whole axis."""
        found = np.ones(self.size, np.float32)
        found[self.start : self.start + self.count] = factors
        return found


@dataclass(frozen=True)
class _Edit:
    """A constant that has to change: channels are divided or multiplied.

    Attributes:
        node: Who reads it.
        index: At which input.
        axis: Of the channels in the constant, from 0; None for one element, which gets
            channels.
        place: Of the channels in the output of the node.
        multiply: Multiply instead.
        positive: Behind it is what only positive factors pass.
    """

    node: ir.Node
    index: int
    axis: int | None
    place: Place
    multiply: bool = False
    positive: bool = False


@dataclass(frozen=True)
class Fold:
    """How a division can be left to what makes a value.

    Attributes:
        where: The nodes whose constants change, the first to run last.
        edits: The changes.
    """

    where: tuple[str, ...]
    edits: tuple[_Edit, ...]

    def weights(self, weights: Weights) -> list[Weight]:
        """The constants that change."""
        found = [weights.of(edit.node.inputs[edit.index]) for edit in self.edits]
        return [weight for weight in found if weight is not None]

    def suits(self, factors: np.ndarray) -> bool:
        """Whether the division by these factors can be left to them."""
        return bool((factors > 0).all()) or not any(edit.positive for edit in self.edits)

    def apply(self, factors: np.ndarray, surgery: Surgery) -> None:
        """Divide by float32 factors, one for each channel."""
        for edit in self.edits:
            _apply(edit, factors, surgery)


def fold(value: ir.Value, uses: _Uses, place: Place, weights: Weights) -> Fold | None:
    """Find out whether the channels of a value can be divided at its maker.

    That is at a norm, at a Mul, Div, Add or Sub with a constant, at a MatMul, Gemm or Conv
    with a weight, also through Identity, Relu and what moves channels as a whole: Transpose,
    Reshape, Squeeze, Unsqueeze, Flatten, Split; not if anyone else reads the value.

    Args:
        value: The value.
        uses: Its readers that count on the division.
        place: Where its channels are.
        weights: The weights of the model.
    """
    edits = _edits(value, uses, place, weights)
    if edits is None:
        return None
    return Fold(
        tuple(dict.fromkeys(e.node.name or e.node.op_type for e in edits)), tuple(edits)
    )


def _edits(value: ir.Value, uses: _Uses, place: Place, weights: Weights) -> list[_Edit] | None:
    node = value.producer()
    if node is None or node.domain or node.graph is not weights.model.graph:
        return None
    if weights.is_output(value) or {(n, i) for n, i in value.uses()} - set(uses):
        return None
    if value.shape is not None:
        if value.shape.rank() < -place.axis:
            return None
        if value.shape[place.axis] != place.size and isinstance(value.shape[place.axis], int):
            return None
    if value.index() != 0 and node.op_type != "Split":
        return None
    rule = _RULES.get(node.op_type)
    return None if rule is None else rule(value, place, weights)


def _input(node: ir.Node, index: int, place: Place, weights: Weights) -> list[_Edit] | None:
    value = node.inputs[index]
    return None if value is None else _edits(value, {(node, index)}, place, weights)


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, "rules are for values that a node makes"
    return node


def _constant(node: ir.Node, index: int, weights: Weights) -> Weight | None:
    """A float32 constant that may change."""
    weight = weights.of(input_of(node, index))
    if weight is None or weight.dtype != _REAL or weight.is_overridable or weight.is_output:
        return None
    return None if weight.is_needed_constant else weight


def _shape(weight: Weight) -> tuple[int, ...]:
    return tuple(weight.tensor.shape.numpy())


# --- what moves channels -------------------------------------------------------------------


def _straight(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    return _input(_maker(value), 0, place, weights)


def _relu(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    found = _input(_maker(value), 0, place, weights)
    return None if found is None else [replace(edit, positive=True) for edit in found]


def _transposed(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    node = _maker(value)
    perm = node.attributes.get("perm")
    if perm is None or perm.is_ref():
        return None
    order = list(perm.as_ints())
    moved = replace(place, axis=order[place.axis] - len(order))
    return _input(node, 0, moved, weights)


def _reshaped(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Where the axis is still there: of its length, with as much before or behind it."""
    node = _maker(value)
    before = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    if before is None or value.shape is None:
        return None
    old, new = list(before), list(value.shape)
    at = len(new) + place.axis
    for i, length in enumerate(old):
        ahead = _elements(old[:i]), _elements(new[:at])
        behind = _elements(old[i + 1 :]), _elements(new[at + 1 :])
        if length == new[at] == place.size and (
            (ahead[0] == ahead[1] is not None) or (behind[0] == behind[1] is not None)
        ):
            return _input(node, 0, replace(place, axis=i - len(old)), weights)
    return None


def _elements(dims: Sequence[int | ir.SymbolicDim]) -> tuple[int, list[str]] | None:
    """How many elements axes have: a number, times axes known by name; None if unknown."""
    number = math.prod(dim for dim in dims if isinstance(dim, int))
    names = [dim.value for dim in dims if not isinstance(dim, int)]
    known = [name for name in names if name is not None]
    return (number, sorted(known)) if len(known) == len(names) and number else None


def _split(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Some channels of an axis; the others stay as they are."""
    node = _maker(value)
    axis, rank = node.attributes.get("axis"), value.shape.rank() if value.shape else None
    if rank is None or (axis is not None and axis.is_ref()):
        return None
    along = axis.as_int() if axis is not None else 0
    if (along if along < 0 else along - rank) != place.axis:
        return None
    lengths = [o.shape[place.axis] if o.shape is not None else None for o in node.outputs]
    known = [length for length in lengths if isinstance(length, int)]
    if len(known) != len(lengths):
        return None
    start = sum(known[: value.index() or 0]) + place.start
    return _input(node, 0, replace(place, size=sum(known), start=start), weights)


# --- what makes them -----------------------------------------------------------------------


def _by_channel(
    node: ir.Node, index: int, place: Place, weights: Weights, *, multiply: bool = False
) -> _Edit | None:
    """The change of a constant that broadcasts against the channels."""
    weight = _constant(node, index, weights)
    if weight is None:
        return None
    shape = _shape(weight)
    axis = len(shape) + place.axis
    if weight.tensor.size == 1 and (axis < 0 or place.size > 1):
        return _Edit(node, index, None, place, multiply)
    fits = axis >= 0 and shape[axis] == place.size
    return _Edit(node, index, axis, place, multiply) if fits else None


def _product(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Mul with a constant on either side, Div by one.

    Behind one element it is the other operand that is divided: runtimes know GELU and others
    by their single numbers, and fuse nothing where a number became a vector.
    """
    node = _maker(value)
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        edit = _by_channel(node, index, place, weights, multiply=node.op_type == "Div")
        if edit is not None:
            return _input(node, 1 - index, place, weights) if edit.axis is None else [edit]
    return None


def _sum(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Add or Sub with a constant: both operands are divided."""
    node = _maker(value)
    for index in (1, 0):
        edit = _by_channel(node, index, place, weights)
        rest = _input(node, 1 - index, place, weights) if edit is not None else None
        if edit is not None and rest is not None:
            return [edit, *rest]
    return None


def _norm(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Scale and bias of a norm over the last axis."""
    node = _maker(value)
    axis = node.attributes.get("axis")
    rank = value.shape.rank() if value.shape is not None else None
    if axis is not None and (axis.is_ref() or axis.as_int() not in (-1, (rank or 0) - 1)):
        return None
    return _scale_and_bias(node, place, weights) if place.axis == -1 else None


def _batch_norm(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Scale and bias of a norm that has them for axis 1."""
    node = _maker(value)
    training = node.attributes.get("training_mode")
    if value.shape is None or value.shape.rank() + place.axis != 1:
        return None
    if len(node.outputs) > 1 or (training is not None and training.as_int() != 0):
        return None
    return _scale_and_bias(node, replace(place, axis=-1), weights)


def _scale_and_bias(node: ir.Node, place: Place, weights: Weights) -> list[_Edit] | None:
    present = [i for i in (1, 2) if i < len(node.inputs) and node.inputs[i] is not None]
    found = [_by_channel(node, i, place, weights) for i in present]
    edits = [edit for edit in found if edit is not None and edit.axis is not None]
    return edits if present[:1] == [1] and len(edits) == len(found) else None


def _matmul(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Columns of the weight on the right, or rows of the one on the left."""
    node, index = _maker(value), {-1: 1, -2: 0}.get(place.axis)
    other = node.inputs[1]
    if index is None or other is None:
        return None
    if index == 0 and (other.shape is None or other.shape.rank() < 2):
        return None  # of a vector, the result has one axis less
    return _outputs(node, index, place, weights, axis=place.axis, rank=2)


def _gemm(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Columns of the weight, and the bias."""
    node = _maker(value)
    flag = node.attributes.get("transB")
    if place.axis != -1 or (flag is not None and flag.is_ref()):
        return None
    turned = flag is not None and flag.as_int() == 1
    return _outputs(node, 1, place, weights, axis=-2 if turned else -1, rank=2)


def _conv(value: ir.Value, place: Place, weights: Weights) -> list[_Edit] | None:
    """Filters, and the bias."""
    weight = _constant(_maker(value), 1, weights)
    rank = 0 if weight is None else len(_shape(weight))
    if rank + place.axis != 1:
        return None
    return _outputs(_maker(value), 1, place, weights, axis=-rank, rank=3)


def _outputs(
    node: ir.Node, index: int, place: Place, weights: Weights, *, axis: int, rank: int
) -> list[_Edit] | None:
    """The outputs of a product: its weight along an axis, and its bias if it has one."""
    weight = _constant(node, index, weights)
    if weight is None or len(weight.uses) != 1:
        return None
    shape = _shape(weight)
    if len(shape) < rank or shape[axis] != place.size:
        return None
    edits: list[_Edit | None] = [_Edit(node, index, len(shape) + axis, place)]
    if node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None:
        edits.append(_by_channel(node, 2, replace(place, axis=-1), weights))
    found = [edit for edit in edits if edit is not None]
    return found if len(found) == len(edits) else None


_Rule = Callable[[ir.Value, Place, Weights], "list[_Edit] | None"]
_RULES: Mapping[str, _Rule] = {
    "Add": _sum,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Div": _product,
    "Flatten": _reshaped,
    "Gemm": _gemm,
    "Identity": _straight,
    "InstanceNormalization": _batch_norm,
    "LayerNormalization": _norm,
    "MatMul": _matmul,
    "Mul": _product,
    "RMSNormalization": _norm,
    "Relu": _relu,
    "Reshape": _reshaped,
    "Split": _split,
    "Squeeze": _reshaped,
    "Sub": _sum,
    "Transpose": _transposed,
    "Unsqueeze": _reshaped,
}


def scale_weight(weight: Weight, channels: Channels, factors: np.ndarray) -> None:
    """Multiply a float32 weight, lazily, by float32 factors along the axes not shared."""
    grid = Grid(channels, factors.reshape(channels.grid))
    weight.store(DerivedTensor(weight.tensor, _REAL, Dequantize(grid)))


def _apply(edit: _Edit, factors: np.ndarray, surgery: Surgery) -> None:
    value = edit.node.inputs[edit.index]
    weight = surgery.weights.of(value)
    assert weight is not None, "what is changed is a constant"
    assert weight.value is not None, "what is changed is a value"
    shape, factors = _shape(weight), edit.place.spread(factors)
    if edit.axis is not None and len(weight.uses) == 1:
        channels = Channels(shape, tuple(i for i in range(len(shape)) if i != edit.axis))
        grid = Grid(channels, factors.reshape(channels.grid))
        kernel = Dequantize(grid) if edit.multiply else Divide(grid)
        weight.store(DerivedTensor(weight.tensor, _REAL, kernel))
        return
    behind = -edit.place.axis - 1 if edit.axis is None else len(shape) - 1 - edit.axis
    wide = factors.reshape(-1, *[1] * behind)
    content = weight.tensor.numpy()
    changed = content * wide if edit.multiply else content / wide
    name = f"{weight.value.name}_smoothed"
    constant = surgery.constant(weight, name, changed.astype(np.float32))
    edit.node.replace_input_with(edit.index, constant)
    surgery.retire(weight.value)
