"""What lies before and behind a product, through bodies, captured values and functions."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import ModelProto, helper, parser

from onnxforge import flow, model_io
from onnxforge.walk import scopes

HEADER = '<ir_version: 9, opset_import: ["" : 18, "local" : 1]>\n'
INPUTS = "(float[n,4] x, float[3,n,4] xs, bool q, int64 m)"
Names = set[str]


def between(
    text: str | ModelProto, kind: tuple[str, ...] = ("MatMul",)
) -> tuple[Names, Names]:
    """What is behind and what is before the operators of a kind, by first outputs."""
    proto = parser.parse_model(text) if isinstance(text, str) else text
    model = model_io.from_proto(proto)
    behind, before = flow.between(model, scopes(model), kind)
    return named(behind), named(before)


def named(nodes: set[ir.Node]) -> Names:
    names = {node.outputs[0].name or "" for node in nodes}
    assert len(names) == len(nodes)
    return names


def graph(body: str, initializers: str = "") -> str:
    return f"{HEADER}g {INPUTS} => (float y) <{initializers}> {{ {body} }}"


def test_a_chain() -> None:
    body = "a = Neg(x) b = MatMul(a, x) c = Exp(b) d = Abs(x) y = Add(c, d)"
    assert between(graph(body)) == ({"c", "y"}, {"a"})


def test_between_two_of_a_kind_is_before_and_behind_and_so_are_they() -> None:
    body = "a = Neg(x) b = MatMul(a, x) c = Exp(b) d = MatMul(c, x) y = Abs(d)"
    assert between(graph(body)) == ({"c", "d", "y"}, {"a", "b", "c"})


def test_no_node_of_the_kind_has_nothing_around_it() -> None:
    assert between(graph("a = Neg(x) y = Exp(a)")) == (set(), set())


def test_any_operator_of_several_kinds_counts_and_none_of_another_domain() -> None:
    body = "a = Neg(x) b = MatMul(a, x) c = Exp(b) e = Abs(c) y = Gemm(e, x)"
    found = between(graph(body), ("MatMul", "Gemm"))
    assert found == ({"c", "e", "y"}, {"a", "b", "c", "e"})
    assert between(graph("a = Neg(x) b = local.MatMul(a) y = Exp(b)")) == (set(), set())


def test_an_unsorted_graph_is_followed_as_well() -> None:
    proto = parser.parse_model(graph("a = Neg(x) b = MatMul(a, x) y = Exp(b)"))
    nodes = [*proto.graph.node][::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert between(proto) == ({"y"}, {"a"})


IF = """a = Neg(x) b = Abs(x)
o = If(q) <then_branch = t () => (float p) {{ {then} }},
           else_branch = e () => (float r) {{ {other} }}>
y = Exp(o)"""


@pytest.mark.parametrize(
    ("then", "other", "behind", "before"),
    [
        ("p = MatMul(a, b)", "r = Neg(b)", {"o", "y"}, {"a", "b"}),
        ("s = Neg(a) p = MatMul(s, x)", "r = Neg(b)", {"o", "y"}, {"s", "a"}),
        ("s = MatMul(a, x) p = Exp(s)", "r = Neg(b)", {"p", "o", "y"}, {"a"}),
        ("p = Neg(a)", "r = Neg(b)", set(), set()),
        ("p = Neg(a)", "s = MatMul(b, x) r = Exp(s)", {"r", "o", "y"}, {"b"}),
    ],
)
def test_a_branch_lies_between_what_it_captures_and_what_reads_its_if(
    then: str, other: str, behind: Names, before: Names
) -> None:
    assert between(graph(IF.format(then=then, other=other))) == (behind, before)


def test_what_is_made_before_an_if_is_before_what_is_behind_its_branches() -> None:
    body = IF.format(then="p = Neg(a)", other="r = Neg(x)") + " z = MatMul(y, x)"
    behind, before = between(graph(body))
    assert behind == set()
    assert before == {"a", "p", "r", "o", "y"}


def test_a_captured_value_makes_a_body_behind_it() -> None:
    body = "w = MatMul(x, x) " + IF.format(then="p = Neg(w)", other="r = Neg(a)")
    assert between(graph(body)) == ({"p", "o", "y"}, set())


LOOP = """a = Neg(x) b = Abs(x)
o, l = Loop(m, q, a, b) <body = lb (int64 i, bool c, float u, float v)
  => (bool d, float s, float t) {{ d = Identity(c) {body} }}>
y = Exp(o)"""


def test_the_body_of_a_loop_lies_between_what_the_loop_reads_and_what_reads_it() -> None:
    body = LOOP.format(body="k = MatMul(u, v) s = Sin(k) t = Cos(v)")
    behind, before = between(graph(body))
    assert {"s", "o", "y"} <= behind
    assert {"a", "b"} <= before
    assert not {"a", "b"} & behind
    assert "y" not in before


def test_the_body_of_a_loop_feeds_itself() -> None:
    body = LOOP.format(body="j = Sin(u) k = MatMul(j, v) s = Cos(k) t = Tan(v)")
    behind, before = between(graph(body))
    assert behind >= {"s", "j", "k", "o", "y"}
    assert before >= {"s", "j", "k", "a", "b"}


@pytest.mark.parametrize("operator", ["If", "Loop"])
def test_only_bodies_of_loops_feed_themselves(operator: str) -> None:
    then = "j = Sin(a) k = MatMul(j, b) p = Cos(k)"
    loop = LOOP.format(body="j = Sin(u) k = MatMul(j, v) s = Cos(k) t = Tan(v)")
    body = loop if operator == "Loop" else IF.format(then=then, other="r = Neg(b)")
    behind, _ = between(graph(body))
    assert ("j" in behind) == (operator == "Loop")


def test_the_body_of_a_scan_feeds_itself_and_reads_what_is_scanned() -> None:
    body = """a = Neg(x) b = Abs(xs)
o, l = Scan(a, b) <num_scan_inputs = 1, body = sb (float u, float v) => (float s, float t) {
  j = Sin(u) k = MatMul(j, v) s = Cos(k) t = Tan(v) }>
y = Exp(l)"""
    behind, before = between(graph(body))
    assert behind >= {"s", "j", "k", "o", "y"}
    assert not {"a", "b"} & behind
    assert before >= {"a", "b", "s", "j", "k"}
    assert "y" not in before


NEST = """a = Neg(x)
o = If(q) <then_branch = t () => (float p) {{
    h = Sin(a)
    p = If(q) <then_branch = tt () => (float pp) {{ {inner} }},
               else_branch = te () => (float pe) {{ pe = Cos(h) }}>
  }}, else_branch = e () => (float r) {{ r = Tan(x) }}>
y = Exp(o)"""


def test_nested_bodies_are_followed_to_the_outermost_graph() -> None:
    body = NEST.format(inner="k = MatMul(h, x) pp = Abs(k)")
    assert between(graph(body)) == ({"pp", "p", "o", "y"}, {"h", "a"})
    assert between(graph(NEST.format(inner="pp = Abs(h)"))) == (set(), set())


def test_an_input_of_an_outer_body_is_followed_from_an_inner_one() -> None:
    body = """a = Neg(x) b = Abs(x) e = Floor(x)
o = Loop(m, q, a) <body = ob (int64 i, bool c, float u) => (bool d, float s) {
  d = Identity(c)
  s = Loop(m, c, b) <body = ib (int64 ii, bool ic, float iu) => (bool id, float is) {
    id = Identity(ic)
    k = MatMul(u, iu)
    is = Sin(k)
  }>
}>
y = Exp(o) z = Ceil(e)"""
    behind, before = between(graph(body))
    assert {"a", "b", "s", "is", "k"} <= before
    assert {"is", "s", "o", "y", "k"} <= behind
    assert not {"e", "z", "y"} & before
    assert not {"e", "z", "a", "b"} & behind


def test_a_body_may_hand_its_input_on_as_it_is() -> None:
    body = """a = Neg(x)
o = Loop(m, q, a) <body = ob (int64 i, bool c, float u) => (bool c, float u) {
  k = MatMul(u, u)
}>
y = Exp(o)"""
    assert between(graph(body)) == (set(), {"a"})


def test_an_input_handed_from_loop_to_loop_is_followed() -> None:
    body = """a = Neg(x) e = Floor(x)
o, l = Loop(m, q, a, e) <body = ob (int64 i, bool c, float u, float v)
    => (bool d, float s, float t) {
  d = Identity(c)
  t = Identity(v)
  s = Loop(m, c, u) <body = ib (int64 ii, bool ic, float iu) => (bool id, float is) {
    id = Identity(ic)
    is = MatMul(iu, x)
  }>
}>
y = Exp(o)"""
    _, before = between(graph(body))
    assert "a" in before


def test_a_constant_of_a_body_is_fed_by_nothing() -> None:
    body = """a = Neg(x)
o = Loop(m, q, a) <body = ob (int64 i, bool c, float u) => (bool d, float s)
    <float[1] w = {1}> {
  d = Identity(c)
  s = If(c) <then_branch = t () => (float p) {
    p, pl = Scan(w, xs) <num_scan_inputs = 1, body = sb (float f, float g)
        => (float ff, float gg) { ff = MatMul(f, f) gg = Sin(g) }>
  }, else_branch = e () => (float r) { r = Cos(x) }>
}>
y = Exp(o)"""
    _, before = between(graph(body))
    assert "a" not in before


FUNCTION = (
    HEADER
    + """g (float[n,4] x) => (float y) {{ {body} }}
<domain: "local", opset_import: ["" : 18]> f (u, v) => (w) {{ {inside} }}"""
)


def test_the_body_of_a_function_lies_between_arguments_and_results_of_its_calls() -> None:
    text = FUNCTION.format(
        body="a = Neg(x) b = Abs(x) o = local.f(a, b) y = Exp(o) z = Sin(x)",
        inside="k = Cos(u) l = MatMul(k, k) w = Tan(l)",
    )
    behind, before = between(text)
    assert behind == {"w", "o", "y"}
    assert before == {"k", "a", "b"}


def test_a_product_behind_or_before_a_call_is_so_for_the_function() -> None:
    inside = "k = Cos(u) w = Add(k, v)"
    body = "a = Neg(x) o = local.f(a, a) y = MatMul(o, o)"
    behind, before = between(FUNCTION.format(body=body, inside=inside))
    assert (behind, before) == (set(), {"a", "o", "k", "w"})
    body = "a = MatMul(x, x) o = local.f(a, a) y = Neg(o)"
    behind, before = between(FUNCTION.format(body=body, inside=inside))
    assert (behind, before) == ({"o", "k", "w", "y"}, set())


def test_every_call_counts_also_one_in_a_body_and_one_in_a_function() -> None:
    text = f"""{HEADER}g {INPUTS} => (float y) {{
  a = Neg(x)
  o = If(q) <then_branch = t () => (float p) {{ p = local.h(a) }},
             else_branch = e () => (float r) {{ b = Abs(x) r = local.f(b) }}>
  y = Exp(o)
}}
<domain: "local", opset_import: ["" : 18, "local" : 1]> h (hu) => (hw) {{
  s = Sin(hu)
  hw = local.f(s)
}}
<domain: "local", opset_import: ["" : 18]> f (u) => (w) {{ w = MatMul(u, u) }}"""
    behind, before = between(text)
    assert before == {"s", "a", "b"}
    assert behind == {"hw", "p", "r", "o", "y"}


def test_a_function_that_nobody_calls_is_around_itself_only() -> None:
    inside = "k = Cos(u) l = MatMul(k, k) w = Tan(l)"
    behind, before = between(FUNCTION.format(body="a = Neg(x) y = Exp(a)", inside=inside))
    assert (behind, before) == ({"w"}, {"k"})


def test_overloads_are_functions_of_their_own() -> None:
    text = FUNCTION.format(body="a = Neg(x) y = local.f(a, a)", inside="w = MatMul(u, v)")
    proto = parser.parse_model(text)
    proto.ir_version = 10
    other = proto.functions.add()
    other.CopyFrom(proto.functions[0])
    other.overload, other.node[0].op_type, other.node[0].output[0] = "o", "Add", "ww"
    other.output[0] = "ww"
    call = helper.make_node("f", ["b", "b"], ["z"], domain="local", overload="o")
    proto.graph.node.extend([helper.make_node("Abs", ["x"], ["b"]), call])
    assert between(proto) == ({"y"}, {"a"})


def test_inputs_left_out_are_nothing() -> None:
    assert between(graph('a = Neg(x) b = Clip(a, "", "") y = MatMul(b, x)'))[1] == {"a", "b"}
