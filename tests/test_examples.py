"""What is in examples/ does what it says: a bundle, and a pass in a package of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from onnxforge import testing
from onnxforge.errors import BrokenPass
from onnxforge.passes.fp16w import WeightsFp16CastPass
from support import fixtures
from support.bundles import contents, made

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "examples/third_party_pass"

END = "-- end --"
EACH = f"""
import json, sys
from onnxforge.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, (words, end.code)
    print("{END}")
"""


def test_the_example_bundle_is_built_and_keeps_to_its_gates(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "examples/bundle",
        tmp_path / "examples/bundle",
        ignore=shutil.ignore_patterns("dist", ".onnxforge"),
    )
    shutil.copy(ROOT / "LICENSE", tmp_path)
    for name in ("speech_encoder", "merged_decoder"):
        (tmp_path / "fixtures/built" / name).mkdir(parents=True)
        fixtures.copied(name, tmp_path / "fixtures/built" / name)
    outcome = made(tmp_path / "examples/bundle/onnxforge.toml")
    assert not outcome.failed
    assert not outcome.errors
    output = tmp_path / "examples/bundle/dist"
    told = json.loads((output / "metadata.json").read_text())
    assert list(told["tiers"]) == ["fp32", "fp16w", "int8", "int8w", "sq-int8", "browser"]
    assert told["graphs"]["encoder"]["statistics"]["samples"] == 4
    sizes = {
        tier: sum(graph["bytes"] for graph in each["graphs"].values())
        for tier, each in told["tiers"].items()
    }
    assert sizes["fp16w"] < 0.6 * sizes["fp32"]
    assert any("browser/encoder.onnx.data.000" in name for name in contents(output))
    assert "| int8w" in (output / "PARITY.md").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed: what pip would lay down."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE / "src/acme_passes", site / "acme_passes")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = site / f"acme_passes-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["onnxforge.passes"]
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[onnxforge.passes]", *lines, ""]))
    return os.environ | {"PYTHONPATH": str(site)}


def run(installed: dict[str, str], *words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_third_partys_pass_is_listed_explained_and_run(
    installed: dict[str, str], tmp_path: Path
) -> None:
    words = "run", "--check-laws", "--passes", "round-bits{keep=4},fp16w"
    commands = [
        ["list"],
        ["explain", "round-bits"],
        ["explain", "acme101"],
        [*words, str(testing.models()[0]), str(tmp_path / "out.onnx")],
    ]
    said = run(installed, "-c", EACH, json.dumps(commands)).split(END)
    assert "round-bits    storage  Round float32 weights to fewer" in said[0]
    assert "'round-bits{keep=10}'" in said[1]
    assert said[2].lstrip().startswith("ACME101: All values")
    assert "round-bits: modified\n    2 weights treated" in said[3]


def test_a_recorded_pass_of_a_third_party_is_run_when_it_is_asked_for(
    installed: dict[str, str], tmp_path: Path
) -> None:
    parent, tier = str(testing.models()[0]), str(tmp_path / "out.onnx")
    given = "--passes", "round-bits"
    commands = [["run", *given, parent, tier], ["verify", *given, parent, tier]]
    assert "derived: " in run(installed, "-c", EACH, json.dumps(commands))
    code = "from onnxforge.cli import main; main()"
    words = [sys.executable, "-c", code, "verify", parent, tier]
    done = subprocess.run(words, env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'round-bits' is of acme-passes 0.1.0: give --passes to run it" in done.stderr


def test_a_third_partys_pass_passes_its_own_tests(installed: dict[str, str]) -> None:
    words = "-p", "no:cacheprovider", "-c", PACKAGE / "pyproject.toml", "--rootdir", PACKAGE
    said = run(installed, "-m", "pytest", "-q", *words, PACKAGE / "tests")
    assert "10 passed" in said


@pytest.mark.parametrize("model", testing.models(), ids=lambda path: path.stem)
def test_a_pass_that_breaks_a_law_does_not_conform(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = WeightsFp16CastPass(min_bytes=0)
    testing.conform(step, model, tmp_path)
    right = WeightsFp16CastPass.call

    def silent(self: WeightsFp16CastPass, model: object) -> object:
        result = right(self, model)  # type: ignore[arg-type]
        result.findings = result.findings[1:]
        return result

    def lying(self: WeightsFp16CastPass, model: object) -> object:
        result = right(self, model)  # type: ignore[arg-type]
        result.modified = not result.modified
        return result

    def damaging(self: WeightsFp16CastPass, model: object) -> object:
        result = right(self, model)  # type: ignore[arg-type]
        result.model.graph.outputs[0].name = "other"
        return result

    for call, said in (
        (silent, "says nothing"),
        (lying, "modified="),
        (damaging, "interface"),
    ):
        monkeypatch.setattr(WeightsFp16CastPass, "call", call)
        with pytest.raises(BrokenPass, match=said):
            testing.conform(step, model, tmp_path)
