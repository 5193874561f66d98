"""An independent account of integer products, and a check of a tier's products against it.

Nothing here uses onnxforge. Integers are multiplied as int64, without BLAS, so exactly.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from support import oracle

Array = np.ndarray

SMALLEST = np.float32(2.0**-126)
PRODUCTS = ("MatMulInteger", "ConvInteger")


class Quantized(NamedTuple):
    """Integers and what they stand for: (values - zero) * scale."""

    values: Array
    scale: Array
    zero: Array


class Rules(NamedTuple):
    """How weights are quantized."""

    limit: int = 127
    per_channel: bool = True
    mse: bool = False
    inputs: bool = False


DEFAULT = Rules()


# Quantization.


def dynamic_quantize_linear(x: Array) -> Quantized:
    """What the specification of the operator says of float32 values."""
    low, high = (np.float32(f([0, *map(float, x.ravel())])) for f in (min, max))
    scale = (high - low) / np.float32(255) if high != low else np.float32(1)
    exact = np.rint(np.clip(np.float32(0) - low / scale, 0, 255))
    levels = np.rint(x / scale) + exact
    return Quantized(
        np.clip(levels, 0, 255).astype(np.uint8), np.float32(scale), np.uint8(exact)
    )


def quantize_weight(w: Array, shared: Iterable[int], rules: Rules = DEFAULT) -> Quantized:
    """Symmetric integers of a weight whose elements share a scale along some axes.

    Divisions are done in float64 and rounded to float32, which gives the nearest float32.
    """
    axes = tuple(shared) if rules.per_channel else tuple(range(w.ndim))
    wide = w.astype(np.float32).astype(np.float64)
    if rules.inputs:
        wide = (wide / input_scale(w, axes)).astype(np.float32).astype(np.float64)
    largest = np.abs(wide).max(axis=axes, keepdims=True)
    scale = _scale(largest, rules.limit)
    if rules.mse:
        scale = _least_error(wide, largest, axes, rules.limit)
    return Quantized(_levels(wide, scale, rules.limit).astype(np.int8), scale, np.int8(0))


def input_scale(w: Array, shared: Iterable[int]) -> Array:
    """Root mean square of the weights of each input channel, to 8 significant bits."""
    axis = next(iter(shared))
    others = tuple(i for i in range(w.ndim) if i != axis)
    exact = np.sqrt(np.square(w.astype(np.float64)).mean(axis=others, keepdims=True))
    if w.shape[axis] == 1:
        return np.ones(exact.shape, np.float32)
    step = 2.0 ** (np.floor(np.log2(np.where(exact > 0, exact, 1))) - 7)
    rounded = (np.rint(exact / step) * step).astype(np.float32)
    return np.where(rounded < SMALLEST, np.float32(1), rounded)


def _scale(largest: Array, limit: int) -> Array:
    scale = (largest / limit).astype(np.float32)
    return np.where(scale < SMALLEST, np.float32(1), scale)


def _levels(wide: Array, scale: Array, limit: int) -> Array:
    ratio = (wide / scale.astype(np.float64)).astype(np.float32)
    return np.clip(np.rint(ratio), -limit, limit)


def _least_error(wide: Array, largest: Array, axes: tuple[int, ...], limit: int) -> Array:
    """Of 21 clips, for each channel the first whose squared error is least."""
    best = np.full(largest.shape, np.inf)
    found = np.ones(largest.shape, np.float32)
    for i in range(21):
        clip = np.float32(1 - i / 50)
        scale = _scale((largest.astype(np.float32) * clip).astype(np.float64), limit)
        decoded = (_levels(wide, scale, limit).astype(np.float32) * scale).astype(np.float64)
        lost = np.square(wide - decoded).sum(axis=axes, keepdims=True)
        found, best = np.where(lost < best, scale, found), np.minimum(lost, best)
    return found


def decoded(w: Array, shared: Iterable[int], rules: Rules = DEFAULT) -> Array:
    """What the integers of a weight stand for."""
    made = quantize_weight(w, shared, rules)
    outputs = made.values.astype(np.float32) * made.scale
    return outputs * input_scale(w, shared) if rules.inputs else outputs


# Products of integers.


def matmul(a: Array, b: Array) -> Array:
    return np.matmul(a.astype(np.int64), b.astype(np.int64))


def conv(x: Array, w: Array, node: NodeProto) -> Array:
    """A convolution of any number of spatial axes; padding is zero."""
    attributes = _attributes(node)
    rank = x.ndim - 2
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    group = attributes.get("group", 1)
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    pads = _pads(attributes, x.shape[2:], reach, strides)
    x = np.pad(x.astype(np.int64), [(0, 0), (0, 0), *pads])
    sizes = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *sizes), np.int64)
    outs, ins = w.shape[0] // group, w.shape[1]
    for g, at in itertools.product(range(group), np.ndindex(*w.shape[2:])):
        window = tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(at, dilations, sizes, strides, strict=True)
        )
        taken = x[:, g * ins : (g + 1) * ins][(slice(None), slice(None), *window)]
        kernel = w[g * outs : (g + 1) * outs][(slice(None), slice(None), *at)]
        part = np.tensordot(kernel.astype(np.int64), taken, axes=([1], [1]))
        y[:, g * outs : (g + 1) * outs] += np.moveaxis(part, 0, 1)
    return y


def _pads(
    attributes: Mapping[str, Any],
    sizes: Sequence[int],
    reach: Sequence[int],
    strides: Sequence[int],
) -> list[tuple[int, int]]:
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    if not auto.startswith("SAME"):
        flat = attributes.get("pads", [0] * 2 * len(sizes))
        return list(zip(flat[: len(sizes)], flat[len(sizes) :], strict=True))
    pads = []
    for n, r, s in zip(sizes, reach, strides, strict=True):
        total = max(0, (-(-n // s) - 1) * s + r - n)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return pads


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# A whole node.


class Product(NamedTuple):
    """A product of integers, and what is made of it.

    Attributes:
        activation: The other operand, quantized.
        weight: The constant operand, quantized.
        integers: The product.
        result: The same as float32, scaled, bias added.
    """

    activation: Quantized
    weight: Quantized
    integers: Array
    result: Array


def summed_axes(node: NodeProto, index: int, rank: int) -> list[int]:
    """The axes of an operand along which a MatMul, Gemm or Conv sums."""
    if node.op_type == "Conv":
        return list(range(1, rank))
    if node.op_type == "MatMul":
        return [rank - 1 if index == 0 else rank - 2]
    turned = _attributes(node).get("transB" if index else "transA", 0)
    return [1 - turned if index == 0 else turned]


def product(
    node: NodeProto, inputs: Sequence[Array | None], index: int, rules: Rules = DEFAULT
) -> Product:
    """What a MatMul, Gemm or Conv gives when its weight is int8 and its activation uint8.

    Args:
        node: The node, of a float32 model.
        inputs: Its inputs.
        index: Which of them is the weight.
        rules: How weights are quantized.
    """
    weight, activation = inputs[index], inputs[1 - index]
    assert weight is not None
    assert activation is not None
    x = dynamic_quantize_linear(activation)
    w = quantize_weight(weight, summed_axes(node, index, weight.ndim), rules)
    levels = [x.values.astype(np.int64) - int(x.zero), w.values.astype(np.int64)]
    if index == 0:
        levels.reverse()
    attributes, scale = _attributes(node), w.scale
    if node.op_type == "Gemm":
        turned = [attributes.get(name, 0) for name in ("transA", "transB")]
        levels = [m.T if t else m for m, t in zip(levels, turned, strict=True)]
        scale = scale.T if turned[index] else scale
        scale = scale * np.float32(attributes.get("alpha", 1.0))
    if node.op_type == "Conv":
        integers = conv(levels[0], levels[1], node)
        scale = scale.reshape(1, -1, *[1] * (weight.ndim - 2))
    else:
        integers = matmul(*levels)
    if node.op_type == "MatMul" and activation.ndim == 1:
        scale = scale.reshape(scale.shape[-1] if index else 1)
    result = integers.astype(np.float32)
    if index == 0 and scale.size > 1:  # scales of rows are multiplied one after the other
        result = result * x.scale * scale
    else:
        result = result * (x.scale * scale)
    return Product(x, w, integers, _with_bias(node, result, inputs[2:]))


def _with_bias(node: NodeProto, result: Array, more: Sequence[Array | None]) -> Array:
    if not more or more[0] is None:
        return result
    if node.op_type == "Conv":
        return result + more[0].reshape(1, -1, *[1] * (result.ndim - 2))
    beta = np.float32(_attributes(node).get("beta", 1.0))
    return result if beta == 0 else result + more[0] * beta


# A tier, held to its parent product by product.


@functools.cache
def saturates() -> bool:
    """Whether this processor adds two products of uint8 and int8 in 16 bits."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (uint8[2,64] a, int8[64,32] b) => (int32[2,32] y) { y = MatMulInteger(a, b) }"""
    a, b = np.full((2, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    found = oracle.run(onnx.parser.parse_model(text), {"a": a, "b": b})["y"]
    return bool((found != 255 * 127 * 64).any())


def exposed(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy with more outputs, and no others."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(names))
    return copy


def values(
    model: ModelProto, names: Iterable[str], inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """Values of the main graph by name, computed by onnxruntime as the nodes say."""
    copy = exposed(model, names)
    constant = {t.name: numpy_helper.to_array(t) for t in copy.graph.initializer}
    given = {**constant, **inputs}
    ours = {i.name for i in copy.graph.input}
    wanted = [o.name for o in copy.graph.output if o.name not in given]
    found = {o.name: given[o.name] for o in copy.graph.output if o.name in given}
    if wanted:
        kept = {n: v for n, v in inputs.items() if n in ours}
        found |= oracle.run(exposed(copy, wanted), kept, optimized=False)
    return found


def assert_products(
    parent: ModelProto,
    tier: ModelProto,
    inputs: Mapping[str, Array],
    rules: Rules = DEFAULT,
) -> int:
    """Fail unless each integer product of the main graph is what the node it replaced wants.

    The quantized activation, its scale and zero point, the int32 product and the float32
    result are all equal, bit for bit, to those of the reference, which is fed what the tier
    feeds the node, and the weight of the parent.

    Returns:
        How many products were compared.
    """
    parents = {node.output[0]: node for node in parent.graph.node}
    names = [name for node in parents.values() for name in node.input if name]
    constants = _constants(parent)
    known = values(parent, [n for n in names if n in constants], inputs)
    found = [_steps(tier.graph, node) for node in tier.graph.node if node.op_type in PRODUCTS]
    inner = [n for steps in found for n in steps.values()]
    bias = [parents[s["result"]].input[2] for s in found if _has_bias(parents[s["result"]])]
    seen = values(tier, [*inner, *bias], inputs)
    for steps in found:
        node = parents[steps["result"]]
        index = next(i for i in (0, 1) if node.input[i] in constants)
        assert node.input[1 - index] == steps["activation"]
        fed = [known.get(n, seen.get(n)) if n else None for n in node.input]
        fed[1 - index] = seen[steps["activation"]]
        wanted = product(node, fed, index, rules)
        told = {"quantized": wanted.activation.values, "scale": wanted.activation.scale}
        told |= {"zero": wanted.activation.zero, "result": wanted.result}
        told["integers"] = wanted.integers.astype(np.int32)
        for step, value in told.items():
            same(seen[steps[step]], value, f"{step} of {node.output[0]}")
    return len(found)


def _has_bias(node: NodeProto) -> bool:
    return len(node.input) > 2 and bool(node.input[2])


def same(found: Array, wanted: Array, what: str) -> None:
    """Fail unless arrays agree in type, shape and every bit but the sign of zero."""
    wanted = np.asarray(wanted)
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), what
    assert np.array_equal(found, wanted), f"{what}: {np.count_nonzero(found != wanted)} differ"


def _constants(model: ModelProto) -> set[str]:
    """Names of the values of the main graph that no input reaches."""
    fed = {i.name for i in model.graph.input}
    found = {t.name for t in model.graph.initializer} - fed
    for _ in model.graph.node:  # in any order
        for node in model.graph.node:
            if set(node.input) <= found | {""} and node.op_type != "If":
                found.update(node.output)
    return found


def _steps(graph: GraphProto, integer: NodeProto) -> dict[str, str]:
    """Names of what leads to an integer product and of what follows it."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    (quantize,) = (m for name in integer.input[:2] for m in _behind(name, makers))
    (cast,) = readers[integer.output[0]]
    (scaled,) = readers[cast.output[0]]
    assert (cast.op_type, scaled.op_type) == ("Cast", "Mul")
    if quantize.output[1] in scaled.input:
        (scaled,) = readers[scaled.output[0]]
    result = scaled.output[0]
    if result.endswith("_product"):
        (add,) = readers[result]
        assert add.op_type == "Add"
        result = add.output[0]
    quantized, scale, zero = quantize.output
    assert zero in integer.input[2:]
    return {
        "activation": quantize.input[0],
        "quantized": quantized,
        "scale": scale,
        "zero": zero,
        "integers": integer.output[0],
        "result": result,
    }


def _behind(name: str, makers: Mapping[str, NodeProto]) -> Iterator[NodeProto]:
    node = makers.get(name)
    if node is not None and node.op_type == "Transpose":
        yield from _behind(node.input[0], makers)
    if node is not None and node.op_type == "DynamicQuantizeLinear":
        yield node


def changed(model: ModelProto, name: str, change: Callable[[Array], Array]) -> ModelProto:
    """A copy in which an initializer of the main graph holds other values."""
    copy = ModelProto()
    copy.CopyFrom(model)
    (tensor,) = (t for t in copy.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(
        numpy_helper.from_array(
            np.ascontiguousarray(change(values)).astype(values.dtype), name
        )
    )
    return copy


def initializers(model: ModelProto) -> dict[str, Array]:
    """Initializers of the main graph, by name."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def dead(model: ModelProto) -> list[str]:
    """Float constants that nothing reads, in any graph or function."""
    found = []
    for graph in _graphs(model):
        held = [t.name for t in getattr(graph, "initializer", ()) if _is_real(t.data_type)]
        held += [
            n.output[0]
            for n in graph.node
            if n.op_type == "Constant" and any(_is_real(a.t.data_type) for a in n.attribute)
        ]
        read = set(_read(graph))
        found += [name for name in held if name not in read]
    return found


def _is_real(kind: int) -> bool:
    return kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _graphs(model: ModelProto) -> Iterator[Any]:
    waiting: list[Any] = [model.graph, *model.functions]
    for graph in waiting:
        yield graph
        waiting += [
            a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH
        ]


def _read(graph: Any) -> Iterator[str]:
    """Names that a graph and all graphs inside it read, and its outputs."""
    for output in graph.output:
        yield output if isinstance(output, str) else output.name
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _read(attribute.g)
