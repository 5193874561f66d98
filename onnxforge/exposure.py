"""What a half type does not hold of the values that a model makes of samples."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxforge.halving.formats import BFLOAT16, FLOAT16, strained
from onnxforge.peaks import Watched, peaks
from onnxforge.spec import Word
from onnxforge.walk import label, scopes

if TYPE_CHECKING:
    from onnxforge.compare.samples import Sample
    from onnxforge.emulation import Rounding
    from onnxforge.runtime.session import Setup

__all__ = ["Strain", "as_option", "makers", "strains"]

_FORMATS = {form.dtype: form for form in (BFLOAT16, FLOAT16)}


@dataclass(frozen=True)
class Strain:
    """A value that leaves the range of its half type.

    Attributes:
        value: Its name.
        node: Path of the node that makes it in the float32 model, or name of the input.
        op_type: The operator, empty for an input.
        peak: Its largest finite magnitude on all samples.
        problem: What is wrong with that.
    """

    value: str
    node: str
    op_type: str
    peak: float
    problem: str


def makers(model: ir.Model) -> dict[str, tuple[str, str]]:
    """Path and operator of the node that makes a value, by the name of the value."""
    return {
        value.name: (scope.path + label(node, position), node.op_type)
        for scope in scopes(model)
        for position, node in enumerate(scope.graph)
        for value in node.outputs
        if value.name
    }


def strains(
    model: ir.Model,
    roundings: Sequence[Rounding],
    samples: Iterable[Sample],
    known: Mapping[str, tuple[str, str]],
    setup: Setup | None = None,
) -> list[Strain]:
    """Run an emulated model on samples and find the values that leave their range.

    Args:
        model: The model, as `emulate` left it; it is of no use afterwards.
        roundings: The places where it rounds.
        samples: What to run it on.
        known: The nodes of the float32 model, see `makers`.
        setup: How to run it.
    """
    watched = [Watched(one.exact, one.scope) for one in roundings]
    found = []
    for one, peak in zip(roundings, peaks(model, watched, samples, setup), strict=True):
        if problem := strained(peak, _FORMATS[one.dtype]):
            node, op_type = known.get(one.name, (one.where, ""))
            found.append(Strain(one.name, node, op_type, peak, problem))
    return found


def as_option(found: Iterable[Strain]) -> str:
    """The option of a pass that keeps the nodes in float32."""
    names = dict.fromkeys(glob.escape(one.node) for one in found if one.op_type)
    return f"block_nodes={','.join(str(Word(name)) for name in names)}"
