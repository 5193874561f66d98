"""What a report of a comparison is made of, and what it says first."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxforge.compare.evidence import Evidence, OutputEvidence, evidence_as_dict
from onnxforge.inspection import Inspection
from onnxforge.numerics.decode import DecodeEvidence
from onnxforge.numerics.text import TextEvidence

__all__ = ["SCHEMA", "Document", "Foreign", "as_dict", "names", "remarks", "verdict"]

SCHEMA = 1
"""Version of the JSON form; it rises when something in it goes away or changes its meaning."""


class Foreign(str):
    """Text from a model, a file name or a runtime, which is anybody's."""

    __slots__ = ()


@dataclass(frozen=True)
class Document:
    """What a report is made of.

    Attributes:
        comparison: How far the models are apart; None where only texts or tokens are compared.
        models: What the reference and the candidate are, for sizes, weights and operators.
        text: How far the texts recognised with them are apart.
        decode: How far they part when they decode.
    """

    comparison: Evidence | None
    models: tuple[Inspection, Inspection] | None = None
    text: TextEvidence | None = None
    decode: DecodeEvidence | None = None

    @property
    def outputs(self) -> tuple[OutputEvidence, ...]:
        """The outputs that were compared."""
        return self.comparison.outputs if self.comparison else ()


def as_dict(document: Document) -> dict[str, Any]:
    """A report as plain data for JSON, as `evidence.schema.json` describes it."""
    models = evidence_as_dict(document.models)
    return {
        "schema": SCHEMA,
        "comparison": evidence_as_dict(document.comparison),
        "models": models and {"reference": models[0], "candidate": models[1]},
        "text": evidence_as_dict(document.text),
        "decode": evidence_as_dict(document.decode),
    }


def verdict(document: Document) -> str:
    """One line that says how it ended."""
    found = document.comparison
    if found is None:
        return "compared without models"
    for name, side in (("reference", found.reference), ("candidate", found.candidate)):
        if side.failure:
            return f"failed: the {name} did not run to the end"
    if not found.gates:
        return "compared without gates"
    held = f"{sum(gate.passed for gate in found.gates)} of {len(found.gates)} gates hold"
    return f"passed: {held}" if found.passed else f"failed: {held}"


def remarks(document: Document) -> list[tuple[str, Foreign]]:
    """What is no table: a label and what is to be said."""
    found = document.comparison
    if found is None:
        return []
    layers = found.localization
    lists = [
        ("outputs of the reference alone", found.only_reference),
        ("outputs of the candidate alone", found.only_candidate),
        ("outputs that are no real numbers", found.not_compared),
        ("inputs fed in another type", found.candidate.casts),
        ("bodies not looked into", layers.bodies if layers else ()),
    ]
    said = [("note", Foreign(note)) for note in found.notes]
    for name, side in (("reference", found.reference), ("candidate", found.candidate)):
        said += [(f"failure of the {name}", Foreign(side.failure))] if side.failure else []
    for output in found.outputs:
        problems = [(each.problem, each.sample) for each in output.samples if each.problem]
        if problems:
            more = f", {len(problems)} samples in all" if len(problems) > 1 else ""
            what = f"{output.name}: {problems[0][0]} ({problems[0][1]}{more})"
            said.append(("not compared", Foreign(what)))
    for label, names in lists:
        said += [(f"{label} ({len(names)})", Foreign(", ".join(names)))] if names else []
    for failure in layers.failures if layers else ():
        said.append(("not localized", Foreign(failure)))
    return said


def names(found: Evidence) -> list[str]:
    """Paths of both models without the folders above both, which are nobody's business."""
    parts = [Path(side.path).absolute().parts for side in (found.reference, found.candidate)]
    above = zip(parts[0][:-1], parts[1][:-1], strict=False)
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], above)))
    return [str(Path(*each[shared:])) for each in parts]
