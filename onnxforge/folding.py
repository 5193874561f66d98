"""Dividing the channels of a value where it is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxforge.lazy import DerivedTensor
from onnxforge.numerics.channels import Channels
from onnxforge.numerics.int8 import Dequantize, Divide, Grid
from onnxforge.surgery import Surgery
from onnxforge.weights import Weight, Weights

__all__ = ["Fold", "fold", "scale_weight"]

_REAL = ir.DataType.FLOAT
_Uses = Collection[tuple[ir.Node, int]]


@dataclass(frozen=True)
class _Edit:
    """A constant that has to change: channels along an axis are divided or multiplied.

    Attributes:
        node: Who reads it.
        index: At which input.
        axis: Of the channels; None for a constant of one element, which gets channels.
        multiply: Multiply instead.
    """

    node: ir.Node
    index: int
    axis: int | None
    multiply: bool = False


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

    def apply(self, factors: np.ndarray, surgery: Surgery) -> None:
        """Divide by float32 factors, one for each channel."""
        for edit in self.edits:
            _apply(edit, factors, surgery)


def fold(value: ir.Value, uses: _Uses, channels: int, weights: Weights) -> Fold | None:
    """Find out whether the channels of a value, its last axis, can be divided at its maker.

    That is at a LayerNormalization, at a Mul, Div, Add or Sub with a constant, at a MatMul or
    Gemm with a weight, also through Identity and Relu; not if anyone else reads the value.

    Args:
        value: The value.
        uses: Its readers that count on the division.
        channels: How many channels there are.
        weights: The weights of the model.
    """
    edits = _edits(value, uses, channels, weights)
    if edits is None:
        return None
    return Fold(
        tuple(dict.fromkeys(e.node.name or e.node.op_type for e in edits)), tuple(edits)
    )


def _edits(
    value: ir.Value, uses: _Uses, channels: int, weights: Weights
) -> list[_Edit] | None:
    node = value.producer()
    if node is None or node.domain or node.graph is not weights.model.graph:
        return None
    if weights.is_output(value) or {(n, i) for n, i in value.uses()} - set(uses):
        return None
    last = value.shape[-1] if value.shape is not None and value.shape.rank() else None
    if value.index() != 0 or (isinstance(last, int) and last != channels):
        return None
    rule = _RULES.get(node.op_type)
    return None if rule is None else rule(node, channels, weights)


def _input(node: ir.Node, index: int, channels: int, weights: Weights) -> list[_Edit] | None:
    value = node.inputs[index]
    return None if value is None else _edits(value, {(node, index)}, channels, weights)


def _constant(node: ir.Node, index: int, weights: Weights) -> Weight | None:
    """A float32 constant that may change."""
    value = node.inputs[index] if index < len(node.inputs) else None
    weight = weights.of(value)
    if weight is None or weight.dtype != _REAL or weight.is_overridable or weight.is_output:
        return None
    return None if weight.is_needed_constant else weight


def _by_channel(
    node: ir.Node, index: int, channels: int, weights: Weights, *, multiply: bool = False
) -> _Edit | None:
    """The change of a constant that broadcasts against the channels."""
    weight = _constant(node, index, weights)
    if weight is None:
        return None
    shape = tuple(weight.tensor.shape.numpy())
    if weight.tensor.size == 1 and len(shape) <= 1:
        return _Edit(node, index, None, multiply)
    fits = bool(shape) and shape[-1] == channels
    return _Edit(node, index, len(shape) - 1, multiply) if fits else None


def _straight(node: ir.Node, channels: int, weights: Weights) -> list[_Edit] | None:
    return _input(node, 0, channels, weights)


def _product(node: ir.Node, channels: int, weights: Weights) -> list[_Edit] | None:
    """Mul with a constant on either side, Div by one."""
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        edit = _by_channel(node, index, channels, weights, multiply=node.op_type == "Div")
        if edit is not None:
            return [edit]
    return None


def _sum(node: ir.Node, channels: int, weights: Weights) -> list[_Edit] | None:
    """Add or Sub with a constant: both operands are divided."""
    for index in (1, 0):
        edit = _by_channel(node, index, channels, weights)
        rest = _input(node, 1 - index, channels, weights) if edit is not None else None
        if edit is not None and rest is not None:
            return [edit, *rest]
    return None


def _norm(node: ir.Node, channels: int, weights: Weights) -> list[_Edit] | None:
    """Scale and bias of a norm over the last axis."""
    axis = node.attributes.get("axis")
    rank = node.outputs[0].shape.rank() if node.outputs[0].shape is not None else None
    if axis is not None and (axis.is_ref() or axis.as_int() not in (-1, (rank or 0) - 1)):
        return None
    present = [i for i in (1, 2) if i < len(node.inputs) and node.inputs[i] is not None]
    found = [_by_channel(node, i, channels, weights) for i in present]
    edits = [edit for edit in found if edit is not None and edit.axis is not None]
    return edits if present[:1] == [1] and len(edits) == len(found) else None


def _linear(node: ir.Node, channels: int, weights: Weights) -> list[_Edit] | None:
    """The outputs of a MatMul or Gemm: columns of its weight, and bias."""
    weight = _constant(node, 1, weights)
    if weight is None or len(weight.uses) != 1:
        return None
    shape = tuple(weight.tensor.shape.numpy())
    axis = len(shape) - 1
    if node.op_type == "Gemm":
        flag = node.attributes.get("transB")
        if flag is not None and flag.is_ref():
            return None
        axis = 0 if flag is not None and flag.as_int() == 1 else 1
    if len(shape) < 2 or shape[axis] != channels:
        return None
    edits = [_Edit(node, 1, axis)]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _by_channel(node, 2, channels, weights)
        if bias is None:
            return None
        edits.append(bias)
    return edits


_Rule = Callable[[ir.Node, int, Weights], "list[_Edit] | None"]
_RULES: Mapping[str, _Rule] = {
    "Add": _sum,
    "Div": _product,
    "Gemm": _linear,
    "Identity": _straight,
    "LayerNormalization": _norm,
    "MatMul": _linear,
    "Mul": _product,
    "RMSNormalization": _norm,
    "Relu": _straight,
    "Sub": _sum,
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
    shape = tuple(weight.tensor.shape.numpy())
    if edit.axis is not None and len(weight.uses) == 1:
        shared = tuple(i for i in range(len(shape)) if i != edit.axis)
        grid = Grid(Channels(shape, shared), factors.reshape(Channels(shape, shared).grid))
        kernel = Dequantize(grid) if edit.multiply else Divide(grid)
        weight.store(DerivedTensor(weight.tensor, _REAL, kernel))
        return
    content = weight.tensor.numpy()
    wide = (
        factors
        if edit.axis is None
        else factors.reshape([-1 if i == edit.axis else 1 for i in range(len(shape))])
    )
    changed = content * wide if edit.multiply else content / wide
    name = f"{weight.value.name}_smoothed"
    constant = surgery.constant(weight, name, changed.astype(np.float32))
    edit.node.replace_input_with(edit.index, constant)
