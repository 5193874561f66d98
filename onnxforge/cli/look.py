"""The commands that tell what there is: passes, findings, models."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from onnxforge.cli.options import FORMAT
from onnxforge.errors import OnnxforgeError, SpecError

__all__ = ["explain", "inspect_model", "list_passes"]


@click.command("list")
@FORMAT
def list_passes(style: str) -> None:
    """List all passes, built in and installed."""
    from onnxforge.registry import entries, pass_class

    rows = []
    for name, entry in entries().items():
        try:
            cls = pass_class(name)
            rows.append((name, cls.effect.value, _summary(cls), entry.distribution))
        except OnnxforgeError as error:
            rows.append((name, "broken", str(error), entry.distribution))
    if style == "json":
        keys = ("name", "effect", "summary", "distribution")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return
    width = max(len(row[0]) for row in rows)
    for name, effect, summary, _ in rows:
        click.echo(f"{name:<{width}}  {effect:<8} {summary}")


_CODE = re.compile(r"[A-Za-z]+\d{3,}")  # passes of others have codes of their own


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


@click.command()
@click.argument("topic", metavar="PASS|RULE|CODE")
def explain(topic: str) -> None:
    """Explain a pass, a rule of lint, or the code of a finding."""
    import inspect

    from onnxforge.lint.rules import RULES
    from onnxforge.options import defaults

    for rule in RULES:
        if topic in (rule.name, rule.name.replace("-", "_")) or topic.upper() == rule.code:
            text = inspect.getdoc(rule.check)
            click.echo(f"{rule.code} {rule.name} ({rule.level})\n\n{text}")
            return
    from onnxforge.manager import PassManager
    from onnxforge.registry import entries, pass_class

    if _CODE.fullmatch(topic):
        sources: list[Any] = [PassManager, *(pass_class(name) for name in entries())]
        meanings = {code: text for source in sources for code, text in source.codes.items()}
        if topic.upper() not in meanings:
            raise SpecError(f"no finding has the code {topic.upper()}")
        click.echo(f"{topic.upper()}: {meanings[topic.upper()]}")
        return
    cls = pass_class(topic)
    click.echo(f"{cls.name} ({cls.effect.value})\n\n{inspect.getdoc(cls)}")
    if given := defaults(cls):
        click.echo("\nDefaults:")
        for option, text in given.items():
            click.echo(f"    {option}: {'has to be given' if text is None else text}")
    if cls.codes:
        click.echo("\nFindings:")
        for code, text in sorted(cls.codes.items()):
            click.echo(f"    {code}: {text}")


@click.command("inspect")
@click.argument("model")
@click.option("--layout", "mapped", is_flag=True, help="Map each data file byte by byte.")
@FORMAT
def inspect_model(model: str, mapped: bool, style: str) -> None:
    """Show what a model is made of: operators, weights, files.

    MODEL may be an http address.
    """
    from onnxforge import inspection, layout, report
    from onnxforge.storage.remote import is_address

    if mapped and is_address(model):
        raise OnnxforgeError("--layout reads data files: not over http")

    found: Any = layout.layout(model) if mapped else inspection.inspect(model)
    as_dict: Any = report.layout_as_dict if mapped else report.inspection_as_dict
    as_text: Any = report.layout_as_text if mapped else report.inspection_as_text
    click.echo(json.dumps(as_dict(found), indent=2) if style == "json" else as_text(found))
