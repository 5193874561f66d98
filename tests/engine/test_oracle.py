"""The oracle accepts what is right and bites on what is slightly wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from support import fixtures, models, oracle, payload


def _outputs() -> dict[str, np.ndarray]:
    values = np.array([[1.5, -2.0, 0.25], [3.0, 0.125, -7.5]], np.float32)
    return {"logits": values, "state": np.arange(6, dtype=np.float32)}


def _scaled(out):
    out["logits"] = out["logits"] * np.float32(1.01)


def _shifted(out):
    out["logits"] = np.roll(out["logits"].ravel(), 1).reshape(2, 3)


def _negated(out):
    out["logits"] = -out["logits"]


def _one_ulp(out):
    out["logits"] = out["logits"].copy()
    out["logits"][1, 2] = np.nextafter(out["logits"][1, 2], np.float32(0))


def _signed_zero(out):
    out["state"] = out["state"].copy()
    out["state"][0] = -0.0


def _wider(out):
    out["logits"] = out["logits"].astype(np.float64)


def _same_bytes(out):
    out["logits"] = out["logits"].view(np.int32)


def _reshaped(out):
    out["logits"] = out["logits"].reshape(3, 2)


def _missing(out):
    del out["state"]


def _extra(out):
    out["more"] = out["state"]


@pytest.mark.parametrize(
    "spoil",
    [
        _scaled,
        _shifted,
        _negated,
        _one_ulp,
        _signed_zero,
        _wider,
        _same_bytes,
        _reshaped,
        _missing,
        _extra,
    ],
)
def test_a_spoiled_output_is_rejected(spoil):
    spoiled = _outputs()
    spoil(spoiled)
    with pytest.raises(AssertionError, match=r"logits|state|more"):
        oracle.assert_bit_equal(spoiled, _outputs())


def test_equal_outputs_pass_nan_included():
    patterns = np.array([0x7FC00000, 0xFFC12345], np.uint32)
    oracle.assert_bit_equal(
        {"y": patterns.view(np.float32)}, {"y": patterns.copy().view(np.float32)}
    )


def test_another_nan_is_rejected():
    seen, wanted = (
        np.array([p], np.uint32).view(np.float32) for p in (0x7FC00000, 0x7FC00001)
    )
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        oracle.assert_bit_equal({"y": seen}, {"y": wanted})


def _numpy_halves(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(np.float16).view(np.uint16)


def test_rounding_agrees_with_numpy_around_every_float16():
    """Every float16, every half way to the next, and the float32 on either side."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float64)
    halves[-1] = 65536.0
    middles = (halves[:-1] + halves[1:]) / 2
    exact = np.concatenate([halves, middles]).astype(np.float32).view(np.uint32)
    near = np.concatenate([exact[exact > 0] - np.uint32(1), exact, exact + np.uint32(1)])
    both = np.concatenate([near, near | np.uint32(1 << 31)]).view(np.float32)
    np.testing.assert_array_equal(oracle.half_bits(both), _numpy_halves(both))


def test_rounding_agrees_with_numpy_at_every_exponent():
    patterns = np.arange(1 << 32, step=65537 // 5, dtype=np.uint64).astype(np.uint32)
    values = patterns.view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(oracle.half_bits(values), _numpy_halves(values))


def test_quiet_nans_agree_with_numpy():
    patterns = np.array([0x7FC00000, 0x7FC00001, 0x7FD56000, 0xFFFFFFFF], np.uint32)
    values = patterns.view(np.float32)
    np.testing.assert_array_equal(oracle.half_bits(values), _numpy_halves(values))
    signalling = np.array([0x7F800001, 0xFFA00000], np.uint32).view(np.float32)
    assert oracle.half_bits(signalling).tolist() == [0x7E00, 0xFF00]


def test_every_float16_widens_as_in_numpy():
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    quiet = halves[~np.isnan(halves.view(np.float16)) | (halves & 0x200 > 0)]
    wanted = quiet.view(np.float16).astype(np.float32).view(np.uint32)
    np.testing.assert_array_equal(oracle.float_bits(quiet), wanted)


@given(models.arrays())
def test_rounding_keeps_shape_and_is_idempotent(values):
    once = oracle.rounded_fp16(values)
    assert once.shape == values.shape
    assert oracle.rounded_fp16(once).tobytes() == once.tobytes()


def test_only_named_weights_are_rounded():
    model = onnx.load(fixtures.built("hiding_places"))
    names = ["w_initializer", "w_own", "w_value", "w_floats", "w_float", "w_function"]
    before = model.SerializeToString(deterministic=True)
    rounded = oracle.round_weights_fp16(model, names)
    assert model.SerializeToString(deterministic=True) == before
    changed = _changed(model, rounded)
    assert changed == {
        "graph > w_initializer",
        "graph > y_if_own > then_branch > w_own",
        "graph > y_if_own > else_branch > w_own",
        "graph > w_value > value",
        "graph > w_floats > value_floats",
        "graph > w_float > value_float",
        "function local.project > w_function > value",
    }
    assert payload.graph_text(rounded) == payload.graph_text(model)


def _changed(before: onnx.ModelProto, after: onnx.ModelProto) -> set[str]:
    first, second = (dict(payload.payloads(m, Path())) for m in (before, after))
    assert first.keys() == second.keys()
    return {place for place, content in first.items() if second[place] != content}


def test_rounded_weights_hold_float16_values():
    model = onnx.load(fixtures.built("speech_encoder"))
    names = oracle.float_weights(model)
    rounded = oracle.round_weights_fp16(model, names)
    for before, after in zip(model.graph.initializer, rounded.graph.initializer, strict=True):
        old, new = numpy_helper.to_array(before), numpy_helper.to_array(after)
        wanted = old.astype(np.float16).astype(np.float32) if before.name in names else old
        assert new.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", ["no_such_weight", "matrix", "w_cast", "g_function"])
def test_a_name_that_is_no_float32_weight_is_refused(name):
    model = onnx.load(fixtures.built("hiding_places"))
    with pytest.raises(KeyError, match=name):
        oracle.round_weights_fp16(model, [name])


def test_a_tensor_outside_is_refused():
    model = onnx.load(fixtures.built("external_one"), load_external_data=False)
    with pytest.raises(ValueError, match="up_w"):
        oracle.round_weights_fp16(model, ["up_w"])


def test_rounding_one_weight_shows_in_the_output():
    model = onnx.load(fixtures.built("hiding_places"))
    sample = fixtures.samples("hiding_places")[0]
    parent = oracle.run(model, sample)
    child = oracle.run(oracle.round_weights_fp16(model, ["w_captured"]), sample)
    with pytest.raises(AssertionError, match="y_if_captured"):
        oracle.assert_bit_equal(child, parent)
    del child["y_if_captured"], parent["y_if_captured"]
    oracle.assert_bit_equal(child, parent)


@pytest.mark.parametrize("name", fixtures.names(runs=True))
def test_fixtures_run_and_repeat(name):
    for sample in fixtures.samples(name):
        first = oracle.run(fixtures.built(name), sample)
        oracle.assert_bit_equal(oracle.run(fixtures.built(name), sample), first)


@pytest.mark.parametrize("name", fixtures.names())
def test_the_checker_says_what_the_fixture_says(name):
    path = fixtures.built(name)
    if name in fixtures.names(clean=True):
        onnx.checker.check_model(path, full_check=True)
    else:
        with pytest.raises(onnx.checker.ValidationError):
            onnx.checker.check_model(path)


@pytest.mark.parametrize("name", fixtures.names())
def test_fixtures_are_small_and_the_same_every_time(name, tmp_path):
    fixtures.source().write(name, tmp_path)
    folders = (fixtures.built(name).parent, tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second
    assert sum(map(len, first.values())) < 1 << 20


def test_another_process_runs_the_same():
    sample = fixtures.samples("external_one")[0]
    path = fixtures.built("external_one")
    oracle.assert_bit_equal(oracle.run_isolated(path, sample), oracle.run(path, sample))


def test_another_process_takes_a_model_in_memory():
    model = onnx.load(fixtures.built("merged_decoder"))
    sample = fixtures.samples("merged_decoder")[1]
    oracle.assert_bit_equal(oracle.run_isolated(model, sample), oracle.run(model, sample))


def test_a_refusal_in_another_process_tells_why():
    with pytest.raises(RuntimeError, match="outer scope value"):
        oracle.run_isolated(fixtures.built("captured_output"), {})


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_a_crash_names_its_signal(monkeypatch, tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGSEGV)})\n")
    monkeypatch.setattr(oracle, "__file__", str(script))
    with pytest.raises(oracle.Crashed, match="SIGSEGV"):
        oracle.run_isolated(fixtures.built("nameless"), fixtures.samples("nameless")[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models.models())
def test_drawn_models_are_valid_and_run(case):
    onnx.checker.check_model(case.model, full_check=True)
    outputs = oracle.run(case.model, case.inputs)
    assert list(outputs) == [o.name for o in case.model.graph.output]


def test_digests_do_not_depend_on_the_encoding(tmp_path):
    values = np.array([[0.5, -1.25], [3.0, 65504.0]], np.float32)
    plain = numpy_helper.from_array(values, "w")
    typed = onnx.TensorProto(
        name="w",
        data_type=plain.data_type,
        dims=plain.dims,
        float_data=values.ravel().tolist(),
    )
    outside = onnx.TensorProto(
        name="w", data_type=plain.data_type, dims=plain.dims, data_location=1
    )
    for key, value in (("location", "data.bin"), ("offset", "3")):
        outside.external_data.add(key=key, value=value)
    (tmp_path / "data.bin").write_bytes(b"abc" + values.tobytes())
    seen = [_saved(tmp_path, tensor) for tensor in (plain, typed, outside)]
    assert seen[0] == seen[1] == seen[2]


def _saved(folder, tensor):
    text = '<ir_version: 8, opset_import: ["" : 17]>\n'
    text += "g (float[2,2] x) => (float[2,2] y) { y = MatMul(x, w) }"
    model = parser.parse_model(text)
    model.graph.initializer.append(tensor)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return payload.tensor_digests(path), payload.graph_text(model)


@given(st.integers(0, 3), st.integers(0, 2))
def test_one_changed_byte_changes_one_digest(byte, weight):
    model = onnx.load(fixtures.built("nameless"))
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = changed.graph.initializer[weight]
    content = bytearray(tensor.raw_data)
    content[byte] ^= 1
    tensor.raw_data = bytes(content)
    assert _changed(model, changed) == {f"graph > {tensor.name}"}


def test_every_weight_of_the_hiding_places_has_a_digest():
    digests = payload.tensor_digests(fixtures.built("hiding_places"))
    assert digests["graph > w_same_first"] == digests["graph > w_same_second"]
    for place in (
        "graph > last_loop > body > w_loop_own",
        "graph > last_nest > body > sc_nest > then_branch > w_nest",
        "graph > y_scan > body > w_scan_own",
        "function local.project > w_function > value",
    ):
        assert len(digests[place]) == 64


def test_digests_read_data_files():
    digests = payload.tensor_digests(fixtures.built("external_one"))
    assert digests["graph > down_w"] == digests["graph > tied_w"] != digests["graph > up_w"]
    mixed = payload.tensor_digests(fixtures.built("external_mixed"))
    assert mixed["graph > down_w > value"] == digests["graph > down_w"]
    two = payload.tensor_digests(fixtures.built("external_two"))
    assert two["graph > tied_w"] == mixed["graph > tied_w"]


def test_text_sees_the_graph_and_not_the_stamps():
    model = onnx.load(fixtures.built("merged_decoder"))
    text = payload.graph_text(model)
    model.metadata_props.add(key="onnxforge.pipeline", value="fp16w")
    assert payload.graph_text(model) == text
    model.graph.node[3].doc_string = "changed"
    assert payload.graph_text(model) != text
