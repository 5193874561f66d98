"""Compare half-precision tiers of real models with those that other tools make.

    halves.py --model mini=model.onnx --data mini=samples/ --tier fp16 --peers

Each tier is made by our command line, each peer in a process of its own. A model is checked
and loaded as it is, on the installed onnxruntime and on the oldest one; then it is emulated:
a processor computes float16 in float32, which flatters a tier, and bfloat16 not at all. The
samples are .npz archives of inputs by name. A row says what the checker, the two runtimes and
the emulation make of a tier.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import runtimes
import tiers

from onnxforge.compare import Data, Evidence, Options, Setup, compare
from onnxforge.errors import OnnxforgeError, RuntimeFailed
from onnxforge.runtime.session import Session

OLDEST = "1.17"
PEERS = ("onnxconverter-common", "onnxruntime.transformers")
KEPT_REASON = 160

# What a peer runs: its module, and the options beside keep_io_types.
PEER = """
import sys, onnx
from {module} import convert_float_to_float16
model = onnx.load(sys.argv[1])
onnx.save(convert_float_to_float16(model, keep_io_types=True), sys.argv[2])
"""
MODULES = {
    "onnxconverter-common": "onnxconverter_common.float16",
    "onnxruntime.transformers": "onnxruntime.transformers.float16",
}


@dataclasses.dataclass
class Row:
    """What is found of one tier.

    Attributes:
        name: The pipeline, or the peer.
        path: The model.
        cells: What stands in the columns, by their heads.
        notes: Reasons, which no column holds.
    """

    name: str
    path: Path
    cells: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


HEADS = (
    "MB",
    "checker",
    "newest",
    OLDEST,
    "finite",
    "SQNR dB",
    "median",
    "worst",
    "cosine min",
)


def make(name: str, source: Path, options: argparse.Namespace, folder: Path) -> Row:
    """Make one tier, in a folder of its own."""
    row = Row(name, folder / "model.onnx")
    folder.mkdir(parents=True, exist_ok=True)
    row.path.unlink(missing_ok=True)
    command = [*options.onnxforge.split(), "run", "--passes", name]
    if name in PEERS:
        command = [sys.executable, "-c", PEER.format(module=MODULES[name])]
    done = subprocess.run(
        [*command, str(source), str(row.path)], capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        row.notes.append(f"not made: {said[-1][:KEPT_REASON]}")
    else:
        row.cells["MB"] = f"{row.path.stat().st_size / 1e6:.1f}"
    return row


def check(row: Row) -> None:
    """Whether onnx accepts the model: valid types, and nodes in order."""
    try:
        onnx.checker.check_model(str(row.path), full_check=True)
        row.cells["checker"] = "ok"
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        text = " ".join(str(error).split())
        row.cells["checker"] = "not sorted" if "topological" in text else "no"
        row.notes.append(f"checker: {text[:KEPT_REASON]}")


def try_to_load(row: Row, head: str, setup: Setup) -> None:
    """Whether a release loads the model as it is."""
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
        try:
            with Session(row.path, Path(folder), setup):
                row.cells[head] = "loads"
        except RuntimeFailed as error:
            row.cells[head] = "no"
            row.notes.append(f"{head}: {str(error)[:KEPT_REASON]}")


def judge(row: Row, source: Path, data: Path, setup: Setup) -> None:
    """Emulate the model on all samples."""
    try:
        found = compare(source, row.path, Data([data]), Options(setup))
    except OnnxforgeError as error:
        row.cells["finite"] = "not emulated"
        row.notes.append(f"emulation: {str(error)[:KEPT_REASON]}")
        return
    if found.candidate.failure:
        row.cells["finite"] = "does not run"
        row.notes.append(f"emulation: {found.candidate.failure[:KEPT_REASON]}")
        return
    row.cells |= numbers(found)


def numbers(found: Evidence) -> dict[str, str]:
    """The cells of a comparison, over all outputs that are real numbers."""
    real = [o for o in found.outputs if "FLOAT" in o.types[0]]
    broken = sum(o.overall.nan_candidate + o.overall.inf_candidate for o in found.outputs)
    worst = min(o.sqnr_min for o in real)
    samples = ([sample.comparison.sqnr_db for sample in o.samples] for o in real)
    return {
        "finite": "yes" if not broken else f"no, {broken} values",
        "SQNR dB": f"{min(o.overall.sqnr_db for o in real):.1f}",
        "median": f"{min(map(statistics.median, samples)):.1f}",
        "worst": "-inf" if math.isinf(worst) and worst < 0 else f"{worst:.1f}",
        "cosine min": f"{min(o.cosine_min for o in real):.6f}",
    }


def table(rows: list[Row]) -> list[str]:
    """The markdown table of one model, and below it the reasons."""
    lines = [f"| {' | '.join(['tier', *HEADS])} |", "|---|" + "---:|" * len(HEADS)]
    for row in rows:
        cells = [f"`{row.name}`", *(row.cells.get(head, "-") for head in HEADS)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *(f"* `{row.name}`: {note}" for row in rows for note in row.notes)]


def main() -> None:
    """Read the command line, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME=PATH", required=True)
    add("--data", action="append", default=[], metavar="NAME=FOLDER", help="its .npz samples")
    add("--tier", action="append", default=[], help="a pipeline, as --passes takes it")
    add("--peers", action="store_true", help="also what other tools make")
    add("--timeout", type=float, default=600, help="seconds to load a model, or run it once")
    beside = Path(sys.executable).with_name("onnxforge")
    add("--onnxforge", default=str(beside), help="the command that makes the tiers")
    add("--dir", type=Path, default=Path(tempfile.gettempdir()) / "onnxforge-halves")
    options = parser.parse_args()
    models, data = tiers.pairs(parser, options.model), tiers.pairs(parser, options.data)
    if lacking := sorted(models.keys() - data.keys()):
        parser.error(f"no --data for the model {lacking[0]!r}")
    oldest = runtimes.environment(OLDEST, runtimes.ROOT / ".runtimes")
    newest = Setup(timeout=options.timeout)
    for name, path in models.items():
        source = Path(path).absolute()
        rows = []
        for number, text in enumerate([*(PEERS if options.peers else ()), *options.tier]):
            row = make(text, source, options, options.dir / name / f"{number:02}")
            rows.append(row)
            if not row.path.exists():
                continue
            check(row)
            try_to_load(row, "newest", newest)
            old = Setup(python=str(oldest.python), timeout=options.timeout)
            try_to_load(row, OLDEST, old)
            judge(row, source, Path(data[name]), newest)
        print("\n".join(["", f"### {name}", "", *table(rows)]), flush=True)


if __name__ == "__main__":
    main()
