"""Samples from files and at random: in range, alike for equal seeds, or one clear line."""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxforge.compare.drawing import drawn
from onnxforge.compare.samples import Data, Sample, fit, samples
from onnxforge.errors import DataError, Refused
from onnxforge.model_io import load
from onnxforge.numerics.samples import read_archive, read_array
from support import fixtures, oracle, pairs

TWO = "(float[n,2] x, int64[n] ids) => (float[n,2] y, int64[n] z) { y=Neg(x) z=Neg(ids) }"
X, IDS = np.ones((3, 2), np.float32), np.arange(3)


def model(folder: Path, text: str) -> ir.Model:
    return load(pairs.saved(folder / "model.onnx", text), editable=False)


def read(folder: Path, *paths: Path) -> list[Sample]:
    return list(samples(model(folder, TWO), Data(paths)))


def test_archives_arrays_and_folders_are_samples(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("a", "b"):
        (data / name).mkdir(parents=True)
    np.savez(data / "first.npz", x=X, ids=IDS)
    np.savez(data / "a" / "second.npz", x=X, ids=IDS + 1)
    np.save(data / "b" / "x.npy", X)
    np.save(data / "b" / "ids.npy", IDS + 2)
    (data / "notes.txt").write_text("nothing")
    found = read(tmp_path, data, data / "first.npz")
    names = [data / "a" / "second.npz", data / "b", data / "first.npz", data / "first.npz"]
    assert [sample.name for sample in found] == [str(name) for name in names]
    assert [int(sample.feeds["ids"][0]) for sample in found] == [1, 2, 0, 0]
    assert all(set(fit(sample, model(tmp_path, TWO))) == {"x", "ids"} for sample in found)


def test_one_array_is_enough_for_one_input(tmp_path: Path) -> None:
    one = model(tmp_path, "(float[n] x) => (float[n] y) { y = Neg(x) }")
    np.save(tmp_path / "speech.npy", np.ones(3, np.float32))
    (sample,) = samples(one, Data([tmp_path / "speech.npy"]))
    assert fit(sample, one)["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npz", "cannot be read .*No such file"),
        ("text.npz", "cannot be read"),
        ("objects.npy", "the model takes x, ids"),
        ("empty", "holds no samples"),
        ("words.txt", "no .npz, .npy, .wav"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "objects.npy", np.array([{}]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["npy", "stored", "packed"])
def test_damaged_files_are_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"s.{'npy' if kind == 'npy' else 'npz'}"
    save = {"npy": np.save, "stored": np.savez, "packed": np.savez_compressed}[kind]
    save(path, np.arange(500.0))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    told = 0
    for i in range(1500):
        cut = bytearray(whole[: rng.integers(len(whole)) if i % 5 == 0 else None])
        for at in rng.integers(0, min(len(cut), 200) if i % 2 else len(cut), bool(cut) * 2):
            cut[at] = rng.integers(256)
        path.write_bytes(cut)
        try:
            read_array(path) if kind == "npy" else read_archive(path)
        except DataError as error:
            told += str(error).startswith(f"{path}: cannot be read (")
    assert told > 700


@pytest.mark.parametrize(("name", "save"), [("a.npz", np.save), ("a.npy", np.savez)])
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, name: str, save: Any) -> None:
    with (tmp_path / name).open("wb") as file:
        save(file, np.ones(3, np.float32))
    one = model(tmp_path, "(float[n] x) => (float[n] y) { y = Neg(x) }")
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        list(samples(one, Data([tmp_path / name])))


def test_suffixes_in_capitals_count(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, ids=IDS)
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    assert set(read(tmp_path, tmp_path / "A.NPZ")[0].feeds) == {"x", "ids"}


@pytest.mark.parametrize(
    "options",
    [
        {"seconds": 0},
        {"seconds": -1},
        {"seconds": 1e-9},
        {"seconds": math.nan},
        {"seconds": math.inf},
        {"rate": 0},
        {"count": -1},
        {"seed": -1},
        {"sizes": {"n": -1}},
    ],
)
def test_numbers_that_make_no_samples_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="wanted at least"):
        Data(**options)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": X}, "s: lacks the input 'ids'"),
        ({"x": X, "ids": IDS, "idz": IDS}, "s: no input is called 'idz', but x, ids"),
        ({"x": X, "ids": X[:, 0]}, "s: input 'ids' is float32, the model takes int64"),
        ({"x": X[0], "ids": IDS}, r"s: input 'x' has the shape \(2,\), .* takes \[n,2\]"),
        ({"x": X[:, :1], "ids": IDS}, r"s: input 'x' has the shape \(3, 1\)"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, feeds: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fit(Sample("s", feeds), model(tmp_path, TWO))


def test_types_that_numpy_lacks_come_as_bytes_integers_or_float32(tmp_path: Path) -> None:
    half = model(tmp_path, "(bfloat16[n] x) => (bfloat16[n] y) { y = Identity(x) }")
    values = np.array([1.5, -2]).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "raw.npz", x=values)
    np.savez(tmp_path / "bits.npz", x=values.view(np.uint16))
    np.savez(tmp_path / "wide.npz", x=values.astype(np.float32))
    for name in ("raw", "bits", "wide"):
        (sample,) = samples(half, Data([tmp_path / f"{name}.npz"]))
        fitted = fit(sample, half)["x"]
        assert fitted.dtype == ml_dtypes.bfloat16
        assert fitted.tobytes() == values.tobytes()


def test_inputs_with_a_default_and_without_numbers(tmp_path: Path) -> None:
    text = "(float[n] x, string[n] s) => (float[n] y) { y = Neg(x) t = Identity(s) }"
    odd = model(tmp_path, text)
    feeds = {"x": np.ones(1, np.float32), "s": np.array(["a"])}
    with pytest.raises(DataError, match="input 's' is no tensor of numbers"):
        fit(Sample("s", feeds), odd)
    odd.graph.inputs[1].const_value = ir.tensor(["a"])
    odd.graph.register_initializer(odd.graph.inputs[1])
    assert list(fit(Sample("s", {"x": feeds["x"]}), odd)) == ["x"]


def test_equal_seeds_draw_equal_samples() -> None:
    encoder = load(fixtures.built("speech_encoder"), editable=False)

    def bits(seed: int) -> list[bytes]:
        found = samples(encoder, Data(count=3, seed=seed))
        return [array.tobytes() for sample in found for array in sample.feeds.values()]

    assert bits(1) == bits(1)
    assert len({*bits(0), *bits(1)}) == 12


@pytest.mark.parametrize("length", [10**13, 10**22])
@pytest.mark.parametrize("kind", ["float", "int64"])
def test_what_no_memory_holds_is_one_line(tmp_path: Path, kind: str, length: int) -> None:
    one = model(tmp_path, f"({kind}[n] x) => ({kind}[n] y) {{ y = Neg(x) }}")
    with pytest.raises(Refused, match=rf"'x' cannot have the shape \[{length}\]: ") as caught:
        list(drawn(one, 1, sizes={"n": length}))
    assert "\n" not in str(caught.value)


def test_caches_are_empty_and_filled_in_turn() -> None:
    decoder = load(fixtures.built("merged_decoder"), editable=False)
    empty, filled = drawn(decoder, 2, sizes={"steps": 3, "past": 5, "batch": 2})
    assert [empty.name, filled.name] == ["random 0, cache of 0", "random 1, cache of 5"]
    for sample, past in ((empty, 0), (filled, 5)):
        fit(sample, decoder)
        assert sample.feeds["input_ids"].shape == (2, 3)
        assert sample.feeds["past_key_values.1.value"].shape == (2, 4, past, 8)
        assert sample.feeds["attention_mask"].shape == (2, past + 3)
        assert sample.feeds["attention_mask"].all()
        assert sample.feeds["use_cache_branch"].tolist() == [past > 0]
    only = [s.name for s in drawn(decoder, 2, cache="filled")]
    assert only == ["random 0, cache of 8", "random 1, cache of 8"]
    assert [s.name for s in drawn(decoder, 1, cache="empty")] == ["random 0, cache of 0"]


def test_drawn_samples_run() -> None:
    for name in ("speech_encoder", "merged_decoder"):
        path = fixtures.built(name)
        for sample in drawn(load(path, editable=False), 2):
            assert all(
                np.isfinite(value).all() for value in oracle.run(path, sample.feeds).values()
            )


def test_indices_stay_in_their_tables(tmp_path: Path) -> None:
    text = """(int64[b,n] ids, int32[b,n] kinds, int64[b,m] free, bool[n] on)
      => (float[b,n,4] a, float[b,n,4] k, int64[b,m] f, bool[n] o)
      <float[50,4] table, float[4,3] few> {
      a = Gather(table, ids)
      wide = Cast<to=7>(kinds)  flat = Identity(wide)  c = Gather<axis=1>(few, flat)
      k = Transpose<perm=[1,2,0]>(c)  f = Neg(free)  o = Not(on) }"""
    proto = load_text(tmp_path, text)
    feeds = next(drawn(proto, 1, sizes={"n": 500})).feeds
    assert feeds["ids"].shape == feeds["kinds"].shape == (1, 500)
    assert (feeds["ids"].min(), feeds["ids"].max()) == (0, 49)
    assert set(feeds["kinds"].flat) == {0, 1, 2}
    assert feeds["free"].shape == (1, 16)
    assert set(feeds["free"].flat) == {0, 1}
    assert 0 < feeds["on"].mean() < 1


def load_text(folder: Path, text: str) -> ir.Model:
    """A model whose tables are zeros."""
    from onnx import numpy_helper, parser

    head, _, rest = text.partition("<float")
    tables, _, body = rest.partition(">")
    proto = parser.parse_model(pairs.HEAD + head + body)
    for table in ("[" + t.split("[", 1)[1] for t in f"float{tables}".split(", ")):
        dims, name = table[1:].split("] ")
        shape = [int(dim) for dim in dims.split(",")]
        array = np.zeros(shape, np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return load(pairs.saved(folder / "model.onnx", proto), editable=False)


def test_masks_positions_and_lengths_make_sense(tmp_path: Path) -> None:
    text = """(float[b,time,4] x, float[b,n] attention_mask, int64[b,n] position_ids,
      int64[b] lengths, float[b,2,past,8] past_0, float[b,2,n2,8] cache_1)
      => (float[b,time,4] y) { y = Neg(x) }"""
    proto = model(tmp_path, text)
    sample = list(drawn(proto, 2, sizes={"time": 40, "past_0:2": 3}))[1]
    feeds = sample.feeds
    assert feeds["attention_mask"].tolist() == [[1] * 16]
    assert feeds["position_ids"].tolist() == [list(range(3, 19))]
    assert feeds["lengths"].tolist() == [40]
    assert (feeds["past_0"].shape, feeds["cache_1"].shape) == ((1, 2, 3, 8), (1, 2, 3, 8))


def test_sums_of_axes_are_worked_out(tmp_path: Path) -> None:
    proto = load(pairs.saved(tmp_path / "m.onnx", TWO), editable=False)
    x, ids = proto.graph.inputs
    x.shape = ir.Shape(["past + steps", "past_sequence_length"])
    ids.shape = ir.Shape(["steps"])
    (sample,) = drawn(proto, 1, sizes={"steps": 5, "past": 2})
    assert sample.feeds["x"].shape == (7, 0)
    x.shape = ir.Shape(["no name?", None])
    (sample,) = drawn(proto, 1, sizes={"no name?": 3, "x:1": 4, "ids:0": 2})
    assert (sample.feeds["x"].shape, sample.feeds["ids"].shape) == ((3, 4), (2,))


def test_a_sum_with_the_past_follows_the_cache(tmp_path: Path) -> None:
    text = "(int64[b,n] ids, int64[b,n] mask, float[b,2,n,8] past_key) => (int64[b,n] y)"
    proto = model(tmp_path, text + " { y = Neg(ids) }")
    _, mask, key = proto.graph.inputs
    key.shape = ir.Shape(["b", 2, "past_length", 8])
    mask.shape = ir.Shape(["b", "past_length + n"])
    for sample, past in zip(drawn(proto, 2, sizes={"past_length": 3}), (0, 3), strict=True):
        assert sample.feeds["past_key"].shape == (1, 2, past, 8)
        assert sample.feeds["mask"].shape == (1, 16 + past)


def test_a_size_of_no_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no open axis is called 'seq': ids:0, n, x:0"):
        list(drawn(model(tmp_path, TWO), 1, sizes={"seq": 3}))
