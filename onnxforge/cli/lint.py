"""The command that looks for what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxforge.cli.options import PATH, writable
from onnxforge.errors import OnnxforgeError
from onnxforge.storage.remote import is_address
from onnxforge.storage.whole import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxforge.lint.config import Options
    from onnxforge.lint.finding import Report

__all__ = ["lint"]

_FORMATS = ["text", "json", "sarif", "github", "junit", "markdown"]


def _words(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...] | None:
    """Lists of words, None if the option is not given at all."""
    return tuple(w for text in given for w in text.split(",") if w) if given else None


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--select", multiple=True, callback=_words, help="Rules to apply, no others.")
@click.option("--ignore", multiple=True, callback=_words, help="Rules to leave out.")
@click.option("--min-ort", metavar="VERSION", help="Oldest onnxruntime that has to load all.")
@click.option("--provider", multiple=True, callback=_words, help="One that has to run all.")
@click.option("--browser", is_flag=True, default=None, help="Browsers have to load all.")
@click.option("--derived", is_flag=True, default=None, help="Replay tiers from fp32.")
@click.option(
    "--hash/--no-hash", "hash_", default=None, help="Also read whole files; default: hash."
)
@click.option("--fix", "mends", is_flag=True, help="Mend what changes no result.")
@click.option("--config", type=PATH, help="Instead of onnxforge.toml or pyproject.toml.")
@click.option("--baseline", type=PATH, callback=writable, help="Findings that are known.")
@click.option("--write-baseline", is_flag=True, help="Take all there is for known.")
@click.option(
    "--format",
    "style",
    type=click.Choice(_FORMATS),
    default="text",
    show_default=True,
    help="What to print on stdout.",
)
@click.option("--report", multiple=True, metavar="FORMAT=FILE", help="Write a file as well.")
def lint(
    *,
    paths: tuple[str, ...],
    select: tuple[str, ...] | None,
    ignore: tuple[str, ...] | None,
    min_ort: str | None,
    provider: tuple[str, ...] | None,
    browser: bool | None,
    derived: bool | None,
    hash_: bool | None,
    mends: bool,
    config: Path | None,
    baseline: Path | None,
    write_baseline: bool,
    style: str,
    report: tuple[str, ...],
) -> int:
    """Look for what is wrong with models, and with bundles of them.

    PATH is a model, a folder, whose models are looked at as one bundle, or an http address.
    Rules are named by code (OF404), family (OF40) or name; `onnxforge explain OF404` tells
    what one means. Exit code 1: there is a finding that is more than a remark.
    """
    from onnxforge.lint.baseline import as_baseline, without_known
    from onnxforge.lint.render import FORMATS

    if write_baseline and baseline is None:
        raise click.UsageError("--write-baseline needs --baseline FILE")
    changes = {
        "select": select,
        "ignore": ignore,
        "min_ort": min_ort,
        "providers": provider,
        "browser": browser,
        "derived": derived,
        "hash": hash_,
    }
    files = [_report(text) for text in report]
    options = _options(paths, config, changes)
    found = _looked(paths, options, mends=mends)
    if baseline is not None:
        if write_baseline:
            write_text(baseline, as_baseline(found, baseline))
        found = without_known(found, baseline)
    click.echo(FORMATS[style](found))
    for name, path in files:
        write_text(path, FORMATS[name](found) + "\n")
    return 0 if found.clean else 1


def _report(text: str) -> tuple[str, Path]:
    """The format and the path of a file to be written."""
    style, found, name = text.partition("=")
    if not found or style not in _FORMATS:
        raise click.UsageError(f"--report {text}: wanted {'|'.join(_FORMATS)}=FILE")
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise OnnxforgeError(f"{path}: is no place for a file")
    return style, path


def _options(
    paths: tuple[str, ...], config: Path | None, changes: Mapping[str, object]
) -> Options:
    from onnxforge.lint.config import configured, find

    local = [Path(path) for path in paths if not is_address(path)]
    return configured(config or find(local), changes)


def _looked(paths: tuple[str, ...], options: Options, *, mends: bool) -> Report:
    """What is found, after what can be mended was mended."""
    from onnxforge.lint import lint as looked

    report = looked(paths, options)
    if not mends or not any(finding.passes is not None for finding in report.findings):
        return report
    if any(map(is_address, paths)):
        raise OnnxforgeError("--fix writes: not over http")
    from onnxforge.lint.fixing import fix

    done, notes = fix(report)
    again = looked(paths, options)
    return replace(again, fixed=done, notes=[*again.notes, *notes])
