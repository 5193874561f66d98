"""Forms of nodes that onnxruntime runs, but slowly; by experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from onnxforge.lint.finding import Problem, Rule
from onnxforge.runtime.ceilings import ceiling
from onnxforge.runtime.kernels import number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model
    from onnxforge.lint.view import Node

__all__ = ["RULES"]

_INT8, _FLOAT = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT


def slow_integers(model: Model, options: Options) -> Iterator[Problem]:
    """Integers are multiplied that no fast kernel takes: slower than float32.

    What it does:
        Finds MatMulInteger, QLinearMatMul and QLinearConv whose activation is int8 as well as
        its weight, and ConvInteger with an int8 weight.

    Why it is bad:
        onnxruntime has no fast kernel for it on x64 and in browsers: 5 to 9 times slower than
        float32, convolutions 3 to 20 times. uint8 activations are fast with int8 weights in
        products of matrices and in QLinearConv, and with uint8 weights in ConvInteger.

    Example:
        Static quantization with `activation_type=QInt8` and `QuantFormat.QOperator`;
        `quantize_dynamic` with `weight_type=QInt8` of a model with convolutions.

    How to mend:
        Quantize activations to uint8, and weights of ConvInteger too, as the pass
        `dynamic-int8` does.

    Fix:
        None.
    """
    places = {"MatMulInteger": 1, "QLinearMatMul": 3, "QLinearConv": 3}
    for op, index in places.items():
        for node in _nodes(model, op):
            if node.dtype(0) == node.dtype(index) == _INT8:
                yield Problem(f"{op} of int8 and int8 is slower than float32", node.where)
    for node in _nodes(model, "ConvInteger"):
        if node.dtype(1) == _INT8:
            yield Problem("ConvInteger of an int8 weight is slower than float32", node.where)


def gemm_bias(model: Model, options: Options) -> Iterator[Problem]:
    """A Gemm of dequantized operands has a float32 bias, and so stays float32.

    What it does:
        Finds Gemm between DequantizeLinear nodes whose bias is a float32 constant.

    Why it is bad:
        onnxruntime fuses such a Gemm only if the bias is int32 behind a DequantizeLinear, or
        missing. Else it dequantizes and multiplies float32: slower than before.

    Example:
        A tool quantizes weights and activations and leaves biases alone.

    How to mend:
        Store the bias as int32 at the scale of input times weight, as `smoothquant` does.

    Fix:
        None.
    """
    for node in _nodes(model, "Gemm"):
        makers = node.maker(0), node.maker(1)
        quantized = all(made is not None and made.op == "DequantizeLinear" for made in makers)
        bias = node.constant(2)
        if quantized and bias is not None and bias.dtype == _FLOAT:
            yield Problem("its bias is float32, so it is not multiplied as int8", node.where)


def depthwise_integers(model: Model, options: Options) -> Iterator[Problem]:
    """A depthwise convolution multiplies integers, which older runtimes do slowly.

    What it does:
        Finds ConvInteger with as many groups as channels where `min-ort` is below 1.23.

    Why it is bad:
        onnxruntime up to 1.22 needs 7 to 30 times as long as for float32. There is little to
        gain in any release, and precision to lose.

    Example:
        `quantize_dynamic` on a conformer.

    How to mend:
        Leave depthwise convolutions float32, as the pass `dynamic-int8` does.

    Fix:
        None.
    """
    if _below(options, "1.23"):
        for node in _nodes(model, "ConvInteger"):
            weight, groups = node.constant(1), node.number("group", 1)
            if weight is not None and groups > 1 and weight.shape[:2] == (groups, 1):
                yield Problem(f"multiplies integers in {groups} groups of one", node.where)


def unfused_scales(model: Model, options: Options) -> Iterator[Problem]:
    """The scales of an integer product are multiplied one after the other.

    What it does:
        Finds MatMulInteger -> Cast -> Mul -> Mul where the first Mul takes the scale of the
        activation and the second a constant. A weight on the left is never fused and in order.

    Why it is bad:
        onnxruntime fuses the product with what surrounds it only if both scales are multiplied
        first: a third of the speed is lost.

    Example:
        `Mul(Mul(cast, x_scale), w_scale)`

    How to mend:
        Write `Mul(cast, Mul(x_scale, w_scale))`, as the pass `dynamic-int8` does.

    Fix:
        None.
    """
    for node in _nodes(model, "Mul"):
        first = node.maker(0)
        if first is None or first.op != "Mul" or node.constant(1) is None:
            continue
        cast, scale = first.maker(0), first.maker(1)
        product = cast.maker(0) if cast is not None and cast.op == "Cast" else None
        dynamic = scale is not None and scale.op == "DynamicQuantizeLinear"
        fusible = product is not None and product.op == "MatMulInteger"
        if product is not None and fusible and product.constant(1) is not None and dynamic:
            text = f"multiplies {product.where} with one scale after the other"
            yield Problem(text, node.where)


def weight_dequantized(model: Model, options: Options) -> Iterator[Problem]:
    """A MatMul reads a dequantized weight and a float32 activation.

    What it does:
        Finds DequantizeLinear of a constant in front of MatMul or Gemm whose other operand is
        not quantized, where `min-ort` is below 1.25.

    Why it is bad:
        onnxruntime below 1.25 dequantizes the weight in every run: 0.6 times as fast as
        float32 for 256 rows, 0.1 times for one.

    Example:
        A tool stores weights as int8 to save room.

    How to mend:
        Cast and Mul in its place are folded when the model is loaded: the pass `int8w`.

    Fix:
        None.
    """
    if not _below(options, "1.25"):
        return
    for node in [*_nodes(model, "MatMul"), *_nodes(model, "Gemm")]:
        weight, other = node.maker(1), node.maker(0)
        if weight is None or weight.op != "DequantizeLinear" or weight.constant(0) is None:
            continue
        if weight.attribute("block_size") is None and (
            other is None or other.op != "DequantizeLinear"
        ):
            text = f"{weight.where} is computed in every run of onnxruntime {options.min_ort}"
            yield Problem(text, node.where)


def wrong_products(model: Model, options: Options) -> Iterator[Problem]:
    """Older runtimes multiply these integers wrongly on processors with AMX.

    What it does:
        Finds MatMulInteger and QLinearMatMul whose constant weight has a number of columns
        with a rest of 17 to 31 by 32, where `min-ort` is below 1.25.

    Why it is bad:
        onnxruntime 1.21 to 1.24 gives garbage for 32 rows and more on Sapphire Rapids and
        newer servers of Intel, without a word. Other processors and releases are right.

    Example:
        The output layer of a model with 50,257 or 51,865 tokens.

    How to mend:
        Leave that product float32 (`exclude`), add columns of zeros to the weight, or claim
        1.25.

    Fix:
        None.
    """
    if not _below(options, "1.25"):
        return
    for op, index in {"MatMulInteger": 1, "QLinearMatMul": 3}.items():
        for node in _nodes(model, op):
            weight = node.constant(index)
            columns = weight.shape[-1] if weight is not None and weight.shape else 0
            if columns % 32 > 16:
                text = f"{columns} columns are wrong in onnxruntime 1.21 to 1.24 with AMX"
                yield Problem(text, node.where)


def _nodes(model: Model, op: str) -> Iterator[Node]:
    return (node for node in model.nodes if node.op == op)


def _below(options: Options, version: str) -> bool:
    """Whether a runtime older than this has to load the model."""
    oldest = options.min_ort
    return oldest is not None and number(ceiling(oldest).release) < number(version)


RULES = (
    Rule("OF456", "slow-integers", "warning", slow_integers),
    Rule("OF457", "gemm-bias", "warning", gemm_bias),
    Rule("OF458", "depthwise-integers", "warning", depthwise_integers),
    Rule("OF459", "unfused-scales", "warning", unfused_scales),
    Rule("OF460", "weight-dequantized", "warning", weight_dequantized),
    Rule("OF461", "wrong-products", "warning", wrong_products),
)
