"""Types of values: as onnx infers them, in bodies and functions too."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from onnxforge import load
from onnxforge.elements import Elements, signature
from onnxforge.model_io import from_proto
from onnxforge.walk import scopes
from support import fixtures, halves


def found(model: ir.Model) -> dict[str, int]:
    """Type of each value of the main graph and its bodies, all that was declared forgotten."""
    everything = list(scopes(model))
    for scope in everything:
        for node in scope.graph:
            for value in node.outputs:
                value.type = None
    elements = Elements(model, everything)
    return {
        value.name or "": type_.dtype.value
        for scope in everything
        if scope.function is None
        for node in scope.graph
        for value in node.outputs
        if isinstance(type_ := elements.type(value), ir.TensorType)
    }


@pytest.mark.parametrize(
    "name", ["speech_encoder", "merged_decoder", "old_opset_11", "old_opset_13", "int8_places"]
)
def test_types_follow_as_onnx_infers_them(name: str) -> None:
    expected = halves.types(onnx.load(fixtures.built(name)))
    types = found(load(fixtures.built(name)))
    assert len(types) > 5
    assert {k: v for k, v in types.items() if k in expected and expected[k] != v} == {}
    assert expected.keys() - types.keys() <= halves.constants(onnx.load(fixtures.built(name)))


def test_types_of_unsorted_nodes_bodies_and_functions() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
    m (float[n] x, int64[n] i, bool c) => (float[n] y, int64[n] j) {
        y = If(c) <then_branch = t () => (u) { u = own.twice(x) },
                   else_branch = e () => (v) { v = Neg(x) }>
        k = own.same(i) j = Identity(k) }
    <domain: "own", opset_import: ["" : 17]> twice (z) => (r) { k = Add(z, z) r = Neg(k) }
    <domain: "own", opset_import: ["" : 17]> same (z) => (r) { r = Identity(z) }"""
    proto = halves.parsed(text)
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    types = found(from_proto(proto))
    assert types == {"y": 1, "k": 7, "j": 7, "u": 1, "v": 1}


def test_a_function_called_with_other_types_is_mixed_and_what_it_calls() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
    m (float[n] x, int64[n] i) => (y, j) { y = own.twice(x) j = own.twice(i) }
    <domain: "own", opset_import: ["" : 17, "own" : 1]> twice (z) => (r) { r = own.same(z) }
    <domain: "own", opset_import: ["" : 17]> same (z) => (r) { r = Identity(z) }"""
    model = from_proto(halves.parsed(text))
    elements = Elements(model, list(scopes(model)))
    assert {name for _, name, _ in elements.mixed} == {"twice", "same"}


def test_signatures_know_what_a_version_takes() -> None:
    def takes(op_type: str, version: int, dtype: ir.DataType) -> bool:
        found = signature(ir.node(op_type, []), version)
        assert found is not None
        return found.allows(found.of_input(0), dtype)

    assert takes("Conv", 22, ir.DataType.BFLOAT16)
    assert not takes("Conv", 21, ir.DataType.BFLOAT16)
    assert takes("Concat", 17, ir.DataType.FLOAT16)
    assert signature(ir.node("Gelu", [], domain="com.microsoft"), 20) is None
    assert signature(ir.node("NoSuchOperator", []), 20) is None
