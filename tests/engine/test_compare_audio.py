"""Sound becomes samples: one rate, windows of one length, through a preprocessor."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from onnxforge.compare import Data, compare
from onnxforge.compare.samples import Sample, fit, samples
from onnxforge.errors import DataError, RuntimeFailed
from onnxforge.model_io import load
from support import pairs

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

RATE = 8000
PREPROCESSOR = """(float[b,n] waveforms, int64[b] waveforms_lens)
  => (float[b,2,t] features, int64[b] features_lens) {
  one = Constant<value_ints=[1]>()  w = Unsqueeze(waveforms, one)
  n = Neg(w)  features = Concat<axis=1>(w, n)  features_lens = Identity(waveforms_lens) }"""
ENCODER = """(float[b,2,t] audio_signal, int32[b] length) => (float[b,2,t] y, int32[b] l) {
  y = Tanh(audio_signal)  l = Neg(length) }"""
RAW = "(float[b,n] wave, int64 size) => (float[b,n] y, int64 z) { y=Neg(wave) z=Neg(size) }"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """2.5 seconds of two channels at 8 kHz: 1 everywhere in one, and 0 in the other."""
    path = tmp_path / "speech.wav"
    soundfile.write(path, np.stack([np.ones(20000), np.zeros(20000)], 1) * 0.5, RATE)
    return path


def read(model: Path, data: Data) -> list[Sample]:
    loaded = load(model, editable=False)
    found = list(samples(loaded, data))
    assert all(fit(sample, loaded) for sample in found)
    return found


def test_windows_go_through_a_preprocessor(sound: Path, tmp_path: Path) -> None:
    first = pairs.saved(tmp_path / "pre.onnx", PREPROCESSOR)
    model = pairs.saved(tmp_path / "model.onnx", ENCODER)
    data = Data([tmp_path], preprocessor=first, seconds=1, rate=RATE)
    found = read(model, data)
    assert [sample.name for sample in found] == [
        str(sound),
        f"{sound} from 1 s",
        f"{sound} from 2 s",
    ]
    for sample, length in zip(found, (8000, 8000, 4000), strict=True):
        feeds = sample.feeds
        assert feeds["length"].tolist() == [length]
        assert feeds["length"].dtype == np.int32
        assert feeds["audio_signal"].shape == (1, 2, 8000)
        assert np.allclose(feeds["audio_signal"][0, 0, :length], 0.25, atol=1e-3)
        assert not feeds["audio_signal"][0, :, length:].any()
    evidence = compare(model, model, data)
    assert evidence.samples == tuple(sample.name for sample in found)
    assert evidence.passed


def test_a_model_may_take_sound_itself(sound: Path, tmp_path: Path) -> None:
    (sample,) = read(pairs.saved(tmp_path / "raw.onnx", RAW), Data([sound], rate=16000))
    assert sample.feeds["wave"].shape == (1, 40000)
    assert sample.feeds["wave"].dtype == np.float32
    assert sample.feeds["size"] == 40000
    assert np.allclose(sample.feeds["wave"][0, 1000:-1000], 0.25, atol=1e-3)


def test_the_rate_is_converted_without_changing_the_sound(tmp_path: Path) -> None:
    seconds = np.arange(RATE) / RATE
    soundfile.write(tmp_path / "tone.wav", np.sin(2 * np.pi * 440 * seconds) / 2, RATE)
    data = Data([tmp_path / "tone.wav"], rate=16000)
    (sample,) = read(pairs.saved(tmp_path / "raw.onnx", RAW), data)
    wave = sample.feeds["wave"][0]
    peak = np.abs(np.fft.rfft(wave)).argmax()
    assert peak * 16000 / wave.size == pytest.approx(440)


@pytest.mark.parametrize(
    ("pre", "model", "message"),
    [
        (
            PREPROCESSOR,
            ENCODER.replace("float[b,2,t]", "float[b,t]"),
            "none is for 'audio_sig",
        ),
        (PREPROCESSOR, ENCODER.replace("int32[b]", "int32[b,1]"), "none is for 'length'"),
        (None, ENCODER.replace("[b,2,t]", "[b,2,t,1]"), "not clear what sound is to"),
        (None, RAW.replace("int64 size", "int64[a,b] size"), "not clear what sound is to"),
    ],
)
def test_what_goes_nowhere_is_refused(
    sound: Path, tmp_path: Path, pre: str | None, model: str, message: str
) -> None:
    first = None if pre is None else pairs.saved(tmp_path / "pre.onnx", pre)
    path = pairs.saved(tmp_path / "model.onnx", model)
    with pytest.raises(DataError, match=message):
        read(path, Data([sound], preprocessor=first))


def test_what_is_no_sound_is_named(tmp_path: Path) -> None:
    path = tmp_path / "noise.wav"
    path.write_text("no sound")
    model = pairs.saved(tmp_path / "raw.onnx", RAW)
    with pytest.raises(DataError, match=r"noise\.wav: cannot be read"):
        read(model, Data([path]))


def test_sound_without_an_end_or_a_beginning(sound: Path, tmp_path: Path) -> None:
    model = pairs.saved(tmp_path / "raw.onnx", RAW)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    with pytest.raises(DataError, match=r"empty\.wav: holds no sound"):
        read(model, Data([sound, tmp_path / "empty.wav"]))
    with pytest.raises(DataError, match=r"raw\.onnx: there is no sound for the preprocessor"):
        read(model, Data(preprocessor=model, count=1))


def test_a_missing_library_says_what_to_install(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    model = pairs.saved(tmp_path / "raw.onnx", RAW)
    with pytest.raises(DataError, match=r"pip install 'onnxforge\[audio\]'"):
        read(model, Data([sound]))


def test_a_preprocessor_that_fails_is_no_result(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    bad = PREPROCESSOR.replace("Concat<axis=1>(w, n)", "MatMul(w, w)")
    first = pairs.saved(tmp_path / "pre.onnx", bad)
    model = pairs.saved(tmp_path / "model.onnx", ENCODER)
    with pytest.raises(RuntimeFailed, match=r"pre\.onnx: .*MatMul"):
        compare(model, model, Data([sound], preprocessor=first))
    data = Data([sound], preprocessor=first)
    with pytest.raises(RuntimeFailed, match=r"pre\.onnx: onnxruntime did not load"):
        list(samples(load(model, editable=False), data, timeout=0.001))
    assert list(temporary.iterdir()) == []
