"""Statistics of activations: what is counted, what is kept, and how it adds up."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxforge.errors import DataError
from onnxforge.numerics.calibration import ROWS, ActivationStats, Statistics, sample_key
from support.models import floats

Array = np.ndarray
CHANNELS = 3
samples = st.lists(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 2), st.integers(0, 5), st.just(CHANNELS)),
        elements=floats(finite=True),
    ),
    max_size=6,
)


def told(stats: ActivationStats) -> list[Any]:
    arrays = (stats.low, stats.high, stats.keys, stats.rows, stats.histogram.counts)
    numbers = (stats.channel_axis, stats.count, stats.histogram.exponent, stats.limit)
    return [*numbers, *((a.dtype, a.shape, a.tobytes()) for a in arrays)]


def counted(values: dict[int, Array], limit: int = 4, axis: int = -1) -> ActivationStats:
    found = ActivationStats.empty(axis, CHANNELS, limit)
    for key, value in values.items():
        found.add(value, key)
    return found


def slow_hash(key: int, row: int) -> int:
    """SplitMix64 in Python's integers; the last two bits are those of the sample."""
    mask = 2**64 - 1
    z = (key + (row + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) // 4 * 4 + key % 4


@given(samples, st.integers(0, 2**64 - 9))
def test_statistics_are_those_of_all_rows(drawn: list[Array], key: int) -> None:
    found = counted({key + i: array for i, array in enumerate(drawn)})
    rows = [
        (slow_hash(key + i, j), row)
        for i, array in enumerate(drawn)
        for j, row in enumerate(array.reshape(-1, CHANNELS))
    ]
    assert found.count == len(rows)
    assert found.histogram.total == len(rows) * CHANNELS
    for channel in range(CHANNELS):
        column = [float(row[channel]) for _, row in rows]
        assert found.low[channel] == min(column, default=np.inf)
        assert found.high[channel] == max(column, default=-np.inf)
    kept = sorted(rows, key=lambda pair: pair[0])[:4]
    assert found.keys.tolist() == [key for key, _ in kept]
    assert found.rows.tobytes() == b"".join(row.tobytes() for _, row in kept)


@given(samples, st.integers(0, 2**64 - 9))
def test_each_part_has_the_ranges_of_the_others(drawn: list[Array], key: int) -> None:
    values = {key + i: array.reshape(-1, CHANNELS) for i, array in enumerate(drawn)}
    values = {key: rows for key, rows in values.items() if len(rows)}
    found = counted(values)
    parts = {key % 4 for key in values}
    told = found.parts()
    if len(parts) < 2:
        assert len(told) == 1
        assert told[0].low.tolist() == found.low.tolist()
        assert told[0].rows is told[0].others is found.rows
        return
    assert sum(len(part.rows) for part in told) == len(found.rows)
    numbers = sorted({int(key) % 4 for key in found.keys})
    for number, part in zip(numbers, told, strict=True):
        others = np.concatenate([rows for key, rows in values.items() if key % 4 != number])
        assert part.low.tolist() == (others.min(axis=0) + 0).tolist()
        assert part.high.tolist() == (others.max(axis=0) + 0).tolist()
        mine = [
            row for key, row in zip(found.keys, found.rows, strict=True) if key % 4 == number
        ]
        assert part.rows.tobytes() == np.array(mine).tobytes()
        assert len(part.others) == len(found.rows) - len(part.rows)


@given(samples, st.data())
def test_merges_are_exact_in_any_split_and_order(drawn: list[Array], data: Any) -> None:
    values = dict(enumerate(drawn))
    whole = counted(values)
    keys = data.draw(st.permutations(sorted(values)))
    assert told(counted({key: values[key] for key in keys})) == told(whole)
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(keys), max_size=len(keys)))
    merged = counted({})
    for part in data.draw(st.permutations(range(3))):
        mine = (key for key, number in zip(keys, parts, strict=True) if number == part)
        other = counted({key: values[key] for key in mine})
        before = told(other)
        merged.merge(other)
        assert told(other) == before
    assert told(merged) == told(whole)


def test_the_sign_of_zero_depends_on_no_order() -> None:
    zeros = {0: np.zeros((1, 3), np.float32), 1: -np.zeros((1, 3), np.float32)}
    one, other = counted(zeros), counted(dict(reversed(zeros.items())))
    assert told(one) == told(other)


@pytest.mark.parametrize(("axis", "shape"), [(-2, (2, 3, 5)), (1, (2, 3, 2, 4)), (-1, (3,))])
def test_channels_are_along_any_axis(axis: int, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = counted({9: values}, 100, axis)
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    assert found.low.tolist() == values.min(axis=others).tolist()
    assert found.high.tolist() == values.max(axis=others).tolist()
    rows = [tuple(row) for row in np.moveaxis(values, axis, -1).reshape(-1, 3).tolist()]
    assert found.count == len(rows)
    assert sorted(map(tuple, found.rows.tolist())) == sorted(rows)


def test_rows_are_a_fair_choice() -> None:
    values = np.repeat(np.arange(20_000, dtype=np.float32)[:, None], 3, axis=1)
    found = counted({sample_key({"x": values}): values}, ROWS)
    assert found.rows.shape == (ROWS, 3)
    assert len(set(found.rows[:, 0].tolist())) == ROWS
    assert abs(found.rows[:, 0].mean() / 20_000 - 0.5) < 0.1


def test_nothing_changes_with_an_empty_activation() -> None:
    found = counted({1: np.ones((1, 2, 3), np.float32)})
    before = told(found)
    found.add(np.empty((1, 0, 3), np.float32), 2)
    assert told(found) == before
    assert counted({}).range("minmax") == (0, 0)
    for method in ("percentile", "mse", "entropy"):
        assert counted({}).range(method) == (0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(bad: float) -> None:
    found = counted({1: np.ones((2, 3), np.float32)})
    before = told(found)
    with pytest.raises(DataError, match=r"^holds NaN or infinity$"):
        found.add(np.array([[1, bad, 2], [9, 9, 9]], np.float32), 2)
    assert told(found) == before


def test_other_channels_are_refused() -> None:
    found = counted({})
    with pytest.raises(DataError, match=r"^has 4 channels, not 3$"):
        found.add(np.ones((2, 4), np.float32), 1)
    with pytest.raises(DataError, match=r"^has other channels$"):
        found.merge(ActivationStats.empty(-1, 4, 4))
    with pytest.raises(DataError, match=r"^has other channels$"):
        found.merge(ActivationStats.empty(-2, 3, 4))
    with pytest.raises(DataError, match=r"^keeps 5 rows, not 4$"):
        found.merge(ActivationStats.empty(-1, 3, 5))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(dtype: Any) -> None:
    values = np.array([[1, 2, 3]], dtype)
    assert told(counted({1: values})) == told(counted({1: values.astype(np.float32)}))


def test_no_rows_may_be_kept() -> None:
    found = counted({1: np.ones((2, 3), np.float32)}, 0)
    assert found.rows.shape == (0, 3)
    assert found.count == 2


def test_ranges() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((30_000, 3)).astype(np.float32)
    values[7] = -70, 80, 0
    found = counted({1: values})
    assert found.range("minmax") == (-70, 80)
    low, high = found.range("percentile", 99.9)
    assert -5 < low < -3
    assert 3 < high < 5
    assert found.range("percentile", 100) == (-70, 80)
    assert found.range("mse") == found.histogram.mse(-70.0, 80.0)
    assert found.range("entropy") == found.histogram.entropy(-70.0, 80.0)
    assert counted({1: np.full((2, 3), 5, np.float32)}).range("minmax") == (0, 5)
    for percent in (-1, 101, np.nan):
        with pytest.raises(DataError, match=r"^percent: wanted 0 to 100, not"):
            found.range("percentile", percent)


def statistics(*keys: int, digest: str = "d", names: str = "ab", limit: int = 4) -> Statistics:
    activations = {name: ActivationStats.empty(-1, CHANNELS, limit) for name in names}
    for key in keys:
        for name, stats in activations.items():
            stats.add(np.full((2, 3), key + ord(name), np.float32), key)
    return Statistics(digest, activations, set(keys))


def all_told(found: Statistics) -> object:
    return found.samples, {name: told(stats) for name, stats in found.activations.items()}


def test_statistics_of_a_model_merge() -> None:
    found, other = statistics(1, 2), statistics(3)
    found.merge(other)
    assert all_told(found) == all_told(statistics(1, 2, 3))
    assert all_told(other) == all_told(statistics(3))
    found.merge(statistics(2, 3))
    assert all_told(found) == all_told(statistics(1, 2, 3)), "known samples count once"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (statistics(3, digest="e"), "is of another model"),
        (statistics(3, names="abc"), "only one of the two knows 'c'"),
        (statistics(3, names="b"), "only one of the two knows 'a'"),
        (statistics(2, 3, 4), "1 of its 3 samples are known"),
        (statistics(3, limit=5), "activation 'a' keeps 5 rows, not 4"),
    ],
)
def test_what_does_not_go_together_changes_nothing(other: Statistics, why: str) -> None:
    found = statistics(1, 2)
    with pytest.raises(DataError, match=f"^{why}$"):
        found.merge(other)
    assert all_told(found) == all_told(statistics(1, 2))


def test_a_merge_that_fails_at_the_last_activation_changes_nothing() -> None:
    found, other = statistics(1), statistics(2)
    other.activations["b"] = ActivationStats.empty(-1, 4)
    with pytest.raises(DataError, match=r"^activation 'b' has other channels$"):
        found.merge(other)
    assert all_told(found) == all_told(statistics(1))


def test_a_sample_is_told_by_what_is_in_it() -> None:
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((1, 0), np.int64)
    key = sample_key({"x": x, "y": y})
    assert 0 <= key < 2**64
    assert sample_key({"y": y, "x": np.asfortranarray(x)}) == key
    assert sample_key({"y": y, "x": np.repeat(x, 2, axis=1)[:, ::2]}) == key
    others = [
        {"x": x},
        {"x": x, "z": y},
        {"x": x.T, "y": y},
        {"x": x.reshape(3, 2), "y": y},
        {"x": x, "y": y.reshape(0, 1)},
        {"x": x, "y": y.astype(np.int32)},
        {"x": x.view(np.int32), "y": y},
        {"x": x + 1, "y": y},
    ]
    assert len({key, *map(sample_key, others)}) == len(others) + 1


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.bool_])
def test_a_sample_may_have_any_type_and_rank(dtype: Any) -> None:
    ones = np.ones(1, dtype)
    assert sample_key({"x": ones}) != sample_key({"x": ones[0].reshape(())})
    assert sample_key({"x": ones}) != sample_key({"x": np.zeros(1, dtype)})
