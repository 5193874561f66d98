"""Findings that are known and accepted."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxforge.errors import OnnxforgeError
from onnxforge.storage.remote import is_address

if TYPE_CHECKING:
    from onnxforge.lint.finding import Finding, Report

__all__ = ["as_baseline", "without_known"]

_KEYS = ("path", "code", "where", "message")


def as_baseline(report: Report, path: Path) -> str:
    """The findings of a report as the text of a baseline at a path."""
    found = sorted(_key(finding, path) for finding in report.findings)
    entries = [dict(zip(_KEYS, key, strict=True)) for key in found]
    return json.dumps({"version": 1, "known": entries}, indent=2, ensure_ascii=False) + "\n"


def without_known(report: Report, path: Path) -> Report:
    """A report without the findings that a baseline has; each entry stands for one.

    Raises:
        OnnxforgeError: The baseline cannot be read.
    """
    known = Counter(_read(path))
    left = []
    for finding in report.findings:
        key = _key(finding, path)
        if known[key]:
            known[key] -= 1
        else:
            left.append(finding)
    return replace(report, findings=left, known=len(report.findings) - len(left))


def _key(finding: Finding, baseline: Path) -> tuple[str, ...]:
    """What a finding is known by; paths are as seen from the baseline."""
    path = finding.path
    if not is_address(path):
        path = Path(os.path.relpath(path, baseline.absolute().parent)).as_posix()
    return (path, *finding.key[1:])


def _read(path: Path) -> list[tuple[str, ...]]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return [tuple(str(entry[key]) for key in _KEYS) for entry in found["known"]]
    except OSError as error:
        raise OnnxforgeError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise OnnxforgeError(f"{path}: is no baseline; --write-baseline makes one") from None
