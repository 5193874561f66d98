"""Try tiers beside their parents on many onnxruntime releases, each in an own environment.

Every model runs in a child process, so that a crash is a result like any other. A tier must
load wherever its parent does and give the same bits.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxforge.errors import CheckFailed, ModelError, Refused
from onnxforge.manager import PassManager
from onnxforge.numerics.metrics import Accumulator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CHILD = HERE / "_ort_child.py"
LOAD_FAILED, RUN_FAILED = 3, 4
KEPT_REASON = 150
HELD = EQUAL, LOADS = "bit-equal", "loads"

REQUIREMENTS = {
    "1.17": ["onnxruntime==1.17.*", "numpy<2"],
    "1.18": ["onnxruntime==1.18.*", "numpy<2"],
    "1.20": ["onnxruntime==1.20.*", "numpy"],
    "1.22": ["onnxruntime==1.22.*", "numpy"],
    "1.24": ["onnxruntime==1.24.*", "numpy"],
    "newest": ["onnxruntime", "numpy"],
}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One release of onnxruntime in an environment of its own.

    Attributes:
        name: Key of REQUIREMENTS.
        version: What was installed.
        python: The interpreter of the environment.
    """

    name: str
    version: str
    python: Path


@dataclasses.dataclass(frozen=True)
class Case:
    """A tier, its parent, and what to feed them.

    Attributes:
        name: Heading of the row.
        parent: The model the tier must equal.
        tier: What the pipeline made, None where it made nothing.
        inputs: One archive for each run.
        halved: Weights that the tier stores as float16 and the parent rounds.
        reason: Why there is no tier.
    """

    name: str
    parent: Path
    tier: Path | None
    inputs: tuple[Path, ...]
    halved: int = 0
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one case on one runtime.

    Attributes:
        word: The cell of the table.
        good: Whether the law holds there.
        detail: The runtime's own words, or how far the outputs lie apart.
    """

    word: str
    good: bool
    detail: str = ""


def environment(name: str, cache: Path) -> Runtime:
    """Make the environment of one release, unless it is there."""
    folder = cache / name
    wanted = REQUIREMENTS[name]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "ready.txt"
    if not done.exists() or done.read_text().splitlines()[:-1] != wanted:
        done.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # onnxruntime's declared dependencies serve tools that no session needs.
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *wanted]
        subprocess.run(install, check=True)
        ask = "import onnxruntime; print(onnxruntime.__version__)"
        shown = subprocess.run(
            [str(python), "-I", "-c", ask], check=True, capture_output=True, text=True
        )
        done.write_text("\n".join([*wanted, shown.stdout.strip()]))
    return Runtime(name, done.read_text().splitlines()[-1], python)


def fixture_cases(folder: Path, passes: str, pattern: str) -> Iterator[Case]:
    """Every fixture whose name matches, with its tier."""
    build = _module(ROOT / "fixtures/build.py")
    for name, maker in build.FIXTURES.items():
        if not fnmatch.fnmatch(name, pattern):
            continue
        inputs = []
        for number, sample in enumerate(maker().samples):
            inputs.append(folder / f"{name}-{number}.npz")
            np.savez(inputs[-1], **sample)
        yield make_case(name, build.write(name, folder), inputs, passes, folder / name)


def make_case(name: str, path: Path, inputs: list[Path], passes: str, folder: Path) -> Case:
    """Run the pipeline on a model, and lay its parent beside the result."""
    folder.mkdir(parents=True, exist_ok=True)
    tier = folder / "tier.onnx"
    try:
        PassManager(passes).run(path, tier)
    except (CheckFailed, ModelError, Refused) as error:
        return Case(name, path, None, tuple(inputs), reason=str(error).splitlines()[0])
    if "fp16w" not in passes:
        return Case(name, path, tier, tuple(inputs))
    parent = folder / "parent.onnx"
    halved = _round_weights(path, tier, parent)
    return Case(name, parent, tier, tuple(inputs), halved)


def _round_weights(path: Path, tier: Path, target: Path) -> int:
    """Write the parent, those weights rounded that the tier stores as float16."""
    oracle = _module(ROOT / "tests/support/oracle.py")
    model = onnx.load(path)
    halves = set(_float16_weights(onnx.load(tier, load_external_data=False)))
    rounded = [name for name in oracle.float_weights(model) if name in halves]
    onnx.save(oracle.round_weights_fp16(model, rounded), target)
    return len(rounded)


def _float16_weights(model: onnx.ModelProto) -> Iterator[str]:
    """Names of the float16 initializers and Constants of every graph and function."""
    scopes: list[Any] = [model.graph, *model.functions]
    for scope in scopes:
        for tensor in getattr(scope, "initializer", ()):
            if tensor.data_type == TensorProto.FLOAT16:
                yield tensor.name
        held = [(node, attribute) for node in scope.node for attribute in node.attribute]
        for node, attribute in held:
            scopes += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())]
            if node.op_type == "Constant" and attribute.t.data_type == TensorProto.FLOAT16:
                yield node.output[0]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def judge(case: Case, runtime: Runtime, options: argparse.Namespace) -> Outcome:
    """Run parent and tier on one release and compare their outputs."""
    if case.tier is None:
        return Outcome("no tier", good=True, detail=case.reason)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "parent.npz"), Path(folder, "tier.npz")]
        models = [case.parent, case.tier]
        parent, tier = (
            run_child(runtime, model, target, case.inputs, options)
            for model, target in zip(models, files, strict=True)
        )
        if parent.word:
            return Outcome(f"input itself {parent.word}", good=True, detail=parent.detail)
        if tier.word:
            return Outcome(f"TIER {tier.word.upper()}", good=False, detail=tier.detail)
        if not case.inputs:
            return Outcome(LOADS, good=True)
        with np.load(files[0]) as wanted, np.load(files[1]) as found:
            return difference(dict(wanted), dict(found))


def run_child(
    runtime: Runtime,
    model: Path,
    target: Path,
    inputs: tuple[Path, ...],
    options: argparse.Namespace,
) -> Outcome:
    """Run one model; the word is empty where all went well."""
    plain = ["--plain"] if options.plain else []
    command = [runtime.python, "-I", CHILD, *plain, model, target, *inputs]
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, timeout=options.timeout
        )
    except subprocess.TimeoutExpired:
        return Outcome("takes too long", good=False)
    if done.returncode == 0:
        return Outcome("", good=True)
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    # The runtime puts where it noticed first and what it noticed last.
    detail = lines[-1].replace(str(model.parent), "")[-KEPT_REASON:] if lines else ""
    words = {LOAD_FAILED: "does not load", RUN_FAILED: "does not run"}
    return Outcome(words.get(done.returncode, _crash(done.returncode)), False, detail)


def _crash(status: int) -> str:
    if status >= 0:
        return f"ends with status {status}"
    return f"crashes ({signal.Signals(-status).name})"


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> Outcome:
    """Whether all outputs are the same, bit for bit."""
    if wanted.keys() != found.keys():
        return Outcome("DIFFERS", good=False, detail="other outputs")
    accumulator = Accumulator()
    for name, reference in wanted.items():
        candidate = found[name]
        kinds = (reference.dtype, reference.shape), (candidate.dtype, candidate.shape)
        if kinds[0] != kinds[1]:
            return Outcome("DIFFERS", good=False, detail=f"output {name}: {kinds}")
        if reference.dtype.kind == "U":
            if not np.array_equal(reference, candidate):
                return Outcome("DIFFERS", good=False, detail=f"output {name}: other text")
        else:
            accumulator.update(reference, candidate)
    result = accumulator.result()
    if result.bit_equal:
        return Outcome(EQUAL, good=True)
    detail = f"max {result.max_abs:.3g}, {result.sqnr_db:.1f} dB"
    return Outcome("DIFFERS", good=False, detail=detail)


def table(cases: list[Case], runtimes: list[Runtime], rows: list[list[Outcome]]) -> list[str]:
    """The markdown table, with the runtimes' own words below it."""
    heads = [f"{runtime.name} ({runtime.version})" for runtime in runtimes]
    lines = [
        f"| model | fp16 weights | {' | '.join(heads)} |",
        "|---|---:|" + "---|" * len(heads),
    ]
    notes: dict[str, list[str]] = collections.defaultdict(list)
    for case, row in zip(cases, rows, strict=True):
        words = " | ".join(outcome.word for outcome in row)
        lines.append(f"| {case.name} | {case.halved} | {words} |")
        for outcome, runtime in zip(row, runtimes, strict=True):
            if outcome.detail:
                note = f"* {case.name}, {outcome.word}: {outcome.detail}"
                notes[note].append(runtime.name)
    below = [f"{note} [{', '.join(names)}]" for note, names in notes.items()]
    return [*lines, "", *below]


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--passes", default="fp16w", help="the pipeline that makes the tiers")
    add("--runtimes", default=",".join(REQUIREMENTS))
    add("--fixtures", default="*", help="names to try, as a glob; '' for none")
    add("--model", type=Path, action="append", default=[], help="one more model")
    add("--inputs", type=Path, action="append", default=[], help="its inputs by name, .npz")
    add("--plain", action="store_true", help="with optimization and prepacking off")
    add("--timeout", type=float, default=120, help="seconds for one run")
    add("--workers", type=int, default=os.cpu_count())
    add("--cache", type=Path, default=ROOT / ".runtimes", help="where environments are kept")
    add("--setup-only", action="store_true", help="make the environments and stop")
    options = parser.parse_args(arguments)
    if len(options.model) != len(options.inputs):
        parser.error("every --model needs one --inputs")
    return options


def run(options: argparse.Namespace) -> int:
    """Make the environments and the tiers, try them all, print the table."""
    runtimes = [environment(name, options.cache) for name in options.runtimes.split(",")]
    if options.setup_only:
        print("\n".join(f"{runtime.name}: {runtime.version}" for runtime in runtimes))
        return 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        cases = list(fixture_cases(folder, options.passes, options.fixtures))
        for number, (model, inputs) in enumerate(
            zip(options.model, options.inputs, strict=True)
        ):
            own = folder / f"model{number}"
            cases.append(
                make_case(inputs.stem, model.absolute(), [inputs], options.passes, own)
            )
        pairs = [(case, runtime) for case in cases for runtime in runtimes]
        with ThreadPoolExecutor(options.workers) as pool:
            results = list(pool.map(lambda pair: judge(*pair, options), pairs))
    width = len(runtimes)
    rows = [results[start : start + width] for start in range(0, len(results), width)]
    print("\n".join(table(cases, runtimes, rows)))
    held = sum(outcome.word in HELD for outcome in results)
    bad = sum(not outcome.good for outcome in results)
    print(f"\n{len(results)} tried, {held} hold, {bad} bad")
    return 1 if bad or not held else 0


if __name__ == "__main__":
    sys.exit(run(options_of()))
