"""Whether two protos say the same, and where they first do not."""

from __future__ import annotations

import math
import reprlib
import struct
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["difference"]

# Repeated fields whose order means nothing, and what names an entry.
_UNORDERED = {
    "metadata_props": "key",
    "external_data": "key",
    "quant_parameter_tensor_names": "key",
    "opset_import": "domain",
    "value_info": "name",
    "quantization_annotation": "tensor_name",
}


_SMALL = 1 << 20  # bytes; larger messages may hold weights, which are not to be copied
_PAYLOAD_FIELDS = frozenset({"raw_data", "external_data", "data_location"})


def difference(a: Any, b: Any, path: str = "model", *, stub: str = "") -> str | None:
    """Say where two protobuf messages of one type first differ, or None.

    An unset and an empty value count as equal, the domains ``ai.onnx`` and "" as well, and so
    do outputs that a node leaves out at its end, by an empty name or by none.

    Args:
        a: The message as it was.
        b: The message as it is.
        path: How to call the message in the answer.
        stub: Location of tensors of ``b`` whose payload is elsewhere and not compared.
    """
    if _is_equal(a, b):
        return None
    skipped = _PAYLOAD_FIELDS if _is_stub(b, stub) else ()
    for oneof in a.DESCRIPTOR.oneofs:
        kinds = [_kind(message, oneof.name) for message in (a, b)]
        if kinds[0] != kinds[1]:
            return f"{path}.{oneof.name} {_changed(*kinds)}"
    for field in a.DESCRIPTOR.fields:
        if field.name in skipped:
            continue
        if field.name == "shape" and a.HasField("shape") != b.HasField("shape"):
            return f"{path}.shape: unknown in one of them"
        found = _field(field, getattr(a, field.name), getattr(b, field.name), path, stub)
        if found is not None:
            return found
    if _unknown(a) != _unknown(b):
        return f"{path}: a field that this version of ONNX does not know"
    return None


def _is_equal(a: Any, b: Any) -> bool:
    """Whether small messages have the same bytes; fields unknown to us count as well."""
    size = a.ByteSize()
    return bool(
        size == b.ByteSize()
        and size < _SMALL
        and a.SerializePartialToString(deterministic=True)
        == b.SerializePartialToString(deterministic=True)
    )


def _kind(message: Any, oneof: str) -> str | None:
    """The member of a oneof that is set, if it is more than an empty text."""
    name: str | None = message.WhichOneof(oneof)
    return None if name is None or getattr(message, name) == "" else name


def _unknown(message: Any) -> list[tuple[int, str]]:
    return sorted((f.field_number, repr(f.data)) for f in UnknownFieldSet(message))


def _is_stub(message: Any, stub: str) -> bool:
    if not stub or message.DESCRIPTOR.name != "TensorProto" or not message.external_data:
        return False
    return bool(message.external_data[0].value == stub)


def _changed(a: Any, b: Any) -> str:
    return f"was {reprlib.repr(a)}, is {reprlib.repr(b)}"


def _field(field: Any, a: Any, b: Any, path: str, stub: str) -> str | None:
    where = f"{path}.{field.name}"
    if field.name == "domain":
        a, b = _domain(a), _domain(b)
    if not isinstance(a, str | bytes | int | float | Message):  # a repeated field
        if field.name == "output" and field.message_type is None:
            a, b = _without_trailing_blanks(a), _without_trailing_blanks(b)
        return _repeated(field, a, b, where, stub)
    if field.message_type is not None:
        return difference(a, b, where, stub=stub)
    return None if _same(a, b) else f"{where} {_changed(a, b)}"


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _same(a: Any, b: Any) -> bool:
    """Whether two numbers or texts are the same; NaN is NaN, and 0.0 is not -0.0."""
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b) or (
            math.isnan(a) and math.isnan(b)
        )
    return bool(a == b)


def _repeated(field: Any, a: Any, b: Any, where: str, stub: str) -> str | None:
    if key := _UNORDERED.get(field.name):
        return _unordered(key, a, b, where, stub)
    if len(a) != len(b):
        return f"{where} had {len(a)} entries, has {len(b)}"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        inside = f"{where}[{i}]"
        if field.message_type is not None:
            if found := difference(x, y, inside, stub=stub):
                return found
        elif not _same(x, y):
            return f"{inside} {_changed(x, y)}"
    return None


def _unordered(
    key: str, a: Iterable[Any], b: Iterable[Any], where: str, stub: str
) -> str | None:
    def named(entries: Iterable[Any]) -> list[tuple[str, Any]]:
        pairs = [(_domain(getattr(entry, key)), entry) for entry in entries]
        return sorted(pairs, key=lambda pair: pair[0])

    mine, theirs = named(a), named(b)
    if [k for k, _ in mine] != [k for k, _ in theirs]:
        odd = {k for k, _ in mine} ^ {k for k, _ in theirs}
        return f"{where}: {', '.join(sorted(odd)[:3]) or 'repeated entries'} not in both"
    for (name, x), (_, y) in zip(mine, theirs, strict=True):
        if found := difference(x, y, f"{where}[{name}]", stub=stub):
            return found
    return None


def _without_trailing_blanks(names: Iterable[str]) -> list[str]:
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept
