"""Samples at random, as far as that makes sense: tokens in range, masks open, caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnxforge.compare.samples import Cache, Sample
from onnxforge.errors import DataError
from onnxforge.numerics.samples import random_inputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["drawn"]

_LENGTH, _CACHE_LENGTH = 16, 8  # of open axes, unless the user says otherwise

# Operators whose output holds the indices that are in their first input.
_KEEPS_INDICES = {
    "Cast",
    "Concat",
    "Expand",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_KEEPS_SHAPE = {"Cast", "DequantizeLinear", "Identity"}


def drawn(
    model: ir.Model,
    count: int,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    cache: Cache | None = None,
) -> Iterator[Sample]:
    """Draw samples for a model.

    Axes of the same name have the same length: 1 for a batch, which is what only comes first
    in inputs of more axes, and 16 elsewhere. Integers that index a table stay within it,
    masks are ones, positions count up, lengths are full, and everything else is as
    `random_inputs` draws it. Inputs called after the past or a cache make up a key-value
    cache: it is empty in the first sample, 8 long in the second, and so on in turn.

    Args:
        model: The model.
        count: How many samples.
        seed: Equal seeds draw equal samples.
        sizes: Lengths of open axes, by the name of the axis or as ``input:axis``.
        cache: Only empty or only filled caches.

    Raises:
        DataError: No open axis has a name in ``sizes``.
        Refused: An input is no tensor of numbers.
    """
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    axes = _Axes(inputs, sizes or {})
    below = {value.name or "": rows for value in inputs if (rows := _rows(value)) is not None}
    for i in range(count):
        filled = cache == "filled" or (cache is None and i % 2 == 1)
        past = (axes.filled or 0) if filled else 0
        shapes = {value.name or "": axes.shape(value, past) for value in inputs}
        feeds = random_inputs(inputs, seed=[seed, i], shapes=shapes, below=below)
        longest = axes.longest(past)
        for value in inputs:
            name = value.name or ""
            meant = _meant(value, shapes[name], past, longest)
            if meant is not None:
                highest = below.get(name, np.inf) - 1
                feeds[name] = np.minimum(meant, highest).astype(feeds[name].dtype)
        told = "" if axes.filled is None else f", cache of {past}"
        yield Sample(f"random {i}{told}", feeds)


def _meant(value: ir.Value, shape: Sequence[int], past: int, longest: int) -> Any:
    """What an input has to be by its name, or None."""
    name = (value.name or "").lower()
    if "mask" in name:
        return np.ones(shape)
    if value.dtype == ir.DataType.BOOL:
        return np.full(shape, past > 0) if "cache" in name else None
    if not _is_integer(value):
        return None
    if "position" in name and shape:
        return np.broadcast_to(past + np.arange(shape[-1]), shape)
    if "len" in name and len(shape) < 2:
        return np.full(shape, longest)
    return None


class _Axes:
    """The lengths of open axes.

    Attributes:
        filled: Length of a filled cache; None if the model has none, or not of open length.
    """

    def __init__(self, inputs: Iterable[ir.Value], sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        caches = {v.name for v in inputs if _is_cache(v)}
        self._open = [
            (value, axis, _name(value, axis))
            for value in inputs
            for axis, dim in enumerate(value.shape or ())
            if not isinstance(dim, int)
        ]
        leading = {
            name for v, axis, name in self._open if axis == 0 and len(v.shape or ()) > 1
        }
        self._batch = leading - {name for _, axis, name in self._open if axis}
        outside = {name for v, _, name in self._open if v.name not in caches}
        inside = {name for v, _, name in self._open if v.name in caches}
        self._past = {n for n in inside - outside - self._batch if "batch" not in n.lower()}
        lengths = [
            sizes[key]
            for value, axis, name in self._open
            for key in (f"{value.name}:{axis}", name)
            if name in self._past and key in sizes
        ]
        self.filled = next(iter(lengths), _CACHE_LENGTH) if self._past else None
        steps = (
            n for v, axis, n in self._open if _is_integer(v) and axis and "total" not in n
        )
        self._steps = next(steps, "")
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        known = {f"{value.name}:{axis}" for value, axis, _ in self._open}
        known.update(part for _, _, name in self._open for part in (name, *_parts(name)))
        if unknown := sorted(self._sizes.keys() - known):
            names = ", ".join(sorted(known)) or "none is open"
            raise DataError(f"no open axis is called {unknown[0]!r}: {names}")

    def shape(self, value: ir.Value, past: int) -> list[int]:
        """The shape of an input when the cache is ``past`` long."""
        dims = enumerate(value.shape or ())
        return [d if isinstance(d, int) else self._size(value, i, past) for i, d in dims]

    def longest(self, past: int) -> int:
        """The longest open axis that is not the first of its input."""
        sizes = [self._size(value, axis, past) for value, axis, _ in self._open if axis]
        return max(sizes, default=0)

    def _size(self, value: ir.Value, axis: int, past: int) -> int:
        name, place = _name(value, axis), self._sizes.get(f"{value.name}:{axis}")
        if place is not None and (past or name not in self._past):
            return place
        sizes = {part: self._named(part, past) for part in _parts(name)}
        found = ir.SymbolicDim(name).evaluate(sizes) if sizes.keys() - {name} else None
        return found if isinstance(found, int) else self._named(name, past)

    def _named(self, name: str, past: int) -> int:
        given = self._sizes.get(name)
        if name in self._past and (given is None or not past):
            return past
        return self._usual(name, past) if given is None else given

    def _usual(self, name: str, past: int) -> int:
        lower = name.lower()
        if "batch" in lower or name in self._batch:
            return 1
        if "total" in lower:
            return past + self._sizes.get(self._steps, _LENGTH)
        return past if "past" in lower else _LENGTH


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _is_cache(value: ir.Value) -> bool:
    name = (value.name or "").lower()
    named = "past" in name or "cache" in name
    return named and len(value.shape or ()) > 2 and value.dtype != ir.DataType.BOOL


def _name(value: ir.Value, axis: int) -> str:
    """What an open axis is called; ``input:axis`` if nothing."""
    dim = (value.shape or ())[axis]
    return str(getattr(dim, "value", None) or f"{value.name}:{axis}")


def _parts(name: str) -> set[str]:
    """The names in an expression such as ``past + steps``."""
    try:
        return set(map(str, ir.SymbolicDim(name).free_symbols()))
    except ValueError:  # no expression, only a name
        return {name}


def _rows(value: ir.Value) -> int | None:
    """How many rows the smallest table has that an input indexes."""
    found: list[int] = []
    values, seen = [value], set[int]()
    while values:
        indices = values.pop()
        if id(indices) in seen:
            continue
        seen.add(id(indices))
        for node, i in indices.uses():
            if node.domain:
                continue
            if node.op_type == "Gather" and i == 1:
                found += _length(node)
            elif node.op_type in _KEEPS_INDICES and (i == 0 or node.op_type == "Concat"):
                values += node.outputs
    return min(found, default=None)


def _length(gather: ir.Node) -> list[int]:
    """The length of the axis that a Gather picks from, if it is known."""
    data = gather.inputs[0]
    shape = None
    while data is not None and shape is None:
        tensor = ir.convenience.get_const_tensor(data)
        shape = data.shape if tensor is None else tensor.shape
        node = data.producer()
        data = node.inputs[0] if node and node.op_type in _KEEPS_SHAPE else None
    dims = [] if shape is None else list(shape)
    axis = gather.attributes.get_int("axis", 0)
    dim = dims[axis] if -len(dims) <= axis < len(dims) else None
    return [dim] if isinstance(dim, int) and dim > 0 else []
