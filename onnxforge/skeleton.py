"""The graph of a model as a proto in which large tensors are only numbered."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import onnx
import onnx_ir as ir
from onnx_ir import serde

from onnxforge import remarks
from onnxforge.errors import ModelError
from onnxforge.lazy import DerivedTensor, FileTensor
from onnxforge.storage.wire import PAYLOAD_BYTES
from onnxforge.walk import proto_tensors, replace_tensors

if TYPE_CHECKING:
    from collections.abc import Container, Mapping
    from pathlib import Path

__all__ = [
    "SOURCE",
    "Skeleton",
    "Source",
    "root_cause",
    "set_external",
    "skeleton",
    "twin",
]

SOURCE = "onnxforge.source"
"""Key of ``ir.Model.meta`` under which a loaded model remembers what it was made from."""


@dataclass(frozen=True)
class Source:
    """What a model was made from.

    Attributes:
        external: Whether any weight lay in a data file.
        path: The file, None for a model that came as an object.
    """

    external: bool = False
    path: Path | None = None


@dataclass(frozen=True)
class Skeleton:
    """A serialized graph and the tensors taken out of it.

    Attributes:
        proto: The model; tensor number i is a stub whose location is ``location`` and whose
            offset is i.
        tensors: The tensors that belong there, by number.
        stubs: Their places in ``proto``, by number.
        location: A word that no model can know.
    """

    proto: onnx.ModelProto
    tensors: list[ir.TensorProtocol]
    stubs: list[onnx.TensorProto]
    location: str


def skeleton(model: ir.Model, *, mend: bool = True, also: Container[int] = ()) -> Skeleton:
    """Serialize a model without the payloads of its large tensors; reads no weight.

    Args:
        model: The model, the same afterwards.
        mend: Make good what onnx_ir drops and adds; false gives what it writes.
        also: ``id`` of tensors to take out although they are small.
    """
    location = secrets.token_hex(16)
    originals: dict[int, ir.TensorProtocol] = {}
    tensors: list[ir.TensorProtocol] = []

    def stub(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if id(tensor) not in also and not _is_large(tensor):
            return tensor
        replacement = ir.ExternalTensor(
            location,
            len(tensors),
            None,
            tensor.dtype,
            shape=cast("ir.Shape", tensor.shape),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        originals[id(replacement)] = tensor
        tensors.append(tensor)
        return replacement

    replace_tensors(model, stub)
    try:
        proto = serde.serialize_model(model)
    except serde.SerdeError as error:
        raise ModelError(f"onnx_ir cannot write the model: {root_cause(error)}") from error
    finally:
        replace_tensors(model, lambda tensor: originals.get(id(tensor), tensor))
    if mend:
        remarks.mend(model, proto)
    stubs = {
        int(tensor.external_data[1].value): tensor
        for tensor in proto_tensors(proto)
        if tensor.external_data and tensor.external_data[0].value == location
    }
    if mend:
        for i, tensor in enumerate(tensors):
            remarks.in_order(stubs[i], tensor)
    return Skeleton(proto, tensors, [stubs[i] for i in range(len(tensors))], location)


def root_cause(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def twin(model: ir.Model) -> ir.Model:
    """A copy of the graph that shares the tensors; onnx_ir 1.1 clones sorted graphs only."""
    content = skeleton(model)
    copy = serde.deserialize_model(content.proto)

    def shared(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == content.location:
            return content.tensors[tensor.offset or 0]
        return tensor

    replace_tensors(copy, shared)
    remarks.copy(model, copy)
    return copy


def set_external(tensor: onnx.TensorProto, entries: Mapping[str, str]) -> None:
    """Point a tensor at external data."""
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _is_large(tensor: ir.TensorProtocol) -> bool:
    if isinstance(tensor, FileTensor | DerivedTensor | ir.ExternalTensor):
        return True
    if tensor.dtype == ir.DataType.STRING or tensor.nbytes < PAYLOAD_BYTES:
        return False
    # Values in other fields than raw_data keep their field; those are not worth a copy.
    return not isinstance(tensor, serde.TensorProtoTensor) or tensor.raw.HasField("raw_data")
