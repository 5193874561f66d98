"""External data lie inside the folder of the model, and all of them are there."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxforge import model_io
from onnxforge.errors import ModelError
from onnxforge.lazy import FileTensor
from onnxforge.storage.locate import DataFolder, external_numbers

posix = pytest.mark.skipif(os.name == "nt", reason="file names of POSIX")
CONTENT = bytes(range(256)) * 8
BYTES = 1024  # what the tensor of these tests needs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with data in it, and data beside it."""
    inside = tmp_path / "inside"
    (inside / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside-too").mkdir()
    for path in (
        inside / "data.bin",
        inside / "sub" / "data.bin",
        inside / "größe 100%.bin",
        inside / "..data",
        tmp_path / "secret.bin",
        tmp_path / "outside" / "secret.bin",
        tmp_path / "inside-too" / "secret.bin",
    ):
        path.write_bytes(CONTENT)
    return inside


def like(*shape: int) -> ir.ExternalTensor:
    dims = ir.Shape(shape or (BYTES // 4,))
    return ir.ExternalTensor("x", 0, None, ir.DataType.FLOAT, shape=dims, name="enc/w")


def located(folder: Path, **entries: str) -> FileTensor:
    return DataFolder(folder).tensor(entries, like())


def assert_refused(folder: Path, reason: str, **entries: str) -> None:
    with pytest.raises(ModelError) as raised:
        located(folder, **entries)
    text = str(raised.value)
    assert text.startswith("tensor 'enc/w': ")
    assert repr(entries["location"]) in text
    assert reason in text
    assert "\n" not in text


# Locations.


@pytest.mark.parametrize(
    "location",
    [
        "data.bin",
        "./data.bin",
        ".//data.bin",
        "sub/data.bin",
        "sub//data.bin",
        "sub/./data.bin",
        "sub/../data.bin",
        "sub/deeper/../../sub/data.bin",
        "größe 100%.bin",
        "..data",
    ],
)
def test_a_location_inside_the_folder_is_accepted(folder: Path, location: str) -> None:
    tensor = located(folder, location=location, offset="256")
    assert tensor.tobytes() == CONTENT[256 : 256 + BYTES]
    assert tensor.external == {"location": location, "offset": "256"}


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("", "is not a file name"),
        ("data.bin\0", "is not a file name"),
        ("\0", "is not a file name"),
        ("*/_ORT_MEM_ADDR_/*", "is not a file name"),
        ("*/anything", "is not a file name"),
        ("/", "is absolute"),
        ("/etc/passwd", "is absolute"),
        ("//data.bin", "is absolute"),
        ("\\data.bin", "is absolute"),
        ("\\\\host\\share\\data.bin", "is absolute"),
        ("..", "leaves the folder"),
        ("../", "leaves the folder"),
        ("../secret.bin", "leaves the folder"),
        ("../outside/secret.bin", "leaves the folder"),
        ("../inside-too/secret.bin", "leaves the folder"),
        ("./../secret.bin", "leaves the folder"),
        ("sub/../../secret.bin", "leaves the folder"),
        ("sub/deeper/../../../secret.bin", "leaves the folder"),
        ("absent/../../secret.bin", "leaves the folder"),
        ("../../../../../../../../etc/passwd", "leaves the folder"),
        (".", "is not a regular file"),
        ("sub", "is not a regular file"),
        ("sub/..", "is not a regular file"),
        ("absent.bin", "No such file"),
        ("absent/data.bin", "No such file"),
        ("absent/../data.bin", "No such file"),
        ("data.bin/more", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("new\nline", "No such file"),
        ("*", "No such file"),
        ("file:data.bin", "No such file"),
        ("https://example.com/data.bin", "No such file"),
    ],
)
@posix
def test_a_location_elsewhere_is_refused(folder: Path, location: str, reason: str) -> None:
    assert_refused(folder, reason, location=location)


def test_an_absolute_location_is_refused_even_inside(folder: Path) -> None:
    assert_refused(folder, "is absolute", location=str(folder / "data.bin"))


@posix
def test_a_backslash_is_a_character_of_a_name(folder: Path) -> None:
    assert_refused(folder, "No such file", location="sub\\data.bin")
    assert_refused(folder, "No such file", location="..\\secret.bin")
    (folder / "sub\\data.bin").write_bytes(CONTENT[::-1])
    assert located(folder, location="sub\\data.bin").tobytes() == CONTENT[::-1][:BYTES]


@given(st.text(max_size=12) | st.text(alphabet="./\\ab", max_size=12))
def test_any_other_location_is_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, location: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "empty"
    folder.mkdir(exist_ok=True)
    with pytest.raises(ModelError) as raised:
        located(folder, location=location)
    assert "\n" not in str(raised.value)
    assert repr(location) in str(raised.value)


# Links.


@posix
@pytest.mark.parametrize("target", ["data.bin", "sub/data.bin", "{folder}/data.bin"])
def test_a_symbolic_link_inside_the_folder_is_followed(folder: Path, target: str) -> None:
    (folder / "link.bin").symlink_to(target.format(folder=folder))
    assert located(folder, location="link.bin").tobytes() == CONTENT[:BYTES]


@posix
@pytest.mark.parametrize("target", ["../secret.bin", "../outside/secret.bin", "/dev/zero"])
def test_a_symbolic_link_out_of_the_folder_is_refused(folder: Path, target: str) -> None:
    (folder / "link.bin").symlink_to(target)
    assert_refused(folder, "leads out of the folder", location="link.bin")


@posix
def test_a_linked_folder_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "link").symlink_to("../outside", target_is_directory=True)
    assert_refused(folder, "leads out of the folder", location="link/secret.bin")
    assert_refused(folder, "leads out of the folder", location="link/../secret.bin")


@posix
def test_a_chain_of_links_is_judged_by_its_end(folder: Path) -> None:
    (folder / "first").symlink_to("second")
    (folder / "second").symlink_to("../outside/back")
    (folder.parent / "outside" / "back").symlink_to("../inside/data.bin")
    assert located(folder, location="first").tobytes() == CONTENT[:BYTES]
    (folder / "third").symlink_to("fourth")
    (folder / "fourth").symlink_to("../secret.bin")
    assert_refused(folder, "leads out of the folder", location="third")


@posix
def test_a_link_to_nothing_is_refused(folder: Path) -> None:
    (folder / "link.bin").symlink_to("absent.bin")
    assert_refused(folder, "No such file", location="link.bin")


@posix
@pytest.mark.parametrize("location", ["hard.bin", "link.bin", "sub/hard.bin"])
def test_a_hard_link_out_of_the_folder_is_refused(folder: Path, location: str) -> None:
    (folder / "link.bin").symlink_to("hard.bin")
    (folder / location).parent.joinpath("hard.bin").hardlink_to(folder.parent / "secret.bin")
    assert_refused(folder, "has another name outside of the folder", location=location)


@posix
def test_a_file_may_have_several_names_inside_the_folder(folder: Path) -> None:
    for name in ("hard.bin", "harder.bin"):
        (folder / name).hardlink_to(folder / "sub" / "data.bin")
    assert located(folder, location="sub/data.bin").tobytes() == CONTENT[:BYTES]
    (folder.parent / "outside" / "hard.bin").hardlink_to(folder / "hard.bin")
    assert_refused(folder, "has another name outside of the folder", location="sub/data.bin")


@posix
def test_a_name_that_goes_while_names_are_counted_is_no_other_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "new.bin").hardlink_to(folder / "data.bin")
    scan = os.scandir

    def late(path: Path) -> Any:
        (folder / "new.bin").unlink(missing_ok=True)
        return scan(path)

    monkeypatch.setattr(os, "scandir", late)
    assert located(folder, location="data.bin").tobytes() == CONTENT[:BYTES]


@posix
def test_a_pipe_is_refused_without_being_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert_refused(folder, "is not a regular file", location="pipe")


@posix
def test_the_folder_may_be_a_link_itself(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to("inside", target_is_directory=True)
    assert located(link, location="data.bin").tobytes() == CONTENT[:BYTES]
    assert_refused(link, "leaves the folder", location="../secret.bin")


def test_a_relative_folder_is_that_of_the_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    tensor = located(Path("inside"), location="data.bin")
    monkeypatch.chdir(folder.parent.parent)
    assert tensor.tobytes() == CONTENT[:BYTES]


def referring(path: Path, *entries: tuple[str, str], dims: tuple[int, ...] = (256,)) -> Path:
    """Write a model whose one weight has these external data entries."""
    weight = TensorProto(name="enc/w", data_type=1, dims=dims, data_location=1)
    for key, value in entries:
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph([], "g", [], [], [weight])
    path.write_bytes(helper.make_model(graph, ir_version=9).SerializeToString())
    return path


def weight_of(path: Path) -> ir.TensorProtocol:
    weight = model_io.load(path).graph.initializers["enc/w"].const_value
    assert weight is not None
    return weight


@posix
def test_a_download_cache_of_links_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "onnx"
    for made in (blobs, snapshot):
        made.mkdir(parents=True)
    (blobs / "11").write_bytes(CONTENT)
    referring(blobs / "22", ("location", "model.onnx_data"))
    (snapshot / "model.onnx").symlink_to("../../../blobs/22")
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/11")
    assert weight_of(snapshot / "model.onnx").tobytes() == CONTENT[:BYTES]
    (tmp_path / "secret.bin").write_bytes(CONTENT)
    (snapshot / "model.onnx_data").unlink()
    (snapshot / "model.onnx_data").symlink_to("../../../secret.bin")
    with pytest.raises(ModelError, match="leads out of the folder"):
        weight_of(snapshot / "model.onnx")


@posix
def test_data_beside_the_link_are_read_not_those_beside_the_model(tmp_path: Path) -> None:
    for name, content in (("real", CONTENT), ("shown", CONTENT[::-1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.bin").write_bytes(content)
    referring(tmp_path / "real" / "model.onnx", ("location", "data.bin"))
    (tmp_path / "shown" / "model.onnx").symlink_to("../real/model.onnx")
    assert weight_of(tmp_path / "shown" / "model.onnx").tobytes() == CONTENT[::-1][:BYTES]


# Numbers and keys.


@pytest.mark.parametrize(
    ("entries", "offset"),
    [
        ({}, 0),
        ({"offset": "0"}, 0),
        ({"offset": "13"}, 13),
        ({"offset": "007"}, 7),
        ({"offset": "1024"}, 1024),
        ({"length": "1024"}, 0),
        ({"offset": "1024", "length": "1024"}, 1024),
        ({"length": "0"}, 0),
        ({"offset": "5", "length": "0"}, 5),
        ({"checksum": "da39a3ee5e6b4b0d3255bfef95601890afd80709"}, 0),
    ],
    ids=str,
)
def test_a_range_inside_the_file_is_accepted(
    folder: Path, entries: dict[str, str], offset: int
) -> None:
    tensor = located(folder, location="data.bin", **entries)
    assert tensor.offset == offset
    assert tensor.tobytes() == CONTENT[offset : offset + BYTES]
    assert tensor.external == {"location": "data.bin", **entries}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": "1025"}, "bytes 1025 to 2049 are not in 'data.bin', which has 2048"),
        ({"offset": "2048"}, "bytes 2048 to 3072 are not in"),
        ({"offset": "9" * 19}, "are not in 'data.bin'"),
        ({"offset": str(2**63)}, "are not in 'data.bin'"),
        ({"length": "1023"}, "1023 bytes in 'data.bin', but its shape needs 1024"),
        ({"length": "1025"}, "1025 bytes in 'data.bin', but its shape needs 1024"),
        ({"length": "2048"}, "2048 bytes in 'data.bin', but its shape needs 1024"),
        ({"offset": "0", "length": "9" * 19}, "but its shape needs 1024"),
    ],
    ids=str,
)
def test_a_range_that_does_not_fit_is_refused(
    folder: Path, entries: dict[str, str], reason: str
) -> None:
    assert_refused(folder, reason, location="data.bin", **entries)


def test_a_file_may_end_with_the_range_and_not_before(folder: Path) -> None:
    for size in (BYTES - 1, BYTES):
        (folder / "short.bin").write_bytes(CONTENT[:size])
        if size < BYTES:
            assert_refused(folder, "which has 1023", location="short.bin")
        else:
            assert located(folder, location="short.bin").tobytes() == CONTENT[:BYTES]


def test_a_tensor_without_elements_needs_no_bytes(folder: Path) -> None:
    (folder / "empty.bin").write_bytes(b"")
    tensor = DataFolder(folder).tensor({"location": "empty.bin"}, like(0, 8))
    assert tensor.tobytes() == b""
    with pytest.raises(ModelError, match="bytes 1 to 1 are not in"):
        DataFolder(folder).tensor({"location": "empty.bin", "offset": "1"}, like(0, 8))


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize(
    "text",
    [
        *("", "-1", "+1", " 1", "1 ", "1.0", "1e3", "0x10", "1_000", "ten", "nan", "1\n"),
        *("\N{ARABIC-INDIC DIGIT THREE}", "\N{SUPERSCRIPT TWO}", "\N{FULLWIDTH DIGIT NINE}"),
        *("9" * 20, "9" * 5000),
    ],
    ids=ascii,
)
def test_a_number_is_written_in_few_ascii_digits(key: str, text: str) -> None:
    with pytest.raises(ModelError, match=f"tensor 'enc/w': external data {key} ") as raised:
        external_numbers({"location": "data.bin", key: text}, "enc/w")
    assert "is not a byte count" in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.integers(0, 10**19 - 1))
def test_every_byte_count_is_understood(number: int) -> None:
    assert external_numbers({"offset": str(number)}, "w") == (number, None)
    assert external_numbers({"length": str(number)}, "w") == (None, number)


@pytest.mark.parametrize("key", ["Location", "offset ", "basepath", "sha256", "", "größe"])
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(
        ModelError, match="tensor 'enc/w': unknown external data key"
    ) as raised:
        external_numbers({"location": "data.bin", key: "1"}, "enc/w")
    assert repr(key) in str(raised.value)


# Whole models.


READS: dict[str, Callable[[Path], ir.Model]] = {
    "load": model_io.load,
    "read only": partial(model_io.load, editable=False),
    "proto": lambda path: model_io.from_proto(
        onnx.load_model_from_string(path.read_bytes()), path.parent
    ),
}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("location", "../secret.bin")], "leaves the folder"),
        ([("location", "data.bin"), ("offset", "-1")], "offset '-1' is not a byte count"),
        ([("location", "data.bin"), ("length", "12")], "but its shape needs 1024"),
        ([("location", "data.bin"), ("offset", "2000")], "are not in 'data.bin'"),
        ([("location", "data.bin"), ("extra", "1")], "unknown external data key 'extra'"),
        ([("location", "data.bin"), ("location", "../secret.bin")], "key stands twice"),
        ([("location", "data.bin"), ("location", "data.bin")], "key stands twice"),
        ([("location", "data.bin"), ("offset", "0"), ("offset", "0")], "key stands twice"),
        ([("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096")], "is not a file name"),
        ([("location", "absent.bin")], "No such file"),
    ],
    ids=str,
)
@pytest.mark.parametrize("read", READS)
def test_a_hostile_model_gets_a_line(
    folder: Path, entries: list[tuple[str, str]], reason: str, read: str
) -> None:
    path = referring(folder / "model.onnx", *entries)
    with pytest.raises(ModelError) as raised:
        READS[read](path)
    text = str(raised.value)
    assert reason in text
    assert "tensor 'enc/w'" in text
    assert "\n" not in text
    assert text.startswith(f"{path}: tensor" if read != "proto" else "tensor")


def test_a_shape_of_more_bytes_than_there_are_is_refused_at_once(folder: Path) -> None:
    path = referring(folder / "model.onnx", ("location", "data.bin"), dims=(2**40, 2**40))
    with pytest.raises(ModelError, match=r"are not in 'data\.bin', which has 2048"):
        model_io.load(path)


def test_a_sound_model_is_read(folder: Path) -> None:
    path = referring(folder / "model.onnx", ("location", "sub/data.bin"), ("offset", "8"))
    assert weight_of(path).tobytes() == CONTENT[8 : 8 + BYTES]
