"""What a comparison found, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxforge.numerics.metrics import Comparison
from onnxforge.numerics.ranking import Ranking

__all__ = [
    "Evidence",
    "GateResult",
    "LayerEvidence",
    "Localization",
    "OutputEvidence",
    "SampleEvidence",
    "Side",
    "Worst",
    "evidence_as_dict",
]


@dataclass(frozen=True)
class Side:
    """One of the two models and how it ran.

    Attributes:
        path: The model file.
        runtime: Version of onnxruntime, None if it never came to loading.
        providers: The execution providers that were really used.
        threads: Threads for one operator, 0 where the runtime chose.
        optimization: Which rewritings of the graph the runtime was allowed.
        load_seconds: How long the model took to load.
        run_seconds: How long each sample took.
        peak_memory: Most bytes its process had resident.
        casts: Inputs that were fed in another type than the reference takes, as text.
        failure: What the runtime said when it failed, the signal it died of, or the time
            limit it was killed at; else empty.
        emulated: The half type that float32 was rounded to in its place, empty if the model
            ran itself.
    """

    path: str
    runtime: str | None
    providers: tuple[str, ...]
    threads: int
    optimization: str
    load_seconds: float | None
    run_seconds: tuple[float, ...]
    peak_memory: int | None
    casts: tuple[str, ...] = ()
    failure: str = ""
    emulated: str = ""


@dataclass(frozen=True)
class SampleEvidence:
    """One output of one sample.

    Attributes:
        sample: Name of the sample.
        shape: Shape of the reference.
        comparison: How far the candidate is from it; None where the shapes differ, or one side
            has no real numbers.
        ranking: How far the choices agree, where that was asked.
        problem: Why there is no comparison.
    """

    sample: str
    shape: tuple[int, ...]
    comparison: Comparison | None
    ranking: Ranking | None = None
    problem: str = ""


@dataclass(frozen=True)
class Worst:
    """The element with the largest error.

    Attributes:
        sample: In which sample.
        position: Index of the element.
        reference: Its value in the reference.
        candidate: Its value in the candidate.
    """

    sample: str
    position: tuple[int, ...]
    reference: float
    candidate: float


@dataclass(frozen=True)
class OutputEvidence:
    """One output, over all samples.

    Attributes:
        name: The output.
        types: Its types in the reference and the candidate, ``NONE`` for what is no tensor;
            values are compared as float64.
        overall: All samples taken together.
        ranking: How far the choices agree, where that was asked.
        worst: The element with the largest error, None where all are equal.
        samples: Each sample.
    """

    name: str
    types: tuple[str, str]
    overall: Comparison
    ranking: Ranking | None
    worst: Worst | None
    samples: tuple[SampleEvidence, ...]

    @property
    def finite(self) -> bool:
        """Whether the candidate holds no NaN and no infinity."""
        return self.overall.nan_candidate + self.overall.inf_candidate == 0

    @property
    def sqnr_min(self) -> float:
        """The lowest SQNR of a sample, in dB."""
        return min((found.sqnr_db for found in self._compared), default=math.nan)

    @property
    def cosine_min(self) -> float:
        """The lowest cosine of a sample."""
        return min((found.cosine for found in self._compared), default=math.nan)

    @property
    def cosine_mean(self) -> float:
        """Mean cosine of the samples."""
        cosines = [found.cosine for found in self._compared]
        return math.fsum(cosines) / len(cosines) if cosines else math.nan

    @property
    def _compared(self) -> list[Comparison]:
        return [s.comparison for s in self.samples if s.comparison and s.comparison.count]


@dataclass(frozen=True)
class GateResult:
    """What became of a gate on one output.

    Attributes:
        gate: The gate, as on the command line.
        output: The output.
        passed: Whether it holds.
        value: What was measured, None if nothing was.
        sample: The sample that decided.
        reason: Why it does not hold, empty if it does.
    """

    gate: str
    output: str
    passed: bool
    value: float | None
    sample: str = ""
    reason: str = ""


@dataclass(frozen=True)
class LayerEvidence:
    """A value inside both models.

    Attributes:
        value: Its name in the reference.
        node: The node that makes it.
        op_type: The operator of that node.
        index: Place of the node in the reference.
        entered: The error when all that it is made from is taken from the reference: what
            this node, or what the candidate has in its place, adds.
        reached: The error as the candidate runs, with all that reached it from before.
    """

    value: str
    node: str
    op_type: str
    index: int
    entered: Comparison
    reached: Comparison


@dataclass(frozen=True)
class Localization:
    """Where error enters.

    Attributes:
        sample: The sample that was run.
        walked: Number of values compared.
        layers: Those at which an error enters or was seen, the largest that enters first.
        only_reference: Values that the candidate has not.
        only_candidate: Values that the reference has not.
        bodies: Nodes of the reference whose bodies were not looked into.
        failures: Values that could not be had, and what the runtime said.
    """

    sample: str
    walked: int
    layers: tuple[LayerEvidence, ...]
    only_reference: tuple[str, ...]
    only_candidate: tuple[str, ...]
    bodies: tuple[str, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """All that a comparison found.

    Attributes:
        reference: The right model.
        candidate: The model to judge.
        samples: Names of the samples that both ran on.
        outputs: Each output that was compared.
        only_reference: Outputs that the candidate lacks.
        only_candidate: Outputs that the reference lacks.
        not_compared: Outputs of both that are no tensors of real numbers.
        gates: What became of each gate.
        localization: Where error enters, if that was asked and both models ran.
        notes: What else there is to know before one trusts the numbers.
    """

    reference: Side
    candidate: Side
    samples: tuple[str, ...]
    outputs: tuple[OutputEvidence, ...]
    only_reference: tuple[str, ...] = ()
    only_candidate: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()
    gates: tuple[GateResult, ...] = ()
    localization: Localization | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether both models ran on all samples and every gate holds."""
        ran = not self.reference.failure and not self.candidate.failure
        return ran and all(gate.passed for gate in self.gates)


def evidence_as_dict(found: Any) -> Any:
    """Evidence as plain data for JSON, with what is computed from it.

    JSON has no infinity and no NaN: they become the texts ``inf``, ``-inf`` and ``nan``.
    """
    if dataclasses.is_dataclass(found):
        computed = (k for k, v in vars(type(found)).items() if isinstance(v, property))
        names = [field.name for field in dataclasses.fields(found)]
        names += [name for name in computed if not name.startswith("_")]
        return {name: evidence_as_dict(getattr(found, name)) for name in names}
    if isinstance(found, Mapping):
        return {str(key): evidence_as_dict(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [evidence_as_dict(item) for item in found]
    if isinstance(found, float) and not math.isfinite(found):
        return str(found)
    return found
