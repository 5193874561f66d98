"""The products of a model that could multiply integers, and why others could not."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import onnx_ir as ir

from onnxforge import flow
from onnxforge.core import Fate, Finding
from onnxforge.dequantized import is_of_rows
from onnxforge.integer import Product, Stored
from onnxforge.operands import Operand, channel_axes, ends, trace
from onnxforge.walk import Scope, label
from onnxforge.weights import Weight, Weights

__all__ = ["CODES", "LEFT_FLOAT", "Candidate", "Reason", "Search", "stored_type", "told"]

CODES: Mapping[str, str] = {
    "OF230": "Both operands are computed when the model runs: there is no weight to quantize."
    " Attention has such products; a fifth of all is usual.",
    "OF231": "No MatMul, Gemm or Conv that `op_types` names reads the weight.",
    "OF232": "Another operator reads the weight as well and needs it in float32; both forms"
    " would be stored. int8w serves all readers.",
    "OF233": "A Gather reads rows of the weight as well. gather-int8 stores it as int8 for"
    " both, before or after this pass.",
    "OF234": "A Conv that works on each channel alone is slower as integers:"
    " float_depthwise=false rewrites it all the same.",
    "OF235": "A Conv before all MatMul and Gemm sees the raw signal, which 8 bits destroy:"
    " float_front_end=false rewrites it all the same.",
    "OF236": "The channels of the weight cannot be followed to the stored tensor, or they have"
    " hardly an element each.",
    "OF237": "Products read the weight along different axes, or it is stored as int8 where"
    " runtimes have a kernel for uint8 only.",
    "OF238": "The number of axes of the activation is not known, and the scales of this weight"
    " broadcast against two and more only: infer shapes first.",
    "OF239": "The product is computed in another type than float32, its weight is computed or"
    " quantized already, or both of its operands are constants.",
    "OF240": "The operator is not among `op_types`.",
    "OF242": "A sum of so many products of 8 bits can exceed 32 bits.",
}
"""What the codes mean that say why a product stays."""

LEFT_FLOAT = ("OF234", "OF235")
"""Why a product stays that could be rewritten."""

_LONGEST = (2**31 - 1) // (255 * 128)
_REAL = ir.DataType.FLOAT
_MATRIX = ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul")
_KINDS = ("MatMul", "Gemm", "Conv")


class Reason(NamedTuple):
    """Why a product or a weight stays."""

    code: str
    message: str
    detail: str = ""


class Candidate(NamedTuple):
    """A MatMul, Gemm or Conv.

    Attributes:
        node: The node.
        where: Its path.
        weight: Its constant operand, None if there is none.
        found: What can be rewritten, or why not.
    """

    node: ir.Node
    where: str
    weight: Weight | None
    found: Product | Reason


@dataclass(frozen=True)
class Search:
    """Finds the products of a model.

    Attributes:
        op_types: Operators to look for.
        per_channel: Whether the elements of an output channel share a scale, or all do.
        float_front_end: Leave every Conv with no MatMul or Gemm before it and some behind.
        float_depthwise: Leave every Conv that works on each channel alone.
    """

    op_types: Collection[str] = _KINDS
    per_channel: bool = True
    float_front_end: bool = True
    float_depthwise: bool = True

    def candidates(self, weights: Weights) -> list[Candidate]:
        """Every MatMul, Gemm and Conv of a model, in order."""
        front = _front_end(weights) if self.float_front_end else set()
        return [
            self._candidate(node, scope, position, weights, is_front=node in front)
            for scope in weights.scopes
            for position, node in enumerate(scope.graph)
            if node.op_type in _KINDS and not node.domain
        ]

    def _candidate(
        self, node: ir.Node, scope: Scope, position: int, weights: Weights, *, is_front: bool
    ) -> Candidate:
        where = scope.path + label(node, position)
        if node.op_type not in self.op_types:
            reason = Reason("OF240", f"is a {node.op_type}, which op_types leaves out")
            return Candidate(node, where, None, reason)
        sides = (1,) if node.op_type == "Conv" else (1, 0)
        operands = [o for i in sides if (o := trace(node, i, weights)) is not None]
        if len(operands) != 1:
            return Candidate(node, where, None, _without_weight(node, operands, weights))
        (operand,) = operands
        found = self._product(operand)
        if isinstance(found, Product) and node.op_type == "Conv":
            found = self._left_float(found, is_front=is_front) or found
        return Candidate(node, where, operand.weight, found)

    def _product(self, operand: Operand) -> Product | Reason:
        if (other := _other_type(operand)) is not None:
            return Reason("OF239", f"computes in {other.name.lower()}")
        node, rank = operand.node, len(operand.shape)
        axes = channel_axes(node, operand.index, rank)
        if axes is not None and math.prod(operand.shape[i] for i in axes) > _LONGEST:
            return Reason("OF242", f"sums over more than {_LONGEST} products")
        if axes is not None and not self.per_channel and operand.scale is None:
            axes = tuple(range(rank))
        channels = None if axes is None else operand.channels(axes)
        if axes is None or channels is None:
            return Reason("OF236", "has no channels that share a scale")
        product = Product(operand, axes, channels)
        given = operand.scale
        if given is not None and tuple(given.tensor.shape.numpy()) != channels.scale_shape:
            return Reason("OF236", "has scales along other axes")
        if node.op_type == "MatMul" and (product.is_left or rank > 2):
            shape = product.activation.shape
            if shape is None or shape.rank() < 2:
                return Reason("OF238", "reads an activation of unknown rank")
        return product

    def _left_float(self, product: Product, *, is_front: bool) -> Reason | None:
        node, shape = product.node, product.operand.shape
        if self.float_depthwise and node.attributes.get_int("group", 1) > 1 == shape[1]:
            return Reason("OF234", "depthwise Conv stays float32")
        if is_front:
            return Reason("OF235", "convolutional front end stays float32")
        return None


def _without_weight(node: ir.Node, operands: Sequence[Operand], weights: Weights) -> Reason:
    if len(operands) > 1:
        return Reason("OF239", "multiplies two constants")
    if any(_is_constant(value, weights) for value in node.inputs[:2]):
        return Reason("OF239", "has a weight that is no float32 tensor")
    return Reason("OF230", "activation x activation")


def _is_constant(value: ir.Value | None, weights: Weights) -> bool:
    """Whether a value is made from constants alone, by whatever arithmetic."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if value is None or value in seen or weights.of(value) is not None:
            continue
        node = value.producer()
        if node is None or not node.inputs:
            return False
        seen.add(value)
        waiting += node.inputs
    return True


def _other_type(operand: Operand) -> ir.DataType | None:
    """The type that a product computes in where that is not float32."""
    widened = any(node.op_type == "Cast" for node in operand.path)
    dtype = operand.weight.dtype
    return None if dtype == _REAL or widened or operand.scale is not None else dtype


def _front_end(weights: Weights) -> set[ir.Node]:
    behind, before = flow.between(weights.model, weights.scopes, _MATRIX)
    return {node for node in before - behind if node.op_type == "Conv"}


def stored_type(
    weight: Weight,
    products: Sequence[Product],
    weights: Weights,
    wanted: Stored,
) -> Stored | Reason:
    """The type in which all readers of a weight can multiply it, or why they cannot.

    Args:
        weight: The weight.
        products: All products that are to be rewritten and read it.
        weights: The weights of the model.
        wanted: The type for products that take both.
    """
    if len({product.channels for product in products}) > 1:
        return Reason("OF237", "is read along different axes")
    needs_uint8 = any(product.needs_uint8 for product in products)
    if weight.dtype == ir.DataType.INT8:
        return Reason("OF237", "is int8 already, uint8 is needed") if needs_uint8 else "int8"
    rewritten = {(product.node, product.operand.index) for product in products}
    rows = {(use.node, use.index) for use in weight.uses if is_of_rows(use)}
    for end in ends(weight, weights):
        if end is None:
            return Reason("OF232", "is also a graph output")
        if end in rows and weight.dtype == _REAL:
            return Reason("OF233", "is also read by Gather: add gather-int8")
        if end not in rewritten:
            return Reason("OF232", "is also read in float32", f"by {end[0].op_type}")
    return "uint8" if needs_uint8 else wanted


def told(
    candidates: Sequence[Candidate],
    fates: Mapping[Weight, Finding],
    declined: Sequence[Finding],
) -> Iterator[Finding]:
    """What became of each product: as its weight, or why it stays.

    Args:
        candidates: The products.
        fates: What became of weights.
        declined: Of the other weights.
    """
    others = {finding.where: finding for finding in declined}
    for node, where, weight, found in candidates:
        if isinstance(found, Reason):
            fate = Fate.EXCLUDED if found.code == "OF240" else Fate.SKIPPED
            yield Finding(found.code, where, found.message, fate=fate, op=node.op_type)
        elif weight is not None:
            told = fates.get(weight) or others[weight.where]
            yield replace(told, where=where, op=node.op_type)
