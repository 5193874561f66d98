from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxforge.numerics.smoothing import (
    ALPHAS,
    activation_grid,
    factors,
    to_power_of_two,
    trial,
)

positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# --- factors -------------------------------------------------------------------------------


@given(positive, st.sampled_from(ALPHAS), st.booleans())
def test_factors_are_those_of_the_paper(x: list[float], alpha: float, pow2: bool) -> None:
    largest, weight = np.array(x), np.array(x[::-1])
    exact = np.exp(alpha * np.log(largest) - (1 - alpha) * np.log(weight))
    found = factors(-largest, largest / 2, weight, alpha)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    if pow2:
        found = to_power_of_two(found)
        assert found.dtype == np.float32
        assert (np.frexp(found)[0] == 0.5).all()
        assert (np.abs(np.log2(found / exact)) <= 0.5 + 1e-6).all()


def test_channels_that_are_zero_on_either_side_are_left() -> None:
    low, high = np.array([0.0, -4, np.inf, -4]), np.array([0.0, 0, -np.inf, 1])
    for lean in (None, 1.0):
        found = factors(low, high, np.array([2.0, 0, 2, 1]), 0.5, lean)
        assert found.tolist() == [1, 1, 1, 2 if lean is None else -2]


@pytest.mark.parametrize("lean", [None, 0.5])
def test_factors_and_their_inverses_are_finite(lean: float | None) -> None:
    tiny, huge = 1e-45, 3.4e38
    low, high = np.array([-tiny, -huge]), np.array([tiny, huge])
    found = to_power_of_two(factors(low, high, np.array([huge, tiny]), 0.5, lean))
    assert np.isfinite(found).all()
    assert np.isfinite(1 / found).all()
    assert (found != 0).all()


def test_channels_with_a_long_side_down_are_turned() -> None:
    low, high = np.array([-8.0, -1, -2, 0]), np.array([1.0, 8, 2, 3])
    found = factors(low, high, np.ones(4), 1, 1.0)
    assert found.tolist() == [-8, 8, 2, 3]
    ends = np.sort([low / found, high / found], axis=0)
    assert ends[0].tolist() == [-0.125, -0.125, -1, 0]
    # A short side may be half of a long one: the third channel has to shrink for that.
    found = factors(low, high, np.ones(4), 1, 0.5)
    assert found.tolist() == [-8, 8, 4, 3]
    assert np.min([low / found, high / found]) == -0.5


def test_a_power_of_two_keeps_its_sign() -> None:
    found = to_power_of_two(np.array([-3, 3, -1, 0.3], np.float32))
    assert found.tolist() == [-4, 4, -1, 0.25]


# --- grids ---------------------------------------------------------------------------------

finite = st.floats(-1e30, 1e30)


@given(finite, finite)
def test_a_grid_holds_zero_exactly_and_its_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    grid = activation_grid(low, high)
    step = float(grid.scale)
    assert 0 <= grid.zero_point <= 255
    assert grid.low <= 0 <= grid.high
    assert grid.decoded(np.zeros(1)) == 0
    # A scale is at least the least normal number, and ends are half a step off at most.
    assert abs(grid.low - min(low, 0)) <= 0.51 * step or step == 1
    assert abs(grid.high - max(high, 0)) <= 0.51 * step or step == 1


@given(finite, finite)
def test_a_signed_grid_is_the_same_on_both_sides(a: float, b: float) -> None:
    grid = activation_grid(min(a, b), max(a, b), signed=True)
    assert (grid.zero_point, grid.signed, grid.low) == (0, True, -grid.high)
    assert float(grid.high) >= max(abs(a), abs(b)) * (1 - 1e-6) or grid.scale == 1


@pytest.mark.parametrize("high", [0.0, 1e-45, 1e-37])
@pytest.mark.parametrize("signed", [False, True])
def test_nothing_is_divided_by_a_subnormal_scale(high: float, signed: bool) -> None:
    grid = activation_grid(0, high, signed=signed)
    assert grid.scale >= np.finfo(np.float32).tiny
    assert np.isfinite(grid.decoded(np.array([high]))).all()


def test_values_beyond_a_grid_are_clipped() -> None:
    grid = activation_grid(-1, 1.55)
    assert (float(grid.scale), grid.zero_point) == (pytest.approx(0.01), 100)
    decoded = grid.decoded(np.array([-9, -0.333, 0.004, 9]))
    assert decoded == pytest.approx([-1, -0.33, 0, 1.55])


# --- trials --------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
def test_a_trial_multiplies_as_integers_do(signed: bool) -> None:
    rows, weight = floats(6, 4), floats(4, 3, seed=1)
    scale = np.array([1, 2, 0.5, 4], np.float32)
    smooth = rows / scale
    grid = activation_grid(smooth.min(), smooth.max(), signed=signed)
    x = np.rint(smooth / float(grid.scale)).astype(int)
    steps = np.abs(weight * scale[:, None]).max(axis=0) / 127
    w = np.rint(weight * scale[:, None] / steps).astype(int)
    # The ends of the range are not on the grid: clipping is one step at most.
    least, most = (-128, 127) if signed else (-grid.zero_point, 255 - grid.zero_point)
    found = (np.clip(x, least, most) @ w) * float(grid.scale) * steps
    exact = rows @ weight
    told = trial(rows, [weight], scale, grid)
    assert told.signal == pytest.approx(np.square(exact).sum(), rel=1e-6)
    assert told.noise == pytest.approx(np.square(found - exact).sum(), rel=1e-6)
    assert told.sqnr_db == pytest.approx(10 * np.log10(told.signal / told.noise))


def test_trials_of_several_weights_add_up() -> None:
    rows, weights = floats(6, 4), [floats(4, 3, seed=1), floats(4, 5, seed=2)]
    ones, grid = np.ones(4, np.float32), activation_grid(-3, 3)
    both = trial(rows, weights, ones, grid)
    each = [trial(rows, [weight], ones, grid) for weight in weights]
    assert both.signal.tolist() == [*each[0].signal, *each[1].signal]
    assert both.loss == pytest.approx((each[0].loss + each[1].loss) / 2, rel=1e-5)
    # A weight of small numbers counts as much as the others.
    small = trial(rows, [weights[0], weights[1] * 1e-3], ones, grid)
    assert small.loss == pytest.approx(both.loss, rel=1e-5)


def test_trials_of_several_rows_add_up() -> None:
    rows, weights = floats(6, 4), [floats(4, 3, seed=1), floats(4, 5, seed=2)]
    ones, grid = np.ones(4, np.float32), activation_grid(-3, 3)
    halves = [trial(rows[part], weights, ones, grid) for part in (slice(2), slice(2, 6))]
    whole = trial(rows, weights, ones, grid)
    np.testing.assert_allclose((halves[0] + halves[1]).noise, whole.noise)
    assert (halves[0] + halves[1]).loss == pytest.approx(whole.loss, rel=1e-5)


def test_without_rows_a_trial_says_nothing_is_lost() -> None:
    told = trial(
        np.empty((0, 4)), [floats(4, 3)], np.ones(4, np.float32), activation_grid(0, 1)
    )
    assert (told.signal, told.noise, told.sqnr_db) == (0, 0, float("inf"))


def test_an_outlier_costs_less_when_it_is_smoothed() -> None:
    rows, weight = floats(64, 8), floats(8, 16, seed=1)
    rows[:, 3] *= 200
    largest, ones = np.abs(rows).max(axis=0), np.ones(8, np.float32)
    found = factors(-largest, largest, np.abs(weight).max(axis=1), 0.5)
    before = trial(rows, [weight], ones, activation_grid(rows.min(), rows.max()))
    smooth = rows / found
    after = trial(rows, [weight], found, activation_grid(smooth.min(), smooth.max()))
    assert after.noise < before.noise / 4
