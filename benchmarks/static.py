"""Set static int8 of ours beside what other tools make, on samples that no tool has seen.

    static.py --model mini=model.onnx --calibrate mini=some/ --data mini=others/ --peers

Tools that quantize by fixed ranges are calibrated on one folder of samples and measured on
another, and on the first as well. Beside ours stand, with --peers, onnxruntime's
quantize_static in QDQ format by each of its methods, its quantize_dynamic, and the SmoothQuant
of onnx-neural-compressor, in an environment of its own. All quantize MatMul and Gemm only, per
channel, and activations as uint8; ours as int8 too. "Both exclusions" leaves products of two
activations alone and quantizes no output of a product: by itself onnxruntime's does both.

What a tool cannot read is prepared for it and said below the table: samples made equally long
by zeros, opset 17 where QDQ has no scale for each channel, and quant_pre_process. With --equal
all tools are given samples of one length: what a model has seen of long ones decides how much
it clips of others. What was built stays in --dir.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _static_child
import numpy as np
import onnx
import runtimes
import tiers
from onnx import version_converter

from onnxforge.compare import Data
from onnxforge.compare.samples import samples
from onnxforge.model_io import load
from onnxforge.numerics.calibration import sample_key

CHILD = Path(__file__).with_name("_static_child.py")
COMPRESSOR = "onnx-neural-compressor"
# What it imports and does not declare comes last.
NEEDS = [f"{COMPRESSOR}==1.0", "numpy<2", "scipy", "prettytable"]
QDQ_OPSET, RAISED = 13, 17
DYNAMIC = "ort MatMul QInt8"
PLAIN, EXCLUDED = "ort minmax", "ort minmax, both exclusions"
BASES = tiers.PARENT, PLAIN, EXCLUDED
STATS = "@"  # in a pipeline: where statistics go

Order = Mapping[str, Any]


def _peers() -> dict[str, Order]:
    """What other tools are asked for, by name of the row."""
    found: dict[str, Order] = {}
    for method, excluded in itertools.product(("MinMax", "Percentile", "Entropy"), (0, 1)):
        order = {"job": "ort", "method": method, "excluded": bool(excluded), "options": {}}
        name = f"ort {method.lower()}{', both exclusions' if excluded else ''}"
        found[name] = order
        if not excluded:
            constant = {"MatMulConstBOnly": True}
            found[f"{name}, MatMulConstBOnly"] = {**order, "options": constant}
    for alpha, fold, excluded in (
        (0.5, True, True),
        (0.5, False, True),
        ("auto", True, True),
        ("auto", False, True),
        (0.5, False, False),
    ):
        options = {"SmoothQuantAlpha": alpha, "SmoothQuantFolding": fold}
        words = "folded" if fold else "not folded", "both exclusions" if excluded else "plain"
        name = f"onc smoothquant {alpha}, {', '.join(words)}"
        found[name] = {"job": "onc", "excluded": excluded, "options": options}
    return found


def _ours() -> list[str]:
    """Pipelines of ours."""
    grid = itertools.product(
        ("0.5", "auto"), ("real", "pow2"), ("qdq", "integer"), ("uint8", "int8")
    )
    return [
        "dynamic-int8",
        *(
            f"smoothquant{{stats={STATS} alpha={a} scales={s} format={f} activations={x}}}"
            for a, s, f, x in grid
        ),
    ]


PEERS = _peers()


class Folder:
    """The models made of one model, with all that making them needs."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self._options = options
        self.source = Path(options.model[name]).absolute()
        self.held_out = Path(options.data[name]).absolute()
        self._home = (options.dir / name).absolute()
        self._home.mkdir(parents=True, exist_ok=True)
        self._stats: dict[Path, Path] = {}
        given = Path(options.calibrate[name]).absolute()
        self._is_equal = name in options.equal
        how = options.equal.get(name, "")
        self.calibration = self._equalled(given, how) if how else given

    def build(self, text: str) -> tiers.Candidate:
        """Make what a row of the table is about."""
        own = self._home / re.sub(r"[^a-zA-Z0-9.]+", "-", text).strip("-")
        if self._options.reuse and (own / "model.onnx").exists():
            made = tiers.Candidate(text.replace(f"stats={STATS} ", ""), own / "model.onnx")
            made.nbytes = sum(file.stat().st_size for file in own.iterdir())
            return made
        if text in tiers.PEERS:
            return tiers.build(text, self.source, self._options, own)
        if text in PEERS:
            return self._peer(text, own)
        source = self._raised() if "format=qdq" in text else self.source
        pipeline = text
        if STATS in text:
            pipeline = text.replace(f"stats={STATS}", f"stats={self._statistics(source)}")
        made = tiers.build(pipeline, source, self._options, own)
        made.name = text.replace(f"stats={STATS} ", "")
        return made

    def _peer(self, name: str, own: Path) -> tiers.Candidate:
        """Let another tool make a model, by the first way that it takes."""
        made = tiers.Candidate(name, own / "model.onnx")
        order = {
            **PEERS[name],
            "source": str(self._raised()),
            "target": str(made.path),
            "samples": [str(path) for path in sorted(self.calibration.glob("*.npz"))],
        }
        python = sys.executable
        prepared = ("", "full", "plain")
        lengths = ("",) if self._is_equal else ("", "pad")
        if order["job"] == "onc":
            cache = self._options.cache
            python = str(runtimes.environment(COMPRESSOR, cache, NEEDS).python)
            prepared, lengths = ("",), lengths[-1:]
        for way, equal in itertools.product(prepared, lengths):
            path = self._home / "order.json"
            path.write_text(json.dumps({**order, "prepared": way, "equal": equal}))
            command = [python, str(CHILD), str(path)]
            reason = tiers.make(command, made.path, self._options.timeout)
            words = ["after quant_pre_process" + " without symbolic shapes" * (way == "plain")]
            words = [*words[: bool(way)], *["samples equally long"][: bool(equal)]]
            how = ", ".join(words) or "as it is"
            if not reason:
                made.nbytes = sum(file.stat().st_size for file in own.iterdir())
                made.notes += [how] if words else []
                return made
            made.notes.append(f"not built {how}: {reason}")
        made.failure = "not built"
        return made

    def _equalled(self, given: Path, how: str) -> Path:
        """The same samples, equally long."""
        folder = self._home / "equal"
        folder.mkdir(exist_ok=True)
        paths = sorted(given.glob("*.npz"))
        for path, sample in zip(paths, _static_child.read(paths, how), strict=True):
            np.savez(folder / path.name, **sample)
        return folder

    def _raised(self) -> Path:
        """The model at an opset that has QDQ for each channel."""
        model = onnx.load(self.source, load_external_data=False)
        if all(one.version >= QDQ_OPSET for one in model.opset_import if not one.domain):
            return self.source
        path = self._home / f"opset{RAISED}.onnx"
        if not path.exists():
            model = onnx.load(self.source)
            onnx.save(version_converter.convert_version(model, RAISED), path)
        return path

    def _statistics(self, source: Path) -> Path:
        """Statistics of a model on the samples, taken once."""
        if source not in self._stats:
            path = self._home / f"{source.stem}.safetensors"
            command = [*self._options.onnxforge.split(), "calibrate", str(source), "--force"]
            command += ["--data", str(self.calibration), "-o", str(path)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            self._stats[source] = path
        return self._stats[source]


@dataclasses.dataclass
class Row:
    """A model and what was found.

    Attributes:
        made: The model, with how far it is from fp32 on samples that no tool has seen.
        seen: The same on those that tools were calibrated on.
        products: Products in the optimized graph, by operator.
    """

    made: tiers.Candidate
    seen: tiers.Candidate
    products: dict[str, int]


def measure(
    folder: Folder, built: list[tiers.Candidate], options: argparse.Namespace
) -> list[Row]:
    """Compare models with fp32 on both sets of samples, and run all of them in turn."""
    copies = [dataclasses.replace(one, notes=[]) for one in built]
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as scratch:
        bench = tiers.Bench(folder.source, folder.calibration, options, Path(scratch))
        seen = bench.judge(copies)
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as scratch:
        bench = tiers.Bench(folder.source, folder.held_out, options, Path(scratch))
        found = bench.run(built)
        alive = [row for row in found if not row.failure]
        counts = iter(_executed([row.path for row in alive], Path(scratch)))
    rows = [
        Row(one, other, {} if one.failure else next(counts))
        for one, other in zip(found, seen, strict=True)
    ]
    for base in (row.made for row in rows if row.made.name in BASES and row.made.runs):
        for row in (row.made for row in rows if row.made.runs):
            pairs = zip(base.runs, row.runs, strict=True)
            row.speeds[base.name] = statistics.median(a / b for a, b in pairs)
    return rows


def _executed(models: Sequence[Path], scratch: Path) -> list[dict[str, int]]:
    order = scratch / "order.json"
    order.write_text(json.dumps({"job": "executed", "models": [*map(str, models)]}))
    done = subprocess.run(
        [sys.executable, str(CHILD), str(order)], check=True, stdout=subprocess.PIPE
    )
    found: list[dict[str, int]] = json.loads(done.stdout)
    return found


def table(rows: list[Row]) -> Iterator[str]:
    """The markdown table, and below it what no column holds."""
    heads = ["tier", "MB", "integer products", "SQNR dB", "worst", "cosine", "worst"]
    heads += ["not float, same"]
    heads += ["seen: SQNR dB", "worst", "cosine", "ms", "to fp32"]
    heads += ["to ort plain", "to ort excluding"]
    yield f"| {' | '.join(heads)} |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    notes: dict[str, list[str]] = {}
    for row in rows:
        made = row.made
        for note in made.notes:
            notes.setdefault(note, []).append(f"`{made.name}`")
        cells = [f"`{made.name}`", f"{made.nbytes / 1e6:.1f}" if made.nbytes else "-"]
        cells += [made.failure, *[""] * (len(heads) - 3)] if made.failure else _cells(row)
        yield f"| {' | '.join(cells)} |"
    yield ""
    for note, names in notes.items():
        yield f"* {note} [{', '.join(names)}]"


def _cells(row: Row) -> list[str]:
    made, seen = row.made, row.seen
    integers = sum(n for kind, n in row.products.items() if kind not in _static_child.FLOAT)
    cells = [f"{integers} of {sum(row.products.values())}"]
    assert made.distance is not None, "it did not fail"
    cells += [f"{made.distance.sqnr_db:.2f}", f"{made.worst:.2f}"]
    cells += [f"{made.distance.cosine:.5f}", f"{made.cosine:.5f}", made.same or "-"]
    if seen.distance is None:
        cells += ["-"] * 3
    else:
        cells += [f"{seen.distance.sqnr_db:.2f}", f"{seen.worst:.2f}"]
        cells += [f"{seen.distance.cosine:.5f}"]
    cells += [f"{1000 * statistics.median(made.runs):.2f}" if made.runs else "-"]
    speeds = (made.speeds.get(name) for name in BASES)
    return [*cells, *("-" if speed is None else f"{speed:.2f}" for speed in speeds)]


def _keys(folder: Folder, data: Path) -> dict[int, str]:
    model = load(folder.source, editable=False)
    return {sample_key(one.feeds): one.name for one in samples(model, Data(paths=[data]))}


def _sizes(folder: Folder) -> str:
    """How many samples there are; none may be in both sets."""
    seen, held_out = _keys(folder, folder.calibration), _keys(folder, folder.held_out)
    if both := seen.keys() & held_out.keys():
        raise SystemExit(f"{held_out[both.pop()]}: is a sample of calibration as well")
    return f"calibrated on {len(seen)} samples, measured on {len(held_out)} others"


def report(options: argparse.Namespace) -> None:
    """Build, measure and print one model after the other."""
    import onnxruntime as ort

    print(
        f"onnxruntime {ort.__version__}, {options.threads} thread(s), {platform.platform()},"
        f" {os.cpu_count()} cores; {options.runs} rounds of {options.timed} sample(s)"
    )
    names = [DYNAMIC, *PEERS] if options.peers else []
    names = [name for name in names if re.search(options.only, name)]
    names += options.tier or [one for one in _ours() if re.search(options.only, one)]
    told: dict[str, Any] = {}
    for name in options.model:
        folder = Folder(name, options)
        sizes = _sizes(folder)
        rows = measure(folder, [folder.build(text) for text in names], options)
        print("\n".join(["", f"### {name}: {sizes}", "", *table(rows)]), flush=True)
        told[name] = {"samples": sizes, "rows": [dataclasses.asdict(row) for row in rows]}
    if options.json:
        options.json.write_text(json.dumps(told, indent=1, default=str))


def settle(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read a command line, with the options that building and measuring need."""
    add = parser.add_argument
    add("--threads", type=int, default=1, help="intra_op_num_threads")
    add("--timeout", type=float, default=1800, help="seconds to build one")
    beside = Path(sys.executable).with_name("onnxforge")
    add("--onnxforge", default=str(beside), help="the command that makes the tiers")
    add("--cache", type=Path, default=runtimes.ROOT / ".runtimes", help="for environments")
    options = parser.parse_args()
    options.base, options.pairwise, options.oldest = PLAIN, False, False
    return options


def main() -> None:
    """Read the command line, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME=PATH", required=True)
    add("--calibrate", action="append", default=[], metavar="NAME=FOLDER", help=".npz samples")
    add(
        "--data", action="append", default=[], metavar="NAME=FOLDER", help="others, to measure"
    )
    add(
        "--equal",
        action="append",
        default=[],
        metavar="NAME=pad|wrap",
        help="one length for all: zeros, or samples again",
    )
    add(
        "--tier",
        action="append",
        default=[],
        help="in place of all of ours; @ is the statistics",
    )
    add("--only", default="", help="a pattern for names of rows")
    add("--peers", action="store_true", help="also what other tools make")
    add("--runs", type=int, default=20, help="rounds on the clock")
    add("--timed", type=int, default=1, help="samples in each round, from small to large")
    add("--json", type=Path, help="where to write all that was found")
    add("--reuse", action="store_true", help="what is in --dir is not built again")
    add("--dir", type=Path, default=Path(tempfile.gettempdir()) / "onnxforge-static")
    options = settle(parser)
    for word in ("model", "calibrate", "data", "equal"):
        setattr(options, word, tiers.pairs(parser, getattr(options, word)))
    for word in ("calibrate", "data"):
        if lacking := sorted(options.model.keys() - getattr(options, word).keys()):
            parser.error(f"no --{word} for the model {lacking[0]!r}")
    report(options)


if __name__ == "__main__":
    main()
