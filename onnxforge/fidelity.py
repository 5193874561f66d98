"""Whether two protos say the same, and where they first do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def difference(a: Any, b: Any, path: str = "model") -> str | None:
    """Say where two protobuf messages of one type first differ, or None.

    An unset and an empty value count as equal, the domains ``ai.onnx`` and "" as well, and so
    do outputs that a node leaves out at its end, by an empty name or by none.

    Args:
        a: The message as it was.
        b: The message as it is.
        path: How to call the message in the answer.
    """
    if a == b:
        return None
    for field in a.DESCRIPTOR.fields:
        found = _field(field, getattr(a, field.name), getattr(b, field.name), path)
        if found is not None:
            return found
    return None


def _field(field: Any, a: Any, b: Any, path: str) -> str | None:
    where = f"{path}.{field.name}"
    if field.name == "domain":
        a, b = (word.removeprefix("ai.onnx") if word == "ai.onnx" else word for word in (a, b))
    if field.is_repeated:
        if field.name == "output" and field.message_type is None:
            a, b = _without_trailing_blanks(a), _without_trailing_blanks(b)
        return _repeated(field, a, b, where)
    if field.message_type is not None:
        return difference(a, b, where)
    return None if a == b or (a != a and b != b) else f"{where} was {a!r}, is {b!r}"


def _repeated(field: Any, a: Any, b: Any, where: str) -> str | None:
    if key := _UNORDERED.get(field.name):
        return _unordered(key, a, b, where)
    if len(a) != len(b):
        return f"{where} had {len(a)} entries, has {len(b)}"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        inside = f"{where}[{i}]"
        if field.message_type is not None:
            if found := difference(x, y, inside):
                return found
        elif x != y and not (x != x and y != y):
            return f"{inside} was {x!r}, is {y!r}"
    return None


def _unordered(key: str, a: Iterable[Any], b: Iterable[Any], where: str) -> str | None:
    def named(entries: Iterable[Any]) -> list[tuple[str, Any]]:
        pairs = [(getattr(entry, key), entry) for entry in entries]
        return sorted(pairs, key=lambda pair: pair[0])

    mine, theirs = named(a), named(b)
    if [k for k, _ in mine] != [k for k, _ in theirs]:
        odd = {k for k, _ in mine} ^ {k for k, _ in theirs}
        return f"{where}: {', '.join(sorted(odd)[:3]) or 'repeated entries'} not in both"
    for (name, x), (_, y) in zip(mine, theirs, strict=True):
        if found := difference(x, y, f"{where}[{name}]"):
            return found
    return None


def _without_trailing_blanks(names: Iterable[str]) -> list[str]:
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept
