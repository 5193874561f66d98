"""Weights that are larger, more often there, or slower to use than they need to be."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import onnx

from onnxforge.lint.finding import Problem, Rule
from onnxforge.lint.view import type_name

if TYPE_CHECKING:
    from onnxforge.lint.config import Options
    from onnxforge.lint.model import Model
    from onnxforge.lint.view import Tensor

__all__ = ["RULES"]

_Type = onnx.TensorProto
_LARGE = 4096  # bytes from which a second copy of a weight is worth a word
_PROBE, _BLOCK = 1024, 1 << 20
_WIDER: Mapping[int, set[int]] = {
    _Type.FLOAT16: {_Type.FLOAT, _Type.DOUBLE},
    _Type.BFLOAT16: {_Type.FLOAT, _Type.DOUBLE},
    _Type.FLOAT: {_Type.DOUBLE},
    _Type.INT8: {_Type.INT16, _Type.INT32, _Type.INT64, _Type.FLOAT, _Type.DOUBLE},
    _Type.UINT8: {_Type.INT16, _Type.INT32, _Type.INT64, _Type.FLOAT, _Type.DOUBLE},
    _Type.INT32: {_Type.INT64, _Type.DOUBLE},
}


def stored_twice(model: Model, options: Options) -> Iterator[Problem]:
    """Two weights of a model have the same bytes in two places.

    What it does:
        Compares weights of 4 KiB and more that have one type and shape: first some bytes of
        each, then the whole of those that agree there. Left out with `--no-hash` and over
        http, as it reads weights.

    Why it is bad:
        Everybody downloads and holds them twice. Mostly it is a tied weight (embedding and
        output) that an exporter wrote once for each use.

    Example:
        `lm_head.weight: the same 822,083,584 bytes as embed_tokens.weight`

    How to mend:
        `onnxforge run --passes 'shard{single=true}' in.onnx out.onnx` stores equal weights
        once; the graph stays as it is.

    Fix:
        None.
    """
    alike: dict[tuple[object, ...], dict[_Place, Tensor]] = defaultdict(dict)
    for place, tensor in _places(model):
        if tensor.nbytes >= _LARGE:
            alike[tensor.dtype, tensor.shape].setdefault(place, tensor)
    for group in alike.values():
        for first, other in _equal(model, group) if len(group) > 1 else ():
            text = f"the same {other.nbytes:,} bytes as {first.where}"
            yield Problem(text, other.where)


_Place = tuple[str, int]


def _places(model: Model) -> Iterator[tuple[_Place, Tensor]]:
    """File and offset of the bytes of each tensor whose bytes are there."""
    for tensor in model.tensors:
        if tensor.payload is not None and tensor.payload.length == tensor.nbytes:
            yield (model.name, tensor.payload.offset), tensor
    for each in model.held:
        size = None if each.file is None else model.files.size(each.file)
        if each.file and size is not None and each.offset is not None and each.stop <= size:
            yield (each.file, each.offset), each.tensor


def _equal(model: Model, places: Mapping[_Place, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors with equal bytes."""
    probed: dict[bytes, list[_Place]] = defaultdict(list)
    for place, tensor in places.items():
        probed[_probe(model, place, tensor.nbytes)].append(place)
    for same in probed.values():
        hashed: dict[bytes, _Place] = {}
        for place in same if len(same) > 1 else ():
            key = _hash(model, place, places[place].nbytes)
            if key in hashed:
                yield places[hashed[key]], places[place]
            hashed.setdefault(key, place)


def _probe(model: Model, place: _Place, size: int) -> bytes:
    name, start = place
    starts = (0, size // 2, max(0, size - _PROBE))
    with model.files.slices(name) as content:
        return b"".join(content[start + at : start + min(at + _PROBE, size)] for at in starts)


def _hash(model: Model, place: _Place, size: int) -> bytes:
    name, start = place
    digest = hashlib.sha256()
    with model.files.slices(name) as content:
        for at in range(start, start + size, _BLOCK):
            digest.update(content[at : min(at + _BLOCK, start + size)])
    return digest.digest()


def float64(model: Model, options: Options) -> Iterator[Problem]:
    """Weights, inputs or outputs are float64.

    What it does:
        Finds float64 tensors of 1 KiB and more, and float64 inputs and outputs of the model.

    Why it is bad:
        They take twice the room and time of float32, few kernels know them, and browsers and
        accelerators mostly none. An exporter writes them where a Python number met a tensor.

    Example:
        A table of positions that numpy made.

    How to mend:
        Make it float32 before the export. Where it is meant (a filter, a sum over long
        sound), ignore the rule for the file.

    Fix:
        None.
    """
    for tensor in model.tensors:
        if tensor.dtype == _Type.DOUBLE and tensor.nbytes >= 1024:
            yield Problem(f"{tensor.nbytes:,} bytes of float64", tensor.where)
    main = model.proto.graph
    for kind, values in (("input", main.input), ("output", main.output)):
        for value in values:
            if value.type.tensor_type.elem_type == _Type.DOUBLE:
                yield Problem(f"the {kind} is float64", value.name)


def dequantized_table(model: Model, options: Options) -> Iterator[Problem]:
    """A whole table is dequantized, and then a few rows of it are taken.

    What it does:
        Finds DequantizeLinear of a constant whose output a Gather takes rows of.

    Why it is bad:
        onnxruntime computes the whole table in every run: 4 ms instead of 0.01 ms for a table
        of 64 MB.

    Example:
        A tool quantizes an embedding as it does any weight.

    How to mend:
        Take rows of the integers and of the scales, and multiply those: the pass
        `gather-int8` on the float32 model.

    Fix:
        None.
    """
    yield from _before_gather(model, "DequantizeLinear", "is dequantized as a whole")


def widened_table(model: Model, options: Options) -> Iterator[Problem]:
    """A whole table is cast, and then a few rows of it are taken.

    What it does:
        Finds Cast of a constant of 1 MiB and more whose output a Gather takes rows of.

    Why it is bad:
        A runtime widens the table when it loads the model and holds it in memory; a table
        whose rows are cast after they are taken stays in its file.

    Example:
        A tool stores weights as float16 and casts them all back at once.

    How to mend:
        Put the Cast behind the Gather, as the pass `fp16w` does.

    Fix:
        None.
    """
    yield from _before_gather(model, "Cast", "is widened as a whole", at_least=1 << 20)


def _before_gather(
    model: Model, op: str, what: str, at_least: int = 1024
) -> Iterator[Problem]:
    for graph in model.graphs:
        for node in graph.nodes:
            maker = node.maker(0) if node.op == "Gather" else None
            table = maker.constant(0) if maker is not None and maker.op == op else None
            if maker is not None and table is not None and table.nbytes >= at_least:
                text = f"{table.where} ({table.nbytes:,} bytes) {what} for {node.where}"
                yield Problem(text, maker.where)


def casts_undone(model: Model, options: Options) -> Iterator[Problem]:
    """Two Cast nodes in a row give back the type there was before.

    What it does:
        Finds a Cast of a Cast to the type of the very first value, and says whether the way
        loses anything.

    Why it is bad:
        If the type between is wider, both do nothing, and stand in the way of fusions. If it
        is narrower, precision is lost for no gain.

    Example:
        Two tools each keep float32 inputs for their part: float32 -> float16 -> float32.

    How to mend:
        Remove both if the type between is wider; else find out which tool narrowed the value.

    Fix:
        None.
    """
    for graph in model.graphs:
        for node in graph.nodes:
            first = node.maker(0) if node.op == "Cast" else None
            if first is None or first.op != "Cast":
                continue
            before, between = first.dtype(0), first.number("to", 0)
            if before and before == node.number("to", 0) and before != between:
                names = [type_name(dtype) for dtype in (before, between)]
                wide = between in _WIDER.get(before, set())
                result = "which changes nothing" if wide else "which loses precision"
                text = f"undoes {first.where}: {names[0]} -> {names[1]} -> {names[0]}"
                yield Problem(f"{text}, {result}", node.where)


RULES = (
    Rule("OF436", "stored-twice", "warning", stored_twice, reads=True),
    Rule("OF437", "float64", "warning", float64),
    Rule("OF438", "dequantized-table", "warning", dequantized_table),
    Rule("OF439", "widened-table", "warning", widened_table),
    Rule("OF440", "casts-undone", "warning", casts_undone),
)
