"""Emulation: float32 that rounds as a tier does, what it warns of, and comparisons by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto

from onnxforge import load
from onnxforge.cli.emulate import emulate as command
from onnxforge.compare import Data, Options, compare
from onnxforge.compare.samples import Sample
from onnxforge.emulation import computes_in, emulate
from onnxforge.errors import Refused
from onnxforge.peaks import Watched, peaks
from onnxforge.walk import scopes
from support import fixtures, halves, oracle

RNG = np.random.default_rng(6)
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
X = RNG.standard_normal((4, 8)).astype(np.float32)
W = RNG.standard_normal((8, 8)).astype(np.float32)
NODES = "m (float[n,8] x) => (float[n,8] y) { a = MatMul(x, w) b = Exp(a) y = Add(b, x) }"


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    path = tmp_path / "parent.onnx"
    onnx.save(halves.parsed(HEAD + NODES, w=W), path)
    return path


def by_hand(x: np.ndarray, word: str) -> np.ndarray:
    """The same model, rounded after each step."""

    def half(values: np.ndarray) -> np.ndarray:
        return halves.rounded(values, word)

    x = half(x)
    return half(half(np.exp(half(x @ half(W)))) + x)


@pytest.mark.parametrize("word", ["fp16", "bf16"])
@pytest.mark.parametrize("optimized", [True, False])
def test_every_value_is_rounded_where_it_is_made(word: str, optimized: bool) -> None:
    tier, _ = halves.tier(halves.parsed(HEAD + NODES, w=W), word)
    found = oracle.run(halves.emulated(tier), {"x": X}, optimized=optimized)["y"]
    wanted = by_hand(X, word)
    close = np.abs(found - wanted) <= np.abs(wanted) * (
        2.0**-7 if word == "bf16" else 2.0**-10
    )
    assert close.all()
    assert np.mean(found == wanted) > 0.9  # float32 sums may round to the neighbour
    assert np.mean(np.exp(X @ W) + X == wanted) < 0.1


def test_the_emulation_is_float32_and_keeps_names() -> None:
    tier, _ = halves.tier(halves.parsed(HEAD + NODES, w=W), "fp16{keep_io=none}")
    made = halves.emulated(tier)
    types = halves.types(made)
    assert {types[n] for n in ("x", "a", "b", "y", "w")} == {TensorProto.FLOAT}
    found = oracle.run(made, {"x": X})["y"]
    assert np.array_equal(found, halves.rounded(found, "fp16"))
    model = load_proto(made)
    assert not computes_in(model)
    assert emulate(model) == []  # there is nothing left to round


def load_proto(proto: onnx.ModelProto) -> object:
    from onnxforge.model_io import from_proto

    return from_proto(proto)


def test_what_only_stores_and_moves_halves_does_not_compute_in_them() -> None:
    for text, wanted in (("fp16w{min_bytes=0}", 0), ("fp16", 1)):
        tier, _ = halves.tier(halves.parsed(HEAD + NODES, w=W), text)
        assert len(computes_in(load_proto(tier))) == wanted


def test_norms_are_not_fused_over_the_rounding() -> None:
    """A runtime that fuses the casts into a norm has no kernel for that, or skips rounding."""
    parent = onnx.load(fixtures.built("speech_encoder"))
    for word in ("fp16", "bf16"):
        made = halves.emulated(halves.tier(parent, word)[0])
        for sample in fixtures.samples("speech_encoder"):
            fused = oracle.run(made, sample)
            plain = oracle.run(made, sample, optimized=False)
            for name, values in plain.items():
                error = np.linalg.norm(fused[name] - values)
                assert error < 2e-3 * np.linalg.norm(values)


BODIES = """m (float[n,8] x, bool c, int64 count) => (float[n,8] y, float[n,8] z) {
    y = If(c) <then_branch = t () => (float[n,8] u) { p = Mul(x, x) u = Mul(p, p) },
               else_branch = e () => (float[n,8] v) { v = Neg(x) }>
    yes = Constant <value = bool {1}> ()
    z = Loop(count, yes, x) <body = b (int64 i, bool go, float[n,8] state) =>
        (bool more, float[n,8] next) { more = Identity(go) next = Add(state, state) }> }"""


def test_peaks_are_seen_in_bodies_too() -> None:
    model = load_proto(halves.parsed(HEAD + BODIES))
    watched = {
        value.name: Watched(value, scope)
        for scope in scopes(model)  # type: ignore[arg-type]
        for node in scope.graph
        for value in node.outputs
        if value.name in ("p", "u", "v", "next", "y")
    }
    x = X.copy()
    x[0, 0], x[1, 1], x[2, 2] = 100, -np.inf, np.nan
    feeds = [
        {"x": x, "c": np.array(True), "count": np.array(3)},
        {"x": X, "c": np.array(False), "count": np.array(0)},
    ]
    samples = [Sample(str(i), feed) for i, feed in enumerate(feeds)]
    found = dict(zip(watched, peaks(model, list(watched.values()), samples), strict=True))
    assert found["p"] == 10_000
    assert found["u"] == found["y"] == 1e8
    assert found["v"] == np.abs(X).max()
    assert found["next"] == 800


def test_the_command_names_what_leaves_its_range(parent: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.full((4, 8), 12, np.float32) * np.sign(W[:, :1].T))
    target = tmp_path / "emulated.onnx"
    arguments = [parent, target, "--passes", "fp16", "--data", tmp_path / "s.npz"]
    told = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert "overflows: b of n_b (Exp), peak " in told.output
    assert told.output.endswith("keep them float32: block_nodes=n_b\n")
    again = [str(a) for a in [*arguments, "--force", "--format", "json"]]
    again[3] = "fp16{block_op_types=default block_nodes=n_b,n_y}"
    document = json.loads(CliRunner().invoke(command, again).output)
    assert document["strained"] == []
    assert document["rounded"] == 2
    assert oracle.run(target, {"x": X})["y"].dtype == np.float32


def test_the_command_refuses_what_there_is_nothing_to_emulate_of(
    parent: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="no value of it is bfloat16 or float16"):
        CliRunner().invoke(
            command, [str(parent), str(tmp_path / "e.onnx")], catch_exceptions=False
        )


@pytest.mark.parametrize("word", ["fp16", "bf16"])
def test_compare_emulates_what_processors_do_not_compute_in(
    word: str, parent: Path, tmp_path: Path
) -> None:
    from onnxforge import PassManager

    tier = tmp_path / "tier.onnx"
    PassManager(f"{word}{{keep_io=none}}").run(parent, tier)
    name = {"fp16": "float16", "bf16": "bfloat16"}[word]
    data = [Sample("one", {"x": X})]
    found = compare(parent, tier, data)
    assert found.candidate.emulated == name
    assert found.reference.emulated == ""
    assert any(f"rounded as its {name} is" in note for note in found.notes)
    assert found.candidate.path == str(tier)
    (output,) = found.outputs
    truth = oracle.run(parent, {"x": X})["y"]
    assert output.overall.max_abs == pytest.approx(np.abs(by_hand(X, word) - truth).max(), 0.2)
    plain = compare(parent, tier, data, Options(emulate=False))
    assert plain.candidate.emulated == ""
    assert bool(plain.candidate.failure) == (word == "bf16")


def test_compare_localizes_in_the_emulation(parent: Path, tmp_path: Path) -> None:
    from onnxforge import PassManager

    PassManager("bf16").run(parent, tmp_path / "tier.onnx")
    data = Data(count=1)
    found = compare(parent, tmp_path / "tier.onnx", data, Options(localize=True))
    assert found.localization is not None
    assert {layer.value for layer in found.localization.layers} >= {"a", "b", "y"}
    assert found.localization.failures == ()


def test_a_tier_in_a_data_file_is_emulated(tmp_path: Path) -> None:
    model = load(fixtures.built("external_two"))
    emulate(model)  # float32 alone: nothing happens
    tier, _ = halves.tier(halves.parsed(HEAD + NODES, w=W), "bf16")
    onnx.save(tier, tmp_path / "t.onnx", save_as_external_data=True, size_threshold=0)
    found = load(tmp_path / "t.onnx")
    roundings = emulate(found)
    assert [one.name for one in roundings if one.where in ("n_a", "n_b", "n_y")] == [
        "a",
        "b",
        "y_bf16",
    ]
