"""Which parts are in half precision, so that as few values as possible are cast."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from onnxforge.elements import MOVES
from onnxforge.halving.norms import Norm, norms
from onnxforge.mincut import Cut

if TYPE_CHECKING:
    from onnxforge.halving.parts import Part, Parts

__all__ = ["colour"]

_PASSIVE = MOVES | {"Cast"}
_TIE = 1 << 40  # more than any number of casts
_CAST = 1 << 20  # more than all parts that stay float32 to save one


def colour(parts: Parts) -> None:
    """Decide on each part: those with a reason stay float32, those fixed do not.

    The others go where it takes the fewest casts, and into half precision where that is
    equal. A value is cast once for all who read it in the other precision. Casts of inputs
    and outputs of the model do not count, or what stands between them would stay float32;
    but for what only moves inputs on they do.

    Gain and bias of a norm have the precision of what it normalizes. Where others read that as
    float32 too, a runtime cannot take its cast into the norm, and they are float32.
    """
    tied = list(norms(parts))
    while True:
        _cut(parts, tied)
        loose = [norm for norm in tied if _is_read_wide(norm, parts)]
        if not loose:
            break
        tied = [norm for norm in tied if norm not in loose]
        for end in (end for norm in loose for end in norm.ends):
            end.keep("OF269", "belongs to a norm of what is read as float32")
    for part in parts:
        if not part.half:
            part.keep("OF269", "stands between what stays float32")


def _is_read_wide(norm: Norm, parts: Parts) -> bool:
    maker = parts.makers.get(norm.source)
    readers = (read.part for read in parts.readers[norm.source])
    outside = any(not part.half and part not in norm.inside for part in readers)
    return maker is not None and maker.half and outside


def _cut(parts: Parts, tied: Iterable[Norm]) -> None:
    everything = list(parts)
    interface, passing = {*parts.inputs, *parts.outputs}, _passing(parts)
    cut = Cut(2 + len(everything))
    number = {part: 2 + i for i, part in enumerate(everything)}
    for part, vertex in number.items():
        if part.reason is not None:
            cut.edge(0, vertex, Cut.ENDLESS)
        else:
            cut.edge(vertex, 1, Cut.ENDLESS if part.fixed else 1)
    for value, maker in parts.makers.items():
        groups: dict[int, dict[int, None]] = {}
        for part in (read.part for read in parts.readers.get(value, ())):
            moves = (maker if part in interface else part) in passing
            free = (maker in interface or part in interface) and not moves
            groups.setdefault(0 if free else _CAST, {})[number[part]] = None
        for cost, readers in groups.items():
            _edges(cut, number[maker], list(readers), cost)
    for norm in tied:
        group = [*(number[p] for p in norm.ends), *_maker(norm, parts, number)]
        for one, other in itertools.pairwise(group):
            cut.edge(one, other, _TIE)
            cut.edge(other, one, _TIE)
    wide = cut.source_side()
    for part, vertex in number.items():
        part.half = vertex not in wide


def _maker(norm: Norm, parts: Parts, number: Mapping[Part, int]) -> list[int]:
    maker = parts.makers.get(norm.source)
    return [number[maker]] if maker is not None else []


def _passing(parts: Parts) -> set[Part]:
    """What only moves inputs of the model on, or casts."""
    found: set[Part] = set()
    waiting = [part for part in parts if part.op_type in _PASSIVE]
    while waiting:
        part = waiting.pop()
        sources = [parts.makers.get(v) for v in part.reads if not parts.is_constant(v)]
        moved = all(source in parts.inputs or source in found for source in sources)
        if part not in found and (part.op_type == "Cast" or (sources and moved)):
            found.add(part)
            waiting += [after for after in parts.after(part) if after.op_type in _PASSIVE]
    return found


def _edges(cut: Cut, maker: int, readers: list[int], cost: int) -> None:
    """One cast down if a reader is half and the maker is not, one up the other way round."""
    if len(readers) == 1:
        cut.edge(maker, readers[0], cost)
        cut.edge(readers[0], maker, cost)
    elif readers:
        down, up = cut.vertex(), cut.vertex()
        cut.edge(maker, down, cost)
        cut.edge(up, maker, cost)
        for reader in readers:
            cut.edge(down, reader, Cut.ENDLESS)
            cut.edge(reader, up, Cut.ENDLESS)
