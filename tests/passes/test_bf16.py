"""bf16: the published decoder, opsets that know no bfloat16, and targets."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnxforge import PassManager, load, save
from onnxforge.emulation import emulate
from onnxforge.errors import Refused
from onnxforge.halving.formats import BFLOAT16, halved
from support import fixtures, halves, oracle

BF16, F32 = TensorProto.BFLOAT16, TensorProto.FLOAT
RNG = np.random.default_rng(4)
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
X = RNG.standard_normal((4, 8)).astype(np.float32)
W = RNG.standard_normal((8, 8)).astype(np.float32)
PUBLISHED = "bf16{keep_io=audio_embeds,logits target=cuda}"


def decoder() -> Any:
    """A decoder with a key-value cache that takes embeddings of sound."""
    return fixtures.source().merged_decoder(audio=True)


def test_the_published_decoder() -> None:
    """Host sees float32 where it wants to; the cache stays bfloat16; the size halves."""
    parent = decoder().model
    tier, report = halves.tier(parent, PUBLISHED)
    types = halves.types(tier)
    inputs = {value.name for value in parent.graph.input}
    outputs = {value.name for value in parent.graph.output}
    for name in inputs | outputs:
        before = halves.types(parent)[name]
        kept = before != F32 or name in ("audio_embeds", "logits")
        assert types[name] == (before if kept else BF16), name
    there = {node.name for node in halves.nodes(parent)}
    added = [node for node in halves.ops(tier, "Cast") if node.name not in there]
    ends = [n for n in added if {n.input[0], n.output[0]} & (inputs | outputs)]
    assert [(n.input[0], n.output[0]) for n in ends] == [
        ("audio_embeds", "audio_embeds_bf16"),
        ("logits_bf16", "logits"),
    ]
    # All other casts lead into or out of what is reported as kept float32.
    told = [f for f in report.passes[0].findings if f.op and f.code != "OF201"]
    kept = {
        node.name for node in halves.nodes(parent) if any(_is(f.where, node) for f in told)
    }
    makers = {o: n for n in halves.nodes(tier) for o in n.output}
    for cast in (node for node in added if node not in ends):
        around = [n.name for n in halves.nodes(tier) if cast.output[0] in n.input]
        around += [makers[cast.input[0]].name] if cast.input[0] in makers else []
        assert kept & {*around}, cast.name
    assert len(tier.SerializeToString()) < 0.62 * len(parent.SerializeToString())


def _is(where: str, node: onnx.NodeProto) -> bool:
    """Whether a path is that of a node, whose name may have slashes itself."""
    return where == node.name or where.endswith(f"/{node.name}")


def test_the_emulated_decoder_decodes_as_float32_does() -> None:
    parent = decoder().model
    tier, _ = halves.tier(parent, PUBLISHED)
    for sample in decoder().samples:
        wanted = oracle.run(parent, sample)
        found = halves.outputs(tier, sample)
        for name, values in wanted.items():
            assert np.linalg.norm(found[name] - values) < 0.04 * np.linalg.norm(values)
        # What is handed out as bfloat16 holds bfloat16 values.
        present = found["present.0.key"]
        assert np.array_equal(present, halves.rounded(present, "bf16"))
        assert not np.array_equal(wanted["present.0.key"], present)


def test_weights_are_rounded_to_nearest_even_and_nan_stays() -> None:
    bits = np.array(
        [
            0x3F808000,
            0x3F818000,
            0x3F808001,
            0x7F7FFFFF,
            0x7F7F7FFF,
            0x7FC01234,
            0x7F800001,
            0xFF800001,
            0x80000001,
            0x00008000,
            0x00018000,
            0x7F800000,
            0xFF800000,
        ],
        np.uint32,
    )
    found = halved(numpy_tensor(bits.view(np.float32)), BFLOAT16).numpy().view(np.uint16)
    assert [f"{value:04X}" for value in found] == [
        "3F80",
        "3F82",
        "3F81",
        "7F80",
        "7F7F",
        "7FC0",
        "7FC0",
        "FFC0",
        "8000",
        "0000",
        "0002",
        "7F80",
        "FF80",
    ]
    values = RNG.standard_normal(100_000).astype(np.float32) * 10.0 ** RNG.integers(
        -30, 30, 100_000
    )
    values = values.astype(np.float32)
    expected = values.astype(ml_dtypes.bfloat16)
    assert np.array_equal(halved(numpy_tensor(values), BFLOAT16).numpy(), expected)


def numpy_tensor(values: np.ndarray) -> object:
    import onnx_ir as ir

    return ir.tensor(values)


def test_an_opset_without_bfloat16_is_refused_or_raised() -> None:
    parent = onnx.load(fixtures.built("old_opset_11"))
    with pytest.raises(Refused, match="opset 11: bfloat16 needs opset 13; raise_opset=13"):
        PassManager("bf16").apply(parent)
    tier, _ = halves.tier(parent, "bf16{raise_opset=13}")
    assert tier.opset_import[0].version == 13
    for sample in fixtures.samples("old_opset_11"):
        wanted = oracle.run(fixtures.built("old_opset_11"), sample)
        for name, values in halves.outputs(tier, sample).items():
            assert np.linalg.norm(values - wanted[name]) < 0.05 * np.linalg.norm(wanted[name])


def test_an_operator_without_bfloat16_at_the_opset_stays_float32() -> None:
    text = """m (float[1,3,8,8] x) => (float[1,3,8,8] y) {
        a = Conv <pads=[1,1,1,1]> (x, k) b = Transpose <perm=[0,1,3,2]> (a)
        c = MatMul(b, w) y = Add(c, c) }"""
    weights = {"k": RNG.standard_normal((3, 3, 3, 3)).astype(np.float32), "w": W}
    old, report = halves.tier(halves.parsed(HEAD + text, **weights), "bf16")
    types = halves.types(old)
    assert (types["k"], types["a"], types["c"]) == (F32, F32, BF16)
    (told,) = [f for f in report.passes[0].findings if f.op == "Conv"]
    assert (told.code, told.message) == ("OF265", "Conv takes no bfloat16 at this opset")
    newer = HEAD.replace("17", "22").replace("8,", "10,") + text
    new, _ = halves.tier(halves.parsed(newer, **weights), "bf16{target=tensorrt}")
    assert halves.types(new)["k"] == BF16


@pytest.mark.parametrize(("opset", "kind"), [(13, F32), (16, BF16)])
def test_what_an_if_or_a_loop_hands_on_is_bfloat16_from_opset_16(
    opset: int, kind: int
) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    m (float[n,8] x, bool c, int64 count) => (float[n,8] y) {{
        a = MatMul(x, w)
        b = If(c) <then_branch = t () => (float[n,8] u) {{ u = MatMul(a, w) }},
                   else_branch = e () => (float[n,8] v) {{ v = Identity(a) }}>
        z = Loop(count, c, b) <body = l (int64 i, bool go, float[n,8] s) =>
            (bool more, float[n,8] next) {{ more = Identity(go) next = MatMul(s, w) }}>
        y = MatMul(z, w) }}"""
    parent = halves.parsed(text, w=W / 2)
    tier, _ = halves.tier(parent, "bf16")
    types = halves.types(tier)
    assert types["a"] == BF16
    assert {types[name] for name in ("b", "s", "z")} == {kind}
    inputs = {"x": X, "c": np.array(True), "count": np.array(2)}
    wanted = oracle.run(parent, inputs)["y"]
    found = halves.outputs(tier, inputs)["y"]
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


def test_the_lowest_float_is_no_infinity_in_bfloat16() -> None:
    text = (
        HEAD
        + """m (float[n,8] x) => (float[n,8] y) {
        a = MatMul(x, w) s = Add(a, mask) y = Softmax(s) }"""
    )
    lowest = np.finfo(np.float32).min
    mask = np.array([0, lowest, lowest, 0, 0, 0, 0, -3e38], np.float32)
    tier, _ = halves.tier(halves.parsed(text, w=W, mask=mask), "bf16")
    stored = next(t for t in tier.graph.initializer if t.name == "mask")
    values = numpy_helper.to_array(stored).astype(np.float32)
    assert np.isfinite(values).all()
    assert values[7] == np.float32(-3e38).astype(ml_dtypes.bfloat16)


def test_a_target_without_kernels_is_refused_and_names_the_operator() -> None:
    text = HEAD + "m (float[n,8] x) => (float[n,8] y) { a = MatMul(x, w) y = Relu(a) }"
    parent = halves.parsed(text, w=W)
    for target in ("cpu", "webgpu", "any"):
        message = f"target={target} has no bfloat16 kernel for MatMul \\(n_a\\)"
        with pytest.raises(Refused, match=message):
            PassManager(f"bf16{{target={target}}}").apply(parent)


def test_a_target_without_any_kernel_is_refused_where_there_are_no_products() -> None:
    text = HEAD + "m (float[n,8] x) => (float[n,8] y) { a = Mul(x, x) y = Relu(a) }"
    with pytest.raises(Refused, match="target=webgpu has no bfloat16 kernel for Mul"):
        PassManager("bf16{target=webgpu}").apply(halves.parsed(text))
    # In the second run all that is left lacks a kernel, which is no reason to refuse.
    text = """m (float[1,3,8,8] x) => (float[1,3,8,8] y) {
        a = Conv <pads=[1,1,1,1]> (x, k) b = Pad(a, none) y = MatMul(b, w) }"""
    weights = {"k": RNG.standard_normal((3, 3, 3, 3)).astype(np.float32), "w": W}
    parent = halves.parsed(HEAD + text, none=np.zeros(8, np.int64), **weights)
    tier, report = halves.tier(parent, "bf16{target=cuda}")
    assert {f.code for f in report.passes[0].findings if f.op == "Pad"} == {"OF266"}
    assert halves.types(tier)["w"] == BF16


def test_large_weights_stay_on_disk_and_are_rounded_as_they_are_written(tmp_path) -> None:
    text = HEAD + "m (float[n,8] x) => (float[n,8] y) { y = MatMul(x, w) }"
    parent = halves.parsed(text, w=W)
    onnx.save(
        parent,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    PassManager("bf16").run(tmp_path / "m.onnx", tmp_path / "out.onnx")
    tier = onnx.load(tmp_path / "out.onnx")
    (weight,) = tier.graph.initializer
    assert weight.data_type == BF16
    assert np.array_equal(numpy_helper.to_array(weight), W.astype(ml_dtypes.bfloat16))
    model = load(tmp_path / "out.onnx")
    emulate(model)
    save(model, tmp_path / "emulated.onnx")
    found = oracle.run(tmp_path / "emulated.onnx", {"x": X})["y"]
    wanted = halves.rounded(halves.rounded(X, "bf16") @ halves.rounded(W, "bf16"), "bf16")
    assert np.allclose(found, wanted, rtol=2**-7)
