"""What leaves the range of a half format on samples stays float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxforge.core import Finding
from onnxforge.halving.formats import Format, strained
from onnxforge.peaks import Watched, peaks
from onnxforge.skeleton import twin
from onnxforge.walk import Scope, scopes

if TYPE_CHECKING:
    from onnxforge.compare.samples import Sample
    from onnxforge.halving.parts import Part, Parts

__all__ = ["keep_strained"]


def keep_strained(parts: Parts, form: Format, samples: Sequence[Sample]) -> list[Finding]:
    """Run the float32 model on samples, and keep what makes values out of range.

    Args:
        parts: The parts.
        form: The half format.
        samples: What to run it on.

    Returns:
        One entry for each part that is kept.
    """
    copy = twin(parts.model)
    known = _values(copy)
    watched: list[tuple[Part, Watched]] = []
    paths = {scope.graph: scope.path for scope in scopes(parts.model)}
    interface = {*parts.inputs, *parts.outputs}
    for part in parts:
        for value in part.makes if part.reason is None and part not in interface else ():
            graph = value.graph
            found = known.get((paths.get(graph, ""), value.name or "")) if graph else None
            if found is not None:
                watched.append((part, found))
    highest = peaks(copy, [one for _, one in watched], samples)
    findings = []
    for (part, one), peak in zip(watched, highest, strict=True):
        if problem := strained(peak, form):
            part.keep("OF270", f"{problem} on a sample")
            detail = f"{one.value.name}: peak {peak:g}"
            message = f"{problem} on a sample"
            findings.append(Finding("OF270", part.where, message, detail=detail))
    return findings


def _values(model: ir.Model) -> dict[tuple[str, str], Watched]:
    def of(scope: Scope) -> list[ir.Value]:
        made = [value for node in scope.graph for value in node.outputs]
        return [*scope.graph.inputs, *made]

    return {
        (scope.path, value.name or ""): Watched(value, scope)
        for scope in scopes(model)
        for value in of(scope)
    }
