"""Models that onnx tests its backends with come through a pass that changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import ModelProto

from support import fixtures, protos, unchanged


def test_every_eighth_backend_model_stays_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # half of the time, on a slow disk
    found = {
        name: unchanged.from_file_to_file(path, tmp_path)
        for name, path in islice(unchanged.backend_models(tmp_path), 0, None, 8)
    }
    assert len(found) > 190  # of 2,033 with onnx 1.23; `make fidelity` takes them all
    assert {name: told for name, told in found.items() if told != unchanged.EQUAL} == {}


@pytest.mark.parametrize("name", fixtures.names())
def test_every_fixture_stays_equal(tmp_path: Path, name: str) -> None:
    path = fixtures.built(name)
    assert unchanged.from_file_to_file(path, tmp_path) == unchanged.EQUAL
    proto = onnx.load(path, load_external_data=False)
    assert unchanged.from_proto_to_proto(proto, path.parent) == unchanged.EQUAL


# What makes these tests worth something: the comparison finds every change.


def fields(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Every field that is set anywhere in a message, but for empty strings."""
    for field, value in message.ListFields():
        if value != "":
            yield message, field
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                yield from fields(child)


def lose(message: Message, field: FieldDescriptor) -> None:
    message.ClearField(field.name)


def double(message: Message, field: FieldDescriptor) -> None:
    value = getattr(message, field.name)
    if field.is_repeated:
        value.append(value[-1])


def change(message: Message, field: FieldDescriptor) -> None:
    value = getattr(message, field.name)
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return
    if field.is_repeated:
        value[-1] = other(value[-1])
    else:
        setattr(message, field.name, other(value))


def other(value: str | bytes | float) -> str | bytes | float:
    if isinstance(value, str):
        return f"{value}!"
    if isinstance(value, bytes):
        return value[:-1] + bytes([value[-1] ^ 1]) if value else b"!"
    return 2 if value == 1 else 1


@pytest.mark.parametrize("damage", [lose, double, change])
@pytest.mark.parametrize("name", ["captured_output", "really_new_ir", "opset_21_int4"])
def test_the_comparison_finds_every_change_of_a_field(
    name: str, damage: Callable[[Message, FieldDescriptor], None]
) -> None:
    before = onnx.load(fixtures.built(name), load_external_data=False)
    assert protos.unlike(before, before) is None
    places = list(fields(before))
    assert len(places) > 50
    for i, (_, field) in enumerate(places):
        after = ModelProto()
        after.CopyFrom(before)
        damage(*next(islice(fields(after), i, None)))
        assert after == before or protos.unlike(before, after), field.full_name


def test_the_comparison_reads_data_files(tmp_path: Path) -> None:
    path = fixtures.copied("external_two", tmp_path)
    before, has_data_files = protos.whole(path)
    assert has_data_files
    for data in tmp_path.glob("*.bin"):
        content = data.read_bytes()
        data.write_bytes(bytes(byte ^ 1 for byte in content))
        assert protos.unlike(before, protos.whole(path)[0]), data
        data.write_bytes(content)
    assert protos.unlike(before, protos.whole(path)[0]) is None
