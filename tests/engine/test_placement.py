"""Weights of every origin in data files, ranges that overlap, and what is in the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxforge import PassManager, lazy, model_io, placement, saving
from onnxforge.errors import ModelError
from onnxforge.lazy import DerivedTensor
from onnxforge.manager import Report
from onnxforge.placement import PLACEMENT, Layout, Placement
from onnxforge.storage.extents import overlapping
from support import fixtures, oracle, payload, protos
from support.places import Place, assert_tidy, contents, places

MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _no_flush() -> Iterator[None]:
    """Nothing dies here, so nobody has to wait for the disk."""
    with mock.patch.object(os, "fsync"):
        yield


def floats(name: str, count: int, start: int = 0) -> TensorProto:
    return numpy_helper.from_array(np.arange(count, dtype=np.float32) + start, name)


def proto_of(weights: Sequence[TensorProto], *nodes: onnx.NodeProto) -> ModelProto:
    graph = helper.make_graph(list(nodes), "g", [], [], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def held(name: str, count: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=floats(name, count))


def written(model: ModelProto, folder: Path, name: str = "in.onnx") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


def save(model: ir.Model, path: Path, asked: Placement, **options: bool) -> saving.Saved:
    path.parent.mkdir(exist_ok=True)
    model.meta[PLACEMENT] = asked
    return saving.save(model, path, **options)


def run(text: str, source: Path, target: Path, **options: bool) -> Report:
    target.parent.mkdir(exist_ok=True)
    return PassManager(text).run(source, target, **options)


def told(report: Report, code: str) -> list[str]:
    findings = [*report.findings, *(f for step in report.passes for f in step.findings)]
    return [str(finding) for finding in findings if finding.code == code]


SHARDS = Placement(single=False, max_bytes=3000)


# Weights of every origin.


def doubled(block: np.ndarray, out: np.ndarray, start: int) -> None:
    del start
    np.multiply(block, 2, out=out)


def test_weights_that_a_user_made_in_python(tmp_path: Path) -> None:
    plain, packed = np.arange(300, dtype=np.float32), np.arange(2600, dtype=np.int8) % 8
    (tmp_path / "data").write_bytes(bytes(40) + plain.tobytes())
    shape = ir.Shape([300])
    outer = ir.ExternalTensor(
        "data", 40, 1200, ir.DataType.FLOAT, shape=shape, name="", base_dir=tmp_path
    )
    tensors: dict[str, ir.TensorProtocol] = {
        "array": ir.tensor(plain + 1),
        "external": outer,
        "lazy": ir.LazyTensor(lambda: ir.tensor(plain + 2), ir.DataType.FLOAT, shape),
        "derived": DerivedTensor(ir.tensor(plain), ir.DataType.FLOAT, doubled),
        "derived from outside": DerivedTensor(outer, ir.DataType.FLOAT, doubled),
        "packed": ir.tensor(packed.astype(ir.DataType.INT4.numpy())),
        "proto": ir.from_proto(floats("proto", 300, 9)),
        "text": ir.StringTensor([b"x" * 2000], shape=ir.Shape([1])),
    }
    values = []
    for name, tensor in tensors.items():
        tensor.name = name
        values.append(ir.Value(name=name, const_value=tensor))
        values[-1].type, values[-1].shape = ir.TensorType(tensor.dtype), tensor.shape
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    PassManager("shard{max_bytes=3000}").apply(model)
    saving.save(model, tmp_path / "m.onnx")
    wanted = {
        "array": plain + 1,
        "external": plain,
        "lazy": plain + 2,
        "derived": plain * 2,
        "derived from outside": plain * 2,
        "packed": packed,
        "proto": plain + 9,
        "text": np.array(["x" * 2000]),
    }
    assert set(places(tmp_path / "m.onnx")) == wanted.keys() - {"text"}
    assert_tidy(tmp_path / "m.onnx", align=64, max_bytes=3000)
    for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer:
        found = numpy_helper.to_array(tensor)
        assert np.array_equal(found.astype(wanted[tensor.name].dtype), wanted[tensor.name])


def test_one_tensor_object_under_many_names_has_one_place(tmp_path: Path) -> None:
    model = model_io.load(written(proto_of([floats("a", 300), floats("b", 300)]), tmp_path))
    values = model.graph.initializers
    values["b"].const_value = values["a"].const_value
    save(model, tmp_path / "m.onnx", SHARDS)
    place = Place("m.onnx.data.000", 0, 1200)
    assert places(tmp_path / "m.onnx") == {"a": place, "b": place}


def test_a_default_of_an_input_goes_outside_and_can_be_overridden(tmp_path: Path) -> None:
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, [300])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [300])
    model = proto_of([floats("w", 300)], helper.make_node("Neg", ["w"], ["y"]))
    model.graph.input.append(weight)
    model.graph.output.append(y)
    for version in (3, 9):  # before IR 4 all initializers are inputs
        model.ir_version = version
        path = tmp_path / str(version) / "m.onnx"
        run("shard", written(model, tmp_path), path)
        assert set(places(path)) == {"w"}
        for feeds in [{}] if version == 3 else [{}, {"w": np.ones(300, np.float32)}]:
            oracle.assert_bit_equal(oracle.run(path, feeds), oracle.run(model, feeds))


def test_proto_in_proto_out_with_its_data_where_they_were(tmp_path: Path) -> None:
    source = fixtures.copied("external_mixed", tmp_path)
    proto = onnx.load(source, load_external_data=False)
    before = proto.SerializeToString()
    result, report = PassManager("shard{max_bytes=2KiB}").apply(proto, tmp_path)
    assert not report.modified
    assert protos.unlike(proto, result) is None
    assert proto.SerializeToString() == before
    result, _ = PassManager("shard{max_bytes=2KiB lift=true}").apply(proto, tmp_path)
    assert proto.SerializeToString() == before
    (tmp_path / "again.onnx").write_bytes(result.SerializeToString())
    assert payload.tensor_digests(tmp_path / "again.onnx") == {
        key.removesuffix(" > value"): sha
        for key, sha in payload.tensor_digests(source).items()
    }


def test_a_request_contradicts_a_layout(tmp_path: Path) -> None:
    model = model_io.load(written(proto_of([floats("w", 300)]), tmp_path))
    layouts: list[Layout] = ["inline", "sidecar"]
    model.meta[PLACEMENT] = SHARDS
    for layout in layouts:
        with pytest.raises(ModelError, match=f"leave out the {layout} layout"):
            saving.save(model, tmp_path / "out.onnx", layout=layout)
    assert set(contents(tmp_path)) == {"in.onnx"}


# What does not fit into one proto.


@pytest.fixture
def six_kilobytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if protobuf took 6,000 bytes."""
    for module in (placement, model_io):
        monkeypatch.setattr(module, "MAX_PROTO_BYTES", 6000)


def full() -> ModelProto:
    """A model that has to put into data files what else stays in a model."""
    body = helper.make_graph(
        [helper.make_node("Neg", ["inner"], ["i"])],
        "body",
        [],
        [helper.make_tensor_value_info("i", TensorProto.FLOAT, [1024])],
        [floats("inner", 1024)],
    )
    branches = {"then_branch": body, "else_branch": body}
    choice = helper.make_node("If", ["flag"], ["c"], "choice", **branches)
    fill = helper.make_node("Custom", [], ["f"], "fill", domain="org", value=floats("", 300))
    model = proto_of([floats("w", 300)], choice, held("held", 1300), fill)
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    model.opset_import.add(domain="org", version=1)
    return model


@pytest.mark.usefixtures("six_kilobytes")
def test_nodes_give_up_their_tensors_where_there_is_no_other_way(tmp_path: Path) -> None:
    source, path = written(full(), tmp_path), tmp_path / "out" / "m.onnx"
    report = run("shard{max_bytes=6000}", source, path)
    assert set(places(path)) == {"w", "inner", "inner #2", "held", "f"}
    assert len(told(report, "OF321")) == 5
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    run("shard{max_bytes=6000 lift=true}", source, tmp_path / "lifted" / "m.onnx")
    assert set(places(tmp_path / "lifted" / "m.onnx")) == {
        "w",
        "inner",
        "inner #2",
        "held",
    }


@pytest.mark.usefixtures("six_kilobytes")
def test_what_cannot_go_anywhere_is_told(tmp_path: Path) -> None:
    source = written(full(), tmp_path)
    for text in ("shard{target=browser}", "shard{inline_below=5000}"):
        if "browser" in text:
            PassManager(text).run(source, None)  # a browser is asked for its own limit
            continue
        with pytest.raises(Exception, match=r"does not fit there: \d+ bytes, at most 6000"):
            run(text, source, tmp_path / "out" / "m.onnx")
        assert contents(tmp_path / "out") == {}


def test_of_a_model_that_fits_nodes_keep_their_tensors(tmp_path: Path) -> None:
    source, path = written(full(), tmp_path), tmp_path / "out" / "m.onnx"
    report = run("shard{max_bytes=6000}", source, path)
    assert set(places(path)) == {"w", "inner", "inner #2"}
    assert [text.split(":")[0] for text in told(report, "OF325")] == [
        "OF325 held",
        "OF325 fill.value",
    ]


# Ranges that overlap.


def overlapped(ranges: Sequence[tuple[int, int]], folder: Path) -> Path:
    """Write a model of int8 weights that lie in these ranges of one file."""
    folder.mkdir(exist_ok=True)
    size = max((stop for _, stop in ranges), default=0)
    (folder / "w.bin").write_bytes(np.random.default_rng(7).bytes(size))
    weights = []
    for i, (start, stop) in enumerate(ranges):
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.INT8, dims=[stop - start])
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": "w.bin", "offset": start, "length": stop - start}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
    return written(proto_of(weights), folder)


TORN = [(0, 1200), (800, 2400), (2400, 3500), (3300, 3400), (5000, 6100), (5000, 6100)]


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        # 2400 bytes that two share, 1100 of which one holds another, 1100 with two names.
        ("single=true", ["_data 0", "_data 2432", "_data 3584"]),
        ("max_bytes=2400", [".data.000 0", ".data.001 0", ".data.001 1152"]),
        ("max_bytes=3600", [".data.000 0", ".data.000 2432", ".data.001 0"]),
        ("max_bytes=3600 align=1", [".data.000 0", ".data.000 2400", ".data.001 0"]),
        ("max_bytes=3600 order=size", [".data.000 0", ".data.000 2432", ".data.001 0"]),
    ],
)
def test_what_is_shared_in_part_stays_shared(
    tmp_path: Path, options: str, starts: list[str]
) -> None:
    source, path = overlapped(TORN, tmp_path), tmp_path / "out" / "m.onnx"
    report = run(f"shard{{inline_below=0 {options}}}", source, path)
    inside = [(0, 0, 1200), (0, 800, 1600), (1, 0, 1100), (1, 900, 100), (2, 0, 1100)]
    wanted = {}
    for i, (group, offset, length) in enumerate([*inside, inside[-1]]):
        name, start = starts[group].split()
        wanted[f"w{i}"] = Place(f"m.onnx{name}", int(start) + offset, length)
    assert places(path) == wanted
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    assert_tidy(path, align=1 if "align" in options else 64, overlaps=True)
    assert told(report, "OF904") == [
        "OF904 w.bin: tensors overlap; what they share stays shared ('w0', 'w1')",
        "OF904 w.bin: tensors overlap; what they share stays shared ('w2', 'w3')",
    ]


@pytest.mark.parametrize("layout", ["keep", "inline", "sidecar"])
@pytest.mark.parametrize("text", ["fp16w", "shard", "fp16w,shard", "shard,fp16w"])
def test_overlapping_weights_survive_every_way(
    tmp_path: Path, layout: Layout, text: str
) -> None:
    source, path = overlapped(TORN[:2], tmp_path), tmp_path / "out" / "m.onnx"
    source.write_bytes(reading_floats(source).SerializeToString())
    path.parent.mkdir()
    if "shard" in text and layout != "keep":
        with pytest.raises(ModelError, match="leave out"):
            PassManager(text).run(source, path, layout=layout)
        return
    report = PassManager(text).run(source, path, layout=layout)
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    assert len(told(report, "OF904")) == 1
    if "fp16w" in text:
        assert [line.split(":")[0] for line in told(report, "OF211")] == [
            "OF211 w0",
            "OF211 w1",
        ]
    sizes = [size for file, size in report.written.items() if "data" in Path(file).name]
    assert sizes == ([] if layout == "inline" else [2400])
    x = {"x": np.ones(4, np.float32)}
    oracle.assert_bit_equal(oracle.run(path, x), oracle.run(source, x))


def reading_floats(source: Path) -> ModelProto:
    """The model with its weights as float32, and a node that reads each."""
    model = onnx.load(source, load_external_data=False)
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]))
    for tensor in model.graph.initializer:
        tensor.data_type = TensorProto.FLOAT
        tensor.dims[:] = [tensor.dims[0] // 16, 4]
        name, shape = f"y_{tensor.name}", list(tensor.dims)
        model.graph.node.append(helper.make_node("Add", ["x", tensor.name], [name]))
        model.graph.output.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        )
    return model


ranges_ = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 120)).map(lambda p: (p[0], sum(p))),
    max_size=10,
)


@given(ranges=ranges_, align=st.integers(1, 70), max_bytes=st.none() | st.integers(420, 600))
def test_any_ranges_take_no_more_room_than_they_did(
    tmp_path_factory: pytest.TempPathFactory,
    ranges: list[tuple[int, int]],
    align: int,
    max_bytes: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    source, path = overlapped(ranges, folder), folder / "out" / "m.onnx"
    single = max_bytes is None
    options = "single=true" if single else f"max_bytes={max_bytes} order=size"
    run(f"shard{{inline_below=0 align={align} {options}}}", source, path)
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    sizes = assert_tidy(path, align=align, max_bytes=max_bytes, overlaps=True)
    covered = {byte for start, stop in ranges for byte in range(start, stop)}
    starts = len({p.offset for p in places(path).values()})
    assert sum(sizes.values()) <= len(covered) + align * starts
    if align == 1:
        assert sum(sizes.values()) == len(covered)


@given(ranges=ranges_)
def test_groups_are_what_hangs_together(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    source = overlapped(ranges, tmp_path_factory.mktemp("groups"))
    values = model_io.load(source).graph.initializers.values()
    tensors = [v.const_value for v in values if v.const_value is not None]
    found = {
        frozenset((t.offset, t.offset + t.nbytes) for t in g) for g in overlapping(tensors)
    }
    left = {(start, stop) for start, stop in ranges if start < stop}
    wanted = set()
    while left:
        group, size = {left.pop()}, 0
        while size < len(group):
            size = len(group)
            group |= {r for r in left if any(r[0] < g[1] and g[0] < r[1] for g in group)}
        left -= group
        if len(group) > 1:
            wanted.add(frozenset(group))
    assert found == wanted


# What is in the way, and what is left over.


def test_shards_that_the_new_model_does_not_read_are_told(tmp_path: Path) -> None:
    model = proto_of([floats(f"w{i}", 300, i) for i in range(5)])
    source, path = written(model, tmp_path), tmp_path / "out" / "m.onnx"
    run("shard{max_bytes=1200 manifest=true}", source, path)
    before = contents(path.parent)
    for text, left in [
        ("shard{max_bytes=3000 manifest=true}", ["data.003", "data.004"]),
        ("shard{max_bytes=1200}", ["sha256"]),
        ("shard{single=true}", [*(f"data.00{i}" for i in range(5)), "sha256"]),
        ("shard{inline_below=1MB}", ["sha256"]),
    ]:
        if "inline" in text:
            left = [*(f"data.00{i}" for i in range(5)), "sha256"]
            run("shard{max_bytes=1200}", source, path, force=True)
        report = run(text, source, path, force=True)
        assert told(report, "OF902") == [
            f"OF902 {path}.{name}: belongs to what was replaced" for name in left
        ]
        assert payload.tensor_digests(path) == payload.tensor_digests(source)
        run("shard{max_bytes=1200 manifest=true}", source, path, force=True)
        assert contents(path.parent) == before | {
            n: b for n, b in contents(path.parent).items() if n == "m.onnx_data"
        }


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data.000", "m.onnx.data.001"])
def test_nothing_is_replaced_unasked(tmp_path: Path, name: str) -> None:
    model = proto_of([floats("a", 300), floats("b", 300, 1)])
    source, path = written(model, tmp_path), tmp_path / "out" / "m.onnx"
    path.parent.mkdir()
    (path.parent / name).write_bytes(b"precious")
    with pytest.raises(ModelError) as raised:
        run("shard{max_bytes=1200}", source, path)
    assert str(raised.value) == f"{path.parent / name}: exists; --force overwrites it"
    assert contents(path.parent) == {name: b"precious"}
    run("shard{max_bytes=1200}", source, path, force=True)
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    assert len(contents(path.parent)) == 3


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_in_the_place_of_a_shard_stays(tmp_path: Path, force: bool) -> None:
    model = proto_of([floats("a", 300), floats("b", 300, 1)])
    source, path = written(model, tmp_path), tmp_path / "out" / "m.onnx"
    (path.parent / "m.onnx.data.001").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"m\.onnx\.data\.001: is a folder"):
        run("shard{max_bytes=1200}", source, path, force=force)
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx.data.001"]


def test_a_shard_that_another_model_reads_is_not_replaced(tmp_path: Path) -> None:
    model = proto_of([floats("a", 300), floats("b", 300, 1)])
    source, path = written(model, tmp_path), tmp_path / "out" / "m.onnx"
    run("shard{max_bytes=1200}", source, path)
    other = proto_of([floats("other", 300)])
    tensor = other.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="./m.onnx.data.001")
    written(other, path.parent, "other.onnx")
    before = contents(path.parent)
    for text in ("shard{max_bytes=1200}", "shard{max_bytes=1200 order=size}"):
        with pytest.raises(ModelError) as raised:
            run(text, source, path, force=True)
        data, reader = (path.parent / n for n in ("m.onnx.data.001", "other.onnx"))
        assert str(raised.value).endswith(
            f"{data}: holds data of {reader} as well, which would be lost"
        )
        assert contents(path.parent) == before
    run("shard{max_bytes=2416}", source, path, force=True)  # one file, of another name
    assert payload.tensor_digests(path.parent / "other.onnx")


def test_the_shards_of_the_source_are_not_replaced_by_another_model(tmp_path: Path) -> None:
    model = proto_of([floats("a", 300), floats("b", 300, 1)])
    source, path = written(model, tmp_path), tmp_path / "out" / "m.onnx"
    run("shard{max_bytes=1200}", source, path)
    moved = path.rename(path.with_name("renamed.onnx"))
    before = contents(path.parent)
    with pytest.raises(ModelError, match="holds data of"):
        run("shard{max_bytes=1200}", moved, path, force=True)
    assert contents(path.parent) == before


@pytest.mark.parametrize("layout", ["keep", "inline", "sidecar"])
def test_shards_come_together_again(tmp_path: Path, layout: Layout) -> None:
    model = proto_of([floats("a", 300), floats("b", 300, 1), floats("small", 3)])
    source, path = written(model, tmp_path), tmp_path / "out" / "m.onnx"
    run("shard{max_bytes=1200}", source, path)
    saved = saving.save(model_io.load(path), path, layout=layout, force=True)
    assert payload.tensor_digests(path) == payload.tensor_digests(source)
    assert saved.left == (path.with_name("m.onnx.data.000"), path.with_name("m.onnx.data.001"))
    straight = tmp_path / "straight" / "m.onnx"
    straight.parent.mkdir()
    saving.save(
        model_io.load(source), straight, layout="sidecar" if layout == "keep" else layout
    )
    for name, content in contents(straight.parent).items():
        assert (path.parent / name).read_bytes() == content


def test_names_of_data_files() -> None:
    assert Placement().names("m.onnx", 0) == []
    assert Placement().names("m.onnx", 1) == ["m.onnx_data"]
    assert SHARDS.names("m.onnx", 2) == ["m.onnx.data.000", "m.onnx.data.001"]
    assert SHARDS.names("m.onnx", 1001)[-1] == "m.onnx.data.1000"


def test_progress_adds_up_to_the_bytes_of_all_weights(tmp_path: Path) -> None:
    model = proto_of([floats(f"w{i}", 300, i) for i in range(3)] + [floats("small", 10)])
    steps: list[tuple[int, int]] = []
    manager = PassManager("shard{max_bytes=2500}")
    manager.run(written(model, tmp_path), tmp_path / "m.onnx", progress=partial(_note, steps))
    assert sum(written for written, _ in steps) == 3600
    assert {total for _, total in steps} == {3600}


def _note(steps: list[tuple[int, int]], written: int, total: int) -> None:
    steps.append((written, total))  # safe on any thread


# Copies inside the kernel.


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what the kernel copied; it does so whatever the file system."""
    copied: list[int] = []

    def copy(source: int, target: int, size: int, start: int, at: int) -> int:
        content = os.pread(source, size, start)
        os.pwrite(target, content, at)
        copied.append(len(content))
        return len(content)

    monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    return copied


def large() -> ModelProto:
    sizes = {"a": 3 * MIB, "b": MIB + 4, "c": MIB, "d": MIB - 4, "e": 2048}
    rng = np.random.default_rng(3)
    return proto_of(
        [
            numpy_helper.from_array(np.frombuffer(rng.bytes(n), "i4"), w)
            for w, n in sizes.items()
        ]
    )


def _absent(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "copy_file_range", raising=False)


def _refusing(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    patch.setattr(os, "copy_file_range", refuse, raising=False)


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="the calls of POSIX")
def test_large_tensors_are_copied_inside_the_kernel(tmp_path: Path, kernel: list[int]) -> None:
    source = written(large(), tmp_path)
    first, second = (tmp_path / name / "m.onnx" for name in ("first", "second"))
    for before, after, options in [
        (source, first, "max_bytes=4MiB"),
        (first, second, "single=true"),
        (first, tmp_path / "third" / "m.onnx", "max_bytes=4MiB order=size"),
    ]:
        kernel.clear()
        run(f"shard{{{options}}}", before, after, force=True)
        assert sum(kernel) == 3 * MIB + MIB + 4 + MIB
        assert payload.tensor_digests(after) == payload.tensor_digests(source)


@pytest.mark.parametrize("system", [_absent, _refusing])
def test_without_the_kernel_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: Callable[..., None]
) -> None:
    source = written(large(), tmp_path)
    found = []
    for name in ("rich", "poor"):
        with monkeypatch.context() as patch:
            system(patch) if name == "poor" else None
            run("shard{max_bytes=4MiB}", source, tmp_path / name / "m.onnx")
        found.append(contents(tmp_path / name))
    assert found[0] == found[1]
    assert len(found[0]) == 3


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="no copy inside the kernel")
def test_the_kernel_of_this_machine_copies_or_says_that_it_cannot(tmp_path: Path) -> None:
    source = written(large(), tmp_path)
    with mock.patch.object(os, "copy_file_range", wraps=os.copy_file_range) as copy:
        run("shard{max_bytes=4MiB}", source, tmp_path / "out" / "m.onnx")
    assert copy.call_count >= 1
    assert payload.tensor_digests(tmp_path / "out" / "m.onnx") == payload.tensor_digests(
        source
    )
    assert lazy.BLOCK_BYTES == MIB
