"""What is loaded and saved, or wrapped and unwrapped, says the same as before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxforge import model_io, placement, saving
from onnxforge.errors import ModelError
from onnxforge.fidelity import difference
from onnxforge.lazy import FileTensor
from support import fixtures, models, payload

LAYOUTS: list[placement.Layout] = ["keep", "inline", "sidecar"]
BACKEND_MODELS = sorted((Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx"))
EXTERNAL = ["external_one", "external_two", "external_mixed"]
on_every_fixture = pytest.mark.parametrize("name", fixtures.names())
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def whole(path: Path) -> ModelProto:
    """Read a model with the values of all its tensors in raw_data where they can be."""
    model = onnx.load(path, load_external_data=False)
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
        for field in ("float_data", "double_data", "int32_data"):
            if getattr(tensor, field):
                tensor.raw_data = numpy_helper.to_array(tensor).tobytes()
                tensor.ClearField(field)
    return model


def tensors(message: Message) -> Iterator[TensorProto]:
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for child in [value] if isinstance(value, Message) else value:
                if isinstance(child, TensorProto):
                    yield child
                else:
                    yield from tensors(child)


# Files.


@on_every_fixture
@in_every_layout
def test_a_saved_fixture_says_the_same(
    tmp_path: Path, name: str, layout: placement.Layout
) -> None:
    source = fixtures.built(name)
    path = tmp_path / "saved.onnx"
    saving.save(model_io.load(source), path, layout=layout)
    assert difference(whole(source), whole(path)) is None
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    before, after = (onnx.load(p, load_external_data=False) for p in (source, path))
    assert payload.graph_text(after) == payload.graph_text(before)


@on_every_fixture
def test_an_inline_fixture_comes_back_with_its_fields(tmp_path: Path, name: str) -> None:
    source = fixtures.built(name)
    path = tmp_path / "saved.onnx"
    saving.save(model_io.load(source), path)
    if name not in EXTERNAL:
        assert difference(onnx.load(source), onnx.load(path)) is None
        assert [p.name for p in tmp_path.iterdir()] == ["saved.onnx"]


@on_every_fixture
@in_every_layout
def test_the_second_round_trip_changes_no_byte(
    tmp_path: Path, name: str, layout: placement.Layout
) -> None:
    source = fixtures.built(name)
    contents = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "saved.onnx"
        saving.save(model_io.load(source), path, layout=layout)
        contents.append({p.name: p.read_bytes() for p in path.parent.iterdir()})
        source = path
    assert contents[0] == contents[1]


@on_every_fixture
def test_loading_and_saving_leave_the_source_alone(tmp_path: Path, name: str) -> None:
    source = fixtures.copied(name, tmp_path / "source")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.parent.iterdir()}
    saving.save(model_io.load(source), tmp_path / "saved.onnx", layout="sidecar")
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.parent.iterdir()}
    assert after == before


@on_every_fixture
def test_large_payloads_stay_on_disk(name: str) -> None:
    path = fixtures.built(name)
    model = model_io.load(path)
    proto = onnx.load(path)
    in_raw = {t.name for t in proto.graph.initializer if len(t.raw_data) >= 1024}
    loaded = model.graph.initializers
    on_disk = {n for n, v in loaded.items() if isinstance(v.const_value, FileTensor)}
    assert in_raw <= on_disk
    for weight in in_raw:
        tensor = loaded[weight].const_value
        expected = next(t for t in proto.graph.initializer if t.name == weight)
        assert tensor is not None
        assert tensor.tobytes() == expected.raw_data


@on_every_fixture
def test_the_files_of_a_model_are_told(name: str) -> None:
    path = fixtures.built(name)
    expected = {p: p.stat().st_size for p in path.parent.iterdir()}
    assert model_io.files(model_io.load(path)) == expected


def test_a_model_read_only_has_the_same_weights(tmp_path: Path) -> None:
    path = fixtures.built("hiding_places")
    saving.save(model_io.load(path, editable=False), tmp_path / "saved.onnx")
    assert payload.tensor_digests(tmp_path / "saved.onnx") == payload.tensor_digests(path)


def test_every_backend_model_comes_back_equal_or_is_refused(tmp_path: Path) -> None:
    assert len(BACKEND_MODELS) > 100
    refused = {}
    for i, source in enumerate(BACKEND_MODELS):
        path = tmp_path / f"{i}.onnx"
        try:
            saving.save(model_io.load(source), path)
        except ModelError as error:
            refused[source.parent.name] = str(error)
            continue
        assert difference(onnx.load(source), onnx.load(path)) is None, source
    assert refused == {}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(models.models())
def test_a_random_model_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory, case: models.Case
) -> None:
    folder = tmp_path_factory.getbasetemp()
    source, path = folder / "random.onnx", folder / "random_saved.onnx"
    source.write_bytes(case.model.SerializeToString())
    saving.save(model_io.load(source), path, force=True)
    assert difference(case.model, onnx.load(path)) is None
    assert difference(case.model, model_io.to_proto(model_io.from_proto(case.model))) is None


# What is not a model.


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx: No such file"):
        model_io.load(tmp_path / "absent.onnx")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a regular file"):
        model_io.load(tmp_path)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_path_may_be_a_text_and_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_text: bool
) -> None:
    source = fixtures.copied("external_one", tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    relative = Path("source") / source.name
    model = model_io.load(str(relative) if as_text else relative)
    monkeypatch.chdir(tmp_path.parent)
    saving.save(model, tmp_path / "saved.onnx")
    assert payload.tensor_digests(tmp_path / "saved.onnx") == payload.tensor_digests(source)


def sized(name: str, dims: tuple[int, ...], content: bytes) -> ModelProto:
    weight = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, raw_data=content)
    return helper.make_model(helper.make_graph([], "g", [], [], [weight]), ir_version=9)


@pytest.mark.parametrize("dims", [(255,), (257,), (2**50,), (0,), (256, 0), ()])
def test_a_payload_of_another_size_than_its_shape_is_refused(
    tmp_path: Path, dims: tuple[int, ...]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(sized("enc/w", dims, bytes(1024)).SerializeToString())
    with pytest.raises(ModelError) as raised:
        model_io.load(path)
    needed = 4 * int(np.prod(dims, dtype=object)) if dims else 4
    assert str(raised.value) == (
        f"{path}: tensor 'enc/w': holds 1024 bytes, but its shape needs {needed}"
    )


def _sparse(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "at")
    model.graph.sparse_initializer.add(values=values, indices=indices, dims=[4])


def _map_input(model: ModelProto) -> None:
    entry = model.graph.input.add(name="map").type.map_type
    entry.key_type = TensorProto.INT64
    entry.value_type.tensor_type.elem_type = TensorProto.FLOAT


def _twice_an_initializer(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _twice_metadata(model: ModelProto) -> None:
    for value in ("one", "two"):
        model.metadata_props.add(key="key", value=value)


def _twice_an_attribute(model: ModelProto) -> None:
    for value in (1, 2):
        model.graph.node[0].attribute.append(helper.make_attribute("axis", value))


def _twice_a_function(model: ModelProto) -> None:
    for _ in range(2):
        opsets = [helper.make_opsetid("", 17)]
        function = helper.make_function("local", "f", ["u"], ["u"], [], opsets)
        model.functions.append(function)


@pytest.mark.parametrize(
    "change",
    [
        _sparse,
        _map_input,
        _twice_an_initializer,
        _twice_metadata,
        _twice_an_attribute,
        _twice_a_function,
    ],
)
def test_what_onnx_ir_would_lose_is_refused_with_a_reason(
    tmp_path: Path, change: Callable[[ModelProto], None]
) -> None:
    proto = onnx.load(fixtures.built("nameless"))
    change(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    for attempt in (lambda: model_io.load(path), lambda: model_io.from_proto(proto)):
        with pytest.raises(ModelError, match=r"without loss|cannot represent") as raised:
            attempt()
        assert "\n" not in str(raised.value)
        assert str(raised.value).partition(": ")[2]


# Protos.


def external_folder(name: str) -> Path:
    return fixtures.built(name).parent


@on_every_fixture
def test_a_proto_comes_back_equal_and_is_never_changed(name: str) -> None:
    proto = onnx.load(fixtures.built(name), load_external_data=False)
    before = proto.SerializeToString(deterministic=True)
    model = model_io.from_proto(proto, external_folder(name))
    again = model_io.to_proto(model)
    assert difference(proto, again) is None
    assert proto.SerializeToString(deterministic=True) == before
    scribble(again)
    assert proto.SerializeToString(deterministic=True) == before


def scribble(proto: ModelProto) -> None:
    for tensor in tensors(proto):
        tensor.name += "!"
        if tensor.HasField("raw_data"):
            tensor.raw_data = b"!" * len(tensor.raw_data)
    proto.graph.name += "!"
    for node in proto.graph.node:
        node.name += "!"


@on_every_fixture
def test_a_proto_can_be_taken_twice_from_one_model(name: str) -> None:
    model = model_io.load(fixtures.built(name))
    first, second = model_io.to_proto(model), model_io.to_proto(model)
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


@on_every_fixture
@in_every_layout
def test_a_proto_can_be_saved(tmp_path: Path, name: str, layout: placement.Layout) -> None:
    source = fixtures.built(name)
    proto = onnx.load(source, load_external_data=False)
    before = proto.SerializeToString(deterministic=True)
    path = tmp_path / "saved.onnx"
    saving.save(model_io.from_proto(proto, source.parent), path, layout=layout)
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    assert difference(whole(source), whole(path)) is None
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data_of_a_proto_need_base_dir(name: str) -> None:
    proto = onnx.load(fixtures.built(name), load_external_data=False)
    first = next(tensors_outside(proto))
    with pytest.raises(ModelError) as raised:
        model_io.from_proto(proto)
    text = str(raised.value)
    assert "give base_dir" in text
    assert repr(first.name) in text
    assert repr(first.external_data[0].value) in text
    assert "\n" not in text


def tensors_outside(proto: ModelProto) -> Iterator[TensorProto]:
    ordered = [*proto.graph.initializer, *tensors(proto)]
    return (t for t in ordered if t.data_location == TensorProto.EXTERNAL)


@pytest.mark.parametrize("folder", ["absent", "."])
def test_a_wrong_base_dir_is_refused(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    proto = onnx.load(fixtures.built("external_one"), load_external_data=False)
    with pytest.raises(ModelError, match=r"'external_one\.onnx_data': No such file"):
        model_io.from_proto(proto, folder)


def test_weights_in_data_files_stay_there_in_a_proto() -> None:
    path = fixtures.built("external_mixed")
    again = model_io.to_proto(model_io.load(path))
    assert difference(onnx.load(path, load_external_data=False), again) is None
    assert len(list(tensors_outside(again))) == len(
        list(tensors_outside(onnx.load(path, load_external_data=False)))
    )


def test_a_proto_of_more_than_2_gb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_io.load(fixtures.built("speech_encoder"))
    monkeypatch.setattr(model_io, "MAX_PROTO_BYTES", 4000)
    with pytest.raises(ModelError, match="does not fit into a ModelProto of 2 GB"):
        model_io.to_proto(model)


def test_a_model_of_onnx_ir_becomes_a_proto() -> None:
    large, small = np.arange(512, dtype=np.float32), np.arange(3, dtype=np.int64)
    values = [
        ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        for name, array in (("large", large), ("small", small))
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 17}, name="g")
    proto = model_io.to_proto(ir.Model(graph, ir_version=9))
    found = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert found.keys() == {"large", "small"}
    assert np.array_equal(found["large"], large)
    assert np.array_equal(found["small"], small)


# What onnx_ir leaves out and what it doubles.


def remarked() -> ModelProto:
    """Make a model with metadata everywhere and remarks on values that are not there."""
    large = numpy_helper.from_array(np.ones(512, np.float32), "large")
    small = numpy_helper.from_array(np.ones(512, np.float32)[:1], "small")
    held = numpy_helper.from_array(np.ones(512, np.float32), "held")
    nodes = [
        helper.make_node("Constant", [], ["c"], "constant", value=held),
        helper.make_node("Add", ["large", "c"], ["s"], "add"),
        helper.make_node("Mul", ["s", "small"], ["y"], "mul"),
        helper.make_node("Twice", ["x"], ["z"], "call", domain="local"),
    ]
    infos = [helper.make_tensor_value_info(n, 1, [512]) for n in ("y", "z")]
    inputs = [helper.make_tensor_value_info("x", 1, [512])]
    graph = helper.make_graph(nodes, "g", inputs, infos, [large, small])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    double = helper.make_node("Add", ["u", "u"], ["v"], "double")
    function = helper.make_function("local", "Twice", ["u"], ["v"], [double], opsets[:1])
    model = helper.make_model(
        graph, functions=[function], opset_imports=opsets, ir_version=10, doc_string="doc"
    )
    for message in described(model):
        for key in ("b", "a"):
            message.metadata_props.add(key=key, value=f"of {key}")
    for stale in ("gone", "large", "s"):
        model.graph.value_info.append(helper.make_tensor_value_info(stale, 1, [512]))
    for stale in ("gone", "large", "y"):
        note = model.graph.quantization_annotation.add(tensor_name=stale)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="small")
    training = model.training_info.add()
    training.algorithm.node.append(helper.make_node("Neg", ["large"], ["t"], "step"))
    training.algorithm.initializer.append(large)
    training.update_binding.add(key="large", value="t")
    return model


def described(model: ModelProto) -> list[Message]:
    graph = model.graph
    return [
        model,
        graph,
        model.functions[0],
        model.functions[0].node[0],
        *graph.node,
        *graph.initializer,
        graph.node[0].attribute[0].t,
        *graph.input,
        *graph.output,
    ]


def test_metadata_and_remarks_survive_as_a_proto() -> None:
    model = remarked()
    once = model_io.to_proto(model_io.from_proto(model))
    twice = model_io.to_proto(model_io.from_proto(once))
    assert difference(model, once) is None
    assert difference(model, twice) is None
    assert twice.SerializeToString(deterministic=True) == once.SerializeToString(
        deterministic=True
    )


@in_every_layout
def test_metadata_and_remarks_survive_two_round_trips(
    tmp_path: Path, layout: placement.Layout
) -> None:
    source = tmp_path / "0.onnx"
    source.write_bytes(remarked().SerializeToString())
    for i in (1, 2):
        path = tmp_path / f"{i}.onnx"
        saving.save(model_io.load(tmp_path / f"{i - 1}.onnx"), path, layout=layout)
        assert difference(whole(source), whole(path)) is None
        for message in described(whole(path)):
            assert sorted(p.key for p in message.metadata_props) == ["a", "b"]
            assert all(p.value == f"of {p.key}" for p in message.metadata_props)
    assert onnx.load(path).training_info == remarked().training_info


def test_remarks_on_values_survive_an_edit() -> None:
    model = model_io.from_proto(remarked())
    model.graph.name = "edited"
    zero = ir.Tensor(np.zeros(1, np.float32), name="small")
    model.graph.initializers["small"].const_value = zero
    again = model_io.to_proto(model)
    assert difference(remarked(), again) == "model.graph.name was 'g', is 'edited'"
    again.graph.name = "g"
    assert "initializer[1]" in str(difference(remarked(), again))
    assert again.training_info == remarked().training_info


def test_value_info_of_initializers_is_neither_added_nor_lost(tmp_path: Path) -> None:
    for name in fixtures.names():
        source = fixtures.built(name)
        path = tmp_path / name
        saving.save(model_io.load(source), path)
        before, after = (onnx.load(p, load_external_data=False) for p in (source, path))
        assert {v.name for v in after.graph.value_info} == {
            v.name for v in before.graph.value_info
        }


def test_the_digest_of_a_payload_is_that_of_its_bytes(tmp_path: Path) -> None:
    """The oracle of this file itself."""
    path = tmp_path / "model.onnx"
    path.write_bytes(sized("w", (256,), b"abcd" * 256).SerializeToString())
    digest = hashlib.sha256(b"abcd" * 256).hexdigest()
    assert payload.tensor_digests(path) == {"graph > w": digest}
