"""Which elements share a scale, and walks over them in blocks that end anywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxforge import lazy
from onnxforge.numerics.channels import Channels, absmax, walk
from support import models

SHAPES = [
    *((), (1,), (5,), (0,), (1, 1), (2, 3), (3, 1), (1, 4), (0, 3), (3, 0), (1, 0)),
    *((2, 3, 2), (2, 1, 3), (1, 3, 1), (1, 1, 1), (2, 0, 3), (3, 2, 1, 2), (2, 2, 3, 2)),
]
Axes = tuple[int, ...]


def subsets(rank: int) -> Iterator[Axes]:
    for size in range(rank + 1):
        yield from itertools.combinations(range(rank), size)


CASES = [(shape, shared) for shape in SHAPES for shared in subsets(len(shape))]
on_every_case = pytest.mark.parametrize(("shape", "shared"), CASES)


def owners(shape: Axes, shared: Axes) -> np.ndarray:
    """For each element, in order, the number of its scale."""
    scales = [1 if axis in shared else n for axis, n in enumerate(shape)]
    numbers = np.arange(math.prod(scales)).reshape(scales)
    return np.broadcast_to(numbers, shape).reshape(-1)


def unlike(channels: Channels, wanted: np.ndarray, start: int, stop: int) -> str | None:
    """What is wrong with the pieces of a run of elements, or None."""
    numbers = np.arange(math.prod(channels.grid)).reshape(channels.grid)
    at = start
    for piece in channels.pieces(start, stop):
        scales = numbers[piece.scale]
        if piece.start != at or piece.stop <= at or piece.stop > stop:
            return f"a piece from {piece.start} to {piece.stop} behind {at}"
        if math.prod(piece.shape) != piece.stop - piece.start:
            return f"{piece.shape} for {piece.stop - piece.start} elements"
        seen = np.broadcast_to(scales, piece.shape)
        if seen.reshape(-1).tolist() != wanted[piece.start : piece.stop].tolist():
            return f"scales {seen} from {piece.start} on"
        if np.zeros(piece.shape).sum(axis=piece.along, keepdims=True).shape != scales.shape:
            return f"{piece.along} is not along what is shared"
        if not np.shares_memory(scales, numbers):
            return "not a view, so nothing can be gathered there"
        at = piece.stop
    return None if at == stop else f"ends at {at}"


@on_every_case
def test_every_run_of_elements_is_cut_into_arrays_that_broadcast(
    shape: Axes, shared: Axes
) -> None:
    channels, wanted = Channels(shape, shared), owners(shape, shared)
    for start, stop in itertools.combinations_with_replacement(range(len(wanted) + 1), 2):
        assert unlike(channels, wanted, start, stop) is None


def test_the_check_of_pieces_finds_other_axes_and_other_runs() -> None:
    wanted = owners((2, 3), (0,))
    assert unlike(Channels((2, 3), (0,)), wanted, 1, 5) is None
    assert unlike(Channels((2, 3), (1,)), wanted, 1, 5) is not None
    assert unlike(Channels((2, 3), ()), wanted, 1, 5) is not None
    assert unlike(Channels((3, 2), (0,)), wanted, 0, 6) is not None


def test_whole_rows_are_one_piece() -> None:
    shapes = [piece.shape for piece in Channels((4, 3, 5), (1,)).pieces(2, 59)]
    assert shapes == [(3,), (2, 5), (2, 3, 5), (2, 5), (4,)]
    assert [piece.shape for piece in Channels((4, 3, 5), (1, 2)).pieces(0, 60)] == [(4, 15)]


@on_every_case
def test_scales_have_one_entry_for_each_group_of_elements(shape: Axes, shared: Axes) -> None:
    channels, wanted = Channels(shape, shared), owners(shape, shared)
    scales = np.empty(channels.scale_shape)
    assert np.broadcast_shapes(scales.shape, shape) == shape
    assert scales.size == math.prod(channels.grid)
    if wanted.size:
        assert scales.size == len(set(wanted.tolist()))
    assert channels.is_worthwhile == (0 < scales.size <= wanted.size / 2)


@on_every_case
def test_the_summed_axis_is_the_one_along_which_scales_are_alike(
    shape: Axes, shared: Axes
) -> None:
    channels, wanted = Channels(shape, shared), owners(shape, shared)
    longer = [axis for axis, n in enumerate(shape) if n != 1]
    kinds = "".join("s" if axis in shared else "." for axis in longer)
    if "s." in kinds and "s" in kinds.partition("s.")[2]:
        assert channels.summed is None
        return
    assert channels.summed is not None
    outer, summed, inner = channels.summed
    assert outer * summed * inner == wanted.size
    if wanted.size:
        rows = wanted.reshape(outer, summed, inner)
        assert (rows == rows[:, :1]).all()
        assert len(set(rows[:, 0].reshape(-1).tolist())) == outer * inner


def test_the_summed_axis_of_layouts_that_products_have() -> None:
    assert Channels((5, 3), (0,)).summed == (1, 5, 3)
    assert Channels((5, 3), (1,)).summed == (5, 3, 1)
    assert Channels((2, 5, 3), (1,)).summed == (2, 5, 3)
    assert Channels((8, 4, 3, 3), (1, 2, 3)).summed == (8, 36, 1)
    assert Channels((8, 4), (0, 1)).summed == (1, 32, 1)
    assert Channels((8, 4), ()).summed == (32, 1, 1)


@pytest.mark.parametrize(
    ("shape", "shared", "worthwhile"),
    [
        ((2, 3), (0,), True),
        ((1, 3), (0,), False),
        ((2, 3), (), False),
        ((3,), (0,), True),
        ((1,), (0,), False),
        ((), (), False),
        ((0, 3), (0,), False),
        ((3, 0), (1,), False),
    ],
)
def test_scales_are_worthwhile_from_two_elements_each_on(
    shape: Axes, shared: Axes, worthwhile: bool
) -> None:
    assert Channels(shape, shared).is_worthwhile is worthwhile


@st.composite
def weights(draw: st.DrawFn, *, finite: bool = True) -> tuple[np.ndarray, Axes]:
    """Draw an array and the axes along which its elements share a scale."""
    values = draw(models.arrays(finite=finite))
    return values, tuple(a for a in range(values.ndim) if draw(st.booleans()))


def largest(values: np.ndarray, shared: Axes) -> np.ndarray:
    return np.abs(values.astype(np.float32)).max(axis=shared, keepdims=True, initial=0)


@given(weights(finite=False), st.sampled_from([8, 12, 64, 1 << 20]))
def test_the_largest_magnitude_of_each_channel_is_that_of_numpy(
    weight: tuple[np.ndarray, Axes], block: int
) -> None:
    values, shared = weight
    channels = Channels(values.shape, shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", block)
        found = absmax(ir.tensor(values), channels)
    assert (found.dtype, found.shape) == (np.dtype(np.float32), channels.grid)
    wanted = largest(values, shared) if shared else np.abs(values)
    np.testing.assert_array_equal(found.reshape(channels.scale_shape), wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("block", [4, 6, 10, 1 << 20])
def test_half_precision_is_walked_as_float32(
    dtype: type, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(3).standard_normal((3, 5, 2)).astype(dtype)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", block)
    channels = Channels(values.shape, (1,))
    assert np.array_equal(
        absmax(ir.tensor(values), channels).reshape(3, 1, 2), largest(values, (1,))
    )
    seen = [part.reshape(-1).copy() for _, part in walk(ir.tensor(values), channels)]
    assert np.array_equal(np.concatenate(seen), values.astype(np.float32).reshape(-1))


@given(hnp.arrays(np.float32, (3, 4, 2), elements=models.floats()), st.integers(1, 30))
def test_a_walk_gives_every_element_once_and_in_order(values: np.ndarray, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", 4 * count)
        pieces = walk(ir.tensor(values), Channels(values.shape, (0, 2)))
        seen = [(piece, part.copy()) for piece, part in pieces]
    assert all(part.shape == piece.shape for piece, part in seen)
    assert [piece.start for piece, _ in seen[1:]] == [piece.stop for piece, _ in seen[:-1]]
    flat = np.concatenate([part.reshape(-1) for _, part in seen])
    assert flat.tobytes() == values.tobytes()


def test_each_part_of_a_walk_is_overwritten_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 8)
    parts = [
        part for _, part in walk(ir.tensor(np.arange(4.0, dtype="f4")), Channels((4,), ()))
    ]
    assert len(parts) == 2
    assert np.shares_memory(*parts)
