"""Try tiers beside their parents on many onnxruntime releases, each in an own environment.

Every model runs in a child process, so that a crash is a result like any other. A tier must
load wherever its parent does and give the same bits as the parent whose weights are rounded
by an independent reference.

A tier that multiplies integers cannot: one ulp of an input moves all layers behind it. Each
of its products, fed what the runtime itself feeds it, must give what numpy gives, to the
rounding of floats; and the whole must be finite and as near to float32 as on the newest
release. On processors without VNNI sums may saturate, and such products do not hold.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import importlib.util
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _parents
import _products
import numpy as np
import onnx

from onnxforge.errors import CheckFailed, ModelError, Refused
from onnxforge.manager import PassManager
from onnxforge.numerics.metrics import Accumulator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CHILD = HERE / "_ort_child.py"
LOAD_FAILED, RUN_FAILED = 3, 4
KEPT_REASON = 150
EQUAL, LOADS = "bit-equal", "loads"
BAND = 3.0  # dB between two releases: the error of a tier, squared, is not twice or half
ROWS = "gather-int8{min_rows=2}"  # tables of fixtures are small
PIPELINES = "fp16w", "int8w", ROWS, "dynamic-int8", f"{ROWS},dynamic-int8"

RELEASES = tuple(f"1.{minor}" for minor in range(17, 33))
REQUIREMENTS = {
    release: [f"onnxruntime=={release}.*", "numpy" if minor > 18 else "numpy<2"]
    for minor, release in enumerate(RELEASES, 17)
} | {"newest": ["onnxruntime", "numpy"]}
TRIED = "1.17", "1.18", "1.20", "1.22", "1.24", "newest"


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
class Probe:
    """A tier that shows its products.

    Attributes:
        model: The tier, with what goes into products and comes out as further outputs.
        outputs: Names of all outputs.
        products: The products of the main graph.
    """

    model: Path
    outputs: list[str]
    products: list[_products.Product]


@dataclasses.dataclass(frozen=True)
class Case:
    """A tier, its parent, and what to feed them.

    Attributes:
        name: Heading of the row.
        parent: The model the tier must equal, or be near to.
        tier: What the pipeline made, None where it made nothing.
        inputs: One archive for each run.
        changed: How many weights the parent rounds, or products the tier multiplies.
        reason: Why there is no tier.
        probe: Of a tier that multiplies integers.
    """

    name: str
    parent: Path
    tier: Path | None
    inputs: tuple[Path, ...]
    changed: str = ""
    reason: str = ""
    probe: Probe | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one case on one runtime.

    Attributes:
        word: The cell of the table.
        good: Whether the law holds there; None where there is nothing to hold.
        detail: The runtime's own words, or how far the outputs lie apart.
        sqnr: How near to float32, where the law does not ask for the same bits.
    """

    word: str
    good: bool | None
    detail: str = ""
    sqnr: float = math.nan


def environment(name: str, cache: Path, needs: Sequence[str] = ()) -> Runtime:
    """Make the environment of one release, unless it is there; or of what else is needed."""
    folder = cache / name
    wanted = [*needs] or REQUIREMENTS[name]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "ready.txt"
    if not done.exists() or done.read_text().splitlines()[:-1] != wanted:
        done.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # onnxruntime's declared dependencies serve tools that no session needs.
        alone = [] if needs else ["--no-deps"]
        install = [str(python), "-m", "pip", "install", "--quiet", *alone, *wanted]
        subprocess.run(install, check=True)
        ask = "import onnxruntime; print(onnxruntime.__version__)"
        shown = subprocess.run(
            [str(python), "-I", "-c", ask], check=True, capture_output=True, text=True
        )
        done.write_text("\n".join([*wanted, shown.stdout.strip()]))
    return Runtime(name, done.read_text().splitlines()[-1], python)


def fixture_cases(folder: Path, passes: str, pattern: str) -> Iterator[Case]:
    """Every fixture whose name matches, with its tier."""
    build = module(ROOT / "fixtures/build.py")
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
        report = PassManager(passes).run(path, tier)
    except (CheckFailed, ModelError, Refused) as error:
        return Case(name, path, None, tuple(inputs), reason=str(error).splitlines()[0])
    if not report.modified:
        return Case(name, path, None, tuple(inputs), reason="is left as it is")
    model = onnx.load(tier)
    found, inner = _products.products(model), _products.inner(model)
    if not found and not inner:
        parent = folder / "parent.onnx"
        changed = f"{_parents.write(path, tier, parent)} weights"
        return Case(name, parent, tier, tuple(inputs), changed)
    probe = Probe(folder / "probe.onnx", _products.show(model, found), found)
    onnx.save(model, probe.model)
    changed = f"{len(found)} products" + (f", {inner} in bodies" if inner else "")
    return Case(name, path, tier, tuple(inputs), changed, probe=probe)


def module(path: Path) -> Any:
    """A script as a module, by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def judge(case: Case, runtime: Runtime, options: argparse.Namespace) -> Outcome:
    """Run parent and tier on one release and compare their outputs."""
    assert case.tier is not None, "where there is no tier nothing is tried"
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "parent.npz"), Path(folder, "tier.npz")]
        models = [case.parent, case.tier]
        parent, tier = (
            run_child(runtime, model, target, case.inputs, options)
            for model, target in zip(models, files, strict=True)
        )
        if parent.word:
            return Outcome(f"input itself {parent.word}", good=None, detail=parent.detail)
        if tier.word:
            return Outcome(f"TIER {tier.word.upper()}", good=False, detail=tier.detail)
        if not case.inputs:
            return Outcome(LOADS, good=True)
        with np.load(files[0]) as wanted, np.load(files[1]) as found:
            outcome = difference(dict(wanted), dict(found))
        if case.probe is None or math.isnan(outcome.sqnr):
            return outcome
        shown = Path(folder, "shown.npz")
        probed = run_child(runtime, case.probe.model, shown, case.inputs, options)
        if probed.word:
            return Outcome(f"SHOWN, {probed.word.upper()}", good=False, detail=probed.detail)
        return multiplied(case.probe, case.inputs, shown, outcome)


def multiplied(probe: Probe, inputs: tuple[Path, ...], shown: Path, whole: Outcome) -> Outcome:
    """Whether all products give what they have to, and the whole is finite."""
    wrong: list[str] = []
    with np.load(shown) as found:
        for number, path in enumerate(inputs):
            outputs = {
                name: found[f"{number}-{index}"]
                for index, name in enumerate(probe.outputs)
                if f"{number}-{index}" in found  # sequences have a name for each element
            }
            with np.load(path) as sample:
                wrong += _products.wrong(probe.products, outputs | dict(sample))
    if wrong:
        tried = len(probe.products) * len(inputs)
        word = f"{len(wrong)} OF {tried} PRODUCTS WRONG"
        return Outcome(word, good=False, detail=wrong[0])
    if math.isinf(whole.sqnr) and whole.sqnr < 0:
        return Outcome("NOT FINITE", good=False)
    return Outcome(f"{whole.sqnr:.1f} dB", good=True, sqnr=whole.sqnr)


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
    everything, floats = Accumulator(), Accumulator()
    for name, reference in wanted.items():
        candidate = found[name]
        kinds = (reference.dtype, reference.shape), (candidate.dtype, candidate.shape)
        if kinds[0] != kinds[1]:
            return Outcome("DIFFERS", good=False, detail=f"output {name}: {kinds}")
        if reference.dtype.kind == "U":
            if not np.array_equal(reference, candidate):
                return Outcome("DIFFERS", good=False, detail=f"output {name}: other text")
        else:
            everything.update(reference, candidate)
            if reference.dtype.kind == "f":
                floats.update(reference, candidate)
    if everything.result().bit_equal:
        return Outcome(EQUAL, good=True, sqnr=math.inf)
    result = floats.result()
    detail = f"max {result.max_abs:.3g}, {result.sqnr_db:.1f} dB"
    sqnr = -math.inf if result.nonfinite_mismatches else result.sqnr_db
    return Outcome("DIFFERS", good=False, detail=detail, sqnr=sqnr)


def held_to_newest(row: list[Outcome]) -> list[Outcome]:
    """Call those outcomes bad that are further from float32, or nearer, than the last."""
    return [
        dataclasses.replace(outcome, word=f"{outcome.word}, UNLIKE NEWEST", good=False)
        if outcome.good and abs(outcome.sqnr - row[-1].sqnr) > BAND
        else outcome
        for outcome in row
    ]


def table(cases: list[Case], runtimes: list[Runtime], rows: list[list[Outcome]]) -> list[str]:
    """The markdown table, with the runtimes' own words below it."""
    heads = [f"{runtime.name} ({runtime.version})" for runtime in runtimes]
    lines = [
        f"| model | changed | {' | '.join(heads)} |",
        "|---|---:|" + "---|" * len(heads),
    ]
    notes: dict[str, list[str]] = collections.defaultdict(list)
    for case, row in zip(cases, rows, strict=True):
        words = " | ".join(outcome.word for outcome in row)
        lines.append(f"| {case.name} | {case.changed} | {words} |")
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
    add("--passes", action="append", help=f"a pipeline that makes tiers; {PIPELINES}")
    add("--runtimes", default=",".join(TRIED))
    add("--fixtures", default="*", help="names to try, as a glob; '' for none")
    add("--model", type=Path, action="append", default=[], help="one more model")
    add(
        "--inputs",
        type=Path,
        action="append",
        default=[],
        help="its inputs by name, .npz or a folder",
    )
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
    totals: collections.Counter[bool | None] = collections.Counter()
    for passes in options.passes or PIPELINES:
        with tempfile.TemporaryDirectory() as made:
            tried = list(chosen_cases(Path(made), passes, options))
            cases = [case for case in tried if case.tier]
            pairs = [(case, runtime) for case in cases for runtime in runtimes]
            with ThreadPoolExecutor(options.workers) as pool:
                results = list(pool.map(lambda pair: judge(*pair, options), pairs))
        width = len(runtimes)
        rows = [
            held_to_newest(results[start : start + width])
            for start in range(0, len(results), width)
        ]
        left = [f"* {case.name}: {case.reason}" for case in tried if not case.tier]
        lines = [f"### {passes}", "", *table(cases, runtimes, rows), *left, ""]
        print("\n".join(lines), flush=True)
        totals.update(outcome.good for row in rows for outcome in row)
    print(f"{totals.total()} tried, {totals[True]} hold, {totals[False]} bad")
    return 1 if totals[False] or not totals[True] else 0


def chosen_cases(folder: Path, passes: str, options: argparse.Namespace) -> Iterator[Case]:
    """The tiers that one pipeline makes of all models."""
    yield from fixture_cases(folder, passes, options.fixtures)
    for number, (model, given) in enumerate(zip(options.model, options.inputs, strict=True)):
        inputs = sorted(given.glob("*.npz")) if given.is_dir() else [given]
        own = folder / f"model{number}"
        yield make_case(given.stem, model.absolute(), inputs, passes, own)


if __name__ == "__main__":
    sys.exit(run(options_of()))
