"""Making a tier of a model and the parent that it has to equal."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnxforge import PassManager, load
from onnxforge.core import Fate
from onnxforge.manager import Report
from onnxforge.weights import Weights
from support import oracle


def run(pipeline: str, source: Path, folder: Path) -> tuple[Path, Report]:
    """Run a pipeline on a file; the result goes into ``folder``."""
    target = folder / f"tier_{source.name}"
    return target, PassManager(pipeline).run(source, target)


def treated_names(source: Path, report: Report) -> list[str]:
    """Names of the values that a report says were treated."""
    names = {w.where: w.value.name for w in Weights(load(source)) if w.value is not None}
    return [
        names[finding.where]
        for step in report.passes
        for finding in step.findings
        if finding.fate is Fate.TREATED
    ]


def rounded_parent(source: Path, report: Report) -> onnx.ModelProto:
    """The fp32 parent of an fp16w tier, rounded by the independent reference."""
    return oracle.round_weights_fp16(onnx.load(source), treated_names(source, report))
