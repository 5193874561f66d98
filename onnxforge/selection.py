"""Which weights a pass treats, and why not the others; the same for all passes."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxforge.core import Fate, Finding
from onnxforge.errors import Refused
from onnxforge.lazy import identity
from onnxforge.options import ByteSize
from onnxforge.storage.extents import overlapping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from onnxforge.weights import Weight, Weights

__all__ = ["CODES", "Selection", "skipped", "too_old", "treated"]

CODES: Mapping[str, str] = {
    "OF201": "The weight is stored in its new form.",
    "OF202": "The weight is excluded by `include` or `exclude`.",
    "OF203": "The weight is smaller than `min_bytes`.",
    "OF204": "The pass does not treat weights of this type.",
    "OF205": "A runtime needs the value at load time, so it stays a plain constant.",
    "OF206": "The weight is an output of a graph; its type is part of the interface.",
    "OF207": "The weight is also a graph input, so whoever runs the model may override it.",
    "OF208": "Nothing reads the weight.",
    "OF209": "The weight is an attribute of a node and cannot be converted on its way there.",
    "OF210": "The operator set that holds there cannot express the new form.",
    "OF211": "The weight shares its bytes with one that stays; both forms would be stored.",
}
"""What the codes mean that all passes over weights share."""


@dataclass(frozen=True)
class Selection:
    """Which weights a pass is to treat, by the options that all such passes have.

    Attributes:
        dtypes: Types the pass treats.
        min_bytes: Leave smaller weights alone.
        include: Globs on names of weights and of nodes that read them; empty for all.
        exclude: The same, of what to leave alone.
    """

    dtypes: frozenset[ir.DataType]
    min_bytes: ByteSize = ByteSize(0)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def split(self, weights: Weights) -> tuple[list[Weight], list[Finding]]:
        """The weights to treat, and for each of the others why not.

        Raises:
            Refused: A glob matches no weight and no node.
        """
        chosen: list[Weight] = []
        findings: list[Finding] = []
        unmatched = {*self.include, *self.exclude}
        for weight in weights:
            matched = _matched(weight, (*self.include, *self.exclude))
            unmatched -= matched
            if reason := self._reason(weight, matched):
                code, message = reason
                fate = Fate.EXCLUDED if code == "OF202" else Fate.SKIPPED
                findings.append(Finding(code, weight.where, message, weight.nbytes, fate))
            else:
                chosen.append(weight)
        if unmatched:
            raise Refused(f"{min(unmatched)!r} matches no weight and no node that reads one")
        return _without_torn(chosen, weights, findings), findings

    def _reason(self, weight: Weight, matched: set[str]) -> tuple[str, str] | None:
        if not matched.isdisjoint(self.exclude):
            return "OF202", "excluded by name"
        if self.include and matched.isdisjoint(self.include):
            return "OF202", "not included by name"
        if weight.dtype not in self.dtypes:
            return "OF204", f"is {weight.dtype.name.lower()}"
        if weight.nbytes < self.min_bytes:
            return "OF203", f"smaller than {self.min_bytes}"
        return _obstacle(weight)


def skipped(weight: Weight, code: str, message: str, detail: str = "") -> Finding:
    """The finding that a weight stays as it is."""
    return Finding(code, weight.where, message, weight.nbytes, Fate.SKIPPED, detail=detail)


def treated(weight: Weight, message: str) -> Finding:
    """The finding that a weight gets a new form; ask before it does."""
    return Finding("OF201", weight.where, message, weight.nbytes, Fate.TREATED)


def too_old(weight: Weight, needed: int, operator: str) -> Finding | None:
    """The finding that an operator which a new form needs is not there, or None."""
    version = weight.opset
    if version >= needed:
        return None
    detail = f"opset {version}" if version else "ai.onnx is not imported"
    return skipped(weight, "OF210", f"{operator} needs opset {needed}", detail)


def _without_torn(
    chosen: list[Weight], weights: Weights, findings: list[Finding]
) -> list[Weight]:
    """Leave out weights whose bytes another weight keeps, as they would be stored twice."""
    treated = set(map(id, chosen))
    kept = {identity(w.tensor): w.where for w in weights if id(w) not in treated}
    for group in overlapping(w.tensor for w in weights):
        kept |= {identity(tensor): group[0].name or "" for tensor in group}
    torn = [weight for weight in chosen if identity(weight.tensor) in kept]
    for weight in torn:
        message, other = "shares its bytes with one that stays", kept[identity(weight.tensor)]
        findings.append(skipped(weight, "OF211", message, other))
    return [weight for weight in chosen if identity(weight.tensor) not in kept]


def _matched(weight: Weight, globs: Sequence[str]) -> set[str]:
    """The globs that match a weight or a node that reads it, by name or by path."""
    if not globs:
        return set()
    names = [weight.where, weight.value.name if weight.value else None]
    names += [use.where for use in weight.uses]
    names += [node.name for node in weight.readers]
    return {
        glob for glob in globs if any(fnmatch.fnmatchcase(name or "", glob) for name in names)
    }


def _obstacle(weight: Weight) -> tuple[str, str] | None:
    if weight.value is None:
        return "OF209", "is an attribute of its node"
    if weight.is_overridable:
        return "OF207", "is also a graph input, callers may override it"
    if weight.is_output:
        return "OF206", "is a graph output"
    if not weight.uses:
        return "OF208", "nothing reads it"
    if weight.is_needed_constant:
        return "OF205", "a runtime needs its value at load time"
    return None
