"""Try published models in the programs that load them: browser, node, Rust, Python.

Every model runs in a process of its own, so that a crash is a result like any other. All
outputs must lie as near to those of the newest onnxruntime in Python as `--tolerance` says:
wasm and x64 add in another order, which moves these fixtures by up to 1.2e-6 of max|y|, and
int8 for a weight or an activation moves them by 1e-3 and more.

Tiers that multiply integers show what goes into each product and comes out of it. Fed what
the client itself feeds it, it must give what numpy gives, to the rounding of floats: that
holds also where an activation lies between two levels and rounds to the other one.

What a machine lacks is skipped and named; `--strict` calls that a failure.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _products
import runtimes
from _browser import serving
from _clients import Answer, Client, Missing, Node, Outputs, Packages, Python, Rust, Web
from _models import Case, Samples, from_fixture, make

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ["speech_encoder", "merged_decoder", "hiding_places"]
RELEASES = ["1.17", "1.20", "1.24", "newest"]
REFERENCE = RELEASES[-1]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one model in one client.

    Attributes:
        word: The cell of the table.
        good: Whether the outputs agree.
        detail: The client's own words, or which output differs.
    """

    word: str
    good: bool
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A client and what became of the models in it.

    Attributes:
        name: The client.
        outcomes: One for each model; none where the client is missing.
        versions: What it runs on.
        missing: Why the machine cannot have the client.
    """

    name: str
    outcomes: list[Outcome]
    versions: str = ""
    missing: str = ""


def judge(case: Case, reference: Answer, answer: Answer, tolerance: float) -> Outcome:
    """Compare all outputs of all runs with the reference, and products with numpy."""
    if answer.status:
        return Outcome(answer.status.upper(), good=False, detail=answer.reason)
    wrong: list[str] = []
    for archive, outputs in zip(case.inputs, answer.outputs, strict=True):
        with np.load(archive) as sample:
            wrong += _products.wrong(case.products, outputs | dict(sample))
    if wrong:
        return Outcome(f"{len(wrong)} PRODUCTS WRONG", good=False, detail=wrong[0])
    try:
        worst, where = furthest(reference.outputs, answer.outputs)
    except ValueError as error:
        return Outcome("DIFFERS", good=False, detail=str(error))
    if not worst <= tolerance:
        return Outcome(f"DIFFERS, {worst:.1e}", good=False, detail=where)
    return Outcome(f"agrees, {worst:.1e}" if worst else "agrees, 0", good=True)


def furthest(reference: Outputs, found: Outputs) -> tuple[float, str]:
    """Return the largest distance relative to max|y| of its output, and that output.

    Args:
        reference: The outputs of each run, by name.
        found: What should lie near them.

    Returns:
        The distance, and the number of the run with the name of the output.

    Raises:
        ValueError: If runs, outputs, types, shapes or NaN are not the same.
    """
    worst, where = 0.0, ""
    for number, (wanted, given) in enumerate(zip(reference, found, strict=True)):
        if wanted.keys() != given.keys():
            raise ValueError(f"run {number}: outputs {', '.join(given)}")
        for name, value in wanted.items():
            here = f"run {number}, {name}"
            distance = apart(value, given[name], here)
            if not distance <= worst:
                worst, where = distance, here
    return worst, where


def apart(wanted: np.ndarray, given: np.ndarray, where: str) -> float:
    """Return max|given - wanted| / max|wanted|."""
    kinds = (wanted.dtype, wanted.shape), (given.dtype, given.shape)
    if kinds[0] != kinds[1]:
        raise ValueError(f"{where}: {kinds[1]} in place of {kinds[0]}")
    if not np.array_equal(np.isnan(wanted), np.isnan(given)):
        raise ValueError(f"{where}: NaN elsewhere")
    wide = [np.nan_to_num(array.astype(np.float64)) for array in (wanted, given)]
    distance = float(np.max(np.abs(wide[1] - wide[0]), initial=0.0))
    scale = float(np.max(np.abs(wide[0]), initial=0.0))
    return distance / scale if scale else distance


def references(newest: Python, cases: list[Case], folder: Path) -> list[Answer]:
    """Run the models that say what must come out."""
    answers: list[Answer] = []
    for case in cases:
        answer = newest.run_model(case.reference, case, emptied(folder / case.folder.name))
        if answer.status:
            raise SystemExit(f"{case.name}: reference {answer.status}: {answer.reason}")
        answers.append(answer)
    return answers


def emptied(folder: Path) -> Path:
    """Make an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def table(cases: list[Case], rows: list[Row]) -> list[str]:
    """The markdown table, with versions and the clients' own words below it."""
    there = [row for row in rows if not row.missing]
    lines = [f"| model | {' | '.join(row.name for row in there)} |"]
    lines.append("|---" * (len(there) + 1) + "|")
    notes: dict[str, list[str]] = collections.defaultdict(list)
    for number, case in enumerate(cases):
        name = f"{case.name}, {case.kind}"
        outcomes = [row.outcomes[number] for row in there]
        lines.append(f"| {' | '.join([name, *(found.word for found in outcomes)])} |")
        for row, found in zip(there, outcomes, strict=True):
            if found.detail:
                notes[f"* {name}, {found.word}: {found.detail}"].append(row.name)
    below = [f"* {row.name}: {row.versions or f'missing: {row.missing}'}" for row in rows]
    below += [f"{note} [{'; '.join(names)}]" for note, names in notes.items()]
    return [*lines, "", *below, ""]


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--clients", default="*", help="names to try, as a glob")
    add("--fixtures", default=",".join(FIXTURES), help="what to publish; '' for none")
    add("--model", type=Path, action="append", default=[], help="one more to publish")
    add("--inputs", type=Path, action="append", default=[], help="its inputs by name, .npz")
    add("--tolerance", type=float, default=1e-5, help="largest distance, of max|y|")
    add("--timeout", type=float, default=120, help="seconds for one model in one client")
    add("--workers", type=int, default=os.cpu_count())
    add("--strict", action="store_true", help="fail where a client is missing")
    add("--cache", type=Path, default=ROOT / ".clients", help="for what is made and installed")
    add("--runtimes", type=Path, default=ROOT / ".runtimes", help="environments of Python")
    options = parser.parse_args(arguments)
    options.cache = options.cache.absolute()
    if len(options.model) != len(options.inputs):
        parser.error("every --model needs one --inputs")
    return options


def models(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Path, Samples]]:
    """Yield the models to publish, with their inputs."""
    for name in filter(None, options.fixtures.split(",")):
        yield from_fixture(name, folder)
    for path, archive in zip(options.model, options.inputs, strict=True):
        with np.load(archive) as sample:
            yield path.absolute(), [dict(sample)]


def tried(
    clients: list[Client],
    cases: list[tuple[Case, Answer]],
    options: argparse.Namespace,
) -> list[Row]:
    """Run every case in every client, and judge what it gives by the reference."""
    rows: list[Row] = []
    waiting = []
    folder = emptied(options.cache / "results")
    with ThreadPoolExecutor(options.workers) as pool:
        for client in clients:
            try:
                rows.append(Row(client.name, [], versions=client.prepare()))
            except Missing as reason:
                rows.append(Row(client.name, [], missing=str(reason)))
                continue
            for case, reference in cases:
                target = emptied(folder / client.name / case.folder.name)
                future = pool.submit(client.run, case, target)
                waiting.append((rows[-1], case, reference, future))
        for row, case, reference, future in waiting:
            row.outcomes.append(judge(case, reference, future.result(), options.tolerance))
    return rows


def run(options: argparse.Namespace) -> int:
    """Make the models, try them in all clients, print the table."""
    start = time.monotonic()
    releases = [Python(name, runtimes, options.runtimes, options.timeout) for name in RELEASES]
    newest = releases[RELEASES.index(REFERENCE)]
    newest.prepare()
    made = emptied(options.cache / "cases")
    cases = [
        case
        for source, samples in models(options, made)
        for case in make(source, samples, made, runtimes)
    ]
    expected = references(newest, cases, options.cache / "references")
    packages = Packages(options.cache / "js")
    with serving({"page": packages.folder, "cases": made, "ort": packages.web}) as server:
        clients: list[Client] = [Web(packages, server, options.timeout)]
        clients += [Node("path", packages, options.timeout)]
        clients += [Node("bytes", packages, options.timeout)]
        clients += [Rust(options.cache / "rust", newest, options.timeout), *releases]
        chosen = [one for one in clients if fnmatch.fnmatch(one.name, options.clients)]
        rows = tried(chosen, list(zip(cases, expected, strict=True)), options)
    return report(cases, rows, time.monotonic() - start, options.strict)


def report(cases: list[Case], rows: list[Row], seconds: float, strict: bool) -> int:
    """Print the table and the count; return the exit status."""
    outcomes = [outcome for row in rows for outcome in row.outcomes]
    bad = sum(not outcome.good for outcome in outcomes)
    missing = sum(bool(row.missing) for row in rows)
    count = f"{len(outcomes)} tried, {len(outcomes) - bad} agree, {bad} bad"
    text = [*table(cases, rows), f"{count}, {missing} clients missing, {seconds:.0f} s"]
    sys.stdout.write("\n".join(text) + "\n")
    return 1 if bad or not outcomes or (strict and missing) else 0


if __name__ == "__main__":
    try:
        sys.exit(run(options_of()))
    except Missing as missing:
        sys.exit(f"nothing to compare with: {missing}")
