"""Models in: from a file, a proto, an onnx_ir model or a graphsurgeon graph."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir import serde

from onnxforge import remarks
from onnxforge.errors import ModelError
from onnxforge.fidelity import difference
from onnxforge.lazy import DataFile, FileTensor
from onnxforge.skeleton import SOURCE, Source, root_cause, set_external, skeleton
from onnxforge.storage import wire
from onnxforge.storage.locate import DataFolder, external_numbers, refuse_unsized
from onnxforge.walk import proto_tensors, replace_tensors

__all__ = ["MAX_PROTO_BYTES", "files", "from_proto", "load", "read_skeleton", "to_proto"]

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
    location = secrets.token_hex(16)
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content, payloads = wire.excise(str(path), file.fileno(), size, location)
        proto = onnx.ModelProto.FromString(content)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model (damaged protobuf)") from None
    if not proto.HasField("graph"):
        raise ModelError(f"{path}: not an ONNX model (it holds no graph)")
    return proto, payloads, location


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
    proto, payloads, location = read_skeleton(file)
    try:
        return _build(file, proto, payloads, location, editable=editable)
    except ModelError as error:
        text = str(error)
        raise ModelError(text if text.startswith(file.anchor) else f"{file}: {text}") from None


def _build(
    file: Path,
    proto: onnx.ModelProto,
    payloads: list[wire.Payload],
    location: str,
    *,
    editable: bool,
) -> ir.Model:
    folder = DataFolder(file.parent, file)
    model_file = DataFile(file)

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

    return _deserialized(proto, on_disk, path=file, editable=editable)


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
        if tensor.dtype == ir.DataType.UNDEFINED:
            raise ModelError(f"tensor {tensor.name!r}: has no data type")
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        found = entries[tensor.location, tensor.offset, tensor.length]
        stored = on_disk(found, tensor)
        written[id(stored)] = found
        external = external or bool(stored.external)
        return stored

    try:
        model = serde.deserialize_model(proto)
        replace_tensors(model, resolve)  # onnx_ir looks at the types in attributes only here
    except (serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"onnx_ir cannot represent the model: {root_cause(error)}") from error
    if len(set(map(id, written.values()))) < len(entries):
        raise ModelError("cannot be edited without loss: onnx_ir drops a tensor")
    model.meta[SOURCE] = Source(external, path)
    if editable:
        _make_editable(proto, model, written)
    return model


def _make_editable(
    proto: onnx.ModelProto, model: ir.Model, written: dict[int, _Entries]
) -> None:
    """Find what onnx_ir lost of a proto: keep it to be put back, or refuse the model."""
    again = skeleton(model, mend=False)
    for tensor, stub in zip(again.tensors, again.stubs, strict=True):
        if entries := written.get(id(tensor)):
            set_external(stub, entries)
    if len(again.proto.functions) == len(proto.functions):
        remarks.remember(model, proto, again.proto)
        remarks.mend(model, again.proto)
    if loss := difference(proto, again.proto, stub=again.location):
        raise ModelError(f"cannot be edited without loss: {loss}")


def _external_entries(proto: onnx.ModelProto) -> dict[tuple[Any, ...], _Entries]:
    """The external data entries of a proto by what onnx_ir keeps of them."""
    found: dict[tuple[Any, ...], _Entries] = {}
    for tensor in proto_tensors(proto):
        if tensor.data_type not in onnx.TensorProto.DataType.values():
            raise ModelError(f"tensor {tensor.name!r}: unknown data type {tensor.data_type}")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if len(entries) < len(tensor.external_data):
                raise ModelError(f"tensor {tensor.name!r}: an external data key stands twice")
            numbers = external_numbers(entries, tensor.name)
            found[entries.get("location", ""), *numbers] = entries
    return found


def files(model: ir.Model) -> dict[Path, int]:
    """The files a loaded model and its weights were found in, and their sizes in bytes."""
    found: dict[Path, int] = {}

    def note(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if isinstance(tensor, FileTensor):
            found[tensor.file.path] = tensor.file.size
        return tensor

    path = model.meta.get(SOURCE, Source()).path
    if path is not None:
        found[path] = DataFile(path).size
    replace_tensors(model, note)
    return found


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
