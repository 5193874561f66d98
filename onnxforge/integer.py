"""Products with a constant operand, rewritten to multiply integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxforge.lazy import DerivedTensor
from onnxforge.numerics.channels import Channels
from onnxforge.numerics.int8 import Grid, Quantize
from onnxforge.operands import Operand
from onnxforge.surgery import Surgery, take_over
from onnxforge.weights import Weight, Weights

__all__ = ["Integers", "Product"]

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
    def stored(self) -> Literal["int8", "uint8"] | None:
        """The type that every runtime multiplies here; None where it takes both.

        uint8 times int8 has a kernel everywhere with the weight on the right only, and
        ConvInteger takes int8 from onnxruntime 1.24 on.
        """
        return "uint8" if self.is_left or self.node.op_type == "Conv" else None

    @property
    def activation(self) -> ir.Value:
        """The other operand."""
        index = 1 if self.is_left else 0
        value = self.node.inputs[index]
        assert value is not None, "the operand of a product is not optional"
        return value


class Integers:
    """Rewrites products; what several of them need is made once."""

    def __init__(self, weights: Weights) -> None:
        """Rewrite products of the model of these weights."""
        self.surgery = Surgery(weights)
        self._paths: list[ir.Node] = []
        self._unread: list[ir.Value | None] = []
        self._followed: dict[tuple[int, int], ir.Value] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def store(self, weight: Weight, grid: Grid, stored: Literal["int8", "uint8"]) -> None:
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
        node, weight = product.node, product.operand.weight
        assert weight.value is not None, "a stored weight is a value"
        constant = self._follow(product.operand.path, weight.value)
        x, x_scale, x_zero = self._quantized(product.activation)
        operands = [constant, x] if product.is_left else [x, constant]
        wide = product.operand.seen(scales, product.shared)
        before: list[ir.Node] = []
        for i, flag in enumerate(("transA", "transB")):
            if node.op_type == "Gemm" and node.attributes.get_int(flag, 0) == 1:
                before.append(self._transposed(operands[i]))
                wide = wide.T if operands[i] is constant else wide
                operands[i] = before[-1].outputs[0]
        w_scale, w_zero = self._factors(product, wide)
        zeros = [w_zero, x_zero] if product.is_left else [x_zero, w_zero]
        nodes = self._integer(product, [*operands, *zeros], x_scale, w_scale)
        nodes += self._bias(product, nodes[-1].outputs[0])
        self._unread += node.inputs[2:]  # where beta is 0
        self._replace(node, [*before, *nodes])
        self._paths += [*product.operand.restored, *product.operand.path]
        if product.operand.scale is not None:
            self._unread.append(product.operand.scale.value)

    def finish(self) -> None:
        """Remove what nobody reads any more."""
        self.surgery.drop_dead(self._paths)
        self.surgery.drop_unread(self._unread)
        self.surgery.settle()

    def _follow(self, path: Sequence[ir.Node], value: ir.Value) -> ir.Value:
        """Move the elements of a value as a path does; casts are of no use to integers."""
        for node in path:
            if node.op_type == "Cast":
                continue
            key = id(node), id(value)
            if key not in self._followed:
                output = self.surgery.weights.unique(f"{node.outputs[0].name}_int8")
                assert value.dtype is not None, "a stored weight has a type"
                moved = self.surgery.node(
                    node.op_type,
                    [value, *node.inputs[1:]],
                    output,
                    value.dtype,
                )
                moved.attributes.update(node.attributes)
                if value.dtype != ir.DataType.FLOAT:  # scales have another one
                    moved.outputs[0].shape = node.outputs[0].shape
                assert node.graph is not None, "the path is part of the model"
                node.graph.insert_after(node, moved)
                self._followed[key] = moved.outputs[0]
            value = self._followed[key]
        return value

    def _quantized(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """uint8, scale and zero point of an activation; quantized once, where it is made."""
        for node, _ in value.uses():
            if node.op_type == "DynamicQuantizeLinear" and node.graph is value.graph:
                quantized, scale, zero = node.outputs
                return quantized, scale, zero
        unique = self.surgery.weights.unique
        types = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8
        words = "quantized", "quantized_scale", "quantized_zero_point"
        outputs = [
            ir.Value(name=unique(f"{value.name}_{word}"), type=ir.TensorType(dtype))
            for word, dtype in zip(words, types, strict=True)
        ]
        outputs[0].shape = value.shape
        name = unique(f"{value.name}_DynamicQuantizeLinear")
        node = ir.node("DynamicQuantizeLinear", [value], name=name, outputs=outputs)
        graph, producer = value.graph, value.producer()
        assert graph is not None, "an activation belongs to a graph"
        if producer is not None:
            graph.insert_after(producer, node)
        else:
            graph.insert_before(graph[0], node)
        return outputs[0], outputs[1], outputs[2]

    def _transposed(self, value: ir.Value) -> ir.Node:
        name = self.surgery.weights.unique(f"{value.name}_transposed")
        assert value.dtype is not None, "integers have a type"
        return self.surgery.node("Transpose", [value], name, value.dtype, {"perm": [1, 0]})

    def _factors(self, product: Product, wide: np.ndarray) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of a weight, as constants that broadcast to the product."""
        node, weight, given = product.node, product.operand.weight, product.operand.scale
        wide = wide * np.float32(node.attributes.get_float("alpha", 1.0))
        if node.op_type == "Conv":
            wide = wide.reshape(1, -1, *[1] * (wide.ndim - 2))
        elif not product.is_left and wide.ndim == 2:
            wide = wide.reshape(-1)
        if wide.size == 1:
            wide = wide.reshape(())
        dtype, zero = (np.uint8, 128) if weight.dtype == ir.DataType.UINT8 else (np.int8, 0)
        # ConvInteger and a left operand take no zero points by channel.
        shape = () if product.stored == "uint8" else wide.shape
        zero_point = self._constant(weight, "zero_point", np.full(shape, zero, dtype))
        moves = [n for n in product.operand.path if n.op_type != "Cast"]
        transposed = all(n.op_type == "Transpose" for n in moves)
        if given is not None and node.op_type == "MatMul" and transposed:
            assert given.value is not None, "a scale is a value"
            activation = product.activation.shape
            if activation is None or activation.rank() < 2:  # two axes may be one too many
                return self._flat(node, given.value, weight), zero_point
            return self._follow(moves, given.value), zero_point
        return self._constant(weight, "scale", wide), zero_point

    def _flat(self, reader: ir.Node, scale: ir.Value, beside: Weight) -> ir.Value:
        """The scales of a matrix without the axis of length one, before their reader."""
        shape = self._constant(beside, "scale_shape", np.array([-1]))
        name = self.surgery.weights.unique(f"{scale.name}_flat")
        flat = self.surgery.node("Reshape", [scale, shape], name, ir.DataType.FLOAT)
        assert reader.graph is not None, "a product is part of the model"
        reader.graph.insert_before(reader, flat)
        return flat.outputs[0]

    def _constant(self, beside: Weight, word: str, content: np.ndarray) -> ir.Value:
        key = id(beside), word, content.shape, content.tobytes()
        if key not in self._constants:
            assert beside.value is not None, "a stored weight is a value"
            name = f"{beside.value.name}_{word}"
            self._constants[key] = self.surgery.constant(beside, name, content)
        return self._constants[key]

    def _integer(
        self,
        product: Product,
        inputs: Sequence[ir.Value],
        x_scale: ir.Value,
        w_scale: ir.Value,
    ) -> list[ir.Node]:
        node, make, unique = product.node, self.surgery.node, self.surgery.weights.unique
        is_conv = node.op_type == "Conv"
        y = node.outputs[0].name
        integer = make(
            "ConvInteger" if is_conv else "MatMulInteger",
            inputs,
            unique(f"{y}_int32"),
            ir.DataType.INT32,
        )
        if is_conv:
            integer.attributes.update(node.attributes)
        integer.outputs[0].shape = node.outputs[0].shape
        real = ir.DataType.FLOAT
        cast = make("Cast", integer.outputs, unique(f"{y}_float"), real, {"to": real})
        cast.outputs[0].shape = node.outputs[0].shape
        # With a scale for each row, onnxruntime fuses the other order and loses the bias.
        by_row = product.is_left and w_scale.shape is not None and w_scale.shape.rank() > 0
        first = [cast.outputs[0], x_scale] if by_row else [x_scale, w_scale]
        scale = make("Mul", first, unique(f"{y}_scale"), real)
        second = [scale.outputs[0], w_scale] if by_row else [cast.outputs[0], scale.outputs[0]]
        scaled = make("Mul", second, unique(f"{y}_product"), real)
        scaled.outputs[0].shape = node.outputs[0].shape
        return [integer, cast, scale, scaled]

    def _bias(self, product: Product, value: ir.Value) -> list[ir.Node]:
        """Nodes that add the third input of a Gemm or Conv."""
        node, weight, unique = (
            product.node,
            product.operand.weight,
            self.surgery.weights.unique,
        )
        bias = node.inputs[2] if len(node.inputs) > 2 and node.op_type != "MatMul" else None
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        if bias is None or beta == 0:
            return []
        real, nodes = ir.DataType.FLOAT, []
        if beta != 1:
            factor = self._constant(weight, "beta", np.array(beta, np.float32))
            nodes.append(
                self.surgery.node("Mul", [bias, factor], unique(f"{bias.name}_beta"), real)
            )
        if node.op_type == "Conv":
            shape = np.array([1, -1, *[1] * (len(product.operand.shape) - 2)])
            where = self._constant(weight, "bias_shape", shape)
            name = unique(f"{bias.name}_reshaped")
            nodes.append(self.surgery.node("Reshape", [bias, where], name, real))
        added = nodes[-1].outputs[0] if nodes else bias
        name = unique(f"{node.outputs[0].name}_sum")
        return [*nodes, self.surgery.node("Add", [value, added], name, real)]

    def _replace(self, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
        """Put nodes in the place of one; the integer one of them stands for it."""
        graph, stands = node.graph, next(n for n in nodes if n.op_type in _INTEGER)
        assert graph is not None, "a product is part of the model"
        graph.insert_before(node, nodes)
        take_over(node.outputs[0], nodes[-1].outputs[0])
        stands.name, stands.doc_string = node.name, node.doc_string
        stands.metadata_props.update(node.metadata_props)
        graph.remove(node, safe=True)
        self._bias_last(nodes[-1].outputs[0])

    def _bias_last(self, product: ir.Value) -> None:
        """Make a product the first operand of the Add behind it, as runtimes fuse it."""
        uses = product.uses()
        if len(uses) != 1 or product.is_graph_output():
            return
        ((node, index),) = uses
        other = node.inputs[0]
        is_second = node.op_type == "Add" and not node.domain and index == 1
        if is_second and self.surgery.weights.behind(other) is not None:
            node.replace_input_with(0, product)
            node.replace_input_with(1, other)


_INTEGER = ("ConvInteger", "MatMulInteger")
