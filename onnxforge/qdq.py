"""Products of activations whose range is known, as integers or in QDQ format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxforge.integer import Integers, Product
from onnxforge.numerics.smoothing import ActivationGrid
from onnxforge.weights import Weights

__all__ = ["Qdq", "StaticIntegers"]

_REAL = ir.DataType.FLOAT


class StaticIntegers(Integers):
    """Rewrites products to multiply integers; activations have a constant scale."""

    def __init__(self, weights: Weights) -> None:
        """Rewrite products of the model of these weights."""
        super().__init__(weights)
        self._grids: dict[ir.Value, ActivationGrid] = {}
        self._quantized = {}  # what quantizes by a range of the moment is of no use

    def expect(self, activation: ir.Value, grid: ActivationGrid) -> None:
        """Say how an activation of the main graph is to be quantized."""
        self._grids[activation] = grid

    def _quantizer(self, value: ir.Value) -> tuple[Sequence[ir.Node], Sequence[ir.Value]]:
        grid, graph = self._grids[value], self.surgery.weights.model.graph
        dtype = ir.DataType.INT8 if grid.signed else ir.DataType.UINT8
        content = np.array(grid.zero_point, np.int8 if grid.signed else np.uint8)
        scale = self.surgery.initializer(graph, f"{value.name}_scale", np.array(grid.scale))
        zero = self.surgery.initializer(graph, f"{value.name}_zero_point", content)
        name = self._unique(f"{value.name}_quantized")
        node = self.surgery.node("QuantizeLinear", [value, scale, zero], name, dtype)
        node.outputs[0].shape = value.shape
        return [node], [node.outputs[0], scale, zero]


class Qdq(StaticIntegers):
    """Puts products between quantized values; the runtime makes integer products of them."""

    def rewrite(self, product: Product, scales: np.ndarray) -> None:
        """Read both operands of a product through DequantizeLinear.

        Args:
            product: A MatMul or Gemm with its weight on the right, stored as int8.
            scales: The scales of the stored tensor, of a shape that broadcasts against it.
        """
        node, operand = product.node, product.operand
        weight, graph = operand.weight, node.graph
        assert weight.value is not None, "a stored weight is a value"
        assert graph is not None, "a product is part of the model"
        x = self._quantize(product.activation)
        grid = self._grids[product.activation]
        wide = operand.seen(scales, product.shared)
        axis = next(i for i in range(wide.ndim) if i not in product.shared)
        constant = self._move(operand.path, weight.value)
        scale = self._constant(weight, "scale", wide.reshape(-1))
        restored = self._dequantized(constant, scale, axis, node)
        bias = self._quantized_bias(product, wide.reshape(-1), grid)
        node.replace_input_with(1 - int(product.is_left), restored)
        node.replace_input_with(int(product.is_left), x[0])
        if bias is not None:
            node.replace_input_with(2, bias)
        self._left += operand.path
        self._put_first(node.outputs[0])

    def _quantizer(self, value: ir.Value) -> tuple[Sequence[ir.Node], Sequence[ir.Value]]:
        (quantize,), (integers, scale, zero) = super()._quantizer(value)
        name = self._unique(f"{value.name}_dequantized")
        restore = self.surgery.node("DequantizeLinear", [integers, scale, zero], name, _REAL)
        restore.outputs[0].shape = value.shape
        return [quantize, restore], restore.outputs

    def _dequantized(
        self, integers: ir.Value, scale: ir.Value, axis: int, reader: ir.Node
    ) -> ir.Value:
        """A constant restored along an axis, before its reader."""
        name = self._unique(f"{integers.name}_dequantized")
        inputs = [integers, scale]
        node = self.surgery.node("DequantizeLinear", inputs, name, _REAL, {"axis": axis})
        node.outputs[0].shape = integers.shape
        assert reader.graph is not None, "a reader is part of the model"
        reader.graph.insert_before(reader, node)
        return node.outputs[0]

    def _quantized_bias(
        self, product: Product, scales: np.ndarray, grid: ActivationGrid
    ) -> ir.Value | None:
        """The bias of a Gemm in units of its integer product, the form that fuses."""
        node = product.node
        value = node.inputs[2] if len(node.inputs) > 2 else None
        bias = self.surgery.weights.of(value)
        if bias is None or bias.dtype != _REAL or bias.tensor.size != scales.size:
            return None
        units = scales.astype(np.float64) * np.float64(grid.scale)
        levels = np.rint(bias.tensor.numpy().reshape(-1).astype(np.float64) / units)
        if np.abs(levels).max(initial=0) >= 2**31:
            return None
        weight = product.operand.weight
        stored = self._constant(weight, "bias", levels.astype(np.int32))
        scale = self._constant(weight, "bias_scale", units.astype(np.float32))
        self._unread.append(value)
        return self._dequantized(stored, scale, 0, node)
