"""What others run in continuous integration: the hook and the action."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import faultless
from support.faultless import edit

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="scripts are of a POSIX shell")


def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    known = {"PATH": path, "HOME": str(cwd), "GIT_CONFIG_NOSYSTEM": "1", **env}
    return subprocess.run(words, cwd=cwd, env=known, capture_output=True, text=True)


def git(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.com")
    home = str(repository.parent / "pre-commit")
    return run("git", *who, *words, cwd=repository, PRE_COMMIT_HOME=home)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of models with the hook that this one offers, in our own environment."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    hook |= {"language": "system", "args": ["--min-ort=1.17"]}
    found = faultless.clean(tmp_path / "models")
    config = {"repos": [{"repo": "local", "hooks": [hook]}]}
    (found / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    assert git(found, "init", "-q").returncode == 0
    done = run(
        "pre-commit", "install", cwd=found, PRE_COMMIT_HOME=str(tmp_path / "pre-commit")
    )
    assert done.returncode == 0, done.stderr
    return found


def test_a_commit_of_a_bad_model_is_blocked(repository: Path) -> None:
    git(repository, "add", "-A")
    done = git(repository, "commit", "-qm", "clean")
    assert done.returncode == 0, done.stdout + done.stderr
    path = repository / "int8/editor.onnx"
    good = path.read_bytes()
    with edit(path) as proto:
        proto.ir_version = 10
    git(repository, "add", "-A")
    done = git(repository, "commit", "-qm", "bad")
    assert done.returncode == 1
    assert "OF404 ir-too-new" in done.stdout + done.stderr
    assert git(repository, "log", "--oneline").stdout.count("\n") == 1
    path.write_bytes(good)
    (repository / "LICENSE").write_text("MIT\n")
    git(repository, "add", "-A")
    assert git(repository, "commit", "-qm", "good").returncode == 0


def test_a_commit_of_a_bad_bundle_is_blocked(repository: Path) -> None:
    config = repository / ".pre-commit-config.yaml"
    found = yaml.safe_load(config.read_text())
    more = {"pass_filenames": False, "args": ["."], "files": ""}
    found["repos"][0]["hooks"][0] |= more
    config.write_text(yaml.safe_dump(found))
    git(repository, "add", "-A")
    assert git(repository, "commit", "-qm", "clean").returncode == 0
    (repository / "LICENSE").write_text("other terms\n")
    git(repository, "add", "-A")
    done = git(repository, "commit", "-qm", "bad")
    assert done.returncode == 1
    assert "OF482 size-differs" in done.stdout + done.stderr


def test_the_hook_is_in_the_form_of_pre_commit(tmp_path: Path) -> None:
    hooks = str(ROOT / ".pre-commit-hooks.yaml")
    assert run("pre-commit", "validate-manifest", hooks, cwd=tmp_path).returncode == 0
    bad = tmp_path / "bad.yaml"
    bad.write_text("- id: onnxforge-lint\n")
    assert run("pre-commit", "validate-manifest", str(bad), cwd=tmp_path).returncode == 1


def steps() -> list[dict[str, Any]]:
    found = yaml.safe_load((ROOT / "action.yml").read_text())
    assert found["runs"]["using"] == "composite"
    return list(found["runs"]["steps"])


def acted(folder: Path, temp: Path, paths: str, args: str = "") -> Any:
    """Run the step of the action that lints, with our own environment in place of its own."""
    temp.mkdir(exist_ok=True)
    (temp / "onnxforge").mkdir(exist_ok=True)
    if not (temp / "onnxforge/bin").exists():
        (temp / "onnxforge/bin").symlink_to(BIN)
    words = {"PATHS": paths, "ARGS": args, "SARIF": str(temp / "lint.sarif")}
    places = {"RUNNER_TEMP": str(temp), "GITHUB_STEP_SUMMARY": str(temp / "summary.md")}
    script = steps()[1]["run"]
    return run("bash", "-eo", "pipefail", "-c", script, cwd=folder, **words, **places)


def test_the_action_annotates_and_summarizes(tmp_path: Path) -> None:
    root = faultless.clean(tmp_path / "models with blanks")
    temp = tmp_path / "temp"
    done = acted(tmp_path, temp, "models with blanks\n")
    assert done.returncode == 0, done.stderr
    assert "passed" in (temp / "summary.md").read_text()
    with edit(root / "int8/editor.onnx") as proto:
        proto.ir_version = 10
    faultless.relist(root)
    done = acted(tmp_path, temp, "models with blanks/int8/editor.onnx", "--min-ort=1.17\n")
    assert done.returncode == 1
    assert done.stdout.startswith(
        "::error file=models with blanks/int8/editor.onnx,title=OF404"
    )
    assert "failed" in (temp / "summary.md").read_text()
    assert "OF404" in (temp / "lint.sarif").read_text()
    assert acted(tmp_path, temp, "nothing").returncode == 2


def test_no_input_of_the_action_is_pasted_into_a_script(tmp_path: Path) -> None:
    assert all("${{" not in step["run"] for step in steps())
    done = acted(tmp_path, tmp_path / "temp", '"; touch pwned; "\n$(touch pwned)')
    assert done.returncode == 2
    assert not (tmp_path / "pwned").exists()
    shutil.rmtree(tmp_path / "temp")
