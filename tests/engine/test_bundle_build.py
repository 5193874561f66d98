"""Building a bundle: what is made, when, and what becomes of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxforge import load
from onnxforge.bundle import build as build_module
from onnxforge.bundle import extras
from onnxforge.bundle.build import planned
from onnxforge.bundle.reading import read_recipe
from onnxforge.bundle.state import State, opened
from onnxforge.errors import OnnxforgeError, SpecError
from onnxforge.lint import Options, lint
from onnxforge.replay import verify
from support import bundles, fixtures, oracle, pairs
from support.bundles import (
    BARE,
    FULL,
    JUDGED,
    Broken,
    Inline,
    check_documents,
    contents,
    document,
    laid_out,
    made,
    written,
)

SQ = """
[tiers.sq]
pipeline = "smoothquant{stats=@calibration format=integer min_bytes=0}"
graphs.two.pipeline = "int8w{min_bytes=0}"
"""
FAILING = "graphs.one.gates.min-sqnr.hidden = 400"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return laid_out(tmp_path)


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    return laid_out(tmp_path, JUDGED)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return laid_out(tmp_path, FULL)


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of all that is below a folder, locks aside."""
    paths = [path for path in folder.rglob("*") if path.name != "lock"]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_a_bundle_is_made_and_says_what_it_is(full: Path, tmp_path: Path) -> None:
    outcome = made(full)
    assert not outcome.failed
    assert not outcome.errors
    assert sorted(contents(tmp_path / "out")) == [
        "PARITY.md",
        "fp16w/one.onnx",
        "fp16w/two.onnx",
        "fp32/one.onnx",
        "fp32/two.onnx",
        "golden/one/0/inputs/x.npy",
        "golden/one/0/outputs/hidden.npy",
        "golden/one/0/outputs/logits.npy",
        "manifest.json",
        "metadata.json",
        "notes.txt",
    ]
    check_documents(tmp_path)
    assert (tmp_path / "out/fp32/one.onnx").read_bytes() == (
        tmp_path / "source/one.onnx"
    ).read_bytes()
    assert verify(tmp_path / "source/one.onnx", tmp_path / "out/fp16w/one.onnx").derived


def test_metadata_are_those_of_the_models(full: Path, tmp_path: Path) -> None:
    made(full)
    told = document(tmp_path, "metadata.json")
    assert (told["name"], told["license"]) == ("pair", "Apache-2.0")
    assert list(told["tiers"]) == ["fp32", "fp16w"]
    graph = told["tiers"]["fp16w"]["graphs"]["one"]
    proto = onnx.load(tmp_path / "out" / graph["model"])
    assert (graph["ir_version"], graph["opsets"]) == (proto.ir_version, {"ai.onnx": 17})
    assert graph["domains"] == ["ai.onnx"]
    assert [port["name"] for port in graph["outputs"]] == [o.name for o in proto.graph.output]
    assert graph["inputs"] == [{"name": "x", "type": "float", "shape": ["rows", 64]}]
    assert graph["pipeline"].startswith("fp16w{")
    (step,) = graph["coverage"]
    assert step["treated"] == {"weights": 3, "bytes": 3 * 64 * 64 * 4}
    assert step["skipped"] == step["excluded"] == {"weights": 0, "bytes": 0}
    hidden = next(o for o in graph["parity"]["outputs"] if o["name"] == "hidden")
    error = _by_numpy(tmp_path)
    assert hidden["max"] == pytest.approx(error, rel=1e-5)
    assert {gate["output"] for gate in graph["gates"]} == {"logits", "hidden"}
    assert all(gate["passed"] for gate in graph["gates"])
    assert told["tiers"]["fp32"]["graphs"]["one"]["parity"] is None


def _by_numpy(folder: Path) -> float:
    """The largest error of an output, from the models as the oracle runs them."""
    errors = []
    for path in sorted((folder / "samples").iterdir()):
        x = {"x": np.load(path)["x"]}
        right = oracle.run(folder / "source/one.onnx", x)["hidden"]
        seen = oracle.run(folder / "out/fp16w/one.onnx", x)["hidden"]
        errors.append(float(np.abs(right.astype(float) - seen).max()))
    return max(errors)


def test_golden_values_are_what_the_source_makes(full: Path, tmp_path: Path) -> None:
    made(full)
    golden = tmp_path / "out/golden/one/0"
    x = np.load(golden / "inputs/x.npy")
    assert np.array_equal(x, np.load(tmp_path / "samples/0.npz")["x"])
    outputs = {name: np.load(golden / f"outputs/{name}.npy") for name in ("logits", "hidden")}
    oracle.assert_bit_equal(outputs, oracle.run(tmp_path / "source/one.onnx", {"x": x}))


def test_a_second_build_does_nothing(full: Path, tmp_path: Path) -> None:
    made(full)
    before = stamps(tmp_path)
    executor = Inline(left=0)
    outcome = made(full, executor)
    assert outcome.made == []
    assert outcome.kept == ["fp32/one", "fp32/two", "fp16w/one", "fp16w/two"]
    assert stamps(tmp_path) == before


def test_the_same_bytes_elsewhere_in_other_processes(full: Path, tmp_path: Path) -> None:
    text = FULL + SQ + "graphs.one.gates.min-cosine.logits = 0.5\n"
    other = laid_out(tmp_path / "elsewhere", text)
    written(tmp_path, text)
    assert not made(full).errors
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert not made(other, pool, max_memory=10**9).errors
    first, second = contents(tmp_path / "out"), contents(other.parent / "out")
    assert "sq/one.onnx" in first
    assert first == second
    everything = b"".join(first.values())
    assert str(tmp_path).encode() not in everything
    check_documents(tmp_path)


def test_statistics_are_named_by_their_hash(full: Path, tmp_path: Path) -> None:
    written(tmp_path, FULL + SQ)
    executor = Inline()
    made(full, executor)
    assert executor.ran.count("Calibrate") == 1
    told = document(tmp_path, "metadata.json")
    statistics = told["graphs"]["one"]["statistics"]
    assert statistics["samples"] == 2
    assert told["graphs"]["two"]["statistics"] is None
    assert statistics["sha256"] in told["tiers"]["sq"]["graphs"]["one"]["pipeline"]
    (file,) = (tmp_path / ".onnxforge/pair").glob("*.safetensors")
    tier = tmp_path / "out/sq/one.onnx"
    assert verify(tmp_path / "source/one.onnx", tier, statistics=[file]).derived


def test_published_statistics_let_anybody_replay(full: Path, tmp_path: Path) -> None:
    written(tmp_path, 'statistics = "ranges"\n' + FULL + SQ)
    made(full)
    check_documents(tmp_path)
    graphs = document(tmp_path, "metadata.json")["graphs"]
    assert graphs["one"]["statistics"]["file"] == "ranges/one.safetensors"
    file = tmp_path / "out/ranges/one.safetensors"
    assert bundles.hashes({"": file.read_bytes()})[""] == graphs["one"]["statistics"]["sha256"]
    replayed = Options(derived=True, select=("not-derived",))
    assert lint([tmp_path / "out"], replayed).clean
    written(tmp_path, FULL + SQ)
    made(full)
    assert not file.exists()
    check_documents(tmp_path)
    assert document(tmp_path, "metadata.json")["graphs"]["one"]["statistics"]["file"] is None
    (finding,) = lint([tmp_path / "out"], replayed).findings
    assert "sq/one.onnx: OF476 cannot be replayed: " in str(finding)
    assert "no file given has sha256:" in finding.message


def changes(folder: Path, act: Callable[[], object]) -> set[str]:
    """Which tiers have another inode after a build."""

    def inodes() -> dict[str, int]:
        return {p.as_posix(): p.stat().st_ino for p in (folder / "out").glob("*/*.onnx")}

    before = inodes()
    act()
    executor = Inline()
    made(folder / "onnxforge.toml", executor)
    after = inodes()
    return {Path(path).parent.name for path in after if after[path] != before.get(path)}


def test_a_changed_pipeline_makes_its_tier_again_and_no_other(
    recipe: Path, tmp_path: Path
) -> None:
    made(recipe)
    other = BARE.replace('"fp16w"', '"fp16w{min_bytes=4096}"')
    assert changes(tmp_path, lambda: written(tmp_path, other)) == {"fp16w"}
    assert (
        "min_bytes=4KiB"
        in document(tmp_path, "metadata.json")["tiers"]["fp16w"]["graphs"]["one"]["pipeline"]
    )
    check_documents(tmp_path)


def test_a_changed_source_makes_its_graph_again(full: Path, tmp_path: Path) -> None:
    made(full)
    before = contents(tmp_path / "out")
    pairs.saved(tmp_path / "source/one.onnx", pairs.model("logits = Abs(made)"))
    made(full)
    after = contents(tmp_path / "out")
    unequal = {name for name in after if after[name] != before[name]}
    assert {name for name in unequal if name.endswith("onnx")} == {
        "fp32/one.onnx",
        "fp16w/one.onnx",
    }
    assert "golden/one/0/outputs/logits.npy" in unequal
    check_documents(tmp_path)


def test_a_touched_source_makes_nothing_again(recipe: Path, tmp_path: Path) -> None:
    made(recipe)
    os.utime(tmp_path / "source/one.onnx", (1, 1))
    assert made(recipe, Inline(left=0)).made == []


def test_a_damaged_tier_is_mended(full: Path, tmp_path: Path) -> None:
    made(full)
    before = contents(tmp_path / "out")
    path = tmp_path / "out/fp16w/one.onnx"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    (tmp_path / "out/notes.txt").unlink()
    (tmp_path / "out/golden/one/0/inputs/x.npy").unlink()
    made(full)
    assert contents(tmp_path / "out") == before


def test_other_samples_judge_again_without_making_again(full: Path, tmp_path: Path) -> None:
    made(full)
    np.savez(tmp_path / "samples/2.npz", x=pairs.sample() * 2)
    executor = Inline()
    made(full, executor)
    assert set(executor.ran) == {"Judge", "Preserve"}
    told = document(tmp_path, "metadata.json")
    assert told["tiers"]["fp16w"]["graphs"]["one"]["parity"]["samples"] == 3


def test_what_breaks_a_gate_is_not_published(judged: Path, tmp_path: Path) -> None:
    text = JUDGED.replace("graphs.one.gates.min-sqnr = 40", FAILING)
    outcome = made(written(tmp_path, text))
    (reason,) = outcome.failed["fp16w/one"]
    assert reason.startswith("one: --min-sqnr hidden=400 for hidden: ")
    assert list(document(tmp_path, "metadata.json")["tiers"]) == ["fp32"]
    assert not (tmp_path / "out/fp16w").exists()
    check_documents(tmp_path)
    again = Inline(left=0)  # it is known, and not even tried
    assert made(judged, again).failed == outcome.failed
    executor = Inline()
    assert not made(written(tmp_path, JUDGED), executor).failed
    assert executor.ran == ["Judge"], "it was made already"
    assert (tmp_path / "out/fp16w/two.onnx").exists()


def test_what_breaks_a_gate_leaves_the_old_tier(judged: Path, tmp_path: Path) -> None:
    made(judged)
    before = contents(tmp_path / "out")
    text = JUDGED.replace("graphs.one.gates.min-sqnr = 40", FAILING)
    assert made(written(tmp_path, text)).failed.keys() == {"fp16w/one"}
    assert contents(tmp_path / "out") == before
    text = text.replace('"fp16w"', '"int8w{min_bytes=0}"')
    assert made(written(tmp_path, text)).failed.keys() == {"fp16w/one"}
    assert contents(tmp_path / "out") == before


def test_a_check_that_says_no_refuses_the_tier(recipe: Path, tmp_path: Path) -> None:
    text = BARE.replace('"fp16w"', '"fp16w,assert-pure{max_opset=16}"')
    outcome = made(written(tmp_path, text))
    assert outcome.failed.keys() == {"fp16w/one", "fp16w/two"}
    assert not outcome.errors
    assert list(document(tmp_path, "metadata.json")["tiers"]) == ["fp32"]


def test_the_oldest_runtime_refuses_what_it_cannot_load(tmp_path: Path) -> None:
    recipe = laid_out(tmp_path)
    model = pairs.model()
    model.ir_version = 10
    pairs.saved(tmp_path / "source/one.onnx", model)
    written(tmp_path, BARE + '[targets]\nonnxruntime = ["1.20", "1.17.3"]\n')
    outcome = made(recipe)
    why = "one: is IR 10, and onnxruntime 1.17 loads 9 at most"
    assert outcome.failed == {"fp32/one": [why], "fp16w/one": [why]}
    text = BARE + '[targets]\nonnxruntime = ["1.20", "1.18"]\n'
    assert not made(written(tmp_path, text)).failed
    assert document(tmp_path, "metadata.json")["targets"]["onnxruntime"] == ["1.18", "1.20"]


def test_a_tier_may_be_meant_for_something_else(tmp_path: Path) -> None:
    text = BARE.replace("fp16w", "bf16").replace('"bf16"', '"bf16{raise_opset=21}"')
    text += '[targets]\nonnxruntime = "1.17"\n'
    recipe = laid_out(tmp_path, text)
    assert made(recipe).failed.keys() == {"bf16/one", "bf16/two"}
    own = 'targets = {onnxruntime = "1.20", providers = "CUDAExecutionProvider"}\n'
    written(tmp_path, text.replace("[targets]", f"{own}[targets]"))
    assert not made(recipe).failed
    check_documents(tmp_path)
    tiers = document(tmp_path, "metadata.json")["tiers"]
    assert tiers["fp32"]["targets"] == {"onnxruntime": ["1.17"], "providers": []}
    assert tiers["bf16"]["targets"]["onnxruntime"] == ["1.20"]
    assert lint([tmp_path / "out"], Options(ignore=("gate-missing",))).clean
    found = lint([tmp_path / "out"], Options(providers=("CPUExecutionProvider",))).findings
    assert {finding.rule for finding in found if finding.level == "error"} == {"no-kernel"}
    found = lint([tmp_path / "out"], Options(min_ort="1.17")).findings
    assert "opset-too-new" in {finding.rule for finding in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is in a bundle that was built at once."""
    folder = tmp_path_factory.mktemp("whole")
    executor = Inline()
    made(laid_out(folder, FULL), executor)
    assert executor.ran == ["Make"] * 4 + ["Preserve", "Judge"]
    return contents(folder / "out")


@pytest.mark.parametrize(("left", "rest"), [(0, 6), (5, 1)])
def test_a_build_that_ends_is_gone_on_with(
    full: Path, tmp_path: Path, whole: dict[str, bytes], left: int, rest: int
) -> None:
    with pytest.raises(Broken):
        made(full, Inline(left))
    executor = Inline()
    assert not made(full, executor).errors
    assert len(executor.ran) == rest
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("step", ["move_models", "move_file"])
def test_a_build_that_ends_while_files_move_is_gone_on_with(
    full: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    module = build_module if step == "move_models" else extras
    right = getattr(module, step)

    def broken(*words: Any, **named: Any) -> None:
        right(*words, **named)
        raise Broken

    monkeypatch.setattr(module, step, broken)
    with pytest.raises(Broken):
        made(full)
    monkeypatch.undo()
    outcome = made(full)
    assert not outcome.errors
    assert contents(tmp_path / "out") == whole


_KILLED = """
import os, signal, sys
from pathlib import Path
from onnxforge.bundle import tasks
from support import bundles
tasks.Judge.__call__ = lambda self, pulse: os.kill(os.getpid(), signal.SIGKILL)
bundles.made(Path(sys.argv[1]))
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_build_is_gone_on_with(
    full: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(full)],
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""},
        check=False,
    )
    assert done.returncode == -9
    executor = Inline()
    made(full, executor)
    assert "Make" not in executor.ran, "what was made was written down at once"
    assert executor.ran[-1] == "Judge"
    assert contents(tmp_path / "out") == whole


def test_only_makes_nothing_else(recipe: Path, tmp_path: Path) -> None:
    made(recipe, only=["fp16w/one"])
    models = [name for name in contents(tmp_path / "out") if name.endswith(".onnx")]
    assert models == ["fp16w/one.onnx"]
    check_documents(tmp_path)
    with pytest.raises(SpecError, match="--only fp16w/on: not in the recipe; did you mean"):
        made(recipe, only=["fp16w/on"])


def test_the_plan_says_what_and_why(full: Path, tmp_path: Path) -> None:
    def said() -> dict[str, tuple[str, ...]]:
        found = read_recipe(full)
        with opened(found.work) as state:
            return {name: (s.stage, *s.reasons) for name, s in planned(found, state)}

    late = ("make", "missing or out of date")
    assert said() == {
        **dict.fromkeys(
            ("fp32/one", "fp32/two", "fp16w/one", "fp16w/two"), ("make", "missing")
        ),
        "golden values of one": late,
        "notes.txt": late,
    }
    made(full)
    assert set(said().values()) == {("done",)}
    written(tmp_path, FULL.replace('"fp16w"', '"fp16w{share=false}"') + SQ)
    (tmp_path / "out/fp32/one.onnx").unlink()
    assert said() == {
        "fp32/one": ("make", "one.onnx is missing or changed"),
        "fp32/two": ("done",),
        "fp16w/one": ("make", "pipeline changed"),
        "fp16w/two": ("make", "pipeline changed"),
        "sq/one": ("calibrate", "statistics are missing or out of date"),
        "sq/two": ("make", "missing"),
    }
    (tmp_path / "notes.txt").write_text("new\n")
    written(tmp_path, FULL.replace("[tiers.fp16w]", "[tiers.half]"))
    (tmp_path / "out/golden/one/0/inputs/x.npy").unlink()
    assert said() == {
        "fp32/one": ("make", "one.onnx is missing or changed"),
        "fp32/two": ("done",),
        "half/one": ("make", "missing"),
        "half/two": ("make", "missing"),
        "golden values of one": late,
        "notes.txt": late,
        "fp16w/one": ("remove", "is not in the recipe"),
        "fp16w/two": ("remove", "is not in the recipe"),
    }


@pytest.mark.parametrize(("theirs", "ours"), [("one", "two"), ("two", "one")])
def test_files_of_others_are_not_replaced(
    recipe: Path, tmp_path: Path, theirs: str, ours: str
) -> None:
    for name in (f"out/fp16w/{theirs}.onnx", "out/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    refused = made(recipe).errors
    assert "notes.txt: is not of this recipe; --force" in refused["shared file notes.txt"]
    assert refused.keys() == {"fp16w", "shared file notes.txt"}
    assert not (tmp_path / f"out/fp16w/{ours}.onnx").exists(), "half a tier is no tier"
    assert (tmp_path / f"out/fp16w/{theirs}.onnx").read_text() == "mine"
    outcome = made(recipe, force=True)
    assert not outcome.errors
    check_documents(tmp_path)


def test_two_builds_at_a_time_are_refused(recipe: Path, tmp_path: Path) -> None:
    is_refused = pytest.raises(OnnxforgeError, match="another build is at work")
    with opened(tmp_path / ".onnxforge/pair"), is_refused:
        made(recipe)


def test_a_flat_layout_with_suffixes(recipe: Path, tmp_path: Path) -> None:
    text = BARE.replace('output = "out"', 'output = "out"\nlayout = "{graph}.{tier}.onnx"')
    text = text.replace("[tiers.fp32]\n", '[tiers.fp32]\nlayout = "{graph}.onnx"\n')
    text = text.replace('"fp16w"\n', '"fp16w"\nweights = "sidecar"\n')
    made(written(tmp_path, text))
    assert [name for name in contents(tmp_path / "out") if "onnx" in name] == [
        "one.fp16w.onnx",
        "one.fp16w.onnx_data",
        "one.onnx",
        "two.fp16w.onnx",
        "two.fp16w.onnx_data",
        "two.onnx",
    ]
    check_documents(tmp_path)
    graph = document(tmp_path, "metadata.json")["tiers"]["fp16w"]["graphs"]["one"]
    assert graph["data"] == ["one.fp16w.onnx_data"]


def test_graphs_that_share_their_data(recipe: Path, tmp_path: Path) -> None:
    text = BARE.replace('"fp16w"\n', '"fp16w"\nweights = "shared"\n')
    outcome = made(written(tmp_path, text))
    assert "fp16w/*" in outcome.made
    names = [name for name in contents(tmp_path / "out") if name.startswith("fp16w")]
    assert names == ["fp16w/one.onnx", "fp16w/shared.onnx_data", "fp16w/two.onnx"]
    assert (tmp_path / "out/fp16w/shared.onnx_data").stat().st_size == 3 * 64 * 64 * 2
    check_documents(tmp_path)
    made(written(tmp_path, BARE))  # and back: nothing of the other way is left
    names = [name for name in contents(tmp_path / "out") if name.startswith("fp16w")]
    assert names == ["fp16w/one.onnx", "fp16w/two.onnx"]
    check_documents(tmp_path)


def test_fewer_shards_leave_no_old_ones(recipe: Path, tmp_path: Path) -> None:
    text = BARE.replace('"fp16w"', '"fp16w,shard{max_bytes=8KiB manifest=true}"')
    made(written(tmp_path, text))
    shards = [f"fp16w/one.onnx.data.00{i}" for i in range(3)]
    there = contents(tmp_path / "out")
    assert [name for name in there if "one.onnx.data" in name] == shards
    assert "fp16w/one.onnx.sha256" in there
    check_documents(tmp_path)
    made(written(tmp_path, text.replace("8KiB", "16KiB")))
    assert [n for n in contents(tmp_path / "out") if "one.onnx.data" in n] == shards[:2]
    check_documents(tmp_path)
    x = {"x": pairs.sample()}
    oracle.run(tmp_path / "out/fp16w/one.onnx", x)


def test_a_tier_that_is_the_source_stays_where_it_is(tmp_path: Path) -> None:
    text = BARE.replace('"out"', '"."').replace('"source/one', '"fp32/one')
    text = text.replace('"source/two', '"fp32/two').replace('"notes.txt"', "")
    recipe = laid_out(tmp_path, text)
    (tmp_path / "source").rename(tmp_path / "fp32")
    before = stamps(tmp_path / "fp32")
    assert not made(recipe).errors
    assert stamps(tmp_path / "fp32") == before
    told = json.loads((tmp_path / "metadata.json").read_text())
    assert told["tiers"]["fp32"]["graphs"]["one"]["model"] == "fp32/one.onnx"
    assert "fp32/one.onnx" in json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert made(recipe, Inline(left=0)).made == []


def test_sources_with_data_files(tmp_path: Path) -> None:
    recipe = laid_out(tmp_path)
    folder = tmp_path / "ext"
    folder.mkdir()
    path = fixtures.copied("external_two", folder)
    text = f"""
name = "ext"
output = "out"
graphs.model.source = "ext/{path.name}"
tiers.fp32.pipeline = ""
tiers.fp16w.pipeline = "fp16w{{min_bytes=0}}"
"""
    assert not made(written(tmp_path, text)).errors
    assert (tmp_path / "out/fp16w/model.onnx_data").exists()
    check_documents(tmp_path)
    data = next(file for file in folder.iterdir() if file != path)
    size = data.stat().st_size
    data.write_bytes(bytes(size))
    executor = Inline()
    made(recipe, executor)
    assert executor.ran == ["Make", "Make"], "a data file is part of the source"


def test_extra_files_are_linked_or_copied(recipe: Path, tmp_path: Path) -> None:
    text = BARE.replace(
        'files = ["notes.txt"]',
        'md5 = true\nfiles = ["notes.txt", {source="notes.txt", path="doc/n", link=true}]',
    )
    made(written(tmp_path, text))
    source = (tmp_path / "notes.txt").stat()
    assert (tmp_path / "out/doc/n").stat().st_ino == source.st_ino
    assert (tmp_path / "out/notes.txt").stat().st_ino != source.st_ino
    files = document(tmp_path, "manifest.json")["files"]
    there = contents(tmp_path / "out")
    del there["manifest.json"]
    assert {name: file["md5"] for name, file in files.items()} == bundles.hashes(there, "md5")
    (tmp_path / "notes.txt").write_text("new\n")
    made(recipe)
    assert (tmp_path / "out/notes.txt").read_text() == "new\n"
    check_documents(tmp_path)


def test_a_folder_is_shared_file_by_file(tmp_path: Path) -> None:
    for name in ("a.txt", "deep/b.npy", ".hidden", "deep/.c/d"):
        (tmp_path / "shared" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shared" / name).write_text(name)
    folder = '{source="shared/", path="test/fixtures"}'
    recipe = laid_out(tmp_path, BARE.replace('"notes.txt"', f'"notes.txt", {folder}'))
    assert not made(recipe).errors
    shared = tmp_path / "out/test/fixtures"
    assert {*contents(shared)} == {"a.txt", "deep/b.npy"}
    check_documents(tmp_path)
    assert "test/fixtures/deep/b.npy" in document(tmp_path, "metadata.json")["files"]
    (tmp_path / "shared/deep/b.npy").unlink()
    assert made(recipe).removed == ["test/fixtures/deep/b.npy"]
    assert not (shared / "deep").exists()
    shutil.rmtree(tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    with pytest.raises(SpecError, match=r":4: files\.1\.source: .*shared is a folder without"):
        made(recipe)


def test_one_failure_does_not_stop_the_rest(recipe: Path, tmp_path: Path) -> None:
    pairs.saved(tmp_path / "source/one.onnx", pairs.model())
    text = BARE + '[tiers.q]\npipeline = "smoothquant{stats=no.safetensors}"\n'
    outcome = made(written(tmp_path, text))
    assert outcome.errors.keys() == {"q/one", "q/two"}
    assert "no.safetensors: No such file" in outcome.errors["q/one"]
    assert (tmp_path / "out/fp16w/one.onnx").exists()


def test_a_source_that_is_missing_stops_nothing_else(full: Path, tmp_path: Path) -> None:
    (tmp_path / "source/one.onnx").unlink()
    outcome = made(full)
    assert outcome.errors.keys() == {"fp32/one", "fp16w/one", "golden values of one"}
    assert list(document(tmp_path, "metadata.json")["graphs"]) == ["two"]
    check_documents(tmp_path)


def test_a_damaged_state_is_begun_afresh(recipe: Path, tmp_path: Path) -> None:
    made(recipe)
    before = contents(tmp_path / "out")
    good = (tmp_path / ".onnxforge/pair/state").read_text()
    other = hashlib.sha256(b'{"version": 0}').hexdigest() + '\n{"version": 0}'
    for text in ("", "[]", other, good.replace('"key"', '"kye"'), good[:-1]):
        (tmp_path / ".onnxforge/pair/state").write_text(text)
        made(recipe)
        assert contents(tmp_path / "out") == before
    assert State(tmp_path / ".onnxforge/pair").published


def test_the_published_models_load(recipe: Path, tmp_path: Path) -> None:
    made(recipe)
    for path in (tmp_path / "out").glob("*/*.onnx"):
        load(path)


def test_a_tier_that_was_emulated_says_so(tmp_path: Path) -> None:
    text = JUDGED.replace('"fp16w"', '"bf16{raise_opset=22}"').replace("= 40", "= 20")
    recipe = laid_out(tmp_path, text)
    outcome = made(recipe)
    assert not outcome.errors
    told = json.loads((tmp_path / "out/metadata.json").read_text())
    assert told["tiers"]["fp16w"]["graphs"]["one"]["parity"]["emulated"] == "bfloat16"
    assert "emulated: float32 rounded as bfloat16" in (tmp_path / "out/PARITY.md").read_text()
