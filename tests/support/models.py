"""Hypothesis strategies: odd arrays, and small random models that hide their weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import (
    FunctionProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

Array = np.ndarray
_OPSET, _IR = 18, 9
_PLACES = ("initializer", "constant", "shared", "graph_input", "captured", "inner", "function")
_OPERATORS = ("MatMul", "Add", "Mul", "Gather", "Identity", "Transpose", "Neg")


def _near(*centres: float) -> list[float]:
    """Return each centre with its two float32 neighbours, both signs."""
    exact = np.array(centres, np.float32)
    around = [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(3e38))]
    positive = np.concatenate(around)
    return [float(v) for v in np.concatenate([positive, -positive])]


_EDGES = [0.0, -0.0, 1.0, *_near(65504, 65519.99, 65520, 2**-14, 2**-24, 2**-25, 1e-40)]


def floats(*, finite: bool = False) -> st.SearchStrategy[float]:
    """Draw float32 values, often from where float16 ends or thins out."""
    anything = st.floats(width=32, allow_nan=not finite, allow_infinity=not finite)
    return st.sampled_from(_EDGES) | st.floats(-4, 4, width=32) | anything


def arrays(*, finite: bool = False) -> st.SearchStrategy[Array]:
    """Draw float32 arrays of rank 0 to 3 with sides 0 to 4."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return hnp.arrays(np.float32, shapes, elements=floats(finite=finite))


class Case(NamedTuple):
    """A model and one set of inputs it runs on."""

    model: ModelProto
    inputs: dict[str, Array]


@dataclass
class _Builder:
    """A model in the making; every value is a float32 matrix of known shape."""

    draw: st.DrawFn
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, Array] = field(default_factory=dict)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    functions: list[FunctionProto] = field(default_factory=list)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    count: int = 0

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def array(self, shape: tuple[int, int]) -> Array:
        # Products of six of these stay finite: an overflow would hide what differs.
        elements = st.sampled_from(_EDGES) | st.floats(-4, 4, width=32)
        return self.draw(hnp.arrays(np.float32, shape, elements=elements))

    def initializer(self, values: Array) -> str:
        name = self.name("w")
        self.initializers[name] = values
        return name

    def node(self, operator: str, inputs: list[str], shape: tuple[int, int], **kw) -> str:
        output = self.name("v")
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **kw))
        self.shapes[output] = shape
        return output


def _constant(output: str, values: Array) -> NodeProto:
    tensor = numpy_helper.from_array(values)
    return helper.make_node("Constant", [], [output], output, value=tensor)


def _info(name: str, shape: tuple[int, int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _weight(b: _Builder, place: str, shape: tuple[int, int]) -> str:
    """Put a weight of this shape in the place and return its name there."""
    if place == "shared":
        same = [n for n, v in b.initializers.items() if v.shape == shape]
        return b.draw(st.sampled_from(same)) if same else b.initializer(b.array(shape))
    if place == "constant":
        name = b.name("c")
        b.nodes.append(_constant(name, b.array(shape)))
        return name
    name = b.initializer(b.array(shape))
    if place == "graph_input":
        b.inputs.append(_info(name, shape))
    return name


def _apply(b: _Builder, operator: str, x: str, place: str) -> str:
    """Add one operator on x and a weight that hides in the place."""
    shape, wanted = _shapes(b, operator, x)
    if place == "function":
        return _call(b, operator, x, shape, wanted)
    if place in ("captured", "inner"):
        return _branch(b, operator, x, shape, wanted, own=place == "inner")
    return b.node(operator, [x, _weight(b, place, wanted)], shape)


def _shapes(b: _Builder, operator: str, x: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the result's and the weight's shape."""
    rows, columns = b.shapes[x]
    if operator == "MatMul":
        width = b.draw(st.integers(1, 4))
        return (rows, width), (columns, width)
    wanted = b.draw(st.sampled_from([(rows, columns), (1, columns), (rows, 1), (1, 1)]))
    return (rows, columns), wanted


def _branch(
    b: _Builder,
    operator: str,
    x: str,
    shape: tuple[int, int],
    wanted: tuple[int, int],
    *,
    own: bool,
) -> str:
    """Add an If whose branches read a weight of their own or the same outer one."""
    outer = None if own else b.initializer(b.array(wanted))
    branches = {}
    for branch, order in (("then", 1), ("else", -1)):
        result, weight = b.name("r"), outer or b.name("w")
        inner = [numpy_helper.from_array(b.array(wanted), weight)] if own else []
        # Add and Mul commute, so the branches differ in more than a name.
        inputs = [x, weight] if operator == "MatMul" else [x, weight][::order]
        node = helper.make_node(operator, inputs, [result], result)
        branches[f"{branch}_branch"] = helper.make_graph(
            [node], result, [], [_info(result, shape)], inner
        )
    return b.node("If", ["flag"], shape, **branches)


def _call(
    b: _Builder, operator: str, x: str, shape: tuple[int, int], wanted: tuple[int, int]
) -> str:
    """Add a function with the weight in its body, and a call."""
    name = b.name("f")
    nodes = [
        _constant(f"{name}_w", b.array(wanted)),
        helper.make_node(operator, ["u", f"{name}_w"], ["v"], f"{name}_v"),
    ]
    opsets = [helper.make_opsetid("", _OPSET)]
    b.functions.append(helper.make_function("local", name, ["u"], ["v"], nodes, opsets))
    return b.node(name, [x], shape, domain="local")


def _gather(b: _Builder, place: str) -> str:
    rows, columns = b.draw(st.integers(1, 4)), b.draw(st.integers(1, 4))
    if place not in ("initializer", "constant", "shared", "graph_input"):
        place = "initializer"
    picked = b.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
    ids = b.name("i")
    b.initializers[ids] = np.array(picked, np.int64)
    return b.node("Gather", [_weight(b, place, (rows, columns)), ids], (len(picked), columns))


def _step(b: _Builder) -> None:
    operator = b.draw(st.sampled_from(_OPERATORS))
    place = b.draw(st.sampled_from(_PLACES))
    x = b.draw(st.sampled_from(sorted(b.shapes)))
    if operator == "Gather":
        _gather(b, place)
    elif operator == "Transpose":
        b.node(operator, [x], b.shapes[x][::-1])
    elif operator in ("Identity", "Neg"):
        b.node(operator, [x], b.shapes[x])
    else:
        _apply(b, operator, x, place)


def _finish(b: _Builder) -> ModelProto:
    read = {name for node in b.nodes for name in node.input}
    outputs = [n for n in b.shapes if n.startswith("v") and n not in read]
    # Also what only a branch reads, and now and then a value in the middle.
    middle = [n for n in b.shapes if n.startswith("v") and n not in outputs]
    if middle and b.draw(st.booleans()):
        outputs.append(b.draw(st.sampled_from(middle)))
    infos = [_info(n, b.shapes[n]) for n in outputs]
    weights = [numpy_helper.from_array(v, n) for n, v in b.initializers.items()]
    graph = helper.make_graph(b.nodes, "random", b.inputs, infos, weights)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("local", 1)]
    return helper.make_model(
        graph, functions=b.functions, opset_imports=opsets, ir_version=_IR
    )


@st.composite
def models(draw: st.DrawFn, max_nodes: int = 6) -> Case:
    """Draw a valid model of a few nodes over float32 matrices, and inputs for it."""
    b = _Builder(draw)
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    b.shapes["x"] = shape
    b.inputs = [
        _info("x", shape),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    for _ in range(draw(st.integers(1, max_nodes))):
        _step(b)
    elements = st.floats(-4, 4, width=32)
    x = draw(hnp.arrays(np.float32, shape, elements=elements))
    return Case(_finish(b), {"x": x, "flag": np.array(draw(st.booleans()))})
