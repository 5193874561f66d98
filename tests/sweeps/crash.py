"""Kills commands at random moments: `tests/sweeps/crash.py --times 200`.

Two models take turns in overwriting each other's result, and each run gets a SIGKILL: every
other one at any moment, every other one after its first file has appeared. What is then found
under the name is read by onnx alone, and has to be the result from before or the new one, bit
for bit. Exits with 1 if it ever is neither, or if a run that is not killed does not succeed.
Options that are not listed go to `onnxforge run`.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import trouble

NAME = "model.onnx"


class Place:
    """Where the results of two models overwrite each other."""

    def __init__(self, folder: Path, options: Sequence[str], weights: int) -> None:
        self.options = options
        self.out = folder / "out"
        self.out.mkdir()
        self.sources = [folder / "0.onnx", folder / "1.onnx"]
        for i, source in enumerate(self.sources):
            trouble.write_model(source, seed=i, weights=weights + i * weights // 2)
        self.results: list[bytes] = []

    def started(self, i: int) -> subprocess.Popen[str]:
        """Start a run on a model."""
        words = ["run", "--force", *self.options, self.sources[i], self.out / NAME]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([*trouble.COMMAND, *words], text=True, **pipes)

    def names(self) -> set[str]:
        return {path.name for path in self.out.iterdir()}

    def content(self) -> bytes:
        return trouble.whole(self.out / NAME)

    def temporary(self) -> list[int]:
        """Sizes of the temporary files that nothing reads."""
        read = trouble.data_files(self.out / NAME)
        left = [name for name in self.names() - read if name.startswith(".")]
        return [(self.out / name).stat().st_size for name in left]


def wait_for_a_file(place: Place, process: subprocess.Popen[str], before: set[str]) -> None:
    while place.names() <= before and process.poll() is None:
        time.sleep(0.0002)


def was_killed(process: subprocess.Popen[str]) -> bool:
    _, error = process.communicate()
    if process.returncode > 0:
        raise RuntimeError(f"exit code {process.returncode}: {error}")
    return process.returncode < 0


def undisturbed(place: Place, i: int) -> tuple[float, float]:
    """Run to the end; return how many seconds that took, and how many after the first file."""
    start, before = time.perf_counter(), place.names()
    process = place.started(i)
    wait_for_a_file(place, process, before)
    writes = time.perf_counter()
    was_killed(process)
    return time.perf_counter() - start, time.perf_counter() - writes


def found(place: Place, old: int, *, killed: bool) -> str:
    """What is there after the run that was to replace an old result."""
    try:
        content = place.content()
    except Exception as error:
        return f"broken: {error}"
    if content == place.results[1 - old]:
        return "the new result"
    return (
        "the old result" if killed and content == place.results[old] else "broken: no result"
    )


def sweep(place: Place, times: int, rng: random.Random) -> Counter[str]:
    """Overwrite and kill; return how often what became of it."""
    for i in (0, 1):
        seconds, writing = undisturbed(place, i)
        place.results.append(place.content())
    counts: Counter[str] = Counter()
    old = 1
    for turn in range(times):
        before = place.names()
        process = place.started(1 - old)
        if turn % 2:
            wait_for_a_file(place, process, before)
        time.sleep(rng.uniform(0, writing if turn % 2 else seconds))
        process.kill()
        killed = was_killed(process)
        what = found(place, old, killed=killed)
        wrote = place.names() != before or what == "the new result"
        when = (
            f"killed {'while' if wrote else 'before'} it wrote" if killed else "ended before"
        )
        counts[f"{when}, {what}"] += 1
        if what != "the old result":
            old = 1 - old
        if what.startswith("broken"):
            undisturbed(place, old)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=200, help="how many kills")
    parser.add_argument("--weights", type=int, default=8, help="of 1 MB in the smaller model")
    parser.add_argument("--seed", type=int, default=0)
    given, options = parser.parse_known_args()
    options = options or ["--passes", "fp16w", "--layout", "sidecar"]
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), options, given.weights)
        counts = sweep(place, given.times, random.Random(given.seed))
        left = place.temporary()
        undisturbed(place, 0)
        undisturbed(place, 1)
        counts["undisturbed at the end, " + found(place, 0, killed=False)] += 1
        lines = [f"{count:5} {what}" for what, count in sorted(counts.items())]
        lines.append(f"{len(left):5} temporary files were left, {sum(left) / 1e6:.1f} MB")
        lines.append(f"{len(place.temporary()):5} of them after two more runs")
    broken = sum(count for what, count in counts.items() if "broken" in what)
    sys.stdout.write("\n".join([*lines, f"{broken:5} broken", ""]))
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
