"""Whether a tensor holds the values that its type and shape need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from onnxforge.lint.view import BITS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxforge.lint.view import Tensor

__all__ = ["fault"]

_Type = onnx.TensorProto
_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_ANY = ("raw_data", "string_data", *_FIELDS)
_FIELD: Mapping[int, str] = {
    **dict.fromkeys((_Type.FLOAT, _Type.COMPLEX64), "float_data"),
    **dict.fromkeys((_Type.DOUBLE, _Type.COMPLEX128), "double_data"),
    **dict.fromkeys((_Type.UINT32, _Type.UINT64), "uint64_data"),
    _Type.INT64: "int64_data",
    _Type.STRING: "string_data",
}  # by type, of the types whose values do not stand in int32_data
# Types whose values stand in the fields of many values, by the number of the field.
_LARGE = {4: (_Type.FLOAT, _Type.COMPLEX64), 10: (_Type.DOUBLE, _Type.COMPLEX128)}


def fault(tensor: Tensor) -> str | None:
    """What is wrong with the values of a tensor, None if nothing is."""
    if tensor.dtype not in (*BITS, _Type.STRING):
        return f"has the unknown data type {tensor.dtype}"
    if min(tensor.shape, default=0) < 0:
        return "has a negative dimension"
    if reason := _misplaced(tensor):
        return reason
    count = _stored(tensor)
    if count not in (None, tensor.nbytes):
        return f"holds {count} bytes, but its shape needs {tensor.nbytes}"
    return None


def _misplaced(tensor: Tensor) -> str | None:
    """Why values stand where they do not belong, or None."""
    filled = {field for field in _ANY if len(getattr(tensor.proto, field))}
    if tensor.external:
        if tensor.dtype == _Type.STRING:
            return "is text in a data file"
        return "has values in the model and in a data file" if filled else None
    right = {_FIELD.get(tensor.dtype, "int32_data")}
    right |= {"raw_data"} if tensor.dtype != _Type.STRING else set()
    good = len(filled) <= 1 and filled <= right
    if tensor.payload is not None:
        good = tensor.dtype in _LARGE.get(tensor.payload.field, (tensor.dtype,))
        good = good and tensor.dtype != _Type.STRING
    return None if good else "its values stand in a field of another type"


def _stored(tensor: Tensor) -> int | None:
    """How many bytes a tensor holds in the model, None where that is not simple to tell."""
    if tensor.payload is not None:
        return tensor.payload.length
    if tensor.external or tensor.dtype == _Type.STRING:
        return None
    if tensor.proto.HasField("raw_data"):
        return len(tensor.proto.raw_data)
    bits = BITS[tensor.dtype]
    if bits < 8 or tensor.dtype in (_Type.COMPLEX64, _Type.COMPLEX128):
        return None
    return sum(len(getattr(tensor.proto, field)) for field in _FIELDS) * bits // 8
