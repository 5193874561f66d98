"""What metadata say of a model, of the passes that made it, and of a comparison."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxforge.core import Fate
from onnxforge.walk import scopes

if TYPE_CHECKING:
    from onnxforge.compare.evidence import Evidence, OutputEvidence
    from onnxforge.core import Finding
    from onnxforge.manager import PassReport, Report

__all__ = ["coverage", "described", "gates", "parity"]

_DIGITS = 9


def described(model: ir.Model) -> dict[str, Any]:
    """Versions, operators and interface of a model, as metadata have them."""
    domains = {node.domain or "ai.onnx" for scope in scopes(model) for node in scope.graph}
    opsets = {domain or "ai.onnx": version for domain, version in model.opset_imports.items()}
    return {
        "ir_version": model.ir_version,
        "opsets": dict(sorted(opsets.items())),
        "domains": sorted(domains),
        "functions": len(model.functions),
        "inputs": [_port(value) for value in model.graph.inputs],
        "outputs": [_port(value) for value in model.graph.outputs],
    }


def _port(value: ir.Value) -> dict[str, Any]:
    is_tensor = type(value.type) is ir.TensorType
    kind = value.dtype.name.lower() if is_tensor and value.dtype else str(value.type)
    shape = None if value.shape is None else [_length(length) for length in value.shape]
    return {"name": value.name or "", "type": kind, "shape": shape}


def _length(length: int | ir.SymbolicDim) -> int | str | None:
    return length if isinstance(length, int) else length.value


def coverage(report: Report) -> list[dict[str, Any]]:
    """What passes did to weights."""
    return [_covered(step) for step in report.passes]


def _covered(step: PassReport) -> dict[str, Any]:
    fates = {
        fate: dict(zip(("weights", "bytes"), step.tally(fate), strict=True)) for fate in Fate
    }
    left = [f for f in step.findings if f.fate in (Fate.EXCLUDED, Fate.SKIPPED) and not f.op]
    return {
        "pass": step.text.partition("{")[0],
        "effect": step.effect,
        "modified": step.modified,
        **{fate.value: tally for fate, tally in fates.items()},
        "reasons": _reasons(left),
    }


def _reasons(left: list[Finding]) -> list[dict[str, Any]]:
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for finding in left:
        counts[finding.code, finding.message] += 1
        sizes[finding.code, finding.message] += finding.nbytes
    return [
        {"code": code, "message": message, "weights": counts[code, message], "bytes": size}
        for (code, message), size in sorted(
            sizes.items(), key=lambda item: (-item[1], item[0])
        )
    ]


def parity(found: Evidence) -> dict[str, Any]:
    """What a comparison measured, without anything that two runs do not agree on."""
    return {
        "samples": len(found.samples),
        "onnxruntime": found.candidate.runtime,
        "providers": list(found.candidate.providers),
        "threads": found.candidate.threads,
        "emulated": found.candidate.emulated,
        "outputs": [_output(output) for output in found.outputs],
    }


def _output(found: OutputEvidence) -> dict[str, Any]:
    whole, ranking = found.overall, found.ranking
    return {
        "name": found.name,
        "values": whole.count,
        "max": _number(whole.max_abs),
        "mean": _number(whole.mean_abs),
        "p99": _number(whole.p99_abs),
        "relative": _number(whole.max_relative),
        "sqnr_db": _number(found.sqnr_min),
        "cosine": _number(found.cosine_min),
        "finite": found.finite,
        "argmax": ranking and {"rows": ranking.rows, "mismatches": ranking.mismatches},
    }


def gates(found: Evidence) -> list[dict[str, Any]]:
    """What became of the gates."""
    return [
        {
            "gate": str(result.gate),
            "output": result.output,
            "passed": result.passed,
            "value": None if result.value is None else _number(result.value),
        }
        for result in found.gates
    ]


def _number(value: float) -> float | str:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)
