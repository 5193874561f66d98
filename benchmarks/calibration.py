"""Whether calibration stays in its memory, and whether statistics of parts add up exactly.

    calibration.py MODEL.onnx SAMPLES/ --samples 200

Runs a model on many samples of differing length, cut from the given ones, and prints what
memory this process and those that it started hold: it has to be flat. Then it takes statistics
of the given samples at once and in two parts, and merges these in both orders: the files have
to be equal, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onnxforge.calibrate import calibrate
from onnxforge.compare import Data
from onnxforge.compare.samples import Sample, samples
from onnxforge.model_io import load
from onnxforge.numerics.calibration import Statistics
from onnxforge.stats_file import write_statistics

LINES = 20


def shortened(given: list[Sample], axis: int, count: int) -> Iterator[Sample]:
    """So many samples, each a given one from some place on to another."""
    rng = np.random.default_rng(0)
    for number in range(count):
        sample = given[number % len(given)]
        longest = max(
            array.shape[axis] for array in sample.feeds.values() if array.ndim > axis
        )
        stop = int(rng.integers(longest // 2, longest, endpoint=True))
        start = int(rng.integers(0, longest // 4, endpoint=True))
        feeds = {
            name: array[(slice(None),) * axis + (slice(start, stop),)]
            if array.ndim > axis and array.shape[axis] == longest
            else array
            for name, array in sample.feeds.items()
        }
        yield Sample(f"{sample.name} {number}", feeds)


def memory() -> tuple[float, float]:
    """MB that this process holds, and all that it started."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    return _resident(own), sum(_resident(int(child)) for child in children)


def _resident(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


def watch(model: Path, given: list[Sample], options: argparse.Namespace) -> None:
    """Calibrate on many samples, and print what memory that takes."""
    every = max(1, options.samples // LINES)
    print("| samples | rows | driver, MB | runtime, MB |\n|---:|---:|---:|---:|")

    def progress(done: int, found: Statistics) -> None:
        if done == 1 or done % every == 0:
            driver, runtime = memory()
            rows = sum(stats.count for stats in found.activations.values())
            print(f"| {done} | {rows:,} | {driver:.0f} | {runtime:.0f} |", flush=True)

    calibrate(model, shortened(given, options.axis, options.samples), progress=progress)


def merged(model: Path, given: list[Sample]) -> bool:
    """Whether parts add up to the whole, in any order."""
    parts = given[::2], given[1::2]
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
        paths = [Path(folder, name) for name in ("whole", "forth", "back", "half")]
        write_statistics(calibrate(model, given), paths[0])
        for path, (first, second) in zip(paths[1:3], (parts, parts[::-1]), strict=True):
            found = calibrate(model, first)
            found.merge(calibrate(model, second))
            write_statistics(found, path)
        write_statistics(calibrate(model, parts[0]), paths[3])
        whole, forth, back, half = (path.read_bytes() for path in paths)
    if whole == half:
        raise SystemExit("half of the samples give the statistics of all: this tells nothing")
    print(
        f"\n{len(parts[0])} and {len(parts[1])} samples, {len(whole):,} bytes of statistics:"
    )
    for word, found_bytes in (("first + second", forth), ("second + first", back)):
        print(f"  {word}: {'equal to all at once' if found_bytes == whole else 'DIFFERS'}")
    return forth == back == whole


def main() -> int:
    """Read the command line, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="a folder of .npz samples")
    parser.add_argument("--samples", type=int, default=200, help="to run for their memory")
    parser.add_argument("--axis", type=int, default=1, help="along which lengths differ")
    options = parser.parse_args()
    model = load(options.model, editable=False)
    given = list(samples(model, Data(paths=[options.data])))
    watch(options.model, given, options)
    return 0 if merged(options.model, given) else 1


if __name__ == "__main__":
    raise SystemExit(main())
