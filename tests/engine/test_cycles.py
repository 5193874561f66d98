"""Graphs and functions that would never end are refused, all others are left alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import GraphProto, NodeProto, TensorProto, helper

from onnxforge import model_io
from onnxforge.errors import ModelError

Reads = list[list[int]]
"""What each node reads: numbers of nodes."""

reads = st.integers(1, 7).flatmap(
    lambda count: st.lists(
        st.lists(st.integers(0, count - 1), max_size=2), min_size=count, max_size=count
    )
)
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


def on_cycles(found: Reads) -> set[int]:
    """Nodes that are reached from themselves, by the definition."""

    def reached(start: int) -> set[int]:
        seen: set[int] = set()
        pending = list(found[start])
        while pending:
            at = pending.pop()
            if at not in seen:
                seen.add(at)
                pending += found[at]
        return seen

    return {i for i in range(len(found)) if i in reached(i)}


def body(nodes: Sequence[NodeProto], name: str) -> GraphProto:
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [output])


def node(i: int, found: Reads, depth: int) -> NodeProto:
    """Node i; at a depth, it reads what it reads inside of so many bodies."""
    inputs = [f"v{j}" for j in found[i]]
    if not depth:
        return helper.make_node("Sum", inputs, [f"v{i}"], f"n{i}")
    inner = helper.make_node("Sum", inputs, [f"inner{i}"], f"inner{i}")
    for level in range(depth):
        output = f"v{i}" if level == depth - 1 else f"level{i}_{level}"
        branches = {f"{b}_branch": body([inner], b) for b in ("then", "else")}
        inner = helper.make_node("If", ["flag"], [output], f"n{i}", **branches)
    return inner


def load(nodes: Sequence[NodeProto], functions: Sequence[onnx.FunctionProto] = ()) -> None:
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "g", [flag], [])
    model = helper.make_model(
        graph, functions=list(functions), opset_imports=OPSETS, ir_version=9
    )
    model_io.from_proto(model)


@given(reads, st.data())
def test_a_graph_is_refused_if_and_only_if_it_has_a_cycle(
    found: Reads, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(found))))
    depths = data.draw(st.lists(st.integers(0, 2), min_size=len(found), max_size=len(found)))
    nodes = [node(i, found, depths[i]) for i in order]
    on = on_cycles(found)
    if not on:
        load(nodes)
        return
    with pytest.raises(ModelError, match="needs its own result") as raised:
        load(nodes)
    (name,) = re.findall(r"node '(?:n|.*inner)(\d+)", str(raised.value))
    assert int(name) in on


@given(reads)
def test_functions_are_refused_if_and_only_if_they_call_themselves(found: Reads) -> None:
    functions = [
        helper.make_function(
            "local",
            f"f{i}",
            ["x"],
            ["y"],
            [
                *(
                    helper.make_node(f"f{j}", ["x"], [f"c{k}"], domain="local")
                    for k, j in enumerate(called)
                ),
                helper.make_node("Neg", ["x"], ["y"]),
            ],
            OPSETS,
        )
        for i, called in enumerate(found)
    ]
    on = on_cycles(found)
    if not on:
        load([], functions)
        return
    with pytest.raises(ModelError, match="calls itself") as raised:
        load([], functions)
    (name,) = re.findall(r"'local::f(\d+)'", str(raised.value))
    assert int(name) in on


def test_length_costs_no_depth() -> None:
    found = [[i - 1] for i in range(20_000)]
    found[0] = []
    load([node(i, found, 0) for i in reversed(range(len(found)))])
    found[0] = [len(found) - 1]
    with pytest.raises(ModelError, match=r"node 'n\d+': needs its own result"):
        load([node(i, found, 0) for i in range(len(found))])


def test_what_only_hangs_on_a_cycle_is_not_named() -> None:
    found = [[1], [0], [1], [2]]
    for order in ([3, 2, 1, 0], [2, 3, 0, 1]):
        with pytest.raises(ModelError, match=r"node 'n[01]': needs its own result"):
            load([node(i, found, 0) for i in order])


def test_functions_may_come_to_many_nodes_but_not_to_any_number() -> None:
    def doubling(levels: int) -> list[onnx.FunctionProto]:
        base = [helper.make_node("Neg", ["x"], ["y"])]
        functions = [helper.make_function("local", "f0", ["x"], ["y"], base, OPSETS)]
        for i in range(levels):
            calls = [
                helper.make_node(f"f{i}", [a], [b], domain="local") for a, b in ("xa", "ay")
            ]
            name = f"f{i + 1}"
            functions.append(helper.make_function("local", name, ["x"], ["y"], calls, OPSETS))
        return functions

    load([], doubling(19))
    with pytest.raises(ModelError, match=r"'local::f20': comes to 1048576 nodes"):
        load([], doubling(60))
