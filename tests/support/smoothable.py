"""Random small graphs of what smoothing follows: products, norms and what moves channels."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["Case", "cases"]

Array = np.ndarray
_IR = {11: 6, 13: 7, 17: 8, 20: 9, 23: 10}
_SIZES = (2, 3, 4, 6)


class Case(NamedTuple):
    """A model, whether all of it is finite, and what it runs on."""

    model: ModelProto
    finite: bool
    inputs: list[dict[str, Array]]


class _Net:
    """A graph in the making; every value is float32 of a shape that is known here."""

    def __init__(self, draw: Random, opset: int) -> None:
        self.draw, self.opset = draw, opset
        self.nodes: list[NodeProto] = []
        self.held: dict[str, Array] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.overridable: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.finite = True
        self._count = 0

    def name(self, word: str) -> str:
        self._count += 1
        return f"{word}{self._count}"

    def floats(self, *shape: int) -> Array:
        rng = np.random.default_rng(self.draw.randrange(1000))
        return (rng.standard_normal(shape) + 0.1).astype(np.float32)

    def add(self, op: str, inputs: list[str], *shape: int, **attributes: Any) -> None:
        self.shapes[self.name("v")] = shape
        self.raw(op, inputs, f"v{self._count}", **attributes)

    def raw(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))

    def constant(self, array: Array) -> str:
        """A constant: one of before, initializer, Constant node or default of an input."""
        tied = [n for n, a in self.held.items() if a.shape == array.shape and n[0] == "c"]
        if array.dtype == np.float32 and tied and self.draw.random() < 0.25:
            return self.draw.choice(tied)
        name = self.name("c" if array.dtype == np.float32 else "i")
        kind = self.draw.random() if array.dtype == np.float32 else 1
        if kind < 0.2:
            self.raw("Constant", [], name, value=numpy_helper.from_array(array))
            return name
        self.held[name] = array
        if kind < 0.27:
            self.overridable.append(name)
        return name

    def weight(self, *shape: int) -> str:
        """A weight: with dead channels, not finite, or behind a node that moves it."""
        kind = self.draw.random()
        array = self.floats(*shape)
        if not array.size:
            return self.constant(array)
        if kind < 0.15:
            array[self.draw.randrange(shape[0])] = 0
        elif kind < 0.2:
            array.flat[0] = self.draw.choice([np.nan, np.inf])
            self.finite = False
        if kind > 0.85:
            order = list(range(len(shape)))[::-1]
            source, name = self.constant(array.transpose(order).copy()), self.name("w")
            self.raw("Transpose", [source], name, perm=order)
            return name
        return self.constant(array)

    def grow(self) -> None:
        """Add a node, if the one drawn is possible behind the value drawn."""
        recent = list(self.shapes)[-3:]
        value = self.draw.choice([*self.shapes, *recent, *recent, recent[-1]])
        shape = self.shapes[value]
        self.draw.choice(_STEPS)(self, value, shape)


_Shape = tuple[int, ...]
_Step = Callable[[_Net, str, _Shape], None]


def _matmul(net: _Net, x: str, shape: _Shape) -> None:
    k = net.draw.choice(_SIZES)
    kind = net.draw.random()
    if kind < 0.75 or len(shape) < 2:
        net.add("MatMul", [x, net.weight(shape[-1], k)], *shape[:-1], k)
    elif kind < 0.9:
        net.add("MatMul", [net.weight(k, shape[-2]), x], *shape[:-2], k, shape[-1])
    elif len(shape) == 3:
        net.add("MatMul", [x, net.weight(shape[0], shape[-1], k)], *shape[:-1], k)


def _gemm(net: _Net, x: str, shape: _Shape) -> None:
    if len(shape) != 2:
        return
    k, turned = net.draw.choice(_SIZES), net.draw.random() < 0.5
    flipped = net.draw.random() < 0.15
    rows, summed = shape[::-1] if flipped else shape
    inputs = [x, net.weight(*((k, summed) if turned else (summed, k)))]
    bias = net.draw.choice([None, (k,), (k,), (1, k), (), (1,), (1, 1), (rows, 1)])
    attributes = {
        word: net.draw.choice([1.0, 0.5, 2.0, -1.0])
        for word in ("alpha", "beta")
        if net.draw.random() < 0.5
    }
    if bias is not None:
        inputs.append(net.constant(net.floats(*bias)))
    net.add("Gemm", inputs, rows, k, transA=int(flipped), transB=int(turned), **attributes)


def _conv(net: _Net, x: str, shape: _Shape) -> None:
    if len(shape) < 3:
        return
    k, group = net.draw.choice(_SIZES), net.draw.choice([1, 1, 2])
    if shape[1] % group or k % group:
        return
    inputs = [x, net.weight(k, shape[1] // group, *[1] * (len(shape) - 2))]
    if net.draw.random() < 0.5:
        inputs.append(net.constant(net.floats(k)))
    net.add("Conv", inputs, shape[0], k, *shape[2:], group=group)


def _constant_beside(net: _Net, x: str, shape: _Shape) -> None:
    op = net.draw.choice(["Mul", "Add", "Sub", "Div", "Add"])
    one = net.draw.randrange(len(shape))
    along = tuple(n if i == one else 1 for i, n in enumerate(shape))
    other = net.draw.choice(
        [shape[-1:], shape[-1:], (), (1,), (1,) * len(shape), along, along[one:], (1, *shape)]
    )
    if len(other) > 4:
        return
    content = net.floats(*other)
    inputs = [x, net.constant(np.where(np.abs(content) < 0.1, np.float32(0.5), content))]
    if net.draw.random() < 0.3 and op != "Div":
        inputs.reverse()
    net.add(op, inputs, *np.broadcast_shapes(shape, other))


def _two(net: _Net, x: str, shape: _Shape) -> None:
    same = [name for name, other in net.shapes.items() if other == shape]
    net.add("Add", [x, net.draw.choice(same)], *shape)


def _straight(net: _Net, x: str, shape: _Shape) -> None:
    net.add(net.draw.choice(["Relu", "Relu", "Identity", "Tanh"]), [x], *shape)


def _transpose(net: _Net, x: str, shape: _Shape) -> None:
    perm = list(range(len(shape)))[::-1]
    if net.draw.random() < 0.2:
        net.add("Transpose", [x], *shape[::-1])
        return
    net.draw.shuffle(perm)
    net.add("Transpose", [x], *(shape[i] for i in perm), perm=perm)


def _reshape(net: _Net, x: str, shape: _Shape) -> None:
    kind = net.draw.randrange(6)
    new: list[int]
    if kind == 0 and shape[-1] % 2 == 0 and len(shape) < 4:
        wanted, new = [*[0] * (len(shape) - 1), 2, -1], [*shape[:-1], 2, shape[-1] // 2]
    elif kind == 1 and len(shape) > 2:
        wanted, new = [-1, *shape[2:]], [shape[0] * shape[1], *shape[2:]]
    elif kind == 2 and len(shape) > 2:
        wanted = [*[0] * (len(shape) - 2), -1]
        new = [*shape[:-2], shape[-2] * shape[-1]]
    elif kind == 3 and len(shape) < 4:
        wanted, new = [1, *shape[:-1], -1], [1, *shape]
    elif kind == 4:
        wanted, new = [-1, shape[0]], [int(np.prod(shape[1:])), shape[0]]
    else:
        wanted, new = [-1, shape[-1]], [int(np.prod(shape[:-1])), shape[-1]]
    if 0 in shape and (-1 in wanted or 0 in wanted):
        wanted = new
    net.add("Reshape", [x, net.constant(np.array(wanted, np.int64))], *new)


def _axes(net: _Net, op: str, x: str, axis: int, shape: _Shape) -> None:
    if net.opset < 13:
        net.add(op, [x], *shape, axes=[axis])
    else:
        net.add(op, [x, net.constant(np.array([axis], np.int64))], *shape)


def _squeeze(net: _Net, x: str, shape: _Shape) -> None:
    if 1 in shape and len(shape) > 2:
        at = shape.index(1)
        axis = at - len(shape) if net.draw.random() < 0.5 else at
        _axes(net, "Squeeze", x, axis, (*shape[:at], *shape[at + 1 :]))
    elif len(shape) < 4:
        at = net.draw.randrange(len(shape) + 1)
        axis = at - len(shape) - 1 if net.draw.random() < 0.5 else at
        _axes(net, "Unsqueeze", x, axis, (*shape[:at], 1, *shape[at:]))


def _flatten(net: _Net, x: str, shape: _Shape) -> None:
    axis = net.draw.choice([None, *range(-len(shape), len(shape) + 1)])
    at = 1 if axis is None else axis % len(shape) if axis < len(shape) else axis
    attributes = {} if axis is None else {"axis": axis}
    ahead, behind = (int(np.prod(part)) for part in (shape[:at], shape[at:]))
    net.add("Flatten", [x], ahead, behind, **attributes)


def _split(net: _Net, x: str, shape: _Shape) -> None:
    axis = net.draw.choice([0, -1, net.draw.randrange(len(shape))])
    length = shape[axis]
    first = length // 2 if net.draw.random() < 0.4 else net.draw.randrange(1, max(2, length))
    if length < 2 or (2 * first == length and net.opset >= 18):
        return
    outputs = [net.name("v"), net.name("v")]
    attributes: dict[str, Any] = {"axis": axis}
    if axis == 0 and net.draw.random() < 0.5:
        del attributes["axis"]
    inputs, sizes = [x], [first, length - first]
    if 2 * first != length and net.opset < 13:
        attributes["split"] = sizes
    elif 2 * first != length:
        inputs.append(net.constant(np.array(sizes, np.int64)))
    net.nodes.append(helper.make_node("Split", inputs, outputs, **attributes))
    at = axis % len(shape)
    for name, size in zip(outputs, sizes, strict=True):
        net.shapes[name] = (*shape[:at], size, *shape[at + 1 :])


def _norm(net: _Net, x: str, shape: _Shape) -> None:
    kind, axis = net.draw.randrange(4), net.draw.choice([-1, len(shape) - 1, -2])
    if kind == 0 and len(shape) > 1:
        names = [net.constant(net.floats(shape[1])) for _ in range(3)]
        variance = net.constant(np.abs(net.floats(shape[1])) + np.float32(0.1))
        if (net.held.get(variance, np.ones(1)) > 0).all():
            net.add("BatchNormalization", [x, *names, variance], *shape)
    elif kind == 1 and len(shape) > 2:
        names = [net.constant(net.floats(shape[1])) for _ in range(2)]
        net.add("InstanceNormalization", [x, *names], *shape)
    elif net.opset >= 17 and len(shape) >= max(1, -axis):
        width = shape[axis:] if axis < 0 else shape[-1:]
        op = "RMSNormalization" if net.opset >= 23 and kind == 2 else "LayerNormalization"
        count = 1 if op[0] == "R" else net.draw.choice([1, 2])
        names = [net.constant(net.floats(*width)) for _ in range(count)]
        attributes = {} if axis == -1 and net.draw.random() < 0.5 else {"axis": axis}
        net.add(op, [x, *names], *shape, **attributes)


def _branch(net: _Net, x: str, shape: _Shape) -> None:
    """An If whose bodies capture a value, and perhaps a weight that others read too."""
    if net.draw.random() < 0.6:
        return
    k, bodies = net.draw.choice(_SIZES), []
    weight = net.weight(shape[-1], k)
    plain = net.draw.random() < 0.3
    for word in ("then", "else"):
        name = net.name(word)
        node = helper.make_node("MatMul", [x, weight], [name])
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        if plain:
            value = helper.make_tensor_value_info(x, TensorProto.FLOAT, None)
        bodies.append(helper.make_graph([] if plain else [node], word, [], [value]))
    attributes = {f"{g.name}_branch": g for g in bodies}
    net.add("If", ["flag"], *(shape if plain else (*shape[:-1], k)), **attributes)


_STEPS: list[_Step] = [
    *[_matmul] * 5,
    *[_gemm] * 4,
    *[_conv] * 2,
    *[_constant_beside] * 5,
    *[_norm] * 3,
    *[_straight, _transpose, _reshape] * 2,
    *[_two, _squeeze, _flatten, _split, _branch],
]


def _model(net: _Net, dynamic: bool, inferred: bool) -> ModelProto:
    draw = net.draw
    read = {name for node in net.nodes for name in node.input}
    ends = [name for name in net.shapes if name not in read and name not in net.inputs]
    more = [name for name in net.shapes if name not in net.inputs and draw.random() < 0.1]
    inputs = [
        helper.make_tensor_value_info(
            name, 1, [f"{name}_{i}" if dynamic and i == 0 else n for i, n in enumerate(shape)]
        )
        for name, shape in net.inputs.items()
    ]
    inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    inputs += [
        helper.make_tensor_value_info(name, 1, net.held[name].shape)
        for name in net.overridable
    ]
    outputs = [
        helper.make_tensor_value_info(name, 1, None) for name in dict.fromkeys(ends + more)
    ]
    held = [numpy_helper.from_array(array, name) for name, array in net.held.items()]
    graph = helper.make_graph(net.nodes, "net", inputs, outputs, held)
    opset = helper.make_opsetid("", net.opset)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=_IR[net.opset])
    return onnx.shape_inference.infer_shapes(made) if inferred else made


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a model with some inputs to calibrate and run it on."""
    random = draw(st.randoms(use_true_random=False))
    net = _Net(random, random.choice(list(_IR)))
    empty = random.random() < 0.05
    for name in ("x", "z")[: random.choice([1, 1, 2])]:
        rank = random.choice([1, 2, 2, 3, 3, 4])
        net.inputs[name] = tuple(random.choice(_SIZES) for _ in range(rank))
        if empty and rank > 1:
            net.inputs[name] = (0, *net.inputs[name][1:])
    net.shapes.update(net.inputs)
    for _ in range(draw(st.integers(2, 9))):
        net.grow()
    if not net.nodes:
        net.add("MatMul", ["x", net.weight(net.inputs["x"][-1], 4)], *net.inputs["x"][:-1], 4)
    made = _model(net, random.random() < 0.6, random.random() < 0.8)
    fed = [
        {name: net.floats(*shape) for name, shape in net.inputs.items()}
        | {"flag": np.array(i > 0)}
        for i in range(3)
    ]
    return Case(made, net.finite, fed)
