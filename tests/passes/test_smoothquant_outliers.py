"""What smoothing is for: channels so wide that no one scale suits an activation."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from onnxforge import PassManager
from support import fixtures, integers, oracle, statistics

FRAMES = 32, 128, 512
NAME = "outlier_encoder"
Arrays = dict[str, np.ndarray]
unsaturated = pytest.mark.skipif(integers.saturates(), reason="sums of products saturate")


def samples(frames: int, key: str) -> list[Arrays]:
    fixtures.source()  # makes the module importable
    maker = importlib.import_module("_outliers")
    return [maker.sample(frames, f"/{key}{number}") for number in range(2)]


SEEN = [sample for frames in FRAMES for sample in samples(frames, "seen")]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._left: Iterator[Arrays] = iter(SEEN)

    def get_next(self) -> Arrays | None:
        return next(self._left, None)


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = onnx.load(fixtures.built(NAME))
    return statistics.of_model(model, SEEN, tmp_path_factory.mktemp("stats"))


def sqnr(tier: Path, frames: int) -> float:
    """Signal to noise on samples that nothing was calibrated on, in dB."""
    signal = noise = 0.0
    for sample in samples(frames, "held out"):
        exact, found = (oracle.run(path, sample)["y"] for path in (fixtures.built(NAME), tier))
        signal += float(np.square(exact.astype(np.float64)).sum())
        noise += float(np.square(exact.astype(np.float64) - found).sum())
    return float(10 * np.log10(signal / noise))


def made(passes: str, folder: Path) -> Path:
    PassManager(passes).run(fixtures.built(NAME), folder / "tier.onnx")
    return folder / "tier.onnx"


@unsaturated
def test_without_smoothing_static_int8_loses_the_signal(tmp_path: Path) -> None:
    quantize_static(
        fixtures.built(NAME),
        tmp_path / "tier.onnx",
        Reader(),
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    assert max(sqnr(tmp_path / "tier.onnx", frames) for frames in FRAMES) < 10


@unsaturated
@pytest.mark.parametrize("options", ["", "alpha=auto", "scales=pow2", "format=integer"])
def test_with_smoothing_it_keeps_it_however_long(
    options: str, stats: Path, tmp_path: Path
) -> None:
    tier = made(f"smoothquant{{stats={stats} {options}}}", tmp_path)
    found = [sqnr(tier, frames) for frames in FRAMES]
    assert min(found) > 25
    assert max(found) - min(found) < 1


@unsaturated
def test_ranges_of_the_moment_lose_more_the_longer_the_input(tmp_path: Path) -> None:
    tier = made("dynamic-int8", tmp_path)
    short, middle, long = (sqnr(tier, frames) for frames in FRAMES)
    assert short > middle + 3 > long + 6
