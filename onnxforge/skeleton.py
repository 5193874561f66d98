"""The graph of a model as a proto in which large tensors are only numbered."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import onnx
import onnx_ir as ir
from onnx_ir import serde

from onnxforge.lazy import DerivedTensor, FileTensor
from onnxforge.storage.wire import PAYLOAD_BYTES
from onnxforge.walk import proto_graphs, proto_tensors, replace_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = [
    "SOURCE",
    "Skeleton",
    "Source",
    "left_out",
    "put_back",
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
        value_info: Names of initializers that had an entry in value_info.
        external: Whether any weight lay in a data file.
        extras: What onnx_ir has no room for; it is put back when the model is serialized.
        path: The file, None for a model that came as an object.
    """

    value_info: frozenset[str] = frozenset()
    external: bool = False
    path: Path | None = None
    extras: onnx.ModelProto | None = None


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


def skeleton(model: ir.Model) -> Skeleton:
    """Serialize a model without the payloads of its large tensors; reads no weight."""
    location = secrets.token_hex(16)
    originals: dict[int, ir.TensorProtocol] = {}
    tensors: list[ir.TensorProtocol] = []

    def stub(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not _is_large(tensor):
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
    finally:
        replace_tensors(model, lambda tensor: originals.get(id(tensor), tensor))
    stubs: dict[int, onnx.TensorProto] = {}
    for tensor in proto_tensors(proto):
        _drop_repeated_metadata(tensor)
        if tensor.external_data and tensor.external_data[0].value == location:
            stubs[int(tensor.external_data[1].value)] = tensor
    source = model.meta.get(SOURCE, Source())
    _drop_added_value_info(proto, source.value_info)
    if source.extras is not None:
        put_back(proto, source.extras)
    return Skeleton(proto, tensors, [stubs[i] for i in range(len(tensors))], location)


def twin(model: ir.Model) -> ir.Model:
    """A copy of the graph that shares the tensors; onnx_ir 1.1 clones sorted graphs only."""
    content = skeleton(model)
    copy = serde.deserialize_model(content.proto)

    def shared(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == content.location:
            return content.tensors[tensor.offset or 0]
        return tensor

    replace_tensors(copy, shared)
    copy.meta.update(model.meta)
    return copy


def set_external(tensor: onnx.TensorProto, entries: Mapping[str, str]) -> None:
    """Point a tensor at external data."""
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _is_large(tensor: ir.TensorProtocol) -> bool:
    if isinstance(tensor, FileTensor | DerivedTensor):
        return True
    if tensor.dtype == ir.DataType.STRING or tensor.nbytes < PAYLOAD_BYTES:
        return False
    # Values in other fields than raw_data keep their field; those are not worth a copy.
    return not isinstance(tensor, serde.TensorProtoTensor) or tensor.raw.HasField("raw_data")


def _drop_repeated_metadata(tensor: onnx.TensorProto) -> None:
    """onnx_ir 1.1 writes the metadata of an inline tensor twice."""
    entries = {entry.key: entry.value for entry in tensor.metadata_props}
    if len(entries) < len(tensor.metadata_props):
        del tensor.metadata_props[len(entries) :]


def _drop_added_value_info(model: onnx.ModelProto, keep: frozenset[str]) -> None:
    """onnx_ir 1.1 adds value_info for every initializer."""
    for graph in proto_graphs(model):
        added = {tensor.name for tensor in graph.initializer} - keep
        for i in reversed(range(len(graph.value_info))):
            if graph.value_info[i].name in added:
                del graph.value_info[i]


def left_out(original: onnx.ModelProto, proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """What stands in ``original`` and not in ``proto`` and can be put back by its name.

    That is the training graphs, and remarks on values that are not in the main graph.
    """
    extras = onnx.ModelProto()
    extras.training_info.extend(original.training_info)
    for field, key in (("value_info", "name"), ("quantization_annotation", "tensor_name")):
        known = {getattr(entry, key) for entry in getattr(proto.graph, field)}
        getattr(extras.graph, field).extend(
            entry
            for entry in getattr(original.graph, field)
            if getattr(entry, key) not in known
        )
    return extras if extras.ByteSize() else None


def put_back(proto: onnx.ModelProto, extras: onnx.ModelProto) -> None:
    """Merge what `left_out` found into a proto."""
    del proto.training_info[:]
    proto.MergeFrom(extras)
