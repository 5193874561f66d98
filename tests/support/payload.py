"""Digests of every weight and a text of everything else, by onnx and plain reads only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

_PAYLOAD_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "uint64_data",
    "double_data",
    "string_data",
    "external_data",
    "data_location",
)
# What one element of a typed field is stored as; int32_data holds several widths.
_TYPED = (("float_data", "<f4"), ("double_data", "<f8"), ("int64_data", "<i8"))
_WIDE = {TensorProto.INT32: "<i4", TensorProto.UINT32: "<u4"}
_TWO_BYTES = (
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
)


def tensor_digests(model_path: str | Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor's little-endian payload, by place.

    A place is a path of names joined by " > ": graph or function, node (its first output)
    and attribute, then tensor. Float, int and string attributes of Constant nodes count.
    """
    path = Path(model_path)
    model = onnx.load(path, load_external_data=False)
    digests: dict[str, str] = {}
    for place, payload in payloads(model, path.parent):
        name, copy = place, 1
        while name in digests:
            copy += 1
            name = f"{place} #{copy}"
        digests[name] = hashlib.sha256(payload).hexdigest()
    return digests


def payloads(model: ModelProto, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every tensor's place and payload; `folder` is where data files lie."""
    yield from _in_graph("graph", model.graph, folder)
    for function in model.functions:
        name = f"function {function.domain}.{function.name}:{function.overload}"
        yield from _in_nodes(name.removesuffix(":"), function.node, folder)


def _in_graph(place: str, graph: GraphProto, folder: Path) -> Iterator[tuple[str, bytes]]:
    for tensor in graph.initializer:
        yield f"{place} > {tensor.name}", _payload(tensor, folder)
    for sparse in graph.sparse_initializer:
        yield f"{place} > {sparse.values.name}", _payload(sparse.values, folder)
        yield f"{place} > {sparse.values.name} indices", _payload(sparse.indices, folder)
    yield from _in_nodes(place, graph.node, folder)


def _in_nodes(place: str, nodes: list[NodeProto], folder: Path) -> Iterator[tuple[str, bytes]]:
    for node in nodes:
        for attribute in node.attribute:
            inner = f"{place} > {node.output[0]} > {attribute.name}"
            yield from _in_attribute(inner, attribute, folder)
            if node.op_type == "Constant" and not attribute.ref_attr_name:
                yield from _in_constant(inner, attribute)


def _in_attribute(
    place: str, attribute: AttributeProto, folder: Path
) -> Iterator[tuple[str, bytes]]:
    if attribute.HasField("t"):
        yield place, _payload(attribute.t, folder)
    for i, tensor in enumerate(attribute.tensors):
        yield f"{place} > {i}", _payload(tensor, folder)
    if attribute.HasField("sparse_tensor"):
        yield f"{place} > values", _payload(attribute.sparse_tensor.values, folder)
        yield f"{place} > indices", _payload(attribute.sparse_tensor.indices, folder)
    if attribute.HasField("g"):
        yield from _in_graph(place, attribute.g, folder)
    for i, graph in enumerate(attribute.graphs):
        yield from _in_graph(f"{place} > {i}", graph, folder)


def _in_constant(place: str, attribute: AttributeProto) -> Iterator[tuple[str, bytes]]:
    if attribute.name == "value_float":
        yield place, np.array(attribute.f, "<f4").tobytes()
    elif attribute.name == "value_floats":
        yield place, np.array(attribute.floats, "<f4").tobytes()
    elif attribute.name == "value_int":
        yield place, np.array(attribute.i, "<i8").tobytes()
    elif attribute.name == "value_ints":
        yield place, np.array(attribute.ints, "<i8").tobytes()
    elif attribute.name in ("value_string", "value_strings"):
        yield place, _joined([*attribute.strings] or [attribute.s])


def _joined(strings: list[bytes]) -> bytes:
    return b"".join(len(s).to_bytes(8, "little") + s for s in strings)


def _payload(tensor: TensorProto, folder: Path) -> bytes:
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, folder)
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    if tensor.data_type == TensorProto.STRING:
        return _joined(list(tensor.string_data))
    for field, dtype in _TYPED:
        if getattr(tensor, field):
            return np.array(getattr(tensor, field), dtype).tobytes()
    if tensor.uint64_data:
        dtype = _WIDE.get(tensor.data_type, "<u8")
        return np.array(tensor.uint64_data, np.uint64).astype(dtype).tobytes()
    dtype = _WIDE.get(tensor.data_type, "<u2" if tensor.data_type in _TWO_BYTES else "u1")
    return np.array(tensor.int32_data, np.int64).astype(dtype).tobytes()


def _external(tensor: TensorProto, folder: Path) -> bytes:
    keys = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / keys["location"]).open("rb") as file:
        file.seek(int(keys.get("offset", 0)))
        length = int(keys.get("length", 0))
        payload = file.read(length or -1)
    if length and len(payload) != length:
        raise ValueError(f"{tensor.name}: {keys['location']} ends early")
    return payload


def graph_text(model: ModelProto) -> str:
    """Return a canonical text of a model without payloads, places and our own stamps.

    Unset and empty strings are the same, so are the orders of initializers, of type
    annotations and of metadata, and whether an initializer has a type annotation.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    stamps = [p for p in copy.metadata_props if p.key.startswith("onnxforge.")]
    for stamp in stamps:
        copy.metadata_props.remove(stamp)
    _canonical(copy)
    return text_format.MessageToString(copy)


def _canonical(message: Message) -> None:
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING and value == "":
            message.ClearField(field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                _canonical(child)
    if isinstance(message, TensorProto):
        for name in _PAYLOAD_FIELDS:
            message.ClearField(name)
    if isinstance(message, AttributeProto) and message.name in ("value_float", "value_floats"):
        message.ClearField("f")
        message.ClearField("floats")
    if isinstance(message, GraphProto):
        _drop_initializer_types(message)
    _sort(message)


def _drop_initializer_types(graph: GraphProto) -> None:
    known = {t.name for t in graph.initializer}
    known |= {o.name for o in chain(graph.input, graph.output)}
    kept = [info for info in graph.value_info if info.name not in known]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _sort(message: Message) -> None:
    keys = {
        "initializer": "name",
        "value_info": "name",
        "metadata_props": "key",
        "opset_import": "domain",
        "attribute": "name",
    }
    for field, value in message.ListFields():
        key = keys.get(field.name)
        if key and field.message_type and key in field.message_type.fields_by_name:
            value.sort(key=lambda item, key=key: getattr(item, key))
