"""Programs that load a model and run it, each with a runtime of its own."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from _browser import Browser, Server
from _models import Case

HERE = Path(__file__).resolve().parent
KEPT_REASON = 200

Outputs = list[dict[str, np.ndarray]]


class Missing(Exception):
    """A machine cannot have a client."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client made of a model.

    Attributes:
        status: Empty where all went well.
        reason: The client's own words.
        outputs: By name, for each run.
    """

    status: str
    reason: str = ""
    outputs: Outputs = dataclasses.field(default_factory=list)


class Client(Protocol):
    """One runtime as one program uses it."""

    @property
    def name(self) -> str:
        """Heading of the row."""

    def prepare(self) -> str:
        """Install what the client needs and return its versions, or raise Missing."""

    def run(self, case: Case, target: Path) -> Answer:
        """Run a model on its inputs; the target is an empty folder."""


@dataclasses.dataclass
class Python:
    """A release of onnxruntime in its environment under .runtimes/."""

    release: str
    runtimes: ModuleType
    cache: Path
    timeout: float

    @property
    def name(self) -> str:
        """Heading of the row."""
        return f"Python {self.release}"

    def prepare(self) -> str:
        """Make the environment, unless it is there."""
        try:
            self.runtime = self.runtimes.environment(self.release, self.cache)
        except subprocess.CalledProcessError as error:
            raise Missing(f"no environment for onnxruntime {self.release}") from error
        return f"onnxruntime {self.runtime.version}"

    def run(self, case: Case, target: Path) -> Answer:
        """Run a case."""
        return self.run_model(case.model, case, target)

    def run_model(self, model: Path, case: Case, target: Path) -> Answer:
        """Run any model on the inputs of a case."""
        archive = target / "outputs.npz"
        options = argparse.Namespace(plain=False, timeout=self.timeout)
        outcome = self.runtimes.run_child(self.runtime, model, archive, case.inputs, options)
        if outcome.word:
            return Answer(outcome.word, outcome.detail)
        with np.load(archive) as found:
            outputs = [
                {name: found[f"{number}-{index}"] for index, name in enumerate(case.outputs)}
                for number in range(len(case.inputs))
            ]
        return Answer("", outputs=outputs)

    def library(self) -> Path:
        """Return libonnxruntime in the installed wheel, or raise Missing."""
        self.prepare()
        found = sorted(self.runtime.python.parents[1].rglob("capi/libonnxruntime.*"))
        if not found:
            raise Missing(f"no libonnxruntime in the wheel of {self.runtime.version}")
        return Path(found[0])


@dataclasses.dataclass
class Node:
    """onnxruntime-node, from a path or with model and data handed over as bytes."""

    mode: str
    packages: Packages
    timeout: float

    @property
    def name(self) -> str:
        """Heading of the row."""
        return f"node, {self.mode}"

    def prepare(self) -> str:
        """Install the packages."""
        self.packages.install()
        node = _output(_program("node"), "--version")
        return f"onnxruntime-node {self.packages.version('onnxruntime-node')}, node {node}"

    def run(self, case: Case, target: Path) -> Answer:
        """Run a case."""
        script = self.packages.folder / "node.mjs"
        command = [_program("node"), str(script), self.mode]
        return _answer([*command, case.folder, target], case, target, self.timeout)


@dataclasses.dataclass
class Rust:
    """The crate `ort` with the library that the newest wheel brings."""

    folder: Path
    newest: Python
    timeout: float
    name: str = "Rust, ort"

    def prepare(self) -> str:
        """Build the program."""
        self.environment = {"ORT_DYLIB_PATH": str(self.newest.library())}
        cargo = _program("cargo", "a Rust toolchain")
        shutil.copytree(HERE / "rust", self.folder, dirs_exist_ok=True)
        _install([cargo, "build", "--quiet", "--target-dir", "target"], self.folder)
        locked = (self.folder / "Cargo.lock").read_text().split('name = "ort"\nversion = "')
        crate = locked[1].partition('"')[0]
        return f"ort {crate}, onnxruntime {self.newest.runtime.version}"

    def run(self, case: Case, target: Path) -> Answer:
        """Run a case."""
        program = self.folder / "target/debug/client"
        command = [program, case.folder, target]
        return _answer(command, case, target, self.timeout, self.environment)


@dataclasses.dataclass
class Web:
    """onnxruntime-web (wasm, one thread) on a page in headless Chromium."""

    packages: Packages
    server: Server
    timeout: float
    name: str = "Chromium"

    def prepare(self) -> str:
        """Install the packages and find the browser."""
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        if program is None:
            raise Missing("no chromium: install Debian's package of that name")
        self.packages.install()
        self.browser = Browser(Path(program))
        browser = _output(program, "--version").partition(" built")[0]
        return f"onnxruntime-web {self.packages.version('onnxruntime-web')}, {browser}"

    def run(self, case: Case, target: Path) -> Answer:
        """Run a case."""
        url, finished = self.server.expect(case.folder.name, target)
        reason = self.browser.visit(url, finished, self.timeout)
        return _read(case, target) if not reason else Answer("gives no answer", reason)


@dataclasses.dataclass
class Packages:
    """The packages from npm, with the scripts that use them."""

    folder: Path

    @property
    def web(self) -> Path:
        """Where a page finds onnxruntime-web."""
        return self.folder / "node_modules/onnxruntime-web/dist"

    def install(self) -> None:
        """Install what package.json names, unless it is there."""
        npm = _program("npm", "Node.js with npm")
        done = self.folder / "ready.json"
        wanted = (HERE / "js/package.json").read_text()
        shutil.copytree(HERE / "js", self.folder, dirs_exist_ok=True)
        if done.exists() and done.read_text() == wanted:
            return
        # The only script fetches CUDA libraries from elsewhere.
        quiet = ["--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
        _install([npm, "install", "--ignore-scripts", *quiet], self.folder)
        done.write_text(wanted)

    def version(self, name: str) -> str:
        """Return the version of an installed package."""
        text = (self.folder / "node_modules" / name / "package.json").read_text()
        return str(json.loads(text)["version"])


def _program(name: str, what: str = "") -> str:
    found = shutil.which(name)
    if found is None:
        raise Missing(f"no {name}: install {what or name}")
    return found


def _install(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{Path(command[0]).name} {command[1]} failed: {_short(done.stderr)}")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{Path(command[0]).name} does not start: {_short(done.stderr)}")
    return done.stdout.strip()


def _short(text: str) -> str:
    return " ".join(text.split())[:KEPT_REASON]


def _answer(
    command: Sequence[str | Path],
    case: Case,
    target: Path,
    timeout: float,
    environment: dict[str, str] | None = None,
) -> Answer:
    """Run a program that leaves its result in the target folder."""
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            timeout=timeout,
            env=os.environ | (environment or {}),
        )
    except subprocess.TimeoutExpired:
        return Answer("takes too long")
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-KEPT_REASON:]
        status = f"ends with status {done.returncode}"
        with contextlib.suppress(ValueError):
            status = f"crashes ({signal.Signals(-done.returncode).name})"
        return Answer(status, said)
    return _read(case, target)


def _read(case: Case, target: Path) -> Answer:
    written = target / "result.json"
    if not written.exists():
        return Answer("gives no answer")
    result = json.loads(written.read_text())
    if result["status"]:
        reason = result["reason"].replace(f"{case.folder}/", "")
        return Answer(result["status"], _short(reason))
    outputs = [
        {
            entry["name"]: np.frombuffer(
                (target / entry["file"]).read_bytes(), entry["type"]
            ).reshape(entry["dims"])
            for entry in entries
        }
        for entries in result["outputs"]
    ]
    return Answer("", outputs=outputs)
