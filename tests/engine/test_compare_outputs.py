"""Outputs are measured from disk, whatever their type, in a memory that does not grow."""

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxforge.compare import outputs
from onnxforge.compare.outputs import OutputMeter
from onnxforge.numerics.metrics import compare
from onnxforge.numerics.ranking import rank
from onnxforge.runtime.session import ArrayFile, read_all, write_all


def stored(folder: Path, *arrays: np.ndarray) -> list[ArrayFile]:
    return list(
        write_all(folder, "a", {str(i): array for i, array in enumerate(arrays)}).values()
    )


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float16, np.int64, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2],
)
def test_arrays_come_back_as_they_were(tmp_path: Path, dtype: type) -> None:
    for array in (np.eye(3), np.array(1), np.zeros((0, 2))):
        (file,) = stored(tmp_path, array.astype(dtype))
        assert file.open().dtype == dtype
        assert file.open().tolist() == array.astype(dtype).tolist()
        assert read_all({"x": file})["x"].shape == array.shape


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_blocks_give_what_the_whole_gives(
    tmp_path: Path, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    left = rng.standard_normal((20, 5, 7)).astype(np.float32)
    right = (left + 0.1 * rng.standard_normal(left.shape)).astype(ml_dtypes.bfloat16)
    monkeypatch.setattr(outputs, "_BLOCK", 64)
    meter = OutputMeter("y", axis, 2)
    meter.add("s", *stored(tmp_path, left, right))
    found = meter.evidence()
    assert found is not None
    whole = compare(left, right)
    assert found.types == ("FLOAT", "BFLOAT16")
    assert (found.overall.max_abs, found.overall.max_abs_at) == (
        whole.max_abs,
        whole.max_abs_at,
    )
    assert found.overall.sqnr_db == pytest.approx(whole.sqnr_db)
    ranked = rank(left, right, axis, 2)
    assert found.ranking is not None
    assert (found.ranking.mismatches, found.ranking.rows) == (ranked.mismatches, ranked.rows)
    assert found.ranking.kl_mean == pytest.approx(ranked.kl_mean)


def test_empty_outputs_and_other_numbers(tmp_path: Path) -> None:
    meter = OutputMeter("y", -1)
    meter.add("s", *stored(tmp_path, np.zeros((0, 3)), np.zeros((0, 3))))
    found = meter.evidence()
    assert found is not None
    assert (found.overall.count, found.worst) == (0, None)
    meter = OutputMeter("y")
    meter.add("s", *stored(tmp_path, np.ones(3, complex), np.ones(3, complex)))
    assert meter.evidence() is None


def test_memory_does_not_grow_with_the_outputs(tmp_path: Path) -> None:
    files = stored(tmp_path, *np.zeros((2, 64, 65536), np.float32))
    meter = OutputMeter("y", -1)
    tracemalloc.start()
    try:
        meter.add("s", *files)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
