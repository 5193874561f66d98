"""Two models on the same samples: what is measured, what is refused, what a crash leaves."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxforge import PassManager
from onnxforge.compare import (
    Data,
    Evidence,
    Gate,
    Options,
    Sample,
    Setup,
    compare,
    evidence_as_dict,
)
from onnxforge.compare.document import Document
from onnxforge.compare.render import as_text
from onnxforge.errors import DataError, OnnxforgeError, SpecError
from support import fixtures, oracle, pairs

GATES = [
    Gate("max-abs", 5e-3),
    Gate("min-sqnr", 60),
    Gate("min-cosine", 0.999999),
    Gate("max-argmax-rate", 0, "logits"),
]
ONE = [Sample("one", {"x": pairs.sample()})]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs.saved(tmp_path_factory.mktemp("reference") / "model.onnx", pairs.model())


@pytest.fixture(autouse=True)
def _leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    fixtures.built("external_two")  # all of them go into one folder, which stays
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert list(temporary.iterdir()) == []


def failed(found: Evidence) -> set[tuple[str, str]]:
    return {(gate.gate.split()[0], gate.output) for gate in found.gates if not gate.passed}


def test_a_clean_tier_passes(reference: Path, tmp_path: Path) -> None:
    tier = tmp_path / "tier.onnx"
    PassManager("fp16w").run(reference, tier)
    samples = [*ONE, Sample("two", {"x": pairs.sample()[:3] * 2})]
    found = compare(reference, tier, samples, Options(gates=GATES))
    assert found.passed
    assert failed(found) == set()
    assert found.samples == ("one", "two")
    assert [output.name for output in found.outputs] == ["logits", "hidden"]
    for side in (found.reference, found.candidate):
        assert side.runtime is not None
        assert side.providers == ("CPUExecutionProvider",)
        assert (side.threads, side.optimization, side.failure) == (1, "all", "")
        assert (side.load_seconds or 0) > 0
        assert len(side.run_seconds) == 2
        assert (side.peak_memory or 0) > 1 << 20
    json.dumps(evidence_as_dict(found), allow_nan=False)


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        ("scaled", {"--max-abs", "--min-sqnr"}),
        ("shifted", {"--max-abs", "--min-sqnr", "--min-cosine", "--max-argmax-rate"}),
        ("flipped", {"--max-abs", "--min-sqnr", "--min-cosine", "--max-argmax-rate"}),
        ("nan", {"--max-abs", "--min-sqnr", "--min-cosine", "--max-argmax-rate"}),
        ("argmax", {"--max-abs", "--max-argmax-rate"}),
    ],
)
def test_planted_faults_are_caught(
    reference: Path, tmp_path: Path, fault: str, caught: set[str]
) -> None:
    candidate = pairs.saved(tmp_path / "candidate.onnx", pairs.planted()[fault])
    found = compare(reference, candidate, ONE, Options(gates=GATES))
    assert not found.passed
    assert failed(found) == {(gate, "logits") for gate in caught}


def test_the_numbers_are_those_of_numpy(reference: Path, tmp_path: Path) -> None:
    candidate = pairs.saved(tmp_path / "candidate.onnx", pairs.planted()["argmax"])
    found = compare(reference, candidate, ONE, Options(argmax={"logits": 1}))
    output = found.outputs[0]
    feeds = {"x": pairs.sample()}
    right, wrong = (oracle.run(path, feeds)["logits"] for path in (reference, candidate))
    errors = np.abs(right - wrong)
    at = np.unravel_index(errors.argmax(), errors.shape)
    assert output.worst is not None
    assert (output.worst.sample, output.worst.position) == ("one", at)
    assert (output.worst.reference, output.worst.candidate) == (right[at], wrong[at])
    assert output.overall.max_abs == errors.max()
    assert output.overall.p999_abs == pytest.approx(np.percentile(errors, 99.9), rel=1e-6)
    assert output.overall.max_relative == errors.max() / np.abs(right).max()
    noise = np.square(right - wrong, dtype=np.float64).sum()
    sqnr = 10 * np.log10(np.square(right, dtype=np.float64).sum() / noise)
    assert output.sqnr_min == pytest.approx(sqnr)
    assert output.finite
    assert output.ranking is not None
    (choice,) = output.ranking.mismatches_at
    assert (choice.row, choice.expected) == (3, right[3].argmax())
    assert choice.chosen == wrong[3].argmax()
    assert choice.margin == pytest.approx(right[3].max() - right[3, choice.chosen])
    assert found.outputs[1].ranking is None


def test_samples_are_measured_one_by_one_and_together(reference: Path, tmp_path: Path) -> None:
    tier = tmp_path / "tier.onnx"
    PassManager("fp16w").run(reference, tier)
    large = Sample("large", {"x": pairs.sample() * 8})
    output = compare(reference, tier, [*ONE, large]).outputs[0]
    parts = [sample.comparison for sample in output.samples]
    assert [sample.shape for sample in output.samples] == [(4, 64), (4, 64)]
    cosines = [part.cosine for part in parts if part]
    assert output.cosine_min == min(cosines)
    assert output.cosine_mean == pytest.approx(np.mean(cosines))
    assert output.overall.count == sum(part.count for part in parts if part)
    assert output.overall.max_abs == max(part.max_abs for part in parts if part)
    assert output.worst is not None
    assert output.worst.sample == "large"


def test_shapes_that_differ_pass_no_gate(tmp_path: Path) -> None:
    first = pairs.saved(tmp_path / "a.onnx", "(float[n] x) => (float[n] y) { y = Neg(x) }")
    text = "(float[n] x) => (float[m] y) { z = Neg(x) y = Concat<axis=0>(z, z) }"
    second = pairs.saved(tmp_path / "b.onnx", text)
    found = compare(first, second, Data(count=1), Options(gates=[Gate("max-abs", 9)]))
    (gate,) = found.gates
    assert not gate.passed
    problem = "shapes differ: reference (16,), candidate (32,)"
    assert found.outputs[0].samples[0].problem == problem
    assert gate.reason == f"random 0: {problem}"


def test_outputs_of_one_side_and_of_other_kinds_are_listed(tmp_path: Path) -> None:
    first = pairs.saved(
        tmp_path / "a.onnx",
        "(float[n] x) => (float[n] y, float[n] a, string[n] s)"
        "{ y = Neg(x) a = Abs(x) s = Cast<to=8>(x) }",
    )
    second = pairs.saved(
        tmp_path / "b.onnx",
        "(float[n] x) => (string[n] s, float[n] b, float[n] y)"
        "{ y = Neg(x) b = Abs(x) s = Cast<to=8>(x) }",
    )
    found = compare(first, second, Data(count=1), Options(gates=[Gate("min-sqnr", 90)]))
    assert (found.only_reference, found.only_candidate) == (("a",), ("b",))
    assert found.not_compared == ("s",)
    assert [gate.output for gate in found.gates] == ["y"]
    assert found.passed


def test_an_output_that_is_no_number_on_one_side_passes_no_gate(tmp_path: Path) -> None:
    first = pairs.saved(tmp_path / "a.onnx", "(float[n] x) => (float[n] y) { y = Neg(x) }")
    for text, types in (
        ("(float[n] x) => (string[n] y) { y = Cast<to=8>(x) }", ("FLOAT", "NONE")),
        ("(float[n] x) => (seq(float[n]) y) { y = SequenceConstruct(x) }", ("FLOAT", "NONE")),
    ):
        second = pairs.saved(tmp_path / "b.onnx", text)
        options = Options(gates=[Gate("max-abs", 9)])
        for sides, where in (((first, second), "candidate"), ((second, first), "reference")):
            found = compare(*sides, Data(count=1), options)
            assert not found.passed
            assert found.gates[0].reason == f"random 0: no real numbers in the {where}"
            assert found.outputs[0].types == (types if sides[0] == first else types[::-1])
            lines = as_text(Document(found)).splitlines()
            assert f"not compared: y: no real numbers in the {where} (random 0)" in lines


def test_types_that_differ_are_compared_and_fed_through_casts(tmp_path: Path) -> None:
    text = """({0}[1,2,past,8] past_key, float[1,2,steps,8] key) => ({0}[1,2,total,8] present)
      {{ new = Cast<to={1}>(key) present = Concat<axis=2>(past_key, new) }}"""
    first = pairs.saved(tmp_path / "a.onnx", text.format("float", 1))
    second = pairs.saved(tmp_path / "b.onnx", text.format("bfloat16", 16))
    found = compare(first, second, Data(count=2), Options(gates=[Gate("min-sqnr", 40)]))
    assert found.passed
    assert found.samples == ("random 0, cache of 0", "random 1, cache of 8")
    assert found.outputs[0].types == ("FLOAT", "BFLOAT16")
    assert found.candidate.casts == ("past_key: FLOAT -> BFLOAT16",)
    assert 40 < found.outputs[0].sqnr_min < 60
    back = compare(second, first, Data(count=2))
    assert back.outputs[0].types == ("BFLOAT16", "FLOAT")
    assert back.candidate.casts == ("past_key: BFLOAT16 -> FLOAT",)


def test_what_a_runtime_says_is_a_result(reference: Path, tmp_path: Path) -> None:
    odd = pairs.model()
    odd.graph.node[0].op_type = "Odd"
    candidate = pairs.saved(tmp_path / "candidate.onnx", odd)
    found = compare(reference, candidate, ONE, Options(gates=[Gate("min-sqnr", 1)]))
    assert not found.passed
    assert "Odd" in found.candidate.failure
    assert found.candidate.load_seconds is None
    assert found.samples == ()
    assert {gate.reason for gate in found.gates} == {"nothing was compared"}
    turned = compare(candidate, reference, ONE)
    assert "Odd" in turned.reference.failure
    assert (turned.candidate.runtime, turned.candidate.failure) == (None, "")
    assert not turned.passed


def test_a_sample_on_which_one_side_fails_is_named(reference: Path, tmp_path: Path) -> None:
    candidate = pairs.saved(tmp_path / "candidate.onnx", pairs.planted()["nan"])
    samples = [*ONE, Sample("five rows", {"x": np.ones((5, 64), np.float32)}), *ONE]
    found = compare(reference, candidate, samples)
    assert found.samples == ("one",)
    assert found.candidate.failure.startswith("five rows: ")
    assert len(found.reference.run_seconds) == 3
    assert len(found.outputs[0].samples) == 1
    assert not found.passed


FAKE = """
import os, signal, numpy
__version__ = "0"
class GraphOptimizationLevel:
    ORT_ENABLE_ALL = 99
class SessionOptions: ...
class OrtValue:
    def __init__(self, array): self.array = array
    ortvalue_from_numpy = classmethod(lambda cls, array: cls(array))
    is_tensor = lambda self: True
    data_type = lambda self: "tensor(float)"
    numpy = lambda self: self.array
class Output:
    name = "logits"
class InferenceSession:
    runs = 0
    def __init__(self, *_, **__): print("noise on stdout")
    get_providers = lambda self: ["Fake"]
    get_outputs = lambda self: [Output]
    def run_with_ort_values(self, names, feeds):
        self.runs += 1
        if self.runs == 2:
            os.kill(os.getpid(), signal.SIGABRT)
        return [feeds["x"]]
"""


HANG = "__import__('time').sleep(60)"


def pretender(folder: Path, body: str = FAKE) -> Setup:
    """A runtime that gives back its input and dies of its second sample."""
    package = folder / "fake" / "onnxruntime.py"
    package.parent.mkdir()
    package.write_text(body)
    python = folder / "python"
    path = f"import sys; sys.path.insert(0, {str(package.parent)!r}); "
    run = "import runpy; runpy.run_path(sys.argv[-1], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{path}{run}" "$@"\n')
    python.chmod(0o755)
    return Setup(python=str(python))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_crash_is_a_result(reference: Path, tmp_path: Path) -> None:
    options = Options(candidate=pretender(tmp_path), gates=[Gate("min-cosine", -1, "logits")])
    found = compare(reference, reference, [*ONE, *ONE, *ONE], options)
    assert found.reference.failure == ""
    assert found.candidate.failure == "one: onnxruntime died with SIGABRT: noise on stdout"
    assert (found.candidate.runtime, found.candidate.providers) == ("0", ("Fake",))
    assert found.notes == (f"{reference} ran on Fake, not on CPUExecutionProvider",)
    assert len(found.outputs[0].samples) == 1
    assert not found.passed


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_runtime_that_hangs_is_a_result(reference: Path, tmp_path: Path) -> None:
    setup = pretender(tmp_path, FAKE.replace("os.kill(os.getpid(), signal.SIGABRT)", HANG))
    options = Options(candidate=dataclasses.replace(setup, timeout=3))
    found = compare(reference, reference, [*ONE, *ONE, *ONE], options)
    assert found.reference.failure == ""
    said = "one: onnxruntime did not end the run in 3 s and was killed"
    assert found.candidate.failure == said
    assert len(found.outputs[0].samples) == 1
    assert not found.passed


def test_an_interpreter_that_is_not_there_is_a_result(reference: Path) -> None:
    found = compare(
        reference, reference, ONE, Options(candidate=Setup(python="no-such-python"))
    )
    assert found.candidate.failure.startswith("no-such-python: ")


def test_other_setups_are_told(reference: Path) -> None:
    setup = Setup(threads=2, optimization="none")
    side = compare(reference, reference, ONE, Options(candidate=setup)).candidate
    assert (side.threads, side.optimization) == (2, "none")


def test_a_full_disk_is_one_line(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OnnxforgeError, match="No space left on device; TMPDIR may name"):
        compare(reference, reference, ONE)


def test_random_operators_are_noted(tmp_path: Path) -> None:
    text = "(float[n] x) => (float[n] y) { r = RandomNormalLike(x) y = Add(x, r) }"
    path = pairs.saved(tmp_path / "model.onnx", text)
    notes = compare(path, path, Data(count=1)).notes
    assert len(notes) == 2
    assert "RandomNormalLike" in notes[0]


def test_progress_is_told(reference: Path) -> None:
    told: list[tuple[str, int]] = []
    compare(reference, reference, ONE, progress=lambda stage, done: told.append((stage, done)))
    assert told == [("reference", 1), ("candidate", 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(gates=[Gate("max-abs", 1, "nowhere")]),
            "no output 'nowhere', but logits, hid",
        ),
        (Options(argmax={"elsewhere": 0}), "no output 'elsewhere'"),
        (Options(argmax={"logits": 2}), "no axis 2"),
        (Options(gates=[Gate("max-argmax-rate", 0)]), "--argmax OUTPUT"),
    ],
)
def test_options_that_fit_no_output_are_refused(
    reference: Path, options: Options, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        compare(reference, reference, ONE, options)


@pytest.mark.parametrize("top", [0, 101])
def test_sets_of_choices_are_bounded(top: int) -> None:
    with pytest.raises(SpecError, match=f"top: wanted 1 to 100 choices, not {top}"):
        Options(top=top)


def test_models_that_cannot_be_compared_are_refused(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no samples"):
        compare(reference, reference, Data())
    text = "(float[n] x, float[n] z) => (float[n] logits) { logits = Add(x, z) }"
    more = pairs.saved(tmp_path / "more.onnx", text)
    with pytest.raises(DataError, match="takes 'z', which the reference does not"):
        compare(reference, more, ONE)
    other = pairs.saved(tmp_path / "other.onnx", "(float[n] x) => (float[n] y) { y = Neg(x) }")
    with pytest.raises(DataError, match="no output is called as in the reference"):
        compare(reference, other, ONE)


def test_an_input_that_only_the_reference_takes_is_noted(tmp_path: Path) -> None:
    text = "(float[n] x, float[n] z) => (float[n] y) { y = Neg(x) u = Abs(z) }"
    first = pairs.saved(tmp_path / "a.onnx", text)
    second = pairs.saved(tmp_path / "b.onnx", "(float[n] x) => (float[n] y) { y = Neg(x) }")
    found = compare(first, second, Data(count=1))
    assert found.outputs[0].overall.bit_equal
    assert found.notes == (f"{second} does not take the input 'z'",)


@pytest.mark.parametrize("name", ["external_two", "hiding_places"])
def test_a_model_equals_itself(name: str) -> None:
    samples = [Sample(str(i), feeds) for i, feeds in enumerate(fixtures.samples(name))]
    path = fixtures.built(name)
    found = compare(path, path, samples, Options(gates=[Gate("max-abs", 0)]))
    assert found.passed
    assert all(output.overall.bit_equal for output in found.outputs)
    assert len(found.gates) == len(onnx.load(path).graph.output)
