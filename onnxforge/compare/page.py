"""What a comparison found, as one page that needs no network."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from string import Template

from onnxforge.compare.document import Document, Foreign, names, remarks, verdict
from onnxforge.compare.plots import (
    byte_plot,
    layer_plot,
    output_plot,
    range_plot,
    sample_plot,
)
from onnxforge.compare.tables import Table, tables
from onnxforge.text import printable

__all__ = ["as_html"]

_ROWS = 200
_WIDE = 40  # characters; longer text breaks into lines
_PAGE = Path(__file__).with_name("page.html")


def as_html(document: Document) -> str:
    """The tables and plots of them; the same evidence always gives the same text.

    Raises:
        OnnxforgeError: matplotlib is not installed.
    """
    title = f"{verdict(document)}: {_heading(document)}"
    page = Template(_PAGE.read_text(encoding="utf-8"))
    return page.substitute(title=_text(title), body="\n".join(_body(document)))


def _heading(document: Document) -> str:
    found = document.comparison
    return " against ".join(reversed(names(found))) if found else "Reference and candidate"


def _body(document: Document) -> Iterator[str]:
    said = verdict(document)
    yield f"<h1>{_text(_heading(document))}</h1>"
    yield f'<p class="{said.partition(":")[0] if ":" in said else "note"}">{_text(said)}</p>'
    if listed := remarks(document):
        items = (f"<dt>{_text(label)}</dt><dd>{_cell(what)}</dd>" for label, what in listed)
        yield f"<dl>{''.join(items)}</dl>"
    drawings = _drawings(document)
    for table in tables(document, _ROWS, samples=True):
        yield f"<h2>{_text(table.title)}</h2>"
        yield from drawings.get(table.title, [])
        yield _table(table)
        yield f'<p class="note">{_text(table.note)}</p>' if table.note else ""


def _drawings(document: Document) -> dict[str, list[str]]:
    """Plots by the title of the table that they go with."""
    found = document.comparison
    drawings = {
        "Error per output": output_plot(document.outputs),
        "Error per sample": sample_plot(document.outputs),
    }
    if found and found.localization:
        drawings["Error per layer"] = layer_plot(found.localization)
        drawings["Ranges"] = range_plot(found.localization)
    if document.models:
        drawings["Weights by type"] = byte_plot(document.models)
    return {title: [f"<figure>{svg}</figure>"] for title, svg in drawings.items() if svg}


def _table(table: Table) -> str:
    classes = [' class="number"' if number else "" for number in table.numeric]
    columns = list(zip(classes, table.header, strict=True))
    head = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for kind, name in columns)
    body = "\n".join(f"<tr>{''.join(map(_td, row, classes))}</tr>" for row in table.rows)
    title = _text(table.title)
    # What scrolls must be reachable without a mouse.
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{title}">'
        f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _td(cell: str, kind: str) -> str:
    if len(cell) > _WIDE:
        kind = ' class="text"'
    elif cell in ("passed", "failed") and not isinstance(cell, Foreign):
        kind = f' class="{cell}"'
    return f"<td{kind}>{_cell(cell)}</td>"


def _cell(text: str) -> str:
    return f"<code>{_text(text)}</code>" if isinstance(text, Foreign) and text else _text(text)


def _text(text: str) -> str:
    return html.escape(printable(text))
