"""Edits of a graph: constants beside weights, their order, names handed on, dead nodes."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from onnxforge import model_io
from onnxforge.surgery import Surgery, take_over
from onnxforge.weights import Weight, Weights

HEADER = '<ir_version: 9, opset_import: ["" : 18, "local" : 1]>\n'
FUNCTION = """
<domain: "local", opset_import: ["" : 18]> f (u) => (o) {
  k = Constant<value = float[2] {1,2}>()
  o = Add(u, k)
}"""


def opened(body: str, initializers: str = "", outputs: str = "float y") -> ir.Model:
    text = f"{HEADER}g (float[2] x, bool q) => ({outputs}) <{initializers}> {{ {body} }}"
    return model_io.from_proto(parser.parse_model(text + FUNCTION))


def weight(weights: Weights, where: str) -> Weight:
    return next(weight for weight in weights if weight.where == where)


def made(graph: ir.Graph) -> list[str]:
    """First outputs of the nodes, in order."""
    return [node.outputs[0].name or "" for node in graph]


def named(of: ir.Model, name: str) -> ir.Value:
    found = [v for node in of.graph.all_nodes() for v in node.outputs if v.name == name]
    return (found or [of.graph.initializers[name]])[0]


PAIR = "float[2] a = {1,2}, float[2] b = {3,4}, float[2] c = {5,6}"
SUM = "s = Add(a, b) y = Add(s, c)"
ONE = np.array([[1, 2, 3]], np.float32)


# --- constants -----------------------------------------------------------------------------


def test_a_constant_beside_an_initializer_is_one_with_its_content() -> None:
    of = opened(SUM, PAIR)
    weights = Weights(of)
    surgery = Surgery(weights)
    value = surgery.constant(weight(weights, "a"), "a_scale", ONE)
    assert of.graph.initializers["a_scale"] is value
    assert value.const_value is not None
    assert np.array_equal(value.const_value.numpy(), ONE)
    assert (value.dtype, value.shape) == (ir.DataType.FLOAT, ir.Shape((1, 3)))
    assert value.const_value.name == "a_scale"
    assert made(of.graph) == ["s", "y"]


def test_a_constant_beside_a_constant_node_is_a_node_behind_it() -> None:
    of = opened("k = Constant<value = float[2] {1,2}>() s = Neg(x) y = Add(s, k)")
    weights = Weights(of)
    surgery = Surgery(weights)
    beside = weight(weights, "k")
    values = [surgery.constant(beside, name, ONE) for name in ("k_scale", "k_zero")]
    assert made(of.graph) == ["k", "k_scale", "k_zero", "s", "y"]
    assert len(of.graph.initializers) == 0
    node = values[0].producer()
    assert node is not None
    assert node.op_type == "Constant"
    assert np.array_equal(node.attributes["value"].as_tensor().numpy(), ONE)
    assert (values[0].dtype, values[0].shape) == (ir.DataType.FLOAT, ir.Shape((1, 3)))
    assert [w.where for w in Weights(of)] == ["k", "k_scale", "k_zero", "local::f/k"]


def test_a_constant_in_a_body_or_a_function_stays_in_it() -> None:
    body = """y = If(q) <
        then_branch = t () => (float p) <float[2] w = {1,2}> { p = Add(x, w) },
        else_branch = e () => (float r) { r = local.f(x) }>"""
    of = opened(body)
    weights = Weights(of)
    surgery = Surgery(weights)
    for where in ("If#0/then_branch/w", "local::f/k"):
        surgery.constant(weight(weights, where), "scale", ONE)
    surgery.settle()
    assert {w.where for w in Weights(of)} == {
        "If#0/then_branch/w",
        "If#0/then_branch/scale",
        "local::f/k",
        "local::f/scale_1",
    }


def test_names_that_are_taken_are_not_given() -> None:
    of = opened(
        "a_scale = Neg(a) y = If(q) <then_branch = t () => (float p)"
        " { a_scale_1 = Neg(a_scale) p = Add(a_scale_1, x) },"
        " else_branch = e () => (float r) { r = Neg(a_scale) }>",
        "float[2] a = {1,2}",
    )
    next(iter(of.graph)).name = "a_scale_2"
    weights = Weights(of)
    surgery = Surgery(weights)
    values = [surgery.constant(weight(weights, "a"), "a_scale", ONE) for _ in range(2)]
    assert [value.name for value in values] == ["a_scale_3", "a_scale_4"]
    assert [tensor.name for tensor in (v.const_value for v in values) if tensor] == [
        "a_scale_3",
        "a_scale_4",
    ]
    node = surgery.node("Neg", values[:1], "out", ir.DataType.FLOAT)
    again = surgery.node("Neg", values[:1], "other", ir.DataType.FLOAT, {"axis": 3})
    assert (node.name, again.name) == ("out_Neg", "other_Neg")
    assert node.graph is None
    assert again.attributes["axis"].as_int() == 3
    assert surgery.node("Neg", [], "out", ir.DataType.FLOAT).name == "out_Neg_1"


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_after_settling_companions_stand_behind_their_weight_in_any_order(
    order: tuple[str, ...],
) -> None:
    of = opened(SUM, PAIR)
    weights = Weights(of)
    surgery = Surgery(weights)
    for name in order:
        for word in ("scale", "zero"):
            surgery.constant(weight(weights, name), f"{name}_{word}", ONE)
    assert list(of.graph.initializers)[:3] == ["a", "b", "c"]
    before = dict(of.graph.initializers)
    surgery.settle()
    wanted = [f"{name}{word}" for name in "abc" for word in ("", "_scale", "_zero")]
    assert list(of.graph.initializers) == wanted
    assert all(of.graph.initializers[name] is value for name, value in before.items())
    assert all(value.is_initializer() for value in before.values())
    surgery.settle()
    assert list(of.graph.initializers) == wanted


def test_two_surgeries_one_after_the_other_keep_that_order() -> None:
    orders = []
    for names in ("ab", "ba"):
        of = opened(SUM, PAIR)
        for name in names:
            weights = Weights(of)
            surgery = Surgery(weights)
            surgery.constant(weight(weights, name), f"{name}_scale", ONE)
            surgery.settle()
        orders.append(list(of.graph.initializers))
    assert orders[0] == orders[1] == ["a", "a_scale", "b", "b_scale", "c"]


# --- taking over ---------------------------------------------------------------------------


def replaced(of: ir.Model, name: str) -> tuple[ir.Value, ir.Value]:
    """A value and a new one that has taken its place; the new one is twice the old."""
    old = named(of, name)
    new = ir.Value(name="new", type=ir.TensorType(ir.DataType.INT32))
    producer = old.producer()
    assert producer is not None
    assert producer.graph is not None
    node = ir.node("Add", [producer.inputs[0], producer.inputs[0]], outputs=[new])
    producer.graph.insert_after(producer, node)
    take_over(old, new)
    return old, new


def test_readers_name_type_and_remarks_go_to_the_new_value() -> None:
    of = opened("a = Neg(x) b = Exp(a) y = Add(a, b)")
    old = named(of, "a")
    old.type, old.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((2,))
    old.doc_string = "said"
    old.metadata_props["key"], old.meta["mine"] = "value", 5
    before, new = replaced(of, "a")
    assert before is old
    assert (new.name, old.name) == ("a", None)
    assert [use.node.op_type for use in new.uses()] == ["Exp", "Add"]
    assert not old.uses()
    assert (new.dtype, new.shape) == (ir.DataType.FLOAT, ir.Shape((2,)))
    assert new.shape is not old.shape
    assert (new.doc_string, old.doc_string) == ("said", None)
    assert (new.metadata_props, dict(old.metadata_props)) == ({"key": "value"}, {})
    assert (dict(new.meta), dict(old.meta)) == ({"mine": 5}, {})


def test_an_unknown_shape_stays_unknown() -> None:
    of = opened("a = Neg(x) y = Exp(a)")
    named(of, "a").shape = None
    _, new = replaced(of, "a")
    assert new.shape is None


def test_an_output_of_the_graph_is_taken_over_with_its_name() -> None:
    of = opened("a = Neg(x) y = Exp(a)", outputs="float[2] y, float[2] a")
    old, new = replaced(of, "a")
    assert [value.name for value in of.graph.outputs] == ["y", "a"]
    assert of.graph.outputs[1] is new
    assert new.is_graph_output()
    assert not old.is_graph_output()
    replaced(of, "y")
    assert [value.name for value in of.graph.outputs] == ["y", "a"]
    proto = ir.to_proto(of)
    assert [value.name for value in proto.graph.output] == ["y", "a"]


def test_readers_in_a_body_and_the_output_of_a_body_are_taken_over() -> None:
    of = opened(
        """a = Neg(x)
        y = If(q) <then_branch = t () => (float p) { p = Exp(a) },
                   else_branch = e () => (float r) { r = Abs(a) }>"""
    )
    _, new = replaced(of, "a")
    assert sorted(use.node.op_type for use in new.uses()) == ["Abs", "Exp"]
    _, inner = replaced(of, "p")
    branch = named(of, "y").producer().attributes["then_branch"].as_graph()  # type: ignore[union-attr]
    assert branch.outputs[0] is inner
    assert inner.name == "p"


# --- dead nodes ----------------------------------------------------------------------------


def dropped(of: ir.Model, *names: str) -> list[str]:
    """The nodes that are left after these were offered, by their outputs."""
    surgery = Surgery(Weights(of))
    nodes = [named(of, name).producer() for name in names]
    surgery.drop_dead([node for node in nodes if node is not None])
    return made(of.graph)


def test_nodes_that_nobody_reads_are_removed_the_last_first() -> None:
    assert dropped(opened("a = Neg(x) b = Exp(a) y = Abs(x)"), "a", "b") == ["y"]
    assert dropped(opened("a = Neg(x) b = Exp(a) y = Abs(x)"), "b", "a") == ["a", "y"]
    assert dropped(opened("a = Neg(x) b = Exp(a) y = Abs(x)"), "a", "b", "a") == ["y"]
    assert dropped(opened("a = Neg(x) y = Abs(x)"), "a", "a") == ["y"]


def test_what_is_read_or_an_output_stays() -> None:
    assert dropped(opened("a = Neg(x) b = Exp(a) y = Abs(b)"), "a", "b", "y") == [
        "a",
        "b",
        "y",
    ]
    of = opened("a = Neg(x) b = Exp(a) y = Abs(x)", outputs="float y, float b")
    assert dropped(of, "a", "b") == ["a", "b", "y"]


def test_what_only_a_body_reads_stays() -> None:
    body = """a = Neg(x) b = Exp(x)
    y = If(q) <then_branch = t () => (float p) { p = Exp(a) },
               else_branch = e () => (float r) { r = Abs(x) }>"""
    assert dropped(opened(body), "a", "b") == ["a", "y"]


def test_a_node_is_not_removed_for_one_of_its_outputs() -> None:
    body = "a, b = Split<num_outputs=2>(x) y = Abs(b)"
    assert dropped(opened(body), "a") == ["a", "y"]
    assert dropped(opened("a, b = Split<num_outputs=2>(x) y = Abs(x)"), "a") == ["y"]


def test_a_node_in_a_body_is_removed_from_the_body() -> None:
    of = opened(
        """y = If(q) <then_branch = t () => (float p) { u = Neg(x) p = Exp(x) },
                      else_branch = e () => (float r) { r = Abs(x) }>"""
    )
    dropped(of, "u")
    branch = of.graph[0].attributes["then_branch"].as_graph()
    assert made(branch) == ["p"]
    assert made(of.graph) == ["y"]
