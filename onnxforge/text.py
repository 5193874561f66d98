"""Text on a terminal: what comes from models is anybody's; tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["aligned", "printable"]


def printable(text: str) -> str:
    """One line of text in which nothing commands a terminal or passes for another line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def aligned(
    rows: Sequence[Sequence[str]], right: Sequence[bool], between: str = "  "
) -> list[str]:
    """Rows whose columns are as wide as they need, some of them to the right."""
    columns = [
        [text.rjust(width) if is_right else text.ljust(width) for text in column]
        for column, is_right in zip(zip(*rows, strict=True), right, strict=True)
        for width in [max(map(len, column))]
    ]
    return [between.join(row).rstrip() for row in zip(*columns, strict=True)]
