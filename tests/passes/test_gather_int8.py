from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxforge import PassManager
from onnxforge.core import Fate
from onnxforge.errors import SpecError
from onnxforge.passes.gather_int8 import PerRowGatherInt8Pass
from support import decoded, fixtures, integers, oracle, products, protos

EVERYTHING = PerRowGatherInt8Pass(min_bytes=0, min_rows=1)
HEADER = '<ir_version: 8, opset_import: ["" : 17]> '


def model(text: str, **arrays: Any) -> ModelProto:
    """A model from text and initializers."""
    proto = parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()
    )
    return proto


def nodes(graph: onnx.GraphProto) -> list[str]:
    return [f"{', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in graph.node]


def codes(before: ModelProto, **options: Any) -> dict[str, str]:
    step = PerRowGatherInt8Pass(**{"min_bytes": 0, "min_rows": 1, **options})
    return {f.where: f.code for f in step.apply(before)[1].passes[0].findings if f.fate}


TABLE = products.floats(5, 70, 6)
TABLE[9] = 0
ROWS = "g (int64[n] i) => (float[n,6] y) { y = Gather(w, i) }"

# --- example -------------------------------------------------------------------------------


def test_rows_and_their_scales_are_gathered_and_only_those_are_widened() -> None:
    after, _ = EVERYTHING.apply(model(ROWS, w=TABLE))
    assert nodes(after.graph) == [
        "y_int8w = Gather(w, i)",
        "y_row_scale = Gather(w_scale, i)",
        "y_cast = Cast(y_int8w)",
        "y = Mul(y_cast, y_row_scale)",
    ]


def test_another_reader_gets_the_whole_table_of_the_same_bytes() -> None:
    text = """g (int64[n] i) => (float[n,70] y)
        { e = Gather(w, i) t = Transpose(w) y = MatMul(e, t) }"""
    after, _ = EVERYTHING.apply(model(text, w=TABLE))
    assert nodes(after.graph) == [
        "e_int8w = Gather(w, i)",
        "e_row_scale = Gather(w_scale, i)",
        "e_cast = Cast(e_int8w)",
        "e = Mul(e_cast, e_row_scale)",
        "w_int8w_cast = Cast(w)",
        "w_int8w = Mul(w_int8w_cast, w_scale)",
        "t = Transpose(w_int8w)",
        "y = MatMul(e, t)",
    ]
    assert sorted(integers.initializers(after)) == ["w", "w_scale"]


# --- bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("shape", [(70, 6), (70, 2, 3), (8, 2, 2, 3), (3, 40)])
def test_the_stored_integers_and_scales_are_those_of_the_reference(
    shape: tuple[int, ...], rule: str
) -> None:
    w = products.floats(2, *shape)
    w[1] = 0
    axes = list(range(1, len(shape)))
    wanted = integers.quantize_weight(w, axes, integers.Rules(mse=rule == "mse"))
    step = PerRowGatherInt8Pass(min_bytes=0, min_rows=1, scale=rule)  # type: ignore[arg-type]
    text = f"g (int64[n] i) => (float[{','.join('n' * len(shape))}] y) {{ y = Gather(w, i) }}"
    after, _ = step.apply(model(text, w=w))
    held = integers.initializers(after)
    assert list(held) == ["w", "w_scale"]
    assert (held["w"].dtype, held["w_scale"].dtype) == (np.int8, np.float32)
    assert held["w"].tolist() == wanted.values.tolist()
    assert held["w_scale"].shape == (shape[0], *[1] * (len(shape) - 1))
    assert held["w_scale"].tobytes() == wanted.scale.tobytes()
    assert not held["w"][1].any()
    assert integers.dead(after) == []


def test_the_errors_of_the_table_are_told() -> None:
    report = EVERYTHING.apply(model(ROWS, w=TABLE))[1]
    (told,) = (f.message for f in report.passes[0].findings if f.code == "OF227")
    lost = np.abs(TABLE.astype(np.float64) - integers.decoded(TABLE, [1]))
    wanted = lost.max(), lost.mean()
    assert told.startswith("error of the table: max {:.2e}, mean {:.2e}, p99 ".format(*wanted))


def test_a_file_is_as_large_as_bytes_and_scales(tmp_path: Path) -> None:
    before = model(ROWS.replace("n,6", "n,256"), w=products.floats(0, 300, 256))
    onnx.save(before, tmp_path / "in.onnx")
    PassManager("gather-int8").run(tmp_path / "in.onnx", tmp_path / "out.onnx")
    size = (tmp_path / "out.onnx").stat().st_size
    assert 300 * 256 + 300 * 4 < size < 300 * 256 + 300 * 4 + 1500


# --- numbers -------------------------------------------------------------------------------

NEGATIVE = {"i": np.array([0, -1, 69, -70, 9])}
FORMS: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "vector": (ROWS, NEGATIVE),
    "scalar": ("g (int64 i) => (float[6] y) { y = Gather(w, i) }", {"i": np.array(-2)}),
    "matrix": (
        "g (int32[a,b] i) => (float[a,b,6] y) { y = Gather<axis=0>(w, i) }",
        {"i": np.array([[3, -1, 0], [9, 9, 2]], np.int32)},
    ),
    "negative axis": (
        "g (int64[n] i) => (float[n,6] y) { y = Gather<axis=-2>(w, i) }",
        NEGATIVE,
    ),
    "several": (
        """g (int64[n] i) => (float[n,6] y)
        { a = Gather(w, i) j = Neg(i) b = Gather(w, j) y = Sub(a, b) }""",
        {"i": np.array([0, 3, -5])},
    ),
    "tied": (
        """g (int64[n] i) => (float[n,70] y)
        { e = Gather(w, i) t = Transpose(w) y = MatMul(e, t) }""",
        NEGATIVE,
    ),
    "tied to Gemm": (
        "g (int64[n] i) => (float[n,70] y) { e = Gather(w, i) y = Gemm<transB=1>(e, w) }",
        NEGATIVE,
    ),
    "also by columns": (
        """g (int64[n] i, int64[6] j) => (float[n,6] y)
        { e = Gather(w, i) c = Gather<axis=1>(w, j) f = Gather(c, i) y = Add(e, f) }""",
        {**NEGATIVE, "j": np.arange(6)},
    ),
    "in a branch": (
        """g (bool b, int64[n] i) => (float[n,6] y) { y = If(b) <
        then_branch = one () => (float[n,6] p) { p = Gather(w, i) },
        else_branch = two () => (float[n,6] q) { r = Gather(w, i) q = Neg(r) }> }""",
        {**NEGATIVE, "b": np.array(True)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_tier_is_bit_equal_to_the_parent_of_decoded_rows(form: str) -> None:
    text, inputs = FORMS[form]
    before = model(text, w=TABLE)
    tier, report = EVERYTHING.apply(before)
    assert report.passes[0].tally(Fate.TREATED) == (1, TABLE.nbytes)
    decoded.assert_equal(tier, decoded.parent(before, {"w": [1]}), [inputs])
    assert not EVERYTHING.apply(tier)[1].modified


def test_the_oracle_sees_a_row_of_another_scale_and_one_integer() -> None:
    before = model(ROWS, w=TABLE)
    tier, _ = EVERYTHING.apply(before)
    wanted = decoded.parent(before, {"w": [1]})
    every = [{"i": np.arange(70)}]
    decoded.assert_equal(tier, wanted, every)
    for name in ("w", "w_scale"):
        wrong = integers.changed(tier, name, lambda v: np.concatenate([v[1:], v[:1]]))
        with pytest.raises(AssertionError):
            decoded.assert_equal(wrong, wanted, every)
    with pytest.raises(AssertionError):
        decoded.assert_equal(tier, before, every)


@pytest.mark.parametrize("name", ["speech_encoder", "merged_decoder", "int8_places"])
def test_a_tier_of_a_fixture_is_bit_equal_to_its_parent(name: str) -> None:
    before = onnx.load(fixtures.built(name))
    tier, report = EVERYTHING.apply(before)
    done = [f.where for f in report.passes[0].findings if f.fate is Fate.TREATED]
    assert done
    wanted = decoded.parent(before, {where: [1] for where in done})
    decoded.assert_equal(tier, wanted, fixtures.samples(name))


# --- what stays float32 --------------------------------------------------------------------


def test_a_branch_may_have_a_table_of_its_own() -> None:
    before = model(
        """g (bool b, int64[n] i) => (float[n,6] y) { y = If(b) <
        then_branch = one () => (float[n,6] p) { p = Gather(own, i) },
        else_branch = two () => (float[n,6] q) { q = Gather(w, i) }> }""",
        w=TABLE,
    )
    branch = before.graph.node[0].attribute[0].g
    branch.initializer.append(numpy_helper.from_array(TABLE * np.float32(3), "own"))
    tier, report = EVERYTHING.apply(before)
    assert report.passes[0].tally(Fate.TREATED)[0] == 2
    wanted = decoded.parent(before, {"w": [1], "own": [1]})
    samples = [{**NEGATIVE, "b": np.array(flag)} for flag in (True, False)]
    decoded.assert_equal(tier, wanted, samples)


@pytest.mark.parametrize(
    ("text", "w", "code"),
    [
        (ROWS.replace("Gather", "Gather<axis=1>").replace("n,6", "70,n"), TABLE, "OF225"),
        (ROWS.replace("n,6", "n"), TABLE[:, 0], "OF225"),
        (ROWS.replace("n,6", "n,1"), TABLE[:, :1], "OF225"),
        (ROWS, np.where(TABLE > 3, np.inf, TABLE).astype(np.float32), "OF223"),
        (ROWS, np.where(TABLE > 3, np.nan, TABLE).astype(np.float32), "OF223"),
        ("g (float[n,70] x) => (float[n,6] y) { y = MatMul(x, w) }", TABLE, "OF225"),
        (ROWS.replace("float", "float16"), TABLE.astype(np.float16), "OF204"),
    ],
)
def test_what_stays_says_why(text: str, w: np.ndarray, code: str) -> None:
    before = model(text, w=w)
    after, report = EVERYTHING.apply(before)
    assert {f.where: f.code for f in report.passes[0].findings} == {"w": code}
    assert protos.unlike(before, after) is None


def test_options_choose() -> None:
    before = model(ROWS, w=TABLE)
    assert codes(before, min_rows=70) == {"w": "OF201"}
    assert codes(before, min_rows=71) == {"w": "OF226"}
    assert codes(before, min_bytes=70 * 6 * 4 + 1) == {"w": "OF203"}
    assert codes(before, exclude=("w",)) == {"w": "OF202"}
    assert codes(model(ROWS, w=TABLE[:63]), min_rows=64) == {"w": "OF226"}
    with pytest.raises(SpecError, match="scale"):
        PerRowGatherInt8Pass(scale="best")  # type: ignore[arg-type]


def test_a_table_that_is_an_output_or_an_input_stays() -> None:
    for ports, code in (("output", "OF206"), ("input", "OF207")):
        before = model(ROWS, w=TABLE)
        port = helper.make_tensor_value_info("w", TensorProto.FLOAT, TABLE.shape)
        getattr(before.graph, ports).append(port)
        assert codes(before) == {"w": code}


def test_names_and_remarks_stay() -> None:
    before = model(ROWS, w=TABLE)
    before.graph.node[0].name, before.graph.node[0].doc_string = "/embed/Gather", "rows"
    before.graph.output[0].doc_string = "what it gives"
    after, _ = EVERYTHING.apply(before)
    assert (after.graph.node[0].name, after.graph.node[0].doc_string) == (
        "/embed/Gather",
        "rows",
    )
    assert after.graph.output == before.graph.output


# --- properties ----------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**20),
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    ids=st.data(),
)
def test_any_table_is_bit_equal_to_its_decoded_parent(
    seed: int, shape: list[int], ids: st.DataObject
) -> None:
    w = products.floats(seed, *shape)
    picked = ids.draw(st.lists(st.integers(-shape[0], shape[0] - 1), max_size=5))
    sides = ",".join("n" for _ in shape)
    before = model(f"g (int64[k] i) => (float[{sides}] y) {{ y = Gather(w, i) }}", w=w)
    tier, report = EVERYTHING.apply(before)
    if w[0].size < 2:
        assert not report.modified
        return
    wanted = decoded.parent(before, {"w": range(1, len(shape))})
    decoded.assert_equal(tier, wanted, [{"i": np.array(picked, np.int64)}])
    error = np.abs(integers.decoded(w, range(1, len(shape))) - w)
    largest = np.abs(w).max(axis=tuple(range(1, len(shape))), keepdims=True)
    assert (error <= largest / 254 * 1.0001).all()
    assert not EVERYTHING.apply(tier)[1].modified
    assert oracle.run(tier, {"i": np.array([0])})["y"].dtype == np.float32
