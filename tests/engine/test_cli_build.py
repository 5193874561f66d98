"""The command build, as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onnxforge import cli
from support.bundles import BARE, JUDGED, contents, laid_out, written

Printed = pytest.CaptureFixture[str]


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["build", *(str(word) for word in words)])
    return int(end.value.code or 0)


def test_it_says_what_it_does(tmp_path: Path, capsys: Printed) -> None:
    recipe = laid_out(tmp_path)
    assert run(recipe, "--dry-run") == 0
    done = capsys.readouterr()
    assert done.err == ""
    assert done.out.splitlines()[:2] == ["fp32/one: make: missing", "fp32/two: make: missing"]
    assert not (tmp_path / "out").exists()
    assert run(recipe, "--jobs", 2, "--max-memory", "1GB") == 0
    done = capsys.readouterr()
    assert done.out == f"{tmp_path / 'out'}: 8 made\n"
    lines = done.err.splitlines()
    assert "fp16w/one: published" in lines
    assert "metadata.json: written" in lines
    assert run(recipe) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'out'}: 4 up to date\n", "")
    assert run(recipe, "--dry-run", "--format", "json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["plan"][0] == {"unit": "fp32/one", "stage": "done", "reasons": []}
    written(tmp_path, BARE[: BARE.index("[tiers.fp16w]")])
    assert run(recipe, "--dry-run") == 0
    assert "fp16w/one: remove: is not in the recipe\n" in capsys.readouterr().out
    assert run(recipe) == 0
    done = capsys.readouterr()
    assert done.out == f"{tmp_path / 'out'}: 3 made, 2 up to date, 2 removed\n"
    assert "fp16w/one.onnx: removed" in done.err.splitlines()


def test_the_recipe_of_the_folder(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run() == 2
    assert "there is no onnxforge.toml here" in capsys.readouterr().err
    laid_out(tmp_path)
    assert run("--only", "fp32") == 0
    assert capsys.readouterr().out == "out: 6 made\n"


def test_a_gate_that_does_not_hold(tmp_path: Path, capsys: Printed) -> None:
    recipe = laid_out(tmp_path, JUDGED.replace("40", "400"))
    assert run(recipe, "--format", "json") == 1
    done = capsys.readouterr()
    told: dict[str, Any] = json.loads(done.out)
    assert told["failed"].keys() == {"fp16w/one"}
    assert "fp32/one" in told["made"]
    end = done.err.splitlines()[-1]
    assert end.startswith("onnxforge: not published: fp16w/one: one: --min-sqnr 400 for ")


def test_what_cannot_be_done(tmp_path: Path, capsys: Printed) -> None:
    recipe = laid_out(tmp_path, BARE.replace("source/two", "source/three"))
    assert run(recipe) == 2
    done = capsys.readouterr()
    assert done.err.splitlines()[-1].startswith("onnxforge: fp32/two: ")
    assert "three.onnx" in done.err.splitlines()[-1]
    assert done.out.endswith("4 made, 2 failed\n")
    written(tmp_path, BARE.replace("fp16w", "fp61w"))
    assert run(recipe) == 2
    assert capsys.readouterr().err.startswith(
        f"onnxforge: {recipe}:15: tiers.fp61w.pipeline: "
    )
    assert run(recipe, "--max-memory", "x") == 2


@pytest.mark.skipif(os.name == "nt", reason="signals are others")
def test_a_signal_ends_it_and_the_next_build_goes_on(tmp_path: Path) -> None:
    recipe = laid_out(tmp_path, JUDGED)
    code = "from onnxforge.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "build", str(recipe)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    next(line for line in child.stderr if "made" in line)
    child.send_signal(signal.SIGTERM)
    child.communicate()
    assert child.returncode in (143, 0)
    assert run(recipe) == 0
    assert "out/fp16w/one.onnx" in contents(tmp_path)
