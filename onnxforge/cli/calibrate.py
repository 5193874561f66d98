"""The command that takes statistics of activations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxforge.cli.options import PATH, pair, run_options, sample_options, writable
from onnxforge.errors import DataError, OnnxforgeError
from onnxforge.text import printable

if TYPE_CHECKING:
    from onnxforge.compare.samples import Cache
    from onnxforge.numerics.calibration import Statistics

__all__ = ["calibrate"]

_SAVE_EVERY = 30.0  # seconds


@click.command()
@click.argument("model", type=PATH)
@sample_options
@click.option("-o", "--output", type=PATH, callback=writable, required=True, help="The file.")
@click.option("--merge", multiple=True, type=PATH, help="Statistics of other samples to add.")
@click.option("--resume", is_flag=True, help="Go on from what is in the output.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option(
    "--op-type",
    "op_types",
    multiple=True,
    type=click.Choice(["MatMul", "Gemm", "Conv"]),
    default=("MatMul", "Gemm"),
    show_default=True,
    help="Products to watch.",
)
@click.option("--rows", type=int, default=256, show_default=True, help="Kept of each.")
@run_options
def calibrate(
    *,
    model: Path,
    data: tuple[Path, ...],
    preprocessor: Path | None,
    seconds: float | None,
    rate: int,
    count: int,
    seed: int,
    size: tuple[str, ...],
    cache: Cache | None,
    output: Path,
    merge: tuple[Path, ...],
    resume: bool,
    force: bool,
    op_types: tuple[str, ...],
    rows: int,
    provider: tuple[str, ...],
    threads: int,
    timeout: float | None,
) -> None:
    """Run MODEL on samples and write statistics of what its products multiply.

    Ranges by channel, a histogram, and rows chosen by a hash: those of two runs merge to those
    of one over both. What is there so far is written every half a minute, for --resume.
    """
    from onnxforge.calibrate import Options
    from onnxforge.calibrate import calibrate as calibrated
    from onnxforge.compare.samples import Data
    from onnxforge.runtime.session import Setup
    from onnxforge.stats_file import read_statistics, write_statistics

    if output.exists() and not (force or resume):
        raise OnnxforgeError(f"{output}: is there already; --resume goes on, --force replaces")
    known = read_statistics(output) if resume and output.exists() else None
    others = [(path, read_statistics(path)) for path in merge]
    sizes = dict(pair("--size", text) for text in size)
    samples = Data(data, preprocessor, seconds, rate, count, seed, sizes, cache)
    saved = time.monotonic()

    def progress(done: int, found: Statistics) -> None:
        nonlocal saved
        if time.monotonic() - saved > _SAVE_EVERY:
            write_statistics(found, output)
            saved = time.monotonic()

    options = Options(
        Setup(provider or Setup.providers, threads, timeout=timeout), op_types, rows
    )
    found = calibrated(model, samples, options, known=known, progress=progress)
    _merge(found, others)
    write_statistics(found, output)
    click.echo("\n".join(map(printable, _told(model, output, found))))


def _merge(found: Statistics, others: Sequence[tuple[Path, Statistics]]) -> None:
    for path, other in others:
        try:
            found.merge(other)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def _told(model: Path, output: Path, found: Statistics) -> list[str]:
    widest = max(
        found.activations.items(), key=lambda item: max(map(abs, item[1].range("minmax")))
    )
    low, high = widest[1].range("minmax")
    return [
        f"{model} -> {output}",
        f"  {len(found.samples)} samples, {len(found.activations)} activations,"
        f" {sum(stats.count for stats in found.activations.values()):,} rows",
        f"  widest: {widest[0]}, {low:.4g} to {high:.4g}",
    ]
