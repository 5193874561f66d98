"""The command calibrate, as a user types it."""

from __future__ import annotations

import importlib
import io
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from onnxforge import cli
from onnxforge.stats_file import read_statistics
from support import pairs

# The package has the command under the name of its module.
command = importlib.import_module("onnxforge.cli.calibrate")
Printed = pytest.CaptureFixture[str]


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["calibrate", *(str(word) for word in words)])
    return int(end.value.code or 0)


def said(capsys: Printed) -> str:
    """The one line on stderr; nothing is on stdout."""
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.startswith("onnxforge: ")
    assert done.err.count("\n") == 1
    return done.err[len("onnxforge: ") : -1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return pairs.saved(tmp_path / "model.onnx", pairs.model())


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    """Three samples, in a folder each."""
    folders = []
    for i in range(3):
        folders.append(tmp_path / f"data{i}")
        folders[-1].mkdir()
        x = np.random.default_rng(i).standard_normal((i + 2, pairs.WIDTH))
        np.savez(folders[-1] / "sample.npz", x=x.astype(np.float32))
    return folders


def test_statistics_are_written_and_told(
    model: Path, data: list[Path], tmp_path: Path, capsys: Printed
) -> None:
    stats = tmp_path / "s.safetensors"
    assert run(model, "--data", data[0], "--data", data[1], "-o", stats, "--rows", 3) == 0
    done = capsys.readouterr()
    assert done.err == ""
    first, second, third = done.out.splitlines()
    assert first == f"{model} -> {stats}"
    assert second == "  2 samples, 3 activations, 15 rows"
    assert third.startswith("  widest: ")
    found = read_statistics(stats)
    assert found.activations.keys() == {"x", "hidden", "c"}
    assert [a.rows.shape for a in found.activations.values()] == [(3, pairs.WIDTH)] * 3
    assert third.split()[1] in ("x,", "c,")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data0", "data1", "data2", "model.onnx", "s.safetensors",
    ]  # fmt: skip


def test_what_is_there_is_kept_unless_forced(
    model: Path, data: list[Path], tmp_path: Path, capsys: Printed
) -> None:
    stats = tmp_path / "s.safetensors"
    stats.write_bytes(b"mine")
    words = (model, "--data", data[0], "-o", stats)
    assert run(*words) == 2
    assert said(capsys) == f"{stats}: is there already; --resume goes on, --force replaces"
    assert run(*words, "--resume") == 2
    assert said(capsys).startswith(f"{stats}: damaged statistics: ")
    assert stats.read_bytes() == b"mine"
    assert run(*words, "--force") == 0
    assert len(read_statistics(stats).samples) == 1


def test_the_model_is_not_replaced(model: Path, data: list[Path], capsys: Printed) -> None:
    before = model.read_bytes()
    assert run(model, "--data", data[0], "-o", model, "--force") == 2
    assert said(capsys) == f"{model}: is the model"
    assert model.read_bytes() == before


def test_parts_resume_and_merge_to_the_whole(
    model: Path, data: list[Path], tmp_path: Path, capsys: Printed
) -> None:
    def stats(name: str) -> Path:
        return tmp_path / f"{name}.safetensors"

    def data_of(*numbers: int) -> list[object]:
        return [word for i in numbers for word in ("--data", data[i])]

    assert run(model, *data_of(0, 1, 2), "-o", stats("all")) == 0
    whole = stats("all").read_bytes()
    for name, numbers in (("a", (0, 1)), ("b", (2,)), ("c", (1, 2))):
        assert run(model, *data_of(*numbers), "-o", stats(name)) == 0
    # No data is needed where there is something to merge.
    merge = ["--merge", stats("a"), "--merge", stats("b"), "--merge", stats("b")]
    assert run(model, *merge, "-o", stats("merged")) == 0
    assert stats("merged").read_bytes() == whole
    # Samples that are known already count once.
    assert run(model, *data_of(1, 2), "--merge", stats("a"), "-o", stats("more")) == 0
    assert stats("more").read_bytes() == whole
    assert run(model, *data_of(2, 0), "-o", stats("b"), "--resume", *merge[:2]) == 0
    assert stats("b").read_bytes() == whole
    assert run(model, *data_of(0, 1, 2), "-o", stats("new"), "--resume") == 0
    assert stats("new").read_bytes() == whole
    capsys.readouterr()
    assert run(model, "--merge", stats("a"), "--merge", stats("c"), "-o", stats("no")) == 2
    assert said(capsys) == f"{stats('c')}: 1 of its 2 samples are known"
    assert not stats("no").exists()


def test_another_model_is_refused_before_anything_runs(
    model: Path, data: list[Path], tmp_path: Path, capsys: Printed, monkeypatch: Any
) -> None:
    stats = tmp_path / "s.safetensors"
    assert run(model, "--data", data[0], "-o", stats) == 0
    proto = pairs.model()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(-pairs.weights()["w0"], "w0"))
    other = pairs.saved(tmp_path / "other.onnx", proto)
    capsys.readouterr()
    monkeypatch.setattr("onnxforge.calibrate.Session", None)
    for words in (("-o", stats, "--resume"), ("-o", tmp_path / "t", "--merge", stats)):
        assert run(other, "--data", data[1], *words) == 2
        why = "cannot go on from these statistics: is of another model"
        assert said(capsys) == f"{other}: {why}"


def test_op_types(model: Path, data: list[Path], tmp_path: Path, capsys: Printed) -> None:
    words = (model, "--data", data[0], "-o", tmp_path / "s")
    assert run(*words, "--op-type", "Conv") == 2
    why = "no Conv multiplies a float32 activation with a weight"
    assert said(capsys) == f"{model}: {why}"
    assert run(*words, "--op-type", "Add") == 2
    assert "'Add' is not one of 'MatMul', 'Gemm', 'Conv'" in capsys.readouterr().err


def test_errors_are_one_line(
    model: Path, data: list[Path], tmp_path: Path, capsys: Printed
) -> None:
    stats = tmp_path / "s"
    assert run(model, "-o", stats) == 2
    assert said(capsys) == "there are no samples"
    assert run(model, "-o", tmp_path) == 2
    assert said(capsys) == f"{tmp_path}: is a folder"
    assert run(model, "-o", tmp_path / "none" / "s") == 2
    assert said(capsys) == f"{tmp_path / 'none'}: no such folder"
    assert run(model, "-o", stats, "--merge", tmp_path / "gone") == 2
    assert said(capsys).startswith(f"{tmp_path / 'gone'}: ")
    assert run(model, "-o", stats, "--data", data[0], "--rows", -1) == 2
    assert said(capsys) == "rows: wanted at least 0, not -1"
    np.savez(data[1] / "sample.npz", x=np.full((1, pairs.WIDTH), np.nan, np.float32))
    assert run(model, "-o", stats, "--data", data[1]) == 2
    bad = data[1] / "sample.npz"
    assert said(capsys) == f"{bad}: activation 'x' holds NaN or infinity"
    assert run(tmp_path / "none.onnx", "-o", stats, "--data", data[0]) == 2
    assert said(capsys).startswith(f"{tmp_path / 'none.onnx'}: ")
    assert not stats.exists()


def test_what_is_there_so_far_is_saved(
    model: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_SAVE_EVERY", -1.0)
    np.savez(data[2] / "sample.npz", x=np.full((1, pairs.WIDTH), np.nan, np.float32))
    stats = tmp_path / "s"
    words = [word for folder in data for word in ("--data", folder)]
    assert run(model, *words, "-o", stats) == 2
    assert len(read_statistics(stats).samples) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_it_is(
    model: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxforge.progress import counted

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with counted("[red]m\x1b.onnx", "samples") as show:
        show(41)
        time.sleep(1.3)
        show(42)
        time.sleep(0.3)
    shown = screen.getvalue()
    assert "[red]m" in shown
    assert "m\x1b.onnx" not in shown
    assert "42 samples" in shown
    before = len(shown)
    with counted("quick", "samples") as show:
        show(1)
    assert "quick" not in screen.getvalue()[before:]
    # Told by the command.
    told: list[int] = []

    class Shown:
        def __enter__(self) -> Any:
            return told.append

        def __exit__(self, *exception: object) -> None:
            return

    monkeypatch.setattr(command, "counted", lambda name, things: Shown())
    words = [word for folder in data for word in ("--data", folder)]
    assert run(model, *words, "-o", tmp_path / "s") == 0
    assert told == [1, 2, 3]


KILLED = """
import os, signal, sys
from pathlib import Path
from onnxforge import cli

cli_calibrate = __import__("importlib").import_module("onnxforge.cli.calibrate")
cli_calibrate._SAVE_EVERY = 0
replace, saves = Path.replace, 0

def killed(self, target):
    global saves
    saves += 1
    if saves == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killed
cli.main(["calibrate", *sys.argv[1:]])
"""


def test_a_killed_run_is_gone_on_with_and_nothing_stays_of_it(
    model: Path, data: list[Path], tmp_path: Path
) -> None:
    whole, stats = tmp_path / "whole.safetensors", tmp_path / "s.safetensors"
    words = [model, *(word for folder in data for word in ("--data", folder)), "-o"]
    assert run(*words, whole) == 0
    command = [sys.executable, "-c", KILLED, *map(str, [*words, stats])]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(read_statistics(stats).samples) == 1
    assert list(tmp_path.glob(".*.tmp"))
    assert run(*words, stats, "--resume") == 0
    assert stats.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))
