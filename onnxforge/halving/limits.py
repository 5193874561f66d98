"""Constants that a half format does not hold, and what has to stay float32 for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxforge.core import Finding
from onnxforge.halving.formats import Content, Format, content
from onnxforge.weights import for_each

if TYPE_CHECKING:
    from onnxforge.halving.parts import Part, Parts, Read
    from onnxforge.weights import Weight, Weights

__all__ = ["Limits", "limit"]

_FLOAT = ir.DataType.FLOAT
_MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "ScatterND",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
    }
)
_SELECTS = _MOVES | {"Clip", "ConstantOfShape", "Max", "Min"}
_MASKS = _SELECTS | {"Add", "Mul", "Sub"}
_SUMS = frozenset({"LogSoftmax", "Softmax"})
# From a small constant to where it is divided by.
_GUARDS = _SELECTS | {"Pow", "Reciprocal", "Sqrt"}
_SINGULAR = frozenset({"Div", "Log", "Reciprocal", "Sqrt"})


@dataclass
class Limits:
    """What the constants of a model ask for.

    Attributes:
        saturated: What stands for values below the lowest one, by the weight's tensor.
        findings: What was found, one entry for each constant.
    """

    saturated: dict[ir.TensorProtocol, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def limit(parts: Parts, weights: Weights, form: Format) -> Limits:
    """Keep float32 what reads a constant that the format does not hold.

    A mask that is added before a Softmax becomes finite instead: half the lowest value, so
    that a sum with it is finite too, and the lowest one where nothing is added.

    Args:
        parts: The parts; some are kept.
        weights: All weights.
        form: The half format.
    """
    found = Limits()
    floats = [weight for weight in weights if weight.dtype == _FLOAT]
    for weight, held in zip(
        floats, for_each(lambda w: content(w.tensor, form), floats), strict=True
    ):
        readers = _readers(weight, parts)
        if held.overflows and readers:
            _overflow(weight, held, readers, parts, form, found)
        elif held.lost is not None and readers:
            _lost(weight, held.lost, readers, parts, found)
    return found


def _readers(weight: Weight, parts: Parts) -> list[Part]:
    if weight.value is not None:
        reads: Iterable[Read] = parts.readers.get(weight.value, ())
        return [read.part for read in reads]
    makers: Mapping[ir.Value, Part] = parts.makers
    outputs = weight.node.outputs if weight.node is not None else ()
    return [makers[value] for value in outputs if value in makers]


def _overflow(
    weight: Weight,
    held: Content,
    readers: list[Part],
    parts: Parts,
    form: Format,
    found: Limits,
) -> None:
    edge = held.lowest if held.highest is None else held.highest
    detail = f"holds {edge:g}"
    if held.highest is None and (added := _mask(readers, parts)) is not None:
        low = form.lowest / 2 if added else form.lowest
        found.saturated[weight.tensor] = low
        message = f"a mask before a Softmax becomes {low:g}"
        found.findings.append(Finding("OF263", weight.where, message, detail=detail))
        return
    for part in readers:
        part.keep("OF261", "reads a constant that overflows")
    message = "overflows, so that it and what reads it stay float32"
    found.findings.append(Finding("OF261", weight.where, message, detail=detail))


def _mask(readers: Iterable[Part], parts: Parts) -> bool | None:
    """Whether something is added to a mask, None if it is none.

    All ways forward from a mask end in a Softmax.
    """
    seen: set[Part] = set()
    waiting = list(readers)
    added = ended = False
    while waiting:
        part = waiting.pop()
        if part in seen or part.op_type in _SUMS:
            ended = ended or part.op_type in _SUMS
            continue
        seen.add(part)
        if part.op_type not in _MASKS and (part.node is not None or not part.makes):
            return None
        added = added or (part.op_type in _MASKS and part.op_type not in _SELECTS)
        waiting += parts.after(part)
    return added if ended else None


def _lost(
    weight: Weight, smallest: float, readers: list[Part], parts: Parts, found: Limits
) -> None:
    for part in readers:
        part.keep("OF262", "reads a constant that is too small")
        _guarded(part, parts, set())
    message = "is too small, so that it and what reads it stay float32"
    detail = f"holds {smallest:g}"
    found.findings.append(Finding("OF262", weight.where, message, detail=detail))


def _guarded(part: Part, parts: Parts, seen: set[Part]) -> bool:
    """Keep the way from a guard against zero to what it guards; whether there is one."""
    if part in seen:
        return False
    seen.add(part)
    guards = False
    for after in parts.after(part):
        if after.op_type in _GUARDS:
            on = _guarded(after, parts, seen) or after.op_type in _SINGULAR
        else:
            on = after.op_type in _SINGULAR or part.op_type == "Reciprocal"
        if on:
            after.keep("OF262", "is guarded by a constant that is too small")
            guards = True
    return guards
