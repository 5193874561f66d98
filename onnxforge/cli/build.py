"""The command that makes a bundle."""

from __future__ import annotations

import gc
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxforge.cli.options import FORMAT, PATH
from onnxforge.errors import CheckFailed, OnnxforgeError
from onnxforge.text import printable

if TYPE_CHECKING:
    from onnxforge.bundle.build import Outcome
    from onnxforge.bundle.recipe import Recipe
    from onnxforge.bundle.state import State

__all__ = ["build"]

_RECIPES = "onnxforge.toml", "pyproject.toml"


@click.command()
@click.argument("recipe", type=PATH, required=False)
@click.option("--only", multiple=True, metavar="TIER[/GRAPH]", help="Make nothing else.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and why.")
@click.option("--force", is_flag=True, help="Replace files that are not of this recipe.")
@click.option("--jobs", type=click.IntRange(min=1), help="Most to do at a time.")
@click.option("--max-memory", metavar="SIZE", help="Most memory for all that runs at a time.")
@FORMAT
def build(
    *,
    recipe: Path | None,
    only: tuple[str, ...],
    dry_run: bool,
    force: bool,
    jobs: int | None,
    max_memory: str | None,
    style: str,
) -> None:
    """Make the bundle of RECIPE: what is missing or out of date.

    RECIPE is onnxforge.toml, or a pyproject.toml with a table [tool.onnxforge.bundle]. What
    does not keep to its gates is not put into its place, and the exit code is 1.
    """
    from onnxforge.bundle.reading import read_recipe
    from onnxforge.bundle.state import opened

    limit = _memory(max_memory)
    found = read_recipe(recipe if recipe is not None else _here())
    gc.freeze()
    gc.enable()
    with opened(found.work) as state:
        if dry_run:
            _plan(found, state, only, style)
            return
        outcome = _built(found, state, only, force=force, jobs=jobs, max_memory=limit)
    _tell(outcome, found, style)


def _here() -> Path:
    for name in _RECIPES:
        if Path(name).is_file():
            return Path(name)
    raise click.UsageError(f"there is no {_RECIPES[0]} here: name the RECIPE")


def _memory(text: str | None) -> int | None:
    from onnxforge.bundle.jobs import machine_memory
    from onnxforge.options import ByteSize

    try:
        return machine_memory() if text is None else ByteSize(text)
    except ValueError as error:
        raise click.UsageError(f"--max-memory: {error}") from None


def _plan(recipe: Recipe, state: State, only: tuple[str, ...], style: str) -> None:
    from onnxforge.bundle.build import planned

    found = planned(recipe, state, only)
    if style == "json":
        fields = [
            {"unit": name, "stage": status.stage, "reasons": status.reasons}
            for name, status in found
        ]
        click.echo(json.dumps({"schema": 1, "plan": fields}, indent=2))
        return
    for name, status in found:
        reasons = f": {', '.join(status.reasons)}" if status.reasons else ""
        click.echo(printable(f"{name}: {status.stage}{reasons}"))


def _built(
    recipe: Recipe,
    state: State,
    only: tuple[str, ...],
    *,
    force: bool,
    jobs: int | None,
    max_memory: int | None,
) -> Outcome:
    from onnxforge.bundle.build import build as built

    stopped = threading.Event()

    def pulse() -> None:  # threads notice no signal themselves
        if stopped.is_set():
            raise OnnxforgeError("the build was ended")

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        try:
            return built(
                recipe,
                state,
                pool,
                only=only,
                force=force,
                max_memory=max_memory,
                pulse=pulse,
                announce=lambda line: click.echo(printable(line), err=True),
            )
        finally:
            stopped.set()


def _tell(outcome: Outcome, recipe: Recipe, style: str) -> None:
    if style == "json":
        fields = {"made": outcome.made, "kept": outcome.kept, "removed": outcome.removed}
        told = {"schema": 1, **fields, "failed": outcome.failed, "errors": outcome.errors}
        click.echo(json.dumps(told, indent=2))
    else:
        counts = {
            "made": outcome.made,
            "up to date": outcome.kept,
            "removed": outcome.removed,
            "refused": outcome.failed,
            "failed": outcome.errors,
        }
        said = [f"{len(names)} {what}" for what, names in counts.items() if names]
        click.echo(printable(f"{recipe.output}: {', '.join(said)}"))
    if outcome.errors:
        name, text = next(iter(outcome.errors.items()))
        more = len(outcome.errors) - 1
        raise OnnxforgeError(f"{name}: {text}" + (f" (and {more} more)" if more else ""))
    if outcome.failed:
        refused = [f"{unit}: {'; '.join(why)}" for unit, why in outcome.failed.items()]
        raise CheckFailed(f"not published: {'; '.join(refused)}", ())
