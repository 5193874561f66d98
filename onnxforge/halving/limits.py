"""Constants that a half format does not hold, and what has to stay float32 for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxforge.core import Finding
from onnxforge.elements import MOVES
from onnxforge.halving.formats import Content, Format, content
from onnxforge.weights import for_each

if TYPE_CHECKING:
    from onnxforge.halving.parts import Part, Parts
    from onnxforge.weights import Weight, Weights

__all__ = ["Limits"]

_FLOAT = ir.DataType.FLOAT
_SELECTS = MOVES | {"Cast", "Clip", "ConstantOfShape", "Max", "Min", "Pad"}
_MASKS = _SELECTS | {"Add", "Mul", "Sub"}
_SUMS = frozenset({"LogSoftmax", "Softmax"})
# From a small constant to where it is divided by.
_GUARDS = _SELECTS | {"Pow", "Reciprocal", "Sqrt"}
_SINGULAR = frozenset({"Div", "Log", "Reciprocal", "Sqrt"})
_SHIFTS = frozenset({"Add", "Sub", "Sum"})


class Limits:
    """Keeps float32 what reads a constant that a half format does not hold.

    A mask that is added before a Softmax becomes finite instead: half the lowest value, so
    that a sum with it is finite too, and the lowest one where nothing is added.

    Attributes:
        saturated: What stands for values below the lowest one, by the weight's tensor.
        findings: What was found, one entry for each constant.
    """

    def __init__(self, parts: Parts, weights: Weights, form: Format) -> None:
        """Look all weights through; some parts are kept for them."""
        self.saturated: dict[ir.TensorProtocol, float] = {}
        self.findings: list[Finding] = []
        self._parts = parts
        self._form = form
        floats = [weight for weight in weights if weight.dtype == _FLOAT]
        held = for_each(lambda weight: content(weight.tensor, form), floats)
        for weight, found in zip(floats, held, strict=True):
            readers = self._readers(weight)
            if weight.is_overridable and self._is_half(weight):
                self._default(weight, found)
            elif found.overflows and readers:
                self._overflow(weight, found, readers)
            elif found.lost is not None and readers:
                self._lost(weight, found.lost, readers)

    def _readers(self, weight: Weight) -> list[Part]:
        if weight.value is not None:
            return [read.part for read in self._parts.readers.get(weight.value, ())]
        makers = self._parts.makers
        outputs = weight.node.outputs if weight.node is not None else ()
        return [makers[value] for value in outputs if value in makers]

    def _tell(self, code: str, weight: Weight, message: str, holds: float) -> None:
        self.findings.append(Finding(code, weight.where, message, detail=f"holds {holds:g}"))

    def _is_half(self, weight: Weight) -> bool:
        maker = None if weight.value is None else self._parts.makers.get(weight.value)
        return maker is not None and maker.fixed

    def _default(self, weight: Weight, held: Content) -> None:
        """An input of the half type rounds what is given, and so what it has without that."""
        if held.overflows:
            message = "the default of an input overflows, unless keep_io keeps it float32"
            self._tell("OF261", weight, message, held.highest or held.lowest or 0.0)

    def _overflow(self, weight: Weight, held: Content, readers: list[Part]) -> None:
        lowest, highest = held.lowest, held.highest
        added = _mask(readers, self._parts) if highest is None else None
        if lowest is not None and added is not None:
            low = self._form.lowest / 2 if added else self._form.lowest
            self.saturated[weight.tensor] = low
            message = f"a mask before a Softmax becomes {low:g}"
            self._tell("OF263", weight, message, lowest)
            return
        for part in readers:
            part.keep("OF261", "reads a constant that overflows")
        message = "overflows, so that it and what reads it stay float32"
        self._tell("OF261", weight, message, highest or lowest or 0.0)

    def _lost(self, weight: Weight, smallest: float, readers: list[Part]) -> None:
        kept = []
        for part in readers:
            guards = _guarded(part, self._parts, set())
            if guards or part.op_type not in _SHIFTS:  # else a sum is rounded by more than it
                part.keep("OF262", "reads a constant that is too small")
                kept.append(part)
        if not kept:
            return
        message = "is too small, so that it and what reads it stay float32"
        self._tell("OF262", weight, message, smallest)


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
