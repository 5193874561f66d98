"""What onnx_ir has no room for, kept beside its graphs and put back when they are written.

onnx_ir 1.1 drops training graphs and remarks (value_info, quantization annotations) on names
that a graph does not define. It adds value_info for every initializer. What it keeps it may
write in another way: remarks in another order or twice, metadata sorted, that of inline
tensors twice, ``ai.onnx`` as "", a node without the blank outputs at its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxforge.errors import ModelError
from onnxforge.fidelity import difference
from onnxforge.walk import Scope, proto_graphs, proto_tensors, scopes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    import onnx_ir as ir

__all__ = ["copy", "in_order", "mend", "names", "remember"]

_KEY = "onnxforge.remarks"
_REMARKS = {"value_info": "name", "quantization_annotation": "tensor_name"}
_ENTRIES = {"input": "name", "output": "name", **_REMARKS}


@dataclass(frozen=True)
class _Remarks:
    """What one graph or function had.

    Attributes:
        order: The places of remarks, by field and name.
        extras: Remarks that onnx_ir dropped, by field.
        entries: Inputs, outputs and remarks that onnx_ir writes in another way, by what it
            writes.
        nodes: Domain and number of blank outputs at the end of nodes of which it writes
            another domain or less of them, by what it writes.
    """

    order: dict[str, dict[str, int]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    entries: dict[tuple[str, bytes], Any] = field(default_factory=dict)
    nodes: dict[tuple[str, ...], tuple[str, int]] = field(default_factory=dict)


def remember(model: ir.Model, original: onnx.ModelProto, written: onnx.ModelProto) -> None:
    """Note at each graph what ``original`` says and onnx_ir did not write again.

    Args:
        model: What onnx_ir made of ``original``.
        original: The model as it was.
        written: The model as onnx_ir serializes it.

    Raises:
        ModelError: onnx_ir does not see all graphs of the model.
    """
    model.meta[_KEY] = list(original.training_info), original.HasField("model_version")
    befores, afters, all_scopes = (
        list(_messages(original)),
        list(_messages(written)),
        list(_scopes(model)),
    )
    if not len(befores) == len(afters) == len(all_scopes):
        raise ModelError("an attribute holds a graph that its type does not tell of")
    for before, after, scope in zip(befores, afters, all_scopes, strict=True):
        scope.graph.meta[_KEY] = _remarks(before, after)


def _remarks(before: Any, after: Any) -> _Remarks:
    remarks = _Remarks()
    for name, key in _fields(before, _ENTRIES):
        entries = {getattr(entry, key): entry for entry in getattr(before, name)}
        there = {getattr(entry, key): entry for entry in getattr(after, name)}
        remarks.order[name] = {entry: i for i, entry in enumerate(entries)}
        remarks.extras[name] = []
        for entry, mine in entries.items():
            theirs = there.get(entry)
            if theirs is None:
                remarks.extras[name].append(mine)
            elif mine != theirs and difference(mine, theirs) is None:
                remarks.entries[name, theirs.SerializeToString()] = mine
    for mine, theirs in zip(before.node, after.node, strict=True):
        blanks = len(mine.output) - len(theirs.output)
        if blanks or mine.domain != theirs.domain:
            remarks.nodes[_head(theirs)] = mine.domain, blanks
    return remarks


def mend(model: ir.Model, written: onnx.ModelProto) -> None:
    """Make what onnx_ir serialized say what the model said, no more and no less."""
    for tensor in proto_tensors(written):
        entries = {entry.key: entry.value for entry in tensor.metadata_props}
        if len(entries) < len(tensor.metadata_props):
            del tensor.metadata_props[:]
            for key, value in entries.items():
                tensor.metadata_props.add(key=key, value=value)
    training, has_version = model.meta.get(_KEY, ([], False))
    written.training_info.extend(training)
    if has_version:
        written.model_version = written.model_version  # onnx_ir writes no zero
    in_order(written, model)
    for after, scope in zip(_messages(written), _scopes(model), strict=True):
        in_order(after, scope.graph)
        for proto, node in zip(after.node, scope.graph, strict=True):
            in_order(proto, node)
        remarks = scope.graph.meta.get(_KEY, _Remarks())
        _respell(after, remarks)
        _put_back(after, remarks, scope)


def in_order(written: Any, source: Any) -> None:
    """Give metadata the order they have in the object they were written from."""
    if len(written.metadata_props) > 1:
        order = {key: i for i, key in enumerate(source.metadata_props)}
        written.metadata_props.sort(key=lambda entry: order[entry.key])


def _respell(after: Any, remarks: _Remarks) -> None:
    """Write what means the same in the way it was written before."""
    for name, _ in _fields(after, _ENTRIES) if remarks.entries else ():
        for entry in getattr(after, name):
            entry.CopyFrom(remarks.entries.get((name, entry.SerializeToString()), entry))
    for node in after.node if remarks.nodes else ():
        domain, blanks = remarks.nodes.get(_head(node), (node.domain, 0))
        node.domain = domain
        node.output.extend([""] * blanks)


def _put_back(after: Any, remarks: _Remarks, scope: Scope) -> None:
    """Drop the remarks that onnx_ir added, add those it dropped, each in its old place."""
    added = {tensor.name for tensor in getattr(after, "initializer", [])}
    for name, key in _fields(after, _REMARKS):
        entries, order = getattr(after, name), remarks.order.get(name, {})
        there = {getattr(entry, key): entry for entry in entries}
        if name == "value_info":
            there = {k: e for k, e in there.items() if k in order or k not in added}
        extras = [e for e in remarks.extras.get(name, []) if getattr(e, key) not in there]
        kept = sorted(
            [*there.values(), *extras],
            key=lambda entry: order.get(getattr(entry, key), len(order)),
        )
        del entries[:]
        entries.extend(kept)
        if name == "value_info":
            dropped = {entry.name for entry in extras}
            _retype([entry for entry in entries if entry.name in dropped], scope)


def copy(source: ir.Model, target: ir.Model) -> None:
    """Note the same at a copy of a model."""
    target.meta.update(source.meta)
    for ours, theirs in zip(_scopes(source), _scopes(target), strict=True):
        theirs.graph.meta.update(ours.graph.meta)


def names(graph: ir.Graph) -> set[str]:
    """Names that a graph has remarks on and does not define."""
    extras = graph.meta.get(_KEY, _Remarks()).extras
    return {entry.name for entry in extras.get("value_info", [])}


def _messages(model: onnx.ModelProto) -> Iterator[Any]:
    """The graphs and functions of a proto."""
    yield from proto_graphs(model)
    yield from model.functions


def _scopes(model: ir.Model) -> Iterator[Scope]:
    """The graphs of a model in the order of `_messages`: functions last."""
    found = list(scopes(model))
    yield from (s for s in found if s.parent is not None or s.function is None)
    yield from (s for s in found if s.parent is None and s.function is not None)


def _fields(message: Any, among: dict[str, str]) -> list[tuple[str, str]]:
    """Those of the fields that hold messages, and what names an entry of each."""
    known = message.DESCRIPTOR.fields_by_name
    return [(f, key) for f, key in among.items() if f in known and known[f].message_type]


def _head(node: onnx.NodeProto) -> tuple[str, ...]:
    return node.op_type, node.domain, *node.output


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
