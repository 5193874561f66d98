"""Which parts are in half precision, so that as few values as possible are cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxforge.mincut import Cut

if TYPE_CHECKING:
    from onnxforge.halving.parts import Parts

__all__ = ["colour"]

_CAST = 1 << 20  # more than all parts that stay float32 to save one


def colour(parts: Parts) -> None:
    """Decide on each part: those with a reason stay float32, those fixed do not.

    The others go where it takes the fewest casts, and into half precision where that is
    equal. A value is cast once for all who read it in the other precision.
    """
    everything = list(parts)
    cut = Cut(2 + len(everything))
    number = {part: 2 + i for i, part in enumerate(everything)}
    for part, vertex in number.items():
        if part.reason is not None:
            cut.edge(0, vertex, Cut.ENDLESS)
        else:
            cut.edge(vertex, 1, Cut.ENDLESS if part.fixed else 1)
    for value, maker in parts.makers.items():
        readers = {number[read.part]: None for read in parts.readers.get(value, ())}
        _edges(cut, number[maker], list(readers))
    wide = cut.source_side()
    for part, vertex in number.items():
        part.half = vertex not in wide
        if part.half is False and part.reason is None:
            part.keep("OF269", "stands between what stays float32")


def _edges(cut: Cut, maker: int, readers: list[int]) -> None:
    """One cast down if a reader is half and the maker is not, one up the other way round."""
    if len(readers) == 1:
        cut.edge(maker, readers[0], _CAST)
        cut.edge(readers[0], maker, _CAST)
    elif readers:
        down, up = cut.vertex(), cut.vertex()
        cut.edge(maker, down, _CAST)
        cut.edge(up, maker, _CAST)
        for reader in readers:
            cut.edge(down, reader, Cut.ENDLESS)
            cut.edge(reader, up, Cut.ENDLESS)
