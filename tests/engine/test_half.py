from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxforge.numerics.half import OVERFLOW, SMALLEST_NORMAL, narrow, narrow_finite
from support import oracle

EDGES = np.array([0.0, SMALLEST_NORMAL, 65504.0, np.nextafter(np.float32(OVERFLOW), 0)])
BITS = st.integers(0, 2**32 - 1)


def narrowed(values: np.ndarray, how: object = narrow_finite) -> list[int]:
    out = np.full(values.shape, 0x1234, np.uint16).view(np.float16)
    assert callable(how)
    how(values, out)
    return list(out.view(np.uint16))


def patterns(bits: list[int]) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


@given(st.lists(BITS, max_size=200))
def test_both_ways_round_like_the_integer_reference(bits: list[int]) -> None:
    values = patterns(bits)
    tame = values[np.isfinite(values) & (np.abs(values) < OVERFLOW)]
    assert narrowed(tame) == list(oracle.half_bits(tame))
    numbers = values[~np.isnan(values)]
    assert narrowed(numbers, narrow) == list(oracle.half_bits(numbers))


@pytest.mark.parametrize("exponent", range(127 - 26, 127 + 16))
def test_every_mantissa_of_sixteen_upper_bits_in_every_binade(exponent: int) -> None:
    upper = np.arange(2**16, dtype=np.uint32) << 7 | exponent << 23
    values = np.concatenate([upper, upper | 1, upper | 0x80000000]).view(np.float32)
    values = values[np.abs(values) < OVERFLOW]
    assert narrowed(values) == list(oracle.half_bits(values))


def test_the_edges_of_the_range() -> None:
    values = np.concatenate([EDGES, -EDGES]).astype(np.float32)
    values = np.tile(values, 40)  # enough that the subnormal fix-up is the exception
    assert narrowed(values) == list(oracle.half_bits(values))


def test_a_block_of_subnormals_takes_the_other_way_to_the_same_bits() -> None:
    values = np.linspace(-SMALLEST_NORMAL, SMALLEST_NORMAL, 4001).astype(np.float32)
    assert narrowed(values) == narrowed(values, narrow) == list(oracle.half_bits(values))


def test_infinities_stay_and_large_values_become_infinite() -> None:
    values = np.array([np.inf, -np.inf, OVERFLOW, -1e9], np.float32)
    assert narrowed(values, narrow) == [0x7C00, 0xFC00, 0x7C00, 0xFC00]


@given(st.integers(1, 2**23 - 1), st.booleans())
def test_nan_keeps_sign_and_upper_payload_and_is_quiet(payload: int, negative: bool) -> None:
    (found,) = narrowed(patterns([negative << 31 | 0x7F800000 | payload]), narrow)
    assert found == negative << 15 | 0x7E00 | payload >> 13


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17])
def test_any_length(count: int) -> None:
    values = np.linspace(-3, 3, count).astype(np.float32)
    assert narrowed(values) == list(oracle.half_bits(values))
