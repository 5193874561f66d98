from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxforge import PassManager, load
from onnxforge.core import Fate
from onnxforge.errors import Refused, SpecError
from onnxforge.manager import Report
from onnxforge.passes.dynamic_int8 import DynamicInt8Pass
from onnxforge.report import report_as_text
from onnxforge.weights import Weights
from support import fixtures, integers, oracle, products, protos

EVERYTHING = DynamicInt8Pass(min_bytes=0, float_front_end=False, float_depthwise=False)
HEADER = '<ir_version: 8, opset_import: ["" : 17]> '
# Where two products saturate, no runtime can equal the reference with int8.
STORED = "uint8" if integers.saturates() else "int8"
EXACT = DynamicInt8Pass(
    min_bytes=0, float_front_end=False, float_depthwise=False, weight_type=STORED
)
VARIANTS: dict[str, tuple[DynamicInt8Pass, integers.Rules]] = {
    text: (PassManager(f"dynamic-int8{{min_bytes=0 {text}}}").passes[0], rules)  # type: ignore[misc]
    for text, rules in {
        f"float_front_end=false float_depthwise=false weight_type={STORED}": integers.DEFAULT,
        "weight_type=uint8 per_channel=false": integers.Rules(per_channel=False),
        "reduce_range=true scale=mse": integers.Rules(limit=64, mse=True),
    }.items()
}


def model(text: str, **arrays: Any) -> ModelProto:
    """A model from text and initializers."""
    proto = parser.parse_model(text if text.startswith("<") else HEADER + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()
    )
    return proto


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nodes(graph: Any) -> list[str]:
    return [f"{', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in graph.node]


def found(report: Report, op: bool = False) -> dict[str, str]:
    """Codes by place, of weights or of nodes."""
    return {f.where: f.code for f in report.passes[-1].findings if bool(f.op) == op and f.fate}


# --- example -------------------------------------------------------------------------------

QUANTIZED = "x_quantized, x_quantized_scale, x_quantized_zero_point = DynamicQuantizeLinear(x)"


def test_a_product_is_rewritten_in_the_order_that_runtimes_fuse() -> None:
    before = model(
        "g (float[n,4] x) => (float[n,3] y) { p = MatMul(x, w) y = Add(b, p) }",
        w=floats(4, 3),
        b=floats(3),
    )
    after, _ = EVERYTHING.apply(before)
    assert nodes(after.graph) == [
        QUANTIZED,
        "p_int32 = MatMulInteger(x_quantized, w, x_quantized_zero_point, w_zero_point)",
        "p_float = Cast(p_int32)",
        "p_scale = Mul(x_quantized_scale, w_scale)",
        "p = Mul(p_float, p_scale)",
        "y = Add(p, b)",
    ]


def test_an_activation_is_quantized_once_for_all_consumers() -> None:
    before = model(
        "g (float[n,4] x) => (float[n,4] y, float[n,4] z, float[n,4] a)"
        " { y = MatMul(x, v) z = Gemm(x, w) a = Relu(x) }",
        v=floats(4, 4),
        w=floats(4, 4),
    )
    after, _ = EVERYTHING.apply(before)
    kinds = Counter(node.op_type for node in after.graph.node)
    assert (kinds["DynamicQuantizeLinear"], kinds["MatMulInteger"]) == (1, 2)
    assert nodes(after.graph)[-1] == "a = Relu(x)"


def test_of_a_gemm_alpha_goes_into_the_scale_and_bias_comes_last() -> None:
    before = model(
        "g (float[4,n] x) => (float[n,3] y)"
        " { y = Gemm<alpha=0.5, beta=2.0, transA=1, transB=1>(x, w, c) }",
        w=floats(3, 4),
        c=floats(3),
    )
    after, _ = EVERYTHING.apply(before)
    assert nodes(after.graph) == [
        QUANTIZED,
        "x_quantized_transposed = Transpose(x_quantized)",
        "w_transposed = Transpose(w)",
        "y_int32 = MatMulInteger("
        "x_quantized_transposed, w_transposed, x_quantized_zero_point, w_zero_point)",
        "y_float = Cast(y_int32)",
        "y_scale = Mul(x_quantized_scale, w_scale)",
        "y_product = Mul(y_float, y_scale)",
        "y_beta = Mul(c, w_beta)",
        "y = Add(y_product, y_beta)",
    ]
    wanted = integers.quantize_weight(floats(3, 4), [1]).scale[:, 0] * np.float32(0.5)
    assert integers.initializers(after)["w_scale"].tolist() == wanted.tolist()


def test_a_conv_is_rewritten_in_the_form_that_every_runtime_loads() -> None:
    before = model(
        "g (float[n,2,9] x) => (float[n,4,k] y) { y = Conv<pads=[1,1], group=1>(x, w, b) }",
        w=floats(4, 2, 3),
        b=floats(4),
    )
    after, _ = EVERYTHING.apply(before)
    assert nodes(after.graph) == [
        QUANTIZED,
        "y_int32 = ConvInteger(x_quantized, w, x_quantized_zero_point, w_zero_point)",
        "y_float = Cast(y_int32)",
        "y_scale = Mul(x_quantized_scale, w_scale)",
        "y_product = Mul(y_float, y_scale)",
        "y_bias = Reshape(b, w_bias_shape)",
        "y = Add(y_product, y_bias)",
    ]
    assert after.graph.node[1].attribute == before.graph.node[0].attribute


def test_a_weight_on_the_left_has_a_scale_for_each_row() -> None:
    before = model("g (float[4,n] x) => (float[3,n] y) { y = MatMul(w, x) }", w=floats(3, 4))
    after, _ = EVERYTHING.apply(before)
    assert nodes(after.graph) == [
        QUANTIZED,
        "y_int32 = MatMulInteger(w, x_quantized, w_zero_point, x_quantized_zero_point)",
        "y_float = Cast(y_int32)",
        "y_scale = Mul(y_float, x_quantized_scale)",
        "y = Mul(y_scale, w_scale)",
    ]
    held = integers.initializers(after)
    assert held["w"].dtype == np.uint8
    assert held["w_zero_point"] == np.uint8(128)
    assert held["w_scale"].shape == (3, 1)


SMALL = "dynamic-int8{min_bytes=0}"
TIED = """g (int64[n] i) => (float[n,70] y)
    { e = Gather(w, i) t = Transpose(w) y = MatMul(e, t) }"""


def test_a_table_of_gather_int8_is_multiplied_from_the_same_bytes() -> None:
    after, _ = PassManager(f"gather-int8,{SMALL}").apply(model(TIED, w=floats(70, 8)))
    assert nodes(after.graph) == [
        "e_int8w = Gather(w, i)",
        "e_row_scale = Gather(w_scale, i)",
        "e_cast = Cast(e_int8w)",
        "e = Mul(e_cast, e_row_scale)",
        "e_quantized, e_quantized_scale, e_quantized_zero_point = DynamicQuantizeLinear(e)",
        "t_int8 = Transpose(w)",
        "w_scale_flat = Reshape(w_scale, w_scale_shape)",
        "y_int32 = MatMulInteger(e_quantized, t_int8, e_quantized_zero_point, w_zero_point)",
        "y_float = Cast(y_int32)",
        "y_scale = Mul(e_quantized_scale, w_scale_flat)",
        "y = Mul(y_float, y_scale)",
    ]
    table = integers.quantize_weight(floats(70, 8), [1])
    held = integers.initializers(after)
    assert sorted(held) == ["w", "w_scale", "w_scale_shape", "w_zero_point"]
    assert held["w"].tolist() == table.values.tolist()
    assert held["w_scale"].tolist() == table.scale.tolist()


def test_of_a_matrix_the_scale_is_moved_as_its_table_is() -> None:
    before = model(TIED, w=floats(70, 8))
    for name, shape in {"e": ["n", 8], "t": [8, 70]}.items():
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        before.graph.value_info.append(value)
    after, _ = PassManager(f"gather-int8,{SMALL}").apply(before)
    assert "t_int8_1 = Transpose(w_scale)" in nodes(after.graph)
    shapes = onnx.shape_inference.infer_shapes(after, strict_mode=True).graph.value_info
    told = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in shapes}
    assert (told["t_int8"], told["t_int8_1"]) == ([8, 70], [1, 70])


def test_a_vector_is_multiplied_with_a_stored_weight() -> None:
    before = model("g (float[8] x) => (float[6] y) { y = MatMul(x, w) }", w=floats(8, 6))
    after, _ = PassManager(f"int8w{{min_bytes=0 input_scales=false}},{SMALL}").apply(before)
    assert oracle.run(after, {"x": floats(8)})["y"].shape == (6,)


def test_in_a_branch_an_outer_activation_is_quantized_outside() -> None:
    branches = ", ".join(
        f"{word}_branch = {word} () => (float[n,4] {word}_y) {{ {word}_y = MatMul(x, w) }}"
        for word in ("then", "else")
    )
    before = model(
        f"g (bool b, float[n,4] x) => (float[n,4] y) {{ y = If(b) <{branches}> }}",
        w=floats(4, 4),
    )
    after, _ = EVERYTHING.apply(before)
    assert nodes(after.graph) == [QUANTIZED, "y = If(b)"]
    for attribute in after.graph.node[1].attribute:
        kinds = [node.op_type for node in attribute.g.node]
        assert kinds == ["MatMulInteger", "Cast", "Mul", "Mul"]


# --- bytes ---------------------------------------------------------------------------------

FORMS: dict[str, tuple[str, tuple[int, ...], list[int], str, tuple[int, ...]]] = {
    # The node, shape of w, axes that share a scale, stored as, shape of the zero point.
    "MatMul": ("float[n,8] x", (8, 6), [0], "int8", (6,)),
    "Gemm": ("float[n,8] x", (8, 6), [0], "int8", (6,)),
    "Gemm<transB=1>": ("float[n,8] x", (6, 8), [1], "int8", (6,)),
    "MatMul batched": ("float[n,8] x", (3, 8, 6), [1], "int8", (3, 1, 6)),
    "MatMul left": ("float[8,n] x", (6, 8), [1], "uint8", ()),
    "Conv 1": ("float[n,3,9] x", (6, 3, 2), [1, 2], "uint8", ()),
    "Conv 2": ("float[n,3,9,9] x", (6, 3, 2, 2), [1, 2, 3], "uint8", ()),
    "Conv 3": ("float[n,3,9,9,9] x", (6, 3, 2, 2, 1), [1, 2, 3, 4], "uint8", ()),
}


def form(name: str, w: np.ndarray) -> ModelProto:
    order = "w, x" if name.endswith("left") else "x, w"
    operator = name.partition(" ")[0]
    return model(f"g ({FORMS[name][0]}) => (float y) {{ y = {operator}({order}) }}", w=w)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, integers.DEFAULT),
        ({"weight_type": "uint8"}, integers.DEFAULT),
        ({"reduce_range": True}, integers.Rules(limit=64)),
        ({"per_channel": False}, integers.Rules(per_channel=False)),
        ({"scale": "mse"}, integers.Rules(mse=True)),
        ({"scale": "mse", "reduce_range": True}, integers.Rules(limit=64, mse=True)),
    ],
)
def test_the_stored_integers_and_scales_are_those_of_the_reference(
    name: str, options: dict[str, Any], rules: integers.Rules
) -> None:
    _, shape, axes, stored, zero_shape = FORMS[name]
    w = products.floats(3, *shape)
    step = DynamicInt8Pass(min_bytes=0, **options)
    after, _ = step.apply(form(name, w))
    held = integers.initializers(after)
    wanted = integers.quantize_weight(w, axes, rules)
    kind = "uint8" if options.get("weight_type") == "uint8" else stored
    zero = 128 if kind == "uint8" else 0
    assert set(held) == {"w", "w_scale", "w_zero_point"}
    assert held["w"].dtype == held["w_zero_point"].dtype == np.dtype(kind)
    assert (held["w"].astype(int) - zero).tolist() == wanted.values.tolist()
    assert held["w_scale"].ravel().tobytes() == wanted.scale.ravel().tobytes()
    if rules.per_channel:
        assert held["w_zero_point"].shape == zero_shape
    assert (held["w_zero_point"] == zero).all()


@pytest.mark.parametrize("name", FORMS)
def test_blocks_of_a_large_weight_join_without_a_seam(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = form(name, products.floats(3, *FORMS[name][1]))
    whole = EVERYTHING.apply(before)[0].SerializeToString()
    for size in (4, 20, 100):
        monkeypatch.setattr("onnxforge.lazy.BLOCK_BYTES", size)
        monkeypatch.setattr("onnxforge.numerics.int8.BLOCK_BYTES", size)
        assert EVERYTHING.apply(before)[0].SerializeToString() == whole


@pytest.mark.parametrize("name", fixtures.names())
def test_no_float_stays_behind_that_nobody_reads(name: str) -> None:
    before = onnx.load(fixtures.built(name))
    for text in (
        "dynamic-int8{min_bytes=0}",
        "int8w{min_bytes=0 input_scales=false},dynamic-int8{min_bytes=0}",
    ):
        after, report = PassManager(text).apply(before)
        assert set(integers.dead(after)) <= set(integers.dead(before))
        if any(step.modified for step in report.passes):
            assert after.ByteSize() < before.ByteSize() + 300 * len(report.passes[-1].findings)


@pytest.mark.parametrize("held", ["initializer", "Constant"])
@pytest.mark.parametrize("scope", ["main", "function"])
def test_a_bias_times_zero_is_dropped(scope: str, held: str) -> None:
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"], beta=0.0)
    case = products.Case(node, 1, floats(2, 4), floats(4, 3), floats(3), scope, held=held)
    assert integers.dead(EVERYTHING.apply(case.model())[0]) == []


def test_a_file_is_a_quarter_as_large(tmp_path: Path) -> None:
    before = model(
        "g (float[n,256] x) => (float[n,256] y) { y = MatMul(x, w) }", w=floats(256, 256)
    )
    onnx.save(before, tmp_path / "in.onnx")
    report = DynamicInt8Pass().apply(before)[1]
    assert report.passes[0].tally(Fate.TREATED) == (1, 4 * 256 * 256)
    PassManager("dynamic-int8").run(tmp_path / "in.onnx", tmp_path / "out.onnx")
    size = (tmp_path / "out.onnx").stat().st_size
    assert 256 * 256 + 5 * 256 < size < 256 * 256 + 5 * 256 + 1500


# --- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", fixtures.names(runs=True))
def test_each_product_of_a_fixture_equals_the_reference(name: str, variant: str) -> None:
    step, rules = VARIANTS[variant]
    parent = onnx.load(fixtures.built(name))
    tier, report = step.apply(parent)
    there = sum(node.op_type in integers.PRODUCTS for node in tier.graph.node)
    for sample in fixtures.samples(name):
        if there:
            assert integers.assert_products(parent, tier, sample, rules) == there
    done = [f for f in report.passes[0].findings if f.op and f.fate is Fate.TREATED]
    assert len(done) >= there


GEMM = model(
    "g (float[n,6] x) => (float[n,6] y) { y = Gemm<alpha=0.5>(x, w, c) }",
    w=products.floats(1, 6, 6) + np.float32(0.1),
    c=floats(6),
)


def _other_axis(scale: np.ndarray) -> np.ndarray:
    w = integers.initializers(GEMM)["w"]
    return integers.quantize_weight(w, [1]).scale.ravel() * np.float32(0.5)


def _by_one(values: np.ndarray) -> np.ndarray:
    flat = values.copy().ravel()
    flat[7] += 1 if flat[7] < 127 else -1
    return flat.reshape(values.shape)


ERRORS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "scale of the wrong axis": ("w_scale", _other_axis),
    "scale off by one ulp": ("w_scale", lambda s: np.nextafter(s, np.float32(9))),
    "zero point off by one": ("w_zero_point", lambda z: z + 1),
    "alpha forgotten": ("w_scale", lambda s: s * 2),
    "bias forgotten": ("c", np.zeros_like),
    "weight transposed": ("w", np.transpose),
    "one weight changed by one": ("w", _by_one),
}


@pytest.mark.parametrize("error", ERRORS)
def test_the_check_of_products_sees(error: str) -> None:
    name, change = ERRORS[error]
    tier, _ = EXACT.apply(GEMM)
    inputs = {"x": floats(4, 6, seed=2)}
    assert integers.assert_products(GEMM, tier, inputs) == 1
    with pytest.raises(AssertionError):
        integers.assert_products(GEMM, integers.changed(tier, name, change), inputs)


def test_the_check_of_products_sees_an_activation_of_another_zero_point() -> None:
    tier, _ = EXACT.apply(GEMM)
    (integer,) = (n for n in tier.graph.node if n.op_type == "MatMulInteger")
    integer.input[2] = "off"
    tier.graph.initializer.append(numpy_helper.from_array(np.uint8(127), "off"))
    with pytest.raises(AssertionError):
        integers.assert_products(GEMM, tier, {"x": floats(4, 6, seed=2)})


def fused(tier: ModelProto, inputs: dict[str, np.ndarray], folder: Path) -> Counter[str]:
    oracle.run(tier, inputs, keep=folder / "fused.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


@pytest.mark.parametrize("text", ["y = Add(p, b)", "y = Add(b, p)", "y = Identity(p)"])
def test_a_lone_product_becomes_one_node_of_the_runtime(text: str, tmp_path: Path) -> None:
    before = model(
        f"g (float[n,8] x) => (float[n,16] y) {{ p = MatMul(x, w) {text} }}",
        w=floats(8, 16),
        b=floats(16),
    )
    tier, _ = EVERYTHING.apply(before)
    assert fused(tier, {"x": floats(2, 8)}, tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_products_of_one_activation_are_fused_behind_one_quantization(tmp_path: Path) -> None:
    before = model(
        "g (float[n,8] x) => (float[n,8] y, float[n,8] z)"
        " { p = MatMul(x, v) y = Add(b, p) z = MatMul(x, w) }",
        v=floats(8, 8, seed=1),
        w=floats(8, 8, seed=2),
        b=floats(8),
    )
    tier, _ = EVERYTHING.apply(before)
    assert fused(tier, {"x": floats(2, 8)}, tmp_path) == {
        "DynamicQuantizeLinear": 1,
        "MatMulIntegerToFloat": 2,
    }


@pytest.mark.parametrize("pipeline", ["gather-int8", "int8w"])
def test_a_tied_table_is_fused_as_well(pipeline: str, tmp_path: Path) -> None:
    tier, _ = PassManager(f"{pipeline},{SMALL}").apply(model(TIED, w=floats(70, 8)))
    assert fused(tier, {"i": np.array([0, 69])}, tmp_path)["DynamicQuantizeMatMul"] == 1


def test_a_bias_behind_a_weight_on_the_left_is_not_lost(tmp_path: Path) -> None:
    # onnxruntime 1.31 fuses a scale for each row with the Add and forgets to add.
    before = model(
        "g (float[8,5] x) => (float[6,5] y) { p = MatMul(w, x) y = Add(p, b) }",
        w=floats(6, 8),
        b=floats(5) + np.float32(100),
    )
    tier, _ = EVERYTHING.apply(before)
    inputs = {"x": floats(8, 5)}
    plain = oracle.run(tier, inputs, optimized=False)["y"]
    np.testing.assert_allclose(oracle.run(tier, inputs)["y"], plain, rtol=1e-6)
    assert (plain > 50).all()


# --- what stays float32 --------------------------------------------------------------------


def codes(before: ModelProto, **options: Any) -> tuple[dict[str, str], list[str]]:
    """Codes of the weights by place, and those of the nodes."""
    report = DynamicInt8Pass(**{"min_bytes": 0, **options}).apply(before)[1]
    return found(report), list(found(report, op=True).values())


PLAIN = "g (float[n,4] x) => (float[n,4] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize(
    ("text", "arrays", "weight", "node"),
    [
        ("y = MatMul(x, x)", {}, None, "OF230"),
        ("y = Relu(x)", {"w": floats(4, 4)}, "OF208", None),
        ("y = Add(x, w)", {"w": floats(4)}, "OF231", None),
        ("p = MatMul(x, w) y = Add(p, w)", {"w": floats(4, 4)}, "OF232", "OF232"),
        ("p = Gather(w, i) q = MatMul(x, w) y = Add(p, q)", None, "OF233", "OF233"),
        ("p = MatMul(x, w) t = Transpose(w) y = MatMul(p, t)", None, "OF237", "OF237"),
        ("y = MatMul(x, w)", {"w": floats(4)}, "OF236", "OF236"),
        ("y = MatMul(w, v)", {"w": floats(4, 4), "v": floats(4, 4)}, "OF231", "OF239"),
        ("y = MatMul(x, w)", {"w": floats(4, 4).astype(np.float16)}, "OF239", "OF239"),
        ("y = MatMul(x, w)", {"w": floats(4, 4).astype(np.float64)}, "OF204", "OF239"),
        ("p = Relu(x) y = MatMul(w, p)", {"w": floats(4, 4)}, "OF238", "OF238"),
        ("y = MatMul(x, w)", {"w": np.full((4, 4), np.nan, np.float32)}, "OF223", "OF223"),
        ("y = MatMul(x, w)", {"w": np.full((4, 4), np.inf, np.float32)}, "OF223", "OF223"),
    ],
)
def test_what_stays_says_why(
    text: str, arrays: dict[str, np.ndarray] | None, weight: str | None, node: str | None
) -> None:
    arrays = {"w": floats(4, 4)} if arrays is None else arrays
    before = model(f"g (float[4,4] x, int64[4] i) => (float[4,4] y) {{ {text} }}", **arrays)
    after, report = PassManager([EVERYTHING], verify=False).apply(before)
    assert found(report).get("w") == weight
    assert set(found(report, op=True).values()) <= {node}
    assert len(found(report, op=True)) == text.count("MatMul")
    assert protos.unlike(before, after) is None


def test_a_weight_that_is_an_output_or_an_input_stays() -> None:
    before = model(PLAIN, w=floats(4, 4))
    before.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    assert codes(before) == ({"w": "OF206"}, ["OF206"])
    before = model(PLAIN, w=floats(4, 4))
    before.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    assert codes(before) == ({"w": "OF207"}, ["OF207"])


def test_options_choose() -> None:
    before = model(
        "g (float[n,4] x) => (float[n,4] y) { p = MatMul(x, v) y = Gemm(p, w) }",
        v=floats(4, 4),
        w=floats(4, 4),
    )
    before.graph.node[0].name, before.graph.node[1].name = "/first", "/second"
    assert codes(before) == ({"v": "OF201", "w": "OF201"}, ["OF201", "OF201"])
    assert codes(before, include=("v",))[0] == {"v": "OF201", "w": "OF202"}
    assert codes(before, exclude=("/sec*",))[0] == {"v": "OF201", "w": "OF202"}
    assert codes(before, min_bytes=65)[1] == ["OF203", "OF203"]
    weights, products_ = codes(before, op_types=("Gemm",))
    assert weights == {"v": "OF231", "w": "OF201"}
    assert products_ == ["OF240", "OF201"]
    report = DynamicInt8Pass(min_bytes=0, op_types=("Gemm",)).apply(before)[1]
    assert "1 of 1 Gemm rewritten" in report_as_text(report)
    with pytest.raises(Refused, match="'nothing' matches no weight"):
        codes(before, include=("nothing",))
    with pytest.raises(SpecError, match="weight_type"):
        DynamicInt8Pass(weight_type="int4")  # type: ignore[arg-type]


FRONT = """g (float[n,4,8] x) => (float[n,4,4] y)
    { a = Conv(x, first) b = Conv<group=4>(a, depth) c = MatMul(b, dense)
      y = Conv(c, last) }"""
KERNELS = {
    "first": floats(4, 4, 1),
    "depth": floats(4, 1, 3),
    "dense": floats(6, 4),
    "last": floats(4, 4, 1),
}


def test_depthwise_and_front_end_stay_unless_asked() -> None:
    before = model(FRONT, **KERNELS)
    left = {"first": "OF235", "depth": "OF234", "dense": "OF201", "last": "OF201"}
    assert codes(before)[0] == left
    assert codes(before, float_depthwise=False)[0] == {**left, "depth": "OF235"}
    assert codes(before, float_front_end=False)[0] == {**left, "first": "OF201"}
    both = {"float_front_end": False, "float_depthwise": False}
    assert set(codes(before, **both)[0].values()) == {"OF201"}
    # A model of convolutions alone has no front end.
    alone = model(
        "g (float[n,4,8] x) => (float[n,4,8] y) { y = Conv(x, w) }", w=floats(4, 4, 1)
    )
    assert codes(alone)[0] == {"w": "OF201"}


def test_what_is_left_over_can_be_stored_as_int8w_does() -> None:
    before = model(FRONT, **KERNELS)
    tier, report = DynamicInt8Pass(min_bytes=0, leftover="int8w").apply(before)
    assert set(found(report).values()) == {"OF201"}
    held, rules = integers.initializers(tier), integers.Rules(inputs=True)
    for name in ("first", "depth"):
        wanted = integers.quantize_weight(KERNELS[name], [1, 2], rules)
        assert held[name].dtype == np.int8
        assert held[name].tolist() == wanted.values.tolist()
        assert held[f"{name}_scale"].tolist() == wanted.scale.tolist()
    assert held["last"].dtype == np.uint8
    assert [n.op_type for n in tier.graph.node].count("Conv") == 2
    decoded = {n: integers.decoded(KERNELS[n], [1, 2], rules) for n in ("first", "depth")}
    parent = model(FRONT, **{**KERNELS, **decoded})
    plain, _ = DynamicInt8Pass(min_bytes=0).apply(parent)
    inputs = {"x": floats(2, 4, 8)}
    oracle.assert_bit_equal(oracle.run(tier, inputs), oracle.run(plain, inputs))


def test_an_opset_before_11_is_refused_in_one_line() -> None:
    before = model(PLAIN, w=floats(4, 4))
    before.opset_import[0].version = 10
    with pytest.raises(Refused, match=r"opset 10: .* needs opset 11; .* int8w") as refused:
        EVERYTHING.apply(before)
    assert "\n" not in str(refused.value)
    before.opset_import[0].version = 11
    assert EVERYTHING.apply(before)[1].modified


def test_a_function_of_an_older_opset_stays() -> None:
    case = products.Case(
        helper.make_node("MatMul", ["x", "w"], ["y"]), 1, floats(2, 4), floats(4, 3)
    )
    case.scope = "function"
    before = case.model()
    before.functions[0].opset_import[0].version = 10
    report = EVERYTHING.apply(before)[1]
    assert set(found(report, op=True).values()) == {"OF210"}
    assert not report.modified


def test_channels_that_lie_apart_are_stored_and_not_counted() -> None:
    before = model(
        "g (float[n,6] x) => (float[n,4] y)"
        " { t = Transpose<perm=[0,2,1]>(w) r = Reshape(t, s) y = MatMul(x, r) }",
        w=floats(2, 4, 3),
        s=np.array([6, 4]),
    )
    tier, report = EXACT.apply(before)
    assert integers.assert_products(before, tier, {"x": floats(5, 6)}) == 1
    assert not [f for f in report.findings if f.code == "OF241"]


def test_the_share_of_sums_that_saturate_is_told() -> None:
    w = np.array([[1, 1, 1, 0], [1, 0.01, 1, 1], [1, 1, 0.1, 1], [1, 1, 0.1, 0]], np.float32)
    levels = np.abs(integers.quantize_weight(w, [0]).values.astype(int))
    over = (levels[0::2] + levels[1::2] > 128).sum()
    report = EVERYTHING.apply(model(PLAIN, w=w))[1]
    (told,) = (f for f in report.passes[0].findings if f.code == "OF241")
    assert told.message.startswith(f"{over / 8:.2%} of sums")
    for options in ({"weight_type": "uint8"}, {"reduce_range": True}):
        step = DynamicInt8Pass(min_bytes=0, **options)  # type: ignore[arg-type]
        findings = step.apply(model(PLAIN, w=w))[1].passes[0].findings
        assert "OF241" not in {f.code for f in findings}


# --- a tier among others -------------------------------------------------------------------


def unstamped(proto: ModelProto) -> bytes:
    copy = ModelProto()
    copy.CopyFrom(proto)
    del copy.metadata_props[:]
    return copy.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "name", ["merged_decoder", "speech_encoder", "int8_places", "unsorted"]
)
def test_gather_int8_may_come_before_or_after(name: str) -> None:
    parent = onnx.load(fixtures.built(name))
    steps = "dynamic-int8{min_bytes=0}", "gather-int8{min_bytes=0 min_rows=1}"
    one, _ = PassManager(",".join(steps)).apply(parent)
    other, _ = PassManager(",".join(reversed(steps))).apply(parent)
    assert unstamped(one) == unstamped(other)
    assert integers.dead(one) == []


@pytest.mark.parametrize("name", ["speech_encoder", "int8_places", "old_opset_13"])
def test_a_tier_of_fp16w_can_be_quantized(name: str) -> None:
    parent, _ = PassManager("fp16w{min_bytes=0}").apply(onnx.load(fixtures.built(name)))
    tier, report = EXACT.apply(parent)
    there = sum(node.op_type in integers.PRODUCTS for node in tier.graph.node)
    assert there
    for sample in fixtures.samples(name):
        assert integers.assert_products(parent, tier, sample) == there
    held = integers.initializers(tier)
    done = {f.where for f in report.passes[0].findings if f.fate is Fate.TREATED}
    assert all(held[n].dtype in (np.int8, np.uint8) for n in done & set(held))


@pytest.mark.parametrize("name", ["speech_encoder", "merged_decoder", "int8_places"])
def test_weights_of_int8w_are_multiplied_as_they_are_stored(name: str) -> None:
    parent = onnx.load(fixtures.built(name))
    stored, _ = PassManager("int8w{min_bytes=0 input_scales=false}").apply(parent)
    tier, report = PassManager("dynamic-int8{min_bytes=0}").apply(stored)
    before, after = integers.initializers(stored), integers.initializers(tier)
    done = {f.where for f in report.passes[0].findings if f.fate is Fate.TREATED}
    assert len(done & set(before)) > 1
    for where in done & set(before):
        if before[where].dtype == np.int8:
            assert after[where].tolist() == before[where].tolist()
    assert integers.dead(tier) == []


@pytest.mark.parametrize("name", fixtures.names(runs=True))
def test_every_product_and_every_weight_has_one_finding(name: str) -> None:
    source = fixtures.built(name)
    result = EVERYTHING(load(source))
    model_ = load(source)
    there = [
        node.op_type
        for scope in Weights(model_).scopes
        for node in scope.graph
        if node.op_type in ("MatMul", "Gemm", "Conv") and not node.domain
    ]
    of_nodes = [f for f in result.findings if f.op and f.fate]
    assert Counter(f.op for f in of_nodes) == Counter(there)
    assert len({f.where for f in of_nodes}) == len(there)
    of_weights = [f.where for f in result.findings if not f.op and f.fate]
    assert sorted(of_weights) == sorted(w.where for w in Weights(model_))
    assert not EVERYTHING(result.model).modified


def test_names_and_remarks_stay() -> None:
    before = model(
        "g (float[n,4] x) => (float[n,4] y) { p = MatMul(x, w) y = Relu(p) }", w=floats(4, 4)
    )
    node = before.graph.node[0]
    node.name, node.doc_string = "/block/MatMul", "the product"
    value = helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 4], "what it gives")
    before.graph.value_info.append(value)
    before.graph.initializer[0].doc_string = "learned"
    before.ir_version = 10
    node.metadata_props.add(key="namespace", value="block")
    after, _ = EVERYTHING.apply(before)
    (integer,) = (n for n in after.graph.node if n.op_type == "MatMulInteger")
    assert (integer.name, integer.doc_string) == ("/block/MatMul", "the product")
    assert [(m.key, m.value) for m in integer.metadata_props] == [("namespace", "block")]
    assert value in after.graph.value_info
    assert after.graph.initializer[0].doc_string == "learned"
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    made = [n.name for n in after.graph.node]
    assert len(set(made)) == len(made)


def test_a_name_that_is_taken_is_not_taken_again() -> None:
    before = model(
        "g (float[n,4] x) => (float[n,4] y, float[n,4] w_scale, float[n,4] x_quantized)"
        " { w_scale = Relu(x) x_quantized = Neg(x) y = MatMul(x, w) }",
        w=floats(4, 4),
    )
    tier, _ = EVERYTHING.apply(before)
    onnx.checker.check_model(tier, full_check=True)
    assert integers.assert_products(before, EXACT.apply(before)[0], {"x": floats(2, 4)}) == 1


# --- properties ----------------------------------------------------------------------------


@given(
    x=st.integers(0, 2**20).map(lambda seed: products.floats(seed, 3, 5))
    | st.lists(st.floats(-4, 4, width=32), min_size=1).map(lambda v: np.array(v, np.float32))
)
def test_the_reference_quantizes_as_the_runtime_does(x: np.ndarray) -> None:
    made = integers.dynamic_quantize_linear(x.ravel())
    if 0 < made.scale < 2.0**-100:
        return  # the runtime flushes what is subnormal to zero
    proto = model(
        "g (float[n] x) => (uint8[n] q, float s, uint8 z)"
        " { q, s, z = DynamicQuantizeLinear(x) }"
    )
    found_ = oracle.run(proto, {"x": x.ravel()})
    for name, wanted in zip("qsz", made, strict=True):
        integers.same(found_[name], wanted, name)


@given(case=products.cases(), variant=st.sampled_from(sorted(VARIANTS)))
def test_any_product_anywhere_equals_the_reference(case: products.Case, variant: str) -> None:
    step, rules = VARIANTS[variant]
    step = DynamicInt8Pass(
        min_bytes=0,
        float_front_end=False,
        float_depthwise=False,
        per_channel=step.per_channel,
        reduce_range=step.reduce_range,
        weight_type=step.weight_type,
        scale=step.scale,
    )
    before = case.model()
    copy = before.SerializeToString()
    tier, report = step.apply(before)
    assert before.SerializeToString() == copy
    told = set(found(report, op=True).values())
    if told == {"OF201"}:
        outputs = oracle.run(tier, case.inputs, optimized=False)
        by_default = oracle.run(tier, case.inputs)
        for name, wanted in case.expected(rules).items():
            integers.same(outputs[name], wanted, name)
            atol = 1e-5 * float(np.abs(wanted).max(initial=0))
            np.testing.assert_allclose(by_default[name], wanted, rtol=1e-5, atol=atol)
        assert integers.dead(tier) == []
    else:
        assert told == {"OF238" if case.is_worthwhile(rules) else "OF236"}
        assert told == {"OF236"} or (case.scope == "function" and case.needs_rank)
        assert not report.modified
    assert not step.apply(tier)[1].modified


@given(case=products.cases(), first=st.sampled_from(["int8w", "gather-int8"]))
def test_any_product_of_a_stored_weight_reads_the_same_bytes(
    case: products.Case, first: str
) -> None:
    case.gathered = first == "gather-int8"
    case.scope = "captured" if case.scope in ("branch", "loop", "function") else case.scope
    if "Cast" in case.path:
        case.path = ""
    options = "{min_bytes=0 min_rows=1}" if case.gathered else "{min_bytes=0}"
    last = f"dynamic-int8{{min_bytes=0 float_depthwise=false weight_type={STORED}}}"
    stored, _ = PassManager(first + options).apply(case.model())
    tier, report = PassManager(last).apply(stored)
    done = set(found(report, op=True).values()) == {"OF201"}
    if done and any(n.op_type == "MatMulInteger" for n in tier.graph.node):
        outputs = oracle.run(tier, case.inputs, optimized=False)
        for name, wanted in case.expected().items():
            integers.same(outputs[name], wanted, name)
    other, _ = PassManager(f"{last},{first}{options}").apply(case.model())
    if case.gathered:
        one, _ = PassManager(f"{first}{options},{last}").apply(case.model())
        assert unstamped(one) == unstamped(other)
    assert integers.dead(tier) == []


def test_a_saved_tier_says_how_it_was_made() -> None:
    tier, _ = EVERYTHING.apply(model(PLAIN, w=floats(4, 4)))
    made = {p.key: p.value for p in tier.metadata_props}
    assert made["onnxforge.pipeline"].startswith("dynamic-int8{op_types=MatMul,Gemm,Conv")
    assert isinstance(ir.from_proto(tier), ir.Model)
