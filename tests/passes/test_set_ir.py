"""set-ir: only the number changes, and what needs the newer one is named."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from onnx import ModelProto, TensorProto, defs, helper, numpy_helper, parser

from onnxforge.errors import Refused, SpecError
from onnxforge.fidelity import difference
from onnxforge.manager import PassManager
from onnxforge.passes import set_ir
from onnxforge.passes.set_ir import SetIrVersionPass
from onnxforge.registry import parse
from support import fixtures, oracle
from support.models import Case, models
from support.payload import tensor_digests

DENSE = """<ir_version: 10, opset_import: ["" : 20]>
dense (float[2,2] x) => (float[2,2] y)
<float[2,2] w = {1.0, 2.0, 3.0, 4.0}>
{ [mul] t = MatMul(x, w)
  [act] y = Relu(t) }"""

CALL = """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
call (float[2,2] x) => (float[2,2] y) { [call] y = local.f(x) }
<domain: "local", opset_import: ["" : 20]>
f (u) => (v) { [inner] t = Relu(u)
  v = Neg(t) }"""

BRANCH = """<ir_version: 14, opset_import: ["" : 25]>
branch (float[2] x, bool flag) => (float[2] y) {
  [choice] y = If(flag) <
    then_branch = yes () => (float[2] t) { n = Cast <to = %d> (x)
      t = Cast <to = 1> (n) },
    else_branch = no () => (float[2] e) { e = Relu(x) }>
}"""


def dense(version: int = 10) -> ModelProto:
    model = parser.parse_model(DENSE)
    model.ir_version = version
    return model


def call(version: int = 10) -> ModelProto:
    model = parser.parse_model(CALL)
    model.ir_version = version
    return model


def lowered(model: ModelProto, to: int) -> tuple[ModelProto, list[str]]:
    """The result, its stamps taken off, and the findings."""
    result, report = SetIrVersionPass(max=to).apply(model)
    assert result.ir_version == min(to, model.ir_version)
    stamps = [p for p in result.metadata_props if p.key.startswith("onnxforge.")]
    assert len(stamps) == (2 if to < model.ir_version else 0)
    for stamp in stamps:
        result.metadata_props.remove(stamp)
    return result, [str(finding) for finding in report.passes[0].findings]


def refusal(model: ModelProto, to: int) -> str:
    with pytest.raises(Refused) as caught:
        SetIrVersionPass(max=to).apply(model)
    return str(caught.value)


def test_only_the_number_changes() -> None:
    before = dense()
    after, findings = lowered(before, 9)
    assert findings == []
    assert after.ir_version == 9
    after.ir_version = 10
    assert difference(before, after) is None


def test_a_file_is_lowered_and_runs_as_before(tmp_path: Path) -> None:
    source, target = fixtures.built("new_ir"), tmp_path / "low.onnx"
    report = PassManager("set-ir{max=9},assert-pure{min_ort=1.17}", check_laws=True).run(
        source, target
    )
    assert report.passes[0].stats == {"from": 10, "to": 9}
    assert onnx.load(target).ir_version == 9
    assert tensor_digests(target) == tensor_digests(source)
    for sample in fixtures.samples("new_ir"):
        oracle.assert_bit_equal(oracle.run(target, sample), oracle.run(source, sample))


@pytest.mark.parametrize("to", [10, 11, 99])
def test_a_model_that_is_low_enough_stays(to: int) -> None:
    before = dense()
    result, report = SetIrVersionPass(max=to).apply(before)
    assert not report.modified
    assert difference(before, result) is None
    assert not result.metadata_props


def test_lowering_twice_changes_nothing_more() -> None:
    model = ir.from_proto(dense())
    step = SetIrVersionPass(max=9)
    assert step(model).modified
    assert not step(model).modified


def test_the_stamps_of_earlier_steps_survive() -> None:
    model = dense()
    model.metadata_props.add(key="onnxforge.pipeline", value="earlier")
    model.metadata_props.add(key="author", value="someone")
    result, _ = SetIrVersionPass(max=9).apply(model)
    properties = {entry.key: entry.value for entry in result.metadata_props}
    assert properties["onnxforge.pipeline"] == "earlier,set-ir{max=9}"
    assert properties["author"] == "someone"


def test_overloads_are_named() -> None:
    text = refusal(onnx.load(fixtures.built("really_new_ir")), 9)
    assert text == (
        "IR version 10 cannot become 9: /grown/dense calls an overload (IR 10), /y/dense calls"
        " an overload (IR 10), local::dense:grow is an overload (IR 10), local::dense:keep is"
        " an overload (IR 10); inline the functions"
    )


def test_packed_weights_are_named() -> None:
    text = refusal(onnx.load(fixtures.built("opset_21_int4")), 9)
    assert text.startswith("IR version 10 cannot become 9: packed is INT4 (IR 10);")


def test_a_refusal_names_the_lowest_version_possible() -> None:
    text = refusal(call(), 7)
    assert text == (
        "IR version 10 cannot become 7: local::f is a function (IR 8); max=8 or inline the"
        " functions"
    )
    assert lowered(call(), 8)[0].ir_version == 8


def test_a_refusal_stays_short() -> None:
    model = dense(14)
    for i in range(9):
        model.graph.initializer.add(name=f"s{i}", data_type=TensorProto.INT4, raw_data=b"1")
    text = refusal(model, 9)
    assert text.count("is INT4") == 5
    assert "4 more; max=10 or use another type" in text


TYPES = {
    "FLOAT8E4M3FN": 9,
    "FLOAT8E4M3FNUZ": 9,
    "FLOAT8E5M2": 9,
    "FLOAT8E5M2FNUZ": 9,
    "UINT4": 10,
    "INT4": 10,
    "FLOAT4E2M1": 11,
    "FLOAT8E8M0": 12,
    "UINT2": 13,
    "INT2": 13,
    "FLOAT6E2M3": 14,
    "FLOAT6E3M2": 14,
}
# What the oldest onnx that is supported knows.
KNOWN = {name: version for name, version in TYPES.items() if hasattr(TensorProto, name)}


@pytest.mark.parametrize(("name", "version"), KNOWN.items(), ids=KNOWN)
def test_types_of_weights_need_their_version(name: str, version: int) -> None:
    model = dense(14)
    model.graph.initializer.add(name="s", data_type=getattr(TensorProto, name), dims=[0])
    assert f"s is {name} (IR {version})" in refusal(model, version - 1)
    assert lowered(model, version)[0].ir_version == min(version, 14)


@pytest.mark.parametrize(("name", "version"), KNOWN.items(), ids=KNOWN)
def test_types_that_a_node_names_need_their_version(name: str, version: int) -> None:
    model = parser.parse_model(BRANCH % getattr(TensorProto, name))
    text = refusal(model, version - 1)
    assert f"choice/then_branch/Cast_0 asks by 'to' for {name} (IR {version})" in text
    assert lowered(model, version)[0].ir_version == version


def test_types_of_values_need_their_version() -> None:
    model = dense()
    model.graph.input.append(helper.make_tensor_value_info("p", TensorProto.UINT4, [2]))
    sequence = helper.make_sequence_type_proto(
        helper.make_tensor_type_proto(TensorProto.FLOAT8E5M2, [2])
    )
    model.graph.input.append(helper.make_value_info("q", sequence))
    assert "p is UINT4 (IR 10)" in refusal(model, 9)
    assert "q is FLOAT8E5M2 (IR 9)" in refusal(model, 8)


def test_types_in_constants_need_their_version() -> None:
    model = dense()
    small = helper.make_tensor("", TensorProto.INT4, [2], [1, 2])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=small))
    assert "Constant_0/value is INT4 (IR 10)" in refusal(model, 9)


def test_the_same_word_of_another_domain_is_no_type() -> None:
    model = dense()
    model.opset_import.add(domain="org.example", version=1)
    model.graph.node.add(op_type="Odd", domain="org.example", output=["o"]).attribute.append(
        helper.make_attribute("to", int(TensorProto.INT4))
    )
    assert lowered(model, 9)[0].ir_version == 9


def test_every_type_attribute_of_the_standard_is_known() -> None:
    words = re.compile(r"data[ _]?type|dtype|precision", re.IGNORECASE)
    found = {
        name
        for schema in defs.get_all_schemas_with_history()
        if schema.domain == ""
        for name, attribute in schema.attributes.items()
        if attribute.type == defs.OpSchema.AttrType.INT and words.search(attribute.description)
    }
    assert found - {"qk_matmul_output_mode"} == set(set_ir._TYPE_ATTRIBUTES)


def test_the_newest_version_is_that_of_the_standard() -> None:
    assert onnx.IR_VERSION <= set_ir._NEWEST
    assert max(TYPES.values()) <= set_ir._NEWEST


def annotate(model: ModelProto) -> None:
    annotation = model.graph.quantization_annotation.add(tensor_name="t")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")


def train(model: ModelProto) -> None:
    model.training_info.add().algorithm.name = "step"


def take_optional(model: ModelProto) -> None:
    inner = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    optional = helper.make_optional_type_proto(inner)
    model.graph.input.append(helper.make_value_info("o", optional))


def take_sparse(model: ModelProto) -> None:
    sparse = helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [2])
    model.graph.input.append(helper.make_value_info("p", sparse))


def configure(model: ModelProto) -> None:
    model.configuration.add(name="pair", num_devices=2)
    model.graph.node[0].device_configurations.add(configuration_id="pair")


@pytest.mark.parametrize(
    ("change", "version", "reason"),
    [
        (annotate, 5, "t has a quantization annotation"),
        (train, 7, "training_info[0] is a training graph"),
        (take_optional, 8, "o has an optional type"),
        (take_sparse, 8, "p has a sparse type"),
        (configure, 11, "mul has a device configuration (IR 11), pair is a device config"),
    ],
)
def test_features_need_their_version(
    change: Callable[[ModelProto], None], version: int, reason: str
) -> None:
    model = dense(11)
    change(model)
    assert reason in refusal(model, version - 1)
    result, _ = lowered(model, version)
    result.ir_version = model.ir_version
    assert difference(model, result) is None


def test_defaults_of_functions_need_their_version() -> None:
    model = call()
    node = model.functions[0].node[0]
    node.op_type = "LeakyRelu"
    node.attribute.add(name="alpha", ref_attr_name="alpha", type=1)
    model.functions[0].attribute_proto.append(helper.make_attribute("alpha", 0.5))
    assert "local::f/alpha has a default for an attribute (IR 9)" in refusal(model, 8)
    assert lowered(model, 9)[0].ir_version == 9


def test_sparse_tensors_need_their_version() -> None:
    # onnx_ir cannot hold them yet; the walk over the proto knows them all the same.
    model = dense()
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    sparse = helper.make_sparse_tensor(values, indices, [4])
    model.graph.sparse_initializer.append(sparse)
    one, many = helper.make_attribute("a", sparse), helper.make_attribute("b", [sparse])
    model.graph.node[0].attribute.extend([one, many])
    found = {(need.ir, need.where, need.what) for need in set_ir._needs(model, "")}
    assert found == {
        (6, "s", "is a sparse weight"),
        (6, "mul/a/s", "is a sparse tensor"),
        (6, "mul/b/s", "is in a list of sparse tensors"),
    }


def test_metadata_stays_and_is_reported() -> None:
    before = call()
    places = [before.graph, before.graph.node[0], before.graph.input[0]]
    places += [before.functions[0], before.functions[0].node[0]]
    before.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    for place in [*places, before.graph.initializer[0]]:
        place.metadata_props.add(key="source", value="exporter")
    after, findings = lowered(before, 9)
    assert findings == ["OF311 model: metadata stays in 6 places"]
    after.ir_version = 10
    assert difference(before, after) is None
    before.ir_version = 9
    assert lowered(before, 8)[1] == []


def test_types_inside_of_functions_move_and_come_back(tmp_path: Path) -> None:
    before = call()
    info = helper.make_tensor_value_info("t", TensorProto.FLOAT, [2, 2])
    before.functions[0].value_info.append(info)
    after, findings = lowered(before, 9)
    assert findings == ["OF312 local::f: types of 1 value move to the main graph"]
    assert [info.name for info in after.graph.value_info] == ["local::f/t"]
    onnx.checker.check_model(after, full_check=True)
    x = {"x": np.ones((2, 2), np.float32)}
    oracle.assert_bit_equal(oracle.run(after, x), oracle.run(before, x))
    again = ir.from_proto(after)
    again.ir_version = 10
    (function,) = ir.to_proto(again).functions
    assert list(function.value_info) == [info]
    (tmp_path / "in.onnx").write_bytes(before.SerializeToString())
    manager = PassManager("set-ir{max=9}", check_laws=True)
    assert manager.run(tmp_path / "in.onnx", tmp_path / "out.onnx").modified


def test_a_version_from_the_future_is_refused() -> None:
    assert "has IR version 15; what is new in it is not known" in refusal(dense(15), 9)
    assert not SetIrVersionPass(max=15).call(ir.from_proto(dense(15))).modified


@pytest.mark.parametrize("text", ["set-ir", "set-ir{max=3}", "set-ir{max=new}"])
def test_the_version_has_to_make_sense(text: str) -> None:
    with pytest.raises(SpecError, match="set-ir"):
        parse(text)
    assert str(*parse("set-ir{max=9}")) == "set-ir{max=9}"


@given(case=models())
def test_nothing_but_the_number_changes_in_any_model(case: Case) -> None:
    before = case.model
    before.ir_version = 10
    after, findings = lowered(before, 9 if before.functions else 4)
    assert findings == []
    assert set(oracle.run(after, case.inputs)) == {o.name for o in before.graph.output}
    after.ir_version = 10
    assert difference(before, after) is None
