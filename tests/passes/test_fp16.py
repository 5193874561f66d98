"""fp16: what becomes float16, what does not, and that the graph around it stays sound."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxforge import PassManager
from onnxforge.errors import OnnxforgeError, Refused
from onnxforge.replay import verify
from support import fixtures, halves, oracle

F16, F32 = TensorProto.FLOAT16, TensorProto.FLOAT
RNG = np.random.default_rng(3)
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
X = RNG.standard_normal((4, 8)).astype(np.float32)
W = RNG.standard_normal((8, 8)).astype(np.float32)


def initializer(model: onnx.ModelProto, name: str) -> np.ndarray:
    found = next(t for g in halves.graphs(model) for t in g.initializer if t.name == name)
    return numpy_helper.to_array(found)


def test_inside_is_half_and_the_interface_is_not() -> None:
    text = (
        HEAD
        + """m (float[n,8] x) => (float[n,8] y) {
        a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) y = Add(c, c) }"""
    )
    tier, report = halves.tier(halves.parsed(text, w=W), "fp16")
    types = halves.types(tier)
    assert (types["x"], types["y"]) == (F32, F32)
    assert {types[name] for name in ("a", "b", "c", "w")} == {F16}
    casts = halves.ops(tier, "Cast")
    assert [(n.input[0], n.output[0]) for n in casts] == [("x", "x_fp16"), ("y_fp16", "y")]
    assert np.array_equal(initializer(tier, "w"), W.astype(np.float16))
    assert report.passes[0].stats == {"casts added": 2}
    assert [n.name for n in halves.nodes(tier) if n.op_type != "Cast"] == [
        "n_a",
        "n_b",
        "n_c",
        "n_y",
    ]


def test_the_interface_changes_where_keep_io_says_so() -> None:
    text = (
        HEAD
        + """m (float[n,8] x, float[n,8] past) => (float[n,8] y, float[n,8] present) {
        a = MatMul(x, w) present = Add(a, past) y = Relu(present) }"""
    )
    parent = halves.parsed(text, w=W)
    tier, _ = halves.tier(parent, "fp16{keep_io=x,y}")
    types = halves.types(tier)
    assert [types[n] for n in ("x", "past", "y", "present")] == [F32, F16, F32, F16]
    bare, _ = halves.tier(parent, "fp16{keep_io=none}")
    assert not halves.ops(bare, "Cast")
    with pytest.raises(Refused, match="keep_io: 'pats' matches no input and no output"):
        halves.tier(parent, "fp16{keep_io=pats}")


def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    text = HEAD + "m (float[n,8] x) => (float[n,8] y) { y = MatMul(x, w) }"
    parent = halves.parsed(text, w=W)
    for options, message in {
        "block_op_types=Mattmul": "block_op_types: 'Mattmul' is no operator of ai.onnx",
        "block_nodes=n_x": "block_nodes: 'n_x' matches no node of float32 values",
        f'samples="{tmp_path}"': f"{tmp_path}: is a folder, name a file in it",
    }.items():
        with pytest.raises(OnnxforgeError, match=re.escape(message)):
            PassManager(f"fp16{{{options}}}").apply(parent)


def test_an_if_that_captures_an_input_that_stays() -> None:
    text = (
        HEAD
        + """m (float[n,8] x, bool c) => (float[n,8] y) {
        y = If(c) <then_branch = t () => (float[n,8] u) { u = MatMul(x, w) },
                   else_branch = e () => (float[n,8] v) { v = Identity(x) }> }"""
    )
    parent = halves.parsed(text, w=W)
    tier, _ = halves.tier(parent, "fp16")
    assert halves.types(tier)["u"] == halves.types(tier)["v"] == F16
    oracle.run(tier, {"x": X, "c": np.array(True)})
    for flag, wanted in ((True, X @ W), (False, X)):
        found = halves.outputs(tier, {"x": X, "c": np.array(flag)})["y"]
        assert np.allclose(found, wanted, rtol=0.01, atol=0.02)


def test_branches_that_give_back_what_they_captured() -> None:
    """The branches disagree: one value is made half, the other is kept."""
    text = (
        HEAD
        + """m (float[n,8] x, bool c) => (float[n,8] y) {
        a = MatMul(x, w) s = Softmax(x)
        h = If(c) <then_branch = t () => (float[n,8] u) { u = Identity(a) },
                   else_branch = e () => (float[n,8] v) { v = Identity(s) }>
        y = MatMul(h, w) }"""
    )
    tier, _ = halves.tier(halves.parsed(text, w=W), "fp16{block_op_types=Softmax}")
    for flag in (True, False):
        inputs = {"x": X, "c": np.array(flag)}
        soft = np.exp(X) / np.exp(X).sum(-1, keepdims=True)
        wanted = (X @ W if flag else soft) @ W
        assert np.allclose(halves.outputs(tier, inputs)["y"], wanted, rtol=0.02, atol=0.1)


def test_what_a_loop_carries_has_one_type_all_round() -> None:
    text = (
        HEAD
        + """m (float[n,8] x, int64 count) => (float[n,8] y, float[k,n,1] steps) {
        yes = Constant <value = bool {1}> ()
        y, steps = Loop(count, yes, x) <body = b
            (int64 i, bool go, float[n,8] state) =>
            (bool more, float[n,8] next, float[n,1] step) {
                more = Identity(go) p = MatMul(state, w) next = Tanh(p)
                step = ReduceMean <axes=[1], keepdims=1> (next) }> }"""
    )
    parent = halves.parsed(text, b__w=W)
    tier, _ = halves.tier(parent, "fp16")
    types = halves.types(tier)
    assert types["state"] == types["next"] == types["w"] == F16
    inputs = {"x": X, "count": np.array(3)}
    oracle.run(tier, inputs)
    found, wanted = halves.outputs(tier, inputs), oracle.run(parent, inputs)
    assert np.allclose(found["y"], wanted["y"], atol=0.05)
    assert np.allclose(found["steps"], wanted["steps"], atol=0.05)


def test_a_scan_over_half_values() -> None:
    text = (
        HEAD
        + """m (float[8] start, float[n,8] x) => (float[8] last, float[n,8] all) {
        h = MatMul(x, w)
        last, all = Scan <num_scan_inputs=1, body = b
            (float[8] state, float[8] item) => (float[8] next, float[8] out) {
                next = Add(state, item) out = Mul(next, item) }> (start, h) }"""
    )
    parent = halves.parsed(text, w=W)
    tier, _ = halves.tier(parent, "fp16")
    assert halves.types(tier)["item"] == halves.types(tier)["state"] == F16
    inputs = {"start": X[0], "x": X}
    found, wanted = halves.outputs(tier, inputs), oracle.run(parent, inputs)
    for name in wanted:
        assert np.allclose(found[name], wanted[name], rtol=0.01, atol=0.2)


def test_a_length_that_is_computed_in_float_stays_exact() -> None:
    text = (
        HEAD
        + """m (float[n,8] x, int64 length) => (float[n,8] y, int64 frames) {
        f = Cast <to=1> (length) half = Constant <value = float {2.0}> ()
        q = Div(f, half) up = Ceil(q) frames = Cast <to=7> (up) y = MatMul(x, w) }"""
    )
    tier, report = halves.tier(halves.parsed(text, w=W), "fp16")
    assert {halves.types(tier)[name] for name in ("f", "q", "up")} == {F32}
    inputs = {"x": X, "length": np.array(40_003)}
    assert halves.outputs(tier, inputs)["frames"] == 20_002
    reasons = {f.where: f.code for f in report.passes[0].findings if f.op}
    assert reasons["n_q"] == "OF267"
    assert reasons["n_y"] == "OF201"


def test_the_cone_of_an_integer_ends_at_products() -> None:
    text = (
        HEAD
        + """m (float[n,8] x) => (int64[n,8] y) {
        a = MatMul(x, w) b = Exp(a) c = Ceil(b) y = Cast <to=7> (c) }"""
    )
    tier, _ = halves.tier(halves.parsed(text, w=W / 4), "fp16")
    types = halves.types(tier)
    assert (types["a"], types["b"], types["c"]) == (F16, F32, F32)


def test_positions_stay_float32_up_to_the_waves() -> None:
    text = (
        HEAD
        + """m (float[n,8] x, int64[n] places) => (float[n,8] y) {
        p = Cast <to=1> (places) one = Constant <value = int64[1] {1}> ()
        column = Unsqueeze(p, one) angles = MatMul(column, freq) s = Sin(angles)
        h = MatMul(x, w) y = Add(h, s) }"""
    )
    freq = (0.5 ** np.arange(8, dtype=np.float32))[None]
    tier, _ = halves.tier(halves.parsed(text, w=W, freq=freq), "fp16")
    types = halves.types(tier)
    assert {types[n] for n in ("p", "column", "angles", "s", "freq")} == {F32}
    places = np.array([0, 1, 30_001, 30_003])
    found = halves.outputs(tier, {"x": 0 * X, "places": places})["y"]
    assert np.allclose(found, np.sin(places[:, None] * freq), atol=2e-3)


def test_a_mask_becomes_finite_and_masks_as_before() -> None:
    text = (
        HEAD
        + """m (float[n,8] x, float[n,8] mask) => (float[n,8] y) {
        one = Constant <value = float {1.0}> () a = MatMul(x, w) off = Sub(one, mask)
        m = Mul(off, lowest) s = Add(a, m) y = Softmax(s) }"""
    )
    lowest = np.float32(np.finfo(np.float32).min)
    parent = halves.parsed(text, w=W, lowest=lowest)
    tier, report = halves.tier(parent, "fp16")
    assert initializer(tier, "lowest") == np.float16(-32752)
    (told,) = [f for f in report.passes[0].findings if f.code == "OF263"]
    assert told.where == "lowest"
    mask = np.tile(np.array([1, 1, 0, 0, 1, 0, 0, 1], np.float32), (4, 1))
    mask[3] = 0  # a row of padding: no NaN
    found = halves.outputs(tier, {"x": 4 * X, "mask": mask})["y"]
    wanted = oracle.run(parent, {"x": 4 * X, "mask": mask})["y"]
    assert np.all(found[:3][mask[:3] == 0] == 0)
    assert np.allclose(found[:3], wanted[:3], atol=0.02)
    assert np.isfinite(found).all()


def test_infinity_in_a_mask_stays() -> None:
    text = (
        HEAD
        + """m (float[2,8] x) => (float[2,8] y) {
        a = MatMul(x, w) s = Add(a, mask) y = Softmax(s) }"""
    )
    mask = np.array([0, -np.inf, -3e38, 0, 0, 0, 0, 0], np.float32)
    tier, _ = halves.tier(halves.parsed(text, w=W, mask=mask), "fp16")
    assert initializer(tier, "mask").tolist() == [0, -np.inf, -32752, 0, 0, 0, 0, 0]


def test_a_mask_that_is_only_chosen_becomes_the_lowest_value() -> None:
    text = (
        HEAD
        + """m (float[n,8] x, bool[n,8] keep) => (float[n,8] y) {
        a = MatMul(x, w) s = Where(keep, a, lowest) y = Softmax(s) }"""
    )
    tier, _ = halves.tier(halves.parsed(text, w=W, lowest=np.float32(-1e30)), "fp16")
    assert initializer(tier, "lowest") == np.float16(-65504)


def test_other_constants_that_overflow_stay_with_their_reader() -> None:
    text = (
        HEAD
        + """m (float[n,8] x) => (float[n,8] y) {
        a = MatMul(x, w) b = Div(a, large) c = Mul(b, large) y = MatMul(c, w) }"""
    )
    parent = halves.parsed(text, w=W, large=np.float32(1e6))
    tier, report = halves.tier(parent, "fp16")
    assert initializer(tier, "large") == np.float32(1e6)
    assert np.allclose(halves.outputs(tier, {"x": X})["y"], X @ W @ W, rtol=0.02, atol=0.2)
    told = {f.where: f.code for f in report.passes[0].findings if not f.op}
    assert told["large"] == "OF261"


@pytest.mark.parametrize("small", [1e-12, 1e-5])
def test_a_guard_against_zero_stays_with_what_it_guards(small: float) -> None:
    text = (
        HEAD
        + """m (float[n,8] x) => (float[n,8] y) {
        a = MatMul(x, w) n = ReduceL2 <axes=[1], keepdims=1> (a)
        c = Clip(n, small) e = Expand(c, shape) y = Div(a, e) }"""
    )
    weights = {"w": W, "small": np.float32(small), "shape": np.array([1, 8])}
    tier, _ = halves.tier(halves.parsed(text, **weights), "fp16{block_op_types=Sqrt}")
    assert initializer(tier, "small") == np.float32(small)
    found = halves.outputs(tier, {"x": np.zeros_like(X)})["y"]
    assert np.array_equal(found, np.zeros_like(X))


def test_a_small_constant_that_is_only_added_costs_no_cast() -> None:
    """Learned biases are as small; what scales by such a constant, or is guarded, stays."""
    text = (
        HEAD
        + """m (float[n,8] x) => (float[n,8] y) {
        a = MatMul(x, w) b = Add(a, small) c = Mul(b, small) d = MatMul(b, w)
        e = Mul(c, large) y = Add(d, e) }"""
    )
    weights = {"w": W, "small": np.float32(1e-7), "large": np.float32(1e6)}
    tier, report = halves.tier(halves.parsed(text, **weights), "fp16")
    types = halves.types(tier)
    assert [types[n] for n in ("a", "b", "c", "d", "e")] == [F16, F16, F32, F16, F32]
    assert report.passes[0].stats == {"casts added": 4}  # two of them at the interface
    a = halves.rounded(X, "fp16") @ halves.rounded(W, "fp16")
    found = halves.outputs(tier, {"x": X})["y"]
    assert np.allclose(found, a @ W + a / 10, rtol=0.02, atol=0.05)


def layer_norm(x: str, y: str) -> str:
    return f"""{y}_m = ReduceMean <axes=[1], keepdims=1> ({x}) {y}_d = Sub({x}, {y}_m)
        {y}_q = Pow({y}_d, two) {y}_v = ReduceMean <axes=[1], keepdims=1> ({y}_q)
        {y}_e = Add({y}_v, eps) {y}_r = Sqrt({y}_e) {y}_n = Div({y}_d, {y}_r)
        {y} = Mul({y}_n, gain)"""


def test_a_norm_costs_one_cast_in_and_one_out_and_does_not_overflow() -> None:
    text = HEAD + "m (float[n,8] x) => (float[n,8] y) { a = MatMul(x, w) "
    text += layer_norm("a", "b") + " y = MatMul(b, w) }"
    weights = {"two": np.float32(2), "eps": np.float32(1e-12), "gain": W[0]}
    parent = halves.parsed(text, w=W, **weights)
    tier, report = halves.tier(parent, "fp16")
    assert report.passes[0].stats == {"casts added": 4}  # two of them at the interface
    found = halves.outputs(tier, {"x": 300 * X})["y"]  # squares reach 10^6
    assert np.allclose(found, oracle.run(parent, {"x": 300 * X})["y"], rtol=0.02, atol=0.1)


def test_a_weight_that_both_precisions_read_is_stored_once() -> None:
    text = (
        HEAD
        + """m (float[n,32] x) => (float[n,32] y) {
        a = MatMul(x, w) b = MatMul(a, w) y = Softmax(b) }"""
    )
    weight = (RNG.standard_normal((32, 32)) / 8).astype(np.float32)
    tier, report = halves.tier(halves.parsed(text, w=weight), "fp16{block_nodes=n_b}")
    assert [t.name for t in tier.graph.initializer] == ["w"]
    assert initializer(tier, "w").dtype == np.float16
    types = halves.types(tier)
    assert (types["a"], types["b"]) == (F16, F32)
    told = {f.where: f.message for f in report.passes[0].findings if not f.op}
    assert told == {"w": "stored as float16, widened where float32 is needed"}


def test_scales_of_resize_stay_float32_and_what_they_are_computed_from() -> None:
    text = (
        HEAD
        + """m (float[1,1,n,8] x, float factor) => (float[1,1,k,l] y) {
        one = Constant <value = int64[1] {0}> () f = Unsqueeze(factor, one)
        third = Constant <value = float {0.33333334}> () g = Mul(f, third)
        scales = Concat <axis=0> (ones, g, g) a = Mul(x, x)
        y = Resize <mode = "nearest"> (a, , scales) }"""
    )
    parent = halves.parsed(text, ones=np.ones(2, np.float32))
    tier, _ = halves.tier(parent, "fp16{block_op_types=Sqrt}")
    types = halves.types(tier)
    assert types["g"] == types["scales"] == F32
    assert types["a"] == F16
    inputs = {"x": X[None, None], "factor": np.array(9.0, np.float32)}
    assert halves.outputs(tier, inputs)["y"].shape == oracle.run(parent, inputs)["y"].shape


def test_a_function_is_half_inside_and_its_blocked_caller_is_not() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
    m (float[n,8] x) => (float[n,8] y) {
        a = MatMul(x, w) b = own.twice(a) s = Softmax(b) c = own.twice(s) y = MatMul(c, w) }
    <domain: "own", opset_import: ["" : 17]>
    twice (z) => (r) { k = Constant <value = float {2.0}> () r = Mul(z, k) }"""
    parent = halves.parsed(text, w=W)
    tier, report = halves.tier(parent, "fp16{block_op_types=Softmax}")
    constant = next(n for n in tier.functions[0].node if n.op_type == "Constant")
    assert constant.attribute[0].t.data_type == F16
    assert "own::twice/k" in {f.where for f in report.passes[0].findings}
    found = halves.outputs(tier, {"x": X})["y"]
    assert np.allclose(found, oracle.run(parent, {"x": X})["y"], rtol=0.02, atol=0.05)


def test_a_function_of_different_types_stays_as_it_is() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
    m (float[n,8] x, int64[n] i) => (float[n,8] y, int64[n] j) {
        a = MatMul(x, w) b = own.twice(a) j = own.twice(i) y = MatMul(b, w) }
    <domain: "own", opset_import: ["" : 17]> twice (z) => (r) { r = Add(z, z) }"""
    parent = halves.parsed(text, w=W)
    tier, _ = halves.tier(parent, "fp16")
    inside = [[str(n.op_type) for n in m.functions[0].node] for m in (parent, tier)]
    assert inside == [["Add"], ["Add"]]
    inputs = {"x": X, "i": np.arange(4)}
    found = halves.outputs(tier, inputs)
    assert np.array_equal(found["j"], 2 * np.arange(4))
    assert np.allclose(found["y"], 2 * X @ W @ W, rtol=0.02, atol=0.2)


def test_a_function_whose_types_nothing_tells_stays_as_it_is() -> None:
    """Nothing tells what an Optional holds; what the call gives is declared all the same."""
    text = """<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
    m (float[n,8] x) => (float[n,8] y) {
        a = MatMul(x, w) o = Optional(a) b = OptionalGetElement(o)
        c = own.twice(b, b) y = MatMul(c, w) }
    <domain: "own", opset_import: ["" : 17]> twice (z, u) => (r) { r = Add(z, u) }"""
    parent = halves.parsed(text, w=W)
    parent.graph.value_info.append(onnx.helper.make_tensor_value_info("c", F32, ["n", 8]))
    tier, report = halves.tier(parent, "fp16")
    assert np.allclose(halves.outputs(tier, {"x": X})["y"], 2 * X @ W @ W, rtol=0.02, atol=0.2)
    told = {f.where: f.code for f in report.passes[0].findings if f.op}
    assert told["n_a"] == "OF201"


@pytest.mark.parametrize(("keep", "kind"), [("all", F32), ("none", F16)])
def test_a_default_of_an_input_has_the_type_of_the_input(keep: str, kind: int) -> None:
    text = (
        HEAD
        + """m (float[n,8] x, float scale, float most) => (float[n,8] y) {
        a = MatMul(x, w) b = Mul(a, scale) y = Min(b, most) }"""
    )
    weights = {"w": W, "scale": np.float32(1e-6), "most": np.float32(1e6)}
    tier, report = halves.tier(halves.parsed(text, **weights), f"fp16{{keep_io={keep}}}")
    types = halves.types(tier)
    assert types["scale"] == types["most"] == types["b"] == kind
    told = [f.message for f in report.passes[0].findings if f.code == "OF261" and not f.op]
    assert told == [
        "overflows, so that it and what reads it stay float32"
        if keep == "all"
        else "the default of an input overflows, unless keep_io keeps it float32"
    ]
    oracle.run(tier, {"x": X.astype(np.float16) if keep == "none" else X})


def test_operators_outside_of_ai_onnx_stay_float32() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
    m (float[n,8] x) => (float[n,8] y) {
        a = MatMul(x, w) b = com.microsoft.Gelu(a) y = MatMul(b, w) }"""
    parent = halves.parsed(text, w=W)
    parent.graph.value_info.append(onnx.helper.make_tensor_value_info("b", F32, ["n", 8]))
    tier, report = halves.tier(parent, "fp16")
    found = oracle.run(halves.emulated(tier), {"x": X})["y"]
    assert np.allclose(found, oracle.run(parent, {"x": X})["y"], rtol=0.02, atol=0.1)
    assert {f.code for f in report.passes[0].findings if f.op == "Gelu"} == {"OF265"}


def test_weights_in_constants_and_odd_ones() -> None:
    many = ", ".join(map(repr, W[0].tolist()))
    text = (
        HEAD
        + f"""m (float[n,8] x) => (float[n,8] y, float[0,8] none) {{
        k = Constant <value_floats = [{many}]> () s = Constant <value_float: float = 0.1> ()
        a = Mul(x, k) b = Mul(a, s) c = Add(b, odd) y = Identity(c) none = Mul(empty, k) }}"""
    )
    odd = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 65503, 1, 2], np.float32)
    weights = {"odd": odd, "empty": np.zeros((0, 8), np.float32)}
    tier, _ = halves.tier(halves.parsed(text, **weights), "fp16")
    found = initializer(tier, "odd")
    assert found.dtype == np.float16
    assert np.array_equal(found, odd.astype(np.float16), equal_nan=True)
    assert halves.types(tier)["k"] == halves.types(tier)["s"] == F16


def test_constant_of_shape_and_random_operators() -> None:
    text = (
        HEAD
        + """m (float[n,8] x) => (float[n,8] y) {
        shape = Shape(x) one = ConstantOfShape <value = float[1] {1.5}> (shape)
        zero = ConstantOfShape(shape) noise = RandomNormalLike <dtype=1> (x)
        a = Add(x, one) b = Add(a, zero) c = MatMul(b, w) y = Add(c, noise) }"""
    )
    tier, _ = halves.tier(halves.parsed(text, w=W), "fp16")
    types = halves.types(tier)
    assert (types["one"], types["zero"], types["noise"]) == (F16, F16, F32)
    oracle.run(tier, {"x": X})


def test_activations_that_overflow_on_a_sample_stay_float32(tmp_path: Path) -> None:
    folder = tmp_path
    text = (
        HEAD
        + """m (float[n,8] x, bool c) => (float[n,8] y) {
        a = MatMul(x, w) b = Mul(a, a) d = Div(b, large)
        y = If(c) <then_branch = t () => (float[n,8] u) { p = Mul(b, b) u = Sqrt(p) },
                   else_branch = e () => (float[n,8] v) { v = Identity(d) }> }"""
    )
    parent = halves.parsed(text, w=W, large=np.float32(60000))
    np.savez(folder / "s.npz", x=100 * X, c=np.array(True))
    plain, _ = halves.tier(parent, "fp16{block_op_types=Exp}")
    inputs = {"x": 100 * X, "c": np.array(False)}
    assert not np.isfinite(halves.outputs(plain, inputs)["y"]).all()
    options = f'block_op_types=Exp samples="{folder / "s.npz"}"'
    tier, report = halves.tier(parent, f"fp16{{{options}}}")
    wanted = oracle.run(parent, inputs)["y"]
    assert np.allclose(halves.outputs(tier, inputs)["y"], wanted, rtol=0.02)
    told = {f.where for f in report.passes[0].findings if f.code == "OF270"}
    assert {"n_b", "n_y/then_branch/n_p"} <= told
    assert "sha256:" in report.passes[0].text
    onnx.save(parent, folder / "parent.onnx")
    PassManager(f"fp16{{{options}}}").run(folder / "parent.onnx", folder / "tier.onnx")
    ours = folder / "parent.onnx", folder / "tier.onnx"
    assert verify(*ours, statistics=[folder / "s.npz"]).derived
    with pytest.raises(Refused, match=r"no file given has sha256:"):
        verify(*ours)


ARITHMETIC = """m (float[2,3,8,8] x) => (float[2,24,8] y) {
    a = Conv <pads=[1,1,1,1]> (x, k) b = Relu(a) c = Transpose <perm=[0,2,1,3]> (b)
    d = Reshape(c, shape) e = MatMul(d, w) f = Mul(e, gain) g = Add(f, e)
    h = Concat <axis=1> (g, e) i = Slice(h, start, stop, axis) y = Neg(i) }"""


@pytest.mark.parametrize("word", ["fp16", "bf16"])
def test_the_emulation_is_what_the_reference_of_onnx_computes(word: str) -> None:
    text = HEAD.replace("17", "22").replace("8,", "10,") + ARITHMETIC
    weights = {
        "k": RNG.standard_normal((3, 3, 3, 3)).astype(np.float32) / 4,
        "w": W / 3,
        "gain": W[0],
        "shape": np.array([0, 24, 8]),
        "start": np.array([12]),
        "stop": np.array([36]),
        "axis": np.array([1]),
    }
    parent = halves.parsed(text, **weights)
    tier, _ = halves.tier(parent, word)
    x = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    (wanted,) = ReferenceEvaluator(tier).run(None, {"x": x})
    found = halves.outputs(tier, {"x": x})["y"]
    plain = oracle.run(parent, {"x": x})["y"]
    step = {"fp16": 2.0**-10, "bf16": 2.0**-7}[word]
    # Sums differ in order and so by a step of the half type here and there; float32 differs by
    # more, so the comparison tells them apart.
    error = np.abs(found - wanted)
    assert error.mean() < step / 8
    assert np.abs(plain - wanted).mean() > 2 * error.mean()


@pytest.mark.parametrize("name", ["speech_encoder", "merged_decoder", "old_opset_11"])
def test_fixtures_stay_close_in_emulation_and_load_as_they_are(name: str) -> None:
    tier, _ = halves.tier(onnx.load(fixtures.built(name)), "fp16")
    for sample in fixtures.samples(name):
        wanted = oracle.run(fixtures.built(name), sample)
        oracle.run(tier, sample)
        for output, values in halves.outputs(tier, sample).items():
            error = np.linalg.norm(values - wanted[output])
            assert error < 0.01 * np.linalg.norm(wanted[output])


def rms_norm(x: str, y: str) -> str:
    return f"""{y}_q = Pow({x}, two) {y}_v = ReduceMean <axes=[1], keepdims=1> ({y}_q)
        {y}_e = Add({y}_v, eps) {y}_r = Sqrt({y}_e) {y}_n = Div({x}, {y}_r)
        {y} = Mul({y}_n, gain)"""


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("beside", ["s = Softmax(a)", "s = MatMul(a, w)", "s = Identity(x)"])
def test_a_norm_is_fused_by_a_runtime_in_one_type(
    norm: Any, beside: str, tmp_path: Any
) -> None:
    """Fused over a cast into one of two types it loads nowhere."""
    text = HEAD + "m (float[n,8] x) => (float[n,8] y, float[n,8] z) { a = MatMul(x, w) "
    text += norm("a", "b") + f" c = Add(b, bias) {beside} y = MatMul(c, w) z = Add(s, c) }}"
    weights = {"two": np.float32(2), "eps": np.float32(1e-6), "gain": W[0], "bias": W[1]}
    parent = halves.parsed(text, w=W, **weights)
    tier, _ = halves.tier(parent, "fp16")
    kept = tmp_path / "fused.onnx"
    found = oracle.run(tier, {"x": X}, keep=kept)
    for output, values in oracle.run(parent, {"x": X}).items():
        assert np.allclose(found[output], values, rtol=0.02, atol=0.1)
        assert np.allclose(halves.outputs(tier, {"x": X})[output], values, rtol=0.02, atol=0.1)
    fused = {node.op_type for node in onnx.load(kept).graph.node}
    assert any("LayerNormalization" in op for op in fused)
