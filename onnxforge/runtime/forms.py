"""Forms known to fail although every operator has a kernel, each found by running it.

A form is a function of one node; where it fits, the releases of its span do not load the
model, or load it and fail when it runs. All of them are tried on every release by
`benchmarks/predicted.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxforge.lazy import FileTensor
from onnxforge.runtime.kernels import Provider, has_kernel, releases, within
from onnxforge.runtime.uses import Use
from onnxforge.walk import Scope, input_of, scopes

__all__ = ["Fault", "faults"]


@dataclass(frozen=True)
class Fault:
    """A form that was found in a model.

    Attributes:
        where: Path of the node, weight or value.
        text: What is wrong, in one line.
        span: The releases that fail, as the tables write it.
        at_run: Whether they load the model and fail then.
        providers: The providers that fail.
    """

    where: str
    text: str
    span: str = ""
    at_run: bool = False
    providers: tuple[Provider, ...] = ("cpu", "web")

    def holds(self, release: str, provider: Provider) -> bool:
        """Whether a release fails on it."""
        return provider in self.providers and within(self.span, release)


def faults(model: ir.Model, uses: Iterable[Use]) -> Iterator[Fault]:
    """The forms in a model that some release fails on."""
    known = {use.node: use for use in uses}
    yield from _of_model(model)
    for scope in scopes(model):
        for value in scope.graph.initializers.values():
            yield from _weight(scope, value, known)
    for use in known.values():
        if form := _FORMS.get((use.domain, use.node.op_type)):
            yield from filter(None, [form(use)])
        if (use.domain, use.node.op_type) == ("", "CastLike"):
            yield from filter(None, [_cast_like(use, known)])
        yield from _outside(use)


# Inputs whose values a runtime reads while it loads a model, never from a data file.
_SHAPES = {
    **dict.fromkeys(("CenterCropPad", "Expand", "Reshape", "Split", "SplitToSequence"), (1,)),
    **dict.fromkeys(("Squeeze", "STFT", "Tile", "TopK", "Unsqueeze", "Upsample"), (1,)),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"), (1,)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"), (1,)),
    **dict.fromkeys(("ReduceSum", "ReduceSumSquare"), (1,)),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (2,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
}


def _outside(use: Use) -> Iterator[Fault]:
    positions = _SHAPES.get(use.node.op_type, ()) if not use.domain else ()
    for i in positions:
        tensor = _constant(use, i)
        if isinstance(tensor, FileTensor) and tensor.external:
            text = f"{use.node.op_type} needs {tensor.name} at load, which is in a data file"
            yield Fault(use.where, text, providers=("cpu", "cuda", "web"))


def _of_model(model: ir.Model) -> Iterator[Fault]:
    everywhere: tuple[Provider, ...] = ("cpu", "cuda", "web")
    overloads = [function for function in model.functions.values() if function.overload]
    for function in overloads[:1]:
        text = f"function {function.name} has overloads"
        yield Fault(function.domain, text, "..1.26", providers=everywhere)
    for scope in scopes(model):
        own = {value for node in scope.graph for value in node.outputs}
        own |= {*scope.graph.inputs, *scope.graph.initializers.values()}
        for value in scope.graph.outputs if scope.parent is not None else ():
            if value not in own:
                text = "a body gives back a value from outside of it"
                yield Fault(f"{scope.path}{value.name}", text, providers=everywhere)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.BFLOAT16:
            text = "onnxruntime-web takes and gives no bfloat16"
            yield Fault(value.name or "", text, "1.22..", providers=("web",))


def _weight(scope: Scope, value: ir.Value, known: Mapping[ir.Node, Use]) -> Iterator[Fault]:
    where, tensor = f"{scope.path}{value.name}", value.const_value
    if isinstance(tensor, FileTensor) and tensor.external:
        if 0 in tensor.shape:
            text = "a weight without elements is in a data file"
            yield Fault(where, text, _EMPTY, providers=("cpu", "cuda", "web"))
        if scope.parent is not None:
            text = "a weight of a body is in a data file, which onnxruntime-web does not find"
            yield Fault(where, text, providers=("web",))
    readers = [reader for reader, _ in value.uses()]
    half = tensor is not None and tensor.dtype == ir.DataType.FLOAT16
    single = half and value.is_graph_input() and len(set(readers)) == 1
    if single and _is_cast(known.get(readers[0])):
        text = "a float16 weight that is an input too, cast for its only reader, crashes"
        yield Fault(where, text, "1.23..1.29")


_EMPTY = "1.23..1.31"  # at the end of a data file, or in an empty one


def _is_cast(use: Use | None) -> bool:
    """Whether casts from float16 are put around a node, on the processor."""
    if use is None or "float16" not in use.inputs:
        return False
    operator = use.domain, use.node.op_type, use.version or 1
    return not has_kernel(releases()[0], "cpu", operator, use.inputs, use.outputs)


def _constant(use: Use, i: int) -> ir.TensorProtocol | None:
    """The weight that is an input of a node."""
    value = input_of(use.node, i)
    if value is None or value.const_value is not None:
        return None if value is None else value.const_value
    maker = value.producer()
    if maker is None or maker.op_type != "Constant" or "value" not in maker.attributes:
        return None
    attribute = maker.attributes["value"]
    return None if attribute.is_ref() else attribute.as_tensor()


def _count(use: Use, i: int) -> int:
    """How many elements the weight that is an input has, 0 where it is none."""
    tensor = _constant(use, i)
    return 0 if tensor is None else tensor.size


def _maker(use: Use, i: int) -> ir.Node | None:
    """The node that an input comes from, casts that may change nothing aside."""
    value = input_of(use.node, i)
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in ("Cast", "CastLike", "Identity"):
        value = input_of(maker, 0)
        maker = None if value is None else value.producer()
    return maker


def _rank(value: ir.Value | None) -> int | None:
    if value is None:
        return None
    shape = value.const_value.shape if value.const_value is not None else value.shape
    return None if shape is None else len(shape)


def _attribute(use: Use, name: str) -> object:
    attribute = use.attributes.get(name)
    return None if attribute is None else attribute.value


def _conv_integer(use: Use) -> Fault | None:
    if _count(use, 3) > 1:
        text = "ConvInteger has a zero point for each channel of the weights"
        return Fault(use.where, text, at_run=True, providers=("cpu", "cuda", "web"))
    if len(use.inputs) > 3 and use.inputs[2] == "":
        text = "ConvInteger has a zero point of the weights and none of the activation"
        return Fault(use.where, text, "..1.21", at_run=True)
    return None


def _matmul_integer(use: Use) -> Fault | None:
    everywhere: tuple[Provider, ...] = ("cpu", "cuda", "web")
    if _count(use, 2) > 1:
        text = "MatMulInteger has a zero point for each row of the activation"
        return Fault(use.where, text, at_run=True, providers=everywhere)
    zero, weight = _constant(use, 3), input_of(use.node, 1)
    flat = zero is not None and len(zero.shape) == 1 and _count(use, 3) > 1
    if flat and (_rank(weight) or 0) > 2:
        text = "MatMulInteger has batched weights and a flat zero point for each column"
        return Fault(use.where, text, at_run=True, providers=everywhere)
    return None


def _matmul(use: Use) -> Fault | None:
    if "double" in use.inputs and any(map(_is_transposed, use.node.inputs)):
        text = "MatMul of double behind Transpose is fused into what only takes float"
        return Fault(use.where, text, "..1.25")
    return _batched_qdq(use)


_ELEMENTWISE = {"Add", "Cast", "CastLike", "Div", "Identity", "Mul", "Sub"}


def _is_transposed(value: ir.Value | None) -> bool:
    """Whether it comes from a Transpose, through what a runtime moves that across.

    One of a weight is none: it is computed when the model is loaded.
    """
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        source = input_of(node, 0)
        if node.op_type == "Transpose" and source is not None:
            if source.const_value is None or source.is_graph_input():
                return True
        elif node.op_type in _ELEMENTWISE:
            waiting += node.inputs
    return False


def _batched_qdq(use: Use) -> Fault | None:
    """Activation and batched weights dequantized, the latter with a zero point a column."""
    makers = [_maker(use, i) for i in (0, 1)]
    if any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
        return None
    weight = makers[1]
    assert weight is not None
    zero = input_of(weight, 2)
    if zero is None or zero.const_value is None or zero.const_value.size <= 1:
        return None
    if (_rank(input_of(weight, 0)) or 0) < 3:
        return None
    text = "MatMul of batched weights that are dequantized with a zero point for each column"
    return Fault(use.where, text, at_run=True)


def _mul(use: Use) -> Fault | None:
    if use.inputs != ("double", "double"):
        return None
    for i in (0, 1):
        maker = _maker(use, i)
        gate = maker is not None and maker.op_type == "Sigmoid"
        if maker is not None and gate and input_of(maker, 0) is use.node.inputs[1 - i]:
            text = "x * Sigmoid(x) of double is fused into what only takes float"
            return Fault(use.where, text, "..1.30")
    return None


def _relu(use: Use) -> Fault | None:
    maker = _maker(use, 0)
    if use.inputs == ("double",) and maker is not None and maker.op_type == "Gemm":
        text = "Relu behind Gemm of double is fused into what only takes float"
        return Fault(use.where, text, "..1.17")
    return None


def _recurrent(use: Use) -> Fault | None:
    if _attribute(use, "layout") == 1:
        return Fault(use.where, f"{use.node.op_type} with layout=1 has no kernel")
    return None


def _dft(use: Use) -> Fault | None:
    if _attribute(use, "inverse") == 1 and _attribute(use, "onesided") == 1:
        text = "DFT cannot be both inverse and onesided"
        return Fault(use.where, text, "..1.24", providers=("cpu", "cuda", "web"))
    return None


def _grid_sample(use: Use) -> Fault | None:
    mode = _attribute(use, "mode")
    if (use.version or 20) < 20 and mode in ("linear", "cubic"):
        text = f"GridSample 16 has no mode {mode}, but bilinear and bicubic"
        return Fault(use.where, text)
    return None


def _cast_like(use: Use, known: Mapping[ir.Node, Use]) -> Fault | None:
    value = input_of(use.node, 0)
    maker = None if value is None else value.producer()
    if use.inputs != ("float16", "float16") or maker is None:
        return None
    outputs = use.node.outputs
    readers = [known.get(reader) for output in outputs for reader, _ in output.uses()]
    if _is_cast(known.get(maker)) and any(map(_is_cast, readers)):
        text = "CastLike from float16 to float16 between nodes without kernels for it"
        return Fault(use.where, text, "..1.30")
    return None


def _attention(use: Use) -> Fault | None:
    masked = len(use.inputs) > 3 and use.inputs[3] not in ("", "bool")
    if not masked or use.inputs[0] != "double":
        return None
    span = "..1.31" if _attribute(use, "is_causal") == 1 else "..1.23"
    return Fault(use.where, "Attention of double with a mask of numbers", span)


def _dequantize(use: Use) -> Fault | None:
    if _attribute(use, "block_size") and use.inputs[:1] in (("int8",), ("uint8",)):
        text = "DequantizeLinear in blocks of 8 bits"
        return Fault(use.where, text, "..1.18", at_run=True)
    return None


_FORMS: dict[tuple[str, str], Callable[[Use], Fault | None]] = {
    ("", "Attention"): _attention,
    ("", "ConvInteger"): _conv_integer,
    ("", "DFT"): _dft,
    ("", "DequantizeLinear"): _dequantize,
    ("", "GRU"): _recurrent,
    ("", "GridSample"): _grid_sample,
    ("", "LSTM"): _recurrent,
    ("", "MatMul"): _matmul,
    ("", "MatMulInteger"): _matmul_integer,
    ("", "Mul"): _mul,
    ("", "RNN"): _recurrent,
    ("", "Relu"): _relu,
}
