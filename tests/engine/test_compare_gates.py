"""Limits as they are written, and what they let pass."""

import json
import math

import numpy as np
import pytest

from onnxforge.compare.evidence import OutputEvidence, SampleEvidence, Worst, evidence_as_dict
from onnxforge.compare.gates import Gate, Metric, evaluate
from onnxforge.errors import SpecError
from onnxforge.numerics.metrics import Accumulator
from onnxforge.numerics.ranking import Ranker


def measured(*pairs: tuple[list[float], list[float]], ranked: bool = True) -> OutputEvidence:
    """An output with one sample for each pair of rows."""
    overall, ranker, samples = Accumulator(), Ranker(), []
    for i, pair in enumerate(pairs):
        one, rank = Accumulator(), Ranker()
        one.update(*pair)
        rank.update(*pair)
        overall.merge(one)
        ranker.merge(rank)
        samples.append(SampleEvidence(f"s{i}", (len(pair[0]),), one.result(), rank.result()))
    ranking = ranker.result() if ranked else None
    worst = Worst("s0", (0,), 0, 0)
    return OutputEvidence(
        "y", ("FLOAT", "FLOAT"), overall.result(), ranking, worst, tuple(samples)
    )


GOOD = ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
CLOSE = ([1.0, 2.0, 4.0], [1.0, 2.0, 4.5])
SWAPPED = ([1.0, 2.0, 4.0], [4.0, 2.0, 1.0])


def passes(gate: Gate, *pairs: tuple[list[float], list[float]]) -> bool:
    (result,) = evaluate([gate], [measured(*pairs)], ["y"])
    assert result.passed == (result.reason == "")
    return result.passed


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("1e-3", Gate("max-abs", 1e-3)),
        ("logits=0.5", Gate("max-abs", 0.5, "logits")),
        ("a=b=2", Gate("max-abs", 2, "a=b")),
        ("inf", Gate("max-abs", math.inf)),
    ],
)
def test_a_gate_reads_what_it_writes(text: str, gate: Gate) -> None:
    assert Gate.parse("max-abs", text) == gate
    name, _, rest = str(gate).partition(" ")
    assert (name, Gate.parse("max-abs", rest)) == ("--max-abs", gate)


@pytest.mark.parametrize("text", ["", "logits", "logits=", "nan", "y=nan", "1,5"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"--min-sqnr .*wanted a number or OUTPUT=number"):
        Gate.parse("min-sqnr", text)


@pytest.mark.parametrize(
    ("gate", "good"),
    [
        (Gate("max-abs", 0.5), True),
        (Gate("max-abs", 0.49), False),
        (Gate("min-sqnr", 19.2), True),
        (Gate("min-sqnr", 19.3), False),
        (Gate("min-cosine", 0.998), True),
        (Gate("min-cosine", 0.999), False),
        (Gate("max-argmax-rate", 0), True),
    ],
)
def test_limits_are_kept_or_not(gate: Gate, good: bool) -> None:
    assert passes(gate, CLOSE) is good
    assert passes(gate, GOOD, CLOSE, GOOD) is good


def test_many_good_samples_hide_no_bad_one() -> None:
    many = [GOOD] * 100
    assert not passes(Gate("min-sqnr", 10), *many, SWAPPED)
    assert not passes(Gate("min-cosine", 0.9), *many, SWAPPED)
    assert passes(Gate("max-argmax-rate", 0.01), *many, SWAPPED)
    assert not passes(Gate("max-argmax-rate", 0.009), *many, SWAPPED)
    (result,) = evaluate([Gate("min-sqnr", 10)], [measured(*many, SWAPPED)], ["y"])
    assert result.sample == "s100"
    assert result.reason == f"{result.value:g}, wanted at least 10"


@pytest.mark.parametrize("metric", ["max-abs", "min-sqnr", "min-cosine", "max-argmax-rate"])
@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        ([1.0, 2.0], [1.0, math.nan]),
        ([math.nan, 2.0], [math.nan, 2.0]),
        ([math.inf, 2.0], [3.0, 2.0]),
        ([math.nan, 2.0], [1.0, 2.0]),
        ([], []),
    ],
)
def test_what_was_not_measured_passes_no_gate(
    metric: Metric, reference: list[float], candidate: list[float]
) -> None:
    loosest = math.inf if metric.startswith("max") else -math.inf
    assert not passes(Gate(metric, loosest), (reference, candidate))


def test_infinities_that_agree_pass() -> None:
    assert passes(Gate("max-abs", 0), ([1.0, -math.inf], [1.0, -math.inf]))


def test_an_output_that_was_not_compared_passes_no_gate() -> None:
    (result,) = evaluate([Gate("max-abs", 1)], [], ["y"])
    assert (result.output, result.passed) == ("y", False)
    problem = SampleEvidence("odd", (3,), None, None, "shapes differ")
    output = measured(GOOD)
    mixed = OutputEvidence(
        "y", output.types, output.overall, None, None, (*output.samples, problem)
    )
    (result,) = evaluate([Gate("max-abs", 1)], [mixed], ["y"])
    assert (result.passed, result.reason) == (False, "odd: shapes differ")


def test_a_rate_is_asked_only_of_what_was_ranked() -> None:
    gate = Gate("max-argmax-rate", 0)
    assert evaluate([gate], [measured(SWAPPED, ranked=False)], ["y"]) == ()
    assert not evaluate([gate], [measured(SWAPPED)], ["y"])[0].passed


def test_evidence_is_plain_json() -> None:
    found = evidence_as_dict(measured(GOOD, ([0.0], [math.nan])))
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert (found["cosine_min"], found["sqnr_min"], found["finite"]) == (0, "-inf", False)
    assert found["samples"][0]["comparison"]["sqnr_db"] == "inf"
    assert found["samples"][0]["comparison"]["max_relative"] == 0
    assert found["ranking"]["rate"] == 0
    assert found["worst"] == {
        "sample": "s0",
        "position": [0],
        "reference": 0,
        "candidate": 0,
    }
    assert evidence_as_dict(measured())["cosine_mean"] == "nan"
    assert np.isnan(float(evidence_as_dict({"x": math.nan})["x"]))
