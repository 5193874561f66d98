"""Reports of lint as SARIF 2.1.0, which code scanning services read."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from onnxforge.lint.rules import RULES
from onnxforge.storage.remote import is_address
from onnxforge.text import printable

if TYPE_CHECKING:
    from onnxforge.lint.finding import Finding, Report, Rule

__all__ = ["as_sarif"]

_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def as_sarif(report: Report) -> dict[str, Any]:
    """A report as plain data in the form of SARIF."""
    found = {finding.code for finding in report.findings}
    rules = [rule for rule in RULES if rule.code in found]
    number = {rule.code: i for i, rule in enumerate(rules)}
    notes = [{"level": "note", "message": {"text": note}} for note in report.notes]
    run = {
        "tool": {
            "driver": {
                "name": "onnxforge",
                "semanticVersion": importlib.metadata.version("onnxforge"),
                "rules": [_rule(rule) for rule in rules],
            }
        },
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
        "results": [_result(finding, number) for finding in report.findings],
        "columnKind": "unicodeCodePoints",
    }
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }


def _rule(rule: Rule) -> dict[str, Any]:
    sections = rule.sections
    text = "\n\n".join(f"{name}: {' '.join(body.split())}" for name, body in sections.items())
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": " ".join(sections["Why it is bad"].split())},
        "help": {"text": text},
        "defaultConfiguration": {"level": _LEVELS[rule.level]},
    }


def _result(finding: Finding, number: dict[str, int]) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": _uri(finding.path)},
            # A model has no lines; services that show code want one.
            "region": {"startLine": 1},
        }
    }
    if finding.where:
        location["logicalLocations"] = [
            {"fullyQualifiedName": finding.where, "kind": "object"}
        ]
    where = f"{finding.where}: " if finding.where else ""
    print_ = "\0".join(finding.key).encode("utf-8", "surrogateescape")
    return {
        "ruleId": finding.code,
        "ruleIndex": number[finding.code],
        "level": _LEVELS[finding.level],
        "message": {"text": printable(where + finding.message)},
        "locations": [location],
        "partialFingerprints": {"onnxforge/v1": hashlib.sha256(print_).hexdigest()[:32]},
    }


def _uri(path: str) -> str:
    if is_address(path):
        return path
    if Path(path).is_absolute():
        return Path(path).as_uri()
    return quote(Path(path).as_posix(), errors="surrogateescape")
