"""Weights stored as int8 with scales, and multiplied as float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxforge.lazy import DerivedTensor
from onnxforge.numerics.channels import Channels
from onnxforge.numerics.int8 import (
    Dequantize,
    Divide,
    Grid,
    Quantize,
    ScaleRule,
    choose,
    loudness,
)
from onnxforge.surgery import Surgery
from onnxforge.weights import Use, Weight
from onnxforge.widening import widen

__all__ = ["Storage", "is_of_rows", "plan", "store"]

_REAL = ir.DataType.FLOAT


@dataclass(frozen=True)
class Storage:
    """How a weight is to be stored.

    Attributes:
        grid: Its integers and their scales.
        inputs: A second scale, for each input channel, or None.
    """

    grid: Grid
    inputs: Grid | None = None


def plan(
    weight: Weight, channels: Channels, rule: ScaleRule, *, input_scales: bool
) -> Storage | None:
    """Find the scales of a weight.

    Args:
        weight: The weight.
        channels: Which elements share a scale.
        rule: See `choose`.
        input_scales: Also a scale for each input channel, but for tables of which rows are
            taken: those are multiplied each time.

    Returns:
        How to store it; None if it holds NaN or infinity.
    """
    tensor, inputs = weight.tensor, None
    if input_scales and not any(is_of_rows(use) for use in weight.uses):
        inputs = loudness(tensor, channels)
    if inputs is not None:
        tensor = DerivedTensor(tensor, _REAL, Divide(inputs))
    grid = choose(tensor, channels, rule)
    return None if grid is None else Storage(grid, inputs)


def store(weight: Weight, storage: Storage, surgery: Surgery) -> ir.TensorProtocol:
    """Store a float32 weight as int8; its readers get integer times scale.

    Args:
        weight: The weight.
        storage: Its scales.
        surgery: Adds scales and nodes.

    Returns:
        What the stored values stand for, float32.
    """
    assert weight.value is not None, "a stored weight is a value"
    name, grid, inputs = weight.value.name, storage.grid, storage.inputs
    scales = [surgery.constant(weight, f"{name}_scale", grid.scales)]
    source = weight.tensor
    if inputs is not None:
        scales.append(surgery.constant(weight, f"{name}_input_scale", inputs.scales))
        source = DerivedTensor(source, _REAL, Divide(inputs))
    stored = DerivedTensor(source, ir.DataType.INT8, Quantize(grid))
    weight.store(stored)
    widen(weight, _Scaled(tuple(scales)), surgery)
    decoded = DerivedTensor(stored, _REAL, Dequantize(grid))
    return decoded if inputs is None else DerivedTensor(decoded, _REAL, Dequantize(inputs))


def is_of_rows(use: Use) -> bool:
    """Whether a use takes slices of the first axis of a table, which may share a scale."""
    node = use.node
    axis = node.attributes.get("axis")
    shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    zeros = (0,) if shape is None else (0, -shape.rank())
    first = axis is None or (not axis.is_ref() and axis.as_int() in zeros)
    return node.op_type == "Gather" and not node.domain and use.index == 0 and first


@dataclass(frozen=True)
class _Scaled:
    """int8 for float32: a Cast and a Mul, of the gathered rows where each has a scale."""

    scales: tuple[ir.Value, ...]
    word = "int8w"
    dtype = ir.DataType.INT8

    def is_behind(self, use: Use) -> bool:
        shape = self.scales[0].shape
        assert shape is not None, "a constant has a shape"
        return is_of_rows(use) and all(n == 1 for n in shape.numpy()[1:])

    def whole(self, stored: ir.Value, output: str, surgery: Surgery) -> list[ir.Node]:
        return _times(stored, self.scales, output, surgery)

    def taken(self, reader: ir.Node, output: str, surgery: Surgery) -> list[ir.Node]:
        rows, indices = reader.outputs[0], reader.inputs[1]
        name = surgery.weights.unique(f"{output}_row_scale")
        scale = surgery.node("Gather", [self.scales[0], indices], name, _REAL)
        return [scale, *_times(rows, scale.outputs, output, surgery)]


def _times(
    integers: ir.Value, scales: Sequence[ir.Value], output: str, surgery: Surgery
) -> list[ir.Node]:
    """Cast integers and multiply them with one scale after the other."""
    unique = surgery.weights.unique
    nodes = [surgery.node("Cast", [integers], unique(f"{output}_cast"), _REAL, {"to": _REAL})]
    for scale in scales:
        name = output if scale is scales[-1] else unique(f"{output}_channels")
        nodes.append(surgery.node("Mul", [nodes[-1].outputs[0], scale], name, _REAL))
    for node in nodes:
        node.outputs[0].shape = None if integers.shape is None else integers.shape.copy()
    return nodes
