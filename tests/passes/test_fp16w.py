from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from onnx import TensorProto, helper, numpy_helper

from onnxforge import PassManager, load, save
from onnxforge.core import Fate
from onnxforge.errors import Refused, SpecError
from onnxforge.options import ByteSize
from onnxforge.passes.fp16w import WeightsFp16CastPass
from onnxforge.weights import Weights
from support import fixtures, models, oracle, tiers

EVERYTHING = WeightsFp16CastPass(min_bytes=0)

# --- example -------------------------------------------------------------------------------


def nodes(text: str) -> list[str]:
    """The nodes that fp16w makes of a model, one line each, weights of any size treated."""
    after, _ = EVERYTHING.apply(onnx.parser.parse_model(text))
    return lines(after.graph)


def lines(graph: onnx.GraphProto) -> list[str]:
    return [f"{', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in graph.node]


HEADER = '<ir_version: 8, opset_import: ["" : 17]> '


def test_a_weight_is_cast_before_its_consumer() -> None:
    assert nodes(
        HEADER
        + """g (float[n,2] x) => (float[n,2] y)
        <float[2,2] w = {1.0, 2.0, 3.0, 4.0}> { y = MatMul(x, w) }"""
    ) == ["w_fp16w = Cast(w)", "y = MatMul(x, w_fp16w)"]


def test_one_cast_serves_all_consumers_of_a_graph() -> None:
    text = (
        HEADER
        + """g (float[n,2] x) => (float[n,2] y)
        <float[2,2] w = {1.0, 2.0, 3.0, 4.0}> { a = MatMul(x, w) y = MatMul(a, w) }"""
    )
    assert nodes(text) == [
        "w_fp16w = Cast(w)",
        "a = MatMul(x, w_fp16w)",
        "y = MatMul(a, w_fp16w)",
    ]
    apart, _ = WeightsFp16CastPass(min_bytes=0, share=False).apply(
        onnx.parser.parse_model(text)
    )
    assert lines(apart.graph) == [
        "w_fp16w = Cast(w)",
        "a = MatMul(x, w_fp16w)",
        "w_fp16w_1 = Cast(w)",
        "y = MatMul(a, w_fp16w_1)",
    ]


def test_a_table_is_cast_behind_its_gather_which_keeps_the_name_of_the_output() -> None:
    assert nodes(
        HEADER
        + """g (int64[n] i) => (float[n,2] y)
        <float[2,2] w = {1.0, 2.0, 3.0, 4.0}> { y = Gather(w, i) }"""
    ) == ["y_fp16w = Gather(w, i)", "y = Cast(y_fp16w)"]


def test_a_tied_table_is_stored_once_for_both_of_its_uses() -> None:
    text = (
        HEADER
        + """g (int64[n] i) => (float[n,2] y)
        <float[2,2] w = {1.0, 2.0, 3.0, 4.0}>
        { e = Gather(w, i) t = Transpose(w) y = MatMul(e, t) }"""
    )
    after, _ = EVERYTHING.apply(onnx.parser.parse_model(text))
    assert lines(after.graph) == [
        "e_fp16w = Gather(w, i)",
        "e = Cast(e_fp16w)",
        "w_fp16w = Cast(w)",
        "t = Transpose(w_fp16w)",
        "y = MatMul(e, t)",
    ]
    assert [(t.name, t.data_type) for t in after.graph.initializer] == [
        ("w", TensorProto.FLOAT16)
    ]


def test_a_captured_weight_is_cast_in_each_graph_that_reads_it() -> None:
    text = (
        HEADER
        + """g (bool b, float[n,2] x) => (float[n,2] y)
        <float[2,2] w = {1.0, 2.0, 3.0, 4.0}> {
            a = MatMul(x, w)
            y = If (b) <
                then_branch = one () => (float[n,2] p) { p = MatMul(a, w) },
                else_branch = two () => (float[n,2] q) { q = Neg(a) }
            >
        }"""
    )
    after, _ = EVERYTHING.apply(onnx.parser.parse_model(text))
    branches = {a.name: lines(a.g) for a in after.graph.node[-1].attribute}
    assert lines(after.graph)[:2] == ["w_fp16w = Cast(w)", "a = MatMul(x, w_fp16w)"]
    assert branches["then_branch"] == ["w_fp16w_1 = Cast(w)", "p = MatMul(a, w_fp16w_1)"]
    assert branches["else_branch"] == ["q = Neg(a)"]


def test_a_constant_node_stays_and_a_cast_follows_it() -> None:
    assert nodes(
        HEADER
        + """g (float[n] x) => (float[n] y)
        { c = Constant<value_floats = [1.0, 2.0]>() y = Add(x, c) }"""
    ) == ["c = Constant()", "c_fp16w = Cast(c)", "y = Add(x, c_fp16w)"]


# --- bytes ---------------------------------------------------------------------------------

SPECIAL = np.array(
    [
        *(0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFA00000, 0x7F800001),
        *(0x477FE000, 0x477FEFFF, 0xC77FEFFF, 0x38800000, 0x387FFFFF, 0x33800000, 0x33000000),
        *(0x33000001, 0x3F801000, 0x3F803000, 0x3F801001, 0x00000001, 0x80000001),
    ],
    np.uint32,
).view(np.float32)


def weight_model(values: np.ndarray) -> onnx.ModelProto:
    """Return y = x + w, of rank one or more."""
    shape = list(values.shape)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"], name="add")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(values, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def stored(model: onnx.ModelProto) -> np.ndarray:
    after, _ = EVERYTHING.apply(model)
    return numpy_helper.to_array(after.graph.initializer[0])


def test_the_stored_bits_are_those_of_the_integer_reference() -> None:
    found = stored(weight_model(np.tile(SPECIAL, 3)))
    finite = ~np.isnan(np.tile(SPECIAL, 3))
    wanted = oracle.half_bits(np.tile(SPECIAL, 3))
    assert found.dtype == np.float16
    assert found.view(np.uint16)[finite].tolist() == wanted[finite].tolist()


def test_every_float16_and_every_midpoint_between_two_rounds_to_even() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)[:-1]
    exact = halves.astype(np.float32)
    above = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (exact.astype(np.float64) + above) / 2  # exact: float32 holds every midpoint
    near = [np.nextafter(middle.astype(np.float32), np.float32(d)) for d in (-np.inf, np.inf)]
    values = np.concatenate([exact, middle.astype(np.float32), *near])
    values = np.concatenate([values, -values])
    bits = stored(weight_model(values)).view(np.uint16)
    assert np.array_equal(bits, oracle.half_bits(values))


def test_nan_keeps_sign_and_upper_payload_and_becomes_quiet() -> None:
    patterns = np.array(
        [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFBFE000, 0x7FFFFFFF], np.uint32
    )
    values = np.concatenate([patterns.view(np.float32), np.ones(60, np.float32)])
    bits = stored(weight_model(values)).view(np.uint16)
    assert [hex(b) for b in bits[:5]] == ["0x7e00", "0xfe00", "0x7e00", "0xffff", "0x7fff"]
    assert set(bits[5:].tolist()) == {0x3C00}


def test_blocks_of_a_large_weight_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).standard_normal(10_001).astype(np.float32)
    whole = stored(weight_model(values)).tobytes()
    monkeypatch.setattr("onnxforge.lazy.BLOCK_BYTES", 256)
    assert stored(weight_model(values)).tobytes() == whole
    assert whole == oracle.half_bits(values).tobytes()


def test_two_names_of_one_stored_tensor_stay_one_stored_tensor(tmp_path: Path) -> None:
    source = fixtures.built("external_one")
    target, report = tiers.run("fp16w", source, tmp_path)
    assert report.passes[0].tally(Fate.TREATED)[0] >= 2

    def places(path: Path) -> Counter[tuple[str, ...]]:
        model = onnx.load(path, load_external_data=False)
        return Counter(
            tuple(e.value for e in t.external_data if e.key == "offset")
            for t in model.graph.initializer
            if t.external_data
        )

    assert 2 in places(source).values()
    assert 2 in places(target).values()


# --- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "{min_bytes=0}", "{min_bytes=0 share=false}"])
@pytest.mark.parametrize("name", fixtures.names(runs=True))
def test_the_tier_is_bit_equal_to_its_rounded_parent(
    name: str, options: str, tmp_path: Path
) -> None:
    source = fixtures.built(name)
    target, report = tiers.run(f"fp16w{options}", source, tmp_path)
    parent = tiers.rounded_parent(source, report)
    for sample in fixtures.samples(name):
        oracle.assert_bit_equal(oracle.run(target, sample), oracle.run(parent, sample))


def test_the_oracle_sees_a_weight_that_was_not_rounded(tmp_path: Path) -> None:
    source = fixtures.built("speech_encoder")
    target, _ = tiers.run("fp16w", source, tmp_path)
    sample = fixtures.samples("speech_encoder")[0]
    with pytest.raises(AssertionError):
        oracle.assert_bit_equal(oracle.run(target, sample), oracle.run(source, sample))


def test_every_weight_in_every_hiding_place_is_treated_or_reported() -> None:
    source = fixtures.built("hiding_places")
    large = {w.where for w in Weights(load(source)) if w.dtype == ir.DataType.FLOAT}
    model = load(source)
    result = EVERYTHING(model)
    left = {f.where: f.code for f in result.findings if f.fate is not Fate.TREATED}
    assert large - set(left) == {f.where for f in result.findings if f.fate is Fate.TREATED}
    codes = sorted({left[where] for where in large & set(left)})
    # A scale, an output, a default of a graph input, and one that nothing reads.
    assert codes == ["OF205", "OF206", "OF207", "OF208"]


# --- what stays float32 --------------------------------------------------------------------


def fates(model: onnx.ModelProto, step: WeightsFp16CastPass = EVERYTHING) -> dict[str, str]:
    _, report = step.apply(model)
    return {finding.where: finding.code for finding in report.passes[0].findings}


@pytest.mark.parametrize("value", [65520.0, -65520.0, 3.4e38, np.finfo(np.float32).max])
def test_a_weight_that_would_overflow_stays(value: float) -> None:
    values = np.ones(500, np.float32)
    values[417] = value
    model = weight_model(values)
    assert fates(model) == {"w": "OF221"}
    assert EVERYTHING.apply(model)[0] == model
    with pytest.raises(Refused, match="w: overflows float16"):
        WeightsFp16CastPass(min_bytes=0, on_overflow="error").apply(model)


@pytest.mark.parametrize("value", [65504.0, 65519.996, np.inf, -np.inf, np.nan])
def test_a_value_that_does_not_become_infinite_is_no_overflow(value: float) -> None:
    values = np.ones(500, np.float32)
    values[3] = value
    assert fates(weight_model(values)) == {"w": "OF201"}


@pytest.mark.parametrize(
    ("value", "code"),
    [
        *((1e-12, "OF222"), (5.96e-8, "OF222"), (6.0e-5, "OF222"), (2.0**-14, "OF201")),
        *((0.0, "OF201"), (1e-4, "OF201"), (-3.4e38, "OF221"), (-np.inf, "OF201")),
    ],
)
def test_a_small_constant_stays_if_it_would_lose_more_than_rounding(
    value: float, code: str
) -> None:
    assert fates(weight_model(np.array([value], np.float32))) == {"w": code}


def test_a_learned_weight_may_have_tiny_values() -> None:
    values = np.full(500, 1e-9, np.float32)
    assert fates(weight_model(values)) == {"w": "OF201"}


def test_names_choose_what_is_treated() -> None:
    model = weight_model(np.ones(500, np.float32))
    assert fates(model, WeightsFp16CastPass(exclude=("w",))) == {"w": "OF202"}
    assert fates(model, WeightsFp16CastPass(exclude=("ad*",))) == {"w": "OF202"}
    assert fates(model, WeightsFp16CastPass(include=("add",))) == {"w": "OF201"}
    with pytest.raises(Refused, match="'nothing\\*' matches no weight"):
        WeightsFp16CastPass(exclude=("nothing*",)).apply(model)


def test_small_weights_stay_by_default() -> None:
    model = weight_model(np.ones(255, np.float32))
    assert fates(model, WeightsFp16CastPass()) == {"w": "OF203"}
    assert fates(weight_model(np.ones(256, np.float32)), WeightsFp16CastPass()) == {
        "w": "OF201"
    }


def test_a_weight_whose_value_a_runtime_needs_at_load_time_stays() -> None:
    source = fixtures.built("old_opset_11")
    result = EVERYTHING(load(source))
    kept = {f.where for f in result.findings if f.code == "OF205"}
    scales = {
        use.node.op_type for w in Weights(load(source)) if w.where in kept for use in w.uses
    }
    assert "Resize" in scales


def test_an_opset_without_cast_to_float16_is_reported() -> None:
    model = weight_model(np.ones(500, np.float32))
    model.opset_import[0].version = 5
    wrapped = ir.from_proto(model)
    result = EVERYTHING(wrapped)
    assert [f.code for f in result.findings] == ["OF210"]
    assert not result.modified


def test_interface_and_names_stay() -> None:
    source = fixtures.built("speech_encoder")
    before, after = onnx.load(source), EVERYTHING.apply(load(source))[0]
    again = ir.to_proto(after)
    assert again.graph.input == before.graph.input
    assert again.graph.output == before.graph.output
    assert {t.name for t in again.graph.initializer} == {
        t.name for t in before.graph.initializer
    }


def test_a_scale_that_reaches_its_resize_through_identity_stays() -> None:
    assert (
        "OF205"
        in fates(
            onnx.parser.parse_model(
                HEADER
                + """g (float[1,1,a,b] x) => (float[1,1,c,d] y)
            <float[4] s = {1.0, 1.0, 2.1, 2.1}> { i = Identity(s) y = Resize(x, , i) }"""
            )
        ).values()
    )


def test_names_of_nodes_work_on_a_tier_as_well() -> None:
    step = WeightsFp16CastPass(min_bytes=0, include=("add",))
    tier, _ = step.apply(weight_model(np.ones(500, np.float32)))
    assert not step.apply(tier)[1].modified


def test_a_weight_tied_to_one_that_stays_is_not_stored_twice(tmp_path: Path) -> None:
    model = weight_model(np.ones(500, np.float32))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(500, np.float32), "v"))
    model.graph.output.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [500]))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    tied = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    del tied.graph.initializer[1].external_data[:]
    tied.graph.initializer[1].external_data.extend(tied.graph.initializer[0].external_data)
    onnx.save(tied, tmp_path / "m.onnx")
    report = PassManager("fp16w").run(tmp_path / "m.onnx", tmp_path / "t.onnx")
    assert {f.where: f.code for f in report.passes[0].findings} == {"v": "OF206", "w": "OF211"}


def test_the_long_name_of_the_standard_domain_is_the_standard_domain() -> None:
    model = weight_model(np.ones(500, np.float32))
    model.opset_import[0].domain = "ai.onnx"
    assert fates(model) == {"w": "OF201"}


def test_what_is_said_of_a_gathered_output_stays_with_it() -> None:
    model = onnx.parser.parse_model(
        HEADER
        + """g (int64[n] i) => (float[n,2] y)
        <float[2,2] w = {1.0, 2.0, 3.0, 4.0}> { y = Gather(w, i) }"""
    )
    model.graph.output[0].doc_string = "rows"
    model.graph.output[0].type.denotation = "TENSOR"
    annotation = model.graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    tier, _ = EVERYTHING.apply(model)
    assert tier.graph.output == model.graph.output
    assert tier.graph.quantization_annotation == model.graph.quantization_annotation


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"on_overflow": "bogus"}, "keep"),
        ({"exclude": "lm_head*"}, "tuple"),
        ({"share": 3}, "share"),
        ({"min_bytes": "64Kib2"}, "min_bytes"),
    ],
)
def test_options_given_in_python_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        WeightsFp16CastPass(**options)


def test_options_given_in_python_take_their_type() -> None:
    step = WeightsFp16CastPass(min_bytes="64KiB", include=["w"])  # type: ignore[arg-type]
    assert step == WeightsFp16CastPass(min_bytes=ByteSize(65536), include=("w",))
    assert hash(step)


# --- properties ----------------------------------------------------------------------------


@given(values=models.arrays())
def test_any_array_is_rounded_like_the_reference_or_left_alone(values: np.ndarray) -> None:
    if values.ndim == 0 or values.size == 0:
        values = np.append(values.ravel(), np.float32(1))
    model = weight_model(values)
    code = fates(model)["w"]
    finite = values[np.isfinite(values)]
    overflows = bool((np.abs(finite) >= 65520).any())
    small = np.abs(finite[finite != 0])
    assert (code == "OF221") == overflows
    if not overflows:
        assert (code == "OF222") == bool(values.size <= 16 and (small < 2.0**-14).any())
    if code == "OF201":
        numbers = ~np.isnan(values)
        assert np.array_equal(
            stored(model).view(np.uint16)[numbers], oracle.half_bits(values)[numbers]
        )
        assert np.isnan(stored(model)[~numbers]).all()


@given(case=models.models())
def test_any_model_is_bit_equal_to_its_rounded_parent(case: models.Case) -> None:
    before = case.model.SerializeToString()
    tier, report = EVERYTHING.apply(case.model)
    assert case.model.SerializeToString() == before
    names = {
        w.where: w.value.name
        for w in Weights(ir.from_proto(case.model))
        if w.value is not None
    }
    treated = [names[f.where] for f in report.passes[0].findings if f.fate is Fate.TREATED]
    parent = oracle.round_weights_fp16(case.model, treated)
    oracle.assert_bit_equal(oracle.run(tier, case.inputs), oracle.run(parent, case.inputs))
    assert not PassManager([EVERYTHING]).apply(tier)[1].modified


def test_a_saved_tier_says_how_it_was_made(tmp_path: Path) -> None:
    save(EVERYTHING.apply(load(fixtures.built("nameless")))[0], tmp_path / "tier.onnx")
    made = {p.key: p.value for p in onnx.load(tmp_path / "tier.onnx").metadata_props}
    assert made["onnxforge.pipeline"].startswith("fp16w{min_bytes=0")
