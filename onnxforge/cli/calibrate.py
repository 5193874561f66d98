"""The command that takes statistics of activations."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxforge.cli.options import PATH, run_options, sample_options, writable
from onnxforge.errors import DataError, OnnxforgeError
from onnxforge.progress import counted
from onnxforge.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxforge.compare.samples import Data
    from onnxforge.numerics.calibration import Statistics
    from onnxforge.runtime.session import Setup

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
    samples: Data,
    output: Path,
    merge: tuple[Path, ...],
    resume: bool,
    force: bool,
    op_types: tuple[str, ...],
    rows: int,
    setup: Setup,
) -> None:
    """Run MODEL on samples and write statistics for smoothquant.

    Of what each product multiplies: ranges by channel, a histogram, and rows chosen by a hash.
    Those of two runs merge to those of one over both; a sample that comes twice counts once.
    What is there so far is written every half a minute, for --resume.
    """
    from onnxforge.calibrate import Options
    from onnxforge.calibrate import calibrate as calibrated
    from onnxforge.stats_file import write_statistics

    if output.exists() and model.exists() and output.samefile(model):
        raise OnnxforgeError(f"{output}: is the model")
    if output.exists() and not (force or resume):
        raise OnnxforgeError(f"{output}: is there already; --resume goes on, --force replaces")
    known = _merged([*([output] if resume and output.exists() else []), *merge])
    saved = time.monotonic()

    def progress(done: int, found: Statistics) -> None:
        nonlocal saved
        show(done)
        if time.monotonic() - saved > _SAVE_EVERY:
            write_statistics(found, output)
            saved = time.monotonic()

    options = Options(setup, op_types, rows)
    with counted(model.name, "samples") as show:
        found = calibrated(model, samples, options, known=known, progress=progress)
    write_statistics(found, output)
    click.echo("\n".join(map(printable, _told(model, output, found))))


def _merged(paths: Sequence[Path]) -> Statistics | None:
    """What is in files together."""
    from onnxforge.stats_file import read_statistics

    found: Statistics | None = None
    for path in paths:
        other = read_statistics(path)
        if found is None:
            found = other
            continue
        try:
            found.merge(other)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    return found


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
