"""What could get lost on the way through onnx_ir and into other files, and does not."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxforge import PassManager, model_io, saving
from onnxforge.errors import ModelError
from onnxforge.fidelity import difference
from support import fixtures, oracle, payload

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


def info(name, *shape):
    return helper.make_tensor_value_info(name, 1, shape)


def everything():
    weight = numpy_helper.from_array(np.ones(512, np.float32), "w")
    node = helper.make_node("Twice", ["x"], ["y"], "n", domain="local", a=1)
    graph = helper.make_graph([node], "g", [info("x", 4)], [info("y", 4)], [weight])
    body = [helper.make_node("Add", ["u", "u"], ["v"])]
    function = helper.make_function("local", "Twice", ["u"], ["v"], body, OPSETS[:1])
    return helper.make_model(graph, functions=[function], opset_imports=OPSETS, ir_version=9)


@pytest.mark.parametrize(
    "place",
    [
        "model",
        "graph",
        "node",
        "initializer",
        "input",
        "opset_import",
        "attribute",
        "function",
    ],
)
@pytest.mark.parametrize("way", ["proto", "file"])
def test_a_model_with_fields_of_a_newer_onnx_is_refused(tmp_path, place, way):
    model = everything()
    message = {
        "model": model,
        "graph": model.graph,
        "node": model.graph.node[0],
        "initializer": model.graph.initializer[0],
        "input": model.graph.input[0],
        "opset_import": model.opset_import[0],
        "attribute": model.graph.node[0].attribute[0],
        "function": model.functions[0],
    }[place]
    message.MergeFromString(b"\xfa\x3f\x08from_new")  # field 1023
    path = tmp_path / "a.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="without loss"):
        model_io.from_proto(model) if way == "proto" else model_io.load(path)


def test_a_large_default_of_a_function_survives(tmp_path):
    model = everything()
    large = numpy_helper.from_array(np.arange(512, dtype=np.float32))
    model.functions[0].attribute_proto.append(helper.make_attribute("table", large))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    saving.save(model_io.load(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert difference(model, onnx.load(tmp_path / "b.onnx", load_external_data=False)) is None


def test_data_files_of_training_graphs_do_not_get_lost(tmp_path):
    model = everything()
    training = model.training_info.add()
    state = TensorProto(name="t", data_type=1, dims=[512], data_location=1)
    state.external_data.add(key="location", value="state.bin")
    training.algorithm.initializer.append(state)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "state.bin").write_bytes(bytes(2048))
    (tmp_path / "source" / "a.onnx").write_bytes(model.SerializeToString())
    try:
        saving.save(model_io.load(tmp_path / "source" / "a.onnx"), tmp_path / "b.onnx")
    except ModelError:
        return
    again = onnx.load(tmp_path / "b.onnx", load_external_data=False)
    kept = again.training_info[0].algorithm.initializer[0]
    for entry in kept.external_data:
        if entry.key == "location":
            assert (tmp_path / entry.value).exists()


@pytest.mark.parametrize("name", fixtures.names())
def test_a_proto_of_a_loaded_file_is_equal(name):
    path = fixtures.built(name)
    again = model_io.to_proto(model_io.load(path))
    assert difference(onnx.load(path, load_external_data=False), again) is None


def test_a_remark_put_back_does_not_double_one_that_is_there():
    nodes = [helper.make_node("Neg", ["x"], ["z"]), helper.make_node("Neg", ["z"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [info("x", 1)], [info("y", 1)], value_info=[info("gone", 1)]
    )
    model = model_io.from_proto(
        helper.make_model(graph, opset_imports=OPSETS[:1], ir_version=9)
    )
    value = model.graph[0].outputs[0]
    value.name, value.type, value.shape = (
        "gone",
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape([1]),
    )
    assert [v.name for v in model_io.to_proto(model).graph.value_info] == ["gone"]


def scalar_and_unranked(model):
    model.graph.output[0].type.tensor_type.ClearField("shape")


def test_a_scalar_is_not_a_tensor_of_unknown_rank():
    a, b = everything(), everything()
    for model in (a, b):
        model.graph.output[0].type.tensor_type.ClearField("shape")
    b.graph.output[0].type.tensor_type.shape.SetInParent()
    assert difference(a, b) is not None


def test_a_dimension_of_zero_is_not_an_unknown_one():
    a, b = everything(), everything()
    a.graph.output[0].type.tensor_type.shape.dim[0].Clear()
    b.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 0
    assert difference(a, b) is not None


def test_the_sign_of_zero_is_a_difference():
    a, b = everything(), everything()
    for model, value in ((a, 0.0), (b, -0.0)):
        model.graph.node[0].attribute.append(helper.make_attribute("f", value))
        model.graph.node[0].attribute.append(helper.make_attribute("fs", [1.0, value]))
    assert difference(a, b) is not None


def test_an_import_of_ai_onnx_is_one_of_the_main_domain():
    a, b = everything(), everything()
    b.opset_import[0].domain = "ai.onnx"
    assert difference(a, b) is None


def splitting(*nodes, functions=()):
    sizes = numpy_helper.from_array(np.ones(200, np.int64), "sizes")
    graph = helper.make_graph(list(nodes), "g", [info("x", 200)], [info("s0", 1)], [sizes])
    return helper.make_model(graph, functions=functions, opset_imports=OPSETS, ir_version=9)


def through_identity():
    return splitting(
        helper.make_node("Identity", ["sizes"], ["same"]),
        helper.make_node("Split", ["x", "same"], [f"s{i}" for i in range(200)]),
    )


def in_a_function():
    body = [helper.make_node("Split", ["u", "n"], [f"v{i}" for i in range(200)])]
    function = helper.make_function("local", "F", ["u", "n"], ["v0"], body, OPSETS[:1])
    return splitting(
        helper.make_node("F", ["x", "sizes"], ["s0"], domain="local"), functions=[function]
    )


@pytest.mark.parametrize("made", [through_identity, in_a_function])
def test_what_a_shape_depends_on_indirectly_stays_inside(tmp_path, made):
    (tmp_path / "a.onnx").write_bytes(made().SerializeToString())
    sample = {"x": np.arange(200, dtype=np.float32)}
    expected = oracle.run(tmp_path / "a.onnx", sample)
    saving.save(model_io.load(tmp_path / "a.onnx"), tmp_path / "b.onnx", layout="sidecar")
    oracle.assert_bit_equal(oracle.run(tmp_path / "b.onnx", sample), expected)


def test_data_of_the_input_are_never_overwritten(tmp_path):
    weight = TensorProto(name="w", data_type=1, dims=[512], data_location=1)
    for key, value in (("location", "b.onnx_data"), ("offset", "64")):
        weight.external_data.add(key=key, value=value)
    data = bytes(64) + np.arange(512, dtype=np.float32).tobytes()
    (tmp_path / "b.onnx_data").write_bytes(data)
    source = tmp_path / "a.onnx"
    graph = helper.make_graph([], "g", [], [], [weight])
    source.write_bytes(helper.make_model(graph, ir_version=9).SerializeToString())
    before = payload.tensor_digests(source)
    with pytest.raises(ModelError, match=r"b\.onnx_data"):
        saving.save(model_io.load(source), tmp_path / "b.onnx", force=True)
    assert payload.tensor_digests(source) == before


HEADER = '<ir_version: 8, opset_import: ["" : 17]> '


def captured(condition: str, user: str) -> onnx.ModelProto:
    """A weight that a branch reads, whose type the branch remarks on as well."""
    model = onnx.parser.parse_model(
        HEADER
        + f"""g (float[n,2] x) => (float[n,2] y)
        <float[2,2] w = {{1.0, 2.0, 3.0, 4.0}}> {{
            b = Constant<value = bool {{{condition}}}>()
            y = If (b) <
                then_branch = one () => (float[n,2] p) {{ {user} }},
                else_branch = two () => (float[n,2] q) {{ q = Neg(x) }}
            >
        }}"""
    )
    info_of_w = helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2])
    model.graph.node[-1].attribute[0].g.value_info.append(info_of_w)
    return model


@pytest.mark.parametrize("user", ["p = MatMul(x, w)", "i = Cast<to=7>(x) p = MatMul(x, w)"])
def test_remarks_on_a_captured_weight_follow_its_type(user):
    model = captured("1", user)
    tier, _ = PassManager("fp16w{min_bytes=0}").apply(model)
    (remark,) = tier.graph.node[-1].attribute[0].g.value_info[-1:]
    assert (remark.name, remark.type.tensor_type.elem_type) == ("w", TensorProto.FLOAT16)
    inputs = {"x": np.ones((3, 2), np.float32)}
    oracle.assert_bit_equal(oracle.run(tier, inputs), oracle.run(model, inputs))


def test_a_data_file_that_another_model_reads_is_not_replaced(tmp_path):
    source = fixtures.copied("external_one", tmp_path)
    (tmp_path / "other.onnx").write_bytes(source.read_bytes())
    before = payload.tensor_digests(tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"holds data of .*other\.onnx as well"):
        PassManager("fp16w{min_bytes=0}").run(source, source, force=True)
    assert payload.tensor_digests(tmp_path / "other.onnx") == before
    assert payload.tensor_digests(source) == before


def test_small_external_tensors_of_an_ir_model_are_saved(tmp_path):
    values = numpy_helper.from_array(np.ones(32, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [info("x", 32)],
        [info("y", 32)],
        [values],
    )
    model = helper.make_model(graph, opset_imports=OPSETS[:1], ir_version=8)
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, size_threshold=0)
    (tmp_path / "to").mkdir()
    saving.save(ir.load(tmp_path / "a.onnx"), tmp_path / "to" / "b.onnx")
    found = onnx.load(tmp_path / "to" / "b.onnx")
    assert numpy_helper.to_array(found.graph.initializer[0]).tolist() == [1] * 32


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_regular_file_is_never_replaced(tmp_path, force):
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ModelError, match="not a regular file"):
        saving.save(
            model_io.load(fixtures.built("nameless")), tmp_path / "pipe.onnx", force=force
        )


def test_a_dangling_link_counts_as_taken(tmp_path):
    (tmp_path / "link.onnx").symlink_to("nowhere.onnx")
    with pytest.raises(ModelError, match="exists; --force"):
        saving.save(model_io.load(fixtures.built("nameless")), tmp_path / "link.onnx")
