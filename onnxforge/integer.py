"""Products with a constant operand, rewritten to multiply integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxforge.lazy import DerivedTensor
from onnxforge.numerics.channels import Channels
from onnxforge.numerics.int8 import Grid, Quantize
from onnxforge.operands import Operand
from onnxforge.surgery import Surgery, take_over
from onnxforge.walk import input_of
from onnxforge.weights import Weight, Weights

__all__ = ["Integers", "Product", "Stored"]

Stored = Literal["int8", "uint8"]
"""Type of a weight; uint8 is around 128."""

_REAL = ir.DataType.FLOAT
_TYPES = {"int8": (ir.DataType.INT8, 0), "uint8": (ir.DataType.UINT8, 128)}


@dataclass(frozen=True, eq=False)
class Product:
    """A MatMul, Gemm or Conv with a constant operand.

    Attributes:
        operand: The constant.
        shared: Axes of the operand along which elements share a scale.
        channels: Which elements of the stored tensor share one.
    """

    operand: Operand
    shared: tuple[int, ...]
    channels: Channels

    @property
    def node(self) -> ir.Node:
        """The node."""
        return self.operand.node

    @property
    def is_left(self) -> bool:
        """Whether the constant is the left operand of a MatMul or Gemm."""
        return self.node.op_type != "Conv" and self.operand.index == 0

    @property
    def needs_uint8(self) -> bool:
        """Whether not every runtime has a kernel for an int8 weight here.

        uint8 times int8 has one everywhere with the weight on the right only, and ConvInteger
        takes int8 from onnxruntime 1.24 on. Neither takes a zero point for each channel.
        """
        return self.is_left or self.node.op_type == "Conv"

    @property
    def activation(self) -> ir.Value:
        """The other operand."""
        value = self.node.inputs[1 if self.is_left else 0]
        assert value is not None, "the operand of a product is not optional"
        return value


class Integers:
    """Rewrites products; what several of them need is made once."""

    def __init__(self, weights: Weights) -> None:
        """Rewrite products of the model of these weights."""
        self.surgery = Surgery(weights)
        self._unique = weights.unique
        self._left: list[ir.Node] = []
        self._unread: list[ir.Value | None] = []
        self._moved: dict[tuple[ir.Node, ir.Value], ir.Value] = {}
        self._quantized: dict[ir.Value, Sequence[ir.Value]] = dict(_quantizers(weights))
        self._constants: dict[tuple[Weight, str, tuple[int, ...], bytes], ir.Value] = {}

    def store(self, weight: Weight, grid: Grid, stored: Stored) -> None:
        """Store a weight as integers; its products have to be rewritten next."""
        dtype, zero_point = _TYPES[stored]
        weight.store(DerivedTensor(weight.tensor, dtype, Quantize(grid, zero_point)))

    def rewrite(self, product: Product, scales: np.ndarray) -> None:
        """Multiply integers where a product multiplied floats.

        The activation is quantized when the model runs, per tensor, to uint8. The order of
        nodes is the one that onnxruntime fuses: the integer product is cast to float32 and
        multiplied with the product of both scales, or, where the weight is on the left, with
        one after the other; bias is added last.

        Args:
            product: The product; its weight is stored as integers.
            scales: The scales of the stored tensor, of a shape that broadcasts against it.
        """
        node, operand = product.node, product.operand
        assert operand.weight.value is not None, "a stored weight is a value"
        constant = self._move(operand.path, operand.weight.value)
        x, x_scale, x_zero = self._quantize(product.activation)
        factors = [constant, x] if product.is_left else [x, constant]
        wide = operand.seen(scales, product.shared)
        nodes: list[ir.Node] = []
        for i, flag in enumerate(("transA", "transB")):
            if node.op_type == "Gemm" and node.attributes.get_int(flag, 0) == 1:
                nodes.append(self._transpose(factors[i]))
                wide = wide.T if factors[i] is constant else wide
                factors[i] = nodes[-1].outputs[0]
        w_scale, w_zero = self._parameters(product, wide)
        zeros = [w_zero, x_zero] if product.is_left else [x_zero, w_zero]
        integer = self._multiply(node, [*factors, *zeros])
        nodes += [integer, *self._scale(product, integer.outputs[0], x_scale, w_scale)]
        nodes += self._add_bias(product, nodes[-1].outputs[0])
        self._unread += node.inputs[2:]  # bias, where beta is 0
        self._replace(node, nodes, stands=integer)
        if operand.scale is not None:
            self._unread.append(operand.scale.value)
        self._left += [*operand.restored, *operand.path]

    def finish(self) -> None:
        """Remove what nobody reads any more."""
        self.surgery.drop_dead(self._left)
        self.surgery.drop_unread(self._unread)
        self.surgery.settle()

    def _move(self, path: Sequence[ir.Node], value: ir.Value) -> ir.Value:
        """Move the elements of a value as a path does; casts are of no use to integers."""
        for node in path:
            if node.op_type == "Cast":
                continue
            if (node, value) not in self._moved:
                moved = self._like(node, [value, *node.inputs[1:]])
                moved.attributes.update(node.attributes)
                assert node.graph is not None, "the path is part of the model"
                node.graph.insert_after(node, moved)
                self._moved[node, value] = moved.outputs[0]
            value = self._moved[node, value]
        return value

    def _like(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
        source, name = inputs[0], self._unique(f"{node.outputs[0].name}_int8")
        assert source is not None, "what moves elements has an input"
        assert source.dtype is not None, "integers have a type"
        made = self.surgery.node(node.op_type, inputs, name, source.dtype)
        if source.dtype != _REAL:  # scales have another shape
            made.outputs[0].shape = node.outputs[0].shape
        return made

    def _quantize(self, value: ir.Value) -> Sequence[ir.Value]:
        """Integers, scale and zero point of an activation; made once, where it is made."""
        if value not in self._quantized:
            nodes, self._quantized[value] = self._quantizer(value)
            self.surgery.insert_behind(value, nodes)
        return self._quantized[value]

    def _quantizer(self, value: ir.Value) -> tuple[Sequence[ir.Node], Sequence[ir.Value]]:
        """Nodes that quantize an activation, and what they give: a range of its own."""
        types = ir.DataType.UINT8, _REAL, ir.DataType.UINT8
        words = "quantized", "quantized_scale", "quantized_zero_point"
        outputs = [
            ir.Value(name=self._unique(f"{value.name}_{word}"), type=ir.TensorType(dtype))
            for word, dtype in zip(words, types, strict=True)
        ]
        outputs[0].shape = value.shape
        name = self._unique(f"{value.name}_DynamicQuantizeLinear")
        return [ir.node("DynamicQuantizeLinear", [value], name=name, outputs=outputs)], outputs

    def _transpose(self, value: ir.Value) -> ir.Node:
        name = self._unique(f"{value.name}_transposed")
        assert value.dtype is not None, "integers have a type"
        return self.surgery.node("Transpose", [value], name, value.dtype, {"perm": [1, 0]})

    def _parameters(self, product: Product, wide: np.ndarray) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of a weight, as constants that broadcast to the product."""
        node, operand = product.node, product.operand
        wide = wide * np.float32(node.attributes.get_float("alpha", 1.0))
        if node.op_type == "Conv":
            wide = wide.reshape(1, -1, *[1] * (wide.ndim - 2))
        elif not product.is_left and wide.ndim == 2:
            wide = wide.reshape(-1)
        if wide.size == 1:
            wide = wide.reshape(())
        dtype, zero = (
            (np.uint8, 128) if operand.weight.dtype == ir.DataType.UINT8 else (np.int8, 0)
        )
        zeros = np.full(() if product.needs_uint8 else wide.shape, zero, dtype)
        zero_point = self._constant(operand.weight, "zero_point", zeros)
        moves = [n for n in operand.path if n.op_type != "Cast"]
        transposed = all(n.op_type == "Transpose" for n in moves)
        if operand.scale is not None and node.op_type == "MatMul" and transposed:
            assert operand.scale.value is not None, "a scale is a value"
            activation = product.activation.shape
            if activation is None or activation.rank() < 2:  # two axes may be one too many
                return self._flatten(node, operand.scale.value, operand.weight), zero_point
            return self._move(moves, operand.scale.value), zero_point
        return self._constant(operand.weight, "scale", wide), zero_point

    def _flatten(self, reader: ir.Node, scale: ir.Value, beside: Weight) -> ir.Value:
        """The scales of a matrix without the axis of length one, before their reader."""
        shape = self._constant(beside, "scale_shape", np.array([-1]))
        name = self._unique(f"{scale.name}_flat")
        flat = self.surgery.node("Reshape", [scale, shape], name, _REAL)
        assert reader.graph is not None, "a product is part of the model"
        reader.graph.insert_before(reader, flat)
        return flat.outputs[0]

    def _constant(self, beside: Weight, word: str, content: np.ndarray) -> ir.Value:
        key = beside, word, content.shape, content.tobytes()
        if key not in self._constants:
            assert beside.value is not None, "a stored weight is a value"
            name = f"{beside.value.name}_{word}"
            self._constants[key] = self.surgery.constant(beside, name, content)
        return self._constants[key]

    def _multiply(self, node: ir.Node, inputs: Sequence[ir.Value]) -> ir.Node:
        operator = "ConvInteger" if node.op_type == "Conv" else "MatMulInteger"
        output = self._unique(f"{node.outputs[0].name}_int32")
        made = self.surgery.node(operator, inputs, output, ir.DataType.INT32)
        if node.op_type == "Conv":
            made.attributes.update(node.attributes)
        made.outputs[0].shape = node.outputs[0].shape
        return made

    def _scale(
        self, product: Product, integers: ir.Value, x_scale: ir.Value, w_scale: ir.Value
    ) -> list[ir.Node]:
        node, make, unique = product.node, self.surgery.node, self._unique
        y, shape = node.outputs[0].name, node.outputs[0].shape
        cast = make("Cast", [integers], unique(f"{y}_float"), _REAL, {"to": _REAL})
        # With a scale for each row, onnxruntime fuses the other order and loses the bias.
        by_row = product.is_left and w_scale.shape is not None and w_scale.shape.rank() > 0
        first = [cast.outputs[0], x_scale] if by_row else [x_scale, w_scale]
        scale = make("Mul", first, unique(f"{y}_scale"), _REAL)
        last = [scale.outputs[0], w_scale] if by_row else [cast.outputs[0], scale.outputs[0]]
        scaled = make("Mul", last, unique(f"{y}_product"), _REAL)
        cast.outputs[0].shape = scaled.outputs[0].shape = shape
        return [cast, scale, scaled]

    def _add_bias(self, product: Product, value: ir.Value) -> list[ir.Node]:
        """Nodes that add the third input of a Gemm or Conv."""
        node, weight, make = product.node, product.operand.weight, self.surgery.node
        bias = input_of(node, 2)
        beta = node.attributes.get_float("beta", 1.0)
        if bias is None or beta == 0:
            return []
        nodes = []
        if beta != 1:
            factor = self._constant(weight, "beta", np.array(beta, np.float32))
            name = self._unique(f"{node.outputs[0].name}_beta")
            nodes.append(make("Mul", [bias, factor], name, _REAL))
        if node.op_type == "Conv":
            shape = np.array([1, -1, *[1] * (len(product.operand.shape) - 2)])
            where = self._constant(weight, "bias_shape", shape)
            name = self._unique(f"{node.outputs[0].name}_bias")
            nodes.append(make("Reshape", [bias, where], name, _REAL))
        added = nodes[-1].outputs[0] if nodes else bias
        name = self._unique(f"{node.outputs[0].name}_sum")
        return [*nodes, make("Add", [value, added], name, _REAL)]

    def _replace(self, node: ir.Node, nodes: Sequence[ir.Node], stands: ir.Node) -> None:
        """Put nodes in the place of one, whose name and remarks one of them gets."""
        graph = node.graph
        assert graph is not None, "a product is part of the model"
        graph.insert_before(node, nodes)
        take_over(node.outputs[0], nodes[-1].outputs[0])
        stands.name, stands.doc_string = node.name, node.doc_string
        stands.metadata_props.update(node.metadata_props)
        graph.remove(node, safe=True)
        self._put_first(nodes[-1].outputs[0])

    def _put_first(self, product: ir.Value) -> None:
        """Make a product the first operand of the Add of bias behind it, which fuses."""
        uses = product.uses()
        if len(uses) != 1 or product.is_graph_output():
            return
        ((node, index),) = uses
        other = node.inputs[0]
        is_second = node.op_type == "Add" and not node.domain and index == 1
        if is_second and self.surgery.weights.behind(other) is not None:
            node.replace_input_with(0, product)
            node.replace_input_with(1, other)


def _quantizers(weights: Weights) -> Iterator[tuple[ir.Value, Sequence[ir.Value]]]:
    """What quantizes an activation right where it is made, so before all its readers."""
    for scope in weights.scopes:
        maker: ir.Node | None = None
        for node in scope.graph:
            if node.op_type != "DynamicQuantizeLinear" or node.domain:
                maker = node
                continue
            value = node.inputs[0] if node.inputs else None
            if value is None or value.graph is not scope.graph:
                continue
            if value.producer() is maker and len(node.outputs) == 3:
                yield value, node.outputs
