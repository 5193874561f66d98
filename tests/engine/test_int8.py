"""Scales, integers and what rounding costs, equal to formulas of numpy over whole arrays."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxforge import lazy
from onnxforge.lazy import DerivedTensor, identity
from onnxforge.numerics import int8
from onnxforge.numerics.channels import Channels
from onnxforge.numerics.int8 import (
    Dequantize,
    Grid,
    Quantize,
    ScaleRule,
    choose,
    rounding,
    saturating_pairs,
)
from support import models

RULES: list[ScaleRule] = ["absmax", "mse"]
LIMITS = [127, 64]
TINY = np.float32(2.0**-126)
HIGHEST = np.finfo(np.float32).max
Axes = tuple[int, ...]
by_rule = pytest.mark.parametrize("rule", RULES)


@st.composite
def weights(draw: st.DrawFn) -> tuple[np.ndarray, Axes]:
    """Draw a finite array and the axes along which its elements share a scale."""
    values = draw(models.arrays(finite=True))
    return values, tuple(a for a in range(values.ndim) if draw(st.booleans()))


def chosen(
    values: np.ndarray, shared: Axes, rule: ScaleRule = "absmax", limit: int = 127
) -> Grid:
    grid = choose(ir.tensor(values), Channels(values.shape, shared), rule, limit)
    assert grid is not None
    assert grid.limit == limit
    assert grid.scales.dtype == np.float32
    return grid


def magnitude(values: np.ndarray, shared: Axes) -> np.ndarray:
    """Largest of each channel, in a shape that broadcasts."""
    wide = np.abs(values.astype(np.float32))
    return wide.max(axis=shared, keepdims=True, initial=0) if shared else wide


def levels(values: np.ndarray, scales: np.ndarray, limit: int = 127) -> np.ndarray:
    """The integers, as one formula over the array."""
    return np.clip(np.rint(values.astype(np.float32) / scales), -limit, limit)


def decoded(values: np.ndarray, grid: Grid) -> np.ndarray:
    return levels(values, grid.scales, grid.limit).astype(np.float32) * grid.scales


def loss(values: np.ndarray, scales: np.ndarray, shared: Axes, limit: int = 127) -> np.ndarray:
    """Squared error of each channel."""
    stored = levels(values, scales, limit).astype(np.float32) * scales
    lost: np.ndarray = np.square(np.subtract(values, stored, dtype=np.float64))
    return lost.sum(axis=shared, keepdims=True) if shared else lost


# --- scales --------------------------------------------------------------------------------


@given(weights(), st.sampled_from(LIMITS), st.sampled_from([8, 20, 1 << 20]))
def test_absmax_divides_the_largest_magnitude_in_float32(
    weight: tuple[np.ndarray, Axes], limit: int, block: int
) -> None:
    values, shared = weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", block)
        found = chosen(values, shared, limit=limit).scales
    wanted = np.minimum(magnitude(values, shared), np.nextafter(HIGHEST, TINY))
    wanted = wanted / np.float32(limit)
    assert np.array_equal(found, np.where(wanted < TINY, np.float32(1), wanted))


@by_rule
@pytest.mark.parametrize("limit", LIMITS)
def test_the_largest_float32_is_stored_as_what_is_finite(rule: ScaleRule, limit: int) -> None:
    values = np.array([[HIGHEST, 1, 0], [-HIGHEST, 3e38, HIGHEST]], np.float32)
    grid = chosen(values, (1,), rule, limit)
    found = decoded(values, grid)
    assert np.isfinite(found).all()
    assert np.abs(found[0, 0] / HIGHEST - 1) < 1e-6


@by_rule
def test_a_channel_of_zeros_stays_zero(rule: ScaleRule) -> None:
    values = np.array([[0, 2], [0, -4], [-0.0, 1]], np.float32)
    grid = chosen(values, (0,), rule)
    assert grid.scales[0, 0] == 1
    assert (decoded(values, grid)[:, 0] == 0).all()


@by_rule
@pytest.mark.parametrize("peak", [1e-45, 1e-40, 127 * TINY * np.float32(0.999)])
def test_a_scale_is_never_subnormal(rule: ScaleRule, peak: float) -> None:
    values = np.array([[peak, 0, -peak / 2], [1, 2, 3]], np.float32)
    grid = chosen(values, (1,), rule)
    assert grid.scales[0, 0] == 1
    assert (decoded(values, grid)[0] == 0).all()
    assert decoded(values, grid)[1].any()


def test_the_smallest_normal_scale_is_kept() -> None:
    values = np.array([[127 * TINY, 0]], np.float32)
    assert chosen(values, (1,)).scales == TINY


@by_rule
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_weight_that_is_not_finite_has_no_scales(
    rule: ScaleRule, bits: int, at: int
) -> None:
    values = np.ones(6, np.float32)
    assert choose(ir.tensor(values.reshape(2, 3)), Channels((2, 3), (0,)), rule) is not None
    values.view(np.uint32)[at] = bits
    assert choose(ir.tensor(values.reshape(2, 3)), Channels((2, 3), (0,)), rule) is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bits", [0x7F81, 0x7FC0, 0x7F80, 0xFF80, 0x7C00, 0x7D01, 0x7E00])
def test_half_precision_that_is_not_finite_has_no_scales(dtype: type, bits: int) -> None:
    values = np.ones((2, 3), dtype)
    values.view(np.uint16)[1, 1] = bits
    quiet = bits | 0x0240 if bits & 0x7F else bits  # numpy complains of signalling NaN
    finite = np.isfinite(np.array([quiet], np.uint16).view(dtype).astype(np.float32)).all()
    found = choose(ir.tensor(values), Channels((2, 3), (0,)))
    assert (found is not None) == bool(finite)


@given(weights(), st.sampled_from(LIMITS))
def test_mse_is_never_worse_than_absmax_in_any_channel(
    weight: tuple[np.ndarray, Axes], limit: int
) -> None:
    values, shared = weight
    plain = loss(values, chosen(values, shared, limit=limit).scales, shared, limit)
    clipped = loss(values, chosen(values, shared, "mse", limit).scales, shared, limit)
    assert (clipped <= plain * (1 + 1e-12)).all()


@pytest.mark.parametrize("block", [4096, 1 << 20])
def test_mse_takes_the_best_of_21_clips(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).standard_normal((20_000, 3)).astype(np.float32)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", block)
    found = chosen(values, (0,), "mse").scales
    peak = np.abs(values).max(axis=0, keepdims=True)
    clips = [np.float32(1 - i / 50) for i in range(21)]
    scales = np.stack([peak * clip / np.float32(127) for clip in clips])
    losses = np.stack([loss(values, scale, (0,)) for scale in scales])
    assert np.array_equal(found, np.take_along_axis(scales, losses.argmin(0)[None], 0)[0])
    assert (found < peak / np.float32(127)).any()


def test_the_grid_is_given_in_the_shape_of_the_weight() -> None:
    grid = chosen(np.ones((2, 1, 3, 4), np.float32), (3,))
    assert grid.scale.shape == (6, 1)
    assert grid.scales.shape == (2, 1, 3, 1)
    assert chosen(np.float32(5), ()).scales.shape == ()


# --- kernels -------------------------------------------------------------------------------


def cut(kernel: Quantize | Dequantize, source: np.ndarray, dtype: type, cuts: list[int]):
    """What a kernel makes of blocks that end at these elements."""
    flat = source.reshape(-1)
    out = np.full(flat.size, 77, dtype)
    ends = [0, *sorted(min(c, flat.size) for c in cuts), flat.size]
    for start, stop in itertools.pairwise(ends):
        kernel(flat[start:stop], out[start:stop], start)
    return out.reshape(source.shape)


@given(weights(), st.lists(st.integers(0, 64), max_size=4), st.sampled_from(LIMITS))
def test_integers_are_those_of_one_formula_wherever_blocks_end(
    weight: tuple[np.ndarray, Axes], cuts: list[int], limit: int
) -> None:
    values, shared = weight
    before = values.tobytes()
    for rule in RULES:
        grid = chosen(values, shared, rule, limit)
        wanted = levels(values, grid.scales, limit)
        assert np.abs(wanted).max(initial=0) <= limit
        signed = cut(Quantize(grid), values, np.int8, cuts)
        assert np.array_equal(signed, wanted)
        assert np.array_equal(cut(Quantize(grid, 128), values, np.uint8, cuts), wanted + 128)
        back = cut(Dequantize(grid), signed, np.float32, cuts)
        assert np.array_equal(back, wanted.astype(np.float32) * grid.scales)
    assert values.tobytes() == before


def test_ties_go_to_even_and_what_is_clipped_stays_within_the_limit() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 200, -200], np.float32)
    grid = Grid(Channels((9,), (0,)), np.ones(1, np.float32))
    wanted = [0, 2, 2, 0, -2, 126, 127, 127, -127]
    assert cut(Quantize(grid), values, np.int8, [4]).tolist() == wanted
    assert cut(Quantize(grid, 128), values, np.uint8, []).tolist() == [
        level + 128 for level in wanted
    ]
    lower = Grid(grid.channels, grid.scale, 64)
    assert cut(Quantize(lower), values, np.int8, []).tolist()[-4:] == [64, 64, 64, -64]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@given(data=st.data())
def test_half_precision_is_divided_in_float32(dtype: type, data: st.DataObject) -> None:
    bits = data.draw(hnp.arrays(np.uint16, (3, 4), elements=st.integers(0, 0x7000)))
    signs = data.draw(hnp.arrays(np.uint16, (3, 4), elements=st.sampled_from([0, 0x8000])))
    values = (bits | signs).view(dtype)
    grid = chosen(values, (0,))
    wanted = levels(values, grid.scales)
    assert np.array_equal(cut(Quantize(grid), values, np.int8, [5]), wanted)


@given(weights(), st.sampled_from([4, 12, 1 << 20]))
def test_a_derived_tensor_stores_these_integers(
    weight: tuple[np.ndarray, Axes], block: int
) -> None:
    values, shared = weight
    grid = chosen(values, shared)
    stored = DerivedTensor(ir.tensor(values), ir.DataType.INT8, Quantize(grid))
    again = DerivedTensor(stored, ir.DataType.FLOAT, Dequantize(grid))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", block)
        assert np.array_equal(stored.numpy(), levels(values, grid.scales))
        assert np.array_equal(again.numpy(), decoded(values, grid))


def variants() -> list[Grid]:
    channels, scale = Channels((2, 3), (1,)), np.array([[1], [2]], np.float32)
    return [
        Grid(channels, scale),
        Grid(channels, scale, 64),
        Grid(channels, scale * 2),
        Grid(channels, np.nextafter(scale, np.float32(9))),
        Grid(Channels((2, 2), (1,)), scale),
        Grid(Channels((2, 3), ()), scale),
    ]


@pytest.mark.parametrize("kernel", [Quantize, Dequantize, lambda grid: Quantize(grid, 128)])
def test_kernels_are_equal_where_they_compute_the_same(kernel: type) -> None:
    source = ir.tensor(np.ones((2, 3), np.float32))
    ours, theirs = [[kernel(grid) for grid in variants()] for _ in range(2)]
    for (i, one), (j, other) in itertools.product(enumerate(ours), enumerate(theirs)):
        assert (one == other) == (i == j)
        assert (hash(one) == hash(other)) == (i == j)
        same = [identity(DerivedTensor(source, ir.DataType.INT8, k)) for k in (one, other)]
        assert (same[0] == same[1]) == (i == j)
    grid = variants()[0]
    assert len({Quantize(grid), Quantize(grid, 128), Dequantize(grid)}) == 3
    assert grid != "grid"


# --- what rounding costs -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 30), (7,), (5, 3, 4), ()])
@pytest.mark.parametrize("block", [64, 1 << 20])
@by_rule
def test_errors_are_those_of_numpy(
    shape: Axes, block: int, rule: ScaleRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", block)
    grid = chosen(values, (0,) if shape else (), rule)
    lost = np.abs(np.subtract(values, decoded(values, grid), dtype=np.float64))
    found = rounding(ir.tensor(values), grid)
    assert found.max_abs == lost.max()
    assert found.mean_abs == pytest.approx(lost.mean(), rel=1e-12)
    assert found.p99_abs == pytest.approx(np.percentile(lost, 99), rel=1e-12)
    assert str(found).startswith(f"max {lost.max():.2e}, mean ")


def test_the_percentile_of_a_large_weight_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).standard_normal((400, 30)).astype(np.float32)
    grid = chosen(values, (0,))
    monkeypatch.setattr(int8, "_PERCENTILE_LIMIT", 100)
    lost = np.abs(np.subtract(values, decoded(values, grid), dtype=np.float64))
    found = rounding(ir.tensor(values), grid).p99_abs
    assert found != np.percentile(lost, 99)
    assert found == pytest.approx(np.percentile(lost, 99), rel=0.004)


def test_an_empty_weight_costs_nothing() -> None:
    values = np.empty((0, 3), np.float32)
    found = rounding(ir.tensor(values), chosen(values, (0,)))
    assert (found.max_abs, found.mean_abs, found.p99_abs) == (0, 0, 0)


# --- saturation ----------------------------------------------------------------------------

LAYOUTS = {
    "K,N": ((7, 5), (0,)),
    "K,N even": ((8, 5), (0,)),
    "N,K": ((5, 7), (1,)),
    "B,K,N": ((3, 6, 4), (1,)),
    "B,K,N odd": ((3, 5, 4), (1,)),
    "B,N,K": ((2, 3, 9), (2,)),
    "K=1": ((1, 6), (0,)),
    "K=2": ((2, 60), (0,)),
    "N=1": ((9, 1), (0,)),
    "per tensor": ((4, 7), (0, 1)),
    "conv": ((4, 3, 3, 2), (1, 2, 3)),
    "none": ((4, 3), ()),
    "K=0": ((0, 3), (0,)),
    "N=0": ((3, 0), (0,)),
}


def slow_pairs(values: np.ndarray, shared: Axes, limit: int) -> tuple[int, int]:
    """Neighbours along the flattened shared axes, one channel and one pair after another."""
    integers = levels(values, chosen(values, shared, limit=limit).scales, limit)
    kept = [axis for axis in range(values.ndim) if axis not in shared]
    over = count = 0
    for place in np.ndindex(*(values.shape[axis] for axis in kept)):
        where: list[int | slice] = [slice(None)] * values.ndim
        for axis, at in zip(kept, place, strict=True):
            where[axis] = at
        row = np.abs(integers[tuple(where)]).reshape(-1)
        for i in range(0, len(row) - 1, 2):
            over += row[i] + row[i + 1] > 128
            count += 1
    return int(over), count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [4, 8, 16, 40, 96, 200, 1 << 20])
def test_pairs_that_saturate_are_those_of_a_loop(
    layout: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, shared = LAYOUTS[layout]
    values = np.random.default_rng(9).uniform(-1, 1, shape).astype(np.float32) ** 5
    wanted = slow_pairs(values, shared, 127)
    monkeypatch.setattr(int8, "BLOCK_BYTES", block)
    assert saturating_pairs(ir.tensor(values), chosen(values, shared)) == wanted
    if wanted[1] > 4:
        assert 0 < wanted[0] < wanted[1], "else nothing is told apart"


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=6)),
    st.integers(1, 60),
    st.data(),
)
def test_pairs_of_any_weight_are_those_of_a_loop(
    values: np.ndarray, block: int, data: st.DataObject
) -> None:
    values = np.nan_to_num(values, nan=0.5, posinf=1, neginf=-1)
    shared = (data.draw(st.integers(0, values.ndim - 1)),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "BLOCK_BYTES", 4 * block)
        found = saturating_pairs(ir.tensor(values), chosen(values, shared))
    assert found == slow_pairs(values, shared, 127)


def test_the_first_sum_that_saturates() -> None:
    grid = Grid(Channels((4, 1), (0,)), np.ones(1, np.float32))
    for other, over in ((1, 0), (2, 1), (-2, 1), (-1, 0)):
        values = np.array([[127], [other], [0], [127]], np.float32)
        assert saturating_pairs(ir.tensor(values), grid) == (over, 2)


def test_seven_bits_never_saturate() -> None:
    values = np.ones((64, 8), np.float32)
    assert saturating_pairs(ir.tensor(values), chosen(values, (0,))) == (256, 256)
    assert saturating_pairs(ir.tensor(values), chosen(values, (0,), limit=64)) == (0, 256)
