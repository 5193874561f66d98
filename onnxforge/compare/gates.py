"""Gates: limits that every output, or one of them, has to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onnxforge.compare.evidence import GateResult, OutputEvidence
from onnxforge.errors import SpecError

__all__ = ["Gate", "Metric", "evaluate"]

Metric = Literal["max-abs", "min-sqnr", "min-cosine", "max-argmax-rate"]


@dataclass(frozen=True)
class Gate:
    """A limit.

    SQNR and cosine are those of the worst sample, so that many good ones hide no bad one.

    Attributes:
        metric: What is limited.
        limit: The last value that passes.
        output: Which output it holds for; None for all.
    """

    metric: Metric
    limit: float
    output: str | None = None

    @classmethod
    def parse(cls, metric: Metric, text: str) -> Gate:
        """Read ``1e-3``, or ``logits=1e-3`` for one output.

        Raises:
            SpecError: The text holds no number.
        """
        output, _, number = text.rpartition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if math.isnan(limit):
            raise SpecError(f"--{metric} {text}: wanted a number or OUTPUT=number")
        return cls(metric, limit, output or None)

    def __str__(self) -> str:
        """The gate as on the command line."""
        output = "" if self.output is None else f"{self.output}="
        return f"--{self.metric} {output}{self.limit:g}"


def evaluate(
    gates: Iterable[Gate], outputs: Sequence[OutputEvidence], names: Iterable[str]
) -> tuple[GateResult, ...]:
    """Hold outputs to gates; what was not measured, or holds a NaN, passes none.

    Args:
        gates: The gates.
        outputs: What was measured.
        names: The outputs that a gate for all holds for, measured or not.
    """
    measured = {output.name: output for output in outputs}
    return tuple(
        _result(gate, name, measured.get(name))
        for gate in gates
        for name in (names if gate.output is None else [gate.output])
        if gate.metric != "max-argmax-rate" or _is_ranked(measured.get(name))
    )


def _is_ranked(output: OutputEvidence | None) -> bool:
    return output is None or output.ranking is not None


def _result(gate: Gate, name: str, output: OutputEvidence | None) -> GateResult:
    for sample in output.samples if output else ():
        if sample.problem:
            reason = f"{sample.sample}: {sample.problem}"
            return GateResult(str(gate), name, False, None, sample.sample, reason)
    if output is None or not output.overall.count:
        return GateResult(str(gate), name, False, None, reason="nothing was compared")
    value, sample_name = _MEASURES[gate.metric](output)
    if nans := output.overall.nan_candidate:
        reason = f"the candidate holds {nans} NaN"
    elif mismatches := output.overall.nonfinite_mismatches:
        reason = f"{mismatches} values are infinite, or NaN in the reference, on one side only"
    elif _holds(gate, value):
        return GateResult(str(gate), name, True, value, sample_name)
    else:
        most = "most" if gate.metric.startswith("max") else "least"
        reason = f"{value:g}, wanted at {most} {gate.limit:g}"
    return GateResult(str(gate), name, False, value, sample_name, reason)


def _holds(gate: Gate, value: float) -> bool:
    return value <= gate.limit if gate.metric.startswith("max") else value >= gate.limit


def _max_abs(output: OutputEvidence) -> tuple[float, str]:
    return output.overall.max_abs, "" if output.worst is None else output.worst.sample


def _lowest(field: str) -> Callable[[OutputEvidence], tuple[float, str]]:
    def measure(output: OutputEvidence) -> tuple[float, str]:
        found = [(s.comparison, s.sample) for s in output.samples]
        return min((getattr(c, field), name) for c, name in found if c and c.count)

    return measure


def _argmax_rate(output: OutputEvidence) -> tuple[float, str]:
    assert output.ranking is not None
    wrong = (s.sample for s in output.samples if s.ranking and s.ranking.mismatches)
    return output.ranking.rate, next(wrong, "")


_MEASURES: Mapping[Metric, Callable[[OutputEvidence], tuple[float, str]]] = {
    "max-abs": _max_abs,
    "min-sqnr": _lowest("sqnr_db"),
    "min-cosine": _lowest("cosine"),
    "max-argmax-rate": _argmax_rate,
}
