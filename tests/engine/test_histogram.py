"""Histograms that add up exactly, and the ranges that are taken from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxforge.numerics import histogram as module
from onnxforge.numerics.histogram import BINS, LEAST_EXPONENT, Histogram
from support.models import floats

Array = np.ndarray
vectors = hnp.arrays(np.float32, st.integers(0, 30), elements=floats(finite=True))


def counted(*parts: Array) -> Histogram:
    found = Histogram()
    for part in parts:
        found.add(part)
    return found


def slow(values: Array) -> tuple[int, dict[int, int]]:
    """The exponent of the width, and the counts by bin, by exact arithmetic."""
    exponent = LEAST_EXPONENT
    for value in values.tolist():
        if value:
            exponent = max(exponent, math.frexp(abs(value))[1] - 11)
    counts: dict[int, int] = {}
    for value in values.tolist():
        place = math.floor(math.ldexp(value, -exponent))
        counts[place] = counts.get(place, 0) + 1
    return exponent, counts


def told(histogram: Histogram) -> tuple[int, dict[int, int]]:
    places = np.flatnonzero(histogram.counts)
    return histogram.exponent, {int(i) - BINS: int(histogram.counts[i]) for i in places}


@given(vectors, st.randoms())
def test_counts_depend_neither_on_order_nor_on_blocks(values: Array, random: object) -> None:
    shuffled = values.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    blocks = np.array_split(shuffled, 4)
    assert told(counted(values)) == told(counted(*blocks)) == slow(values)


@given(st.lists(vectors, min_size=1, max_size=5))
def test_a_merge_is_exact(parts: list[Array]) -> None:
    whole, merged = counted(*parts), Histogram()
    for part in reversed(parts):
        other = counted(part)
        before = told(other)
        merged.merge(other)
        assert told(other) == before
    assert told(merged) == told(whole)
    assert whole.total == sum(part.size for part in parts)


def test_values_are_counted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((7, 11)).astype(np.float32)
    whole = told(counted(values))
    monkeypatch.setattr(module, "_BLOCK", 10)
    assert told(counted(values)) == told(counted(values.T)) == whole == slow(values.ravel())


TINY, HUGE = float(np.float32(1e-45)), float(np.finfo(np.float32).max)


@pytest.mark.parametrize("value", [0.0, TINY, -TINY, 1.0, -1.0, 2047.0, HUGE, -HUGE])
def test_it_widens_from_nothing_and_from_tiny_values(value: float) -> None:
    array = np.array([value], np.float32)
    for first in ([], [0.0, -0.0], [TINY, -TINY]):
        values = np.array([*first, value], np.float32)
        found = counted(np.array(first, np.float32), array)
        assert told(found) == slow(values)
        assert found.total == len(values)
        low, high = found.percentile(100)
        assert low <= min(0, value) <= max(0, value) <= high


def test_tiny_negative_values_stay_below_zero() -> None:
    found = counted(np.array([-TINY, HUGE], np.float32))
    assert found.counts[BINS - 1] == 1
    assert counted(np.array([-0.0], np.float32)).counts[BINS] == 1


def test_the_largest_magnitudes_are_in_the_last_bins() -> None:
    found = counted(np.array([-4096, -2048, 2047.5], np.float32))
    assert told(found) == (2, {-1024: 1, -512: 1, 511: 1})
    assert found.width == 4
    assert found.middles[BINS - 512] == -2046
    found = counted(np.nextafter(np.array([-2048, 2048], np.float32), np.float32(0)))
    assert told(found) == (0, {-2048: 1, 2047: 1})


@pytest.mark.parametrize("percent", [100, 99.999, 99, 90, 50, 0])
def test_percentile_leaves_out_so_many_and_no_more(percent: float) -> None:
    values = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    found = counted(values)
    low, high = found.percentile(percent)
    allowed = (100 - percent) / 200 * len(values)
    assert (values < low).sum() <= allowed
    assert (values >= high).sum() <= allowed
    # A bin less would be too much, unless zero is there.
    assert low == 0 or (values < low + found.width).sum() > allowed
    assert high == 0 or (values >= high - found.width).sum() > allowed


def test_ranges_hold_zero() -> None:
    assert counted(np.array([3, 5], np.float32)).percentile(100)[0] == 0
    assert counted(np.array([-3, -5], np.float32)).percentile(100)[1] == 0
    assert Histogram().percentile(99) == (0, 0)
    for find in (Histogram().mse, Histogram().entropy):
        assert find(0.0, 0.0) == (0, 0)


def slow_error(values: Array, low: float, high: float) -> float:
    """Squared error of values after QuantizeLinear and DequantizeLinear to uint8."""
    scale, total = (high - low) / 255, 0.0
    zero = round(-low / scale)
    for value in values.tolist():
        level = min(255, max(0, round(value / scale) + zero))
        total += (value - (level - zero) * scale) ** 2
    return total


def outliers() -> Array:
    rng = np.random.default_rng(2)
    return np.append(rng.standard_normal(3000), [60, -50]).astype(np.float32) / 100


def test_mse_finds_the_least_error() -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal(200) ** 3).astype(np.float32)
    found = counted(values)
    middles = np.repeat(found.middles, found.counts)
    low, high = float(values.min()), float(values.max())
    left, right = found.mse(low, high)
    least = slow_error(middles, left, right)
    assert low <= left <= 0 <= right <= high
    for i in (1, 0.9, 0.75, 0.5, 0.25):
        for j in (1, 0.9, 0.75, 0.5, 0.25):
            assert least <= slow_error(middles, low * i, high * j) * 1.02


def test_mse_cuts_each_end_by_itself() -> None:
    values = np.append(np.linspace(-1, 1, 1_000_000), 8).astype(np.float32)
    left, right = counted(values).mse(-1.0, 8.0)
    assert left == pytest.approx(-1, abs=0.02)
    assert 2 < right < 4


def slow_divergence(histogram: Histogram, low: float, high: float) -> float:
    """Kullback-Leibler divergence in bits of 255 steps, one bin after the other."""
    bins = [
        (float(m), int(c))
        for m, c in zip(histogram.middles, histogram.counts, strict=True)
        if c
    ]
    inside = [(m, c) for m, c in bins if low <= m <= high]
    p = [float(c) for _, c in inside]
    p[0] += sum(c for m, c in bins if m < low)
    p[-1] += sum(c for m, c in bins if m > high)
    levels: dict[int, list[int]] = {}
    for i, (m, _) in enumerate(inside):
        levels.setdefault(round((m - low) / (high - low) * 255), []).append(i)
    q = [0.0] * len(inside)
    for members in levels.values():
        for i in members:
            q[i] = sum(inside[j][1] for j in members) / len(members)
    return sum(
        a / sum(p) * math.log2(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True)
    )


def test_entropy_finds_the_least_divergence() -> None:
    values = outliers()
    found = counted(values)
    low, high = float(values.min()), float(values.max())
    left, right = found.entropy(low, high)
    assert left / low == pytest.approx(right / high)
    least = slow_divergence(found, left, right)
    for cut in module._CUTS:
        assert least <= slow_divergence(found, low * cut, high * cut) + 1e-12


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_planted_outliers_are_clipped(method: str) -> None:
    rng = np.random.default_rng(4)
    values = rng.standard_normal(400_000).astype(np.float32)
    calm = counted(values)
    values[[5, 77]] = 60, -60
    wild = counted(values)
    if method == "percentile":
        low, high = wild.percentile(99.99)
    else:
        low, high = getattr(wild, method)(-60.0, 60.0)
    largest = {"percentile": 5, "mse": 50, "entropy": 12}[method]
    assert -largest < low < -2
    assert 2 < high < largest
    low, high = calm.mse(-5.0, 5.0) if method == "mse" else calm.percentile(100)
    assert -6 < low < -3
    assert 3 < high < 6


def test_what_lies_on_one_side_only_is_cut_there_only() -> None:
    values = np.abs(np.random.default_rng(5).standard_normal(10_000)).astype(np.float32)
    found = counted(values)
    high = float(values.max())
    for find in (found.mse, found.entropy):
        low, right = find(0.0, high)
        assert low == 0
        assert high / 4 < right <= high
