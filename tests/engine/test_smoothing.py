from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxforge.numerics.smoothing import ALPHAS, activation_grid, factors, trial

positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# --- factors -------------------------------------------------------------------------------


@given(positive, st.sampled_from(ALPHAS), st.booleans())
def test_factors_are_those_of_the_paper(x: list[float], alpha: float, pow2: bool) -> None:
    largest, weight = np.array(x), np.array(x[::-1])
    exact = np.exp(alpha * np.log(largest) - (1 - alpha) * np.log(weight))
    found = factors(largest, weight, alpha, pow2=pow2)
    assert found.dtype == np.float32
    if pow2:
        assert (np.frexp(found)[0] == 0.5).all()
        assert (np.abs(np.log2(found / exact)) <= 0.5 + 1e-6).all()
    else:
        np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_channels_that_are_zero_on_either_side_are_left() -> None:
    found = factors(np.array([0.0, 4, 0, 4]), np.array([2.0, 0, 0, 1]), 0.5)
    assert found.tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize("pow2", [False, True])
def test_factors_and_their_inverses_are_finite(pow2: bool) -> None:
    tiny, huge = 1e-45, 3.4e38
    found = factors(np.array([tiny, huge]), np.array([huge, tiny]), 0.5, pow2=pow2)
    assert np.isfinite(found).all()
    assert np.isfinite(1 / found).all()
    assert (found > 0).all()


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
    assert both.noise == pytest.approx(sum(one.noise for one in each), rel=1e-6)
    assert both.signal == pytest.approx(sum(one.signal for one in each), rel=1e-6)


def test_without_rows_a_trial_says_nothing_is_lost() -> None:
    told = trial(
        np.empty((0, 4)), [floats(4, 3)], np.ones(4, np.float32), activation_grid(0, 1)
    )
    assert (told.signal, told.noise, told.sqnr_db) == (0, 0, float("inf"))


def test_an_outlier_costs_less_when_it_is_smoothed() -> None:
    rows, weight = floats(64, 8), floats(8, 16, seed=1)
    rows[:, 3] *= 200
    largest, ones = np.abs(rows).max(axis=0), np.ones(8, np.float32)
    found = factors(largest, np.abs(weight).max(axis=1), 0.5)
    before = trial(rows, [weight], ones, activation_grid(rows.min(), rows.max()))
    smooth = rows / found
    after = trial(rows, [weight], found, activation_grid(smooth.min(), smooth.max()))
    assert after.noise < before.noise / 4
