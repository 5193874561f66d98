"""Norms that are written out in small operators, which runtimes fuse into one.

onnxruntime takes casts of what goes into a norm, and casts in front of its gain, into the norm
it makes. That has one type for its input, gain and bias: where they differ it has no kernel,
or no such operator, and does not load the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from onnxforge.halving.parts import Part, Parts

__all__ = ["ROOTS", "Norm", "norms", "uses_root"]

ROOTS = frozenset({"Reciprocal", "Sqrt"})
_MIDDLE = frozenset({"Mul", "Pow", "ReduceMean", "Sub"})


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm in small operators.

    Attributes:
        source: What is normalized.
        ends: The gain and the bias, as far as there are such.
        inside: The parts that read what is normalized.
    """

    source: ir.Value
    ends: tuple[Part, ...]
    inside: frozenset[Part]


def uses_root(part: Part, parts: Parts) -> bool:
    """Whether a part divides by a root, or multiplies with what was divided by one."""
    return part.op_type in ("Div", "Mul") and any(
        before.op_type in ROOTS and any(parts.before(before)) for before in parts.before(part)
    )


def norms(parts: Parts) -> Iterator[Norm]:
    """All norms of a model."""
    for part in parts:
        if not uses_root(part, parts) or not part.makes:
            continue
        source = _source(part, parts)
        if source is None:
            continue
        ends: list[Part] = []
        for op_type in ("Mul", "Add"):
            reader = _only_reader((ends or [part])[-1], parts)
            if (
                reader is None
                or reader.op_type != op_type
                or not _with_constant(reader, parts)
            ):
                break
            ends.append(reader)
        readers = {read.part for read in parts.readers[source]}
        inside = {reader for reader in readers if reader.op_type in _MIDDLE or reader is part}
        yield Norm(source, tuple(ends), frozenset(inside))


def _source(core: Part, parts: Parts) -> ir.Value | None:
    """What is normalized: what is divided, or what its mean was taken from."""
    for value in core.reads:
        maker = parts.makers.get(value)
        if maker is not None and maker.op_type == "Sub" and len(maker.reads) == 2:
            return maker.reads[0]
        if maker is None or maker.op_type not in ROOTS:
            return None if parts.is_constant(value) else value
    return None


def _only_reader(part: Part, parts: Parts) -> Part | None:
    readers = parts.readers.get(part.makes[0], []) if part.makes else []
    return readers[0].part if len(readers) == 1 else None


def _with_constant(part: Part, parts: Parts) -> bool:
    return any(map(parts.is_constant, part.reads))
