"""Statistics of what the products of a model multiply, against numpy and onnx's reference."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from onnxforge import PassManager
from onnxforge import calibrate as module
from onnxforge.calibrate import Options, Watch, calibrate, watches
from onnxforge.compare.samples import Data, Sample
from onnxforge.errors import DataError, Refused, RuntimeFailed
from onnxforge.model_io import load
from onnxforge.numerics.calibration import Statistics
from onnxforge.runtime.session import Session, Setup
from onnxforge.stats_file import write_statistics
from support import oracle

Array = np.ndarray
HEAD = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g '
WIDE = 128  # its square is too large to be copied into a piece
LAYERS = f"""(float[rows, {WIDE}] x) => (float[rows, {WIDE}] y) {{
  a = MatMul(x, w0)
  b = Tanh(a)
  c = MatMul(b, w1)
  d = Add(c, x)
  e = Relu(d)
  y = Gemm(e, w2)
}}"""
WATCHED = {"x", "b", "e"}


def drawn(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def proto(text: str, **weights: Array) -> onnx.ModelProto:
    made = parser.parse_model(HEAD + text)
    made.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    return made


def layers() -> onnx.ModelProto:
    return proto(LAYERS, **{f"w{i}": drawn(i, WIDE, WIDE) / 8 for i in range(3)})


def saved(made: onnx.ModelProto, path: Path, **options: Any) -> Path:
    onnx.save(made, path, **options)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(layers(), tmp_path / "model.onnx")


def samples(*lengths: int) -> list[Sample]:
    return [Sample(f"of {n}", {"x": drawn(n, n, WIDE)}) for n in lengths]


def written(found: Statistics, folder: Path) -> bytes:
    path = folder / "written.safetensors"
    write_statistics(found, path)
    return path.read_bytes()


def captured(made: onnx.ModelProto, feeds: dict[str, Array], *names: str) -> dict[str, Array]:
    """Values inside a model, by onnx's reference."""
    made = onnx.ModelProto.FromString(made.SerializeToString())
    del made.graph.output[:]
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = ReferenceEvaluator(made).run(None, feeds)
    return {name: np.asarray(v) for name, v in zip(names, values, strict=True)}


def test_statistics_are_those_of_the_values(path: Path) -> None:
    given = samples(3, 1, 8)
    found = calibrate(path, given)
    assert found.activations.keys() == WATCHED
    values: dict[str, list[Array]] = {name: [] for name in WATCHED}
    for sample in given:
        for name, value in captured(layers(), dict(sample.feeds), *WATCHED - {"x"}).items():
            values[name].append(value)
        values["x"].append(sample.feeds["x"])
    for name, stats in found.activations.items():
        rows = np.concatenate(values[name])
        np.testing.assert_allclose(stats.low, rows.min(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(stats.high, rows.max(axis=0), rtol=1e-4, atol=1e-6)
        assert stats.count == len(rows) == len(stats.rows) == 12
        assert stats.histogram.total == rows.size
        by_sum = [a[np.argsort(a.sum(axis=1))] for a in (stats.rows, rows)]
        np.testing.assert_allclose(*by_sum, rtol=1e-4, atol=1e-5)
    assert len(found.samples) == 3


M, K, N = 5, 4, 3


def gemms() -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...], int]]:
    for a, b in itertools.product((0, 1), (0, 1)):
        left, right = [(M, K), (K, M)][a], [(K, N), (N, K)][b]
        turned = f"<transA={a}, transB={b}>"
        yield f"right {a}{b}", f"Gemm{turned}(a, w)", left, right, -2 if a else -1
        yield f"left {a}{b}", f"Gemm{turned}(w, a)", right, left, -1 if b else -2


CASES = [
    ("right", "MatMul(a, w)", (2, M, K), (K, N), -1),
    ("vector", "MatMul(a, w)", (K,), (K, N), -1),
    ("left", "MatMul(w, a)", (2, K, N), (M, K), -2),
    ("batched", "MatMul(a, w)", (2, M, K), (2, K, N), -1),
    *gemms(),
    ("Conv", "Conv(a, w)", (1, K, 9), (M, K, 3), 1),
    ("Conv with groups", "Conv<group=2>(a, w)", (1, K, 9, 7), (6, 2, 3, 3), 1),
    ("depthwise Conv", "Conv<group=4>(a, w)", (1, K, 9), (K, 1, 3), 1),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_channels_are_what_a_product_sums_over(case: Any, tmp_path: Path) -> None:
    name, product, shape, weight, axis = case
    kind = f"float{list(shape)}"
    text = f"({kind} x) => (float y) <{kind} a> {{ a = Tanh(x) y = {product} }}"
    made = proto(text, w=drawn(1, *weight))
    made.graph.output[0].ClearField("type")
    made.graph.output[0].type.tensor_type.elem_type = 1
    path = saved(made, tmp_path / "model.onnx")
    options = Options(op_types=("MatMul", "Gemm", "Conv"))
    assert watches(load(path), options.op_types) == [Watch("a", axis, K)]
    x = drawn(2, *shape)
    a = captured(made, {"x": x}, "a")["a"]
    assert a.shape[axis] == K
    if name in ("left", "right 10", "Conv with groups"):
        (stats,) = calibrate(path, [Sample("s", {"x": x})], options).activations.values()
        others = tuple(i for i in range(a.ndim) if i != axis % a.ndim)
        np.testing.assert_allclose(stats.low, a.min(axis=others), rtol=1e-5)
        np.testing.assert_allclose(stats.high, a.max(axis=others), rtol=1e-5)
    # What smoothing does with channels changes nothing in the end.
    s = np.array([0.5, 2, 4, 8], np.float32)
    turned = np.moveaxis(np.moveaxis(a, axis, -1) / s, -1, axis)
    y = captured(made, {"x": x}, "y")["y"]
    w = drawn(1, *weight)
    if product.startswith("Conv"):
        per_group = s.reshape(-1, weight[1])
        each = per_group[np.arange(weight[0]) * len(per_group) // weight[0]]
        w *= each.reshape(*weight[:2], *[1] * (len(weight) - 2))
    else:
        (along,) = (i for i in range(-min(2, len(weight)), 0) if weight[i] == K)
        w *= s.reshape(-1, *[1] * (-along - 1))
    replaced = proto(text.replace("Tanh", "Identity"), w=w)
    np.testing.assert_allclose(
        captured(replaced, {"x": turned}, "y")["y"], y, rtol=1e-4, atol=1e-5
    )


def test_what_is_summed_over_two_axes_is_left_out(tmp_path: Path) -> None:
    text = "(float[4, 4] x) => (float[4, 4] y) { a = MatMul(x, w) b = MatMul(w, x)"
    path = saved(proto(text + " y = Add(a, b) }", w=drawn(1, 4, 4)), tmp_path / "m.onnx")
    assert watches(load(path), ("MatMul",)) == []
    text = "(float[4, 4] x) => (float[4, 4] y) { a = MatMul(x, w) b = Gemm(x, w)"
    path = saved(proto(text + " y = Add(a, b) }", w=drawn(1, 4, 4)), tmp_path / "m.onnx")
    assert watches(load(path), ("MatMul", "Gemm")) == [Watch("x", -1, 4)]


INSIDE = """(float[n, 4] x, bool flag) => (float[n, 4] y) {
  a = Tanh(x)
  y = If (flag) <
    then_branch = t () => (float[n, 4] ty) { ty = MatMul(a, w) },
    else_branch = e () => (float[n, 4] ey) { b = Neg(a) ey = MatMul(b, w) }
  >
}"""
FUNCTION = """(float[n, 4] x) => (float[n, 4] y) {
  a = Tanh(x) b = local.f(a, w) y = MatMul(b, w)
}
<domain: "local", opset_import: ["" : 17]> f (a, w) => (c) { b = Neg(a) c = MatMul(b, w) }"""


def test_what_is_inside_of_bodies_and_functions_is_left_out(tmp_path: Path) -> None:
    path = saved(proto(INSIDE, w=drawn(1, 4, 4)), tmp_path / "inside.onnx")
    x = drawn(2, 3, 4)
    # A product in a branch may read what is outside of it.
    for flag in (True, False):
        feeds = {"x": x, "flag": np.array(flag)}
        found = calibrate(path, [Sample("s", feeds)])
        assert list(found.activations) == ["a"]
        np.testing.assert_allclose(found.activations["a"].high, np.tanh(x).max(0), rtol=1e-5)
    path = saved(proto(FUNCTION, w=drawn(1, 4, 4)), tmp_path / "function.onnx")
    found = calibrate(path, [Sample("s", {"x": x})])
    assert list(found.activations) == ["b"]
    assert found.activations["b"].count == 3


def test_inputs_are_seen_without_a_run(tmp_path: Path, monkeypatch: Any) -> None:
    text = (
        "(float[n, 4] x, float[n, 4] z) => (float[n, 3] y) { a = Add(x, z) y = MatMul(x, w) }"
    )
    path = saved(proto(text, w=drawn(1, 4, 3)), tmp_path / "m.onnx")
    monkeypatch.setattr(module, "Session", None)
    x = drawn(2, 7, 4)
    found = calibrate(path, [Sample("s", {"x": x, "z": x})])
    assert found.activations["x"].low.tolist() == x.min(axis=0).tolist()


def test_constants_stay_unseen(tmp_path: Path) -> None:
    text = """(float[n, 4] x) => (float[n, 4] y) {
      shape = Constant<value = int64[2] {1, 4}>() zeros = ConstantOfShape(shape)
      a = MatMul(zeros, w) b = Tanh(x) c = MatMul(b, w) y = Add(a, c)
    }"""
    path = saved(proto(text, w=drawn(1, 4, 4)), tmp_path / "m.onnx")
    found = calibrate(path, [Sample("s", {"x": drawn(2, 2, 4)})])
    assert {name: stats.count for name, stats in found.activations.items()} == {
        "zeros": 0,
        "b": 2,
    }


def test_empty_activations_count_nothing(path: Path) -> None:
    found = calibrate(path, samples(0))
    assert [stats.count for stats in found.activations.values()] == [0, 0, 0]
    assert calibrate(path, samples(0, 5)).activations["e"].count == 5


def test_a_sample_counts_once_and_order_does_not_matter(path: Path, tmp_path: Path) -> None:
    once = written(calibrate(path, samples(3, 5)), tmp_path)
    twice = [*samples(5, 3), Sample("again", dict(samples(5)[0].feeds))]
    assert written(calibrate(path, iter(twice)), tmp_path) == once


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were opened so far."""
    paths: list[Path] = []

    def open_one(model: Path, *arguments: Any, **options: Any) -> Session:
        paths.append(model)
        return Session(model, *arguments, **options)

    monkeypatch.setattr(module, "Session", open_one)
    return paths


def test_groups_change_nothing(
    path: Path, tmp_path: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(calibrate(path, samples(3, 9)), tmp_path)
    assert len(opened) == 1, "all fits"
    for first, budget, sessions in ((1, 1, 4), (1, 1 << 20, 3)):
        opened.clear()
        monkeypatch.setattr(module, "_FIRST", first)
        monkeypatch.setattr(module, "_BUDGET", budget)
        assert written(calibrate(path, samples(3, 9)), tmp_path) == whole
        assert len(opened) == sessions


GELU = """(float[n, 64] x) => (float[n, 64] y) {
  a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) e = Mul(d, half)
  f = MatMul(a, w) g = MatMul(e, w) y = Add(f, g)
}"""


def test_nothing_is_fused_that_another_group_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {"root": 2**0.5, "one": 1, "half": 0.5}
    weights = {name: np.array(value, np.float32) for name, value in numbers.items()}
    path = saved(proto(GELU, w=drawn(1, 64, 64), **weights), tmp_path / "gelu.onnx")
    given = [Sample("s", {"x": drawn(2, 50, 64)})]
    whole = written(calibrate(path, given), tmp_path)
    monkeypatch.setattr(module, "_FIRST", 1)
    monkeypatch.setattr(module, "_BUDGET", 1)
    assert written(calibrate(path, given), tmp_path) == whole


def test_a_piece_makes_only_its_group(
    path: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime keeps every output until a run ends, also one that nobody asks for."""
    monkeypatch.setattr(module, "_FIRST", 1)
    monkeypatch.setattr(module, "_BUDGET", 1)
    outputs = []
    run = Session.run

    def seen(self: Session, feeds: Any) -> Any:
        outputs.append(
            [
                value.name
                for value in onnx.load(opened[-1], load_external_data=False).graph.output
            ]
        )
        return run(self, feeds)

    monkeypatch.setattr(Session, "run", seen)
    calibrate(path, samples(3))
    assert outputs == [["b"], ["e"]]


def test_runs_over_parts_merge_to_one_over_all(path: Path, tmp_path: Path) -> None:
    whole = written(calibrate(path, samples(3, 2, 9, 1)), tmp_path)
    one, other = calibrate(path, samples(9, 2)), calibrate(path, samples(1, 3))
    before = written(other, tmp_path)
    other.merge(one)
    assert written(other, tmp_path) == whole
    # Going on: what is known is passed over, and stays as it is.
    known = calibrate(path, samples(1, 3))
    assert written(calibrate(path, samples(3, 2, 9, 1), known=known), tmp_path) == whole
    assert written(known, tmp_path) == before


def test_what_is_known_does_not_run_again(path: Path, opened: list[Path]) -> None:
    known = calibrate(path, samples(3))
    opened.clear()
    assert calibrate(path, samples(3), known=known).samples == known.samples
    assert calibrate(path, [], known=known).samples == known.samples
    assert opened == []


def test_weights_may_lie_anywhere(path: Path, tmp_path: Path) -> None:
    expected = written(calibrate(path, samples(3)), tmp_path)
    folder = tmp_path / "outside"
    folder.mkdir()
    outside = {"save_as_external_data": True, "location": "data.bin", "size_threshold": 0}
    other = saved(layers(), folder / "model.onnx", **outside)
    assert written(calibrate(other, samples(3)), tmp_path) == expected


def test_another_model_is_refused(path: Path, tmp_path: Path) -> None:
    known = calibrate(path, samples(3))
    made = layers()
    weight = numpy_helper.to_array(made.graph.initializer[0]).copy()
    weight[5, 5] += 1
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w0"))
    other = saved(made, tmp_path / "other.onnx")
    for options, why in (
        (Options(), "is of another model"),
        (Options(op_types=("MatMul",)), "only one of the two knows 'e'"),
        (Options(rows=7), "activation 'x' keeps 256 rows, not 7"),
    ):
        model = path if options != Options() else other
        with pytest.raises(Refused, match=f"^{model}: cannot go on from.*: {why}$"):
            calibrate(model, samples(3), options, known=known)


def test_a_model_without_products_is_refused(tmp_path: Path) -> None:
    path = saved(proto("(float[n] x) => (float[n] y) { y = Tanh(x) }"), tmp_path / "m.onnx")
    why = "no MatMul or Gemm multiplies a float32 activation with a weight"
    with pytest.raises(Refused, match=f"^{path}: {why}$"):
        calibrate(path, [])
    text = "(float16[n, 4] x) => (float16[n, 4] y) { y = MatMul(x, w) }"
    path = saved(proto(text, w=drawn(1, 4, 4).astype(np.float16)), tmp_path / "h.onnx")
    with pytest.raises(Refused, match=f"^{path}: {why}$"):
        calibrate(path, [])


def test_no_samples_and_negative_rows_are_refused(path: Path) -> None:
    for nothing in ([], Data()):
        with pytest.raises(DataError, match=r"^there are no samples$"):
            calibrate(path, nothing)
    with pytest.raises(DataError, match=r"^rows: wanted at least 0, not -1$"):
        Options(rows=-1)


def test_errors_name_the_sample_and_the_activation(path: Path, tmp_path: Path) -> None:
    bad = drawn(1, 2, WIDE)
    bad[1, 3] = np.inf
    known = calibrate(path, samples(3))
    before = written(known, tmp_path)
    with pytest.raises(DataError, match=r"^bad: activation 'x' holds NaN or infinity$"):
        calibrate(path, [*samples(4), Sample("bad", {"x": bad})], known=known)
    assert written(known, tmp_path) == before
    text = "(float[n, 4] x) => (float[n, 4] y) { a = Exp(x) y = MatMul(a, w) }"
    path = saved(proto(text, w=drawn(1, 4, 4)), tmp_path / "exp.onnx")
    with pytest.raises(DataError, match=r"^huge: activation 'a' holds NaN or infinity$"):
        calibrate(path, [Sample("huge", {"x": np.full((1, 4), 999, np.float32)})])
    text = "(float[n, 4] x, int64[1] i) => (float y) { a = Gather(x, i) y = MatMul(a, w) }"
    path = saved(proto(text, w=drawn(1, 4, 4)), tmp_path / "m.onnx")
    far = {"x": drawn(1, 3, 4), "i": np.array([99])}
    with pytest.raises(RuntimeFailed, match=r"^far: .*99"):
        calibrate(path, [Sample("far", far)])


def test_an_input_that_has_a_value_in_the_model_is_no_sample(tmp_path: Path) -> None:
    text = "(float[n, 4] x, float[4] z) => (float y) { a = Add(x, z) y = MatMul(a, w) }"
    weights = {"w": drawn(1, 4, 4), "z": np.ones(4, np.float32)}
    path = saved(proto(text, **weights), tmp_path / "m.onnx")
    x = drawn(2, 3, 4)
    found = calibrate(path, [Sample("s", {"x": x})])
    assert found.activations["a"].low.tolist() == (x + 1).min(axis=0).tolist()
    both = Sample("both", {"x": x, "z": weights["z"]})
    with pytest.raises(DataError, match=r"^both: input 'z' has a value in the model$"):
        calibrate(path, [both])


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """What lies in the folder for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return lambda: {file.name for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("budget", [1, 1 << 28])
def test_files_do_not_pile_up(
    path: Path,
    scratch: Callable[[], set[str]],
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_BUDGET", budget)
    told = []

    def progress(done: int, found: Statistics) -> None:
        told.append((done, len(found.samples)))
        assert scratch() == {"stderr.txt", "watching.onnx"}

    calibrate(path, samples(3, 2, 2, 9), progress=progress)
    assert told == [(1, 1), (2, 2), (3, 2), (4, 3)]
    assert scratch() == set()


def test_nothing_is_left_of_an_interrupted_run(
    path: Path, scratch: Callable[[], set[str]]
) -> None:
    def interrupt(done: int, found: Statistics) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(path, samples(3, 2), progress=interrupt)
    assert scratch() == set()


def test_the_time_limit_holds(path: Path) -> None:
    with pytest.raises(RuntimeFailed, match="did not load the model in 1e-06 s"):
        calibrate(path, samples(3), Options(Setup(timeout=1e-6)))


DECODER = """(float[n, t, 8] x, float[n, p, 8] past_k, float[n, p, 8] past_v)
  => (float[n, t, 8] y, float[n, q, 8] present_k, float[n, q, 8] present_v) {
  a = LayerNormalization(x, gamma, beta)
  query = MatMul(a, wq)
  key = MatMul(a, wk)
  value = MatMul(a, wv)
  present_k = Concat<axis=1>(past_k, key)
  present_v = Concat<axis=1>(past_v, value)
  turned = Transpose<perm=[0, 2, 1]>(present_k)
  scores = MatMul(query, turned)
  shares = Softmax(scores)
  mixed = MatMul(shares, present_v)
  out = MatMul(mixed, wo)
  y = Add(out, x)
  cached = MatMul(past_k, wp)
}"""


def decoder() -> onnx.ModelProto:
    weights = {f"w{i}": drawn(j, 8, 8) for j, i in enumerate("qkvo")}
    text = DECODER.replace("present_v) {", "present_v, float[n, p, 4] cached) {")
    gamma, beta = drawn(8, 8), drawn(9, 8)
    return proto(text, **weights, wp=drawn(5, 8, 4), gamma=gamma, beta=beta)


def step(rows: int, past: int) -> dict[str, Array]:
    names = ("past_k", "past_v")
    return {
        "x": drawn(rows, 1, rows, 8),
        **{n: drawn(past + i, 1, past, 8) for i, n in enumerate(names)},
    }


def test_caches_may_be_empty(tmp_path: Path) -> None:
    path = saved(decoder(), tmp_path / "decoder.onnx")
    first = [Sample("first", step(3, 0))]
    found = calibrate(path, first)
    counts = {name: stats.count for name, stats in found.activations.items()}
    assert counts == {"a": 3, "mixed": 3, "past_k": 0}
    found = calibrate(path, [*first, Sample("next", step(1, 40))])
    assert [found.activations[n].count for n in ("a", "mixed", "past_k")] == [4, 4, 40]
    write_statistics(found, tmp_path / "s.safetensors")
    passes = f"smoothquant{{stats={tmp_path / 's.safetensors'} min_bytes=0}}"
    tier, report = PassManager(passes).apply(onnx.load(path))
    assert Counter(n.op_type for n in tier.graph.node)["QuantizeLinear"] == 3, report
    for feeds in (step(3, 0), step(1, 5)):
        for name, wanted in oracle.run(path, feeds).items():
            seen = oracle.run(tier, feeds)[name]
            assert seen.shape == wanted.shape
            error = np.square(seen - wanted).sum()
            assert error <= 1e-2 * np.square(wanted).sum(), name
