"""Compare tiers of real models with their fp32 parents and with what onnxruntime's tool makes.

    tiers.py --model mini=model.onnx --data mini=samples/ --tier int8w --tier 'fp16w' --peers

Each tier is built by our command line, each peer by quantize_dynamic, in a process of its
own. All run on the same samples (.npz archives of inputs by name) in processes of their own,
so that a crash is a row like any other. For the clock all of them are open in one process
and run in turn: fp32, first peer, second peer and on, and from the start again. A speed is
the median over the rounds of the base's time by the candidate's own; above 1 is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import runtimes

from onnxforge.compare import Data, Setup
from onnxforge.compare.samples import fit, samples
from onnxforge.errors import RuntimeFailed
from onnxforge.model_io import load
from onnxforge.numerics.metrics import Accumulator, Comparison
from onnxforge.runtime.session import ArrayFile, Session, write_all
from onnxforge.walk import tensors

PARENT = "fp32"
OLDEST = "1.17"
CHILD = Path(__file__).with_name("_tier_child.py")
KEPT_REASON = 200
# From its release 1.21.1 to 1.24.4 int8 kernels for AMX give wrong results.
WRONG_ON_AMX = ("1.21.", "1.22.", "1.23.", "1.24.")

# Where MatMul is named the tool converts Gemm too, if alpha and beta are 1.
PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "ort MatMul QInt8": (("MatMul",), "QInt8"),
    "ort MatMul QUInt8": (("MatMul",), "QUInt8"),
    "ort MatMul+Conv QInt8": (("MatMul", "Conv"), "QInt8"),
    "ort MatMul+Conv QUInt8": (("MatMul", "Conv"), "QUInt8"),
    "ort MatMul+Gather QInt8": (("MatMul", "Gather"), "QInt8"),
}
PREPARATIONS = "as it is", "after quant_pre_process", "after it without symbolic shapes"

Feeds = Mapping[str, ArrayFile]


@dataclasses.dataclass
class Candidate:
    """One row of a table.

    Attributes:
        name: The pipeline, the peer, or fp32.
        path: The model.
        nbytes: Size of all its files.
        failure: Why there is nothing more to say, empty where there is.
        notes: What no column holds.
        distance: How far its float outputs are from the parent's.
        cosine: The lowest cosine of a sample.
        worst: The lowest SQNR of a sample, in dB.
        same: On how many samples all outputs that are not float are equal; empty without such.
        loads: Seconds that loading took, one for each time.
        runs: Seconds of each round.
        speeds: How many times as fast as others, by their names.
        oldest: What the oldest runtime says.
    """

    name: str
    path: Path
    nbytes: int = 0
    failure: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    distance: Comparison | None = None
    cosine: float = math.nan
    worst: float = math.nan
    same: str = ""
    loads: list[float] = dataclasses.field(default_factory=list)
    runs: list[float] = dataclasses.field(default_factory=list)
    speeds: dict[str, float] = dataclasses.field(default_factory=dict)
    oldest: str = ""


def build(name: str, source: Path, options: argparse.Namespace, folder: Path) -> Candidate:
    """Make one tier or peer in a folder of its own."""
    made = Candidate(name, folder.absolute() / "model.onnx")
    files = str(source), str(made.path)
    commands = {"": [*options.onnxforge.split(), "run", "--passes", name, *files]}
    if name in PEERS:
        op_types, weight_type = PEERS[name]
        words = [*files, weight_type, *op_types]
        commands = {way: [sys.executable, str(CHILD), way, *words] for way in PREPARATIONS}
    for way, command in commands.items():
        reason = make(command, made.path, options.timeout)
        if not reason:
            made.nbytes = sum(file.stat().st_size for file in made.path.parent.iterdir())
            return made
        made.notes.append(f"not built {way}: {reason}".replace(" :", ":"))
    made.failure = "not built"
    return made


def make(command: list[str], path: Path, timeout: float) -> str:
    """Run a command that is to write ``path``; why it did not, or an empty text."""
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir(parents=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[:KEPT_REASON]
    print(f"  {path}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return _last_words(done) if done.returncode else ""


def _last_words(done: subprocess.CompletedProcess[bytes]) -> str:
    said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    # Our command line begins with the reason, a traceback ends with it.
    ours = [line for line in said if line.startswith("onnxforge: ")]
    reason = (ours or said[-1:] or ["no message"])[0].strip()
    return f"exit {done.returncode}: {reason}"[:KEPT_REASON]


class Bench:
    """All measurements of one model."""

    def __init__(
        self, source: Path, data: Path, options: argparse.Namespace, folder: Path
    ) -> None:
        self._options = options
        self._folder = folder
        self._setup = Setup(threads=options.threads)
        model = load(source, editable=False)
        outside = (t.path for t in tensors(model) if isinstance(t, ir.ExternalTensor))
        nbytes = sum(file.stat().st_size for file in {source, *map(Path, outside)})
        self._parent = Candidate(PARENT, source, nbytes)
        self._feeds: list[Feeds] = []
        self._archives: list[Path] = []
        for sample in samples(model, Data(paths=[data])):
            prefix = f"in{len(self._feeds)}-"
            self._feeds.append(write_all(folder, prefix, fit(sample, model)))
            self._archives.append(Path(sample.name))

    def run(self, built: list[Candidate]) -> list[Candidate]:
        """Measure the parent and whatever was built; the parent comes first."""
        rows = self.judge(built)
        if alive := [row for row in rows if not row.failure]:
            self._time(alive)
        if self._options.oldest:
            self._try_oldest([row for row in rows if row.nbytes])
        return rows

    def judge(self, built: list[Candidate]) -> list[Candidate]:
        """Compare whatever was built with the parent, which comes first."""
        rows = [self._parent, *built]
        expected: list[Feeds] = []
        try:
            with self._session(self._parent) as session:
                expected = [session.run(feeds) for feeds in self._feeds]
        except RuntimeFailed as error:
            _fail(self._parent, error)
        for row in rows if expected else ():
            if not row.failure:
                self._judge(row, expected)
        return rows

    def _session(self, row: Candidate) -> Session:
        folder = self._folder / re.sub(r"\W+", "-", f"out-{row.name}")
        folder.mkdir(exist_ok=True)
        return Session(row.path, folder, self._setup)

    def _judge(self, row: Candidate, expected: Sequence[Feeds]) -> None:
        """Run a candidate on all samples and compare each with what the parent gave."""
        overall, others = Accumulator(), Others()
        each = []
        try:
            # The parent is compared with a second run of itself.
            with self._session(dataclasses.replace(row, name=f"{row.name}-again")) as session:
                for feeds, wanted in zip(self._feeds, expected, strict=True):
                    found = session.run(feeds)
                    one = Accumulator()
                    for left, right in others.floats(wanted, found):
                        one.update(left, right)
                    overall.merge(one)
                    each.append(one.result())
                    for file in found.values():
                        file.path.unlink()
        except RuntimeFailed as error:
            _fail(row, error)
            return
        row.distance = overall.result()
        row.cosine = min(found.cosine for found in each)
        row.worst = min(found.sqnr_db for found in each)
        row.same = others.same(len(expected))
        row.notes += others.notes(len(expected))
        if broken := row.distance.nonfinite_mismatches:
            row.notes.append(f"{broken} values are not finite on one side alone")

    def _time(self, rows: list[Candidate]) -> None:
        """Put rows on the clock, all in one process unless that fails or was not wanted."""
        bases = [row for row in rows if row.name in (PARENT, self._options.base)]
        rest = [row for row in rows if row not in bases]
        alone = [[*bases, row] for row in rest] or [bases]
        if self._options.pairwise or self._clock(rows):
            for group in alone:
                if reason := self._clock(group):
                    group[-1].notes.append(f"not timed: {reason}")

    def _clock(self, rows: list[Candidate]) -> str:
        """Time some candidates in one process; why that failed, or an empty text."""
        feeds = [{k: str(file.path) for k, file in one.items()} for one in self._timed()]
        order = {
            "models": [str(row.path) for row in rows],
            "feeds": feeds,
            "runs": self._options.runs,
            "threads": self._options.threads,
        }
        path = self._folder / "clock.json"
        path.write_text(json.dumps(order))
        command = [sys.executable, str(CHILD), "clock", str(path)]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            return _last_words(done)
        times = json.loads(done.stdout)
        for row, loads, runs in zip(rows, times["loads"], times["runs"], strict=True):
            row.loads, row.runs = loads, runs
        for base in (row for row in rows if row.name in (PARENT, self._options.base)):
            for row in rows:
                pairs = zip(base.runs, row.runs, strict=True)
                row.speeds[base.name] = statistics.median(a / b for a, b in pairs)
        return ""

    def _timed(self) -> list[Feeds]:
        """The samples to time: evenly chosen from the smallest to the largest."""
        sizes = [
            sum(file.path.stat().st_size for file in feeds.values()) for feeds in self._feeds
        ]
        ranked = [self._feeds[place] for place in np.argsort(sizes, kind="stable")]
        count = min(self._options.timed, len(ranked))
        return [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]

    def _try_oldest(self, rows: list[Candidate]) -> None:
        """Load and run the first sample in the environment of the oldest runtime."""
        runtime = runtimes.environment(OLDEST, runtimes.ROOT / ".runtimes")
        options = argparse.Namespace(plain=False, timeout=self._options.timeout)
        inputs = tuple(path for path in self._archives[:1] if path.suffix == ".npz")
        for row in rows:
            target = self._folder / "oldest.npz"
            found = runtimes.run_child(runtime, row.path, target, inputs, options)
            row.oldest = found.word or "runs"
            if found.word:
                row.notes.append(f"onnxruntime {runtime.version}: {found.detail}")


def _fail(row: Candidate, error: RuntimeFailed) -> None:
    row.failure = "does not run"
    row.notes.append(f"does not run: {str(error)[:KEPT_REASON]}")


class Others:
    """Pairs off the float outputs of two models, and keeps count of all that is odd."""

    def __init__(self) -> None:
        self._any = False
        self._unequal = self._reshaped = 0

    def floats(self, wanted: Feeds, found: Feeds) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The float outputs of a sample; of other shapes the part that both have."""
        equal, reshaped = True, False
        for name, file in wanted.items():
            left, right = file.open(), found[name].open()
            if not file.dtype.is_floating_point():
                self._any = True
                equal = equal and np.array_equal(left, right)
                continue
            if left.shape != right.shape:
                reshaped = True
                left, right = _overlap(left, right)
            yield left, right
        self._unequal += not equal
        self._reshaped += reshaped

    def same(self, count: int) -> str:
        """On how many of all samples the outputs that are not float are equal."""
        return f"{count - self._unequal}/{count}" if self._any else ""

    def notes(self, count: int) -> Iterator[str]:
        """What was odd in all samples."""
        if self._reshaped:
            many = f"{self._reshaped} of {count} samples"
            yield f"{many} give another shape than fp32; compared where they overlap"


def _overlap(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if left.ndim != right.ndim:
        left, right = left.reshape(-1), right.reshape(-1)
    here = tuple(slice(min(sizes)) for sizes in zip(left.shape, right.shape, strict=True))
    return left[here], right[here]


def table(rows: list[Candidate], options: argparse.Namespace) -> list[str]:
    """The markdown table of one model, and below it what no column holds."""
    heads = ["tier", "MB", "max", "mean", "p99", "SQNR dB", "cosine min"]
    heads += ["not float, same", "load s", "ms"]
    heads += [f"to {PARENT}", f"to {options.base}", *([OLDEST] if options.oldest else [])]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        nbytes = f"{row.nbytes / 1e6:.1f}" if row.nbytes else "-"
        cells = [f"`{row.name}`", nbytes]
        if row.failure:
            cells += [row.failure, *[""] * (len(heads) - 3 - int(options.oldest))]
        else:
            cells += _numbers(row, options.base)
        cells += [row.oldest] if options.oldest else []
        lines.append(f"| {' | '.join(cells)} |")
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            notes.setdefault(note, []).append(f"`{row.name}`")
    return [*lines, "", *(f"* {note} [{', '.join(names)}]" for note, names in notes.items())]


def _numbers(row: Candidate, base: str) -> list[str]:
    found = row.distance
    if found is None:
        cells = ["-"] * 6
    else:
        errors = [f"{e:.3g}" for e in (found.max_abs, found.mean_abs, found.p99_abs)]
        cells = [*errors, f"{found.sqnr_db:.1f}", f"{row.cosine:.6f}", row.same or "-"]
    times = [f"{statistics.median(row.loads):.2f}"] if row.loads else ["-"]
    times += [f"{1000 * statistics.median(row.runs):.2f}"] if row.runs else ["-"]
    speeds = [row.speeds.get(name) for name in (PARENT, base)]
    return [*cells, *times, *("-" if s is None else f"{s:.2f}" for s in speeds)]


def report(options: argparse.Namespace) -> None:
    """Build, measure and print one model after the other."""
    import onnxruntime as ort

    print(
        f"onnxruntime {ort.__version__}, {options.threads} thread(s), {platform.platform()},"
        f" {os.cpu_count()} cores; {options.runs} rounds of {options.timed} samples"
    )
    info = Path("/proc/cpuinfo")
    amx = info.exists() and "amx_int8" in info.read_text()
    if amx and ort.__version__.startswith(WRONG_ON_AMX):
        print("WARNING: this release gives wrong int8 results on this processor (AMX)")
    names = [*(PEERS if options.peers else ()), *options.tier]
    for name, path in options.model.items():
        source = Path(path).absolute()
        built = []
        for number, text in enumerate(names):
            own = options.dir / name / f"{number:02}-{re.sub(r'[^a-zA-Z0-9]+', '-', text)}"
            built.append(build(text, source, options, own))
        with tempfile.TemporaryDirectory(prefix="onnxforge-") as scratch:
            bench = Bench(source, Path(options.data[name]), options, Path(scratch))
            rows = bench.run(built)
        print("\n".join(["", f"### {name}", "", *table(rows, options)]), flush=True)


def pairs(parser: argparse.ArgumentParser, texts: list[str]) -> dict[str, str]:
    """Words of the form NAME=PATH."""
    if wrong := [text for text in texts if "=" not in text]:
        parser.error(f"{wrong[0]!r}: NAME=PATH was wanted")
    return dict(text.split("=", 1) for text in texts)


def main() -> None:
    """Read the command line, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME=PATH", required=True)
    add("--data", action="append", default=[], metavar="NAME=FOLDER", help="its .npz samples")
    add("--tier", action="append", default=[], help="a pipeline, as --passes takes it")
    add("--peers", action="store_true", help="also what onnxruntime's quantize_dynamic makes")
    add("--base", default=next(iter(PEERS)), help="the peer or tier that speeds refer to")
    add("--runs", type=int, default=20, help="rounds on the clock")
    add("--timed", type=int, default=4, help="samples in each round, from small to large")
    add("--threads", type=int, default=1, help="intra_op_num_threads")
    add("--pairwise", action="store_true", help="no more than three models open on the clock")
    add("--oldest", action="store_true", help=f"also try onnxruntime {OLDEST}")
    add("--timeout", type=float, default=600, help="seconds to build one, or to try one")
    beside = Path(sys.executable).with_name("onnxforge")
    add("--onnxforge", default=str(beside), help="the command that makes the tiers")
    add("--dir", type=Path, default=Path(tempfile.gettempdir()) / "onnxforge-tiers")
    options = parser.parse_args()
    options.model, options.data = (pairs(parser, o) for o in (options.model, options.data))
    if lacking := sorted(options.model.keys() - options.data.keys()):
        parser.error(f"no --data for the model {lacking[0]!r}")
    report(options)


if __name__ == "__main__":
    main()
