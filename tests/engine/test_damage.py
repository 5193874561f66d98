"""Damaged and hostile models get one line; odd but correct ones work."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxforge import PassManager, model_io
from onnxforge.errors import ModelError
from onnxforge.lazy import DataFile, DerivedTensor, FileTensor
from onnxforge.storage import wire
from onnxforge.weights import Weights
from support import fixtures


def floats(folder, values):
    path = folder / "floats.bin"
    path.write_bytes(values.astype("<f4").tobytes())
    like = ir.ExternalTensor(
        "x", 0, None, ir.DataType.FLOAT, shape=ir.Shape(values.shape), name="w"
    )
    return FileTensor(DataFile(path), 0, like)


def test_numpy_array_copies_a_lazy_tensor(tmp_path):
    tensor = floats(tmp_path, np.arange(6, dtype=np.float32))
    assert np.array_equal(np.array(tensor), np.arange(6))
    assert np.array_equal(np.asarray(tensor, copy=True), np.arange(6))


def test_dlpack_takes_a_lazy_tensor(tmp_path):
    tensor = floats(tmp_path, np.arange(6, dtype=np.float32))
    assert np.array_equal(np.from_dlpack(tensor), np.arange(6))


def test_elements_of_less_than_a_byte_are_derived_or_refused(tmp_path):
    def rounded(block, out, start):
        out[:] = block.astype(out.dtype)

    source = floats(tmp_path, np.arange(7, dtype=np.float32))
    try:
        tensor = DerivedTensor(source, ir.DataType.INT4, rounded)
    except (TypeError, ValueError):
        return
    assert tensor.numpy().astype(int).tolist() == list(range(7))


def referring(path, *entries, dims=(256,), data_type=1):
    weight = TensorProto(name="enc/w", data_type=data_type, dims=dims, data_location=1)
    for key, value in entries:
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph([], "g", [], [], [weight])
    path.write_bytes(helper.make_model(graph, ir_version=9).SerializeToString())
    return path


def test_a_model_is_found_through_a_path_with_dots(tmp_path, monkeypatch):
    source = fixtures.copied("external_one", tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (
        f"../source/{source.name}",
        tmp_path / "source" / "." / ".." / "source" / source.name,
    ):
        model = model_io.load(path)
        assert model.graph.initializers["up_w"].const_value.nbytes == 2048
    proto = onnx.load(source, load_external_data=False)
    model_io.from_proto(proto, "../source")


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelError, match="enc/w"):
        model_io.load(referring(tmp_path / "m.onnx", ("location", "loop")))


@pytest.mark.parametrize("entries", [[], [("offset", "0")]])
def test_external_data_without_location_are_refused(tmp_path, entries):
    with pytest.raises(ModelError, match="enc/w"):
        model_io.load(referring(tmp_path / "m.onnx", *entries))


@pytest.mark.parametrize("data_type", [0, 8, 99])
@pytest.mark.parametrize("where", ["outside", "inside", "Constant"])
def test_a_type_without_bytes_is_refused(tmp_path, data_type, where):
    path = tmp_path / "m.onnx"
    (tmp_path / "data.bin").write_bytes(bytes(4096))
    if where == "outside":
        referring(path, ("location", "data.bin"), data_type=data_type)
    else:
        weight = TensorProto(
            name="enc/w", data_type=data_type, dims=[256], raw_data=bytes(1024)
        )
        graph = helper.make_graph([], "g", [], [], [weight])
        if where == "Constant":
            node = helper.make_node("Constant", [], ["c"], value=weight)
            graph = helper.make_graph([node], "g", [], [])
        path.write_bytes(helper.make_model(graph, ir_version=9).SerializeToString())
    with pytest.raises(ModelError) as raised:
        model_io.load(path)
    assert "lambda" not in str(raised.value)


@pytest.mark.parametrize("dims", [(-256,), (-16, -16), (-1,)])
def test_a_negative_dimension_is_refused(tmp_path, dims):
    (tmp_path / "data.bin").write_bytes(bytes(4096))
    with pytest.raises(ModelError, match="enc/w"):
        model_io.load(referring(tmp_path / "m.onnx", ("location", "data.bin"), dims=dims))


def test_values_in_the_field_of_another_type_are_not_reinterpreted(tmp_path):
    weight = TensorProto(
        name="w", data_type=TensorProto.INT32, dims=[256], float_data=[1.0] * 256
    )
    graph = helper.make_graph([], "g", [], [], [weight])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph, ir_version=9).SerializeToString())
    with pytest.raises(ModelError, match="'w'"):
        model_io.load(path)


def test_a_tensor_of_many_small_fields_takes_little_memory(tmp_path):
    def block(field, content):
        return wire._encoded(field * 8 + 2) + wire._encoded(len(content)) + content

    content = block(7, block(5, b"\x08\x01" * 200_000))
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with path.open("rb") as file:
        tracemalloc.start()
        wire.excise("m", file.fileno(), len(content), "0" * 32)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 * len(content)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=400)
@given(st.sampled_from(fixtures.names()), st.data())
def test_a_damaged_model_is_loaded_or_refused(tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / name
    path = folder / f"{name}.onnx" if folder.exists() else fixtures.copied(name, folder)
    content = bytearray(fixtures.built(name).read_bytes())
    positions = st.integers(0, len(content) - 1)
    for at in data.draw(st.lists(positions, min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ModelError):
        model_io.load(path)


@pytest.mark.parametrize("byte", [0xFF, 0x80])
def test_a_name_that_is_no_text_is_refused(tmp_path, byte):
    content = bytearray(fixtures.built("nameless").read_bytes())
    name = onnx.ModelProto.FromString(bytes(content)).graph.input[0].name.encode()
    at = content.find(name)
    while at >= 0:
        content[at] = byte
        at = content.find(name, at + 1)
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        model_io.load(path)


def test_a_location_that_is_no_text_is_refused(tmp_path):
    path = fixtures.copied("external_one", tmp_path)
    path.write_bytes(
        path.read_bytes().replace(b"external_one.onnx_data", b"\xffxternal_one.onnx_data")
    )
    with pytest.raises(ModelError):
        model_io.load(path)


def test_a_small_weight_with_too_few_bytes_is_refused_when_it_is_read():
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64], raw_data=bytes(192))
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in "xy"]
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", infos[:1], infos[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(
        ModelError, match="tensor 'w': holds 192 bytes, but its shape needs 256"
    ):
        PassManager("fp16w{min_bytes=0}").apply(model)


def test_a_constant_without_an_output_holds_no_weight_that_could_be_read():
    model = onnx.ModelProto(ir_version=8)
    model.graph.node.add(op_type="Constant", name="c").attribute.append(
        helper.make_attribute("value", numpy_helper.from_array(np.ones(4, np.float32)))
    )
    (weight,) = Weights(model_io.from_proto(model))
    assert (weight.value, weight.where) == (None, "c.value")
