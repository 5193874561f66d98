from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from onnxforge import PassManager, laws, load
from onnxforge.errors import Refused
from onnxforge.fidelity import difference
from onnxforge.passes.tidy import TidyPass
from support import faultless, oracle

HEAD = '<ir_version: 9, opset_import: ["" : 20]> g '


def tidied(text: str | onnx.ModelProto, **options: bool) -> onnx.ModelProto:
    proto = parser.parse_model(HEAD + text) if isinstance(text, str) else text
    result, _ = TidyPass(**options).apply(proto)
    assert isinstance(result, onnx.ModelProto)
    return result


# Example.


def test_removes_chains_of_what_nobody_reads() -> None:
    result = tidied(
        """(float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}, float[4] spare = {1,2,3,4}> {
          dead = Mul(x, w)
          dead_too = Relu(dead)
          y = Neg(x)
        }"""
    )
    assert [node.op_type for node in result.graph.node] == ["Neg"]
    assert len(result.graph.initializer) == 0


def test_sorts_nodes_and_keeps_a_good_order() -> None:
    result = tidied(
        """(float[4] x) => (float[4] y) {
          y = Add(b, a)
          b = Neg(x)
          a = Relu(x)
        }"""
    )
    assert [node.output[0] for node in result.graph.node] == ["b", "a", "y"]
    same = "(float[4] x) => (float[4] y) { b = Neg(x) a = Relu(x) y = Add(a, b) }"
    assert difference(tidied(same), parser.parse_model(HEAD + same)) is None


def test_without_sorting_the_order_stays() -> None:
    text = "(float[4] x) => (float[4] y) { y = Neg(a) a = Relu(x) }"
    assert difference(tidied(text, sort=False), parser.parse_model(HEAD + text)) is None


def branches(then: list[onnx.NodeProto], **more: object) -> onnx.ModelProto:
    out = faultless.value("t", [4])
    yes = helper.make_graph(then, "yes", [], [out])
    no = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["e"])], "no", [], [faultless.value("e", [4])]
    )
    nodes = [
        helper.make_node("Neg", ["x"], ["outer"]),
        helper.make_node("If", ["c"], ["r"], then_branch=yes, else_branch=no),
        helper.make_node("Identity", ["x" if more.get("dead") else "r"], ["y"]),
    ]
    c = faultless.value("c", [], onnx.TensorProto.BOOL)
    return faultless.model(nodes, [faultless.value("x", [4]), c], [faultless.value("y", [4])])


def test_what_a_body_reads_or_gives_out_stays() -> None:
    reads = branches([helper.make_node("Relu", ["outer"], ["t"])])
    assert [n.op_type for n in tidied(reads).graph.node] == ["Neg", "If", "Identity"]
    gives = branches([])
    gives.graph.node[1].attribute[0].g.output[0].name = "outer"
    assert [n.op_type for n in tidied(gives).graph.node] == ["Neg", "If", "Identity"]


def test_a_dead_body_takes_with_it_what_only_it_read() -> None:
    weight = numpy_helper.from_array(np.ones(4, np.float32))
    inner = [
        helper.make_node("Constant", [], ["k"], value=weight),
        helper.make_node("Mul", ["outer", "k"], ["t"]),
    ]
    model = branches(inner, dead=True)
    result, report = PassManager("tidy").apply(model)
    assert [n.op_type for n in result.graph.node] == ["Identity"]
    assert [f.code for f in report.passes[0].findings] == ["OF281"]


def test_an_initializer_that_is_an_input_stays() -> None:
    model = faultless.model(
        [helper.make_node("Neg", ["x"], ["y"])],
        [faultless.value("x", [4]), faultless.value("w", [4])],
        [faultless.value("y", [4])],
        {"w": np.ones(4, np.float32)},
    )
    assert tidied(model) == model


def test_a_parameter_of_a_quantization_annotation_stays() -> None:
    model = faultless.model(
        [helper.make_node("Neg", ["x"], ["y"])],
        [faultless.value("x", [4])],
        [faultless.value("y", [4])],
        {"scale": np.ones(1, np.float32)},
    )
    note = model.graph.quantization_annotation.add(tensor_name="x")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    assert len(tidied(model).graph.initializer) == 1


def test_an_order_that_hangs_on_what_a_body_gives_out_is_refused() -> None:
    gives = branches([])
    gives.graph.node[1].attribute[0].g.output[0].name = "outer"
    nodes = [gives.graph.node[i] for i in (1, 2, 0)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del gives.graph.node[:]
    gives.graph.node.extend(copies)
    with pytest.raises(Refused, match="cannot be sorted"):
        tidied(gives)


# Bytes.


def test_what_is_left_has_the_same_bytes(tmp_path: Path) -> None:
    proto = faultless.editor()
    spare = numpy_helper.from_array(faultless.random(1, 64, 64), "spare")
    proto.graph.initializer.append(spare)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    path.write_bytes(proto.SerializeToString())
    PassManager("tidy").run(path, out)
    before, after = (dict(laws.payloads(load(p))) for p in (path, out))
    assert before.keys() - after.keys() == {"spare"}
    assert {name: before[name] for name in after} == after


# Properties.


@given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
def test_any_order_of_any_chain_computes_the_same(order: list[int], dead: set[int]) -> None:
    names = ["x", "a", "b", "c", "d", "e", "y"]
    ops = ["Neg", "Relu", "Abs", "Tanh", "Exp", "Neg"]
    chain = [helper.make_node(op, [names[i]], [names[i + 1]]) for i, op in enumerate(ops)]
    nodes = [chain[i] for i in order]
    nodes += [helper.make_node("Neg", [names[i]], [f"dead{i}"]) for i in sorted(dead)]
    ports = [faultless.value("x", [3])], [faultless.value("y", [3])]
    result = tidied(faultless.model(nodes, *ports))
    onnx.checker.check_model(result, full_check=True)
    assert [node.output[0] for node in result.graph.node] == names[1:]
    x = np.array([-1.5, 0.25, 2], np.float32)
    expected = oracle.run(faultless.model(chain, *ports), {"x": x})
    assert oracle.run(result, {"x": x})["y"].tobytes() == expected["y"].tobytes()


def test_an_onnx_ir_model_is_changed_in_place() -> None:
    model = ir.serde.deserialize_model(faultless.editor())
    again, _ = TidyPass().apply(model)
    assert again is model
