"""The commands that prove what a tier is: compared with its parent, made from its parent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from onnxforge.cli.options import (
    FORMAT,
    PATH,
    pair,
    run_options,
    sample_options,
    writable,
)
from onnxforge.errors import CheckFailed
from onnxforge.storage.whole import write_text
from onnxforge.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from onnxforge.compare import Evidence, Gate
    from onnxforge.compare.document import Document
    from onnxforge.compare.samples import Data
    from onnxforge.numerics.text import TextEvidence
    from onnxforge.runtime.session import Setup

__all__ = ["compare", "verify"]

_SHOWN = 10  # differences
_GATES = {
    "max-abs": "Largest absolute error.",
    "min-sqnr": "Least SQNR in dB, of the worst sample.",
    "min-cosine": "Least cosine, of the worst sample.",
    "max-argmax-rate": "Largest share of choices that differ.",
}


def _gate_options(command: Any) -> Any:
    for name, text in reversed(_GATES.items()):
        option = click.option(
            f"--{name}", multiple=True, metavar="[OUTPUT=]X", help=f"Gate: {text}"
        )
        command = option(command)
    return command


@click.command()
@click.argument("reference", type=PATH, required=False)
@click.argument("candidate", type=PATH, required=False)
@sample_options
@click.option("--argmax", multiple=True, metavar="OUTPUT[=AXIS]", help="Compare choices.")
@click.option("--top", type=int, default=5, show_default=True, help="Best choices compared.")
@click.option("--localize", is_flag=True, help="Find the values where error enters.")
@click.option(
    "--emulate/--no-emulate",
    default=True,
    show_default=True,
    help="Round float32 where a processor cannot compute in half types.",
)
@run_options
@click.option(
    "--text", "texts", nargs=2, type=PATH, help="Also, or only: two .jsonl of texts."
)
@_gate_options
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json", "markdown", "html"]),
    default="text",
    show_default=True,
    help="Of what is printed, or written to --output.",
)
@click.option(
    "--output", type=PATH, callback=writable, help="Write there instead of to stdout."
)
def compare(
    *,
    reference: Path | None,
    candidate: Path | None,
    samples: Data,
    argmax: tuple[str, ...],
    top: int,
    localize: bool,
    emulate: bool,
    setup: Setup,
    texts: tuple[Path, Path] | None,
    max_abs: tuple[str, ...],
    min_sqnr: tuple[str, ...],
    min_cosine: tuple[str, ...],
    max_argmax_rate: tuple[str, ...],
    style: str,
    output: Path | None,
) -> None:
    """Run two models on the same samples and say how they differ.

    --text REF.jsonl HYP.jsonl compares transcripts, {"id": ..., "text": ...} in each line.
    Exit code 1 names the gates that did not hold.
    """
    from onnxforge.compare import Options
    from onnxforge.compare import compare as compared

    told = _compared_texts(*texts) if texts else None
    if reference is None or candidate is None:
        if told is None or reference is not None:
            raise click.UsageError("give REFERENCE and CANDIDATE, or --text REF HYP")
        _show(None, told, style, output)
        return
    options = Options(
        setup,
        argmax=dict(pair("--argmax", text, default=-1) for text in argmax),
        top=top,
        gates=_gates((max_abs, min_sqnr, min_cosine, max_argmax_rate)),
        localize=localize,
        emulate=emulate,
    )
    found = compared(reference, candidate, samples, options)
    _show(found, told, style, output)
    if not found.passed:
        raise CheckFailed(_broken(found), ())


def _broken(found: Evidence) -> str:
    for side in (found.reference, found.candidate):
        if side.failure:
            return f"{side.path}: did not run to the end: {side.failure}"
    failed = [f"{g.gate} for {g.output}: {g.reason}" for g in found.gates if not g.passed]
    return f"{found.candidate.path}: {'; '.join(failed)}"


def _gates(given: Sequence[Sequence[str]]) -> list[Gate]:
    from onnxforge.compare import Gate

    named = zip(_GATES, given, strict=True)
    return [Gate.parse(cast("Any", name), text) for name, texts in named for text in texts]


def _compared_texts(reference: Path, candidate: Path) -> TextEvidence:
    from onnxforge.numerics.text import compare_texts, read_texts

    return compare_texts(read_texts(reference), read_texts(candidate))


def _show(
    found: Evidence | None, text: TextEvidence | None, style: str, output: Path | None
) -> None:
    from onnxforge.compare.document import Document, as_dict
    from onnxforge.compare.page import as_html
    from onnxforge.compare.render import as_markdown, as_text
    from onnxforge.inspection import inspect

    sides = (found.reference, found.candidate) if found else ()
    models = [inspect(side.path) for side in sides]
    document = Document(found, (models[0], models[1]) if models else None, text)
    styles: dict[str, Callable[[Document], str]] = {
        "json": lambda shown: json.dumps(as_dict(shown), indent=2, allow_nan=False),
        "html": as_html,
        "markdown": as_markdown,
        "text": as_text,
    }
    report = styles[style](document).rstrip("\n")
    if output is None:
        click.echo(report)
    else:
        write_text(output, report + "\n")


@click.command()
@click.argument("parent", type=PATH)
@click.argument("child", type=PATH)
@click.option("--passes", metavar="PIPELINE", help="What made it, where it does not say so.")
@click.option("--stats", type=PATH, multiple=True, help="For passes that name a SHA-256.")
@FORMAT
def verify(
    parent: Path, child: Path, passes: str | None, stats: tuple[Path, ...], style: str
) -> None:
    """Replay on PARENT how CHILD was made, and compare the bytes.

    Nothing is written. Exit code 1 names what differs.
    """
    from onnxforge.replay import verify as verified

    def announce(pipeline: str) -> None:
        click.echo(f"pipeline: {printable(pipeline) or 'none, a copy'}", err=style == "json")

    found = verified(parent, child, passes, statistics=stats, announce=announce)
    if style == "json":
        fields = {"schema": 1, "parent": str(parent), "child": str(child)}
        told = dataclasses.asdict(found) | {"derived": found.derived}
        click.echo(json.dumps(fields | told, indent=2))
    else:
        lines = [f"remark: {remark}" for remark in found.remarks]
        lines += [f"differs: {text}" for text in found.differences[:_SHOWN]]
        if len(found.differences) > _SHOWN:
            lines.append(f"{len(found.differences) - _SHOWN} more, --format json shows all")
        if found.derived:
            lines.append(f"derived: {found.weights} weights, {found.nbytes:,} bytes compared")
        click.echo("\n".join(map(printable, lines)))
    if not found.derived:
        hint = "" if found.pipeline else "; it does not say how it was made, --passes would"
        count = f"differences: {len(found.differences)}{hint}"
        raise CheckFailed(f"{child}: is not what {parent} becomes, {count}", ())
