from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, numpy_helper, parser

from onnxforge import PassManager, laws, load
from onnxforge.calibrate import Options, watches
from onnxforge.core import Fate
from onnxforge.errors import DataError, Refused
from onnxforge.manager import PIPELINE_KEY, Report
from onnxforge.numerics.calibration import ActivationStats, Statistics, sample_key
from onnxforge.passes.smoothquant import SmoothQuantFoldPass
from onnxforge.replay import verify
from onnxforge.stats_file import write_statistics
from support import fixtures, integers, oracle, smoothable, statistics

HEADER = '<ir_version: 8, opset_import: ["" : 17]> '
Arrays = dict[str, np.ndarray]
# Where two products saturate, no runtime can equal the reference with int8 weights.
unsaturated = pytest.mark.skipif(integers.saturates(), reason="sums of products saturate")


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(text: str, header: str = HEADER, **arrays: Any) -> ModelProto:
    """A model from text and initializers."""
    proto = parser.parse_model(header + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()
    )
    return proto


def outlier(channels: int, size: float, at: int = 3) -> np.ndarray:
    array = np.ones(channels, np.float32)
    array[at] = size
    return array


# A norm, folds into it and into products, an input, a Gemm with bias, two activations.
NET = """net (float[n,16] x) => (float[n,8] y, float[n,n] s, float[n,8] z) {
    a = LayerNormalization(x, gamma, beta)
    q = MatMul(a, wq)
    k = MatMul(a, wk)
    kb = Add(k, bk)
    h = Relu(kb)
    y = Gemm<transB=1>(h, wg, bg)
    qt = Transpose<perm=[1,0]>(q)
    s = MatMul(q, qt)
    z = MatMul(x, wx)
}"""
HELD: Arrays = {
    "gamma": outlier(16, 200),
    "beta": floats(16, seed=1) / 10,
    "wq": floats(16, 24, seed=2) / outlier(16, 1000)[:, None],
    "wk": floats(16, 32, seed=3) / outlier(16, 1000)[:, None],
    "bk": floats(32, seed=4),
    "wg": floats(8, 32, seed=5),
    "bg": floats(8, seed=6),
    "wx": floats(16, 8, seed=7),
}
PRODUCTS = {"q", "k", "y", "z"}
SAMPLES = [{"x": floats(n, 16, seed=20 + n)} for n in (5, 9, 40)]
INPUTS = {"x": floats(12, 16, seed=22)}


def net(**changes: np.ndarray) -> ModelProto:
    return model(NET, **HELD | changes)


@pytest.fixture(scope="module")
def stats() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield statistics.of_model(net(), SAMPLES, folder)
    shutil.rmtree(folder)


def smoothed(before: ModelProto, stats: Path, **options: Any) -> tuple[ModelProto, Report]:
    step = SmoothQuantFoldPass(stats=str(stats), **{"min_bytes": 0, **options})
    after, report = PassManager([step]).apply(before)
    return after, report


def nodes(graph: Any) -> list[str]:
    return [f"{', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in graph.node]


def kinds(proto: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def told(report: Report, *, op: bool = False) -> dict[str, str]:
    """Codes by place, of weights or of nodes."""
    return {f.where: f.code for f in report.passes[-1].findings if bool(f.op) == op and f.fate}


def sqnr(exact: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(found.astype(np.float64) - exact).sum()
    return float(10 * np.log10(np.square(exact.astype(np.float64)).sum() / noise))


# --- the independent reference -------------------------------------------------------------


def assert_products(
    parent: ModelProto, smooth: ModelProto, tier: ModelProto, inputs: Arrays, **run: Any
) -> set[str]:
    """Fail unless each product, fed what the tier feeds it, is what integers give.

    Args:
        parent: The model before.
        smooth: The same, smoothed and not quantized.
        tier: Smoothed and quantized.
        inputs: What to run the tier on.
        run: Options of `oracle.run`.

    Returns:
        The outputs of the products that were compared.
    """
    makers = {name: node for node in tier.graph.node for name in node.output}
    read = [name for node in parent.graph.node for name in node.input[1:]]
    constants = [name for name in read if _is_constant(name, smooth)]
    float_held = integers.values(smooth, constants, inputs)
    held = integers.initializers(tier)
    compared = set()
    for node in parent.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        quantize = _quantizer(node, makers)
        if quantize is None:
            continue
        name = node.output[0]
        seen = _exposed(tier, [quantize.input[0], quantize.output[0], name], inputs, run)
        x, levels, found = (seen[n] for n in (quantize.input[0], quantize.output[0], name))
        scale, zero = (held[n] for n in quantize.input[1:])
        ends = np.iinfo(zero.dtype)
        wanted = np.clip(np.rint(x / scale) + int(zero), ends.min, ends.max)
        integers.same(levels, wanted.astype(zero.dtype), f"activation of {name}")
        weight = float_held[node.input[1]]
        axes = integers.summed_axes(node, 1, weight.ndim)
        stored = integers.quantize_weight(weight, axes)
        if node.input[1] in held:
            integers.same(held[node.input[1]], stored.values, f"weight of {name}")
        bias = makers.get(makers[name].input[2]) if len(makers[name].input) > 2 else None
        rounds = bias is not None and bias.op_type == "DequantizeLinear"
        centred = levels.astype(np.int64) - int(zero)
        result = _product(node, centred, stored, scale, float_held, rounds=rounds)
        difference = np.abs(found - result).max(initial=0)
        assert difference <= 2e-6 * np.abs(result).max(initial=0), f"{name}: {difference}"
        compared.add(name)
    return compared


def _is_constant(name: str, proto: ModelProto) -> bool:
    """Whether a value comes from no input, or from the default of one."""
    if name in integers.initializers(proto):
        return True
    makers = [node for node in proto.graph.node if name in node.output]
    return bool(makers) and all(_is_constant(n, proto) for n in makers[0].input)


def _quantizer(node: NodeProto, makers: dict[str, NodeProto]) -> NodeProto | None:
    """What quantizes the activation of a product: the nearest QuantizeLinear before it."""
    made = makers[node.output[0]]
    for _ in range(6):
        if made.op_type == "QuantizeLinear":
            return made
        first = [makers[n] for n in made.input if n in makers]
        forward = [m for m in first if m.op_type != "DequantizeLinear" or m.input[0] in makers]
        if not forward or (
            made.op_type == "MatMul" and not made.input[0].endswith("quantized")
        ):
            return None
        made = forward[0]
    return None


def _exposed(
    tier: ModelProto, names: Sequence[str], inputs: Arrays, run: dict[str, Any]
) -> Arrays:
    copy = integers.exposed(tier, [n for n in names if n not in inputs])
    return {**inputs, **oracle.run(copy, inputs, **run)}


def _product(
    node: NodeProto,
    x: np.ndarray,
    weight: integers.Quantized,
    scale: np.ndarray,
    held: Arrays,
    *,
    rounds: bool,
) -> np.ndarray:
    """The product of integers; of QDQ the bias is one too."""
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    w, w_scale = (m.T if turned else m for m in (weight.values, weight.scale))
    alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
    beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
    units = w_scale.astype(np.float64) * float(scale) * alpha
    result: np.ndarray = integers.matmul(x, w) * units
    if len(node.input) > 2:
        bias = beta * held[node.input[2]].astype(np.float64)
        units = units.reshape(-1)
        result = result + (np.rint(bias / units) * units if rounds else bias)
    return result


# --- example -------------------------------------------------------------------------------


def test_qdq_is_written_in_the_form_that_fuses(stats: Path) -> None:
    after, _ = smoothed(net(), stats)
    written = nodes(after.graph)
    for line in (
        "a_quantized = QuantizeLinear(a, a_scale, a_zero_point)",
        "a_dequantized = DequantizeLinear(a_quantized, a_scale, a_zero_point)",
        "wq_dequantized = DequantizeLinear(wq, wq_scale)",
        "q = MatMul(a_dequantized, wq_dequantized)",
        "y = Gemm(h_dequantized, wg_dequantized, wg_bias_dequantized)",
        "x_smoothed = Mul(x, x_factors)",
        "s = MatMul(q, qt)",
    ):
        assert line in written, written
    assert kinds(after)["QuantizeLinear"] == 3
    held = integers.initializers(after)
    assert held["wg_bias"].dtype == np.int32


def test_the_report_says_how_each_activation_was_smoothed(stats: Path) -> None:
    _, report = smoothed(net(), stats)
    remarks = {f.where: f.message for f in report.passes[0].findings if f.code == "OF254"}
    assert set(remarks) == {"a", "h", "x"}
    for message in remarks.values():
        assert re.fullmatch(
            r"alpha 0\.5, \S+ to \S+, 0\.000% clipped, SQNR \S+ -> \S+ dB, divided at .+",
            message,
        )
    assert told(report, op=True) == {
        **dict.fromkeys(told(report, op=True), "OF201"),
        next(w for w in told(report, op=True) if told(report, op=True)[w] == "OF230"): "OF230",
    }
    assert Counter(told(report, op=True).values()) == {"OF201": 4, "OF230": 1}


# --- the equivalence -----------------------------------------------------------------------


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("alpha", ["0.5", "0.8", "auto"])
def test_powers_of_two_change_no_bit(stats: Path, fold: bool, alpha: str) -> None:
    options = {"quantize": False, "scales": "pow2", "fold": fold, "alpha": alpha}
    after, report = smoothed(net(), stats, **options)
    assert report.modified
    oracle.assert_bit_equal(oracle.run(after, INPUTS), oracle.run(net(), INPUTS))


@pytest.mark.parametrize("fold", [True, False])
def test_real_factors_change_next_to_nothing(stats: Path, fold: bool) -> None:
    after, _ = smoothed(net(), stats, quantize=False, fold=fold)
    wanted, found = oracle.run(net(), INPUTS), oracle.run(after, INPUTS)
    for name, values in wanted.items():
        assert np.abs(found[name] - values).max() <= 1e-5 * np.abs(values).max()
    changed = {n for n, w in HELD.items() if not np.array_equal(w, _held(after, n))}
    assert changed == ({"wq", "wk", "wg", "wx"} | ({"gamma", "beta", "bk"} if fold else set()))


def _held(proto: ModelProto, name: str) -> np.ndarray:
    return integers.initializers(proto)[name]


@pytest.mark.parametrize("name", fixtures.names(runs=True))
def test_fixtures_stay_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    text = f"smoothquant{{stats={statistics.of_fixture(name)} min_bytes=0 quantize=false "
    before, exact, near = fixtures.built(name), tmp_path / "exact.onnx", tmp_path / "near.onnx"
    PassManager(text + "scales=pow2}").run(before, exact)
    PassManager(text + "}").run(before, near)
    for sample in fixtures.samples(name):
        wanted = oracle.run(before, sample)
        oracle.assert_bit_equal(oracle.run(exact, sample), wanted)
        for output, found in oracle.run(near, sample).items():
            if wanted[output].dtype == np.float32 and wanted[output].size:
                exact_values = wanted[output]
                bound = 1e-5 * np.abs(exact_values[np.isfinite(exact_values)]).max(initial=0)
                np.testing.assert_allclose(found, exact_values, rtol=0, atol=bound)


# --- the numbers ---------------------------------------------------------------------------

FORMS = [(form, kind) for form in ("qdq", "integer") for kind in ("uint8", "int8")]
in_every_form = pytest.mark.parametrize(("form", "kind"), FORMS)


@unsaturated
@in_every_form
@pytest.mark.parametrize("optimized", [False, True])
def test_each_product_is_that_of_the_reference(
    stats: Path, form: str, kind: str, optimized: bool
) -> None:
    smooth, _ = smoothed(net(), stats, quantize=False)
    tier, _ = smoothed(net(), stats, format=form, activations=kind)
    compared = assert_products(net(), smooth, tier, INPUTS, optimized=optimized)
    assert compared == PRODUCTS


@unsaturated
@in_every_form
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(
    "attributes", ["alpha=0.5", "beta=0.5", "alpha=2.0, beta=3.0, transB=1", "transB=1"]
)
def test_a_gemm_is_that_of_the_reference(
    tmp_path: Path, form: str, kind: str, optimized: bool, attributes: str
) -> None:
    w = floats(6, 16, seed=1) if "transB" in attributes else floats(16, 6, seed=1)
    before = model(
        f"""g (float[n,16] x) => (float[n,6] y)
        {{ h = Tanh(x) y = Gemm<{attributes}>(h, w, c) }}""",
        w=w,
        c=floats(6, seed=2) * 5,
    )
    file = statistics.of_model(before, SAMPLES, tmp_path)
    smooth, _ = smoothed(before, file, quantize=False)
    tier, _ = smoothed(before, file, format=form, activations=kind)
    compared = assert_products(before, smooth, tier, INPUTS, optimized=optimized)
    assert compared == {"y"}


def _next_level(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.flat[0] -= np.sign(changed.flat[0]) or 1
    return changed


PLANTED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "weight": ("wq", _next_level),
    "scale of a weight": ("wq_scale", lambda s: s * np.float32(1.001)),
    "one scale of a weight": (
        "wk_scale",
        lambda s: np.where(np.arange(s.size) == 2, s * 1.01, s),
    ),
    "bias": ("wg_bias", lambda b: b + 40),
    "scale of a bias": ("wg_bias_scale", lambda s: s * np.float32(1.1)),
}


@unsaturated
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(stats: Path, name: str) -> None:
    smooth, _ = smoothed(net(), stats, quantize=False)
    tier, _ = smoothed(net(), stats)
    wrong = integers.changed(tier, *PLANTED[name])
    assert_products(net(), smooth, tier, INPUTS, optimized=False)
    with pytest.raises(AssertionError):
        assert_products(net(), smooth, wrong, INPUTS, optimized=False)


def fused(tier: ModelProto, folder: Path) -> Counter[str]:
    """What the runtime really runs."""
    oracle.run(tier, INPUTS, keep=folder / "optimized.onnx")
    return kinds(onnx.load(folder / "optimized.onnx"))


def test_qdq_fuses_on_the_runtime(stats: Path, tmp_path: Path) -> None:
    tier, _ = smoothed(net(), stats)
    found = fused(tier, tmp_path)
    assert found["MatMulIntegerToFloat"] == 2, found
    assert found["QGemm"] == 2, "a Gemm, and a MatMul with bias"
    assert found["DequantizeLinear"] == 0, found
    assert found["MatMul"] + found["FusedMatMul"] == 1, "activation x activation"


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize(
    ("body", "operator"),
    [
        ("y = MatMul(h, w)", "MatMulIntegerToFloat"),
        ("m = MatMul(h, w) y = Add(c, m)", "QGemm"),
        ("m = MatMul(h, w) a = Add(m, c) y = Relu(a)", "QGemm"),
        ("y = Gemm(h, w)", "QGemm"),
        ("y = Gemm<alpha=0.5, beta=2.0>(h, w, c)", "QGemm"),
    ],
)
def test_a_product_that_reads_an_activation_alone_fuses(
    tmp_path: Path, kind: str, body: str, operator: str
) -> None:
    text = f"g (float[n,16] x) => (float[n,6] y) {{ h = Tanh(x) {body} }}"
    held = {"w": floats(16, 6), "c": floats(6)}
    held = {name: array for name, array in held.items() if re.search(rf"\b{name}\b", body)}
    before = model(text, **held)
    file = statistics.of_model(before, SAMPLES, tmp_path)
    tier, _ = smoothed(before, file, activations=kind)
    found = fused(tier, tmp_path)
    assert (found[operator], found["DequantizeLinear"]) == (1, 0), found
    assert sqnr(oracle.run(before, INPUTS)["y"], oracle.run(tier, INPUTS)["y"]) > 30


@unsaturated
def test_what_is_fused_computes_what_is_written(stats: Path) -> None:
    tier, _ = smoothed(net(), stats)
    fused, written = (oracle.run(tier, INPUTS, optimized=o) for o in (True, False))
    for name, values in written.items():
        assert sqnr(values, fused[name]) > 60, name


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_outliers_that_plain_int8_does_not_survive(stats: Path, kind: str) -> None:
    exact = oracle.run(integers.exposed(net(), ["q", "k"]), INPUTS)
    plain, _ = PassManager("dynamic-int8{min_bytes=0}").apply(net())
    lost = oracle.run(integers.exposed(plain, ["q", "k"]), INPUTS)
    after, _ = smoothed(net(), stats, activations=kind, fold=False)
    kept = oracle.run(integers.exposed(after, ["q", "k"]), INPUTS)
    for name, values in exact.items():
        assert sqnr(values, lost[name]) < 10
        assert sqnr(values, kept[name]) > 25


def test_auto_loses_no_more_than_any_strength(stats: Path) -> None:
    def told(alpha: str) -> dict[str, float]:
        """SQNR of each activation."""
        _, report = smoothed(net(), stats, alpha=alpha, fold=False)
        remarks = [f for f in report.passes[0].findings if f.code == "OF254"]
        found = {f.where: re.search(r" -> (\S+) dB", f.message) for f in remarks}
        return {where: float(match[1]) for where, match in found.items() if match}

    chosen = told("auto")
    assert chosen
    tried = [told(f"{i / 10:g}") for i in range(11)]
    for where, db in chosen.items():
        assert db >= max(found[where] for found in tried) - 1.05  # 1 dB: see _WORTH
    assert all(
        any(db > found[w] + 1 for w, db in chosen.items()) for found in (tried[0], tried[-1])
    )


def alphas(report: Report) -> dict[str, float]:
    remarks = [f for f in report.passes[0].findings if f.code == "OF254"]
    found = {f.where: re.search(r"alpha (\S+),", f.message) for f in remarks}
    return {where: float(match[1]) for where, match in found.items() if match}


def test_auto_knows_that_other_samples_go_further(tmp_path: Path) -> None:
    """Where each sample has a loud channel of its own, no strength holds for the next one."""
    rng = np.random.default_rng(0)
    before = model("g (float[n,32] x) => (float[n,8] y) { h = Tanh(x) y = MatMul(x, w) }")
    before.graph.initializer.append(numpy_helper.from_array(floats(32, 8), "w"))
    same = [rng.standard_normal((40, 32)) * outlier(32, 60, at=5) for _ in range(12)]
    other = [rng.standard_normal((40, 32)) * outlier(32, 60, at=i) for i in range(12)]
    chosen = []
    for i, rows in enumerate((same, other)):
        folder = tmp_path / str(i)
        folder.mkdir()
        file = statistics.of_model(
            before, [{"x": row.astype(np.float32)} for row in rows], folder
        )
        chosen.append(alphas(smoothed(before, file, alpha="auto")[1])["x"])
    assert chosen[0] >= 0.6
    assert chosen[1] <= 0.4


def test_channels_of_one_side_are_turned_to_the_same(tmp_path: Path) -> None:
    signs = np.where(np.arange(16) % 2, -1, 1).astype(np.float32)
    before = model(
        "g (float[n,16] x) => (float[n,8] y) { h = Relu(x) s = Mul(h, c) y = MatMul(s, w) }",
        c=signs,
        w=floats(16, 8),
    )
    samples = [{"x": floats(64, 16, seed=i)} for i in range(8)]
    file = statistics.of_model(before, samples, tmp_path)
    tier, _ = smoothed(before, file)
    held = integers.initializers(tier)
    assert held["s_zero_point"] == 0
    assert (held["c"] > 0).all()
    symmetric, _ = smoothed(before, file, activations="int8")
    assert (np.sign(integers.initializers(symmetric)["c"]) == signs).all()
    inputs = {"x": floats(200, 16, seed=99)}
    exact = oracle.run(before, inputs)["y"]
    turned, plain = (sqnr(exact, oracle.run(m, inputs)["y"]) for m in (tier, symmetric))
    assert turned > plain + 3
    smooth, _ = smoothed(before, file, quantize=False, scales="pow2")
    oracle.assert_bit_equal(oracle.run(smooth, inputs), oracle.run(before, inputs))


CONV = """c (float[1,6,n] x) => (float[1,8,n] z) {
    b = Conv<pads=[1,1]>(x, w0, b0)
    r = Relu(b)
    z = Conv<pads=[1,1]>(r, w1, b1)
}"""
CONV_HELD = {
    "w0": floats(6, 6, 3, seed=40) * outlier(6, 30)[:, None, None],
    "b0": floats(6, seed=41),
    "w1": floats(8, 6, 3, seed=42) / outlier(6, 30)[None, :, None],
    "b1": floats(8, seed=43),
}


@pytest.fixture(scope="module")
def conv_stats() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    samples = [{"x": floats(1, 6, 20 + i, seed=i)} for i in range(6)]
    options = Options(op_types=("Conv",))
    yield statistics.of_model(model(CONV, **CONV_HELD), samples, folder, options)
    shutil.rmtree(folder)


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_convolutions_are_smoothed_when_asked(conv_stats: Path, form: str) -> None:
    before, inputs = model(CONV, **CONV_HELD), {"x": floats(1, 6, 33, seed=50)}
    options = {"op_types": ("Conv",), "format": form}
    smooth, report = smoothed(before, conv_stats, quantize=False, scales="pow2", **options)
    assert report.modified
    assert "Mul" in kinds(smooth)  # of the input
    assert kinds(smooth)["Mul"] == 1  # the other is folded through Relu
    oracle.assert_bit_equal(oracle.run(smooth, inputs), oracle.run(before, inputs))
    tier, report = smoothed(before, conv_stats, **options)
    assert Counter(told(report, op=True).values()) == {"OF201": 2}
    exact = oracle.run(before, inputs)["z"]
    db = sqnr(exact, oracle.run(tier, inputs)["z"])
    assert db > 30
    plain, _ = smoothed(before, conv_stats, alpha="0", **options)
    assert db > sqnr(exact, oracle.run(plain, inputs)["z"]) + 3


def test_convolutions_stay_when_nobody_asks(conv_stats: Path) -> None:
    _, report = smoothed(model(CONV, **CONV_HELD), conv_stats)
    assert not report.modified
    assert told(report)["w1"] == "OF231"


def test_a_convolution_in_groups_stays(tmp_path: Path) -> None:
    before = model(
        "c (float[1,6,n] x) => (float[1,6,n] y) { y = Conv<group=2>(x, w) }", w=floats(6, 3, 1)
    )
    samples = [{"x": floats(1, 6, 20)}]
    file = statistics.of_model(before, samples, tmp_path, Options(op_types=("Conv",)))
    _, report = smoothed(before, file, op_types=("Conv",))
    assert told(report)["w"] == "OF251"


@pytest.mark.parametrize(("most", "left"), [("0.34", 1), ("1", 3), ("5kB", 2), ("0kB", 0)])
def test_what_loses_most_stays_float(stats: Path, most: str, left: int) -> None:
    """Of weights of 3.6, 1 and 0.5 kB."""
    _, report = smoothed(net(), stats, keep_worst=most)
    kept = {f.where for f in report.passes[0].findings if f.code == "OF253"}
    remarks = {f.where for f in report.passes[0].findings if f.code == "OF254"}
    assert len(remarks) == 3 - left
    assert bool(kept) == bool(left)


def test_a_percentile_clips(stats: Path) -> None:
    whole, _ = smoothed(net(), stats, fold=False)
    clipped, report = smoothed(net(), stats, fold=False, percentile=90)
    assert _held(clipped, "x_smoothed_scale") < _held(whole, "x_smoothed_scale")
    shares = [
        float(match[1])
        for f in report.passes[0].findings
        if (match := re.search(r"(\S+)% clipped", f.message))
    ]
    assert all(3 < share < 15 for share in shares), shares


# --- options -------------------------------------------------------------------------------


def test_the_worst_stay_float(stats: Path) -> None:
    after, report = smoothed(net(), stats, keep_worst=0.34)
    kept = [where for where, code in told(report).items() if code == "OF253"]
    assert kept
    assert kinds(after)["QuantizeLinear"] == 2
    after, report = smoothed(net(), stats, keep_worst=1)
    assert not report.modified
    assert nodes(after.graph) == nodes(net().graph)


def test_what_is_excluded_is_smoothed_by_a_mul_beside_it(stats: Path) -> None:
    after, report = smoothed(net(), stats, exclude=["wk"])
    assert told(report)["wk"] == "OF202"
    assert "k = MatMul(a, wk)" in nodes(after.graph)
    assert "a_smoothed = Mul(a, a_factors)" in nodes(after.graph)
    assert _held(after, "wk").tobytes() == HELD["wk"].tobytes()
    assert _held(after, "gamma").tobytes() == HELD["gamma"].tobytes()


def test_a_bias_that_is_excluded_stays_float(stats: Path) -> None:
    after, report = smoothed(net(), stats, exclude=["b?"])
    assert (told(report)["bk"], told(report)["bg"]) == ("OF202", "OF202")
    for name in ("bk", "bg"):
        assert _held(after, name).tobytes() == HELD[name].tobytes()


def test_without_folding_each_activation_gets_a_mul(stats: Path) -> None:
    after, _ = smoothed(net(), stats, fold=False)
    assert kinds(after)["Mul"] == 3
    for name in ("gamma", "beta"):
        assert _held(after, name).tobytes() == HELD[name].tobytes()


def test_only_the_operators_named_are_rewritten(stats: Path) -> None:
    after, report = smoothed(net(), stats, op_types=["Gemm"])
    assert kinds(after)["QuantizeLinear"] == 1
    assert told(report)["wq"] == "OF240" or told(report)["wq"] == "OF231"


def test_small_weights_are_left(stats: Path) -> None:
    after, report = smoothed(net(), stats, min_bytes=16 * 24 * 4 + 1)
    assert told(report)["wq"] == "OF203"
    assert told(report)["wk"] == "OF201"
    assert "q = MatMul(a, wq)" in nodes(after.graph)


def test_a_sample_is_no_file_of_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **INPUTS)
    with pytest.raises(Refused, match=r"x\.npz: holds a sample, no statistics$"):
        smoothed(net(), tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "much"}, "alpha: wanted a number from 0 to 1 or auto, not 'much'"),
        ({"alpha": "1.5"}, "alpha: wanted"),
        ({"alpha": "nan"}, "alpha: wanted"),
        ({"keep_worst": "2"}, "keep_worst: wanted 0 to 1 or 20MB, not '2'"),
        ({"keep_worst": "-1"}, "keep_worst: wanted 0 to 1 or 20MB, not '-1'"),
        ({"keep_worst": "worst"}, "keep_worst: wanted"),
        ({"op_types": ("Conv",), "format": "integer", "activations": "int8"}, "Conv with"),
        ({"percentile": 0}, "percentile: wanted more than 0, to 100, not 0"),
    ],
)
def test_options_without_sense_are_refused(
    stats: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=re.escape(message)):
        smoothed(net(), stats, **options)


# --- what is refused and left --------------------------------------------------------------


def test_an_old_opset_is_refused_with_the_way_out(tmp_path: Path) -> None:
    header = '<ir_version: 7, opset_import: ["" : 12]> '
    text = "g (float[n,16] x) => (float[n,6] y) { h = Tanh(x) y = MatMul(h, w) }"
    before = model(text, header, w=floats(16, 6))
    file = statistics.of_model(before, SAMPLES, tmp_path)
    with pytest.raises(Refused, match=r"opset 12.*needs opset 13; format=integer needs 10"):
        smoothed(before, file)
    after, _ = smoothed(before, file, format="integer")
    assert kinds(after)["MatMulInteger"] == 1
    after, _ = smoothed(before, file, quantize=False)
    assert kinds(after) == {"Tanh": 1, "Mul": 1, "MatMul": 1}


def test_statistics_of_another_model_are_refused(stats: Path) -> None:
    with pytest.raises(Refused, match="the statistics are of another model"):
        smoothed(net(wq=HELD["wq"] * 2), stats)


LEFT = {
    "another reader": ("y = MatMul(h, w) a = Tanh(w)", ", float[16,6] a", "OF232"),
    "another activation": (
        "r = Relu(h) y = MatMul(h, w) a = MatMul(r, w)",
        ", float[n,6] a",
        "OF232",
    ),
    "on the left": ("t = Transpose(h) y = MatMul(v, t)", "", "OF251"),
    "three axes": ("y = MatMul(h, b)", "", "OF251"),
    "not finite": ("y = MatMul(h, nan)", "", "OF223"),
}


@pytest.mark.parametrize("name", LEFT)
def test_it_is_left_and_reported(tmp_path: Path, name: str) -> None:
    body, outputs, code = LEFT[name]
    nan = floats(16, 6)
    nan[2, 2] = np.nan
    held = {"w": floats(16, 6), "v": floats(6, 16), "b": floats(2, 16, 6), "nan": nan}
    held = {n: w for n, w in held.items() if re.search(rf"\b{n}\)|\({n}\b", body)}
    before = model(f"g (float[n,16] x) => (float y{outputs}) {{ h = Tanh(x) {body} }}", **held)
    for output in before.graph.output[:1]:
        output.type.tensor_type.ClearField("shape")
    for value, shape in {"h": ["n", 16], "t": [16, "n"]}.items():
        if value == "h" or "t = " in body:
            told_shape = onnx.helper.make_tensor_value_info(value, 1, shape)
            before.graph.value_info.append(told_shape)
    file = statistics.of_model(before, SAMPLES, tmp_path)
    after, report = smoothed(before, file)
    assert not report.modified
    assert nodes(after.graph) == nodes(before.graph)
    assert set(told(report).values()) == {code}


TWO = """g (float[n,16] x) => (float[n,6] y, float[n,6] z)
    { h = Tanh(x) y = MatMul(h, w) z = MatMul(h, v) }"""


def test_a_nan_leaves_the_other_products_of_its_activation_alone(tmp_path: Path) -> None:
    nan = floats(16, 6)
    nan[2, 2] = np.nan
    before = model(TWO, w=floats(16, 6), v=nan)
    file = statistics.of_model(before, SAMPLES, tmp_path)
    after, report = smoothed(before, file)
    assert told(report) == {"w": "OF201", "v": "OF223"}
    assert "z = MatMul(h, v)" in nodes(after.graph)


def test_products_in_bodies_are_left_and_reported(tmp_path: Path) -> None:
    branches = ", ".join(
        f"{word}_branch = {word} () => (float[n,6] {word}_y) {{ {word}_y = MatMul(h, w) }}"
        for word in ("then", "else")
    )
    before = model(
        f"""g (bool c, float[n,16] x) => (float[n,6] y, float[n,6] z)
        {{ h = Tanh(x) y = If(c) <{branches}> z = MatMul(h, v) }}""",
        w=floats(16, 6),
        v=floats(16, 6, seed=1),
    )
    samples = [{"c": np.array(True), **sample} for sample in SAMPLES]
    file = statistics.of_model(before, samples, tmp_path)
    after, report = smoothed(before, file)
    assert told(report) == {"w": "OF250", "v": "OF201"}
    wanted, found = (oracle.run(m, samples[0]) for m in (before, after))
    assert found["y"].tobytes() == wanted["y"].tobytes()
    assert sqnr(wanted["z"], found["z"]) > 30


def test_a_weight_that_a_body_reads_too_is_left_and_reported(tmp_path: Path) -> None:
    branches = ", ".join(
        f"{word}_branch = {word} () => (float[n,6] {word}_y) {{ {word}_y = MatMul(h, w) }}"
        for word in ("then", "else")
    )
    before = model(
        f"""g (bool c, float[n,16] x) => (float[n,6] y, float[n,6] z)
        {{ h = Tanh(x) y = If(c) <{branches}> z = MatMul(h, w) }}""",
        w=floats(16, 6),
    )
    file = statistics.of_model(
        before, [{"c": np.array(True), **sample} for sample in SAMPLES], tmp_path
    )
    after, report = smoothed(before, file)
    assert not report.modified
    assert nodes(after.graph) == nodes(before.graph)
    assert told(report)["w"] in ("OF232", "OF250")


@pytest.mark.parametrize("shape", ["n,16", "16"])
def test_a_bias_of_more_axes_than_its_product_keeps_them(tmp_path: Path, shape: str) -> None:
    before = model(
        f"g (float[{shape}] x) => (float y) {{ h = Tanh(x) m = MatMul(h, w) y = Add(m, c) }}",
        w=floats(16, 6),
        c=floats(1, 1, 6),
    )
    before.graph.output[0].type.tensor_type.ClearField("shape")
    rows = (5, 16) if shape == "n,16" else (16,)
    samples = [{"x": floats(*rows, seed=i)} for i in range(3)]
    tier, _ = smoothed(before, statistics.of_model(before, samples, tmp_path))
    wanted, found = (oracle.run(m, samples[0])["y"] for m in (before, tier))
    assert found.shape == wanted.shape
    assert sqnr(wanted, found) > 30


def test_an_activation_that_was_always_empty_is_left(tmp_path: Path) -> None:
    before = model("g (float[n,16] x) => (float[n,6] y) { y = MatMul(x, w) }", w=floats(16, 6))
    file = statistics.of_model(before, [{"x": floats(0, 16)}], tmp_path)
    _, report = smoothed(before, file)
    assert told(report) == {"w": "OF250"}


def test_an_activation_quantized_for_others_gets_a_range_of_its_own(tmp_path: Path) -> None:
    plain = model(TWO, w=floats(16, 6), v=floats(16, 6, seed=1))
    before, _ = PassManager("dynamic-int8{min_bytes=0 exclude=v}").apply(plain)
    file = statistics.of_model(before, SAMPLES, tmp_path)
    for form in ("qdq", "integer"):
        after, _ = smoothed(before, file, format=form)
        assert kinds(after)["QuantizeLinear"] == 1
        assert sqnr(oracle.run(before, INPUTS)["z"], oracle.run(after, INPUTS)["z"]) > 30


# --- twice, and the record -----------------------------------------------------------------


@in_every_form
def test_running_it_twice_changes_nothing(stats: Path, form: str, kind: str) -> None:
    for quantize in (True, False):
        options = {"format": form, "activations": kind, "quantize": quantize}
        once, _ = smoothed(net(), stats, **options)
        twice, report = smoothed(once, stats, **options)
        assert not report.modified
        assert once.SerializeToString() == twice.SerializeToString()
        assert "OF255" in told(report).values() or quantize


def test_the_record_holds_the_hash_of_the_statistics_and_replays(stats: Path) -> None:
    after, report = smoothed(net(), stats)
    stamp = {p.key: p.value for p in after.metadata_props}[PIPELINE_KEY]
    sha256 = hashlib.sha256(stats.read_bytes()).hexdigest()
    assert f"stats=sha256:{sha256}" in stamp.replace("'", "").replace('"', "")
    assert str(stats) not in stamp
    assert str(stats.parent) not in after.SerializeToString().decode("latin-1")
    assert report.passes[0].text == stamp
    again, _ = PassManager(stamp, statistics=[stats]).apply(net())
    assert again.SerializeToString() == after.SerializeToString()
    with pytest.raises(Refused, match=f"sha256:{sha256}"):
        PassManager(stamp).apply(net())


def test_every_weight_has_one_finding(stats: Path) -> None:
    _, report = smoothed(net(), stats)
    found = [f for f in report.passes[0].findings if f.fate is not None and not f.op]
    assert sorted(f.where for f in found) == sorted(HELD)
    assert {f.where for f in found if f.fate is Fate.TREATED} == {"wq", "wk", "wg", "wx"}


@pytest.mark.parametrize("name", fixtures.names(runs=True))
def test_statistics_are_of_a_model_however_it_is_handed_over(name: str) -> None:
    file = str(statistics.of_fixture(name))
    step = SmoothQuantFoldPass(stats=file, min_bytes=0, format="integer")
    _, by_path = PassManager([step]).apply(fixtures.built(name))
    _, by_proto = PassManager([step]).apply(onnx.load(fixtures.built(name)))
    assert told(by_path) == told(by_proto)


def test_the_command_line_replays_a_record(stats: Path, tmp_path: Path) -> None:
    _, report = smoothed(net(), stats)
    onnx.save(net(), tmp_path / "in.onnx")
    code = "from onnxforge.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "--passes", report.passes[0].text]
    files = [str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    failed = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert failed.returncode
    assert "--stats names their file" in failed.stderr
    subprocess.run([*command, "--stats", str(stats), *files], capture_output=True, check=True)
    assert nodes(onnx.load(files[1]).graph) == nodes(smoothed(net(), stats)[0].graph)


def test_a_tier_is_derived_with_its_statistics_and_never_by_a_path(
    stats: Path, tmp_path: Path
) -> None:
    parent, child = tmp_path / "parent.onnx", tmp_path / "child.onnx"
    onnx.save(net(), parent)
    PassManager(f"smoothquant{{stats={stats} min_bytes=0}}").run(parent, child)
    assert verify(parent, child, statistics=[stats]).derived
    with pytest.raises(Refused, match="--stats names their file"):
        verify(parent, child)
    hostile = onnx.load(child)
    for entry in hostile.metadata_props:
        if entry.key == PIPELINE_KEY:
            entry.value = f"smoothquant{{stats={stats}}}"
    onnx.save(hostile, child)
    with pytest.raises(Refused, match="names a file by its path"):
        verify(parent, child, statistics=[stats])


# --- any graph -----------------------------------------------------------------------------

EVERY = ("MatMul", "Gemm", "Conv")


def counted(case: smoothable.Case, folder: Path) -> Path:
    """A file of statistics of all inputs but the last; those not finite are left out."""
    source, path = folder / "drawn.onnx", folder / "drawn.safetensors"
    onnx.save(case.model, source)
    loaded = load(source, editable=False)
    activations: dict[str, ActivationStats] = {}
    for watch in watches(loaded, EVERY):
        stats = ActivationStats.empty(watch.channel_axis, watch.channels)
        with contextlib.suppress(DataError):
            for feeds in case.inputs[:-1]:
                seen = integers.values(case.model, [watch.name], feeds)[watch.name]
                stats.add(seen, sample_key(feeds))
            activations[watch.name] = stats
    write_statistics(Statistics(laws.content(loaded), activations), path)
    return path


def one_nan(arrays: Arrays) -> Arrays:
    return {n: np.where(np.isnan(a), np.float32(np.nan), a) for n, a in arrays.items()}


def interface(proto: ModelProto) -> list[bytes]:
    return [v.SerializeToString() for v in (*proto.graph.input, *proto.graph.output)]


@unsaturated
@settings(
    max_examples=max(8, settings().max_examples // 3),
    suppress_health_check=list(HealthCheck),
)
@given(
    smoothable.cases(),
    st.sampled_from(FORMS[:3]),
    st.sampled_from(["0.5", "auto"]),
    st.booleans(),
)
def test_any_graph_stays_the_same_and_its_tier_runs(
    case: smoothable.Case, form: tuple[str, str], alpha: str, fold: bool
) -> None:
    before, inputs = case.model, case.inputs[-1]
    try:
        wanted = oracle.run(before, inputs, optimized=False)
    except Exception:
        assume(False)
    options: dict[str, Any] = {"op_types": EVERY, "alpha": alpha, "fold": fold}
    options["activations"] = form[1]
    with tempfile.TemporaryDirectory() as folder:
        stats = counted(case, Path(folder))
        exact, _ = smoothed(before, stats, quantize=False, scales="pow2", **options)
        near, _ = smoothed(before, stats, quantize=False, **options)
        version = before.opset_import[0].version
        form_there = form[0] if version >= 13 else "integer"
        if form_there == "integer" and form[1] == "int8":
            return
        tier, _ = smoothed(before, stats, format=form_there, **options)
    assert interface(exact) == interface(near) == interface(tier) == interface(before)
    seen = oracle.run(exact, inputs, optimized=False)
    oracle.assert_bit_equal(one_nan(seen), one_nan(wanted))
    for name, found in oracle.run(near, inputs, optimized=False).items():
        finite = np.isfinite(wanted[name])
        bound = 1e-5 * np.abs(wanted[name][finite]).max(initial=0)
        np.testing.assert_allclose(found, wanted[name], rtol=0, atol=bound)
    for optimized in (False, True):
        for name, found in oracle.run(tier, inputs, optimized=optimized).items():
            assert found.shape == wanted[name].shape
