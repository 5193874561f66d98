"""The command line: results on stdout, the rest on stderr, and honest exit codes."""

import dataclasses
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxforge import cli, model_io, testing
from onnxforge.core import Result
from onnxforge.manager import PassManager
from onnxforge.passes.fp16w import WeightsFp16CastPass
from onnxforge.registry import entries
from onnxforge.weights import Weights
from support import fixtures, oracle

MAIN = "from onnxforge.cli import main; main()"
MODELS = ["nameless", "hiding_places", "external_two", "odd_values"]
EXTERNAL_TWO = ["up_w", "down_w", "tied_w"]
FATES = ["treated", "excluded", "skipped"]


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def forge(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process."""

    def call(*words: str | Path) -> Done:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        code = end.value.code
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a few models in it."""
    for name in MODELS:
        fixtures.copied(name, tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def child(*words: str | Path, **options: Any) -> Done:
    """The command line in a process of its own."""
    command = [sys.executable, "-c", MAIN, *map(str, words)]
    options |= {"text": True, "errors": "surrogateescape", "capture_output": True}
    done = subprocess.run(command, check=False, **options)
    return Done(done.returncode, done.stdout, done.stderr)


def content(of: Path) -> dict[str, bytes]:
    return {str(p.relative_to(of)): p.read_bytes() for p in of.rglob("*") if p.is_file()}


def runs_as_rounded(name: str, path: Path, treated: list[str]) -> None:
    parent = oracle.round_weights_fp16(onnx.load(fixtures.built(name)), treated)
    sample = fixtures.samples(name)[0]
    oracle.assert_bit_equal(oracle.run(path, sample), oracle.run(parent, sample))


# run: what it writes and prints.


def test_a_model_is_written_and_a_summary_printed(forge: Command, folder: Path) -> None:
    done = forge("run", "--passes", "fp16w,assert-pure", "nameless.onnx", "out.onnx")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    before, after = (Path(n).stat().st_size / 1000 for n in ("nameless.onnx", "out.onnx"))
    share = 100 * after / before
    assert lines[:5] == [
        "nameless.onnx -> out.onnx",
        "  fp16w: modified",
        "    2 weights treated, 3.1 kB",
        "    2 weights skipped, 160 B",
        "      OF203 smaller than 1KiB: 2 weights, 160 B",
    ]
    assert "  assert-pure: ok" in lines
    assert lines[-2] == f"  {before:.1f} kB -> {after:.1f} kB ({share:.1f} %), inline"
    assert re.fullmatch(r"  \d+\.\d\d s, peak memory \d+ MB", lines[-1])
    runs_as_rounded("nameless", folder / "out.onnx", ["up_w", "down_w"])


def test_the_command_runs_in_a_process_of_its_own(folder: Path) -> None:
    words = ("run", "--passes", "fp16w", "--format", "json", "external_two.onnx", "out.onnx")
    done = child(*words, cwd=folder)
    assert (done.code, done.err) == (0, "")
    assert done.document["runs"][0]["target"] == "out.onnx"
    runs_as_rounded("external_two", folder / "out.onnx", EXTERNAL_TWO)


def test_verbose_prints_every_finding(forge: Command, folder: Path) -> None:
    words = ("run", "--passes", "fp16w{exclude=down_w}", "nameless.onnx", "--dry-run")
    found = {
        "info: OF201 up_w: stored as float16",
        "info: OF202 down_w: excluded by name",
        "info: OF203 up_b: smaller than 1KiB",
        "info: OF203 down_b: smaller than 1KiB",
    }
    for flag in ("-v", "--verbose"):
        lines = [line.strip() for line in forge(*words, flag).out.splitlines()]
        assert {line for line in lines if line.startswith("info:")} == found
    assert "info:" not in forge(*words).out


def test_a_warning_is_printed_without_verbose(forge: Command, folder: Path) -> None:
    source = fixtures.copied("unsorted", folder)
    done = forge("run", "--passes", "fp16w", source, "out.onnx")
    assert done.code == 0
    assert "  warning: OF901 model: Nodes in a graph must be topologically sorted" in done.out
    runs_as_rounded("unsorted", folder / "out.onnx", ["up_w", "down_w"])


def test_one_reason_that_stands_alone_names_its_place(forge: Command, folder: Path) -> None:
    done = forge("run", "--passes", "fp16w", "hiding_places.onnx", "--dry-run")
    lines = [line.strip() for line in done.out.splitlines()]
    assert "OF208 w_no_consumer: nothing reads it: 1.5 kB" in lines


def test_a_dry_run_writes_nothing(forge: Command, folder: Path) -> None:
    before = content(folder)
    one = forge("run", "--passes", "fp16w", "nameless.onnx", "--dry-run")
    two = forge("run", "--passes", "fp16w", "nameless.onnx", "out.onnx", "--dry-run")
    many = forge("run", "--passes", "fp16w", "--dry-run", "--out-dir", "results", *models())
    assert [done.code for done in (one, two, many)] == [0, 0, 0]
    assert "2 weights treated" in one.out
    assert content(folder) == before


def models() -> list[str]:
    return [f"{name}.onnx" for name in MODELS]


def test_many_models_go_into_one_folder(forge: Command, folder: Path) -> None:
    done = forge("run", "--passes", "fp16w", "--out-dir", "results", *models())
    assert done.code == 0
    heads = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert heads == [f"{name} -> {Path('results', name)}" for name in models()]
    written = sorted(path.name for path in Path("results").iterdir())
    assert written == sorted([*models(), "external_two.onnx_data"])
    runs_as_rounded("external_two", Path("results/external_two.onnx"), EXTERNAL_TWO)


def test_a_folder_of_results_may_get_one_model(forge: Command, folder: Path) -> None:
    done = forge("run", "--passes", "fp16w", "--out-dir", "results", "nameless.onnx")
    assert done.code == 0
    runs_as_rounded("nameless", Path("results/nameless.onnx"), ["up_w", "down_w"])


def test_force_overwrites_even_the_input(forge: Command, folder: Path) -> None:
    words = ("run", "--passes", "fp16w", "--out-dir", ".", "nameless.onnx", "--force")
    assert forge(*words).code == 0
    runs_as_rounded("nameless", folder / "nameless.onnx", ["up_w", "down_w"])


@pytest.mark.parametrize(
    ("source", "layout", "files"),
    [
        ("nameless", "keep", ["out.onnx"]),
        ("nameless", "inline", ["out.onnx"]),
        ("nameless", "sidecar", ["out.onnx", "out.onnx_data"]),
        ("external_two", "keep", ["out.onnx", "out.onnx_data"]),
        ("external_two", "inline", ["out.onnx"]),
        ("external_two", "sidecar", ["out.onnx", "out.onnx_data"]),
    ],
)
def test_the_layout_says_where_weights_go(
    forge: Command, folder: Path, source: str, layout: str, files: list[str]
) -> None:
    words = ("run", "--passes", "assert-pure", "--layout", layout, f"{source}.onnx")
    done = forge(*words, "results/out.onnx")
    assert done.code == 0
    assert sorted(path.name for path in Path("results").iterdir()) == files
    assert done.out.count(f", {'sidecar' if len(files) == 2 else 'inline'}\n") == 1
    runs_as_rounded(source, folder / "results/out.onnx", [])


@pytest.mark.parametrize("option", [("--workers", "1"), ("--workers", "3")])
@pytest.mark.parametrize("memory", [(), ("--max-memory", "100GB")])
def test_threads_and_memory_change_no_byte(
    forge: Command, folder: Path, option: tuple[str, ...], memory: tuple[str, ...]
) -> None:
    PassManager("fp16w").run("external_two.onnx", "plain.onnx")
    words = ("run", "--passes", "fp16w", "external_two.onnx", "results/plain.onnx")
    assert forge(*words, *option, *memory).code == 0
    for name in ("plain.onnx", "plain.onnx_data"):
        assert Path("results", name).read_bytes() == Path(name).read_bytes()


def test_a_pipeline_of_checks_takes_one_model_and_writes_nothing(
    forge: Command, folder: Path
) -> None:
    before = content(folder)
    done = forge("run", "--passes", "assert-pure{max_opset=17},assert-pure", "nameless.onnx")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[:2] == ["nameless.onnx", "  assert-pure: ok"]
    assert content(folder) == before


def test_a_check_that_says_no_ends_with_1_and_names_every_offence(
    forge: Command, folder: Path
) -> None:
    source = fixtures.copied("foreign", folder)
    done = forge("run", "--passes", "fp16w,assert-pure", source, "out.onnx")
    assert (done.code, done.out) == (1, "")
    first, *offences = done.err.splitlines()
    assert first.startswith(f"onnxforge: {source}: ")
    assert [line.split(":")[0] for line in offences] == [
        "  OF101 /first/FusedConv",
        "  OF101 /y/If/then_branch//t/FusedConv",
    ]
    assert not Path("out.onnx").exists()


def test_laws_are_checked_on_demand(forge: Command, folder: Path) -> None:
    words = ("run", "--passes", "fp16w", "--check-laws", "nameless.onnx", "out.onnx")
    assert forge(*words).code == 0
    runs_as_rounded("nameless", folder / "out.onnx", ["up_w", "down_w"])


def test_a_broken_law_ends_with_2(
    forge: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(self: WeightsFp16CastPass, model: ir.Model) -> Result:
        return Result(model, modified=True)

    monkeypatch.setattr(WeightsFp16CastPass, "call", lie)
    words = ("run", "--passes", "fp16w", "nameless.onnx", "out.onnx")
    done = forge(*words, "--check-laws")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "onnxforge: nameless.onnx: fp16w says modified=True, which is not so\n"
    )
    assert not Path("out.onnx").exists()


def test_laws_are_checked_on_given_inputs(forge: Command, folder: Path) -> None:
    np.savez("good.npz", **fixtures.samples("hiding_places")[0])  # type: ignore[arg-type]
    np.savez("poor.npz", x=np.zeros((2, 16), np.float32))
    words = ("run", "--passes", "fp16w", "hiding_places.onnx", "--dry-run", "--check-laws")
    assert forge(*words, "--inputs", "good.npz").code == 0
    done = forge(*words, "--inputs", "poor.npz")
    assert done.code == 2
    assert_one_line(done, "hiding_places.onnx", "Required inputs (['ids', 'flag'])")


# run: reports.


def tally(step: dict[str, Any]) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for finding in step["findings"]:
        if finding["fate"]:
            counts[finding["fate"], "count"] += 1
            counts[finding["fate"], "bytes"] += finding["nbytes"]
    return counts


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nameless", ""),
        ("hiding_places", ""),
        ("hiding_places", "{include=*loop*,*scan*}"),
        ("external_two", "{exclude=up_*}"),
        ("odd_values", "{min_bytes=64 exclude=largest}"),
    ],
)
def test_the_json_report_adds_up(
    forge: Command, folder: Path, name: str, options: str
) -> None:
    words = ("run", "--passes", f"fp16w{options},assert-pure", "--format", "json")
    done = forge(*words, f"{name}.onnx", "results/out.onnx")
    assert (done.code, done.err) == (0, "")
    assert list(done.document) == ["schema", "version", "runs"]
    assert done.document["schema"] == 1
    assert done.document["version"] == importlib.metadata.version("onnxforge")
    (run,) = done.document["runs"]
    assert (run["source"], run["target"]) == (f"{name}.onnx", "results/out.onnx")
    assert run["findings"] == []
    assert run["layout"] == ("sidecar" if name == "external_two" else "inline")
    assert run["read"] == {p: Path(p).stat().st_size for p in run["read"]}
    assert {Path(p).parent for p in run["read"]} == {folder}
    assert run["written"] == {str(p): p.stat().st_size for p in results(folder)}
    narrowing, check = run["passes"]
    assert [narrowing["effect"], check["effect"]] == ["storage", "check"]
    assert [narrowing["modified"], check["modified"]] == [True, False]
    assert narrowing["weights"] == {
        fate: {key: tally(narrowing)[fate, key] for key in ("count", "bytes")}
        for fate in FATES
    }
    weights = list(Weights(model_io.load(fixtures.built(name))))
    assert sum(narrowing["weights"][fate]["count"] for fate in FATES) == len(weights)
    total = sum(narrowing["weights"][fate]["bytes"] for fate in FATES)
    assert total == sum(weight.nbytes for weight in weights)


def results(folder: Path) -> list[Path]:
    return sorted((folder / "results").iterdir())


def test_the_json_report_has_its_keys(forge: Command, folder: Path) -> None:
    done = forge("run", "--passes", "fp16w", "--format", "json", "nameless.onnx", "--dry-run")
    (run,) = done.document["runs"]
    assert list(run) == [
        *("source", "target", "passes", "findings", "read", "written", "layout"),
        *("seconds", "peak_memory"),
    ]
    assert (run["target"], run["written"], run["layout"]) == (None, {}, None)
    (step,) = run["passes"]
    assert list(step) == [
        *("pass", "effect", "modified", "seconds", "stats", "weights", "findings")
    ]
    assert PassManager(step["pass"]).passes == (WeightsFp16CastPass(),)
    by_place = {finding["where"]: finding for finding in step["findings"]}
    assert by_place["up_w"] == {
        "code": "OF201",
        "where": "up_w",
        "message": "stored as float16",
        "nbytes": 2048,
        "fate": "treated",
        "level": "info",
        "detail": "",
        "op": "",
    }


def test_a_report_of_many_models_has_one_run_for_each(forge: Command, folder: Path) -> None:
    words = ("run", "--passes", "fp16w", "--format", "json", "--out-dir", "results")
    done = forge(*words, *models())
    assert [run["source"] for run in done.document["runs"]] == models()


def test_a_report_goes_into_a_file_beside_the_text(forge: Command, folder: Path) -> None:
    words = ("run", "--passes", "fp16w", "nameless.onnx", "--dry-run", "--report", "r.json")
    done = forge(*words)
    assert done.out.startswith("nameless.onnx\n  fp16w: modified\n")
    document = json.loads(Path("r.json").read_text(encoding="utf-8"))
    printed = forge(*words[:-2], "--format", "json").document
    for runs in (document["runs"], printed["runs"]):
        for run in runs:
            del run["seconds"], run["peak_memory"]
            for step in run["passes"]:
                del step["seconds"]
    assert document == printed


def test_a_report_that_cannot_be_written_ends_with_2(forge: Command, folder: Path) -> None:
    words = ("run", "--passes", "assert-pure", "nameless.onnx", "--report", "no/r.json")
    done = forge(*words)
    assert done.code == 2
    assert_one_line(done, "no: no such folder")


# run: what goes wrong.


def assert_one_line(done: Done, *parts: str) -> None:
    assert re.fullmatch(r"onnxforge: [^\n]+\n", done.err), done.err
    assert all(part in done.err for part in parts), done.err


def damaged(folder: Path) -> None:
    whole = (folder / "hiding_places.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "text.onnx").write_text("this is no model")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "taken.onnx").write_bytes(b"precious")
    fixtures.copied("external_one", folder / "lonely")
    (folder / "lonely" / "external_one.onnx_data").unlink()


FP16W = ("run", "--passes", "fp16w")
OVERFLOW = "fp16w{min_bytes=0 on_overflow=error}"
WRONG = {
    "missing file": ([*FP16W, "none.onnx", "o.onnx"], ["none.onnx", "No such file"]),
    "folder": ([*FP16W, "results", "o.onnx"], ["results", "regular file"]),
    "text": ([*FP16W, "text.onnx", "o.onnx"], ["text.onnx", "not an ONNX model"]),
    "cut": ([*FP16W, "cut.onnx", "o.onnx"], ["cut.onnx", "not an ONNX model"]),
    "empty": ([*FP16W, "empty.onnx", "o.onnx"], ["empty.onnx", "not an ONNX model"]),
    "lost data": (
        [*FP16W, "lonely/external_one.onnx", "o.onnx"],
        ["external_one.onnx", "external_one.onnx_data"],
    ),
    "existing output": (
        [*FP16W, "nameless.onnx", "taken.onnx"],
        ["taken.onnx", "exists", "--force"],
    ),
    "existing output of many": (
        [*FP16W, "--out-dir", ".", "nameless.onnx"],
        ["nameless.onnx", "exists", "--force"],
    ),
    "folder as output": (
        [*FP16W, "--force", "nameless.onnx", "results"],
        ["results", "is a folder"],
    ),
    "no folder for output": (
        [*FP16W, "nameless.onnx", "no/o.onnx"],
        ["no: no such folder"],
    ),
    "glob": (
        ["run", "--passes", "fp16w{include=lm_head*}", "nameless.onnx", "o.onnx"],
        ["nameless.onnx", "'lm_head*' matches no weight"],
    ),
    "overflow": (
        ["run", "--passes", OVERFLOW, "odd_values.onnx", "o.onnx"],
        ["odd_values.onnx", "overflows float16"],
    ),
    "memory": (
        [*FP16W, "--max-memory", "1MB", "nameless.onnx", "o.onnx"],
        ["--max-memory 1MB is too little", "MB is the least"],
    ),
    "inputs": (
        [*FP16W, "--check-laws", "--inputs", "no.npz", "nameless.onnx", "o.onnx"],
        ["no.npz"],
    ),
    "inputs that are text": (
        [*FP16W, "--check-laws", "--inputs", "text.onnx", "nameless.onnx", "o.onnx"],
        ["text.onnx", "cannot be read"],
    ),
    "inspect": (["inspect", "none.onnx"], ["none.onnx", "No such file"]),
    "inspect text": (["inspect", "text.onnx"], ["text.onnx", "not an ONNX model"]),
    "explain a pass": (["explain", "fp16ww"], ["'fp16ww'", "did you mean 'fp16w'?"]),
    "explain a code": (["explain", "OF999"], ["OF999"]),
}


@pytest.mark.parametrize(("words", "parts"), WRONG.values(), ids=WRONG)
def test_an_error_is_one_line_with_file_and_reason(
    forge: Command, folder: Path, words: list[str], parts: list[str]
) -> None:
    damaged(folder)
    before = content(folder)
    done = forge(*words)
    assert (done.code, done.out) == (2, "")
    assert_one_line(done, *parts)
    assert content(folder) == before


USAGE = {
    "no file": ([*FP16W], "Missing argument"),
    "one file": ([*FP16W, "nameless.onnx"], "give IN and OUT, or inputs and --out-dir"),
    "three files": ([*FP16W, "a", "b", "c"], "give IN and OUT, or inputs and --out-dir"),
    "no passes": (["run", "nameless.onnx", "o.onnx"], "'--passes'"),
    "option": ([*FP16W, "--fast", "nameless.onnx", "o.onnx"], "--fast"),
    "layout": ([*FP16W, "--layout", "odd", "nameless.onnx", "o.onnx"], "'odd'"),
    "format": ([*FP16W, "--format", "xml", "nameless.onnx", "o.onnx"], "'xml'"),
    "workers": ([*FP16W, "--workers", "0", "nameless.onnx", "o.onnx"], "--workers"),
    "memory": ([*FP16W, "--max-memory", "lots", "nameless.onnx", "o.onnx"], "'lots'"),
    "no folder": (
        [*FP16W, "--out-dir", "no", "nameless.onnx"],
        "no: no such folder",
    ),
    "file as folder": (
        [*FP16W, "--out-dir", "nameless.onnx", "odd_values.onnx"],
        "--out-dir nameless.onnx: no such folder",
    ),
    "one name twice": (
        [*FP16W, "--out-dir", "results", "nameless.onnx", "results/nameless.onnx"],
        "two inputs have the same name",
    ),
    "command": (["forge"], "'forge'"),
    "inspect nothing": (["inspect"], "Missing argument"),
    "explain nothing": (["explain"], "Missing argument"),
}


@pytest.mark.parametrize(("words", "reason"), USAGE.values(), ids=USAGE)
def test_a_wrong_use_ends_with_2_and_says_what_is_wrong(
    forge: Command, folder: Path, words: list[str], reason: str
) -> None:
    before = content(folder)
    done = forge(*words)
    assert (done.code, done.out) == (2, "")
    *usage, last = done.err.splitlines()
    assert usage[0].startswith("Usage: onnxforge")
    assert last.startswith("Error: ")
    assert reason in last
    assert content(folder) == before


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("fp16w,assertpure", "there is no pass 'assertpure'", "assertpure"),
        ("fp16w{minbytes=1}", "'fp16w' has no option 'minbytes'", "minbytes"),
        ("fp16w{min_bytes=lots}", "wants whole bytes", "lots"),
        ("fp16w{share=true", "this brace is never closed", "{"),
    ],
)
def test_a_wrong_pipeline_is_shown_with_a_caret(
    forge: Command, folder: Path, text: str, message: str, marked: str
) -> None:
    done = forge("run", "--passes", text, "nameless.onnx", "o.onnx")
    assert (done.code, done.out) == (2, "")
    first, shown, carets = done.err.splitlines()
    assert first.startswith("onnxforge: ")
    assert message in first
    assert shown == f"  {text}"
    assert carets.strip() == "^" * len(marked)
    assert shown[carets.index("^") : len(carets)] == marked


def test_a_failing_model_leaves_the_results_before_it(forge: Command, folder: Path) -> None:
    damaged(folder)
    files = ("nameless.onnx", "cut.onnx", "odd_values.onnx")
    done = forge(*FP16W, "--out-dir", "results", *files)
    assert done.code == 2
    assert_one_line(done, "cut.onnx")
    assert [path.name for path in results(folder)] == ["nameless.onnx"]
    assert done.out.startswith("nameless.onnx -> ")


def test_json_tells_which_model_failed_and_why(forge: Command, folder: Path) -> None:
    damaged(folder)
    words = (*FP16W, "--format", "json", "--out-dir", "results")
    done = forge(*words, "nameless.onnx", "cut.onnx")
    assert done.code == 2
    good, bad = done.document["runs"]
    assert "error" not in good
    assert (bad["source"], bad["written"]) == ("cut.onnx", {})
    assert "not an ONNX model" in bad["error"]


def test_a_failure_in_a_process_of_its_own_has_no_traceback(folder: Path) -> None:
    for words, code in (
        (["run", "--passes", "fp16w", "none.onnx", "o.onnx"], 2),
        (["run", "--passes", "assert-pure{max_opset=9}", "nameless.onnx"], 1),
        (["run", "--passes", "fp16w{", "nameless.onnx", "o.onnx"], 2),
    ):
        done = child(*words, cwd=folder)
        assert (done.code, done.out) == (code, "")
        assert done.err.startswith("onnxforge: ")
        assert "Traceback" not in done.err


def fall(self: WeightsFp16CastPass, model: ir.Model) -> Result:
    raise ZeroDivisionError("unforeseen")


def test_a_bug_keeps_its_type_and_carries_the_command_that_shows_it(
    forge: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightsFp16CastPass, "call", fall)
    source = Path("with space.onnx")
    Path("nameless.onnx").rename(source)
    pipeline = "fp16w{min_bytes=0},assert-pure"
    done = forge("run", "--passes", pipeline, source, "o.onnx")
    assert done.code == 2
    *_, error, remark = done.err.splitlines()
    command = f"onnxforge run --passes '{pipeline}' '{source}'"
    assert error == "ZeroDivisionError: unforeseen"
    assert remark == f"this is a bug; reproduce it with: {command} o.onnx"
    assert not Path("o.onnx").exists()
    Path("d").mkdir()
    words = "run", "--passes", pipeline, source
    for more, said in (
        (("--dry-run",), "--dry-run"),
        (("--out-dir", "d"), f"d/{source}'"),
        ((testing.models()[0], "--share", "--out-dir", "d"), "--share --out-dir d"),
    ):
        assert forge(*words, *more).err.rstrip().endswith(said)


def test_a_bug_shows_its_traceback_in_a_process_of_its_own(folder: Path) -> None:
    code = (
        "from onnxforge.passes.fp16w import WeightsFp16CastPass as P\n"
        "def call(self, model): raise ZeroDivisionError('unforeseen')\n"
        f"P.call = call\n{MAIN}"
    )
    command = [sys.executable, "-c", code, *FP16W, "nameless.onnx", "o.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Traceback")
    lines = done.stderr.splitlines()
    assert "ZeroDivisionError: unforeseen" in lines
    assert lines[-1].endswith("onnxforge run --passes fp16w nameless.onnx o.onnx")


# list, explain, inspect, help.


def test_every_pass_is_listed_with_its_effect_and_summary(forge: Command) -> None:
    done = forge("list")
    assert (done.code, done.err) == (0, "")
    rows = [line.split(maxsplit=2) for line in done.out.splitlines()]
    assert [row[0] for row in rows] == list(entries())
    summary = (WeightsFp16CastPass.__doc__ or "").splitlines()[0]
    assert ["fp16w", "storage", summary] in rows


def test_the_list_as_json_says_the_same(forge: Command) -> None:
    document = forge("list", "--format", "json").document
    assert [entry["name"] for entry in document] == list(entries())
    assert all([*e] == ["name", "effect", "summary", "distribution"] for e in document)
    rows = [f"{e['name']} {e['effect']} {e['summary']}" for e in document]
    assert [" ".join(line.split()) for line in forge("list").out.splitlines()] == rows


def test_a_pass_is_explained_with_options_example_and_codes(forge: Command) -> None:
    done = forge("explain", "fp16w")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("fp16w (storage)\n\nStore float32 weights as float16")
    for field in dataclasses.fields(WeightsFp16CastPass):
        assert f"\n    {field.name}: " in done.out
    assert "onnxforge run --passes 'fp16w" in done.out
    assert "\nDefaults:\n    min_bytes: 1KiB\n    include: ()\n" in done.out
    assert "\n    max: has to be given\n" in forge("explain", "set-ir").out
    for code, meaning in WeightsFp16CastPass.codes.items():
        assert f"\n    {code}: {meaning}\n" in done.out


@pytest.mark.parametrize("name", list(entries()))
def test_every_pass_is_explained(forge: Command, name: str) -> None:
    assert forge("explain", name).out.startswith(f"{name} (")


@pytest.mark.parametrize("code", ["OF221", "of221", "OF901"])
def test_a_code_is_explained(forge: Command, code: str) -> None:
    meanings = WeightsFp16CastPass.codes | PassManager.codes
    done = forge("explain", code)
    assert (done.code, done.out) == (0, f"{code.upper()}: {meanings[code.upper()]}\n")


def table(text: str, first: str) -> list[list[str]]:
    """Rows of the table whose header begins with this word, columns parted by two blanks."""
    block = next(part for part in text.split("\n\n") if part.startswith(first))
    return [re.split(r" {2,}", line.strip()) for line in block.splitlines()[1:]]


def test_inspect_shows_versions_files_weights_and_operators(
    forge: Command, folder: Path
) -> None:
    done = forge("inspect", "hiding_places.onnx")
    assert (done.code, done.err) == (0, "")
    first, second, *_ = done.out.splitlines()
    assert first == "IR 9, opsets: ai.onnx 18, local 1, local::project/ai.onnx 18"
    assert second == "made by: unknown"
    size = Path("hiding_places.onnx").stat().st_size
    assert table(done.out, "file") == [["hiding_places.onnx", f"{size:,}"]]
    assert ["float", "initializer, body", "inline", "6", "9,216"] in table(done.out, "weights")
    assert ["float", "Constant node, function", "inline", "1", "1,536"] in table(
        done.out, "weights"
    )
    operators = dict(table(done.out, "operator"))
    assert (operators["If"], operators["local::project"]) == ("5", "2")


def test_inspect_counts_every_node_of_every_graph(forge: Command, folder: Path) -> None:
    def nodes(found: list[onnx.NodeProto]) -> Counter[str]:
        count: Counter[str] = Counter()
        for node in found:
            count[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
            for attribute in node.attribute:
                count += nodes(attribute.g.node)
        return count

    proto = onnx.load("hiding_places.onnx")
    expected = nodes(proto.graph.node)
    for function in proto.functions:
        expected += nodes(function.node)
    document = forge("inspect", "hiding_places.onnx", "--format", "json").document
    assert document["ops"] == expected
    counts = list(document["ops"].values())
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("name", fixtures.names())
def test_inspect_as_json_adds_up(forge: Command, tmp_path: Path, name: str) -> None:
    path = fixtures.copied(name, tmp_path)
    done = forge("inspect", path, "--format", "json")
    assert (done.code, done.err) == (0, "")
    found = done.document
    assert list(found) == [
        *("ir_version", "opsets", "producer", "pipeline", "files"),
        *("inputs", "outputs", "weights", "readers", "ops"),
    ]
    proto = onnx.load(path, load_external_data=False)
    assert found["ir_version"] == proto.ir_version
    for opset in proto.opset_import:
        assert found["opsets"][opset.domain or "ai.onnx"] == opset.version
    assert found["files"] == {str(p): p.stat().st_size for p in tmp_path.iterdir()}
    for key, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
        assert [port["name"] for port in found[key]] == [value.name for value in values]
    weights = list(Weights(model_io.load(path)))
    for groups in (found["weights"], found["readers"]):
        assert sum(group["count"] for group in groups) == len(weights)
        assert sum(group["nbytes"] for group in groups) == sum(w.nbytes for w in weights)


def test_inspect_names_the_operators_behind_casts(forge: Command, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x, int64[m] ids) => (float[n] y, float[k] p, float[a,b] z, float[2] kept)
    <float16[9] half = {1,1,1,1,1,1,1,1,1}, float[3] both = {1,1,1}, int64[2] to = {3,3},
     int64[1] shape = {-1}, float[2] kept = {1,1}, float[1] lost = {1}> {
      wide = Cast<to=1>(half)  table = Reshape(wide, to)  z = Gather(table, ids)
      p = Gather(both, ids)  s = ReduceSum(both)  flat = Reshape(x, shape)  y = Mul(flat, s)
    }"""
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    groups = forge("inspect", path, "--format", "json").document["readers"]
    assert [(g["readers"], g["dtype"], g["nbytes"]) for g in groups] == [
        ("Reshape", "int64", 24),
        ("Gather", "float16", 18),
        ("Gather, ReduceSum", "float", 12),
        ("graph output", "float", 8),
        ("nothing", "float", 4),
    ]
    assert ["Gather", "float16", "1", "18"] in table(
        forge("inspect", path).out, "weights read by"
    )


def test_inspect_tells_data_files_from_the_model(forge: Command, tmp_path: Path) -> None:
    path = fixtures.copied("external_mixed", tmp_path)
    groups = forge("inspect", path, "--format", "json").document["weights"]
    places = {(g["place"], g["stored"]): (g["count"], g["nbytes"]) for g in groups}
    assert places == {
        ("initializer, main graph", "data file"): (1, 2048),
        ("initializer, main graph", "inline"): (2, 128 + 1024),
        ("Constant node, main graph", "data file"): (1, 1024),
    }
    files = dict(table(forge("inspect", path).out, "file"))
    assert set(files) == {"external_mixed.onnx", "external_mixed.onnx_data"}


def test_inspect_shows_the_pipeline_and_the_exporter(forge: Command, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    PassManager("fp16w").run(fixtures.built("speech_encoder"), target)
    lines = forge("inspect", target).out.splitlines()
    assert lines[1] == "made by: exporter"
    assert lines[2] == f"pipeline: {WeightsFp16CastPass().spec(full=True)}"
    document = forge("inspect", target, "--format", "json").document
    assert document["pipeline"] == str(WeightsFp16CastPass().spec(full=True))


def test_inspect_reads_no_weight(forge: Command, tmp_path: Path) -> None:
    path = fixtures.copied("captured_output", tmp_path)
    done = forge("inspect", path)
    assert (done.code, done.err) == (0, "")
    assert ["float", "initializer, main graph", "inline", "1", "1,536"] in table(
        done.out, "weights"
    )


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["run", "--help"], ["inspect", "-h"]])
def test_help_is_a_result(forge: Command, words: list[str]) -> None:
    done = forge(*words)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: onnxforge")


def test_no_summary_of_a_command_is_cut_short(forge: Command) -> None:
    _, _, commands = forge("--help").out.partition("Commands:\n")
    rows = commands.partition("\n\n")[0].splitlines()
    assert len(rows) >= 11
    assert all(row.endswith(".") and not row.endswith("...") for row in rows)


def test_the_version_is_that_of_the_package(forge: Command) -> None:
    done = forge("--version")
    version = importlib.metadata.version("onnxforge")
    assert done == Done(0, f"onnxforge, version {version}\n", "")


def test_a_wrong_pipeline_is_found_without_reading_the_model(
    forge: Command, folder: Path
) -> None:
    done = forge("run", "--passes", "fp16w,", "none.onnx", "o.onnx")
    assert done.code == 2
    assert "none.onnx" not in done.err


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_stays_off_stdout(
    forge: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    done = forge("run", "--passes", "fp16w", "--format", "json", "nameless.onnx", "o.onnx")
    assert done.code == 0
    assert done.document["runs"][0]["target"] == "o.onnx"


def test_paths_that_are_no_utf8_are_taken(folder: Path) -> None:
    try:
        name = os.fsdecode(b"caf\xe9.onnx")
        Path("nameless.onnx").rename(name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    done = child("run", "--passes", "fp16w", name, "o.onnx", cwd=folder)
    assert (done.code, done.err) == (0, "")
    runs_as_rounded("nameless", folder / "o.onnx", ["up_w", "down_w"])


@pytest.mark.parametrize("kind", ["npy", "empty", "cut"])
def test_inputs_that_are_no_npz_are_one_line(forge, folder: Path, kind: str) -> None:
    with Path("i.npz").open("wb") as file:
        np.savez(file, x=np.ones((2, 16), np.float32))
    whole = Path("i.npz").read_bytes()
    if kind == "npy":
        with Path("i.npz").open("wb") as file:
            np.save(file, np.ones(3))
    else:
        Path("i.npz").write_bytes(b"" if kind == "empty" else whole[: len(whole) // 2])
    done = forge(*FP16W, "--check-laws", "--inputs", "i.npz", "nameless.onnx", "--dry-run")
    assert done.code == 2
    assert_one_line(done, "i.npz", "cannot be read")


@pytest.mark.parametrize("report", ["nameless.onnx", "o.onnx", "hiding_places.onnx"])
def test_a_report_overwrites_no_model(forge, folder: Path, report: str) -> None:
    before = content(folder)
    done = forge(*FP16W, "nameless.onnx", "o.onnx", "--report", report)
    assert done.code == 2
    assert content(folder) == before


def test_nothing_is_written_when_the_report_cannot_be(forge, folder: Path) -> None:
    before = content(folder)
    assert forge(*FP16W, "nameless.onnx", "o.onnx", "--report", "no/r.json").code == 2
    assert content(folder) == before


def test_a_short_file_name_is_in_the_message(forge, folder: Path) -> None:
    Path("nameless.onnx").rename("m")
    done = forge("run", "--passes", "fp16w{include=zz*}", "m", "o")
    assert done.err.startswith("onnxforge: m: ")


def test_a_closed_pipe_is_no_failed_check(folder: Path) -> None:
    command = f'"{sys.executable}" -c "from onnxforge.cli import main; main()" list'
    code = f"{command} | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", code], check=False).returncode != 1


def test_a_bug_is_no_failed_check(folder: Path) -> None:
    code = (
        "from onnxforge.passes.fp16w import WeightsFp16CastPass as P\n"
        "def call(self, model): raise ZeroDivisionError('unforeseen')\n"
        "P.call = call\nfrom onnxforge.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *FP16W, "nameless.onnx", "o.onnx"],
        capture_output=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 2


def test_memory_of_the_parent_process_does_not_count(folder: Path) -> None:
    ballast = np.ones(400_000_000, np.uint8)
    done = child(*FP16W, "nameless.onnx", "--dry-run", "--format", "json", cwd=folder)
    assert done.document["runs"][0]["peak_memory"] < ballast.nbytes


def test_overloads_keep_their_own_opsets_in_inspect(forge, tmp_path) -> None:
    proto = onnx.load(fixtures.built("really_new_ir"))
    proto.functions[1].opset_import[0].version = 19
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    opsets = forge("inspect", path, "--format", "json").document["opsets"]
    assert sorted(opsets.values()) == [1, 19, 20, 20]


def test_a_failed_check_prints_its_findings_as_json(forge, folder) -> None:
    source = fixtures.copied("foreign", folder)
    done = forge("run", "--passes", "assert-pure", "--format", "json", source)
    assert done.code == 1
    assert [f["code"] for f in done.document["runs"][0]["passes"][0]["findings"]]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for rows in (1 << 10, 1 << 17):
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[rows, 512], data_location=1)
        tensor.external_data.add(key="location", value="w.bin")
        with (tmp_path / "w.bin").open("wb") as data:
            data.truncate(rows * 512 * 4)
        ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 512])
        node = onnx.helper.make_node("Gather", ["w", "ids"], ["y"])
        graph = onnx.helper.make_graph([node], "table", [ids], [y], [tensor])
        opset = onnx.helper.make_opsetid("", 17)
        model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[opset])
        (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
        code = "from onnxforge.cli import main; main()"
        words = [
            "run",
            "--passes",
            "fp16w",
            "--force",
            "--format",
            "json",
            "in.onnx",
            "out.onnx",
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(json.loads(done.stdout)["runs"][0]["peak_memory"])
    if None not in peaks:
        assert peaks[1] - peaks[0] < 32 << 20, "256 MB more of weights"


def test_a_result_never_replaces_what_another_job_reads(forge: Command, folder: Path) -> None:
    here = folder / "here"
    fixtures.copied("external_one", here)
    (here / "two.onnx").symlink_to("external_one.onnx")
    before = content(folder)
    sources = [here / "external_one.onnx", here / "two.onnx"]
    done = forge(*FP16W, "--force", "--out-dir", here, *sources)
    assert (done.code, done.out) == (2, "")
    assert_one_line(done, "is read for")
    assert content(folder) == before


def test_no_name_in_a_model_commands_the_terminal(forge: Command, folder: Path) -> None:
    evil = "Evil\x1b[31m\nfake: line\u202e"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(evil, ["x"], ["y"], domain=evil, name=evil)],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1])],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(evil, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, producer_name=evil)
    (folder / "evil.onnx").write_bytes(model.SerializeToString())
    for words in (["inspect", "evil.onnx"], ["run", "--passes", "assert-pure", "evil.onnx"]):
        done = forge(*words)
        assert "fake" in done.out + done.err
        for line in (done.out + done.err).splitlines():
            assert line.isprintable()
            assert not line.startswith("fake")
