"""What `onnxforge support` predicts, against every release of onnxruntime that really tries.

Fixtures and their tiers, the forms of fixtures/forms.py, models that onnx tests its backends
with, at several opsets, and models that are given. A model that is said to load has to load
and, where there are inputs, to run: a wrong "loads" is an error. A wrong "does not load" is
only counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import _loads
import numpy as np
import onnx
import runtimes
from onnx.backend.test.loader import load_model_tests

from onnxforge import model_io
from onnxforge.errors import CheckFailed, ModelError, Refused
from onnxforge.manager import PassManager
from onnxforge.runtime.support import Support, supported

OPSETS = 11, 13, 17, 20, 21, 22, 23, 24, 26, 28
IRS = 9, 10, 11, 13, 14
PIPELINES = (*runtimes.PIPELINES, "shard{single=true inline_below=1KiB}", "set-ir{max=9}")
# They need what the machine may lack: a locale.
MACHINE = ("strnorm", "string_normalizer")


@dataclass(frozen=True)
class Case:
    """A model, and archives of inputs.

    Attributes:
        group: Row of the table.
        name: What it is called.
        path: The model file.
        inputs: One archive for each run.
    """

    group: str
    name: str
    path: Path
    inputs: tuple[Path, ...] = ()


def fixture_cases(folder: Path) -> Iterator[Case]:
    """Every fixture, what each pipeline makes of it, and every form."""
    build = runtimes.module(runtimes.ROOT / "fixtures/build.py")
    for name, maker in build.FIXTURES.items():
        inputs = _archives(maker().samples, folder / f"inputs-{name}")
        path = build.write(name, folder)
        yield Case("fixtures", name, path, inputs)
        for i, pipeline in enumerate(PIPELINES):
            target = folder / f"tier{i}" / name / "model.onnx"
            target.parent.mkdir(parents=True)
            try:
                report = PassManager(pipeline).run(path, target)
            except (CheckFailed, ModelError, Refused):
                continue
            if report.modified or pipeline.startswith("shard"):
                yield Case("tiers", f"{name} {pipeline}", target, inputs)
    forms = runtimes.module(runtimes.ROOT / "fixtures/forms.py")
    for name, fixture in forms.forms():
        own = folder / "forms" / name
        own.mkdir(parents=True)
        for location, content in fixture.files.items():
            (own / location).write_bytes(content)
        path = own / "model.onnx"
        path.write_bytes(fixture.model.SerializeToString())
        yield Case("forms", name, path, _archives(fixture.samples, own))


def _archives(samples: Sequence[dict[str, np.ndarray]], folder: Path) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.npz" for i in range(len(samples))]
    for path, sample in zip(paths, samples, strict=True):
        np.savez(path, **sample)  # type: ignore[arg-type]
    return tuple(paths)


def backend_cases(folder: Path, step: int) -> Iterator[Case]:
    """Every so many-th model that onnx tests its backends with, at all opsets that take it."""
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the numpy that computes what they should give
        tests = load_model_tests(kind="node")
    for test in tests[::step]:
        if any(word in test.name for word in MACHINE):
            continue
        for opset, model in _retargeted(test.model):
            path = folder / f"{test.name}-{opset}.onnx"
            path.write_bytes(model.SerializeToString())
            yield Case("backend tests", path.stem, path)


def _retargeted(model: onnx.ModelProto) -> Iterator[tuple[int, onnx.ModelProto]]:
    """The model at each opset and the oldest IR version that the checker takes it with."""
    for opset in OPSETS:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for imports in (copy.opset_import, *(f.opset_import for f in copy.functions)):
            for entry in imports:
                entry.version = opset if entry.domain == "" else entry.version
        for copy.ir_version in IRS:
            try:
                onnx.checker.check_model(copy, full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
                continue
            yield opset, copy
            break


def verdict(said: Support, failure: _loads.Failure | None) -> str:
    """How the prediction did."""
    if failure is None:
        return "right" if said.loads else f"wrong: {said.verdict}"
    return "wrong: loads" if said.loads else "right"


def main(arguments: list[str] | None = None) -> int:
    """Try everything everywhere and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, action="append", default=[], help="one more model, or a folder")
    add("--backend", type=int, default=40, metavar="N", help="every N-th of these; 0 for none")
    add("--releases", default=",".join(runtimes.RELEASES))
    add("--no-fixtures", action="store_true")
    add("--cache", type=Path, default=runtimes.ROOT / ".runtimes")
    options = parser.parse_args(arguments)
    releases = options.releases.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [] if options.no_fixtures else list(fixture_cases(folder / "fixtures"))
        if options.backend:
            cases += backend_cases(folder / "backend", options.backend)
        for given in options.model:
            paths = sorted(given.rglob("*.onnx")) if given.is_dir() else [given]
            cases += [Case("given", str(path), path) for path in paths]
        return _tried(cases, releases, options.cache)


def _tried(cases: Sequence[Case], releases: Sequence[str], cache: Path) -> int:
    said = {}
    for case in cases:
        model = model_io.load(case.path, editable=False)
        said[case] = supported(model, releases)
    counts: Counter[tuple[str, str]] = Counter()
    wrong: dict[tuple[str, str, str], list[str]] = {}
    orders = [(case.path, case.inputs) for case in cases]
    for i, release in enumerate(releases):
        python = runtimes.environment(release, cache).python
        for case, failure in zip(cases, _loads.failures(python, orders), strict=True):
            answer = said[case][i]
            told = verdict(answer, failure)
            counts[case.group, told] += 1
            if told != "right":
                reason = failure[1][-150:] if failure else answer.reasons[0].text
                wrong.setdefault((case.name, told, reason), []).append(release)
    words = ["right", "wrong: loads", "wrong: does not load", "wrong: does not run"]
    words.append("wrong: unknown")
    print(f"| models | pairs | {' | '.join(words)} |\n|---|---:|{'---:|' * len(words)}")
    for group in dict.fromkeys(case.group for case in cases):
        row = [counts[group, word] for word in words]
        models = sum(case.group == group for case in cases)
        print(f"| {models} {group} | {sum(row)} | {' | '.join(map(str, row))} |")
    print(*(f"* {' '.join(key)} [{', '.join(on)}]" for key, on in wrong.items()), sep="\n")
    return 1 if any(told == "wrong: loads" for _, told, _ in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
