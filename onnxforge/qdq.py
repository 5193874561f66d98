"""Products of activations whose range is known, as integers or in QDQ format."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
import onnx_ir as ir

from onnxforge.integer import Integers, Product
from onnxforge.numerics.smoothing import ActivationGrid
from onnxforge.walk import input_of
from onnxforge.weights import Weight, Weights

__all__ = ["Qdq", "StaticIntegers"]

_REAL = ir.DataType.FLOAT


class StaticIntegers(Integers):
    """Rewrites products to multiply integers; activations have a constant scale."""

    def __init__(self, weights: Weights, frozen: Set[Weight] = frozenset()) -> None:
        """Rewrite products of the model of these weights, some of which must stay."""
        super().__init__(weights)
        self._frozen = frozen
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
        wide = wide.reshape(-1) * _taken_alpha(node)
        constant = self._move(operand.path, weight.value)
        inputs = [constant, self._constant(weight, "scale", wide)]
        place = self._bias(node)
        if place is not None or node.op_type == "Gemm":  # else QGemm is not made of it
            zeros = np.zeros(wide.shape, np.int8)
            inputs.append(self._constant(weight, "zero_point", zeros))
        restored = self._dequantized(inputs, axis, node)
        node.replace_input_with(1, restored)
        node.replace_input_with(0, x[0])
        if place is not None:
            self._quantize_bias(place, weight, wide.astype(np.float64) * float(grid.scale))
        self._left += operand.path
        self._put_first(node.outputs[0])

    def _bias(self, node: ir.Node) -> tuple[ir.Node, int] | None:
        """Where the bias of a product is read, if it is constant; matrices only.

        A MatMul of matrices and the Add behind it become one Gemm in onnxruntime, which is
        one of integers only if the bias is.
        """
        reader, index = node, 2
        output = node.outputs[0]
        if node.op_type == "MatMul":
            uses = output.uses()
            if len(uses) != 1 or _rank(output) > 2 or self.surgery.weights.is_output(output):
                return None
            ((reader, other),) = uses
            index = 1 - other
            if reader.op_type != "Add" or reader.domain or reader.graph is not node.graph:
                return None
        bias = self.surgery.weights.of(input_of(reader, index))
        if bias is None or bias.dtype != _REAL or bias.is_overridable or bias in self._frozen:
            return None
        if bias.tensor.shape.rank() > max(1, _rank(output)):
            return None  # it gives the sum more axes than the product has
        return reader, index

    def _quantizer(self, value: ir.Value) -> tuple[Sequence[ir.Node], Sequence[ir.Value]]:
        (quantize,), (integers, scale, zero) = super()._quantizer(value)
        name = self._unique(f"{value.name}_dequantized")
        restore = self.surgery.node("DequantizeLinear", [integers, scale, zero], name, _REAL)
        restore.outputs[0].shape = value.shape
        return [quantize, restore], restore.outputs

    def _dequantized(self, inputs: Sequence[ir.Value], axis: int, reader: ir.Node) -> ir.Value:
        """A constant restored along an axis, before its reader."""
        name = self._unique(f"{inputs[0].name}_dequantized")
        node = self.surgery.node("DequantizeLinear", inputs, name, _REAL, {"axis": axis})
        node.outputs[0].shape = inputs[0].shape
        assert reader.graph is not None, "a reader is part of the model"
        reader.graph.insert_before(reader, node)
        return node.outputs[0]

    def _quantize_bias(
        self, place: tuple[ir.Node, int], weight: Weight, units: np.ndarray
    ) -> None:
        """Store a bias in units of the integer product, if it has a value for each."""
        reader, index = place
        value = reader.inputs[index]
        bias = self.surgery.weights.of(value)
        assert bias is not None, "a bias is a constant"
        content = bias.tensor.numpy().astype(np.float64)
        if content.shape[-1:] != units.shape or content.size != units.size:
            return
        beta = reader.attributes.get_float("beta", 1.0) if reader.op_type == "Gemm" else 1.0
        levels = np.rint(content.reshape(-1) * beta / units)
        if not np.isfinite(levels).all() or np.abs(levels).max(initial=0) >= 2**31:
            return
        scale = self._constant(weight, "bias_scale", units.astype(np.float32))
        stored = self._constant(weight, "bias", levels.astype(np.int32))
        reader.replace_input_with(index, self._dequantized([stored, scale], 0, reader))
        reader.attributes.pop("beta", None)
        self._unread.append(value)


def _rank(value: ir.Value) -> int:
    """Number of axes, 0 where it is not known."""
    return 0 if value.shape is None else value.shape.rank()


def _taken_alpha(node: ir.Node) -> np.float32:
    """A positive alpha of a Gemm, which goes into a scale instead; 1 if there is none."""
    if node.op_type != "Gemm" or node.attributes.get_float("alpha", 1.0) <= 0:
        return np.float32(1)
    attribute = node.attributes.pop("alpha", None)
    return np.float32(1 if attribute is None else attribute.as_float())
