"""What could get lost on the way through onnx_ir and into other files, and does not."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, TypeProto, helper, numpy_helper

from onnxforge import PassManager, model_io, saving
from onnxforge.errors import ModelError
from onnxforge.fidelity import difference
from support import fixtures, oracle, payload, protos, unchanged

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
Change = Callable[[ModelProto], object]


def info(name, *shape):
    return helper.make_tensor_value_info(name, 1, shape)


def everything() -> ModelProto:
    """A model with a place for each of the losses below."""
    large = numpy_helper.from_array(np.ones(512, np.float32), "large")
    small = numpy_helper.from_array(np.ones(1, np.float32), "small")
    words = helper.make_tensor("words", TensorProto.STRING, [1], ["word"])
    negated = helper.make_node("Neg", ["x"], ["b"])
    branch = helper.make_graph([negated], "b", [], [info("b", 4)])
    nodes = [
        helper.make_node("Twice", ["x"], ["t"], "call", domain="local", ints=[1, 2]),
        helper.make_node("Constant", [], ["held"], "held", value=large),
        helper.make_node("If", ["c"], ["i"], "if", then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["t", "small"], ["y"], "add"),
    ]
    inputs = [info("x", 4), helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    weights = [large, small, words]
    graph = helper.make_graph(
        nodes, "g", inputs, [info("y", 4)], weights, value_info=[info("t", 4)]
    )
    body = [helper.make_node("Add", ["u", "u"], ["v"], "double")]
    function = helper.make_function("local", "Twice", ["u"], ["v"], body, OPSETS[:1], ["ints"])
    return helper.make_model(graph, functions=[function], opset_imports=OPSETS, ir_version=10)


def at(message, path=""):
    """The part of a message that a path such as ``graph.node.0`` leads to."""
    for word in path.split(".") if path else ():
        message = message[int(word)] if word.isdigit() else getattr(message, word)
    return message


def noted(path="") -> Change:
    """Put metadata on a part, in an order that no sorting gives."""

    def change(model):
        for key in ("b", "a", "c"):
            at(model, path).metadata_props.add(key=key, value=f"of {key}")

    return change


def newer(path="") -> Change:
    """Give a part a field that no version of ONNX knows yet."""
    return lambda model: at(model, path).MergeFromString(b"\xfa\x3f\x08from_new")  # 1023


def twice(path) -> Change:
    """Repeat the last entry of a list."""
    return lambda model: at(model, path).append(at(model, path)[-1])


def replaced(path, part) -> Change:
    """Put another message in the place of a part."""
    return lambda model: at(model, path).CopyFrom(part)


def added(path, part) -> Change:
    """Put one more entry at the end of a list."""
    return lambda model: at(model, path).append(part)


def put(path, name, value) -> Change:
    """Set a field of a part."""
    return lambda model: setattr(at(model, path), name, value)


def cleared(path, name) -> Change:
    """Unset a field of a part."""
    return lambda model: at(model, path).ClearField(name)


def both(*changes) -> Change:
    """Do one change after the other."""
    return lambda model: [change(model) for change in changes]


def annotated(name, *keys) -> Change:
    """Add a quantization annotation of a value."""
    note = onnx.TensorAnnotation(tensor_name=name)
    for key in keys or ("SCALE_TENSOR",):
        note.quant_parameter_tensor_names.add(key=key, value="small")
    return added("graph.quantization_annotation", note)


def attribute(kind, **fields) -> Change:
    """Give the first node one more attribute."""
    odd = AttributeProto(name="odd", type=kind, **fields)
    return added("graph.node.0.attribute", odd)


def placed(ir_version) -> Change:
    """Let the first node run on a named set of devices."""

    def change(model):
        model.ir_version = ir_version
        model.configuration.add(name="two", num_devices=2)
        model.graph.node[0].device_configurations.add(configuration_id="two")

    return change


def trained(model) -> None:
    training = model.training_info.add()
    training.algorithm.node.append(helper.make_node("Neg", ["large"], ["s"]))
    training.update_binding.add(key="large", value="s")


SPARSE = onnx.SparseTensorProto(
    values=helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0]),
    indices=helper.make_tensor("", TensorProto.INT64, [1], [2]),
    dims=[4],
)
OPAQUE = TypeProto(opaque_type=TypeProto.Opaque(domain="d", name="n"))
MAP = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, []))
BRANCH = "graph.node.2.attribute.0.g"
CAPTURED = onnx.ValueInfoProto(name="x", type=TypeProto())  # as silero-vad has them
NEG = helper.make_node("Neg", ["x"], ["", ""])

EQUAL = "equal"
NEW = "a field that this version of ONNX does not know"
NO_SPARSE, NO_MAP = "Sparse tensors are not supported", "Map types are not supported"

# What is done to the model, and what becomes of it: equal afterwards, or refused and why.
LOSSES: dict[str, tuple[Change, str]] = {
    # What onnx_ir writes twice.
    "metadata of a small tensor": (noted("graph.initializer.1"), EQUAL),
    "metadata of a large tensor": (noted("graph.initializer.0"), EQUAL),
    "metadata of a tensor in a node": (noted("graph.node.1.attribute.0.t"), EQUAL),
    "annotation of what goes in and out": (
        both(annotated("x"), added("graph.output", info("x", 4))), EQUAL),
    # What it drops.
    "training": (trained, EQUAL),
    "sparse initializer": (
        added("graph.sparse_initializer", SPARSE), "sparse_initializer had 1 entries, has 0"),
    "new field of a model": (newer(), NEW),
    "new field of a graph": (newer("graph"), NEW),
    "new field of a branch": (newer(BRANCH), NEW),
    "new field of a node": (newer("graph.node.3"), NEW),
    "new field of a node in a branch": (newer(f"{BRANCH}.node.0"), NEW),
    "new field of an attribute": (newer("graph.node.0.attribute.0"), NEW),
    "new field of an input": (newer("graph.input.0"), NEW),
    "new field of an output": (newer("graph.output.0"), NEW),
    "new field of a type": (newer("graph.input.0.type"), NEW),
    "new field of a dimension": (newer("graph.input.0.type.tensor_type.shape.dim.0"), NEW),
    "new field of a remark": (newer("graph.value_info.0"), NEW),
    "new field of an import": (newer("opset_import.0"), NEW),
    "new field of metadata": (both(noted(), newer("metadata_props.0")), NEW),
    "new field of a function": (newer("functions.0"), NEW),
    "new field of a node in a function": (newer("functions.0.node.0"), NEW),
    "new field of a small tensor": (newer("graph.initializer.1"), EQUAL),
    "new field of a large tensor": (newer("graph.initializer.0"), NEW),
    "new field of a tensor of text": (newer("graph.initializer.2"), NEW),
    "new field of a tensor in a node": (newer("graph.node.1.attribute.0.t"), NEW),
    "new field of training": (both(trained, newer("training_info.0")), EQUAL),
    "opaque input": (replaced("graph.input.0.type", OPAQUE), "was 'opaque_type', is None"),
    "opaque output": (replaced("graph.output.0.type", OPAQUE), "was 'opaque_type', is None"),
    "opaque value": (replaced("graph.value_info.0.type", OPAQUE), EQUAL),
    "opaque type in an attribute": (
        attribute(AttributeProto.TYPE_PROTO, tp=OPAQUE), "was 'opaque_type', is None"),
    "initializer without a name": (
        cleared("graph.initializer.1", "name"), "initializer had 3 entries, has 2"),
    "large initializer without a name": (
        cleared("graph.initializer.0", "name"), "cannot be edited without loss"),
    "initializer twice": (twice("graph.initializer"), "initializer had 4 entries, has 3"),
    "function twice": (twice("functions"), "two functions have the same name"),
    "attribute twice": (twice("graph.node.0.attribute"), "attribute had 2 entries, has 1"),
    "attribute of a function twice": (
        twice("functions.0.attribute"), "attribute had 2 entries, has 1"),
    "import twice": (twice("opset_import"), "opset_import: repeated entries"),
    "metadata of a model twice": (both(noted(), twice("metadata_props")), "repeated entries"),
    "metadata of a node twice": (
        both(noted("graph.node.3"), twice("graph.node.3.metadata_props")), "repeated entries"),
    "metadata of a small tensor twice": (
        both(noted("graph.initializer.1"), twice("graph.initializer.1.metadata_props")),
        "repeated entries"),
    "remark twice": (twice("graph.value_info"), "value_info: repeated entries"),
    "annotation twice": (
        both(annotated("y"), annotated("y")), "quantization_annotation: repeated entries"),
    "remark on what is not there": (added("graph.value_info", info("gone", 1)), EQUAL),
    "annotation of what is not there": (annotated("gone"), EQUAL),
    "remark in a function": (added("functions.0.value_info", info("v", 4)), EQUAL),
    "remark in a function of IR 9": (
        both(put("", "ir_version", 9), added("functions.0.value_info", info("v", 4))),
        "value_info: local::Twice/v not in both"),
    "remark of IR 9 on a value in a function": (
        both(put("", "ir_version", 9), added("graph.value_info", info("local::Twice/v", 4))),
        EQUAL),
    "blank outputs at the end": (added("graph.node.3.output", ""), EQUAL),
    "blank outputs in a function": (added("functions.0.node.0.output", ""), EQUAL),
    "no output but blank ones": (added("graph.node", NEG), EQUAL),
    "ai.onnx of a node": (put("graph.node.3", "domain", "ai.onnx"), EQUAL),
    "ai.onnx of a node in a branch": (put(f"{BRANCH}.node.0", "domain", "ai.onnx"), EQUAL),
    "ai.onnx of a node in a function": (
        put("functions.0.node.0", "domain", "ai.onnx"), EQUAL),
    "ai.onnx of an import": (put("opset_import.0", "domain", "ai.onnx"), EQUAL),
    "ai.onnx of a function": (put("functions.0", "domain", "ai.onnx"), EQUAL),
    "devices of IR 10": (placed(10), "device_configurations had 1 entries, has 0"),
    "devices of IR 11": (placed(11), EQUAL),
    "type of an outer value that a branch gives back": (
        replaced(f"{BRANCH}.output.0", CAPTURED), EQUAL),
    "version of zero": (put("", "model_version", 0), EQUAL),
    # What it writes in another order.
    "metadata of a model": (noted(), EQUAL),
    "metadata of a graph": (noted("graph"), EQUAL),
    "metadata of a branch": (noted(BRANCH), EQUAL),
    "metadata of a node": (noted("graph.node.0"), EQUAL),
    "metadata of an input": (noted("graph.input.0"), EQUAL),
    "metadata of an output": (noted("graph.output.0"), EQUAL),
    "metadata of a value": (noted("graph.value_info.0"), EQUAL),
    "metadata of a function": (noted("functions.0"), EQUAL),
    "metadata of a node in a function": (noted("functions.0.node.0"), EQUAL),
    "parameters of an annotation": (
        annotated("y", "ZERO_POINT_TENSOR", "SCALE_TENSOR"), EQUAL),
    "remarks": (added("graph.value_info", info("held", 512)), EQUAL),
    "annotations": (both(*map(annotated, ("y", "small", "x", "t"))), EQUAL),
    # What it adds.
    "remark on one initializer of three": (
        added("graph.value_info", info("large", 512)), EQUAL),
    # What it does not read.
    "sparse attribute": (
        attribute(AttributeProto.SPARSE_TENSOR, sparse_tensor=SPARSE), NO_SPARSE),
    "sparse attributes": (
        attribute(AttributeProto.SPARSE_TENSORS, sparse_tensors=[SPARSE]), NO_SPARSE),
    "map that goes out": (replaced("graph.output.0.type", MAP), NO_MAP),
    "map in the middle": (replaced("graph.value_info.0.type", MAP), NO_MAP),
    "bytes that are no text": (attribute(AttributeProto.STRING, s=b"\xff"), EQUAL),
    "bytes that are no text in a list": (
        attribute(AttributeProto.STRINGS, strings=[b"\xff"]), "can't decode byte 0xff"),
    "attribute without a type": (
        cleared("graph.node.0.attribute.0", "type"), "Unsupported attribute type: UNDEFINED"),
    "output twice in a node": (twice("graph.node.3.output"), "Output 'y' is redeclared"),
    "output of two nodes": (twice("graph.node"), "Output 'y' is redeclared"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_what_onnx_ir_loses_is_kept_or_refused(tmp_path, name):
    change, expected = LOSSES[name]
    model = everything()
    change(model)
    assert protos.unlike(everything(), model), "the change is none"
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    found = {
        unchanged.from_file_to_file(tmp_path / "a.onnx", tmp_path),
        unchanged.from_proto_to_proto(model),
    }
    if expected == EQUAL:
        assert found == {EQUAL}
    else:
        assert all(told.startswith("refused: ") and expected in told for told in found)


def test_the_checksum_of_a_data_file_is_kept_or_refused(tmp_path):
    source = fixtures.copied("external_one", tmp_path)
    model = onnx.load(source, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.external_data]
    outside[0].external_data.add(key="checksum", value="da39a3ee5e6b4b0d")
    source.write_bytes(model.SerializeToString())
    found = unchanged.from_file_to_file(source, tmp_path)
    assert found.startswith(f"refused: tensor {outside[0].name!r}: the checksum")
    assert unchanged.from_proto_to_proto(model, tmp_path) == EQUAL


def test_metadata_that_a_pass_changes_are_those_written():
    proto = everything()
    both(noted("graph.initializer.0"), noted("graph.initializer.1"))(proto)
    model = model_io.from_proto(proto)
    for name in ("large", "small"):
        metadata = model.graph.initializers[name].const_value.metadata_props
        metadata["a"], metadata["new"] = "changed", "1"
    expected = [("b", "of b"), ("a", "changed"), ("c", "of c"), ("new", "1")]
    for tensor in model_io.to_proto(model).graph.initializer[:2]:
        assert [(p.key, p.value) for p in tensor.metadata_props] == expected


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
    branch = tier.graph.node[-1].attribute[0].g
    remark = next(v for v in branch.value_info if v.name == "w")
    assert remark.type.tensor_type.elem_type == TensorProto.FLOAT16
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
