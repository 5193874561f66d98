"""Equal weights of several models are stored once, and nothing else is ever merged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper, parser

from onnxforge import PassManager, cli, model_io, saving
from onnxforge.errors import ModelError, OnnxforgeError
from onnxforge.lazy import DerivedTensor
from onnxforge.manager import Report
from onnxforge.placement import PLACEMENT, Placement
from onnxforge.storage.sharing import by_content
from support import fixtures, oracle, payload
from support.places import Place, assert_tidy, contents, places

DATA = "shared.onnx_data"


@pytest.fixture(autouse=True, scope="module")
def _no_flush() -> Iterator[None]:
    """Nothing dies here, so nobody has to wait for the disk."""
    with mock.patch.object(os, "fsync"):
        yield


def common() -> np.ndarray:
    return (np.arange(16 * 24, dtype=np.float32).reshape(16, 24) - 190) / 64


def own(number: int) -> np.ndarray:
    return np.arange(24 * 16, dtype=np.float32).reshape(24, 16) / 32 + number


def graph(number: int) -> ModelProto:
    """One of many models: a weight that all have, each under another name, and its own."""
    name = f"w{number}"
    model = parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 18]>
    graph_{number} (float[n,16] x) => (float[n,16] y) {{
      a = MatMul(x, {name})
      b = Add(a, small)
      y = MatMul(b, own)
    }}""")
    arrays = {name: common(), "small": np.ones(24, np.float32), "own": own(number)}
    for key, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, key))
    return model


def written(number: int, folder: Path, *, external: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"graph{number}.onnx"
    if external:
        onnx.save(graph(number), path, save_as_external_data=True, location=f"{number}.data")
        (folder / f"{number}.data").chmod(0o644)
    else:
        path.write_bytes(graph(number).SerializeToString())
    return path


def run_shared(text: str, sources: list[Path], out: Path, **options: bool) -> list[Report]:
    out.mkdir(exist_ok=True)
    jobs = [(source, out / source.name) for source in sources]
    return PassManager(text).run_shared(jobs, **options)


NOTHING = "shard{single=true}"  # leaves the graph alone


def assert_same(source: Path, target: Path) -> None:
    """Each weight has its bytes, and the runtime gives what it gave."""
    assert payload.tensor_digests(target) == payload.tensor_digests(source)
    feeds = {"x": np.linspace(-2, 2, 48, dtype=np.float32).reshape(3, 16)}
    oracle.assert_bit_equal(oracle.run(target, feeds), oracle.run(source, feeds))


# What is stored once.


@pytest.mark.parametrize("external", [(False, False), (True, True), (False, True)])
def test_two_graphs_by_hand(tmp_path: Path, external: tuple[bool, bool]) -> None:
    folders = tmp_path / "first", tmp_path / "second"
    sources = [written(i, folders[i], external=external[i]) for i in range(2)]
    out = tmp_path / "out"
    reports = run_shared(NOTHING, sources, out)
    # 1536 bytes that both have, and 1536 of each: multiples of 64.
    assert set(contents(out)) == {"graph0.onnx", "graph1.onnx", DATA}
    assert contents(out)[DATA] == common().tobytes() + own(0).tobytes() + own(1).tobytes()
    shared = Place(DATA, 0, 1536)
    assert places(out / "graph0.onnx") == {"w0": shared, "own": Place(DATA, 1536, 1536)}
    assert places(out / "graph1.onnx") == {"w1": shared, "own": Place(DATA, 3072, 1536)}
    for source, report in zip(sources, reports, strict=True):
        assert_same(source, out / source.name)
        assert set(report.written) == {str(out / source.name), str(out / DATA)}
        assert report.written[str(out / DATA)] == 3 * 1536
        assert report.layout == "sidecar"


def test_without_a_pass_that_asks_it_is_one_file(tmp_path: Path) -> None:
    sources = [written(i, tmp_path) for i in range(2)]
    run_shared("fp16w{min_bytes=1GB}", sources, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"graph0.onnx", "graph1.onnx", DATA}
    assert len(contents(tmp_path / "out")[DATA]) == 3 * 1536


def test_three_graphs_in_shards(tmp_path: Path) -> None:
    sources = [written(i, tmp_path / str(i), external=i == 1) for i in range(3)]
    out = tmp_path / "out"
    reports = run_shared("shard{max_bytes=3100 digits=1 manifest=true}", sources, out)
    shards = [f"shared.onnx.data.{i}" for i in range(2)]
    models = [source.name for source in sources]
    assert set(contents(out)) == {*models, *shards, "shared.onnx.sha256"}
    assert places(out / "graph0.onnx")["own"] == Place(shards[0], 1536, 1536)
    assert places(out / "graph2.onnx")["own"] == Place(shards[1], 1536, 1536)
    assert_tidy(*(out / name for name in models), align=64, max_bytes=3100)
    lines = (out / "shared.onnx.sha256").read_text().splitlines()
    assert lines == [
        f"{payload.hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}"
        for name in [*models, *shards]
    ]
    for source, report in zip(sources, reports, strict=True):
        assert_same(source, out / source.name)
        assert report.layout == "shards"


def test_weights_made_in_the_same_way_are_one(tmp_path: Path) -> None:
    sources = [written(i, tmp_path / str(i), external=i == 1) for i in range(2)]
    for text in ("fp16w{min_bytes=1500}", "fp16w{min_bytes=1500},shard{inline_below=700}"):
        out, alone = tmp_path / text, tmp_path / f"alone {text}"
        run_shared(text, sources, out)
        alone.mkdir()
        data = [b for name, b in contents(out).items() if "graph" not in name]
        halves = [a.astype(np.float16).tobytes() for a in (common(), own(0), own(1))]
        assert data == ([b"".join(halves)] if "shard" in text else [])  # 768 bytes are few
        for source in sources:
            PassManager("fp16w{min_bytes=1500}").run(source, alone / source.name)
            assert_same(alone / source.name, out / source.name)


def test_a_graph_twice_costs_its_weights_once(tmp_path: Path) -> None:
    source, out = written(0, tmp_path), tmp_path / "out"
    out.mkdir()
    jobs = [(source, out / "a.onnx"), (source, out / "b.onnx")]
    PassManager(NOTHING).run_shared(jobs)
    assert len(contents(out)[DATA]) == 2 * 1536
    assert contents(out)["a.onnx"] == contents(out)["b.onnx"]
    assert_same(source, out / "a.onnx")
    model = model_io.load(source)
    (tmp_path / "again").mkdir()
    saving.save_shared([(model, tmp_path / "again" / f"{name}.onnx") for name in "ab"])
    assert contents(tmp_path / "again") == contents(out)


def test_one_graph_alone_may_share_with_itself(tmp_path: Path) -> None:
    model = graph(0)
    twice = numpy_helper.from_array(common().reshape(24, 16), "own")
    model.graph.initializer[2].CopyFrom(twice)
    (tmp_path / "graph0.onnx").write_bytes(model.SerializeToString())
    run_shared(NOTHING, [tmp_path / "graph0.onnx"], tmp_path / "out")
    assert contents(tmp_path / "out")[DATA] == common().tobytes()
    assert_same(tmp_path / "graph0.onnx", tmp_path / "out" / "graph0.onnx")


def test_type_and_shape_do_not_matter_but_bytes_do(tmp_path: Path) -> None:
    content = common().tobytes()
    tensors = [
        TensorProto(name="a", data_type=TensorProto.FLOAT, dims=[384], raw_data=content),
        TensorProto(name="b", data_type=TensorProto.INT64, dims=[2, 96], raw_data=content),
        TensorProto(name="c", data_type=TensorProto.UINT8, dims=[1536], raw_data=content),
        TensorProto(name="near", data_type=1, dims=[384], raw_data=content[:-1] + b"\x07"),
        TensorProto(name="part", data_type=1, dims=[383], raw_data=content[:-4]),
    ]
    sources = []
    for tensor in tensors:
        model = ModelProto(ir_version=9)
        model.opset_import.add(version=18)
        model.graph.name = "g"
        model.graph.initializer.append(tensor)
        sources.append(tmp_path / f"{tensor.name}.onnx")
        sources[-1].write_bytes(model.SerializeToString())
    run_shared(NOTHING, sources, tmp_path / "out")
    found = {s.stem: places(tmp_path / "out" / s.name)[s.stem] for s in sources}
    assert found["a"] == found["b"] == found["c"] == Place(DATA, 0, 1536)
    assert (found["near"].offset, found["part"].offset) == (1536, 3072)
    for source in sources:
        again = tmp_path / "out" / source.name
        assert payload.tensor_digests(again) == payload.tensor_digests(source)


@pytest.mark.parametrize("pair", [("external_one", "external_two"), ("speech_encoder",) * 2])
def test_fixtures_together(tmp_path: Path, pair: tuple[str, str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    jobs = [(fixtures.built(name), out / f"{i}.onnx") for i, name in enumerate(pair)]
    PassManager("shard{inline_below=0}").run_shared(jobs)
    for (source, target), name in zip(jobs, pair, strict=True):
        assert payload.tensor_digests(target) == payload.tensor_digests(source)
        for sample in fixtures.samples(name):
            oracle.assert_bit_equal(oracle.run(target, sample), oracle.run(source, sample))
    shas = {
        sha: place.length
        for _, target in jobs
        for place, sha in zip(
            places(target).values(), _digests(target, places(target)), strict=True
        )
    }
    sizes = assert_tidy(*(target for _, target in jobs), align=64)
    assert sum(shas.values()) <= sum(sizes.values()) < sum(shas.values()) + 64 * len(shas)


def _digests(path: Path, found: dict[str, Place]) -> list[str]:
    content = contents(path.parent)
    ranges = [(p.location, slice(p.offset, p.offset + p.length)) for p in found.values()]
    return [payload.hashlib.sha256(content[name][part]).hexdigest() for name, part in ranges]


def test_overlapping_ranges_of_two_models(tmp_path: Path) -> None:
    """They read the same file, one of them ranges that overlap."""
    content = np.random.default_rng(1).bytes(4000)
    (tmp_path / "w.bin").write_bytes(content)
    ranges = {"a": [(0, 2000), (1000, 2000)], "b": [(0, 2000), (2000, 2000)]}
    for name, parts in ranges.items():
        model = ModelProto(ir_version=9)
        model.opset_import.add(version=18)
        model.graph.name = "g"
        for i, (offset, length) in enumerate(parts):
            tensor = model.graph.initializer.add(name=f"w{i}", data_type=2, dims=[length])
            tensor.data_location = TensorProto.EXTERNAL
            entries = {"location": "w.bin", "offset": offset, "length": length}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    sources = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    reports = run_shared(NOTHING, sources, tmp_path / "out")
    assert [[f.code for f in report.findings] for report in reports] == [["OF904"], []]
    for source in sources:
        again = tmp_path / "out" / source.name
        assert payload.tensor_digests(again) == payload.tensor_digests(source)


# How equal tensors are found.


def times(factor: int) -> Callable[[np.ndarray, np.ndarray, int], None]:
    def kernel(block: np.ndarray, out: np.ndarray, start: int) -> None:
        del start
        np.multiply(block, factor, out=out)

    return kernel


def test_what_is_computed_is_told_apart_by_source_and_kernel() -> None:
    one, same = ir.tensor(common()), ir.tensor(common().copy())
    other = ir.tensor(common() + 1)
    double, triple = times(2), times(3)
    kinds = ir.DataType.FLOAT, ir.DataType.DOUBLE
    tensors: list[ir.TensorProtocol] = [
        one,
        same,
        other,
        DerivedTensor(one, kinds[0], double),
        DerivedTensor(same, kinds[0], double),
        DerivedTensor(one, kinds[0], triple),
        DerivedTensor(one, kinds[1], double),
        DerivedTensor(other, kinds[0], double),
        DerivedTensor(DerivedTensor(one, kinds[0], double), kinds[0], double),
        DerivedTensor(DerivedTensor(same, kinds[0], double), kinds[0], double),
    ]
    keys = [*map(by_content(tensors), tensors)]
    assert [keys.index(key) for key in keys] == [0, 0, 2, 3, 3, 5, 6, 7, 8, 8]


def test_a_tensor_of_a_size_of_its_own_is_not_read() -> None:
    read: list[str] = []

    def lazy(name: str, count: int) -> ir.LazyTensor:
        def made() -> ir.TensorProtocol:
            read.append(name)  # safe on any thread
            return ir.tensor(np.zeros(count, np.float32))

        return ir.LazyTensor(made, ir.DataType.FLOAT, ir.Shape([count]), name=name)

    tensors = [lazy("alone", 7), lazy("first", 5), lazy("second", 5)]
    derived = DerivedTensor(lazy("source", 9), ir.DataType.FLOAT, times(2))
    same = by_content([*tensors, derived])
    assert sorted(read) == ["first", "second"]
    assert same(tensors[1]) == same(tensors[2]) != same(tensors[0])
    assert same(derived) == same(derived)
    assert sorted(read) == ["first", "second"]


@given(picks=st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=3))
def test_any_models_have_each_payload_once(
    tmp_path_factory: pytest.TempPathFactory, picks: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    sources, wanted = [], []
    for i, numbers in enumerate(picks):
        model = ModelProto(ir_version=9)
        model.opset_import.add(version=18)
        model.graph.name = "g"
        for j, number in enumerate(numbers):
            array = np.full(300 + number % 2, number, np.int32)
            model.graph.initializer.append(numpy_helper.from_array(array, f"w{j}"))
            wanted += [array.tobytes()] if array.tobytes() not in wanted else []
        sources.append(folder / f"{i}.onnx")
        sources[-1].write_bytes(model.SerializeToString())
    run_shared("shard{align=1 single=true}", sources, folder / "out")
    assert contents(folder / "out").get(DATA, b"") == b"".join(wanted)
    for source in sources:
        again = folder / "out" / source.name
        assert payload.tensor_digests(again) == payload.tensor_digests(source)


# What is refused, and then nothing is written.


def test_into_one_folder_only(tmp_path: Path) -> None:
    models = [model_io.load(written(i, tmp_path)) for i in range(2)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    targets = [tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"]
    with pytest.raises(ModelError, match="models that share data files go into one folder"):
        saving.save_shared([*zip(models, targets, strict=True)])
    with pytest.raises(ModelError, match="go into one folder"):
        saving.save_shared([])
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == {}


@pytest.mark.parametrize("taken", ["graph0.onnx", "graph1.onnx", DATA, "shared.onnx.sha256"])
def test_nothing_is_replaced_unasked(tmp_path: Path, taken: str) -> None:
    sources, out = [written(i, tmp_path) for i in range(2)], tmp_path / "out"
    out.mkdir()
    (out / taken).write_bytes(b"precious")
    with pytest.raises(ModelError) as raised:
        run_shared("shard{single=true manifest=true}", sources, out)
    assert str(raised.value) == f"{out / taken}: exists; --force overwrites it"
    assert contents(out) == {taken: b"precious"}
    run_shared("shard{single=true manifest=true}", sources, out, force=True)
    for source in sources:
        assert_same(source, out / source.name)


@pytest.mark.parametrize(
    ("text", "damaged", "reason"),
    [
        ("shard{max_bytes=1500}", False, "tensor 'w0'"),
        ("shard,fp16w{include=w0}", False, "'w0' matches no weight"),
        ("assert-pure{max_opset=17},shard", False, "is not pure ai.onnx"),
        ("shard", True, "not an ONNX model"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_written_when_one_of_them_is_refused(
    tmp_path: Path, text: str, damaged: bool, reason: str, force: bool
) -> None:
    sources, out = [written(i, tmp_path) for i in range(2)], tmp_path / "out"
    if damaged:
        sources[1].write_bytes(sources[1].read_bytes()[:-100])
    out.mkdir()
    if force:
        (out / DATA).write_bytes(b"precious")
    before = contents(out)
    with pytest.raises(OnnxforgeError, match=reason):
        run_shared(text, sources, out, force=force)
    assert contents(out) == before


def test_data_of_a_model_that_is_not_replaced_are_not_lost(tmp_path: Path) -> None:
    sources, out = [written(i, tmp_path) for i in range(3)], tmp_path / "out"
    run_shared(NOTHING, sources, out)
    before = contents(out)
    for again in (sources[:2], sources[1:]):
        with pytest.raises(ModelError, match=rf"{DATA}: holds data of .* as well"):
            run_shared(NOTHING, again, out, force=True)
        assert contents(out) == before
    jobs = [(out / f"graph{i}.onnx", out / f"new{i}.onnx") for i in range(3)]
    with pytest.raises(ModelError, match=rf"{DATA}: holds data of .*graph0"):
        PassManager(NOTHING).run_shared(jobs, force=True)
    swapped = [(out / f"graph{i}.onnx", out / f"graph{1 - i}.onnx") for i in range(2)]
    with pytest.raises(ModelError, match="which would be lost"):
        PassManager(NOTHING).run_shared(swapped, force=True)
    assert contents(out) == before
    run_shared("shard{max_bytes=1600}", sources, out, force=True)
    for source in sources:
        assert_same(source, out / source.name)


def test_in_place_and_again_is_the_same(tmp_path: Path) -> None:
    sources, out = [written(i, tmp_path) for i in range(3)], tmp_path / "out"
    run_shared(NOTHING, sources, out)
    before = contents(out)
    jobs = [(out / source.name, out / source.name) for source in sources]
    PassManager(NOTHING).run_shared(jobs, force=True)
    assert contents(out) == before
    reports = PassManager("shard{max_bytes=1600}").run_shared(jobs, force=True)
    told = [str(finding) for finding in reports[0].findings]
    assert told == [f"OF902 {out / DATA}: belongs to what was replaced"]
    (out / DATA).unlink()
    for source in sources:
        assert_same(source, out / source.name)
    PassManager(NOTHING).run_shared(jobs, force=True)
    names = {*(source.name for source in sources), DATA}
    assert {name: contents(out)[name] for name in names} == before


def test_apart_and_together_again(tmp_path: Path) -> None:
    sources, out = [written(i, tmp_path) for i in range(2)], tmp_path / "out"
    run_shared("shard{max_bytes=1600}", sources, out)
    for source in sources:
        alone = tmp_path / f"alone {source.name}" / "m.onnx"
        alone.parent.mkdir()
        PassManager(NOTHING).run(out / source.name, alone)
        assert_same(source, alone)
        straight = tmp_path / f"straight {source.name}" / "m.onnx"
        straight.parent.mkdir()
        PassManager(NOTHING).run(source, straight)
        assert contents(alone.parent) == contents(straight.parent)


def test_two_results_do_not_have_one_name(tmp_path: Path) -> None:
    models = [model_io.load(written(i, tmp_path)) for i in range(2)]
    out = tmp_path / "out"
    out.mkdir()
    for force in (False, True):
        with pytest.raises(ModelError, match=r"m\.onnx"):
            saving.save_shared([(model, out / "m.onnx") for model in models], force=force)
        assert contents(out) == {}


@pytest.mark.parametrize("name", [DATA, "shared.onnx.data.000", "shared.onnx.sha256"])
@pytest.mark.parametrize("force", [False, True])
def test_no_result_has_the_name_of_the_data(tmp_path: Path, name: str, force: bool) -> None:
    models = [model_io.load(written(i, tmp_path)) for i in range(2)]
    out = tmp_path / "out"
    out.mkdir()
    for model in models:
        model.meta[PLACEMENT] = Placement(single=name == DATA, manifest=True)
    for names in (("m.onnx", name), (name, "m.onnx")):
        jobs = [(model, out / n) for model, n in zip(models, names, strict=True)]
        with pytest.raises(ModelError, match=name):
            saving.save_shared(jobs, force=force)
        assert contents(out) == {}


def test_data_that_others_read_are_no_left_overs(tmp_path: Path) -> None:
    sources, out = [written(i, tmp_path) for i in range(2)], tmp_path / "out"
    run_shared(NOTHING, sources, out)
    report = PassManager(NOTHING).run(sources[0], out / sources[0].name, force=True)
    assert report.findings == []
    assert_same(sources[1], out / sources[1].name)
    report = PassManager(NOTHING).run(sources[1], out / sources[1].name, force=True)
    assert [finding.where for finding in report.findings] == [str(out / DATA)]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources, out = [written(i, tmp_path) for i in range(2)], tmp_path / "out"
    out.mkdir()
    words = ["run", "--passes", "shard{max_bytes=1600}", "--share", "--out-dir", out, *sources]
    with pytest.raises(SystemExit, match="0"):
        cli.main([str(word) for word in words])
    shards = {f"shared.onnx.data.{i:03}" for i in range(3)}
    assert set(contents(out)) == {"graph0.onnx", "graph1.onnx", *shards}
    for source in sources:
        assert_same(source, out / source.name)
    before = contents(out)
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(word) for word in words])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("graph0.onnx: exists; --force overwrites it")
    assert contents(out) == before
