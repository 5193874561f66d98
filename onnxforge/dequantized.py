"""Weights stored as int8 with a scale for each channel, and multiplied as float32."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxforge.lazy import DerivedTensor
from onnxforge.numerics.int8 import Dequantize, Grid, Quantize
from onnxforge.surgery import Surgery
from onnxforge.weights import Use, Weight
from onnxforge.widening import widen

__all__ = ["is_of_rows", "store"]

_REAL = ir.DataType.FLOAT


def store(weight: Weight, grid: Grid, surgery: Surgery) -> ir.TensorProtocol:
    """Store a float32 weight as int8; its readers get integer times scale.

    Args:
        weight: The weight.
        grid: Its scales.
        surgery: Adds scales and nodes.

    Returns:
        What the stored values stand for, float32.
    """
    assert weight.value is not None, "a stored weight is a value"
    stored = DerivedTensor(weight.tensor, ir.DataType.INT8, Quantize(grid))
    scale = surgery.constant(weight, f"{weight.value.name}_scale", grid.scales)
    weight.store(stored)
    widen(weight, _Scaled(scale), surgery)
    return DerivedTensor(stored, _REAL, Dequantize(grid))


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

    scale: ir.Value
    word = "int8w"
    dtype = ir.DataType.INT8

    def is_behind(self, use: Use) -> bool:
        assert self.scale.shape is not None, "a constant has a shape"
        return is_of_rows(use) and all(n == 1 for n in self.scale.shape.numpy()[1:])

    def whole(self, stored: ir.Value, output: str, surgery: Surgery) -> list[ir.Node]:
        return _times(stored, self.scale, output, surgery)

    def taken(self, reader: ir.Node, output: str, surgery: Surgery) -> list[ir.Node]:
        rows, indices = reader.outputs[0], reader.inputs[1]
        name = surgery.weights.unique(f"{output}_row_scale")
        scales = surgery.node("Gather", [self.scale, indices], name, _REAL)
        return [scales, *_times(rows, scales.outputs[0], output, surgery)]


def _times(
    integers: ir.Value, scale: ir.Value, output: str, surgery: Surgery
) -> list[ir.Node]:
    name = surgery.weights.unique(f"{output}_cast")
    cast = surgery.node("Cast", [integers], name, _REAL, {"to": _REAL})
    mul = surgery.node("Mul", [cast.outputs[0], scale], output, _REAL)
    for node in (cast, mul):
        node.outputs[0].shape = None if integers.shape is None else integers.shape.copy()
    return [cast, mul]
