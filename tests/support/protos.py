"""Whether two protos are equal, with no leniency but one; nothing here uses onnxforge."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import onnx
from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import ModelProto, TensorProto

M = TypeVar("M", bound=Message)


def unlike(before: Message, after: Message) -> str | None:
    """Return the first line in which two messages differ, or None.

    An unset and an empty string are the same, and the stamps of onnxforge are left out.
    Everything else counts: order, bits of NaN, the field of a payload, unknown fields.
    """
    a, b = _canonical(before), _canonical(after)
    if a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True):
        return None
    texts = [text_format.MessageToString(m, print_unknown_fields=True) for m in (a, b)]
    lines = enumerate(zip_longest(*(text.splitlines() for text in texts)), 1)
    told = (f"line {i} was {x!r}, is {y!r}" for i, (x, y) in lines if x != y)
    return next(told, "bits of a number differ")


def whole(path: Path) -> tuple[ModelProto, bool]:
    """Read a model with the bytes of tensors in data files; say whether there were any."""
    model = onnx.load(path, load_external_data=False)
    outside = [t for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        # onnx refuses files with two names, which data have for a moment when they move.
        with (path.parent / entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            tensor.raw_data = file.read(int(entries.get("length", -1)))
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return model, bool(outside)


def _tensors(message: Message) -> Iterator[TensorProto]:
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                yield from _tensors(child)


def _canonical(message: M) -> M:
    copy = type(message)()
    copy.CopyFrom(message)
    if isinstance(copy, ModelProto):
        for stamp in [p for p in copy.metadata_props if p.key.startswith("onnxforge.")]:
            copy.metadata_props.remove(stamp)
    _drop_empty_strings(copy)
    return copy


def _drop_empty_strings(message: Message) -> None:
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                _drop_empty_strings(child)
        elif field.type == FieldDescriptor.TYPE_STRING and value == "":
            message.ClearField(field.name)
