"""Argmax, top-k and softmax of scores against numpy and scipy, planted faults included."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats

from onnxforge.numerics.ranking import Choice, Ranker, rank

SCORES = hnp.arrays(np.float32, (4, 3, 6), elements=st.floats(-4, 4, width=16))


def test_one_wrong_argmax_is_found() -> None:
    reference = np.eye(50, 20, dtype=np.float32)
    candidate = reference.copy()
    candidate[7, 3] = 1.5
    found = rank(reference, candidate, 1)
    assert (found.rows, found.mismatches, found.rate, found.margin) == (50, 1, 0.02, 1)
    assert found.mismatches_at == (Choice(7, 7, 3, 1.0),)
    assert rank(reference, candidate, 0).mismatches == 1


@given(SCORES)
def test_argmax_agrees_with_numpy(candidate: np.ndarray) -> None:
    reference = np.random.default_rng(3).standard_normal((4, 3, 6)).astype(np.float32)
    for axis in (0, 1, -1):
        expected, chosen = reference.argmax(axis), candidate.argmax(axis)
        wrong = np.flatnonzero(expected != chosen)
        found = rank(reference, candidate, axis)
        assert (found.rows, found.mismatches) == (expected.size, wrong.size)
        assert [at.row for at in found.mismatches_at] == wrong[:16].tolist()
        assert [at.chosen for at in found.mismatches_at] == chosen.flat[wrong][:16].tolist()
        rows = np.moveaxis(reference, axis, -1).reshape(-1, reference.shape[axis])
        margins = rows.max(1)[wrong] - rows[wrong, chosen.flat[wrong]]
        assert found.margin == margins.max(initial=0)


@given(SCORES)
def test_overlap_and_divergence_agree_with_numpy_and_scipy(candidate: np.ndarray) -> None:
    reference = np.random.default_rng(3).standard_normal((4, 3, 6)).astype(np.float32)
    # Equal scores may be ordered either way.
    candidate = candidate + np.arange(6, dtype=np.float32) * 2**-12
    for axis in (0, 1, -1):
        found = rank(reference, candidate, axis, top=2)
        left, right = (
            np.moveaxis(scores, axis, -1).reshape(found.rows, -1).astype(np.float64)
            for scores in (reference, candidate)
        )
        best = [np.argsort(side, 1)[:, -2:] for side in (left, right)]
        shared = [len({*a} & {*b}) / 2 for a, b in zip(*best, strict=True)]
        assert found.overlap == pytest.approx(np.mean(shared))
        assert found.overlap_min == min(shared)
        kl = stats.entropy(special.softmax(left, 1), special.softmax(right, 1), axis=1)
        assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-9, abs=1e-15)
        assert found.kl_max == pytest.approx(kl.max(), rel=1e-9, abs=1e-15)


def test_equal_scores_agree_in_all() -> None:
    scores = np.array([[1, -np.inf, 3], [np.nan, 1, 2], [-np.inf] * 3])
    found = rank(scores, scores.copy())
    assert (found.mismatches, found.overlap, found.overlap_min) == (0, 1, 1)
    assert (found.kl_mean, found.kl_max) == (0, 0)


def test_masked_scores_have_no_weight_and_lost_ones_diverge() -> None:
    masked = np.array([[1.0, 2.0, -np.inf]])
    assert rank(masked, masked + np.array([0, 0, 5])).kl_max == 0
    assert rank(masked, np.array([[1.0, -np.inf, 2.0]])).kl_max == math.inf
    assert rank(masked, np.array([[1.0, np.nan, 2.0]])).kl_max == math.inf


def test_blocks_and_ties() -> None:
    parts = [Ranker(top=1), Ranker(top=1)]
    parts[0].update([[3, 3]], [[3, 4]])
    assert parts[0].result().margin == 0
    parts[1].update([[1, 2], [2, 1]], [[1, 2], [1, 2]])
    parts[0].merge(parts[1])
    found = parts[0].result()
    assert (found.rows, found.mismatches, found.margin) == (3, 2, 1)
    assert [at.row for at in found.mismatches_at] == [0, 2]
    assert found.overlap_min == 0
    whole = rank([[3, 3], [1, 2], [2, 1]], [[3, 4], [1, 2], [1, 2]], top=1)
    assert whole == found


def test_beside_nan_is_no_tie() -> None:
    found = rank([[1.0, np.nan]], [[1.0, 0.0]])
    assert (found.mismatches, found.margin) == (1, math.inf)


def test_nothing_is_compared_without_rows() -> None:
    found = rank(np.zeros((0, 3)), np.zeros((0, 3)))
    assert (found.rows, found.rate, found.overlap, found.kl_mean) == (0, 0, 1, 0)


def test_other_shapes_and_axes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reference \(2, 3\), candidate \(3, 2\)"):
        rank(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="axis"):
        rank(np.zeros((2, 3)), np.zeros((2, 3)), 2)


@pytest.mark.parametrize("axis", [1, 3])
def test_memory_does_not_grow_with_the_data(axis: int) -> None:
    scores = np.zeros((1, 64, 256, 128), np.float32)
    tracemalloc.start()
    try:
        rank(scores, scores, axis)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20
