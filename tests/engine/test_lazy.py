"""Lazy tensors read and compute each byte when it is written, once, and not before."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxforge import lazy, model_io, placement, saving
from onnxforge.errors import ModelError
from onnxforge.lazy import (
    DataFile,
    DerivedTensor,
    FileTensor,
    blocks,
    identity,
    reader,
    stream,
)
from onnxforge.storage import writer

KNOWN = set(onnx.TensorProto.DataType.values())  # the installed onnx may be older
WHOLE = [t for t in ir.DataType if t.value in KNOWN - {0, onnx.TensorProto.STRING}]
BYTES = [t for t in WHOLE if t.bitwidth >= 8]
PACKED = [t for t in WHOLE if t.bitwidth < 8]
NOISE = np.random.default_rng(1).integers(0, 256, 1 << 16, np.uint8).tobytes()
SMALL_BLOCK = 64


@dataclass(frozen=True)
class Doubled:
    """Twice the values, in the type of the result; counts what it is asked for."""

    size: int
    factor: float = 2
    seen: Counter[int] = field(default_factory=Counter, compare=False)
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        assert block.ndim == out.ndim == 1
        assert len(block) == len(out)
        with self.lock:
            self.seen.update(range(start, start + len(block)))
        out[:] = (block * block.dtype.type(self.factor)).astype(out.dtype)

    def was_evaluated(self, times: int) -> bool:
        return self.seen == Counter(dict.fromkeys(range(self.size), times) if times else {})


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Blocks so small that a test has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", SMALL_BLOCK)
        patch.setattr(writer, "BLOCK_BYTES", SMALL_BLOCK)
        yield


def like(dtype: ir.DataType, *shape: int, name: str = "w") -> ir.ExternalTensor:
    return ir.ExternalTensor("x", 0, None, dtype, shape=ir.Shape(shape), name=name)


def stored(
    folder: Path, dtype: ir.DataType, *shape: int, offset: int = 3, content: bytes = NOISE
) -> FileTensor:
    path = folder / "weights.bin"
    if not path.exists():
        path.write_bytes(content)
    return FileTensor(DataFile(path), offset, like(dtype, *shape))


def floats(folder: Path, values: np.ndarray, name: str = "floats.bin") -> FileTensor:
    path = folder / name
    path.write_bytes(values.astype("<f4").tobytes())
    return FileTensor(DataFile(path), 0, like(ir.DataType.FLOAT, *values.shape))


def doubled(source: ir.TensorProtocol, dtype: ir.DataType, **options: float) -> DerivedTensor:
    return DerivedTensor(source, dtype, Doubled(source.size, **options))


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


# A tensor in a file.


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 0, 4), (0,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_a_file_tensor_has_the_bytes_of_its_range(
    tmp_path: Path, dtype: ir.DataType, shape: tuple[int, ...]
) -> None:
    tensor = stored(tmp_path, dtype, *shape)
    count = int(np.prod(shape, dtype=int))
    expected = NOISE[3 : 3 + count * dtype.numpy().itemsize]
    assert (tensor.size, tensor.nbytes) == (count, len(expected))
    assert tensor.tobytes() == expected
    values = tensor.numpy()
    assert (values.dtype, values.shape) == (dtype.numpy(), shape)
    assert values.tobytes() == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_elements_of_less_than_a_byte_are_packed(
    tmp_path: Path, dtype: ir.DataType, count: int
) -> None:
    bits = count * dtype.bitwidth
    filled = int.from_bytes(NOISE[:8], "little") % 2**bits  # what is left of a byte is zero
    content = filled.to_bytes(-(-bits // 8), "little")
    tensor = stored(tmp_path, dtype, count, offset=0, content=content + b"more")
    assert (tensor.size, tensor.nbytes) == (count, len(content))
    assert tensor.tobytes() == content
    proto = onnx.TensorProto(data_type=dtype, dims=[count], raw_data=tensor.tobytes())
    expected = numpy_helper.to_array(proto)
    assert tensor.numpy().dtype == expected.dtype
    assert tensor.numpy().tobytes() == expected.tobytes()


def test_name_shape_doc_string_and_metadata_come_from_the_model(tmp_path: Path) -> None:
    model = like(ir.DataType.FLOAT, 2, 3, name="größe")
    model.doc_string = "doc"
    model.metadata_props["key"] = "value"
    path = tmp_path / "weights.bin"
    path.write_bytes(NOISE)
    tensor = FileTensor(DataFile(path), 0, model, field=4, external={"location": "a"})
    derived = doubled(tensor, ir.DataType.FLOAT16)
    for made in (tensor, derived):
        assert made.name == "größe"
        assert made.shape == ir.Shape((2, 3))
        assert made.doc_string == "doc"
        assert made.metadata_props == {"key": "value"}
        assert made.metadata_props is not model.metadata_props
        assert made.meta == {}
    assert (tensor.field, tensor.external) == (4, {"location": "a"})
    assert FileTensor(DataFile(path), 0, model).external == {}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["file", "derived"])
def test_tofile_writes_behind_what_is_there(tmp_path: Path, kind: str) -> None:
    tensor: ir.TensorProtocol = floats(tmp_path, ramp(5, 13))
    expected = ramp(5, 13).tobytes()
    if kind == "derived":
        tensor = doubled(tensor, ir.DataType.DOUBLE)
        expected = (2 * ramp(5, 13)).astype(np.float64).tobytes()
    memory = io.BytesIO(b"ab")
    memory.seek(2)
    tensor.tofile(memory)
    assert memory.getvalue() == b"ab" + expected
    path = tmp_path / "out.bin"
    with path.open("wb") as file:
        file.write(b"abc")
        tensor.tofile(file)
        file.write(b"end")
    assert path.read_bytes() == b"abc" + expected + b"end"


def test_numpy_functions_take_a_lazy_tensor(tmp_path: Path) -> None:
    tensor = floats(tmp_path, ramp(2, 3))
    assert np.array_equal(np.asarray(tensor), ramp(2, 3))
    assert np.asarray(tensor, dtype=np.int16).dtype == np.int16
    assert np.array_equal(np.asarray(tensor, dtype=np.int16), ramp(2, 3))
    assert np.array_equal(np.add(tensor, 1), ramp(2, 3) + 1)


def test_a_lazy_tensor_lies_on_the_processor_for_dlpack(tmp_path: Path) -> None:
    assert floats(tmp_path, ramp(2)).__dlpack_device__() == (1, 0)


# Looking at a tensor costs nothing.


def test_looking_at_a_tensor_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = floats(tmp_path, ramp(4, 5))
    derived = doubled(source, ir.DataType.FLOAT16)

    def refuse(file: DataFile) -> None:
        raise AssertionError(f"{file.path} was opened")

    monkeypatch.setattr(DataFile, "open", refuse)
    for tensor in (source, derived):
        assert isinstance(tensor, ir.TensorProtocol)
        assert tensor.raw is tensor
        assert (tensor.size, tensor.nbytes) == (20, 20 * tensor.dtype.itemsize)
        assert tensor.shape == ir.Shape((4, 5))
        assert "[4,5]" in repr(tensor)
        assert blocks(tensor)
        hash(identity(tensor))
        reader(tensor)
        value = ir.Value(name="w", const_value=tensor)
        assert "w" in repr(value)
    assert isinstance(derived.kernel, Doubled)
    assert derived.kernel.was_evaluated(0)


# Blocks.


@given(
    dtype=st.sampled_from(WHOLE),
    source=st.sampled_from([None, *BYTES]),
    size=st.integers(0, 5000),
    limit=st.sampled_from([16, 64, 4096]),
)
def test_blocks_cover_a_tensor_once_and_end_on_elements(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: ir.DataType,
    source: ir.DataType | None,
    size: int,
    limit: int,
) -> None:
    tensor = _unread(tmp_path_factory, dtype, source, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", limit)
        ranges = blocks(tensor)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(
        range(tensor.nbytes)
    )
    element = max(1, dtype.bitwidth // 8)
    for start, stop in ranges:
        assert start % element == stop % element == 0
        assert start < stop
        assert stop - start <= limit
        if source is not None and dtype.bitwidth >= 8:
            assert (stop - start) // element * source.itemsize <= limit


_UNREAD: list[Path] = []


def _unread(
    folders: pytest.TempPathFactory,
    dtype: ir.DataType,
    source: ir.DataType | None,
    size: int,
) -> ir.TensorProtocol:
    if not _UNREAD:
        _UNREAD.append(folders.mktemp("unread") / "weights.bin")
        _UNREAD[0].write_bytes(b"")
    file = DataFile(_UNREAD[0])
    if source is None or dtype.bitwidth < 8:
        return FileTensor(file, 0, like(dtype, size))
    return doubled(FileTensor(file, 0, like(source, size)), dtype)


def test_a_tensor_without_elements_has_no_blocks(tmp_path: Path) -> None:
    empty = stored(tmp_path, ir.DataType.FLOAT, 0, 4)
    assert blocks(empty) == []
    assert blocks(doubled(empty, ir.DataType.FLOAT16)) == []


def test_a_block_is_a_mebibyte_of_the_wider_type(tmp_path: Path) -> None:
    size = 1_000_003
    source = stored(tmp_path, ir.DataType.FLOAT, size)
    mebi = 1 << 20
    assert blocks(source) == [(i * mebi, min((i + 1) * mebi, 4 * size)) for i in range(4)]
    half = doubled(source, ir.DataType.FLOAT16)
    assert [stop - start for start, stop in blocks(half)][:3] == [mebi // 2] * 3
    double = doubled(source, ir.DataType.DOUBLE)
    assert [stop - start for start, stop in blocks(double)][:3] == [mebi] * 3


# Derived tensors.


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (33,), (3, 41)])
def test_a_derived_tensor_has_the_values_of_its_kernel(
    tmp_path: Path, dtype: ir.DataType, shape: tuple[int, ...]
) -> None:
    values = ramp(*shape) % 60
    tensor = doubled(floats(tmp_path, values), dtype)
    expected = (2 * values).astype(dtype.numpy())
    assert tensor.numpy().dtype == expected.dtype
    assert tensor.numpy().shape == shape
    assert tensor.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("small_blocks")
def test_a_kernel_is_told_where_its_block_starts(tmp_path: Path) -> None:
    starts = []

    def note(block: np.ndarray, out: np.ndarray, start: int) -> None:
        starts.append((start, len(block)))
        out[:] = block + np.arange(start, start + len(block))

    tensor = DerivedTensor(floats(tmp_path, ramp(50)), ir.DataType.DOUBLE, note)
    assert np.array_equal(tensor.numpy(), 2 * np.arange(50.0))
    assert starts == [(at, min(8, 50 - at)) for at in range(0, 50, 8)]


@pytest.mark.usefixtures("small_blocks")
def test_a_derived_tensor_can_be_derived_from(tmp_path: Path) -> None:
    source = floats(tmp_path, ramp(7, 11))
    first = doubled(source, ir.DataType.DOUBLE)
    second = doubled(first, ir.DataType.FLOAT16, factor=3.0)
    third = doubled(second, ir.DataType.DOUBLE, factor=0.5)
    assert np.array_equal(third.numpy(), 3 * ramp(7, 11).astype(np.float64))
    for tensor in (first, second, third):
        assert isinstance(tensor.kernel, Doubled)
        assert tensor.kernel.was_evaluated(1)
    assert identity(second) != identity(first)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", ["inline", "sidecar"])
@pytest.mark.parametrize("workers", [1, 4])
def test_saving_evaluates_each_element_once(
    tmp_path: Path, layout: placement.Layout, workers: int
) -> None:
    kernels = []
    weights = {}
    for i, dtype in enumerate([ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE]):
        source = floats(tmp_path, ramp(31, 67) / 7, f"{i}.bin")
        weights[f"w{i}"] = doubled(source, dtype)
        kernels.append(weights[f"w{i}"].kernel)
    path = tmp_path / "model.onnx"
    saving.save(holding(weights), path, layout=layout, workers=workers)
    assert all(isinstance(kernel, Doubled) and kernel.was_evaluated(1) for kernel in kernels)
    for tensor in onnx.load(path).graph.initializer:
        expected = (2 * (ramp(31, 67) / 7)).astype(weights[tensor.name].dtype.numpy())
        assert np.array_equal(numpy_helper.to_array(tensor), expected)


def holding(weights: dict[str, ir.TensorProtocol]) -> ir.Model:
    values = []
    for name, tensor in weights.items():
        tensor.name = name
        values.append(ir.Value(name=name, const_value=tensor))
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


@pytest.mark.usefixtures("small_blocks")
def test_tied_derived_tensors_are_evaluated_once(tmp_path: Path) -> None:
    source = floats(tmp_path, ramp(512))
    kernel = Doubled(512)
    tied = {n: DerivedTensor(source, ir.DataType.FLOAT, kernel) for n in ("a", "b", "c")}
    saving.save(holding(tied), tmp_path / "model.onnx", layout="sidecar")
    assert kernel.was_evaluated(1)
    assert (tmp_path / "model.onnx_data").stat().st_size == 2048


def test_threads_have_scratch_of_their_own(tmp_path: Path) -> None:
    threads = 4
    together = threading.Barrier(threads, timeout=30)

    def copy(block: np.ndarray, out: np.ndarray, start: int) -> None:
        together.wait()  # all have read their block before one is used
        out[:] = block

    read = reader(DerivedTensor(floats(tmp_path, ramp(400)), ir.DataType.FLOAT, copy))

    def fetch(start: int) -> bytes:
        out = np.empty(400, np.uint8)
        read(start, out)
        return out.tobytes()

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(fetch, range(0, 1600, 400)))
    assert b"".join(parts) == ramp(400).tobytes()


# Readers.


@given(st.integers(0, 255), st.integers(0, 255))
def test_a_reader_of_any_tensor_gives_any_range(
    tmp_path_factory: pytest.TempPathFactory, first: int, last: int
) -> None:
    values = ramp(64)
    start, stop = sorted((first, last))
    for tensor in _every_kind(tmp_path_factory.getbasetemp(), values):
        out = np.empty(stop - start, np.uint8)
        reader(tensor)(start, out)
        assert out.tobytes() == values.tobytes()[start:stop]


def _every_kind(folder: Path, values: np.ndarray) -> list[ir.TensorProtocol]:
    path = folder / "every_kind.bin"
    if not path.exists():
        path.write_bytes(b"four" + values.tobytes())
    proto = numpy_helper.from_array(values, "w")
    external = ir.ExternalTensor(
        path.name, 4, 256, ir.DataType.FLOAT, shape=ir.Shape((64,)), name="w", base_dir=folder
    )
    return [
        FileTensor(DataFile(path), 4, like(ir.DataType.FLOAT, 64)),
        ir.Tensor(values, name="w"),
        ir.serde.TensorProtoTensor(proto),
        ir.LazyTensor(
            lambda: ir.Tensor(values), dtype=ir.DataType.FLOAT, shape=ir.Shape((64,)), name="w"
        ),
        external,
    ]


# Identity.


def test_tensors_with_the_same_bytes_are_identical(tmp_path: Path) -> None:
    first, second = (stored(tmp_path, ir.DataType.FLOAT, 8) for _ in range(2))
    assert identity(first) == identity(second)
    assert hash(identity(first)) == hash(identity(second))
    reshaped = stored(tmp_path, ir.DataType.FLOAT, 2, 4)
    assert identity(first) == identity(reshaped)
    half = [doubled(tensor, ir.DataType.FLOAT16) for tensor in (first, second)]
    assert identity(half[0]) == identity(half[1])
    twice = [doubled(tensor, ir.DataType.FLOAT) for tensor in half]
    assert identity(twice[0]) == identity(twice[1])


def test_tensors_with_other_bytes_are_not_identical(tmp_path: Path) -> None:
    source = stored(tmp_path, ir.DataType.FLOAT, 8)
    other_file = floats(tmp_path, ramp(8))
    distinct = [
        source,
        stored(tmp_path, ir.DataType.FLOAT, 8, offset=4),
        stored(tmp_path, ir.DataType.FLOAT, 9),
        FileTensor(other_file.file, source.offset, like(ir.DataType.FLOAT, 8)),
        doubled(source, ir.DataType.FLOAT),
        doubled(source, ir.DataType.FLOAT16),
        doubled(source, ir.DataType.FLOAT, factor=3.0),
        doubled(doubled(source, ir.DataType.FLOAT), ir.DataType.FLOAT),
        ir.Tensor(ramp(8)),
        ir.Tensor(ramp(8)),
    ]
    assert len({identity(tensor) for tensor in distinct}) == len(distinct)


# Files that change.


def _rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(1, 1))


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"!")


def _exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [_rewrite, _append, _exchange])
@pytest.mark.parametrize("kind", ["file", "derived"])
def test_a_file_that_changed_after_loading_is_noticed(
    tmp_path: Path, change, kind: str
) -> None:
    source = floats(tmp_path, ramp(300))
    tensor = source if kind == "file" else doubled(source, ir.DataType.FLOAT16)
    change(source.file.path)
    model = holding({"w": tensor})
    for use in (
        tensor.numpy,
        tensor.tobytes,
        lambda: tensor.tofile(io.BytesIO()),
        lambda: saving.save(model, tmp_path / "model.onnx"),
        lambda: saving.save(model, tmp_path / "model.onnx", layout="sidecar"),
        lambda: model_io.to_proto(model),
    ):
        with pytest.raises(ModelError) as raised:
            use()
        what = f"{source.file.path}: tensor {source.name!r}"
        assert str(raised.value) == f"{what}: changed since the model was loaded"
    assert {path.name for path in tmp_path.iterdir()} == {"floats.bin"}


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    tensor = floats(tmp_path, ramp(3))
    tensor.file.path.unlink()
    with pytest.raises(ModelError, match=r"floats\.bin: tensor '\w+': No such file"):
        tensor.numpy()
    with pytest.raises(ModelError, match=r"floats\.bin: No such file"):
        DataFile(tensor.file.path)


@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_a_file_that_is_cut_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    tensor = floats(tmp_path, ramp(size))
    path = tensor.file.path
    opened = DataFile.open
    whole = path.read_bytes()

    @contextlib.contextmanager
    def cut(file: DataFile, name: str | None = None):
        with opened(file, name) as stream:
            os.truncate(path, len(whole) // 2)
            yield stream

    monkeypatch.setattr(DataFile, "open", cut)
    with pytest.raises(ModelError, match=r"floats\.bin: .*(ends before byte|changed since)"):
        tensor.numpy()
    monkeypatch.undo()
    tensor = floats(tmp_path, ramp(size))
    monkeypatch.setattr(DataFile, "open", cut)
    with pytest.raises(ModelError, match=r"floats\.bin: .*(ends before byte|changed since)"):
        saving.save(holding({"w": tensor}), tmp_path / "model.onnx", layout="sidecar")
    assert {path.name for path in tmp_path.iterdir()} == {"floats.bin"}


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    before = len(list(descriptors.iterdir()))
    kept = [floats(tmp_path, ramp(300), f"{i}.bin") for i in range(50)]
    arrays = [tensor.numpy() for tensor in kept]
    readers = [reader(tensor) for tensor in kept]
    assert len(arrays) == len(readers) == 50
    assert len(list(descriptors.iterdir())) == before


# In onnx_ir's hands.


@pytest.fixture
def every_lazy(tmp_path: Path) -> dict[str, ir.TensorProtocol]:
    source = floats(tmp_path, ramp(40, 30))
    return {
        "file": source,
        "int4": stored(tmp_path, ir.DataType.INT4, 5, 3),
        "derived": doubled(source, ir.DataType.FLOAT16),
        "twice": doubled(doubled(source, ir.DataType.DOUBLE), ir.DataType.FLOAT),
        "scalar": doubled(floats(tmp_path, ramp(), "scalar.bin"), ir.DataType.FLOAT),
        "empty": doubled(stored(tmp_path, ir.DataType.FLOAT, 0, 2), ir.DataType.FLOAT16),
    }


def assert_holds(proto: onnx.ModelProto, weights: dict[str, ir.TensorProtocol]) -> None:
    assert [tensor.name for tensor in proto.graph.initializer] == list(weights)
    for tensor in proto.graph.initializer:
        expected = weights[tensor.name]
        assert tensor.data_type == expected.dtype
        assert tuple(tensor.dims) == expected.shape.numpy()
        assert tensor.raw_data == expected.tobytes()


def test_onnx_ir_serializes_lazy_tensors(every_lazy: dict[str, ir.TensorProtocol]) -> None:
    assert_holds(ir.to_proto(holding(every_lazy)), every_lazy)


@pytest.mark.parametrize("external", [None, "weights.data"])
def test_onnx_ir_saves_lazy_tensors(
    tmp_path: Path, every_lazy: dict[str, ir.TensorProtocol], external: str | None
) -> None:
    path = tmp_path / "model.onnx"
    ir.save(holding(every_lazy), path, external_data=external, size_threshold_bytes=0)
    assert_holds(onnx.load(path), every_lazy)


@pytest.mark.parametrize("count", [0, 5, 300_000])
def test_streamed_blocks_are_the_values_in_order(count: int) -> None:
    values = np.arange(count, dtype=np.float32).reshape(-1, 5)
    blocks = [block.view(np.float32).copy() for block in stream(ir.tensor(values))]
    assert all(block.ndim == 1 and block.nbytes <= 1 << 20 for block in blocks)
    whole = np.concatenate([np.zeros(0, np.float32), *blocks])
    assert whole.tobytes() == values.tobytes()
