"""The commands compare and verify, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from onnxforge import PassManager, cli
from support import fixtures


@pytest.fixture
def tier(tmp_path: Path) -> tuple[Path, Path]:
    """A model and its fp16w tier."""
    parent = fixtures.copied("speech_encoder", tmp_path)
    PassManager("fp16w{min_bytes=64}").run(parent, tmp_path / "tier.onnx")
    return parent, tmp_path / "tier.onnx"


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return int(end.value.code or 0)


Printed = pytest.CaptureFixture[str]


def test_verify_says_derived(tier: tuple[Path, Path], capsys: Printed) -> None:
    assert run("verify", *tier) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("pipeline: fp16w{min_bytes=64B ")
    assert last.startswith("derived: ")
    assert run("verify", *tier, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["derived"]
    assert found["differences"] == []


def test_verify_names_what_differs(tier: tuple[Path, Path], capsys: Printed) -> None:
    assert run("verify", *tier, "--passes", "fp16w{min_bytes=4KiB}") == 1
    done = capsys.readouterr()
    assert "differs: model.graph.node" in done.out
    assert done.err.count("\n") == 1
    assert "is not what" in done.err
    assert run("verify", tier[0], tier[0].with_name("none.onnx")) == 2


def test_verify_of_a_model_that_does_not_say_how_it_was_made(
    tier: tuple[Path, Path], capsys: Printed
) -> None:
    child = onnx.load(tier[1])
    del child.metadata_props[:]
    onnx.save(child, tier[1])
    assert run("verify", *tier) == 1
    assert "it does not say how it was made, --passes would" in capsys.readouterr().err
    assert run("verify", *tier, "--passes", "fp16w{min_bytes=64}") == 0


def test_verify_of_a_copy(tier: tuple[Path, Path], capsys: Printed) -> None:
    assert run("verify", tier[0], tier[0]) == 0
    assert "pipeline: none, a copy" in capsys.readouterr().out


def test_compare_prints_what_is_asked(
    tier: tuple[Path, Path], capsys: Printed, tmp_path: Path
) -> None:
    arguments = ["compare", *tier, "--random", 1, "--size", "time=32"]
    assert run(*arguments) == 0
    assert "Error per output" in capsys.readouterr().out
    assert run(*arguments, "--format", "markdown", "--min-sqnr", 30) == 0
    assert "**passed: 1 of 1 gates hold**" in capsys.readouterr().out
    assert run(*arguments, "--format", "json", "--output", tmp_path / "e.json") == 0
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "e.json").read_text())["schema"] == 1
    assert run(*arguments, "--format", "html", "--output", tmp_path / "e.html") == 0
    assert "<script" not in (tmp_path / "e.html").read_text()


def test_a_gate_that_does_not_hold_is_named(tier: tuple[Path, Path], capsys: Printed) -> None:
    assert run("compare", *tier, "--random", 1, "--min-sqnr", 200) == 1
    assert "--min-sqnr 200 for " in capsys.readouterr().err


def test_a_side_that_does_not_end_in_time_fails(
    tier: tuple[Path, Path], capsys: Printed
) -> None:
    assert run("compare", *tier, "--random", 1, "--timeout", 0.01) == 1
    done = capsys.readouterr()
    said = "onnxruntime did not load the model in 0.01 s and was killed"
    assert said in done.out
    assert done.err == f"onnxforge: {tier[0]}: did not run to the end: {said}\n"
    assert run("compare", *tier, "--random", 1, "--timeout", 300) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--random", "1", "--min-sqnr", "many"],
        ["--random", "1", "--size", "time"],
        ["--random", "1", "--max-abs", "none=1"],
        ["--random", "1", "--output", "."],
        ["--random", "1", "--output", "no/folder/page.html"],
        ["--random", "1", "--timeout", "0"],
        ["--random", "1", "--top", "0"],
        ["--random", "1", "--threads", "-1"],
        ["--random", "1", "--seed", "-1"],
        ["--random", "1", "--size", "time=-1"],
        ["--random", "-1"],
        ["--random", "1", "--seconds", "nan"],
        ["--random", "1", "--rate", "0"],
        [],
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(
    tier: tuple[Path, Path], capsys: Printed, words: list[str]
) -> None:
    assert run("compare", *tier, *words) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.startswith("onnxforge: ")
    assert done.err.count("\n") == 1


def test_texts_are_compared_alone(tmp_path: Path, capsys: Printed) -> None:
    for name, text in (("a", "the cat sat"), ("b", "the cat sits")):
        line = json.dumps({"id": "clip", "text": text})
        (tmp_path / f"{name}.jsonl").write_text(f"{line}\n")
    assert run("compare", "--text", tmp_path / "a.jsonl", tmp_path / "b.jsonl") == 0
    assert "clip" in capsys.readouterr().out
    assert run("compare") == 2
