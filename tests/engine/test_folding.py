"""Dividing a value where it is made: what is divided, and what is left alone."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from onnx import ModelProto, helper, numpy_helper, parser, shape_inference

from onnxforge import model_io
from onnxforge.folding import Fold, Place, fold
from onnxforge.surgery import Surgery
from onnxforge.weights import Weights
from support import integers, oracle

HEADER = '<ir_version: 8, opset_import: ["" : 17]> '
C, K = 4, 3
POW2 = np.array([2, 0.5, 4, 1], np.float32)
REAL = np.array([1.7, 0.3, 5.1, 1], np.float32)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


HELD = {
    "c": floats(C, seed=1),
    "d": floats(C, seed=2),
    "row": floats(1, 1, C, seed=3),
    "scalar": np.array(1.5, np.float32),
    "single": np.array([1.5], np.float32),
    "two": np.array([[1.5]], np.float32),
    "column": floats(5, 1, seed=7),
    "m": floats(K, C, seed=4),
    "t": floats(C, K, seed=5),
    "w": floats(C, 2, seed=6),
    "e": np.array(2, np.float32),
    "eps": np.array(1e-5, np.float32),
}


def built(body: str, outputs: str = "float[n,2] y", inputs: str = "") -> ModelProto:
    """A model that makes v of x, [n, 4], or of u, [n, 3], and multiplies it."""
    text = f"{HEADER} g (float[n,4] x, float[n,3] u{inputs}) => ({outputs}) {{ {body} }}"
    proto = parser.parse_model(text)
    read = {name for node in proto.graph.node for name in node.input}
    given = {value.name for value in proto.graph.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name)
        for name, array in HELD.items()
        if name in read or name in given
    )
    return proto


def found(model: ir.Model) -> tuple[Fold | None, Surgery]:
    weights = Weights(model)
    (value,) = [v for n in model.graph for v in n.outputs if v.name == "v"]
    uses = {(n, i) for n, i in value.uses() if n.op_type in ("MatMul", "Gemm")}
    return fold(value, uses, Place(-1, C, C), weights), Surgery(weights)


def folded(body: str, factors: np.ndarray) -> tuple[ModelProto, ModelProto, Fold]:
    before = built(f"{body} y = MatMul(v, w)")
    model = model_io.from_proto(before)
    place, surgery = found(model)
    assert place is not None
    place.apply(factors, surgery)
    surgery.settle()
    return before, model_io.to_proto(model), place


PLACES = {
    "LayerNormalization": "v = LayerNormalization(x, c)",
    "LayerNormalization with bias": "v = LayerNormalization<axis=-1>(x, c, d)",
    "one tensor as scale and bias": "v = LayerNormalization(x, c, c)",
    "decomposed norm": """m0 = ReduceMean<axes=[-1]>(x) s = Sub(x, m0) p = Pow(s, e)
        a = ReduceMean<axes=[-1]>(p) q = Add(a, eps) r = Sqrt(q) z = Div(s, r)
        n0 = Mul(z, c) v = Add(n0, d)""",
    "RMS norm": """p = Pow(x, e) a = ReduceMean<axes=[-1]>(p) q = Add(a, eps) r = Sqrt(q)
        z = Div(x, r) v = Mul(c, z)""",
    "Mul by a scalar": "z = Mul(x, c) v = Mul(z, scalar)",
    "Mul by one element": "z = Mul(x, c) v = Mul(single, z)",
    "Mul by one element of two axes": "z = Mul(x, c) v = Mul(z, two)",
    "Div": "v = Div(x, c)",
    "Div by a scalar": "z = Mul(x, c) v = Div(z, scalar)",
    "Add": "z = Mul(x, c) v = Add(d, z)",
    "Add of a scalar": "z = Mul(x, c) v = Add(z, scalar)",
    "Sub": "z = Mul(x, c) v = Sub(z, d)",
    "Sub from": "z = Mul(x, c) v = Sub(d, z)",
    "MatMul": "v = MatMul(u, m)",
    "MatMul with bias": "z = MatMul(u, m) v = Add(c, z)",
    "Gemm": "v = Gemm(u, m)",
    "Gemm with all": "v = Gemm<alpha=0.5, beta=2.0, transB=1>(u, t, c)",
    "Gemm with a scalar": "v = Gemm(u, m, scalar)",
    "Relu": "z = MatMul(u, m) v = Relu(z)",
    "Identity": "z = Mul(x, c) a = Identity(z) v = Relu(a)",
    "a shared constant": """a = Mul(x, c) z = Sigmoid(a) b = Add(z, c) q = Tanh(b)
        v = Mul(q, c)""",
    "a constant twice": "z = Mul(x, c) v = Add(z, c)",
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("factors", [POW2, REAL], ids=["pow2", "real"])
def test_the_value_is_divided_and_no_node_is_added(name: str, factors: np.ndarray) -> None:
    before, after, place = folded(PLACES[name], factors)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    assert place.where
    inputs = {"x": floats(5, C, seed=9), "u": floats(5, K, seed=8)}
    wanted = integers.values(before, ["v"], inputs)["v"] / factors
    seen = integers.values(after, ["v"], inputs)["v"]
    if factors is POW2:
        assert seen.tobytes() == wanted.tobytes()
    else:
        np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-6)


def test_a_constant_of_more_axes_keeps_them() -> None:
    before = built("z = Unsqueeze(x, a) v = Mul(z, row) y = MatMul(v, w)", "float[1,n,2] y")
    before.graph.initializer.append(numpy_helper.from_array(np.array([0]), "a"))
    model = model_io.from_proto(before)
    place, surgery = found(model)
    assert place is not None
    place.apply(POW2, surgery)
    held = integers.initializers(model_io.to_proto(model))
    assert held["row"].tobytes() == (HELD["row"] / POW2).tobytes()


def test_shared_constants_are_copied_and_not_changed() -> None:
    _, after, _ = folded(PLACES["a shared constant"], POW2)
    held = integers.initializers(after)
    assert held["c"].tobytes() == HELD["c"].tobytes()
    assert held["c_smoothed"].tobytes() == (HELD["c"] / POW2).tobytes()


def test_a_scalar_gets_channels_in_a_copy() -> None:
    _, after, _ = folded(PLACES["Add of a scalar"], POW2)
    held = integers.initializers(after)
    assert held["scalar_smoothed"].tolist() == (1.5 / POW2).tolist()
    assert "scalar" not in held


# Where channels are moved, or along another axis; v is [n, 6, 4], channels of axis 1 or 2.
MOVED = {
    "Transpose": (-1, "z = Mul(t3, c41) v = Transpose<perm=[0, 2, 1]>(z)"),
    "Reshape behind": (-2, "z = Mul(t4, c411) v = Reshape(z, s04)"),
    "Reshape before": (-1, "z = Mul(t34, c) v = Reshape(z, s64)"),
    "Unsqueeze": (-2, "z = Mul(x4, c) v = Unsqueeze(z, minus)"),
    "Squeeze": (-1, "z = Mul(q4, c) v = Squeeze(z, one)"),
    "Flatten": (-1, "z = Mul(q4, c) v = Flatten<axis=2>(z)"),
    "Split, the second part": (-1, "z = Mul(x7, c7) a, v = Split<axis=-1>(z, s34)"),
    "Conv": (-2, "v = Conv(f, k3, c)"),
    "Conv in groups": (-2, "v = Conv<group=2>(f, g3)"),
    "Conv, then Transpose": (-1, "z = Conv(f, k3, c) v = Transpose<perm=[0, 2, 1]>(z)"),
    "batch norm": (-2, "v = BatchNormalization(t4r, c, d, d, a4)"),
    "instance norm": (-2, "v = InstanceNormalization(t4r, c, d)"),
    "MatMul on the left": (-2, "v = MatMul(m41, f)"),
    "bias along rows": (-2, "z = MatMul(m41, f) v = Add(z, c41)"),
    "Relu": (-1, "z = Mul(t3, c41) a = Relu(z) v = Transpose<perm=[0, 2, 1]>(a)"),
}
FED = {
    "t3": floats(2, C, 5, seed=20),
    "t4": floats(2, C, 5, 3, seed=21),
    "t34": floats(2, 3, 2, C, seed=22),
    "x4": floats(2, C, seed=23),
    "q4": floats(2, 1, C, seed=24),
    "x7": floats(2, 7, seed=25),
    "f": floats(2, 6, 9, seed=26),
    "t4r": floats(2, C, 9, seed=27),
}
MADE = {
    "c41": floats(C, 1, seed=30),
    "c411": floats(C, 1, 1, seed=31),
    "c7": floats(7, seed=32),
    "k3": floats(C, 6, 3, seed=33),
    "g3": floats(C, 3, 3, seed=34),
    "a4": np.abs(floats(C, seed=35)),
    "m41": floats(C, 6, seed=36),
    "s04": np.array([0, 4, -1]),
    "s64": np.array([-1, 2, 4]),
    "s34": np.array([3, 4]),
    "minus": np.array([-1]),
    "one": np.array([1]),
}


def moved(name: str) -> tuple[ModelProto, Place]:
    axis, body = MOVED[name]
    fed = ", ".join(
        f"float[{','.join(map(str, array.shape))}] {word}"
        for word, array in FED.items()
        if re.search(rf"\b{word}\b", body)
    )
    text = f"{HEADER} g ({fed}) => (float[?] y) {{ {body} y = Tanh(v) }}"
    proto = parser.parse_model(text.replace("float[?]", "float"))
    read = {word for node in proto.graph.node for word in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, word)
        for word, array in (HELD | MADE).items()
        if word in read
    )
    return shape_inference.infer_shapes(proto), Place(axis, C, C)


@pytest.mark.parametrize("factors", [POW2, REAL, -POW2], ids=["pow2", "real", "negative"])
@pytest.mark.parametrize("name", MOVED)
def test_channels_are_followed_where_they_are_moved(name: str, factors: np.ndarray) -> None:
    before, place = moved(name)
    model = model_io.from_proto(before)
    weights = Weights(model)
    (value,) = [v for n in model.graph for v in n.outputs if v.name == "v"]
    found = fold(value, set(value.uses()), place, weights)
    assert found is not None
    assert found.suits(factors) == (name != "Relu" or factors[0] > 0)
    if not found.suits(factors):
        return
    surgery = Surgery(weights)
    found.apply(factors, surgery)
    surgery.settle()
    after = model_io.to_proto(model)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    inputs = {i.name: FED[i.name] for i in before.graph.input}
    watched = ["v", "a"] if name.startswith("Split") else ["v"]
    wanted = integers.values(before, watched, inputs)
    seen = integers.values(after, watched, inputs)
    divided = wanted["v"] / factors.reshape(-1, *[1] * (-1 - place.axis))
    np.testing.assert_allclose(seen["v"], divided, rtol=1e-5, atol=1e-6)
    if "a" in watched:
        assert seen["a"].tobytes() == wanted["a"].tobytes()


NOT_MOVED = {
    "heads": (-1, "z = Mul(t34, c) v = Reshape(z, s64b)", np.array([2, -1])),
    "Split along another axis": (-1, "z = Mul(x4, c) a, v = Split<axis=0>(z, s64b)", [1, 1]),
    "Transpose to another length": (-1, "z = Mul(t3, c41) v = Identity(z)", []),
}


@pytest.mark.parametrize("name", NOT_MOVED)
def test_channels_that_are_lost_on_the_way_are_left(name: str) -> None:
    axis, body, content = NOT_MOVED[name]
    MOVED["case"], MADE["s64b"] = (axis, body), np.array(content, np.int64)
    try:
        before, place = moved("case")
    finally:
        del MOVED["case"], MADE["s64b"]
    model = model_io.from_proto(before)
    (value,) = [v for n in model.graph for v in n.outputs if v.name == "v"]
    assert fold(value, set(value.uses()), place, Weights(model)) is None


LEFT = {
    "an input": ("a = Relu(u) y = MatMul(x, w)", "float[n,2] y, float[n,3] a"),
    "read by another": (
        "v = Mul(x, c) y = MatMul(v, w) a = Tanh(v)",
        "float[n,2] y, float[n,4] a",
    ),
    "an output": ("v = Mul(x, c) y = MatMul(v, w)", "float[n,2] y, float[n,4] v"),
    "its maker's input is read by another": (
        "z = MatMul(u, m) v = Add(z, d) y = MatMul(v, w) a = Tanh(z)",
        "float[n,2] y, float[n,4] a",
    ),
    "its maker's input is an output": (
        "z = MatMul(u, m) v = Relu(z) y = MatMul(v, w)",
        "float[n,2] y, float[n,4] z",
    ),
    "a weight that is multiplied twice": (
        "z = MatMul(u, m) v = Relu(z) y = MatMul(v, w) a = MatMul(u, m)",
        "float[n,2] y, float[n,4] a",
    ),
    "two activations": ("v = Mul(x, x) y = MatMul(v, w)", "float[n,2] y"),
    "a sum of two activations": (
        "z = Mul(x, c) a = Tanh(x) v = Add(z, a) y = MatMul(v, w)",
        "float[n,2] y",
    ),
    "GELU, which runtimes know by its number": (
        "z = Mul(x, c) a = Erf(z) b = Add(a, e) q = Mul(z, b) v = Mul(q, scalar) "
        "y = MatMul(v, w)",
        "float[n,2] y",
    ),
    "another operator": ("v = Tanh(x) y = MatMul(v, w)", "float[n,2] y"),
    "division of a constant": ("v = Div(c, x) y = MatMul(v, w)", "float[n,2] y"),
    "a norm without constants": (
        "s = Abs(c) v = LayerNormalization(x, s) y = MatMul(v, w)",
        "float[n,2] y",
    ),
    "a norm over more axes": (
        "v = LayerNormalization<axis=0>(x, two) y = MatMul(v, w)",
        "float[n,2] y",
    ),
    "a constant that is along rows": (
        "v = Mul(x, column) y = MatMul(v, w)",
        "float[n,2] y",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_it_is_left_where_someone_else_would_see_it(name: str) -> None:
    body, outputs = LEFT[name]
    model = model_io.from_proto(built(body, outputs))
    if name == "an input":
        x = model.graph.inputs[0]
        assert fold(x, {(n, i) for n, i in x.uses()}, C, Weights(model)) is None
    else:
        assert found(model)[0] is None


def test_a_constant_that_callers_may_override_is_left() -> None:
    model = model_io.from_proto(built("v = Mul(x, c) y = MatMul(v, w)", inputs=", float[4] c"))
    assert found(model)[0] is None


def test_a_value_that_a_branch_reads_is_left() -> None:
    branches = ", ".join(
        f"{word}_branch = {word} () => (float[n,4] {word}_y) {{ {word}_y = Tanh(v) }}"
        for word in ("then", "else")
    )
    body = f"v = Mul(x, c) y = MatMul(v, w) a = If(q) <{branches}>"
    model = model_io.from_proto(built(body, "float[n,2] y, float[n,4] a", ", bool q"))
    assert found(model)[0] is None


def test_the_mean_that_a_norm_gives_is_left() -> None:
    proto = built("a, v = LayerNormalization(x, c) y = MatMul(v, o)", "float[n,2] y")
    proto.graph.initializer.append(numpy_helper.from_array(floats(1, 2), "o"))
    model = model_io.from_proto(proto)
    (value,) = [v for n in model.graph for v in n.outputs if v.name == "v"]
    assert fold(value, value.uses(), 1, Weights(model)) is None


def test_a_value_of_one_channel_is_left() -> None:
    text = "z = MatMul(u, one) v = Mul(z, scalar) y = MatMul(v, o)"
    proto = built(text)
    proto.graph.value_info.append(helper.make_tensor_value_info("v", 1, ["n", 1]))
    proto.graph.initializer.append(numpy_helper.from_array(floats(K, 1), "one"))
    proto.graph.initializer.append(numpy_helper.from_array(floats(1, 2), "o"))
    model = model_io.from_proto(proto)
    assert found(model)[0] is None


def test_what_is_folded_runs_the_same_on_the_runtime() -> None:
    before, after, _ = folded(PLACES["decomposed norm"], POW2)
    copy = integers.changed(after, "w", lambda w: w * POW2[:, None])
    inputs = {"x": floats(5, C, seed=9), "u": floats(5, K, seed=8)}
    oracle.assert_bit_equal(oracle.run(copy, inputs), oracle.run(before, inputs))
