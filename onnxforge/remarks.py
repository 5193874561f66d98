"""What onnx_ir has no room for, kept beside its graphs and put back when they are written.

onnx_ir 1.1 drops training graphs and remarks (value_info, quantization annotations) on names
that a graph does not define; it adds value_info for every initializer and writes the
metadata of inline tensors twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxforge.errors import ModelError
from onnxforge.walk import Scope, proto_graphs, proto_tensors, scopes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    import onnx_ir as ir

__all__ = ["copy", "mend", "names", "remember"]

_KEY = "onnxforge.remarks"
_FIELDS = {"value_info": "name", "quantization_annotation": "tensor_name"}


@dataclass(frozen=True)
class _Remarks:
    """What one graph or function had.

    Attributes:
        described: Initializers that had an entry in value_info.
        extras: Entries that onnx_ir dropped, by field.
    """

    described: frozenset[str]
    extras: dict[str, list[onnx.ValueInfoProto | onnx.TensorAnnotation]]


def remember(model: ir.Model, original: onnx.ModelProto, written: onnx.ModelProto) -> None:
    """Note at each graph what ``original`` says and onnx_ir did not write again.

    Args:
        model: What onnx_ir made of ``original``.
        original: The model as it was.
        written: The model as onnx_ir serializes it.

    Raises:
        ModelError: onnx_ir does not see all graphs of the model.
    """
    model.meta[_KEY] = list(original.training_info)
    befores, afters, all_scopes = (
        list(_messages(original)),
        list(_messages(written)),
        list(_scopes(model)),
    )
    if not len(befores) == len(afters) == len(all_scopes):
        raise ModelError("an attribute holds a graph that its type does not tell of")
    for before, after, scope in zip(befores, afters, all_scopes, strict=True):
        described = {t.name for t in _initializers(before)} & {
            v.name for v in before.value_info
        }
        extras = {}
        for field, key in _fields(before):
            known = {getattr(entry, key) for entry in getattr(after, field)}
            entries = getattr(before, field)
            extras[field] = [e for e in entries if getattr(e, key) not in known]
        scope.graph.meta[_KEY] = _Remarks(frozenset(described), extras)


def mend(model: ir.Model, written: onnx.ModelProto) -> None:
    """Make what onnx_ir serialized say what the model said, no more and no less."""
    for tensor in proto_tensors(written):
        entries = {entry.key for entry in tensor.metadata_props}
        if len(entries) < len(tensor.metadata_props):
            del tensor.metadata_props[len(entries) :]
    written.training_info.extend(model.meta.get(_KEY, []))
    for after, scope in zip(_messages(written), _scopes(model), strict=True):
        remarks = scope.graph.meta.get(_KEY, _Remarks(frozenset(), {}))
        added = {tensor.name for tensor in _initializers(after)} - remarks.described
        for i in reversed(range(len(after.value_info))):
            if after.value_info[i].name in added:
                del after.value_info[i]
        for field, entries in remarks.extras.items():
            there = {getattr(entry, _FIELDS[field]) for entry in getattr(after, field)}
            kept = [e for e in entries if getattr(e, _FIELDS[field]) not in there]
            getattr(after, field).extend(kept)
            if field == "value_info":
                _retype(list(after.value_info)[len(after.value_info) - len(kept) :], scope)


def copy(source: ir.Model, target: ir.Model) -> None:
    """Note the same at a copy of a model."""
    target.meta.update(source.meta)
    for ours, theirs in zip(_scopes(source), _scopes(target), strict=True):
        theirs.graph.meta.update(ours.graph.meta)


def names(graph: ir.Graph) -> set[str]:
    """Names that a graph has remarks on and does not define."""
    remarks = graph.meta.get(_KEY)
    extras = [] if remarks is None else remarks.extras.get("value_info", [])
    return {entry.name for entry in extras}


def _messages(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    yield from proto_graphs(model)
    yield from model.functions


def _scopes(model: ir.Model) -> Iterator[Scope]:
    """The graphs of a model in the order of `_messages`: functions last."""
    found = list(scopes(model))
    yield from (s for s in found if s.parent is not None or s.function is None)
    yield from (s for s in found if s.parent is None and s.function is not None)


def _retype(entries: list[onnx.ValueInfoProto], scope: Scope) -> None:
    """Give remarks on values of an outer scope the type those have by now."""
    outer, pending = scope.parent, {entry.name: entry for entry in entries}
    while outer is not None and pending:
        defined = _defined(outer.graph)
        for name in pending.keys() & defined.keys():
            entry, dtype = pending.pop(name), defined[name].dtype
            if dtype is not None and entry.type.HasField("tensor_type"):
                entry.type.tensor_type.elem_type = dtype.value
        outer = outer.parent


def _defined(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    values += [output for node in graph for output in node.outputs]
    return {value.name or "": value for value in values}


def _fields(message: onnx.GraphProto | onnx.FunctionProto) -> list[tuple[str, str]]:
    return [(field, key) for field, key in _FIELDS.items() if hasattr(message, field)]


def _initializers(message: onnx.GraphProto | onnx.FunctionProto) -> list[onnx.TensorProto]:
    return list(getattr(message, "initializer", []))
