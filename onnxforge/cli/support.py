"""The command that tells which runtimes load a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxforge.cli.options import FORMAT, PATH
from onnxforge.errors import CheckFailed
from onnxforge.text import printable

if TYPE_CHECKING:
    from onnxforge.runtime.support import Reason, Support
    from onnxforge.trial import Trial

__all__ = ["support"]

_SHOWN = 3  # reasons of one release
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}


@click.command()
@click.argument("model", type=PATH)
@click.option("--ort", metavar="VERSIONS", help="1.17, 1.17,1.20, 1.17..1.22 or 1.17..")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "web"]),
    default="cpu",
    show_default=True,
    help="Where it runs; cuda and web are told from documents.",
)
@click.option("--try", "trying", is_flag=True, help="Run it on the installed onnxruntime.")
@click.option("--timeout", type=float, metavar="SECONDS", help="For loading and the run.")
@FORMAT
def support(
    *,
    model: Path,
    ort: str | None,
    provider: str,
    trying: bool,
    timeout: float | None,
    style: str,
) -> None:
    """Say which releases of onnxruntime load MODEL, or why not.

    It is told from tables of what each release has; nothing is run but with --try. Exit code
    1 says that one of the releases does not load it, or that it is not known.
    """
    from onnxforge import model_io
    from onnxforge.runtime.session import Setup
    from onnxforge.runtime.support import supported, versions
    from onnxforge.trial import tried

    if trying and provider not in _PROVIDERS:
        raise click.UsageError(f"--try runs on {' and '.join(_PROVIDERS)}, not on {provider}")
    asked = versions(ort) if ort is not None else None
    found = supported(model_io.load(model, editable=False), asked, provider)  # type: ignore[arg-type]
    trial = None
    if trying:
        trial = tried(model, Setup(_PROVIDERS[provider], timeout=timeout))
    if style == "json":
        click.echo(json.dumps(_as_dict(model, found, trial), indent=2))
    else:
        click.echo("\n".join(map(printable, _as_lines(found, trial))))
    _judge(model, found, trial)


def _as_dict(model: Path, found: Sequence[Support], trial: Trial | None) -> dict[str, object]:
    answers = [dataclasses.asdict(one) | {"verdict": one.verdict} for one in found]
    told: dict[str, object] = {"schema": 1, "model": str(model), "releases": answers}
    if trial is not None:
        told["tried"] = dataclasses.asdict(trial)
    return told


def _as_lines(found: Sequence[Support], trial: Trial | None) -> list[str]:
    lines: list[str] = []
    groups: list[list[Support]] = []
    for one in found:
        if groups and _answer(groups[-1][0]) == _answer(one):
            groups[-1].append(one)
        else:
            groups.append([one])
    names = [_span(group) for group in groups]
    width = max(map(len, names))
    for name, group in zip(names, groups, strict=True):
        first = group[0]
        source = ", told from documents" if first.documented else ""
        lines.append(f"{name:<{width}}  {first.verdict}{source}")
        indent = " " * (width + 4)
        lines += [indent + _reason(reason) for reason in first.reasons[:_SHOWN]]
        if len(first.reasons) > _SHOWN:
            lines.append(f"{indent}and {len(first.reasons) - _SHOWN} more, see --format json")
    if trial is not None:
        version = f"onnxruntime {trial.version}" if trial.version else "onnxruntime"
        where = f", {trial.providers[0]}" if trial.providers else ""
        message = f": {trial.message}" if trial.message else ""
        lines.append(f"tried on {version}{where}: {trial.outcome}{message}")
    return lines


def _answer(one: Support) -> tuple[object, ...]:
    return one.verdict, one.reasons


def _span(group: Sequence[Support]) -> str:
    first, last = group[0].version, group[-1].version
    return first if first == last else f"{first}..{last}"


def _reason(reason: Reason) -> str:
    return f"{reason.node}: {reason.text}" if reason.node else reason.text


def _judge(model: Path, found: Sequence[Support], trial: Trial | None) -> None:
    bad = [one for one in found if not one.loads]
    if bad:
        named = ", ".join(f"{one.version} {one.verdict}" for one in bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise CheckFailed(f"{model}: of {len(found)} releases, {named}{more}", ())
    if trial is not None and trial.failed:
        raise CheckFailed(f"{model}: {trial.outcome}: {trial.message}", ())
