"""Types of values as text, the way the tables write them: ``float16``, ``seq(int64)``."""

from __future__ import annotations

import onnx
import onnx_ir as ir

__all__ = ["element", "of_proto", "of_value", "to_proto"]

_HOLDERS = {"seq": "sequence_type", "optional": "optional_type"}


def element(dtype: ir.DataType) -> str:
    """The name of an element type; onnx_ir calls double so as well."""
    return dtype.name.lower()


def of_value(kind: ir.TypeProtocol | None) -> str | None:
    """The text of a type, None where it says nothing."""
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        inner = of_value(kind.elem_type)
        word = "seq" if isinstance(kind, ir.SequenceType) else "optional"
        return inner and f"{word}({inner})"
    if isinstance(kind, ir.TensorType) and kind.dtype != ir.DataType.UNDEFINED:
        return element(kind.dtype)
    return None


def to_proto(text: str) -> onnx.TypeProto | None:
    """The type of a text, without a shape; None for what onnx_ir does not know either."""
    proto = onnx.TypeProto()
    word, _, rest = text.partition("(")
    if word in _HOLDERS:
        inner = to_proto(rest[:-1])
        if inner is None:
            return None
        getattr(proto, _HOLDERS[word]).elem_type.CopyFrom(inner)
        return proto
    if text.upper() not in ir.DataType.__members__:
        return None
    proto.tensor_type.elem_type = ir.DataType[text.upper()].value
    return proto


def of_proto(proto: onnx.TypeProto | None) -> str | None:
    """The text of a type, None where it says nothing."""
    kind = proto.WhichOneof("value") if proto is not None else None
    if proto is None or kind is None:
        return None
    if kind == "tensor_type":
        number = proto.tensor_type.elem_type
        return element(ir.DataType(number)) if number else None
    if kind == "map_type":
        key, inner = ir.DataType(proto.map_type.key_type), of_proto(proto.map_type.value_type)
        return inner and f"map({element(key)}:{inner})"
    for word, field in _HOLDERS.items():
        if kind == field:
            inner = of_proto(getattr(proto, field).elem_type)
            return inner and f"{word}({inner})"
    return None
