"""Models in: from a file, a proto, an onnx_ir model or a graphsurgeon graph."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir import serde

from onnxforge import remarks
from onnxforge.cycles import refuse_cycles
from onnxforge.errors import ModelError
from onnxforge.fidelity import difference
from onnxforge.lazy import DataFile, FileTensor
from onnxforge.skeleton import SOURCE, Source, root_cause, set_external, skeleton
from onnxforge.storage import wire
from onnxforge.storage.locate import (
    DataFolder,
    RemoteFolder,
    external_numbers,
    refuse_unsized,
)
from onnxforge.storage.remote import Server, split_address
from onnxforge.walk import named_tensors, replace_tensors, scopes, tensors

__all__ = [
    "MAX_PROTO_BYTES",
    "files",
    "from_proto",
    "load",
    "load_header",
    "read_skeleton",
    "to_proto",
]

MAX_PROTO_BYTES = 2**31 - 1
"""What protobuf can hold in one message."""


def read_skeleton(path: Path) -> tuple[onnx.ModelProto, list[wire.Payload], str]:
    """Parse a model file and leave its large payloads where they are.

    Args:
        path: The model file.

    Returns:
        The proto, the payloads, and the location under which the proto names them; see
        ``onnxforge.storage.wire.excise``.

    Raises:
        ModelError: There is no such file, or it is no ONNX model.
    """
    try:
        whole = DataFile(path)
        with whole.open() as file:
            return _parsed(str(path), file.fileno(), whole.size)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


def load(path: str | os.PathLike[str], *, editable: bool = True) -> ir.Model:
    """Load a model and leave all its large weights on disk.

    Args:
        path: The model file; its data files are looked for beside it.
        editable: Make sure that the model survives a way through onnx_ir unharmed. False is
            enough for reading.

    Returns:
        The model; its large tensors are `FileTensor` objects.

    Raises:
        ModelError: The model cannot be read, or cannot be edited without loss.
    """
    file = Path(path).absolute()
    model_file = DataFile(file)  # first: should the file change meanwhile, that is noticed
    folder = DataFolder(file.parent, file)
    read = read_skeleton(file)
    try:
        model = _build(model_file, folder, read, editable=editable)
        with model_file.open():  # refuses a file that changed while its data were looked at
            return model
    except ModelError as error:
        text = str(error)
        raise ModelError(text if text.startswith(file.anchor) else f"{file}: {text}") from None


def load_header(url: str) -> tuple[ir.Model, dict[str, int]]:
    """Load a model from an address of http without its weights, which cannot be read then.

    Returns:
        The model, and the addresses and sizes in bytes of it and of its data files.

    Raises:
        OnnxforgeError: The model cannot be read.
    """
    server, name = Server(split_address(url)[0]), split_address(url)[1]
    size = server.size(name)
    if size is None:
        raise ModelError(f"{url}: no such file")
    folder = RemoteFolder(server)
    with server.slices(name, size) as content:
        read = _parsed(url, content, size)
    try:
        model = _build(folder.file(name, size), folder, read, editable=False)
    except ModelError as error:
        raise ModelError(f"{url}: {error}") from None
    return model, folder.sizes


_Read = tuple[onnx.ModelProto, list[wire.Payload], str]


def _parsed(path: str, content: int | wire.Slices, size: int) -> _Read:
    """A model without its large payloads; see `read_skeleton`."""
    location = secrets.token_hex(16)
    skeleton, payloads = wire.excise(path, content, size, location)
    try:
        proto = onnx.ModelProto.FromString(skeleton)
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model (damaged protobuf)") from None
    if not proto.HasField("graph"):
        raise ModelError(f"{path}: not an ONNX model (it holds no graph)")
    return proto, payloads, location


def _build(
    model_file: DataFile, folder: DataFolder, read: _Read, *, editable: bool
) -> ir.Model:
    proto, payloads, location = read

    def on_disk(entries: _Entries, tensor: ir.TensorProtocol) -> FileTensor:
        if entries.get("location") != location:
            return folder.tensor(entries, tensor)
        refuse_unsized(tensor)
        payload = payloads[int(entries["offset"])]
        if tensor.dtype not in _FIELD_TYPES.get(payload.field, (tensor.dtype,)):
            raise ModelError(
                f"tensor {tensor.name!r}: its values stand in a field of another type"
            )
        if payload.length != tensor.nbytes:
            raise ModelError(
                f"tensor {tensor.name!r}: holds {payload.length} bytes, but its shape needs"
                f" {tensor.nbytes}"
            )
        return FileTensor(model_file, payload.offset, tensor, field=payload.field)

    return _deserialized(proto, on_disk, path=model_file.path, editable=editable)


def from_proto(
    proto: onnx.ModelProto, base_dir: str | os.PathLike[str] | None = None
) -> ir.Model:
    """Wrap a proto; its weights are shared, not copied, and the proto is never changed.

    Args:
        proto: The model.
        base_dir: Folder of its external data. Without it, external tensors cannot be read.

    Raises:
        ModelError: The model cannot be edited without loss, or its data is not there.
    """
    folder = None if base_dir is None else DataFolder(base_dir)

    def on_disk(entries: _Entries, tensor: ir.TensorProtocol) -> FileTensor:
        if folder is None:
            raise ModelError(
                f"tensor {tensor.name!r} lies in {entries.get('location')!r}: give base_dir,"
                " the folder of the model's data"
            )
        return folder.tensor(entries, tensor)

    return _deserialized(proto, on_disk, path=None, editable=True)


_Entries = dict[str, str]

# Types whose values stand in float_data and in double_data.
_FIELD_TYPES = {
    4: (ir.DataType.FLOAT, ir.DataType.COMPLEX64),
    10: (ir.DataType.DOUBLE, ir.DataType.COMPLEX128),
}
_VALUES = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "uint64_data",
    "double_data",
    "string_data",
)
_OnDisk = Callable[[_Entries, ir.TensorProtocol], FileTensor]


def _deserialized(
    proto: onnx.ModelProto, on_disk: _OnDisk, path: Path | None, *, editable: bool
) -> ir.Model:
    entries = _external_entries(proto)
    for training in proto.training_info:
        graphs = (training.initialization, training.algorithm)
        held = onnx.ModelProto(graph=graphs[0]), onnx.ModelProto(graph=graphs[1])
        if any(_external_entries(part) for part in held):
            raise ModelError("training graphs with external data are not supported")
    written: dict[int, _Entries] = {}
    external = False

    def resolve(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        nonlocal external
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        name, found = entries[tensor.location, tensor.offset, tensor.length]
        given, tensor.name = tensor.name, name  # for messages
        stored = on_disk(found, tensor)
        stored.name = given
        written[id(stored)] = found
        external = external or bool(stored.external)
        return stored

    try:
        model = serde.deserialize_model(proto)
        if any(isinstance(text, bytes) for text in _texts(model)):
            raise ModelError("a name in it is no text (UTF-8)")
        refuse_cycles(model)
        replace_tensors(model, resolve)  # onnx_ir looks at the types in attributes only here
    except (serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"onnx_ir cannot represent the model: {root_cause(error)}") from error
    if len(set(map(id, written.values()))) < len(entries):
        raise ModelError(
            "cannot be edited without loss: onnx_ir drops a tensor that has no name, or has"
            " that of another"
        )
    model.meta[SOURCE] = Source(external, path)
    if editable:
        _make_editable(proto, model, written)
    return model


def _texts(model: ir.Model) -> Iterator[object]:
    """What should be text and is bytes if it cannot be decoded; there, onnx_ir lets it be."""
    yield from (model.producer_name, model.producer_version, model.domain)
    yield from (*model.metadata_props.values(), *model.metadata_props)
    for scope in scopes(model):
        yield from scope.opset_imports
        yield from (value.name for value in (*scope.graph.inputs, *scope.graph.outputs))
        for node in scope.graph:
            yield from (node.name, node.domain, node.op_type)
            yield from (value.name for value in (*node.inputs, *node.outputs) if value)


def _make_editable(
    proto: onnx.ModelProto, model: ir.Model, written: dict[int, _Entries]
) -> None:
    """Find what onnx_ir lost of a proto: keep it to be put back, or refuse the model."""
    again = skeleton(model, mend=False)
    for tensor, stub in zip(again.tensors, again.stubs, strict=True):
        if entries := written.get(id(tensor)):
            set_external(stub, entries)
            if "checksum" in entries and model.meta[SOURCE].path is not None:
                raise ModelError(
                    f"tensor {stub.name!r}: the checksum of its data file would not be that of"
                    " the file its bytes are written to"
                )
    if len(again.proto.functions) < len(proto.functions):
        raise ModelError("cannot be edited without loss: two functions have the same name")
    remarks.remember(model, proto, again.proto)
    remarks.mend(model, again.proto)
    if loss := difference(proto, again.proto, stub=again.location):
        raise ModelError(f"cannot be edited without loss: {loss}")


def _external_entries(proto: onnx.ModelProto) -> dict[tuple[Any, ...], tuple[str, _Entries]]:
    """Names and external data entries of tensors, by what onnx_ir keeps of the entries."""
    found: dict[tuple[Any, ...], tuple[str, _Entries]] = {}
    for name, tensor in named_tensors(proto):
        if reason := _malformed(tensor):
            raise ModelError(f"tensor {name!r}: {reason}")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if len(entries) < len(tensor.external_data):
                raise ModelError(f"tensor {name!r}: an external data key stands twice")
            numbers = external_numbers(entries, name)
            found[entries.get("location", ""), *numbers] = name, entries
    return found


def _malformed(tensor: onnx.TensorProto) -> str | None:
    """Why the values of a tensor are not those that its type and shape need, or None."""
    try:
        dtype = ir.DataType(tensor.data_type)
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    except (ValueError, KeyError):
        return f"unknown data type {tensor.data_type}"
    if any(dim < 0 for dim in tensor.dims):
        return "has a negative dimension"
    lengths = {name: len(getattr(tensor, name)) for name in _VALUES}
    filled = {name for name, length in lengths.items() if length}
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return "has values in the model and in a data file" if filled else None
    fields = {field} if field == "string_data" else {field, "raw_data"}
    if len(filled) > 1 or not filled <= fields:
        return "its values stand in a field of another type"
    used = filled.pop() if filled else field
    needed, unit = _needed(dtype, math.prod(tensor.dims), used)
    if lengths[used] != needed:
        return f"holds {lengths[used]} {unit}, but its shape needs {needed}"
    return None


def _needed(dtype: ir.DataType, count: int, field: str) -> tuple[int, str]:
    """How long a field is that holds ``count`` elements, and in what unit."""
    if field == "raw_data":
        return -(-count * dtype.bitwidth // 8), "bytes"
    if field == "int32_data" and dtype.bitwidth in (2, 4):  # a byte of them in each entry
        return -(-count * dtype.bitwidth // 8), "values"
    is_complex = dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)
    return (2 * count if is_complex else count), "values"


def files(model: ir.Model) -> dict[Path, int]:
    """The files a loaded model and its weights were found in, and their sizes in bytes."""
    found: dict[Path, int] = {}
    path = model.meta.get(SOURCE, Source()).path
    if path is not None:
        found[path] = DataFile(path).size
    stored = (tensor for tensor in tensors(model) if isinstance(tensor, FileTensor))
    return found | {tensor.file.path: tensor.file.size for tensor in stored}


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize a model; derived weights are computed, weights in data files stay there.

    Raises:
        ModelError: The result does not fit into one proto (2 GB).
    """
    result = skeleton(model)
    inline = 0
    for tensor, stub in zip(result.tensors, result.stubs, strict=True):
        if isinstance(tensor, FileTensor) and tensor.external:
            set_external(stub, tensor.external)
            continue
        inline += tensor.nbytes
        if inline > MAX_PROTO_BYTES:
            raise ModelError("the result does not fit into a ModelProto of 2 GB: run on paths")
        stub.ClearField("external_data")
        stub.ClearField("data_location")
        field = getattr(tensor, "field", None)
        if field in _FIELD_TYPES:
            values = stub.float_data if field == 4 else stub.double_data
            values.extend(np.frombuffer(tensor.tobytes(), "<f4" if field == 4 else "<f8"))
        else:
            stub.raw_data = tensor.tobytes()
    return result.proto
