"""What a comparison found, for a terminal and for a model card."""

from __future__ import annotations

import re
from collections.abc import Callable

from onnxforge.compare.document import Document, Foreign, remarks, verdict
from onnxforge.compare.tables import Table, tables
from onnxforge.text import aligned, printable

__all__ = ["as_markdown", "as_text", "table_as_markdown"]

_ROWS = 20
_UNFIT = re.compile(r"[`|\\]|^\s*$")  # what a code span in a table cannot hold


def as_text(document: Document) -> str:
    """The tables for a terminal."""
    lines = [verdict(document)]
    lines += [printable(f"{label}: {text}") for label, text in remarks(document)]
    for table in tables(document, _ROWS):
        lines += ["", table.title, *_aligned(table, printable, "  ")]
        lines += [table.note] if table.note else []
    return "\n".join(lines)


def as_markdown(document: Document) -> str:
    """The tables for a model card, in GitHub's dialect."""
    lines = [f"**{verdict(document)}**"]
    if said := remarks(document):
        lines += ["", *(f"- {label}: {_cell(text)}" for label, text in said)]
    for table in tables(document, _ROWS):
        lines += ["", *table_as_markdown(table)]
    return "\n".join(lines) + "\n"


def table_as_markdown(table: Table) -> list[str]:
    """One table with its title and its note."""
    header, *rows = (f"| {row} |" for row in _aligned(table, _cell, " | "))
    rule = "".join("---:|" if right else "---|" for right in table.numeric)
    note = ["", table.note] if table.note else []
    return [f"### {table.title}", "", header, f"|{rule}", *rows, *note]


def _aligned(table: Table, cell: Callable[[str], str], between: str) -> list[str]:
    """Header and rows with columns as wide as they need, numbers to the right."""
    rows = [[cell(text) for text in row] for row in (table.header, *table.rows)]
    return aligned(rows, table.numeric, between)


def _cell(text: str) -> str:
    """Text in Markdown; in code, nothing foreign is a link, a mention or a formula."""
    if not isinstance(text, Foreign) or not text:
        return text
    line = printable(text)
    if not _UNFIT.search(line) and line == line.strip():  # a span of code loses blanks
        return f"`{line}`"
    entities = (c if c.isalnum() else f"&#{ord(c)};" for c in line)
    return f"<code>{''.join(entities)}</code>"
