"""Metrics against numpy and scipy, in whatever blocks the data comes."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial import distance

from onnxforge.numerics.metrics import Accumulator, Comparison, compare
from onnxforge.numerics.streaming import HISTOGRAM_ERROR, CompensatedSum, Percentiles

SUMMED = ("mean_abs", "sqnr_db", "cosine")
"""Fields that depend on the order of summation, by rounding alone."""

FLOOR_DB = 60
"""An SQNR that float16 weights reach and a gain error of one percent does not."""

TYPES = [
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn),
    *(np.int8, np.uint8, np.int32, np.int64, ml_dtypes.int4, ml_dtypes.uint4, np.bool_),
]

FLOAT32 = st.floats(width=32)
ARRAYS = hnp.arrays(np.float32, st.integers(0, 60), elements=FLOAT32)


def pair(count: int = 4096, noise: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    reference = random.standard_normal(count).astype(np.float32)
    error = noise * random.standard_normal(count)
    return reference, (reference + error).astype(np.float32)


def assert_same(found: Comparison, wanted: Comparison) -> None:
    for name in Comparison.__dataclass_fields__:
        left, right = getattr(found, name), getattr(wanted, name)
        if name in SUMMED:
            assert left == pytest.approx(right, rel=1e-9, abs=1e-12, nan_ok=True), name
        else:
            assert left == right, name


def fed(reference: np.ndarray, candidate: np.ndarray, cuts: list[int], **options: int):
    edges = [0, *sorted(cuts), len(reference)]
    parts = []
    for start, stop in itertools.pairwise(edges):
        part = Accumulator(**options)
        part.update(reference[start:stop], candidate[start:stop])
        parts.append(part)
    return parts


@st.composite
def pairs_and_cuts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    reference = draw(ARRAYS)
    candidate = reference.copy()
    if reference.size:
        for at in draw(st.lists(st.integers(0, reference.size - 1), max_size=5)):
            candidate[at] = draw(FLOAT32)
    return reference, candidate, draw(st.lists(st.integers(0, reference.size), max_size=4))


def test_agrees_with_numpy_and_scipy() -> None:
    reference, candidate = pair()
    found = compare(reference, candidate)
    ref, cand = reference.astype(np.float64), candidate.astype(np.float64)
    errors = np.abs(ref - cand)
    assert found.count == found.finite == 4096
    assert found.max_abs == errors.max()
    assert found.max_abs_at == errors.argmax()
    assert found.mean_abs == pytest.approx(errors.mean(), rel=1e-13)
    assert found.p99_abs == pytest.approx(np.percentile(errors, 99), rel=1e-13)
    assert found.p999_abs == pytest.approx(np.percentile(errors, 99.9), rel=1e-13)
    assert found.exact_percentiles
    assert found.max_reference == np.abs(ref).max()
    assert found.max_relative == errors.max() / np.abs(ref).max()
    sqnr = 20 * np.log10(np.linalg.norm(ref) / np.linalg.norm(ref - cand))
    assert found.sqnr_db == pytest.approx(sqnr, rel=1e-13)
    assert 1 - found.cosine == pytest.approx(distance.cosine(ref, cand), abs=1e-15)
    assert not found.bit_equal
    assert not found.equal


def test_cosine_of_unlike_vectors_agrees_with_scipy() -> None:
    reference, other = pair(noise=3)
    for candidate in (other, -reference, np.roll(reference, 1)):
        wanted = 1 - distance.cosine(reference.astype(float), candidate.astype(float))
        assert compare(reference, candidate).cosine == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("count", [5_000, 300_000])
@pytest.mark.parametrize("spread", [0.1, 8])
def test_histogram_percentiles_keep_their_bound(count: int, spread: float) -> None:
    random = np.random.default_rng(1)
    errors = np.exp(spread * random.standard_normal(count)) * (random.random(count) > 0.3)
    accumulator = Accumulator(exact_limit=1000)
    accumulator.update(np.zeros(count), errors)
    found = accumulator.result()
    assert not found.exact_percentiles
    for percent, value in ((99, found.p99_abs), (99.9, found.p999_abs)):
        assert value == pytest.approx(np.percentile(errors, percent), rel=HISTOGRAM_ERROR)
    assert found.p999_abs <= found.max_abs


@given(st.lists(st.floats(0, 1e300, allow_subnormal=False), min_size=1, max_size=50))
def test_histogram_bound_holds_for_every_rank(values: list[float]) -> None:
    kept, binned = Percentiles(100), Percentiles(0)
    for percentiles in (kept, binned):
        percentiles.add(np.array(values))
    for fraction in (0, 0.3, 0.5, 0.99, 1):
        exact = kept.at(fraction)
        assert exact == pytest.approx(np.quantile(values, fraction), rel=1e-12)
        assert abs(binned.at(fraction) - exact) <= HISTOGRAM_ERROR * exact * (1 + 1e-9)


@pytest.mark.parametrize("limit", [0, 100])
def test_percentiles_of_nothing_and_of_infinities(limit: int) -> None:
    percentiles = Percentiles(limit)
    assert percentiles.at(0.99) == 0
    percentiles.add(np.array([0, 0, 1, math.inf]))
    assert percentiles.at(0) == 0
    assert percentiles.at(0.99) == math.inf
    assert percentiles.at(1) == math.inf


@given(pairs_and_cuts(), st.sampled_from([10, 1000]))
def test_blocks_make_no_difference(
    case: tuple[np.ndarray, np.ndarray, list[int]], exact_limit: int
) -> None:
    reference, candidate, cuts = case
    options = {"exact_limit": exact_limit}
    whole = fed(reference, candidate, [], **options)[0].result()
    streamed = Accumulator(**options)
    edges = [0, *sorted(cuts), len(reference)]
    for start, stop in itertools.pairwise(edges):
        streamed.update(reference[start:stop], candidate[start:stop])
    assert_same(streamed.result(), whole)

    first, *rest = fed(reference, candidate, cuts, **options)
    for part in rest:
        before = part.result()
        first.merge(part)
        assert part.result() == before
    assert_same(first.result(), whole)


@given(ARRAYS)
def test_equal_arrays_have_no_error(values: np.ndarray) -> None:
    found = compare(values, values.copy())
    assert found.bit_equal
    assert found.equal
    assert (found.max_abs, found.mean_abs, found.p99_abs, found.p999_abs) == (0, 0, 0, 0)
    assert found.max_abs_at is None
    assert found.max_relative == 0
    assert found.sqnr_db == math.inf
    assert found.cosine == 1
    assert found.nonfinite_mismatches == 0
    assert found.nan_reference == np.isnan(values).sum() == found.nan_candidate
    assert found.inf_reference == np.isinf(values).sum() == found.inf_candidate
    assert found.finite == np.isfinite(values).sum()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda a: a * np.float32(1.01), id="gain"),
        pytest.param(lambda a: np.roll(a, 1), id="shift"),
        pytest.param(lambda a: -a, id="sign"),
        pytest.param(lambda a: np.where(np.arange(a.size) == 77, np.nan, a), id="nan"),
        pytest.param(lambda a: np.where(np.arange(a.size) == 77, -np.inf, a), id="inf"),
        pytest.param(lambda a: np.where(np.arange(a.size) == 77, 9, a), id="element"),
    ],
)
def test_planted_errors_fall_below_the_floor(spoil) -> None:
    reference, rounded = pair(noise=1e-4)
    assert compare(reference, rounded).sqnr_db > FLOOR_DB
    found = compare(reference, spoil(rounded))
    assert found.sqnr_db < FLOOR_DB
    assert not found.equal


def test_gain_of_one_percent_reads_40_db() -> None:
    reference = pair()[0].astype(np.float64)
    found = compare(reference, reference * 1.01)
    assert found.sqnr_db == pytest.approx(40, abs=1e-9)
    assert found.max_relative == pytest.approx(0.01)
    assert found.cosine == pytest.approx(1, abs=1e-15)


def test_sign_flip_has_cosine_minus_one() -> None:
    reference, _ = pair()
    found = compare(reference, -reference)
    assert found.cosine == -1
    assert found.sqnr_db == pytest.approx(-20 * math.log10(2))


def test_one_nan_is_found_and_spoils_every_number() -> None:
    reference, candidate = pair()
    candidate[1234] = np.nan
    found = compare(reference, candidate)
    assert found.nonfinite_mismatches == 1
    assert found.nonfinite_mismatches_at == (1234,)
    assert (found.nan_reference, found.nan_candidate) == (0, 1)
    assert found.max_abs == found.mean_abs == found.max_relative == math.inf
    assert found.max_abs_at == 1234
    assert found.sqnr_db == -math.inf
    assert found.cosine == 0
    assert found.finite == 4095
    assert found.p99_abs < 1


def test_agreed_nan_and_infinity_leave_the_errors_alone() -> None:
    reference = np.array([1, np.nan, np.inf, -np.inf, 2], np.float32)
    candidate = np.array([1, np.nan, np.inf, -np.inf, 2.5], np.float32)
    found = compare(reference, candidate)
    assert found.nonfinite_mismatches == 0
    assert found.finite == 2
    assert found.max_abs == 0.5
    assert found.max_abs_at == 4
    assert found.mean_abs == 0.25
    assert found.sqnr_db == pytest.approx(10 * math.log10(5 / 0.25))
    assert found.max_reference == 2


def test_agreed_nans_do_not_dilute_percentiles() -> None:
    errors = np.arange(100.0)
    reference = np.concatenate([np.full(900, np.nan), np.zeros(100)])
    candidate = np.concatenate([np.full(900, np.nan), errors])
    assert compare(reference, candidate).p99_abs == np.percentile(errors, 99)


@pytest.mark.parametrize(
    ("left", "right"),
    [(np.inf, -np.inf), (np.nan, np.inf), (np.inf, 1), (1, np.nan), (-np.inf, np.nan)],
)
def test_every_disagreement_about_finiteness_counts(left: float, right: float) -> None:
    found = compare([0, left, 0], [0, right, 0])
    assert found.nonfinite_mismatches == 1
    assert found.nonfinite_mismatches_at == (1,)
    assert not found.equal


def test_positions_of_mismatches_are_bounded_and_their_number_is_not() -> None:
    first, second = Accumulator(), Accumulator()
    first.update(np.zeros(10), np.full(10, np.nan))
    second.update(np.zeros(100_000), np.full(100_000, np.nan))
    first.merge(second)
    found = first.result()
    assert found.nonfinite_mismatches == 100_010
    assert found.nonfinite_mismatches_at == tuple(range(16))


@pytest.mark.parametrize(
    ("reference", "candidate", "sqnr", "cosine", "relative"),
    [
        ([0.0, 0.0], [0.0, 0.0], math.inf, 1, 0),
        ([0.0, 0.0], [0.0, 2.0], -math.inf, 0, math.inf),
        ([0.0, 2.0], [0.0, 0.0], 0, 0, 1),
        ([], [], math.inf, 1, 0),
        ([1e300, 1.0], [2e300, 1.0], -math.inf, 0, 1),
        ([1e200, 1.0], [1e200, 2.0], -math.inf, 0, 1e-200),
        ([1e160], [1e160 + 1e150], -math.inf, 0, 1e-10),
        ([1e200, 1.0], [1e200, 1.0], math.inf, 1, 0),
        ([1e-170], [2e-170], -math.inf, 0, 1),
    ],
)
def test_zero_empty_and_huge_vectors_are_defined(
    reference: list[float], candidate: list[float], sqnr: float, cosine: float, relative: float
) -> None:
    found = compare(reference, candidate)
    assert (found.sqnr_db, found.cosine) == (sqnr, cosine)
    assert found.max_relative == pytest.approx(relative, rel=1e-5)


def test_ranges_are_of_finite_values_and_of_each_side() -> None:
    reference = np.array([np.nan, -3, 2, np.inf], np.float32)
    candidate = np.array([-np.inf, -2, np.nan, 7], np.float32)
    found = compare(reference, candidate)
    assert found.range_reference == (-3, 2)
    assert found.range_candidate == (-2, 7)
    nothing = compare(reference[:1], candidate[:1])
    assert nothing.range_reference is nothing.range_candidate is None
    whole = compare(np.arange(5) - 9, np.arange(5) > 1)
    assert (whole.range_reference, whole.range_candidate) == ((-9, -5), (0, 1))


def test_scalars_compare() -> None:
    assert compare(np.float32(2), np.float32(3)).max_abs == 1


def test_sum_is_compensated() -> None:
    total = CompensatedSum()
    for value in (1, 1e100, 1, -1e100):
        total.add(value)
    assert total.value == 2
    parts = [CompensatedSum(), CompensatedSum()]
    for part, values in zip(parts, ((1, 1e100), (1, -1e100)), strict=True):
        for value in values:
            part.add(value)
    parts[0].merge(parts[1])
    assert parts[0].value == 2


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_taken(dtype: type) -> None:
    reference = np.array([[0, 1, 1], [1, 1, 0]]).astype(dtype)
    assert compare(reference, reference.copy()).bit_equal
    candidate = np.array([[0, 1, 1], [1, 1, 1]]).astype(dtype)
    found = compare(reference, candidate)
    assert (found.max_abs, found.max_abs_at) == (1, 5)
    assert not found.bit_equal
    # The value against its copy in another type: no error, other bits.
    wide = compare(reference, reference.astype(np.float64))
    assert wide.equal
    assert wide.bit_equal is (dtype is np.float64)


def test_neighbouring_large_integers_differ() -> None:
    reference = np.array([2**62, -(2**63), 2**63 - 1])
    assert compare(reference, reference - [1, 0, 0]).max_abs == 1
    assert compare([-(2**63)], [2**63 - 1]).max_abs == 2.0**64


def test_signed_zeros_are_equal_but_not_bit_equal() -> None:
    found = compare([0.0], [-0.0])
    assert found.equal
    assert not found.bit_equal


def test_strides_do_not_matter() -> None:
    reference, candidate = (a.reshape(64, 64) for a in pair())
    for left, right in ((reference.T, candidate.T), (reference[0], candidate[0])):
        strided = compare(left[::2], right[::2])
        assert strided == compare(left[::2].copy(), right[::2].copy())


@pytest.mark.parametrize("values", [np.array(["a"]), np.array([1j]), np.array([None])])
def test_other_types_are_refused(values: np.ndarray) -> None:
    with pytest.raises(TypeError, match="cannot compare"):
        compare(values, values)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reference \(2, 3\), candidate \(3, 2\)"):
        compare(np.zeros((2, 3)), np.zeros((3, 2)))


def test_other_settings_do_not_merge() -> None:
    with pytest.raises(ValueError, match="settings differ"):
        Accumulator(exact_limit=1).merge(Accumulator())


def test_memory_does_not_grow_with_the_data() -> None:
    reference, candidate = pair(1 << 20)
    accumulator = Accumulator(exact_limit=1 << 16)
    tracemalloc.start()
    try:
        for _ in range(4):
            accumulator.update(reference, candidate)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert accumulator.result().count == 4 << 20
    assert peak < 12 << 20
