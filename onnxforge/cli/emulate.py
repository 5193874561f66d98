"""The command that shows a half-precision tier on any processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxforge.cli.options import FORMAT, PATH, run_options, sample_options
from onnxforge.errors import Refused, about
from onnxforge.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxforge.compare.samples import Data
    from onnxforge.exposure import Strain
    from onnxforge.runtime.session import Setup

__all__ = ["emulate"]


@click.command()
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option("--passes", default="", metavar="PIPELINE", help="Passes that make the tier.")
@sample_options
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@run_options
@FORMAT
def emulate(
    *,
    source: Path,
    target: Path,
    passes: str,
    samples: Data,
    force: bool,
    setup: Setup,
    style: str,
) -> None:
    """Write a float32 model that rounds as a half-precision tier.

    It runs anywhere. The tier is what --passes make of SOURCE; without them it is SOURCE. With
    samples, values that the half type does not hold are named, and the option that keeps them
    float32.
    """
    from onnxforge.compare.samples import samples as drawn
    from onnxforge.emulation import emulate as emulated
    from onnxforge.exposure import makers, strains
    from onnxforge.manager import PassManager
    from onnxforge.model_io import load
    from onnxforge.saving import refuse_to_overwrite, save

    refuse_to_overwrite([target.absolute()], force=force)
    model = load(source)
    known = makers(model)
    with about(source):
        if passes:
            PassManager(passes).apply(model)
        roundings = emulated(model)
        if not roundings:
            raise Refused("no value of it is bfloat16 or float16")
    save(model, target, force=force)
    found: list[Strain] | None = None
    if samples.paths or samples.count:
        fed = drawn(load(target, editable=False), samples, timeout=setup.timeout)
        found = strains(model, roundings, fed, known, setup)
    _tell(source, target, len(roundings), found, style)


def _tell(
    source: Path, target: Path, count: int, found: Sequence[Strain] | None, style: str
) -> None:
    from onnxforge.exposure import as_option

    option = as_option(found) if found else ""
    if style == "json":
        told: dict[str, Any] = {"schema": 1, "source": str(source), "target": str(target)}
        told |= {"rounded": count, "strained": None if found is None else [*map(vars, found)]}
        click.echo(json.dumps(told | {"option": option}, indent=2))
        return
    lines = [f"{source} -> {target}", f"  {count} values are rounded"]
    for one in found or ():
        what = f" ({one.op_type})" if one.op_type else ""
        lines.append(f"  {one.problem}: {one.value} of {one.node}{what}, peak {one.peak:.6g}")
    if found is not None:
        lines.append(f"  keep them float32: {option}" if found else "  all stay in range")
    click.echo("\n".join(map(printable, lines)))
