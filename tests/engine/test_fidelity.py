"""The comparison of two protos finds every change that matters, and no other."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator

import onnx
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, TensorProto, helper

from onnxforge.fidelity import difference
from support import fixtures, protos

Change = Callable[[ModelProto], object]


def model() -> ModelProto:
    """A model with something in every corner that the changes below touch."""
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["b"], "inner", value_float=2.5)],
        "body",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [])],
    )
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], bytes(range(16)), raw=True)
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [2, -1])
    outside = TensorProto(name="o", data_type=1, dims=[9], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "data.bin"), ("offset", "64")):
        outside.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("If", ["c"], ["i"], "if", then_branch=body, else_branch=body),
        helper.make_node("Custom", ["w", "", "o"], ["m", "n"], "custom", domain="local",
                         ints=[1, 2], floats=[0.5, math.nan], text="words", nan=math.nan),
        helper.make_node("Reshape", ["m", "s"], ["y"], "reshape", allowzero=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [weight, shape, outside],
        "doc",
        [helper.make_tensor_value_info("m", TensorProto.FLOAT, [4])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    inner = [helper.make_node("Neg", ["u"], ["v"], "negate")]
    function = helper.make_function("local", "F", ["u"], ["v"], inner, opsets[:1], ["a"])
    made = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
    made.metadata_props.add(key="one", value="1")
    made.metadata_props.add(key="two", value="2")
    note = made.graph.quantization_annotation.add(tensor_name="m")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    return made


def custom(model: ModelProto, name: str) -> AttributeProto:
    return next(a for a in model.graph.node[1].attribute if a.name == name)


def _set(message: Callable[[ModelProto], Message], field: str, value: object) -> Change:
    return lambda m: setattr(message(m), field, value)


def _graph(m: ModelProto) -> Message:
    return m.graph


def _branch(m: ModelProto) -> onnx.GraphProto:
    return m.graph.node[0].attribute[0].g


def _swap(field: str) -> Change:
    def change(m: ModelProto) -> None:
        entries = getattr(m.graph, field)
        first, second = type(entries[0])(), type(entries[1])()
        first.CopyFrom(entries[0])
        second.CopyFrom(entries[1])
        entries[0].CopyFrom(second)
        entries[1].CopyFrom(first)

    return change


def _one_bit(m: ModelProto) -> None:
    raw = bytearray(m.graph.initializer[0].raw_data)
    raw[11] ^= 1
    m.graph.initializer[0].raw_data = bytes(raw)


BITES: dict[str, tuple[Change, str]] = {
    "ir version": (_set(lambda m: m, "ir_version", 8), "model.ir_version was 9, is 8"),
    "producer": (
        _set(lambda m: m, "producer_name", "x"),
        "model.producer_name was '', is 'x'",
    ),
    "graph name": (
        _set(_graph, "name", "other"),
        "model.graph.name was 'graph', is 'other'",
    ),
    "graph doc": (
        lambda m: m.graph.ClearField("doc_string"),
        "model.graph.doc_string was 'doc', is ''",
    ),
    "opset version": (
        _set(lambda m: m.opset_import[0], "version", 17),
        "model.opset_import[].version was 18, is 17",
    ),
    "opset gone": (lambda m: m.opset_import.pop(), "model.opset_import: local not in both"),
    "metadata value": (
        _set(lambda m: m.metadata_props[1], "value", "3"),
        "model.metadata_props[two].value was '2', is '3'",
    ),
    "metadata added": (
        lambda m: m.metadata_props.add(key="three"),
        "model.metadata_props: three not in both",
    ),
    "metadata doubled": (
        lambda m: m.metadata_props.add(key="one", value="1"),
        "model.metadata_props: repeated entries not in both",
    ),
    "node name": (
        _set(lambda m: m.graph.node[2], "name", "x"),
        "model.graph.node[2].name was 'reshape', is 'x'",
    ),
    "operator": (
        _set(lambda m: m.graph.node[2], "op_type", "Reshap"),
        "model.graph.node[2].op_type was 'Reshape', is 'Reshap'",
    ),
    "domain": (
        _set(lambda m: m.graph.node[1], "domain", ""),
        "model.graph.node[1].domain was 'local', is ''",
    ),
    "order of nodes": (_swap("node"), "model.graph.node[0].input"),
    "node gone": (lambda m: m.graph.node.pop(), "model.graph.node had 3 entries, has 2"),
    "order of inputs": (
        lambda m: m.graph.node[2].input.reverse(),
        "model.graph.node[2].input[0] was 'm', is 's'",
    ),
    "blank in the middle": (
        lambda m: m.graph.node[1].input.remove(""),
        "model.graph.node[1].input had 3 entries, has 2",
    ),
    "blank at the end of inputs": (
        lambda m: m.graph.node[2].input.append(""),
        "model.graph.node[2].input had 2 entries, has 3",
    ),
    "output at the end": (
        lambda m: m.graph.node[1].output.append("k"),
        "model.graph.node[1].output had 2 entries, has 3",
    ),
    "blank output in front": (
        lambda m: m.graph.node[1].output.insert(0, ""),
        "model.graph.node[1].output had 2 entries, has 3",
    ),
    "attribute int": (
        _set(lambda m: m.graph.node[2].attribute[0], "i", 0),
        "model.graph.node[2].attribute[0].i was 1, is 0",
    ),
    "attribute in a list": (
        lambda m: custom(m, "ints").ints.__setitem__(1, 3),
        ".ints[1] was 2, is 3",
    ),
    "attribute float": (
        lambda m: custom(m, "floats").floats.__setitem__(0, 0.25),
        ".floats[0]",
    ),
    "attribute no longer NaN": (_set(lambda m: custom(m, "nan"), "f", 0.0), ".f was nan"),
    "attribute bytes": (_set(lambda m: custom(m, "text"), "s", b"word"), ".s was b'words'"),
    "attribute name": (_set(lambda m: custom(m, "text"), "name", "t"), ".name was 'text'"),
    "attribute type": (
        _set(lambda m: custom(m, "ints"), "type", AttributeProto.FLOATS),
        ".type was 7, is 6",
    ),
    "attribute gone": (
        lambda m: m.graph.node[2].attribute.pop(),
        "model.graph.node[2].attribute had 1 entries, has 0",
    ),
    "inside a branch": (
        _set(lambda m: _branch(m).node[0].attribute[0], "f", 2.0),
        "model.graph.node[0].attribute[0].g.node[0].attribute[0].f was 2.5, is 2.0",
    ),
    "payload bit": (_one_bit, "model.graph.initializer[0].raw_data was "),
    "tensor type": (
        _set(lambda m: m.graph.initializer[0], "data_type", TensorProto.INT32),
        "model.graph.initializer[0].data_type was 1, is 6",
    ),
    "tensor dims": (
        lambda m: m.graph.initializer[0].dims.append(1),
        "model.graph.initializer[0].dims had 1 entries, has 2",
    ),
    "typed data": (
        lambda m: m.graph.initializer[1].int64_data.__setitem__(0, 3),
        "model.graph.initializer[1].int64_data[0] was 2, is 3",
    ),
    "order of initializers": (_swap("initializer"), "model.graph.initializer[0].dims"),
    "place of external data": (
        _set(lambda m: m.graph.initializer[2].external_data[1], "value", "65"),
        "model.graph.initializer[2].external_data[offset].value was '64', is '65'",
    ),
    "external data said to be inside": (
        lambda m: m.graph.initializer[2].ClearField("data_location"),
        "model.graph.initializer[2].data_location was 1, is 0",
    ),
    "extra value_info": (
        lambda m: m.graph.value_info.add(name="i"),
        "model.graph.value_info: i not in both",
    ),
    "value_info gone": (
        lambda m: m.graph.value_info.pop(),
        "model.graph.value_info: m not in both",
    ),
    "value_info of another type": (
        _set(
            lambda m: m.graph.value_info[0].type.tensor_type, "elem_type", TensorProto.DOUBLE
        ),
        "model.graph.value_info[m].type.tensor_type.elem_type was 1, is 11",
    ),
    "dimension": (
        _set(lambda m: m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 3),
        "model.graph.output[0].type.tensor_type.shape.dim[1].dim_value was 2, is 3",
    ),
    "name of a dimension": (
        _set(lambda m: m.graph.output[0].type.tensor_type.shape.dim[0], "dim_param", "b"),
        "shape.dim[0].dim_param was 'batch', is 'b'",
    ),
    "annotation": (
        _set(
            lambda m: m.graph.quantization_annotation[0].quant_parameter_tensor_names[0],
            "value",
            "s",
        ),
        "quant_parameter_tensor_names[SCALE_TENSOR].value was 'w', is 's'",
    ),
    "function body": (
        _set(lambda m: m.functions[0].node[0], "op_type", "Abs"),
        "model.functions[0].node[0].op_type was 'Neg', is 'Abs'",
    ),
    "function attribute": (
        lambda m: m.functions[0].attribute.pop(),
        "model.functions[0].attribute had 1 entries, has 0",
    ),
    "function gone": (lambda m: m.functions.pop(), "model.functions had 1 entries, has 0"),
    "training": (
        lambda m: m.training_info.add(),
        "model.training_info had 0 entries, has 1",
    ),
}


@pytest.mark.parametrize("name", BITES)
def test_a_change_is_found_and_told(name: str) -> None:
    change, told = BITES[name]
    before, after = model(), model()
    change(after)
    found = difference(before, after)
    assert found is not None
    assert told in found
    assert found.startswith("model.")
    assert "\n" not in found
    assert difference(after, before) is not None
    assert protos.unlike(before, after) is not None


def _blank_strings(m: ModelProto) -> None:
    m.producer_name = ""
    m.graph.node[0].domain = ""
    m.graph.node[0].doc_string = ""


def _empty_messages(m: ModelProto) -> None:
    m.graph.node[2].attribute[0].t.SetInParent()
    m.graph.input[0].type.SetInParent()


def _zero_numbers(m: ModelProto) -> None:
    m.model_version = 0
    m.graph.initializer[0].data_location = TensorProto.DEFAULT


def _main_domain(m: ModelProto) -> None:
    m.graph.node[0].domain = "ai.onnx"
    m.functions[0].node[0].domain = "ai.onnx"


def _reversed(*fields: Callable[[ModelProto], object]) -> Change:
    def change(m: ModelProto) -> None:
        for field in fields:
            entries = field(m)
            copies = list(entries)  # type: ignore[call-overload]
            del entries[:]  # type: ignore[attr-defined]
            entries.extend(copies[::-1])  # type: ignore[attr-defined]

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: None, id="nothing"),
        pytest.param(_blank_strings, id="unset and empty strings"),
        pytest.param(_empty_messages, id="unset and empty messages"),
        pytest.param(_zero_numbers, id="unset numbers and zero"),
        pytest.param(_main_domain, id="the domain ai.onnx"),
        pytest.param(lambda m: m.graph.node[1].output.extend(["", ""]), id="blank outputs"),
        pytest.param(_reversed(lambda m: m.metadata_props), id="order of metadata"),
        pytest.param(_reversed(lambda m: m.opset_import), id="order of opsets"),
        pytest.param(
            _reversed(lambda m: m.graph.initializer[2].external_data),
            id="order of external data entries",
        ),
    ],
)
def test_what_means_the_same_is_no_difference(change: Change) -> None:
    before, after = model(), model()
    change(after)
    assert difference(before, after) is None
    assert difference(after, before) is None


def test_order_of_value_info_is_no_difference() -> None:
    before, after = model(), model()
    for name in ("p", "q"):
        before.graph.value_info.add(name=name)
    for name in ("q", "p"):
        after.graph.value_info.insert(0, onnx.ValueInfoProto(name=name))
    assert difference(before, after) is None


def test_the_first_of_two_differences_is_told() -> None:
    before, after = model(), model()
    after.graph.node[1].name = "x"
    after.graph.node[2].name = "y"
    assert difference(before, after) == "model.graph.node[1].name was 'custom', is 'x'"


def test_any_message_can_be_named() -> None:
    before, after = TensorProto(name="a"), TensorProto(name="b")
    assert difference(before, after, "weight") == "weight.name was 'a', is 'b'"


@pytest.mark.parametrize("name", fixtures.names())
def test_a_fixture_equals_itself(name: str) -> None:
    content = fixtures.built(name).read_bytes()
    assert (
        difference(onnx.ModelProto.FromString(content), onnx.load_from_string(content)) is None
    )


def scalars(message: Message) -> Iterator[tuple[Message, str, int | None]]:
    """Every number, string or bytes that is set anywhere in a message."""
    for descriptor, value in message.ListFields():
        single = isinstance(value, str | bytes | int | float | Message)
        children = [value] if single else value
        for i, child in enumerate(children):
            if descriptor.message_type is not None:
                yield from scalars(child)
            else:
                yield message, descriptor.name, None if single else i


def altered(value: object) -> object:
    if isinstance(value, str):
        return f"{value}!"
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:] if value else b"!"
    if isinstance(value, float):
        return struct.unpack("<f", struct.pack("<f", value * 2 if value else 1.0))[0]
    assert isinstance(value, int)
    return value - 1 if value else 1


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(fixtures.names()), st.data())
def test_any_one_value_that_changed_is_found(name: str, data: st.DataObject) -> None:
    before = onnx.load(fixtures.built(name), load_external_data=False)
    after = onnx.load(fixtures.built(name), load_external_data=False)
    places = list(scalars(after))
    message, field, index = places[data.draw(st.integers(0, len(places) - 1))]
    value = getattr(message, field)
    if index is None:
        setattr(message, field, altered(value))
    else:
        value[index] = altered(value[index])
    if before == after or math.isnan(_float(value, index)):
        return  # twice infinity, and NaN
    assert protos.unlike(before, after) is not None
    found = difference(before, after)
    assert found is not None
    assert field in found or "not in both" in found


def _float(value: object, index: int | None) -> float:
    one = value if index is None else value[index]  # type: ignore[index]
    return one if isinstance(one, float) else 0.0
