"""Cutting payloads out of a model file and putting them back changes no byte."""

from __future__ import annotations

import atexit
import io
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxforge import model_io
from onnxforge.errors import ModelError
from onnxforge.storage import wire
from support import fixtures

LOCATION = "0123456789abcdef" * 2
LARGE = wire.PAYLOAD_BYTES
STUB_BYTES = 80  # what a mark costs, and the lengths around it
Tensor = tuple[bytes, list[bytes]]  # the fields in order, the payloads to be cut out


def varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])


def number(field: int, value: int) -> bytes:
    return varint(field * 8) + varint(value)


def block(field: int, content: bytes) -> bytes:
    return varint(field * 8 + 2) + varint(len(content)) + content


def excised(content: bytes) -> tuple[bytes, list[wire.Payload]]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return wire.excise("model.onnx", file.fileno(), len(content), LOCATION)


def spliced(skeleton: bytes, payloads: Sequence[wire.Payload], content: bytes) -> bytes:
    pieces = wire.splice(skeleton, LOCATION, dict(enumerate(payloads)))
    return b"".join(p if isinstance(p, bytes) else cut(content, payloads[p]) for p in pieces)


def cut(content: bytes, payload: wire.Payload) -> bytes:
    return content[payload.offset : payload.offset + payload.length]


class Field(NamedTuple):
    """A field of a tensor, and its bytes where they are a payload."""

    number: int
    encoded: bytes
    payload: bytes | None = None


@st.composite
def values(draw: st.DrawFn) -> list[Field]:
    """Draw the fields that hold a tensor's values, in any of the legal encodings."""
    kind = draw(
        st.sampled_from(["raw", "float", "double", "int64", "unpacked", "parts", "no"])
    )
    size = draw(st.integers(LARGE - 9, LARGE + 9) | st.integers(0, 3 * LARGE))
    filled = bytes((7 * i + size) % 256 for i in range(size))
    if kind == "raw":
        return [Field(9, block(9, filled), filled)]
    if kind in ("float", "double"):
        filled = filled[: size // 8 * 8]
        of = 4 if kind == "float" else 10
        return [Field(of, block(of, filled), filled)]
    if kind == "int64":
        return [Field(7, block(7, b"".join(varint(i) for i in range(size))))]
    if kind == "unpacked":
        one = struct.pack("<Bf", 4 * 8 + 5, 0.5)
        return [Field(4, one) for _ in range(size // 4)]
    if kind == "parts":
        return [Field(4, block(4, filled[: size // 4 * 4])) for _ in range(2)]
    return []


@st.composite
def tensors(draw: st.DrawFn, *, shuffled: bool = False) -> Tensor:
    """Draw a tensor message with fields known and unknown."""
    rest = [
        Field(1, number(1, 3)),
        Field(1, number(1, 2**40)),
        Field(2, number(2, draw(st.sampled_from([1, 10, 11, 16, 99])))),
        Field(8, block(8, "größe/w".encode())),
        Field(12, block(12, b"doc " * draw(st.sampled_from([1, 500])))),
        Field(16, block(16, block(1, b"key") + block(2, b"value"))),
        Field(99, block(99, b"unknown " * draw(st.sampled_from([1, 300])))),
        Field(100, number(100, 2**63)),
        Field(101, varint(101 * 8 + 5) + b"four"),
        Field(102, varint(102 * 8 + 1) + b"eight by"),
    ]
    chosen = draw(st.lists(st.sampled_from(rest), unique_by=lambda f: f.encoded, max_size=6))
    held = draw(values())
    place = draw(
        st.sampled_from(["inside", "inside", "inside", "said to be inside", "outside"])
    )
    if place != "inside":
        chosen.append(Field(14, number(14, int(place == "outside"))))
    if place == "outside":
        entry = block(1, b"location") + block(2, b"weights.bin")
        chosen.append(Field(13, block(13, entry)))
    fields = sorted([*chosen, *held], key=lambda f: f.number)
    if shuffled:
        fields = draw(st.permutations(fields))
    payloads = [f.payload for f in held if f.payload is not None and len(f.payload) >= LARGE]
    return b"".join(f.encoded for f in fields), payloads if place == "inside" else []


def node(attribute: bytes) -> bytes:
    return block(2, b"y") + block(4, b"Constant") + block(5, block(1, b"value") + attribute)


def branch(tensor: bytes) -> bytes:
    return block(1, node(block(5, tensor))) + block(2, b"body") + block(5, tensor)


PLACES: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    # Number of copies, and the encoded field of the graph, or of the model for functions.
    "initializer": (1, lambda t: block(5, t)),
    "attribute": (1, lambda t: block(1, node(block(5, t)))),
    "tensors attribute": (2, lambda t: block(1, node(block(10, t) * 2))),
    "branch": (2, lambda t: block(1, node(block(6, branch(t))))),
    "graphs attribute": (4, lambda t: block(1, node(block(11, branch(t)) * 2))),
    "branch in a branch": (
        2,
        lambda t: block(1, node(block(6, block(1, node(block(6, branch(t))))))),
    ),
    "function": (1, lambda t: block(25, block(1, b"f") + block(7, node(block(5, t))))),
    "default of a function": (1, lambda t: block(25, block(11, block(1, b"a") + block(5, t)))),
}


@st.composite
def files(draw: st.DrawFn, *, shuffled: bool = False) -> tuple[bytes, list[bytes]]:
    """Draw a model file and the payloads in it that are to be cut out, in order."""
    graph, functions = b"", b""
    inside: list[bytes] = []
    of_functions: list[bytes] = []
    for place in draw(st.lists(st.sampled_from(sorted(PLACES)), max_size=5)):
        tensor, payloads = draw(tensors(shuffled=shuffled))
        copies, wrapped = PLACES[place]
        if "function" in place:
            functions += wrapped(tensor)
            of_functions += payloads * copies
        else:
            graph += wrapped(tensor)
            inside += payloads * copies
    unknown = draw(st.sampled_from([b"", block(60, b"?" * 2000), number(61, 5)]))
    opset = block(8, number(2, 17))
    model = number(1, 9) + block(7, graph + unknown) + opset + functions + unknown
    return model, inside + of_functions


@given(files())
def test_splicing_what_was_excised_gives_the_same_bytes(
    drawn: tuple[bytes, list[bytes]],
) -> None:
    content, _ = drawn
    skeleton, payloads = excised(content)
    assert spliced(skeleton, payloads, content) == content


@given(files(shuffled=True))
def test_fields_in_another_order_give_an_equal_message(
    drawn: tuple[bytes, list[bytes]],
) -> None:
    content, _ = drawn
    skeleton, payloads = excised(content)
    again = spliced(skeleton, payloads, content)
    assert len(again) == len(content)
    assert onnx.ModelProto.FromString(again) == onnx.ModelProto.FromString(content)


@given(files(shuffled=True))
def test_exactly_the_large_payloads_in_one_part_are_cut_out(
    drawn: tuple[bytes, list[bytes]],
) -> None:
    content, expected = drawn
    skeleton, payloads = excised(content)
    assert [cut(content, payload) for payload in payloads] == expected
    rest = len(content) - sum(map(len, expected))
    assert rest <= len(skeleton) <= rest + STUB_BYTES * len(expected)
    onnx.ModelProto.FromString(skeleton)


@pytest.mark.parametrize("of", [4, 9, 10])
@pytest.mark.parametrize("place", PLACES)
def test_a_payload_is_cut_out_wherever_it_is(place: str, of: int) -> None:
    values = bytes(range(256)) * (LARGE // 256)
    copies, wrapped = PLACES[place]
    inside = wrapped(number(2, 1) + block(of, values))
    content = number(1, 9) + (inside if "function" in place else block(7, inside))
    skeleton, payloads = excised(content)
    assert [cut(content, payload) for payload in payloads] == [values] * copies
    assert [payload.field for payload in payloads] == [of] * copies
    assert values not in skeleton
    assert spliced(skeleton, payloads, content) == content


@given(files(), st.data())
def test_payloads_that_are_not_given_stay_marked(
    drawn: tuple[bytes, list[bytes]], data: st.DataObject
) -> None:
    content, _ = drawn
    skeleton, payloads = excised(content)
    given_back = (
        data.draw(st.sets(st.sampled_from(range(len(payloads))))) if payloads else set()
    )
    pieces = wire.splice(skeleton, LOCATION, {i: payloads[i] for i in given_back})
    assert [p for p in pieces if isinstance(p, int)] == sorted(given_back)
    literal = b"".join(p for p in pieces if isinstance(p, bytes))
    assert literal.count(LOCATION.encode()) == len(payloads) - len(given_back)
    once = b"".join(p if isinstance(p, bytes) else cut(content, payloads[p]) for p in pieces)
    assert spliced(once, payloads, content) == content


@pytest.mark.parametrize("name", fixtures.names())
def test_every_fixture_comes_back_byte_for_byte(name: str) -> None:
    content = fixtures.built(name).read_bytes()
    skeleton, payloads = excised(content)
    assert spliced(skeleton, payloads, content) == content
    assert all(payload.length >= LARGE for payload in payloads)


def test_a_stub_says_which_payload_is_its_own() -> None:
    names = ["a", "b", "c"]
    weights = [
        helper.make_tensor(name, 1, [256], bytes([65 + i]) * 1024, raw=True)
        for i, name in enumerate(names)
    ]
    content = model_of(weights)
    skeleton, payloads = excised(content)
    for tensor in onnx.ModelProto.FromString(skeleton).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries.keys() == {"location", "offset"}
        assert entries["location"] == LOCATION
        assert tensor.data_location == TensorProto.EXTERNAL
        assert not tensor.HasField("raw_data")
        payload = payloads[int(entries["offset"])]
        assert cut(content, payload) == bytes([65 + names.index(tensor.name)]) * 1024
        assert payload.field == 9


def model_of(weights: Sequence[TensorProto]) -> bytes:
    graph = helper.make_graph([], "g", [], [], weights)
    return helper.make_model(graph, ir_version=9).SerializeToString()


def test_payloads_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    size = 64 << 20
    tensor_head = number(1, size // 4) + number(2, 1) + block(8, b"w")
    raw_head = varint(9 * 8 + 2) + varint(size)
    initializer = varint(5 * 8 + 2) + varint(len(tensor_head + raw_head) + size)
    inside = initializer + tensor_head + raw_head
    head = number(1, 9) + varint(7 * 8 + 2) + varint(len(inside) + size) + inside
    path.write_bytes(head)
    os.truncate(path, len(head) + size)  # sparse
    seen = 0
    real = os.read

    def counting(fd: int, count: int) -> bytes:
        nonlocal seen
        chunk = real(fd, count)
        seen += len(chunk)
        return chunk

    monkeypatch.setattr(wire.os, "read", counting)
    _, payloads, _ = model_io.read_skeleton(path)
    assert payloads == [wire.Payload(len(head), size, 9)]
    assert seen < 1 << 20


# Damaged files.


@cache
def damaged_file() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="damaged-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "model.onnx"


def read(content: bytes) -> onnx.ModelProto | ModelError:
    """Give what a file with this content holds, whole, or the error."""
    path = damaged_file()
    path.write_bytes(content)
    try:
        model_io.read_skeleton(path)
    except ModelError as error:
        return error
    skeleton, payloads = excised(content)
    return onnx.ModelProto.FromString(spliced(skeleton, payloads, content))


def parsed(content: bytes) -> onnx.ModelProto | None:
    """Give what protobuf itself reads, None if it reads no model."""
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:
        return None
    return model if model.HasField("graph") else None


def assert_refused_or_right(content: bytes) -> None:
    result = read(content)
    if isinstance(result, ModelError):
        assert_one_line(result)
    else:
        assert result == parsed(content)


def assert_one_line(error: ModelError) -> None:
    assert str(error).startswith(f"{damaged_file()}: ")
    assert "\n" not in str(error)


@cache
def small_file() -> bytes:
    large = helper.make_tensor("large", 1, [256], bytes(range(256)) * 4, raw=True)
    small = helper.make_tensor("small", 1, [2], [1.0, 2.0])
    packed = helper.make_tensor("packed", 1, [260], [0.25] * 260)
    body = helper.make_graph([], "body", [], [], [small])
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    graph = helper.make_graph(nodes, "g", [], [], [large, small, packed])
    return helper.make_model(graph, ir_version=9).SerializeToString()


def test_a_file_cut_anywhere_is_refused_or_is_a_shorter_message() -> None:
    whole = small_file()
    inside = {at for p in excised(whole)[1] for at in range(p.offset + 1, p.offset + p.length)}
    for end in range(len(whole)):
        if end % 16 == 0 or end not in inside:
            assert_refused_or_right(whole[:end])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(fixtures.names()), st.data())
def test_flipped_bytes_are_refused_or_are_another_message(
    name: str, data: st.DataObject
) -> None:
    content = bytearray(fixtures.built(name).read_bytes())
    positions = st.integers(0, len(content) - 1)
    for at in data.draw(st.lists(positions, min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    assert_refused_or_right(bytes(content))


@given(st.binary(max_size=300))
def test_noise_is_refused_or_is_a_message(content: bytes) -> None:
    assert_refused_or_right(content)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.onnx", small_file())
    return file.getvalue()


def nested(levels: int) -> bytes:
    # Each graph holds an If whose branch is the next graph; padded, or it is not opened.
    graph = block(2, b"innermost") + block(10, b"x" * LARGE)
    for _ in range(levels):
        graph = block(1, node(block(6, graph)))
    return number(1, 9) + block(7, graph)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "it holds no graph", id="empty"),
        pytest.param(b"ir_version: 9\n" * 200, "not an ONNX model", id="text"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "not an ONNX", id="lfs"),
        pytest.param(zipped(), "not an ONNX model", id="zip"),
        pytest.param(b"\xff" * 4096, "damaged or cut", id="varint overflow in a tag"),
        pytest.param(b"\x3a" + b"\xff" * 4096, "damaged or cut", id="overflow in a length"),
        pytest.param(b"\x3a" + b"\xff" * 9 + b"\x01", "damaged or cut", id="longest length"),
        pytest.param(number(1, 9), "it holds no graph", id="no graph"),
        pytest.param(b"\x00" * 2048, "damaged or cut", id="zeros"),
        pytest.param(nested(10_000), "not an ONNX model", id="nested 10,000 deep"),
        pytest.param(nested(40), "not an ONNX model", id="nested deeper than protobuf reads"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(content: bytes, reason: str) -> None:
    result = read(content)
    assert isinstance(result, ModelError)
    assert_one_line(result)
    assert reason in str(result)


def test_nesting_that_protobuf_reads_is_read() -> None:
    content = nested(30)
    assert parsed(content) is not None
    assert read(content) == parsed(content)


def test_a_payload_that_claims_more_than_the_file_is_refused() -> None:
    tensor = varint(9 * 8 + 2) + varint(2**40)
    content = number(1, 9) + block(7, block(5, tensor + b"x" * 2000))
    assert isinstance(read(content), ModelError)
