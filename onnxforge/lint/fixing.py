"""Mending what can be mended without a change of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxforge.errors import OnnxforgeError
from onnxforge.manager import PassManager

if TYPE_CHECKING:
    from onnxforge.lint.finding import Report

__all__ = ["fix"]


def fix(report: Report) -> tuple[dict[str, str], list[str]]:
    """Run the pipelines that findings name, each file in its place, whole or not at all.

    Args:
        report: What was found.

    Returns:
        What was run, by file, and what could not be mended and why.
    """
    wanted: dict[str, dict[str, None]] = {}
    for finding in report.findings:
        if finding.passes is not None:
            wanted.setdefault(finding.path, {})[finding.passes] = None
    done: dict[str, str] = {}
    notes: list[str] = []
    for path, steps in wanted.items():
        passes = ",".join(step for step in steps if step)
        try:
            PassManager(passes or ()).run(Path(path), Path(path), force=True)
        except OnnxforgeError as error:
            notes.append(f"not mended: {error}")
        else:
            done[path] = passes or "being written anew"
    return done, notes
