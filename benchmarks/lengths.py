"""How int8 keeps its accuracy as inputs grow longer: a table, and with --plot a drawing.

    lengths.py --plot lengths.svg

The model is the fixture `outlier_encoder`, whose activations have channels far wider than the
others, the wider the longer the input. Tools with fixed ranges are calibrated on inputs of all
lengths, and all are measured on others. Where a range is taken of the input itself, one scale
has to suit a whole input: the longer that is, the coarser it gets for most of its frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import runtimes
import static
import tiers

FIXTURE = "outlier_encoder"
TIMES = 1, 4, 16
SAMPLES = 4  # of each length, to calibrate and to measure
STATIC = static.PLAIN, static.EXCLUDED
SMOOTHED = [
    f"smoothquant{{stats={static.STATS} alpha={alpha}}}" for alpha in ("0", "0.5", "auto")
]
# What each line of the drawing is about.
DRAWN = {
    "dynamic-int8": "dynamic, a scale for a whole input",
    static.EXCLUDED: "static, minmax",
    "smoothquant{alpha=0.5}": "smoothquant, alpha 0.5",
    "smoothquant{alpha=auto}": "smoothquant, alpha auto",
}


def write(folder: Path, frames: Sequence[int], key: str) -> Path:
    """Samples of some lengths as archives; another key, other samples."""
    made = importlib.import_module("_outliers")  # beside fixtures/build.py
    folder.mkdir()
    for count in frames:
        for number in range(SAMPLES):
            np.savez(
                folder / f"{count:05}-{number}.npz", **made.sample(count, f"/{key}{number}")
            )
    return folder


def measured(home: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """The SQNR at each length, by name of the row."""
    build = runtimes.module(runtimes.ROOT / "fixtures/build.py")
    source = build.write(FIXTURE, home)
    options.model, options.equal = {FIXTURE: source}, {}
    options.calibrate = {FIXTURE: write(home / "calibrate", options.frames, "seen")}
    options.data, options.dir, options.reuse = options.calibrate, home / "built", False
    folder = static.Folder(FIXTURE, options)
    built = [
        folder.build(name) for name in (static.DYNAMIC, "dynamic-int8", *STATIC, *SMOOTHED)
    ]
    found: dict[str, list[float]] = {row.name: [] for row in built}
    for count in options.frames:
        data = write(home / f"{count}", [count], "held out")
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            bench = tiers.Bench(source, data, options, Path(scratch))
            rows = bench.judge([dataclasses.replace(row) for row in built])
        for row in rows[1:]:
            if row.distance is None:
                raise SystemExit(f"{row.name}: {row.failure}: {'; '.join(row.notes)}")
            found[row.name].append(row.distance.sqnr_db)
    return found


def draw(found: dict[str, list[float]], frames: Sequence[int], path: Path) -> None:
    """Draw SQNR along the length of inputs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes: Any = figure.add_subplot()
    for (name, label), marker in zip(DRAWN.items(), "osD^", strict=True):
        axes.plot(frames, found[name], marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(frames, [f"{count}" for count in frames])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("frames of the input")
    axes.set_ylabel("SQNR, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Read the command line, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="an image to write: .svg, .png or .pdf")
    parser.add_argument(
        "--shortest", type=int, default=32, help="frames of the shortest input"
    )
    options = static.settle(parser)
    options.frames = [options.shortest * times for times in TIMES]
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as home:
        found = measured(Path(home), options)
    print(f"| SQNR in dB, at frames | {' | '.join(map(str, options.frames))} |")
    print("|---|" + "---:|" * len(options.frames))
    for name, values in found.items():
        print(f"| `{name}` | {' | '.join(f'{value:.1f}' for value in values)} |")
    if options.plot:
        draw(found, options.frames, options.plot)


if __name__ == "__main__":
    main()
