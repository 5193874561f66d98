"""Which products can multiply integers, and the reason of each one that cannot."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from onnxforge import model_io, products
from onnxforge.core import Fate, Finding
from onnxforge.integer import Product
from onnxforge.options import ByteSize
from onnxforge.passes.dynamic_int8 import DynamicInt8Pass
from onnxforge.passes.gather_int8 import PerRowGatherInt8Pass
from onnxforge.products import CODES, LEFT_FLOAT, Candidate, Reason, Search, stored_type
from onnxforge.weights import Weights

HEADER = '<ir_version: 9, opset_import: ["" : 18, "org.example" : 1]>\n'
INPUTS = "(float[n,4] x, float[4,n] z, float[b,4,9] s, float16[n,4] h, int64[n] i,"
INPUTS += " float[4] one, bool q)"


class Case(NamedTuple):
    """A model that gives a code, or none of `CODES`."""

    body: str
    weights: str
    options: dict[str, Any] = {}  # noqa: RUF012


def tensor(name: str, *shape: int, dtype: str = "float") -> str:
    values = ",".join(str(i % 7 + 1) for i in range(math.prod(shape)))
    return f"{dtype}[{','.join(map(str, shape))}] {name} = {{{values}}}"


def ints(name: str, *values: int) -> str:
    return f"int64[{len(values)}] {name} = {{{','.join(map(str, values))}}}"


def model(case: Case) -> ir.Model:
    text = f"{HEADER}g {INPUTS} => (float y) <{case.weights}> {{ {case.body} }}"
    return model_io.from_proto(parser.parse_model(text))


def findings(case: Case) -> list[Finding]:
    step = DynamicInt8Pass(min_bytes=ByteSize(0), **case.options)
    _, report = step.apply(model(case))
    return list(report.passes[0].findings)


def given(case: Case) -> set[str]:
    """The codes of a model that say why a product or weight stays."""
    return {finding.code for finding in findings(case) if finding.code in CODES}


W, V = tensor("w", 4, 4), tensor("v", 4, 4)
CONV = {"float_front_end": False}
PLAIN = Case("y = MatMul(x, w)", W)
DEEP = "c = Conv<group=4>(s, k) y = Neg(c)"
FRONT = "c = Conv(s, k) y = MatMul(c, w)"
KERNEL, MATRIX = tensor("k", 4, 4, 3), tensor("w", 7, 2)
SHAPED = "t = Reshape(w, r) y = MatMul(x, t)"
BATCH = tensor("w", 2, 4, 4)

# For each code a model that gives it and no other one, and one much like it that gives none.
PAIRS = [
    ("OF230", Case("y = MatMul(x, z)", ""), PLAIN),
    ("OF230", Case("t = Transpose(x) y = Gemm(x, t)", ""), Case("y = Gemm(x, w)", W)),
    ("OF230", Case("t = Neg(x) u = Gemm(x, t) y = MatMul(u, v)", V),
     Case("t = Transpose(w) u = Gemm(x, t) y = MatMul(u, v)", f"{W}, {V}")),
    ("OF231", Case("y = Add(x, w)", W), PLAIN),
    ("OF231", Case("y = Gemm(x, v, w)", f"{W}, {V}"), Case("y = Gemm(x, v, z)", V)),
    ("OF231", Case("y = org.example.MatMul(x, w)", W), PLAIN),
    ("OF232", Case("a = Add(x, w) y = MatMul(a, w)", W),
     Case("a = Add(x, z) y = MatMul(a, w)", W)),
    ("OF232", Case("a = MatMul(x, w) y = Transpose(w)", W),
     Case("a = MatMul(x, w) y = Transpose(a)", W)),
    ("OF232", Case("a = Gemm(x, w) b = Neg(w) y = Add(a, b)", W),
     Case("a = Gemm(x, w) b = Gemm(z, w) y = Add(a, b)", W)),
    ("OF232", Case("a = Gather<axis=1>(w, i) y = MatMul(x, w)", W), PLAIN),
    ("OF232", Case("t = Transpose(w) a = Gather(t, i) y = MatMul(x, w)", W), PLAIN),
    ("OF232", Case("g = Gather(w, i) t = Cast<to=1>(w) y = MatMul(x, t)",
                   tensor("w", 4, 4, dtype="float16")), PLAIN),
    ("OF233", Case("a = Gather(w, i) y = MatMul(a, w)", W),
     Case("a = Gather(x, i) y = MatMul(a, w)", W)),
    ("OF233", Case("a = Gather<axis=0>(w, i) t = Transpose(w) y = MatMul(a, t)", W), PLAIN),
    ("OF234", Case(DEEP, tensor("k", 4, 1, 3), CONV), Case(DEEP, tensor("k", 4, 1, 3),
     CONV | {"float_depthwise": False})),
    ("OF234", Case(DEEP, tensor("k", 8, 1, 3)),
     Case("c = Conv<group=2>(s, k) y = Neg(c)", tensor("k", 4, 2, 3))),
    ("OF234", Case(DEEP, tensor("k", 4, 1, 3)),
     Case("c = Conv(s, k) y = Neg(c)", tensor("k", 4, 1, 3))),
    ("OF235", Case(FRONT, f"{KERNEL}, {MATRIX}"), Case(FRONT, f"{KERNEL}, {MATRIX}", CONV)),
    ("OF235", Case(FRONT, f"{KERNEL}, {MATRIX}"),
     Case("c = Conv(s, k) y = Neg(c)", KERNEL)),
    ("OF235", Case(FRONT, f"{KERNEL}, {MATRIX}"),
     Case("m = MatMul(s, u) c = Conv(m, k) y = MatMul(c, w)",
          f"{KERNEL}, {MATRIX}, {tensor('u', 9, 9)}")),
    ("OF236", Case(SHAPED, tensor("w", 6, 4) + "," + ints("r", 4, 6)),
     Case(SHAPED, tensor("w", 2, 2, 6) + "," + ints("r", 4, 6))),
    ("OF236", Case("y = MatMul(x, w)", tensor("w", 4)),
     Case("y = MatMul(x, w)", tensor("w", 4, 1))),
    ("OF236", Case("y = MatMul(x, w)", tensor("w", 1, 4)),
     Case("y = MatMul(x, w)", tensor("w", 2, 4))),
    ("OF236", Case("y = MatMul(x, w)", tensor("w", 0, 4)), PLAIN),
    ("OF237", Case("t = Transpose(w) a = MatMul(x, w) y = MatMul(a, t)", W),
     Case("t = Transpose(w) a = MatMul(x, t) y = MatMul(a, t)", W)),
    ("OF237", Case("t = Transpose(w) a = MatMul(x, w) y = MatMul(a, t)", W),
     Case("t = Transpose(w) a = MatMul(x, w) y = MatMul(a, t)", W, {"per_channel": False})),
    ("OF238", Case("a = org.example.F(x) y = MatMul(a, w)", BATCH),
     Case("y = MatMul(s, w)", tensor("w", 2, 9, 4))),
    ("OF238", Case("a = org.example.F(x) y = MatMul(w, a)", W), Case("y = MatMul(w, z)", W)),
    ("OF238", Case("a = org.example.F(x) y = MatMul(a, w)", BATCH),
     Case("a = org.example.F(x) y = MatMul(a, w)", W)),
    ("OF238", Case("y = MatMul(one, w)", BATCH), Case("y = MatMul(one, w)", W)),
    ("OF239", Case("y = MatMul(h, w)", tensor("w", 4, 4, dtype="float16")),
     Case("t = Cast<to=1>(w) y = MatMul(x, t)", tensor("w", 4, 4, dtype="float16"))),
    ("OF239", Case("t = DequantizeLinear(w, c) y = MatMul(x, t)",
     tensor("w", 4, 4, dtype="int8") + ", float c = {2}"), PLAIN),
    ("OF239", Case("a = MatMul(w, v) y = MatMul(x, u)", f"{W}, {V}, {tensor('u', 4, 4)}"),
     Case("a = MatMul(x, v) y = MatMul(a, u)", f"{V}, {tensor('u', 4, 4)}")),
    ("OF240", Case("y = Gemm(x, w)", W, {"op_types": ("MatMul",)}),
     Case("y = MatMul(x, w)", W, {"op_types": ("MatMul",)})),
]  # fmt: skip
ALSO = {"OF239": {"OF231"}, "OF240": {"OF231"}}
"""What the weight of such a product is said to be: no product could have been rewritten."""


@pytest.mark.parametrize(("code", "yes", "no"), PAIRS)
def test_a_code_is_given_where_it_says_and_not_beside(code: str, yes: Case, no: Case) -> None:
    assert code in given(yes)
    assert given(yes) <= {code} | ALSO.get(code, set())
    assert given(no) == set()


def test_every_code_has_a_pair() -> None:
    assert {code for code, _, _ in PAIRS} | {"OF242"} == set(CODES)
    assert set(LEFT_FLOAT) < set(CODES)


@pytest.mark.parametrize(("longest", "codes"), [(3, {"OF242"}), (4, set())])
def test_a_sum_that_can_exceed_32_bits_stays(
    longest: int, codes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 255 * 128 * products._LONGEST < 2**31 <= 255 * 128 * (products._LONGEST + 1)
    monkeypatch.setattr(products, "_LONGEST", longest)
    assert given(PLAIN) == codes


def test_a_product_says_what_its_weight_says() -> None:
    case = Case("a = MatMul(x, w) b = MatMul(x, z) y = Gemm(a, v, w)", f"{W}, {V}")
    told = [(f.where, f.code, f.fate, f.op) for f in findings(case) if f.fate]
    assert told == [
        ("w", "OF232", Fate.SKIPPED, ""),
        ("v", "OF201", Fate.TREATED, ""),
        ("MatMul#0", "OF232", Fate.SKIPPED, "MatMul"),
        ("MatMul#1", "OF230", Fate.SKIPPED, "MatMul"),
        ("Gemm#2", "OF201", Fate.TREATED, "Gemm"),
    ]


def test_a_product_that_op_types_leaves_out_is_excluded() -> None:
    case = Case("y = Gemm(x, w)", W, {"op_types": ("Conv",)})
    assert [(f.code, f.fate) for f in findings(case) if f.op] == [("OF240", Fate.EXCLUDED)]


def candidates(case: Case, **options: Any) -> tuple[list[Candidate], Weights]:
    weights = Weights(model(case))
    return Search(**options).candidates(weights), weights


IF = """a = MatMul(x, w) t = Transpose(v)
y = If(q) <then_branch = f () => (float p) {
  r = Gather(t, i) p = MatMul(a, t) }, else_branch = e () => (float o) {
  u = Neg(a) o = MatMul(u, u) }>"""


def test_products_are_found_in_bodies_with_weights_of_outer_graphs() -> None:
    found, _ = candidates(Case(IF, f"{W}, {V}"))
    assert [(c.where, c.weight.where if c.weight else None) for c in found] == [
        ("MatMul#0", "w"),
        ("If#2/then_branch/MatMul#1", "v"),
        ("If#2/else_branch/MatMul#1", None),
    ]
    assert [isinstance(c.found, Product) for c in found] == [True, True, False]


def test_products_are_found_in_functions() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
g (float[n,2] x) => (float y) { a = local.f(x) y = local.f(a) }
<domain: "local", opset_import: ["" : 18]> f (u) => (o) {
  w = Constant<value = float[2,2] {1,2,3,4}>()
  o = MatMul(u, w)
}"""
    weights = Weights(model_io.from_proto(parser.parse_model(text)))
    (found,) = Search().candidates(weights)
    assert (found.where, found.weight and found.weight.where) == (
        "local::f/MatMul#1",
        "local::f/w",
    )
    assert isinstance(found.found, Product)


@pytest.mark.parametrize(
    ("body", "weights", "per_channel", "channels"),
    [
        ("y = MatMul(x, w)", W, True, (0,)),
        ("y = MatMul(w, z)", W, True, (1,)),
        ("y = Gemm<transB=1>(x, w)", W, True, (1,)),
        ("y = Gemm<transA=1>(w, z)", W, True, (0,)),
        ("t = Transpose(w) y = Gemm(x, t)", W, True, (1,)),
        ("y = Conv(s, k)", KERNEL, True, (1, 2)),
        ("y = MatMul(s, w)", tensor("w", 2, 9, 4), True, (1,)),
        ("y = MatMul(x, w)", W, False, (0, 1)),
        ("y = Conv(s, k)", KERNEL, False, (0, 1, 2)),
    ],
)
def test_the_channels_of_a_product(
    body: str, weights: str, per_channel: bool, channels: tuple[int, ...]
) -> None:
    (candidate,), _ = candidates(Case(body, weights), per_channel=per_channel)
    assert isinstance(candidate.found, Product)
    assert candidate.found.channels.shared == channels


@pytest.mark.parametrize(
    ("body", "weights", "wanted", "stored"),
    [
        ("y = MatMul(x, w)", W, "int8", "int8"),
        ("y = MatMul(x, w)", W, "uint8", "uint8"),
        ("y = MatMul(w, z)", W, "int8", "uint8"),
        ("y = Gemm(w, z)", W, "int8", "uint8"),
        ("y = Gemm(x, w)", W, "int8", "int8"),
        ("y = Conv(s, k)", KERNEL, "int8", "uint8"),
        ("t = Transpose(w) a = MatMul(x, w) y = MatMul(t, z)", W, "int8", "uint8"),
        ("c = Cast<to=1>(w) m = Mul(c, f) y = MatMul(x, m)",
         f"{tensor('w', 4, 4, dtype='int8')}, {tensor('f', 1, 4)}", "uint8", "int8"),
        ("c = Cast<to=1>(w) m = Mul(c, f) y = MatMul(m, z)",
         f"{tensor('w', 4, 4, dtype='int8')}, {tensor('f', 4, 1)}", "int8", "OF237"),
    ],
)  # fmt: skip
def test_the_type_in_which_a_weight_is_stored(
    body: str, weights: str, wanted: Any, stored: str
) -> None:
    found, all_weights = candidates(Case(body, weights))
    products = [c.found for c in found if isinstance(c.found, Product)]
    (weight,) = {product.operand.weight for product in products}
    told = stored_type(weight, products, all_weights, wanted)
    assert (told.code if isinstance(told, Reason) else told) == stored


@pytest.mark.parametrize(
    ("scale", "body", "code"),
    [
        (tensor("f", 1, 4), "y = MatMul(x, m)", None),
        (tensor("f", 4, 1), "y = MatMul(x, m)", "OF236"),
        (tensor("f", 4, 1), "t = Transpose(m) y = MatMul(x, t)", None),
        ("float f = {2}", "y = MatMul(x, m)", "OF236"),
        (tensor("f", 2, 4, 4), "y = MatMul(x, m)", "OF236"),
    ],
)
def test_a_weight_that_is_int8_already_is_multiplied_along_its_scales(
    scale: str, body: str, code: str | None
) -> None:
    stored = f"{tensor('w', 4, 4, dtype='int8')}, {scale}"
    found, _ = candidates(Case(f"c = Cast<to=1>(w) m = Mul(c, f) {body}", stored))
    reasons = [c.found.code for c in found if isinstance(c.found, Reason)]
    assert reasons == ([code] if code else [])


def test_a_weight_that_is_int8_already_keeps_its_channels_without_per_channel() -> None:
    stored = f"{tensor('w', 4, 4, dtype='int8')}, {tensor('f', 1, 4)}"
    case = Case("c = Cast<to=1>(w) m = Mul(c, f) y = MatMul(x, m)", stored)
    (candidate,), _ = candidates(case, per_channel=False)
    assert isinstance(candidate.found, Product)
    assert candidate.found.channels.shared == (0,)


@pytest.mark.parametrize("axis", [0, 1])
def test_gather_int8_is_named_only_where_it_helps(axis: int) -> None:
    case = Case(f"a = Gather<axis={axis}>(w, i) t = Transpose(w) y = MatMul(x, t)", W)
    tables = PerRowGatherInt8Pass(min_rows=1, min_bytes=ByteSize(0))
    _, report = tables.apply(model(case))
    helps = report.modified
    assert helps == (axis == 0)
    assert given(case) == {"OF233" if helps else "OF232"}


# --- quantized activations -----------------------------------------------------------------


def quantizers(case: Case) -> list[str]:
    """What is quantized and what is multiplied in the result, which is valid."""
    result = model(case)
    DynamicInt8Pass(min_bytes=ByteSize(0)).apply(result)
    onnx.checker.check_model(ir.to_proto(result))
    return [
        f"{node.op_type} {node.inputs[0].name}"
        for node in result.graph.all_nodes()
        if node.op_type in ("DynamicQuantizeLinear", "MatMulInteger") and node.inputs[0]
    ]


Q = "DynamicQuantizeLinear"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (f"d, e, f = {Q}(x) y = MatMul(x, w)", [f"{Q} x", "MatMulInteger d"]),
        (
            f"a = Neg(x) d, e, f = {Q}(a) y = MatMul(a, w)",
            [f"{Q} a", "MatMulInteger d"],
        ),
        (
            f"y = MatMul(x, w) d, e, f = {Q}(x)",
            [f"{Q} x", "MatMulInteger x_quantized", f"{Q} x"],
        ),
        (
            f"d, e, f = org.example.{Q}(x) y = MatMul(x, w)",
            [f"{Q} x", f"{Q} x", "MatMulInteger x_quantized"],
        ),
        ("a = MatMul(x, w) y = MatMul(x, v)",
         [f"{Q} x", "MatMulInteger x_quantized", "MatMulInteger x_quantized"]),
    ],
)  # fmt: skip
def test_an_activation_is_quantized_once_and_before_its_readers(
    body: str, found: list[str]
) -> None:
    assert quantizers(Case(body, f"{W}, {V}")) == found


@pytest.mark.parametrize(("opset", "code"), [(10, "OF210"), (11, "OF201")])
def test_a_function_of_an_old_opset_stays(opset: int, code: str) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 11, "local" : 1]>
g (float[n,2] x) => (float y) {{ y = local.f(x) }}
<domain: "local", opset_import: ["" : {opset}]> f (u) => (o) {{
  w = Constant<value = float[2,2] {{1,2,3,4}}>()
  o = MatMul(u, w)
}}"""
    _, report = DynamicInt8Pass(min_bytes=ByteSize(0)).apply(parser.parse_model(text))
    assert {f.code for f in report.passes[0].findings if f.fate} == {code}
