from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxforge import PassManager
from onnxforge.core import Fate
from onnxforge.errors import Refused
from onnxforge.passes.int8w import WeightsInt8CastPass
from support import decoded, fixtures, integers, products, protos

EVERYTHING = WeightsInt8CastPass(min_bytes=0, input_scales=False)
HEADER = '<ir_version: 8, opset_import: ["" : 17]> '


def model(text: str, **arrays: Any) -> ModelProto:
    """A model from text and initializers."""
    proto = parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()
    )
    return proto


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return products.floats(seed, *shape)


def nodes(graph: Any) -> list[str]:
    return [f"{', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in graph.node]


def codes(before: ModelProto, **options: Any) -> dict[str, str]:
    step = WeightsInt8CastPass(**{"min_bytes": 0, **options})
    return {f.where: f.code for f in step.apply(before)[1].passes[0].findings if f.fate}


MATMUL = "g (float[n,6] x) => (float[n,4] y) { y = MatMul(x, w) }"

# --- example -------------------------------------------------------------------------------


def test_a_weight_is_multiplied_with_its_scale_before_its_consumer() -> None:
    after, _ = EVERYTHING.apply(model(MATMUL, w=floats(6, 4)))
    assert nodes(after.graph) == [
        "w_int8w_cast = Cast(w)",
        "w_int8w = Mul(w_int8w_cast, w_scale)",
        "y = MatMul(x, w_int8w)",
    ]


def test_one_product_with_the_scale_serves_all_consumers_of_a_graph() -> None:
    before = model(
        "g (float[n,6] x) => (float[n,6] y) { a = MatMul(x, w) y = MatMul(a, w) }",
        w=floats(6, 6),
    )
    assert nodes(EVERYTHING.apply(before)[0].graph) == [
        "w_int8w_cast = Cast(w)",
        "w_int8w = Mul(w_int8w_cast, w_scale)",
        "a = MatMul(x, w_int8w)",
        "y = MatMul(a, w_int8w)",
    ]


def test_of_a_table_only_the_gathered_rows_are_widened() -> None:
    before = model("g (int64[n] i) => (float[n,4] y) { y = Gather(w, i) }", w=floats(6, 4))
    assert nodes(EVERYTHING.apply(before)[0].graph) == [
        "y_int8w = Gather(w, i)",
        "y_row_scale = Gather(w_scale, i)",
        "y_cast = Cast(y_int8w)",
        "y = Mul(y_cast, y_row_scale)",
    ]


def test_a_constant_node_stays_and_its_scale_stands_beside_it() -> None:
    case = products.Case(
        helper.make_node("MatMul", ["x", "w"], ["y"]), 1, floats(2, 4), floats(4, 3)
    )
    case.scope = "function"
    after, _ = EVERYTHING.apply(case.model())
    assert nodes(after.functions[0]) == [
        "stored = Constant()",
        "stored_scale = Constant()",
        "stored_int8w_cast = Cast(stored)",
        "stored_int8w = Mul(stored_int8w_cast, stored_scale)",
        "y_function = MatMul(x, stored_int8w)",
    ]


# --- bytes ---------------------------------------------------------------------------------

LSTM = """g (float[t,n,4] x) => (float[t,n,6] y) {
    a = LSTM<hidden_size=3, direction="bidirectional">(x, w, r)
    b = Transpose<perm=[0,2,1,3]>(a) y = Reshape(b, s) }"""
TWO = "float[n,6] x) => (float[n,4] y"
FORMS: dict[str, tuple[str, dict[str, tuple[int, ...]], list[int], dict[str, Any]]] = {
    # Text, shapes of weights, axes that share a scale, other initializers.
    "MatMul": (MATMUL, {"w": (6, 4)}, [0], {}),
    "MatMul left": (
        "g (float[6,n] x) => (float[4,n] y) { y = MatMul(w, x) }",
        {"w": (4, 6)},
        [1],
        {},
    ),
    "batched": (
        "g (float[n,6] x) => (float[3,n,4] y) { y = MatMul(x, w) }",
        {"w": (3, 6, 4)},
        [1],
        {},
    ),
    "Gemm": (f"g ({TWO}) {{ y = Gemm(x, w) }}", {"w": (6, 4)}, [0], {}),
    "Gemm transB": (f"g ({TWO}) {{ y = Gemm<transB=1>(x, w) }}", {"w": (4, 6)}, [1], {}),
    "Conv 1": (
        "g (float[n,4,9] x) => (float[n,6,k] y) { y = Conv<group=2>(x, w) }",
        {"w": (6, 2, 3)},
        [1, 2],
        {},
    ),
    "Conv 2": (
        "g (float[n,4,9,9] x) => (float[n,6,k,l] y) { y = Conv(x, w) }",
        {"w": (6, 4, 3, 2)},
        [1, 2, 3],
        {},
    ),
    "ConvTranspose": (
        "g (float[n,4,9] x) => (float[n,6,k] y) { y = ConvTranspose(x, w) }",
        {"w": (4, 6, 3)},
        [0, 2],
        {},
    ),
    "LSTM": (LSTM, {"w": (2, 12, 4), "r": (2, 12, 3)}, [2], {"s": np.array([0, 0, 6])}),
    "GRU": (
        "g (float[t,n,4] x) => (float[t,1,n,3] y) { y = GRU<hidden_size=3>(x, w, r) }",
        {"w": (1, 9, 4), "r": (1, 9, 3)},
        [2],
        {},
    ),
    "Transpose": (
        f"g ({TWO}) {{ t = Transpose(w) y = MatMul(x, t) }}",
        {"w": (4, 6)},
        [1],
        {},
    ),
    "Reshape": (
        f"g ({TWO}) {{ t = Reshape(w, s) y = MatMul(x, t) }}",
        {"w": (2, 3, 4)},
        [0, 1],
        {"s": np.array([6, 4])},
    ),
    "Gather": (
        "g (int64[n] i) => (float[n,4] y) { y = Gather(w, i) }",
        {"w": (6, 4)},
        [1],
        {},
    ),
    "Gather of columns": (
        "g (int64[n] i) => (float[6,n] y) { y = Gather<axis=1>(w, i) }",
        {"w": (6, 4)},
        [0],
        {},
    ),
}
SIDES = {"n": 2, "t": 3}


def made(form: str) -> tuple[ModelProto, dict[str, np.ndarray], dict[str, list[int]]]:
    """A model, inputs for it, and which axes of its weights share a scale."""
    text, shapes, axes, more = FORMS[form]
    weights = {n: floats(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    before = model(text, **weights, **more)
    inputs: dict[str, np.ndarray] = {}
    for port in before.graph.input:
        dims = port.type.tensor_type.shape.dim
        shape = [d.dim_value or SIDES[d.dim_param] for d in dims]
        real = port.type.tensor_type.elem_type == TensorProto.FLOAT
        inputs[port.name] = floats(*shape, seed=9) if real else np.array([0, -1])
    return before, inputs, dict.fromkeys(weights, axes)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("form", FORMS)
def test_the_stored_integers_and_scales_are_those_of_the_reference(
    form: str, rule: Any, inputs: bool
) -> None:
    before, _, axes = made(form)
    step = WeightsInt8CastPass(min_bytes=0, scale=rule, input_scales=inputs)
    inputs = inputs and form != "Gather"  # rows of a table have one scale each
    after, _ = step.apply(before)
    held, was = integers.initializers(after), integers.initializers(before)
    for name, shared in axes.items():
        rules = integers.Rules(mse=rule == "mse", inputs=inputs)
        wanted = integers.quantize_weight(was[name], shared, rules)
        if inputs:
            scale = held.pop(f"{name}_input_scale")
            assert scale.dtype == np.float32
            assert scale.tolist() == integers.input_scale(was[name], shared).tolist()
        scale = held.pop(f"{name}_scale")
        assert held[name].dtype == np.int8
        assert held.pop(name).tolist() == wanted.values.tolist()
        assert scale.dtype == np.float32
        assert scale.tolist() == wanted.scale.tolist()
    assert set(held) <= {"s"}


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_a_large_weight_join_without_a_seam(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _, _ = made(form)
    whole = EVERYTHING.apply(before)[0].SerializeToString()
    for size in (4, 20, 100):
        monkeypatch.setattr("onnxforge.lazy.BLOCK_BYTES", size)
        assert EVERYTHING.apply(before)[0].SerializeToString() == whole


@pytest.mark.parametrize(
    ("value", "level", "scale"),
    [
        (127.0, 127, 1.0),
        (0.0, 0, 1.0),
        (-0.0, 0, 1.0),
        (1e-45, 0, 1.0),  # the scale would be subnormal
        (2.0**-126 * 127, 127, 2.0**-126),
        (3.4028235e38, 127, float(np.float32(2.0**128 - 2.0**105) / np.float32(127))),
    ],
)
def test_edges_of_a_channel(value: float, level: int, scale: float) -> None:
    w = np.zeros((4, 2), np.float32)
    w[:, 1] = 1
    w[2, 0] = value
    after, _ = EVERYTHING.apply(
        model(MATMUL.replace("6", "4").replace("n,4] y", "n,2] y"), w=w)
    )
    held = integers.initializers(after)
    assert held["w"][:, 0].tolist() == [0, 0, level, 0]
    assert held["w_scale"][0, 0] == np.float32(scale)


def test_halves_are_rounded_to_even() -> None:
    w = np.array([[127], [0.5], [1.5], [-0.5], [-1.5], [2.5]], np.float32)
    after, _ = EVERYTHING.apply(model(MATMUL.replace("n,4", "n,1"), w=w))
    assert integers.initializers(after)["w"].ravel().tolist() == [127, 0, 2, 0, -2, 2]


def test_a_file_is_a_quarter_as_large(tmp_path: Path) -> None:
    text = "g (float[n,256] x) => (float[n,256] y) { y = MatMul(x, w) }"
    onnx.save(model(text, w=floats(256, 256)), tmp_path / "in.onnx")
    PassManager("int8w").run(tmp_path / "in.onnx", tmp_path / "out.onnx")
    size = (tmp_path / "out.onnx").stat().st_size
    assert 256 * 256 + 512 * 4 < size < 256 * 256 + 512 * 4 + 1000


def test_a_channel_of_silent_weights_and_one_that_is_alone_get_no_scale_of_their_own() -> None:
    w = floats(6, 4)
    w[2], w[3] = 0, 1e-39
    step = WeightsInt8CastPass(min_bytes=0)
    held = integers.initializers(step.apply(model(MATMUL, w=w))[0])
    assert held["w_input_scale"][2:4].tolist() == [[1], [1]]
    text = "g (float[n,4,9] x) => (float[n,4,k] y) { y = Conv<group=4>(x, w) }"
    assert set(integers.initializers(step.apply(model(text, w=floats(4, 1, 3)))[0])) == {
        "w",
        "w_scale",
    }


def test_small_weights_of_a_loud_input_keep_their_precision() -> None:
    loud, w = np.ones(64, np.float32), floats(64, 32)
    loud[::16] = 1000
    w /= loud[:, None]
    x = floats(200, 64, seed=1) * loud
    wanted, lost = x.astype(np.float64) @ w, {}
    for both in (False, True):
        rules = integers.Rules(inputs=both)
        lost[both] = np.linalg.norm(x @ integers.decoded(w, [0], rules) - wanted)
    assert lost[True] < lost[False] / 10


# --- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_tier_is_bit_equal_to_the_parent_of_decoded_weights(form: str, both: bool) -> None:
    before, inputs, axes = made(form)
    tier, report = WeightsInt8CastPass(min_bytes=0, input_scales=both).apply(before)
    assert report.passes[0].tally(Fate.TREATED)[0] == len(axes)
    rules = integers.Rules(inputs=both and form != "Gather")
    wanted = decoded.parent(before, axes, rules)
    decoded.assert_equal(tier, wanted, [inputs])
    with pytest.raises(AssertionError):
        decoded.assert_equal(tier, before, [inputs])
    assert integers.dead(tier) == []


@pytest.mark.parametrize("name", ["w", "w_scale"])
def test_the_oracle_sees_one_integer_and_one_scale(name: str) -> None:
    before, inputs, axes = made("MatMul")
    tier, _ = EVERYTHING.apply(before)

    def by_one(values: np.ndarray) -> np.ndarray:
        changed = values.copy()
        changed[0, 0] = values[0, 0] - 1 if values.dtype == np.int8 else values[0, 0] * 1.001
        return changed

    wrong, wanted = integers.changed(tier, name, by_one), decoded.parent(before, axes)
    with pytest.raises(AssertionError):
        decoded.assert_equal(wrong, wanted, [inputs])


# Axes that share a scale, by the name of the weight; all others stay float32.
KERNELS = ("w_first", "w_depth", "w_last")
PLACES: dict[str, list[int]] = {
    **{name: [0] for name in ("w_loop", "w_loop_back", "w_mix")},
    **{name: [1] for name in ("w_batched", "w_left", "w_gemm", "table")},
    **{name: [1, 2] for name in KERNELS},
    "w_split": [0, 2],
}


def test_weights_of_all_graphs_are_bit_equal_to_the_decoded_parent() -> None:
    before = onnx.load(fixtures.built("int8_places"))
    tier, report = EVERYTHING.apply(before)
    done = {
        f.where.split("/")[-1] for f in report.passes[0].findings if f.fate is Fate.TREATED
    }
    assert done == set(PLACES)
    wanted = decoded.parent(before, PLACES)
    decoded.assert_equal(tier, wanted, fixtures.samples("int8_places"))


# --- what stays float32 --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "w", "code"),
    [
        ("g (float[n,4] x) => (float[n,4] y) { y = Add(x, w) }", floats(4), "OF224"),
        ("g (float[n,4] x) => (float[n,4] y) { y = Mul(x, w) }", floats(4, 4), "OF224"),
        ("g (float[n,1] x) => (float[n,4] y) { y = MatMul(x, w) }", floats(1, 4), "OF224"),
        ("g (float[n,6] x) => (float[n] y) { y = MatMul(x, w) }", floats(6, 1)[:, 0], "OF224"),
        (
            "g (float[n,2,9] x) => (float[n,4,9] y) { y = Conv(x, k, w) }",
            floats(4, 1)[:, 0],
            "OF224",
        ),
        (MATMUL, np.full((6, 4), np.nan, np.float32), "OF223"),
        (MATMUL, np.full((6, 4), -np.inf, np.float32), "OF223"),
        (MATMUL.replace("float", "float16"), floats(6, 4).astype(np.float16), "OF204"),
    ],
)
def test_what_stays_says_why(text: str, w: np.ndarray, code: str) -> None:
    more = (
        {"k": np.full((4, 2, 1), np.nan, np.float32)} if "k" in text.split("Conv")[-1] else {}
    )
    before = model(text, w=w, **(more if "Conv" in text else {}))
    after, report = EVERYTHING.apply(before)
    assert {f.where: f.code for f in report.passes[0].findings}["w"] == code
    assert protos.unlike(before, after) is None


def test_options_choose() -> None:
    before = model(MATMUL, w=floats(6, 4))
    before.graph.node[0].name = "/head/MatMul"
    assert codes(before) == {"w": "OF201"}
    assert codes(before, min_bytes=97) == {"w": "OF203"}
    assert codes(before, exclude=("/head*",)) == {"w": "OF202"}
    assert codes(before, include=("w",)) == {"w": "OF201"}
    with pytest.raises(Refused, match="'nothing' matches no weight"):
        codes(before, exclude=("nothing",))


def test_scales_are_not_quantized_again() -> None:
    before = model(
        "g (int64[n] i) => (float[n,90] y) { e = Gather(w, i) t = Transpose(w)"
        " y = MatMul(e, t) }",
        w=floats(90, 8),
    )
    tier, _ = EVERYTHING.apply(before)
    for text in ("int8w{min_bytes=0}", "gather-int8{min_bytes=0 min_rows=1}"):
        assert not PassManager(text).apply(tier)[1].modified
    other, _ = PassManager("gather-int8{min_bytes=0}").apply(before)
    assert not EVERYTHING.apply(other)[1].modified


def test_names_and_remarks_stay() -> None:
    before = model(MATMUL, w=floats(6, 4))
    before.graph.node[0].name, before.graph.node[0].doc_string = "/head/MatMul", "logits"
    before.graph.initializer[0].doc_string = "learned"
    after, _ = EVERYTHING.apply(before)
    assert after.graph.node[-1].name == "/head/MatMul"
    assert after.graph.node[-1].doc_string == "logits"
    assert after.graph.initializer[0].doc_string == "learned"
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)


# --- properties ----------------------------------------------------------------------------


@given(case=products.cases())
def test_any_weight_anywhere_is_bit_equal_to_its_decoded_parent(case: products.Case) -> None:
    if "Cast" in case.path:
        case.path = ""
    before = case.model()
    copy = before.SerializeToString()
    tier, report = EVERYTHING.apply(before)
    assert before.SerializeToString() == copy
    done = {f.where.split("/")[-1] for f in report.passes[0].findings if f.code == "OF201"}
    if not case.is_worthwhile():
        assert "stored" not in done
        return
    assert done == {"stored"}
    wanted = case.model(decoded=True)
    decoded.assert_equal(tier, wanted, [case.inputs])
    assert not EVERYTHING.apply(tier)[1].modified
