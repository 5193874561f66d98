"""Models run in a process of their own, and what goes wrong there is told in one line."""

import math
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxforge.errors import OnnxforgeError, RuntimeFailed, SpecError
from onnxforge.runtime.session import Session, Setup, run, write_all
from support import fixtures, oracle

NEG = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N] x) => (float[N] y) { y = Neg(x) }"""
X = {"x": np.array([1, -2], np.float32)}


def saved(text: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(parser.parse_model(text).SerializeToString())
    return path


def pretend(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let child processes find another onnxruntime."""
    package = folder / "instead" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.mark.parametrize("name", ["hiding_places", "external_two", "old_opset_11"])
def test_a_child_process_gives_what_this_process_gives(name: str) -> None:
    path, sample = fixtures.built(name), fixtures.samples(name)[0]
    oracle.assert_bit_equal(run(path, sample), oracle.run(path, sample))


def test_types_and_names_of_values_survive(tmp_path: Path) -> None:
    proto = parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
g (bool[N] flags, float16[N] half, int8[0,2] none, double scalar)
  => (bool[N] o1, float16[N] o2, int8[0,2] o3, double o4) {
  o1 = Not(flags)  o2 = Neg(half)  o3 = Identity(none)  o4 = Neg(scalar) }""")
    renamed = {
        "flags": "past/0/key:0",
        "half": "x.npy",
        "o1": "present/0/key:0",
        "o2": "y.npy",
    }
    for node in proto.graph.node:
        node.input[:] = [renamed.get(n, n) for n in node.input]
        node.output[:] = [renamed.get(n, n) for n in node.output]
    for info in (*proto.graph.input, *proto.graph.output):
        info.name = renamed.get(info.name, info.name)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    inputs = {
        "past/0/key:0": np.array([True, False]),
        "x.npy": np.array([1, np.nan], np.float16),
        "none": np.zeros((0, 2), np.int8),
        "scalar": np.array(0.1),
    }
    oracle.assert_bit_equal(run(path, inputs), oracle.run(path, inputs))


def test_outputs_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    path = saved(
        """<ir_version: 9, opset_import: ["" : 18]>
g (float[N] x) => (seq(float[N]) s, float[N] y) { s = SequenceConstruct(x, x) y = Neg(x) }""",
        tmp_path,
    )
    assert [*run(path, X)] == ["y"]


def test_a_crash_names_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(NEG, tmp_path)
    body = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    pretend(body, tmp_path, monkeypatch)
    with pytest.raises(RuntimeFailed, match=r"^onnxruntime died with SIGSEGV$"):
        run(path, X)


HANGING = """import time
__version__ = "0"
class SessionOptions: pass
class GraphOptimizationLevel: ORT_ENABLE_ALL = 0
class OrtValue: ortvalue_from_numpy = staticmethod(lambda array: array)
class InferenceSession:
    def __init__(self, *args, **kwargs): time.sleep(LOAD)
    def get_providers(self): return []
    def get_outputs(self): return []
    def run_with_ort_values(self, names, feeds): time.sleep(60)
"""


@pytest.mark.parametrize(("load", "what"), [(60, "load the model"), (0, "end the run")])
def test_a_runtime_that_hangs_is_killed_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: int, what: str
) -> None:
    path = saved(NEG, tmp_path)
    pretend(HANGING.replace("LOAD", str(load)), tmp_path, monkeypatch)
    start, others = time.monotonic(), set(threading.enumerate())
    said = f"^onnxruntime did not {what} in 2 s and was killed$"
    with (
        pytest.raises(RuntimeFailed, match=said),
        Session(path, tmp_path, Setup(timeout=2)) as session,
    ):
        session.run({})
    assert time.monotonic() - start < 20
    assert not set(threading.enumerate()) - others


def test_a_limit_that_is_kept_changes_nothing(tmp_path: Path) -> None:
    path = saved(NEG, tmp_path)
    with Session(path, tmp_path, Setup(timeout=60)) as session:
        for _ in range(3):
            (y,) = session.run(write_all(tmp_path, "x", X)).values()
    assert y.open().tolist() == [-1, 2]


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": math.inf}, {"timeout": math.nan}, {"threads": -1}]
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=next(iter(options))):
        Setup(**options)  # type: ignore[arg-type]


def test_an_error_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(NEG, tmp_path)
    pretend("raise ImportError('first line\\nno libonnx.so')\n", tmp_path, monkeypatch)
    with pytest.raises(RuntimeFailed) as caught:
        run(path, X)
    assert str(caught.value) == "first line no libonnx.so"


def test_an_end_without_a_word_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(NEG, tmp_path)
    pretend("raise SystemExit(3)\n", tmp_path, monkeypatch)
    with pytest.raises(RuntimeFailed, match=r"^onnxruntime failed$"):
        run(path, X)


def test_a_missing_onnxruntime_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeFailed, match="pip install onnxruntime"):
        run(saved(NEG, tmp_path), X)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Required inputs"),
        ({"x": np.array([[1.0]], np.float32)}, "Invalid rank"),
        ({"x": np.array([1.0])}, "Unexpected input data type"),
    ],
)
def test_inputs_that_do_not_fit_fail_in_one_line(
    tmp_path: Path, inputs: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(RuntimeFailed, match=message) as caught:
        run(saved(NEG, tmp_path), inputs)
    assert "\n" not in str(caught.value)


def test_a_model_that_no_runtime_knows_fails_in_one_line(tmp_path: Path) -> None:
    proto = parser.parse_model(NEG.replace("Neg", "org.example.Odd"))
    proto.opset_import.append(onnx.helper.make_opsetid("org.example", 1))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(RuntimeFailed, match="Odd") as caught:
        run(path, X)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OnnxforgeError)


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(NEG, tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert run(path, X)["y"].tolist() == [-1, 2]
    assert list(temporary.iterdir()) == []


HEAD = '<ir_version: 9, opset_import: ["" : 18]> g '


@pytest.mark.parametrize(("x", "y"), [("file", "y"), ("x", "file"), ("allow_pickle", "y")])
def test_a_value_may_have_any_name(tmp_path: Path, x: str, y: str) -> None:
    path = saved(f"{HEAD}(float[N] {x}) => (float[N] {y}) {{ {y} = Neg({x}) }}", tmp_path)
    assert run(path, {x: np.ones(2, np.float32)})[y].tolist() == [-1, -1]


def test_strings_are_left_out(tmp_path: Path) -> None:
    body = "(float[N] x) => (string[N] s, float[N] y) { s = Cast <to=8> (x) y = Neg(x) }"
    path = saved(HEAD + body, tmp_path)
    assert run(path, {"x": np.ones(2, np.float32)})["y"].tolist() == [-1, -1]


def test_modules_in_the_working_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(f"{HEAD}(float[N] x) => (float[N] y) {{ y = Neg(x) }}", tmp_path)
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    assert run(path, {"x": np.ones(2, np.float32)})["y"].tolist() == [-1, -1]
