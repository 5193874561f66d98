"""Every byte of a data file is owned, padding or orphaned, and the map says which."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxforge import cli
from onnxforge.errors import ModelError
from onnxforge.layout import FileLayout, Range, layout
from onnxforge.lazy import DataFile
from support import fixtures

posix = pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
SIZES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.DOUBLE: 8}
CAP = 65536

Row = tuple[int, int, str, str]
Place = tuple[int, int, int]  # offset, bytes, bytes of an element


def outside(
    name: str, offset: int, count: int, dtype: int = TensorProto.INT8, file: str = "w.bin"
) -> TensorProto:
    """A tensor of ``count`` elements in a data file."""
    tensor = TensorProto(name=name, data_type=dtype, dims=[count], data_location=1)
    tensor.external_data.add(key="location", value=file)
    tensor.external_data.add(key="offset", value=str(offset))
    return tensor


def write(path: Path, *tensors: TensorProto) -> Path:
    path.parent.mkdir(exist_ok=True)
    graph = helper.make_graph([], "graph", [], [], tensors)
    path.write_bytes(helper.make_model(graph, ir_version=8).SerializeToString())
    return path


def rows(found: FileLayout) -> list[Row]:
    return [(r.start, r.stop, r.kind, ", ".join(r.owners)) for r in found.ranges]


def mapped(folder: Path, content: bytes, *tensors: TensorProto) -> FileLayout:
    """The map of ``w.bin`` with this content and these tensors in it."""
    (folder / "w.bin").write_bytes(content)
    (only,) = layout(write(folder / "a.onnx", *tensors)).files
    return only


# The oracle: a byte array.


def power_of_two(offsets: Sequence[int]) -> int:
    power = CAP
    while any(offset % power for offset in offsets):
        power //= 2
    return power


def brute(content: bytes, places: Sequence[Place]) -> list[str]:
    """What each byte is, as one letter: owned, padding or orphaned."""
    labels = ["?"] * len(content)
    for start, size, _ in places:
        labels[start : start + size] = "o" * size
    at = 0
    while at < len(content):
        stop = at + 1
        while stop < len(content) and labels[stop] == labels[at]:
            stop += 1
        if labels[at] == "?":
            is_last, is_zero = stop == len(content), not any(content[at:stop])
            pads = not is_last and is_zero and stop - at < power_of_two([stop])
            labels[at:stop] = ("p" if pads else "-") * (stop - at)
        at = stop
    return labels


def assert_exact(found: FileLayout, content: bytes, places: Sequence[Place]) -> None:
    """Hold a map to the bytes of the file and to the places of the weights in it."""
    held = [place for place in places if place[1]]
    letters = {"owned": "o", "shared": "o", "padding": "p", "orphaned": "-"}
    labels, times = ["?"] * len(content), [0] * len(content)
    for part in found.ranges:
        for i in range(part.start, part.stop):
            if part.kind == "overlap":
                times[i] += 1
            else:
                assert labels[i] in ("?", "o" if letters[part.kind] == "o" else "")
                labels[i] = letters[part.kind]
    assert labels == brute(content, held)
    distinct = {(start, start + size) for start, size, _ in held}
    covers = [sum(a <= i < b for a, b in distinct) for i in range(len(content))]
    assert [bool(t) for t in times] == [c > 1 for c in covers]
    owned = [part for part in found.ranges if part.kind in ("owned", "shared")]
    assert [(r.start, r.stop) for r in owned] == sorted(distinct)
    for part in owned:
        owners = sum((a, a + n) == (part.start, part.stop) for a, n, _ in held)
        assert len(part.owners) == owners
        assert part.kind == ("shared" if owners > 1 else "owned")
    starts = [part.start for part in found.ranges]
    assert starts == sorted(starts)
    assert found.size == len(content)
    counts = [labels.count(letter) for letter in "op-"]
    assert [found.owned, found.padding, found.orphaned] == counts
    assert found.saved == sum(size for _, size, _ in held) - counts[0]
    assert found.alignment == power_of_two([start for start, _, _ in held])
    assert found.misaligned == len({(a, n) for a, n, element in held if a % element})
    assert len(found.empty) == len(places) - len(held)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, list[TensorProto], list[TensorProto]]:
    """A file, often of zeros, and the tensors of two graphs in it."""
    size = draw(st.integers(1, 160))
    content = bytearray(draw(st.binary(min_size=size, max_size=size)))
    for start, stop in draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)))):
        content[start:stop] = bytes(max(0, stop - start))
    step = draw(st.sampled_from([1, 4, 16]))
    graphs: tuple[list[TensorProto], list[TensorProto]] = [], []
    for i in range(draw(st.integers(1, 8))):
        dtype = draw(st.sampled_from(list(SIZES)))
        offset = draw(st.integers(0, size // step)) * step
        count = draw(st.integers(0, min(6, (size - offset) // SIZES[dtype])))
        graphs[draw(st.integers(0, 1)) if i else 0].append(
            outside(f"w{i}", offset, count, dtype)
        )
        if draw(st.booleans()):
            graphs[draw(st.integers(0, 1))].append(outside(f"t{i}", offset, count, dtype))
    return bytes(content), *graphs


def placed(tensors: Sequence[TensorProto]) -> list[Place]:
    return [
        (
            int(tensor.external_data[1].value),
            tensor.dims[0] * SIZES[tensor.data_type],
            SIZES[tensor.data_type],
        )
        for tensor in tensors
    ]


@given(files())
def test_a_map_is_exact(drawn: tuple[bytes, list[TensorProto], list[TensorProto]]) -> None:
    content, own, others = drawn
    with tempfile.TemporaryDirectory() as name:
        write(Path(name, "b.onnx"), *others)
        found = mapped(Path(name), content, *own)
    assert_exact(found, content, placed([*own, *others]))
    named = [owner for part in found.weights for owner in part.owners] + list(found.empty)
    expected = [t.name for t in own] + [f"b.onnx: {t.name}" for t in others]
    assert sorted(named) == sorted(expected)


Doctor = Callable[[list[Range]], None]


def replaced(ranges: list[Range], i: int, **changes: Any) -> None:
    ranges[i] = dataclasses.replace(ranges[i], **changes)


@pytest.mark.parametrize(
    "doctor",
    [
        lambda ranges: ranges.pop(),
        lambda ranges: ranges.pop(1),
        lambda ranges: ranges.insert(1, ranges[1]),
        lambda ranges: replaced(ranges, 0, stop=13),
        lambda ranges: replaced(ranges, 0, kind="shared"),
        lambda ranges: replaced(ranges, 1, kind="orphaned"),
        lambda ranges: replaced(ranges, 2, owners=("b", "b")),
        lambda ranges: replaced(ranges, 4, start=23),
        lambda ranges: replaced(ranges, 5, kind="padding"),
        lambda ranges: ranges.append(ranges[0]),
    ],
)
def test_the_oracle_notices(doctor: Doctor, tmp_path: Path) -> None:
    content = bytes(40)
    tensors = [outside("a", 0, 3, 1), outside("b", 16, 2, 1), outside("c", 20, 3, 1)]
    found = mapped(tmp_path, content, *tensors)
    assert [kind for _, _, kind, _ in rows(found)] == [
        *("owned", "padding", "owned", "owned", "overlap", "orphaned")
    ]
    assert_exact(found, content, placed(tensors))
    ranges = list(found.ranges)
    doctor(ranges)
    with pytest.raises(AssertionError):
        assert_exact(dataclasses.replace(found, ranges=ranges), content, placed(tensors))


# The fixtures.


def test_a_file_with_a_tied_weight(tmp_path: Path) -> None:
    found = layout(fixtures.copied("external_one", tmp_path))
    assert (found.inline, found.inline_bytes, found.remarks) == (0, 0, [])
    (data,) = found.files
    assert data.path == tmp_path / "external_one.onnx_data"
    assert rows(data) == [
        (0, 2048, "owned", "up_w"),
        (2048, 2176, "owned", "up_b"),
        (2176, 4096, "padding", ""),
        (4096, 5120, "shared", "down_w, tied_w"),
    ]
    assert (data.owned, data.padding, data.orphaned, data.saved) == (3200, 1920, 0, 1024)


def test_two_files_and_unaligned_offsets(tmp_path: Path) -> None:
    first, second = layout(fixtures.copied("external_two", tmp_path)).files
    assert rows(first) == [
        (0, 13, "orphaned", ""),
        (13, 2061, "owned", "up_w"),
        (2061, 2065, "orphaned", ""),
        (2065, 2193, "owned", "up_b"),
        (2193, 4097, "orphaned", ""),
        (4097, 5121, "owned", "down_w"),
    ]
    assert (first.alignment, first.misaligned) == (1, 3)
    assert rows(second) == [(0, 1024, "owned", "tied_w")]
    assert (second.alignment, second.misaligned) == (CAP, 0)


def test_weights_in_the_model_are_counted(tmp_path: Path) -> None:
    found = layout(fixtures.copied("external_mixed", tmp_path))
    assert (found.inline, found.inline_bytes) == (2, 128 + 1024)
    (data,) = found.files
    assert [row[3] for row in rows(data)] == ["up_w", "down_w"]


@pytest.mark.parametrize("name", fixtures.names())
def test_the_maps_name_the_data_files_of_every_fixture(tmp_path: Path, name: str) -> None:
    path = fixtures.copied(name, tmp_path)
    data = {other: other.stat().st_size for other in tmp_path.iterdir() if other != path}
    assert {file.path: file.size for file in layout(path).files} == data


# Holes.


@pytest.mark.parametrize(
    ("hole", "kind"),
    [
        (bytes(15), "padding"),
        (bytes(16), "orphaned"),
        (bytes(14) + b"\1", "orphaned"),
        (b"\1" + bytes(3), "orphaned"),
        (bytes(1), "padding"),
    ],
)
def test_padding_is_zeros_and_no_more_than_alignment_needs(
    tmp_path: Path, hole: bytes, kind: str
) -> None:
    before = 48 - len(hole)  # 48 is a multiple of 16 and not of 32
    content = b"\7" * before + hole + b"\7" * 4
    found = mapped(tmp_path, content, outside("a", 0, before), outside("b", 48, 4))
    assert rows(found)[1] == (before, 48, kind, "")


@pytest.mark.parametrize(("start", "kind"), [(CAP + 1, "padding"), (CAP, "orphaned")])
def test_no_padding_is_longer_than_64_kib(tmp_path: Path, start: int, kind: str) -> None:
    tensors = outside("a", 0, start), outside("b", 2 * CAP, 1)
    assert rows(mapped(tmp_path, bytes(2 * CAP + 1), *tensors))[1][2] == kind


def test_what_stands_behind_the_last_range_is_orphaned(tmp_path: Path) -> None:
    found = mapped(tmp_path, bytes(65), outside("a", 0, 64))
    assert rows(found)[1:] == [(64, 65, "orphaned", "")]


def test_what_stands_before_the_first_range_is_orphaned(tmp_path: Path) -> None:
    found = mapped(tmp_path, bytes(9), outside("a", 8, 1))
    assert rows(found) == [(0, 8, "orphaned", ""), (8, 9, "owned", "a")]


def of_data(opener: Callable[[DataFile], Any]) -> Callable[[DataFile], Any]:
    """Open data files in this way and models as ever."""
    was_open = DataFile.open
    return lambda file: (opener if file.path.name == "w.bin" else was_open)(file)


def test_only_holes_that_may_be_padding_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    class Spy(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            reads.append((self.tell(), size))
            return super().read(size)

    monkeypatch.setattr(DataFile, "open", of_data(lambda file: Spy(bytes(file.size))))
    tensors = [outside("a", 0, 60), outside("b", 64, 30), outside("c", 192, 10)]
    mapped(tmp_path, bytes(1000), *tensors)
    assert reads == [(60, 4)]


# Sharing and overlaps.


def test_ranges_that_several_graphs_share(tmp_path: Path) -> None:
    write(tmp_path / "b.onnx", outside("enc/w", 0, 8), outside("own", 16, 8))
    write(tmp_path / "c.onnx", outside("elsewhere", 0, 8, file="c.bin"))
    (tmp_path / "c.bin").write_bytes(bytes(8))
    found = mapped(tmp_path, bytes(24), outside("w", 0, 8), outside("v", 8, 8))
    assert rows(found) == [
        (0, 8, "shared", "w, b.onnx: enc/w"),
        (8, 16, "owned", "v"),
        (16, 24, "owned", "b.onnx: own"),
    ]
    assert (found.saved, found.orphaned) == (8, 0)


def test_models_in_the_folder_of_the_data_count(tmp_path: Path) -> None:
    write(tmp_path / "sub/b.onnx", outside("w", 0, 8))
    (tmp_path / "sub/w.bin").write_bytes(bytes(16))
    write(tmp_path / "c.onnx", outside("w", 8, 8, file="sub/../sub/w.bin"))
    (file,) = layout(write(tmp_path / "a.onnx", outside("w", 0, 8, file="sub/w.bin"))).files
    owner = f"{Path('sub/b.onnx')}: w"
    assert rows(file) == [(0, 8, "shared", f"w, {owner}"), (8, 16, "owned", "c.onnx: w")]


def test_a_neighbour_that_cannot_be_read_is_left_out_with_a_remark(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_text("no model")
    write(tmp_path / "gone.onnx", outside("w", 0, 8, file="gone.bin"))
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(8))
    found = layout(write(tmp_path / "a.onnx", outside("w", 0, 8)))
    assert rows(found.files[0]) == [(0, 8, "owned", "w")]
    bad, gone = found.remarks
    assert str(tmp_path / "bad.onnx") in bad
    assert "not an ONNX model" in bad
    assert "gone.bin" in gone


@posix
def test_links_are_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "again.bin").symlink_to("w.bin")
    (tmp_path / "again.onnx").symlink_to("a.onnx")
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    tensors = outside("a", 0, 8), outside("b", 0, 8, file="again.bin")
    found = mapped(tmp_path, bytes(8), *tensors)
    assert found.path == tmp_path / "w.bin"
    assert rows(found) == [(0, 8, "shared", "a, b")]


def test_overlaps_name_both_sides(tmp_path: Path) -> None:
    tensors = [outside("a", 0, 20), outside("in", 4, 4), outside("b", 16, 8)]
    found = mapped(tmp_path, bytes(24), *tensors)
    assert rows(found) == [
        (0, 20, "owned", "a"),
        (4, 8, "owned", "in"),
        (4, 8, "overlap", "a, in"),
        (16, 24, "owned", "b"),
        (16, 20, "overlap", "a, b"),
    ]
    assert (found.owned, found.saved) == (24, 8)


def test_ranges_of_one_offset_and_two_lengths_overlap(tmp_path: Path) -> None:
    found = mapped(tmp_path, bytes(8), outside("long", 0, 8), outside("short", 0, 4))
    assert rows(found)[2] == (0, 4, "overlap", "short, long")


# Alignment, and weights without elements.


@pytest.mark.parametrize(
    ("offsets", "alignment", "misaligned"),
    [([0], CAP, 0), ([4, 8], 4, 0), ([4, 10], 2, 1), ([1, 9], 1, 2), ([64, 192], 64, 0)],
)
def test_alignment(
    tmp_path: Path, offsets: list[int], alignment: int, misaligned: int
) -> None:
    tensors = [outside(f"w{at}", at, 1, TensorProto.FLOAT) for at in offsets]
    found = mapped(tmp_path, bytes(200), *tensors)
    assert (found.alignment, found.misaligned) == (alignment, misaligned)


def test_the_largest_element_of_a_shared_range_counts(tmp_path: Path) -> None:
    tensors = [outside("half", 2, 4, TensorProto.FLOAT16), outside("full", 2, 2, 1)]
    assert mapped(tmp_path, bytes(10), *tensors).misaligned == 1


def test_four_bits_are_aligned_anywhere(tmp_path: Path) -> None:
    found = mapped(tmp_path, bytes(8), outside("q", 3, 5, TensorProto.INT4))
    assert rows(found)[1] == (3, 6, "owned", "q")
    assert found.misaligned == 0


def test_weights_without_elements_own_nothing(tmp_path: Path) -> None:
    tensors = [outside("none", 3, 0), outside("a", 0, 4), outside("void", 0, 0)]
    found = mapped(tmp_path, bytes(8), *tensors)
    assert rows(found) == [(0, 4, "owned", "a"), (4, 8, "orphaned", "")]
    assert found.empty == ["void", "none"]
    assert rows(mapped(tmp_path, bytes(8), tensors[0])) == [(0, 8, "orphaned", "")]


# The command.


@dataclasses.dataclass(frozen=True)
class Done:
    code: object
    out: str
    err: str


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*words: str | Path) -> Done:
        with pytest.raises(SystemExit) as end:
            cli.main(["inspect", "--layout", *map(str, words)])
        return Done(end.value.code, *capsys.readouterr())

    return call


def test_the_map_as_text(inspect: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_text("no model")
    done = inspect(fixtures.copied("external_one", tmp_path))
    assert (done.code, done.err) == (0, "")
    remark, *lines = done.out.splitlines()
    assert remark.startswith("remark: what this model owns is not on the maps: ")
    assert lines == [
        "inline: 0 weights, 0 bytes",
        "",
        "external_one.onnx_data: 5,120 bytes, ranges: 3, alignment: 2048, misaligned: 0",
        "bytes owned: 3,200, padding: 1,920, orphaned: 0, saved by sharing: 1,024",
        "start   stop  bytes  kind     owners",
        "    0  2,048  2,048  owned    up_w",
        "2,048  2,176    128  owned    up_b",
        "2,176  4,096  1,920  padding",
        "4,096  5,120  1,024  shared   down_w, tied_w",
    ]


def test_a_model_without_data_files(inspect: Callable[..., Done]) -> None:
    done = inspect(fixtures.built("nameless"))
    assert (done.code, done.out) == (0, "inline: 4 weights, 3,232 bytes\n")


def test_long_maps_keep_what_is_unusual(inspect: Callable[..., Done], tmp_path: Path) -> None:
    tensors = [outside(f"w{i}", 8 * i, 8) for i in range(100) if i != 50]
    tensors += [outside(f"tied{i}", 8 * 70, 8) for i in range(5)]
    tensors += [outside("across", 8 * 90 + 4, 8), outside("none", 0, 0)]
    found = mapped(tmp_path, bytes(808), *tensors)
    path = tmp_path / "a.onnx"
    lines = inspect(path).out.splitlines()[4:]
    assert lines[0] == "without elements: none"
    assert len(lines) == 2 + 20 + 10
    assert [" ".join(line.split()) for line in lines[22:]] == [
        "160 400 240 ... 30 more, --format json shows all",
        "400 408 8 orphaned",
        "408 560 152 ... 19 more, --format json shows all",
        "560 568 8 shared w70, tied0, tied1, tied2 and 2 more",
        "568 732 164 ... 21 more, --format json shows all",
        "724 728 4 overlap w90, across",
        "728 736 8 owned w91",
        "728 732 4 overlap across, w91",
        "736 800 64 ... 8 more, --format json shows all",
        "800 808 8 orphaned",
    ]
    document = json.loads(inspect(path, "--format", "json").out)
    assert document["inline"] == {"count": 0, "bytes": 0}
    (file,) = document["files"]
    assert file["path"] == str(found.path)
    assert file["empty"] == ["none"]
    parts = [part | {"owners": tuple(part["owners"])} for part in file["ranges"]]
    assert [Range(**part) for part in parts] == list(found.ranges)
    totals = ("size", "alignment", "misaligned", "owned", "padding", "orphaned", "saved")
    assert {name: file[name] for name in totals} == {n: getattr(found, n) for n in totals}


def test_what_is_left_out_reaches_as_far_as_its_longest_range(
    inspect: Callable[..., Done], tmp_path: Path
) -> None:
    tensors = [outside(f"w{i}", 8 * i, 8) for i in range(1, 21)]
    mapped(tmp_path, bytes(208), *tensors, outside("a", 168, 40), outside("in", 172, 4))
    lines = inspect(tmp_path / "a.onnx").out.splitlines()
    assert lines[-2].split()[:5] == ["168", "208", "40", "...", "2"]


def test_errors_are_one_line(inspect: Callable[..., Done], tmp_path: Path) -> None:
    source = write(tmp_path / "a.onnx", outside("w", 0, 8, file="gone.bin"))
    (tmp_path / "text.onnx").write_text("no model")
    for path in (source, tmp_path / "none.onnx", tmp_path / "text.onnx"):
        done = inspect(path)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"onnxforge: {path}: ")
        assert done.err.count("\n") == 1
        with pytest.raises(ModelError):
            layout(path)


def test_a_file_that_changed_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(8))
    path = write(tmp_path / "a.onnx", outside("w", 0, 8))
    was_open = DataFile.open

    def late(file: DataFile) -> Any:
        file.path.write_bytes(bytes(9))
        return was_open(file)

    monkeypatch.setattr(DataFile, "open", of_data(late))
    with pytest.raises(ModelError, match="changed since"):
        layout(path)
