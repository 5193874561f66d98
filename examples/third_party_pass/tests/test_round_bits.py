"""The pass: held to the laws that all passes are held to, and to its own numbers."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
from acme_passes.round_bits import RoundBitsPass
from onnx import numpy_helper

from onnxforge import registry, testing
from onnxforge.errors import OnnxforgeError


@pytest.mark.parametrize("model", testing.models(), ids=lambda path: path.stem)
@pytest.mark.parametrize("step", [RoundBitsPass(), RoundBitsPass(keep=0, min_bytes=0)])
def test_it_conforms(step: RoundBitsPass, model: Path, tmp_path: Path) -> None:
    testing.conform(step, model, tmp_path)


def test_it_is_found() -> None:
    assert registry.parse("round-bits{keep=7}") == (RoundBitsPass(keep=7),)
    assert str(registry.entries()["round-bits"]).startswith("acme_passes.round_bits:RoundBits")


def test_values_are_the_nearest_with_so_many_bits() -> None:
    model = onnx.load(testing.models()[0])
    tier, report = RoundBitsPass(keep=3).apply(model)
    assert report.modified
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, tier)
    )
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        "w", "table",
    }  # fmt: skip
    for value, found in zip(before["w"].flat, after["w"].flat, strict=True):
        assert Fraction(float(found)) == nearest(Fraction(float(value)), 3)


def nearest(value: Fraction, keep: int) -> Fraction:
    """The nearest number with so many bits, ties to even, by exact arithmetic."""
    if not value:
        return value
    step = Fraction(1)
    while abs(value) / step >= 2:
        step *= 2
    while abs(value) / step < 1:
        step /= 2
    step /= 2**keep
    return round(value / step) * step  # Fraction rounds ties to even


def test_what_is_not_finite_stays() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 3.4e38, 1e-45] * 60, np.float32)
    model = onnx.load(testing.models()[0])
    weight = next(t for t in model.graph.initializer if t.name == "w")
    weight.CopyFrom(numpy_helper.from_array(np.resize(values, (32, 32)), "w"))
    tier, _ = RoundBitsPass(keep=22).apply(model)
    found = numpy_helper.to_array(next(t for t in tier.graph.initializer if t.name == "w"))
    assert np.array_equal(np.isfinite(found), np.isfinite(np.resize(values, (32, 32))))


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises((OnnxforgeError, ValueError), match="keep must be 0 to 22, not 23"):
        RoundBitsPass(keep=23)
