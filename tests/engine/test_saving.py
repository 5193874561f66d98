"""Which weight goes into which file, in which place, and what is never overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxforge import lazy, model_io, placement, saving
from onnxforge.errors import ModelError
from onnxforge.lazy import DerivedTensor
from onnxforge.placement import PLACEMENT, Layout, Placement
from onnxforge.storage import writer
from support import fixtures, oracle, payload

LAYOUTS: list[Layout] = ["keep", "inline", "sidecar"]
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)
on_every_fixture = pytest.mark.parametrize("name", fixtures.names())
posix = pytest.mark.skipif(os.name == "nt", reason="modes and masks of POSIX")
EXTERNAL = ["external_one", "external_two", "external_mixed"]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies outside."""

    location: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def places(path: Path) -> dict[str, Place]:
    """Name of every tensor that lies outside, and where it lies."""
    found = {}
    for name, tensor in tensors(onnx.load(path, load_external_data=False).graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            keys = [entry.key for entry in tensor.external_data]
            assert keys == ["location", "offset", "length"]
            location, offset, length = (entry.value for entry in tensor.external_data)
            found[name] = Place(location, int(offset), int(length))
            assert not tensor.HasField("raw_data")
    return found


def tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield node.output[0], attribute.t
            if attribute.HasField("g"):
                yield from tensors(attribute.g)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def floats(name: str, count: int) -> TensorProto:
    return numpy_helper.from_array(np.arange(count, dtype=np.float32), name)


def model(weights: list[TensorProto], *nodes: onnx.NodeProto) -> ModelProto:
    graph = helper.make_graph(list(nodes), "g", [], [], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def written(proto: ModelProto, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "source.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def save(proto: ModelProto, folder: Path, **options) -> Path:
    path = folder / "model.onnx"
    saving.save(model_io.load(written(proto, folder / "source")), path, **options)
    return path


# What goes outside.


@pytest.mark.parametrize("count", [255, 256, 257])
def test_a_tensor_of_1024_bytes_goes_outside_and_a_smaller_one_does_not(
    tmp_path: Path, count: int
) -> None:
    path = save(model([floats("w", count)]), tmp_path, layout="sidecar")
    assert ("w" in places(path)) == (count >= 256)
    assert (tmp_path / "model.onnx_data").exists() == (count >= 256)


def hiding() -> ModelProto:
    """A model with large weights of every kind, and what has to stay inside."""
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["body_c"], value=floats("body_c", 300))],
        "body",
        [],
        [helper.make_tensor_value_info("body_c", 1, [300])],
        [floats("body_w", 300)],
    )
    names = np.array([b"x" * 2000] * 3, dtype=object)
    sizes = numpy_helper.from_array(np.ones(300, np.int64), "sizes")
    branches = {"then_branch": body, "else_branch": body}
    nodes = [
        helper.make_node("If", ["flag"], ["i"], **branches),
        helper.make_node("Constant", [], ["c"], value=floats("c", 300)),
        helper.make_node("Split", ["plain", "sizes"], [f"s{i}" for i in range(300)]),
    ]
    weights = [
        floats("plain", 300),
        floats("small", 3),
        sizes,
        numpy_helper.from_array(np.zeros((0, 300), np.float32), "empty"),
        helper.make_tensor("strings", TensorProto.STRING, [3], names),
        helper.make_tensor("packed", TensorProto.FLOAT, [300], [0.5] * 300),
        helper.make_tensor("wide", TensorProto.DOUBLE, [300], [0.5] * 300),
        numpy_helper.from_array(np.array(1.5, np.float32), "scalar"),
        numpy_helper.from_array(np.arange(600, dtype=np.int8).reshape(300, 2), "int8"),
        numpy_helper.from_array(np.ones(700, np.float16), "half"),
        numpy_helper.from_array(np.ones(1024, np.bool_), "mask"),
    ]
    proto = model(weights, *nodes)
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    return proto


def test_a_sidecar_holds_the_large_initializers_of_the_main_graph(tmp_path: Path) -> None:
    path = save(hiding(), tmp_path, layout="sidecar")
    assert set(places(path)) == {"plain", "packed", "wide", "half", "mask"}
    source = tmp_path / "source" / "source.onnx"
    assert payload.tensor_digests(path) == payload.tensor_digests(source)


def test_what_a_shape_inside_a_branch_depends_on_stays_inside(tmp_path: Path) -> None:
    sizes = numpy_helper.from_array(np.ones(300, np.int64), "sizes")
    split = helper.make_node("Split", ["w", "sizes"], [f"s{i}" for i in range(300)])
    body = helper.make_graph([split], "b", [], [helper.make_tensor_value_info("s0", 1, [1])])
    node = helper.make_node("If", ["flag"], ["i"], then_branch=body, else_branch=body)
    path = save(model([floats("w", 300), sizes], node), tmp_path, layout="sidecar")
    assert set(places(path)) == {"w"}


def test_inline_puts_everything_into_one_file(tmp_path: Path) -> None:
    for name in EXTERNAL:
        path = tmp_path / name / "model.onnx"
        path.parent.mkdir()
        source = fixtures.built(name)
        result = saving.save(model_io.load(source), path, layout="inline")
        assert places(path) == {}
        assert set(contents(path.parent)) == {"model.onnx"}
        assert result.layout == "inline"
        assert payload.tensor_digests(path) == payload.tensor_digests(source)


@on_every_fixture
def test_keep_keeps_a_file_alone_alone_and_data_files_outside(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "model.onnx"
    result = saving.save(model_io.load(fixtures.built(name)), path)
    outside = name in EXTERNAL
    expected = {"model.onnx", "model.onnx_data"} if outside else {"model.onnx"}
    assert set(contents(tmp_path)) == expected
    assert bool(places(path)) == outside
    assert result.layout == ("sidecar" if outside else "inline")


@in_every_layout
@on_every_fixture
def test_the_files_and_sizes_that_were_written_are_told(
    tmp_path: Path, name: str, layout: Layout
) -> None:
    result = saving.save(
        model_io.load(fixtures.built(name)), tmp_path / "model.onnx", layout=layout
    )
    assert result.files == {p: p.stat().st_size for p in tmp_path.iterdir()}


def test_a_constant_that_lay_outside_stays_outside(tmp_path: Path) -> None:
    source = fixtures.built("external_mixed")
    path = tmp_path / "model.onnx"
    saving.save(model_io.load(source), path)
    assert set(places(path)) == {"up_w", "down_w", "tied_w"}
    proto = onnx.load(path, load_external_data=False)
    assert [n.output[0] for n in proto.graph.node if n.op_type == "Constant"] == ["down_w"]


def test_a_weight_of_a_body_that_lay_outside_stays_outside(tmp_path: Path) -> None:
    proto = hiding()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "data.bin").write_bytes(floats("w", 300).raw_data)
    then = proto.graph.node[0].attribute[0].g
    then.initializer[0].ClearField("raw_data")
    then.initializer[0].data_location = TensorProto.EXTERNAL
    then.initializer[0].external_data.add(key="location", value="data.bin")
    path = save(proto, tmp_path)
    assert set(places(path)) == {"plain", "packed", "wide", "half", "mask", "body_w"}
    branches = onnx.load(path, load_external_data=False).graph.node[0].attribute
    locations = [branch.g.initializer[0].data_location for branch in branches]
    assert locations == [TensorProto.EXTERNAL, TensorProto.DEFAULT]


def cast(block: np.ndarray, out: np.ndarray, start: int) -> None:
    del start
    out[:] = block.astype(out.dtype)


def test_a_derived_constant_goes_where_its_source_was(tmp_path: Path) -> None:
    loaded = model_io.load(fixtures.built("external_mixed"))
    node = next(n for n in loaded.graph if n.op_type == "Constant")
    source = node.attributes["value"].as_tensor()
    double = DerivedTensor(source, ir.DataType.DOUBLE, cast)
    node.attributes["value"] = ir.AttrTensor("value", double)
    saving.save(loaded, tmp_path / "model.onnx")
    assert places(tmp_path / "model.onnx")["down_w"].length == 2 * source.nbytes


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_weight_that_lay_outside_stays_there_only_if_it_is_tied(
    tmp_path: Path, tied: bool
) -> None:
    loaded = model_io.load(fixtures.built("external_one"))
    values = loaded.graph.initializers
    for name in ("down_w", "tied_w") if tied else ("down_w",):
        source = values[name].const_value
        assert source is not None
        values[name].const_value = DerivedTensor(source, ir.DataType.FLOAT16, cast)
    saving.save(loaded, tmp_path / "model.onnx")
    found = places(tmp_path / "model.onnx")
    if tied:
        assert found["down_w"] == found["tied_w"] == Place("model.onnx_data", 2048, 512)
    else:
        assert set(found) == {"up_w", "tied_w"}


def test_several_data_files_become_one(tmp_path: Path) -> None:
    source = fixtures.built("external_two")
    assert len(list(source.parent.iterdir())) == 3
    path = tmp_path / "model.onnx"
    saving.save(model_io.load(source), path)
    assert set(contents(tmp_path)) == {"model.onnx", "model.onnx_data"}
    assert {place.location for place in places(path).values()} == {"model.onnx_data"}
    assert set(places(path)) == {"up_w", "down_w", "tied_w"}
    assert payload.tensor_digests(path) == payload.tensor_digests(source)


# Where it goes.


def assert_tidy(path: Path, align: int) -> None:
    """Ranges sorted, apart, aligned; gaps zero and short; the last ends with the file."""
    data = path.with_name(f"{path.name}_data").read_bytes()
    ranges = sorted({(p.offset, p.end) for p in places(path).values()})
    assert list(dict.fromkeys((p.offset, p.end) for p in places(path).values())) == ranges
    end = 0
    for start, stop in ranges:
        assert start % align == 0
        assert end <= start < end + align
        assert not any(data[end:start])
        assert start < stop
        end = stop
    assert end == len(data)


@pytest.mark.parametrize("align", [1, 64, 100, 4096, 65536])
@on_every_fixture
def test_a_sidecar_is_tidy(tmp_path: Path, name: str, align: int) -> None:
    path = tmp_path / "model.onnx"
    model_ = model_io.load(fixtures.built(name))
    model_.meta[PLACEMENT] = Placement(align=align)
    result = saving.save(model_, path)
    if result.layout == "sidecar":
        assert_tidy(path, align)
    assert payload.tensor_digests(path) == payload.tensor_digests(fixtures.built(name))


@given(
    counts=st.lists(st.integers(0, 2000), max_size=8),
    kinds=st.lists(st.sampled_from([np.int8, np.float16, np.float32]), min_size=8, max_size=8),
    align=st.integers(1, 300),
    workers=st.integers(1, 3),
)
def test_any_weights_lie_tidy_and_whole(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    kinds: list[type[np.generic]],
    align: int,
    workers: int,
) -> None:
    folder = tmp_path_factory.mktemp("tidy")
    arrays = [
        (np.arange(count) % 100 + i).astype(kind)
        for i, (count, kind) in enumerate(zip(counts, kinds, strict=False))
    ]
    weights = [numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(arrays)]
    loaded = model_io.load(written(model(weights), folder / "source"))
    loaded.meta[PLACEMENT] = Placement(align=align)
    path = folder / "model.onnx"
    saving.save(loaded, path, workers=workers)
    outside = {f"w{i}" for i, array in enumerate(arrays) if array.nbytes >= 1024}
    assert set(places(path)) == outside
    if outside:
        assert_tidy(path, align)
    for array, tensor in zip(arrays, onnx.load(path).graph.initializer, strict=True):
        assert numpy_helper.to_array(tensor).tobytes() == array.tobytes()


def test_weights_that_share_a_range_share_one_again(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    saving.save(model_io.load(fixtures.built("external_one")), path)
    found = places(path)
    assert found["down_w"] == found["tied_w"]
    assert found["down_w"] != found["up_w"]
    assert (tmp_path / "model.onnx_data").stat().st_size == 2048 + 1024
    saving.save(model_io.load(path), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx_data").stat().st_size == 2048 + 1024


def test_one_tensor_under_two_names_is_stored_once(tmp_path: Path) -> None:
    loaded = model_io.load(
        written(model([floats("a", 512), floats("b", 512)]), tmp_path / "s")
    )
    values = loaded.graph.initializers
    values["b"].const_value = values["a"].const_value
    saving.save(loaded, tmp_path / "model.onnx", layout="sidecar")
    found = places(tmp_path / "model.onnx")
    assert found == dict.fromkeys(["a", "b"], Place("model.onnx_data", 0, 2048))


# The same bytes everywhere.


@in_every_layout
@pytest.mark.parametrize("name", ["speech_encoder", "hiding_places", "external_two"])
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: Layout
) -> None:
    for module in (writer, lazy):
        monkeypatch.setattr(module, "BLOCK_BYTES", 512)
    results = []
    for workers in (1, 4, None):
        folder = tmp_path / str(workers)
        folder.mkdir()
        source = model_io.load(fixtures.built(name))
        saving.save(source, folder / "model.onnx", layout=layout, workers=workers)
        results.append(contents(folder))
    assert results[0] == results[1] == results[2]


_SAVE = """
import sys
from onnxforge import lazy, model_io, placement, saving
saving.save(model_io.load(sys.argv[1]), sys.argv[2], layout=sys.argv[3])
"""


def test_any_process_writes_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source.onnx"
    proto = onnx.load(fixtures.built("hiding_places"))
    for i in range(20):
        proto.metadata_props.add(key=f"key {i * 7 % 20}", value=str(i))
    source.write_bytes(proto.SerializeToString())
    running = []
    for seed in ("0", "12345"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", _SAVE, source, tmp_path / seed / "m.onnx", "sidecar"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        running.append(subprocess.Popen(command, env=environment))
    assert [process.wait(60) for process in running] == [0, 0]
    first, second = (contents(tmp_path / seed) for seed in ("0", "12345"))
    assert set(first) == {"m.onnx", "m.onnx_data"}
    assert first == second


def test_the_name_of_the_output_is_all_that_differs(tmp_path: Path) -> None:
    loaded = model_io.load(fixtures.built("external_one"))
    for name in ("first.onnx", "other.onnx"):
        saving.save(loaded, tmp_path / name)
    first, other = (tmp_path / f"{name}.onnx_data" for name in ("first", "other"))
    assert first.read_bytes() == other.read_bytes()
    renamed = (tmp_path / "first.onnx").read_bytes().replace(b"first.onnx", b"other.onnx")
    assert renamed == (tmp_path / "other.onnx").read_bytes()


def _note(told: list[tuple[int, int]], written: int, total: int) -> None:
    told.append((written, total))  # safe on any thread


def test_progress_adds_up_to_the_bytes_of_all_weights(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        told: list[tuple[int, int]] = []
        loaded = model_io.load(fixtures.built("external_two"))
        path = tmp_path / f"{layout}.onnx"
        saving.save(loaded, path, layout=layout, progress=partial(_note, told))
        assert {total for _, total in told} == {2048 + 128 + 1024 + 1024}
        assert sum(written for written, _ in told) == 2048 + 128 + 1024 + 1024


# Modes.


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_can_be_read_by_all(tmp_path: Path, mask: int, overwrite: bool) -> None:
    loaded = model_io.load(fixtures.built("external_one"))
    path = tmp_path / "model.onnx"
    if overwrite:
        for old in (path, path.with_name("model.onnx_data")):
            old.write_bytes(b"old")
            old.chmod(0o600)
    with umask(mask):
        saving.save(loaded, path, force=overwrite)
    assert [p.stat().st_mode & 0o7777 for p in tmp_path.iterdir()] == [0o644, 0o644]


# What is never overwritten.


@pytest.mark.parametrize("taken", ["model.onnx", "model.onnx_data"])
@pytest.mark.parametrize("name", ["external_one", "nameless"])
def test_what_exists_is_not_overwritten_unasked(tmp_path: Path, name: str, taken: str) -> None:
    (tmp_path / taken).write_bytes(b"precious")
    loaded = model_io.load(fixtures.built(name))
    path = tmp_path / "model.onnx"
    if name == "nameless" and taken.endswith("_data"):
        saving.save(loaded, path)  # it needs no data file
    else:
        with pytest.raises(ModelError) as raised:
            saving.save(loaded, path)
        assert str(raised.value) == f"{tmp_path / taken}: exists; --force overwrites it"
        assert contents(tmp_path) == {taken: b"precious"}
        saving.save(loaded, path, force=True)
    assert payload.tensor_digests(path) == payload.tensor_digests(fixtures.built(name))


@pytest.mark.parametrize("taken", ["model.onnx", "model.onnx_data"])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_never_overwritten(tmp_path: Path, taken: str, force: bool) -> None:
    (tmp_path / taken).mkdir()
    loaded = model_io.load(fixtures.built("external_one"))
    with pytest.raises(ModelError) as raised:
        saving.save(loaded, tmp_path / "model.onnx", force=force)
    assert str(raised.value) == f"{tmp_path / taken}: is a folder"
    assert [p.name for p in tmp_path.iterdir()] == [taken]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent: no such folder"):
        saving.save(
            model_io.load(fixtures.built("nameless")), tmp_path / "absent" / "model.onnx"
        )
    assert list(tmp_path.iterdir()) == []


# In place, beside, elsewhere.


@in_every_layout
@on_every_fixture
def test_a_model_can_be_saved_over_itself(tmp_path: Path, name: str, layout: Layout) -> None:
    path = fixtures.copied(name, tmp_path)
    before = payload.tensor_digests(path)
    loaded = model_io.load(path)
    with pytest.raises(ModelError, match="exists; --force"):
        saving.save(loaded, path, layout=layout)
    result = saving.save(loaded, path, layout=layout, force=True)
    assert payload.tensor_digests(path) == before
    assert set(result.files) <= set(tmp_path.iterdir())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    again = contents(tmp_path)
    saving.save(model_io.load(path), path, layout=layout, force=True)
    assert contents(tmp_path) == again


@pytest.mark.parametrize("layouts", [("sidecar", "inline"), ("inline", "sidecar")])
def test_a_model_with_constants_inside_and_weights_outside_can_change_in_place(
    tmp_path: Path, layouts: tuple[Layout, Layout]
) -> None:
    source = written(hiding(), tmp_path / "source")
    path = tmp_path / "model.onnx"
    saving.save(model_io.load(source), path, layout="sidecar")
    assert set(places(path)) == {"plain", "packed", "wide", "half", "mask"}
    for layout in layouts:
        saving.save(model_io.load(path), path, layout=layout, force=True)
        assert bool(places(path)) == (layout == "sidecar")
        assert payload.tensor_digests(path) == payload.tensor_digests(source)


def test_a_model_saved_over_its_own_files_says_that_they_changed(tmp_path: Path) -> None:
    path = fixtures.copied("external_one", tmp_path)
    loaded = model_io.load(path)
    saving.save(loaded, path, force=True)
    before = contents(tmp_path)
    with pytest.raises(ModelError, match="changed since the model was loaded"):
        saving.save(loaded, path, force=True)
    assert contents(tmp_path) == before


@in_every_layout
@on_every_fixture
def test_a_model_can_be_saved_beside_itself(tmp_path: Path, name: str, layout: Layout) -> None:
    source = fixtures.copied(name, tmp_path)
    before = contents(tmp_path)
    path = tmp_path / "beside.onnx"
    saving.save(model_io.load(source), path, layout=layout)
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


def test_a_relative_path_is_that_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fixtures.copied("external_one", tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(source.parent)
    loaded = model_io.load(source.name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = saving.save(loaded, "model.onnx")
    assert set(result.files) == set((tmp_path / "elsewhere").iterdir())
    result = saving.save(loaded, "../out/model.onnx")
    monkeypatch.chdir(tmp_path)
    for folder in ("elsewhere", "out"):
        path = tmp_path / folder / "model.onnx"
        assert payload.tensor_digests(path) == payload.tensor_digests(source)
        assert {place.location for place in places(path).values()} == {"model.onnx_data"}


@pytest.mark.parametrize(
    "name", ["größe 100%.onnx", "with\\backslash", "no_suffix", "-x.onnx"]
)
@posix
def test_the_output_may_have_any_name(tmp_path: Path, name: str) -> None:
    source = fixtures.built("external_one")
    saving.save(model_io.load(source), tmp_path / name)
    assert set(contents(tmp_path)) == {name, f"{name}_data"}
    assert payload.tensor_digests(tmp_path / name) == payload.tensor_digests(source)


# What does not fit into 2 GB.


@pytest.fixture
def two_kilobytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if protobuf took 6,000 bytes."""
    for module in (placement, model_io):
        monkeypatch.setattr(module, "MAX_PROTO_BYTES", 6000)


@pytest.mark.usefixtures("two_kilobytes")
def test_keep_goes_outside_when_one_file_would_be_too_large(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=floats("c", 300))
    path = save(model([floats("w", 512), floats("v", 1024)], constant), tmp_path)
    assert set(places(path)) == {"w", "v"}
    assert_tidy(path, 64)


@pytest.mark.usefixtures("two_kilobytes")
def test_keep_stays_inside_while_it_fits(tmp_path: Path) -> None:
    path = save(model([floats("w", 512), floats("v", 512)]), tmp_path)
    assert places(path) == {}


@pytest.mark.usefixtures("two_kilobytes")
def test_constants_go_outside_when_the_rest_would_be_too_large(tmp_path: Path) -> None:
    constants = [
        helper.make_node("Constant", [], [f"c{i}"], value=floats(f"c{i}", 1024))
        for i in (1, 2)
    ]
    path = save(model([floats("w", 1024)], *constants), tmp_path)
    assert set(places(path)) == {"w", "c1", "c2"}
    source = tmp_path / "source" / "source.onnx"
    assert payload.tensor_digests(path) == payload.tensor_digests(source)


@pytest.mark.usefixtures("two_kilobytes")
def test_a_model_too_large_for_inline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(ModelError, match="do not fit into one file of 2 GB"):
        save(model([floats("w", 2048)]), tmp_path, layout="inline", force=True)
    assert contents(tmp_path) == {"model.onnx": b"old"}


# The runtime.


@pytest.mark.parametrize("name", fixtures.names(runs=True))
@in_every_layout
def test_the_runtime_gives_the_same_outputs(tmp_path: Path, name: str, layout: Layout) -> None:
    source = fixtures.built(name)
    path = tmp_path / "model.onnx"
    saving.save(model_io.load(source), path, layout=layout)
    sample = fixtures.samples(name)[0]
    oracle.assert_bit_equal(oracle.run(path, sample), oracle.run(source, sample))
