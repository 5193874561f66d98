"""Samples from sound: read, converted to one rate, cut into windows, preprocessed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxforge.compare.samples import Sample
from onnxforge.errors import DataError, about
from onnxforge.model_io import load
from onnxforge.runtime.session import Session, Setup, read_all, write_all

__all__ = ["from_audio"]


def from_audio(
    paths: Sequence[Path],
    model: ir.Model,
    *,
    preprocessor: Path | None = None,
    seconds: float | None = None,
    rate: int = 16000,
    timeout: float | None = None,
) -> Iterator[Sample]:
    """Samples from sound, mixed down to one channel.

    What the preprocessor makes is fed to the inputs of the same names, or else of the same
    kind (integer or not) and number of axes.

    Args:
        paths: Files that libsndfile reads.
        model: The model that is to be fed.
        preprocessor: Model that takes a waveform, and its length if it likes, and makes the
            inputs; without it the model takes these itself.
        seconds: Length of windows, the last one filled up with silence; None for whole files.
        rate: Samples per second of what is fed.
        timeout: Seconds that the preprocessor may take, see `Setup`.

    Raises:
        DataError: A file cannot be read, or it is not clear what goes where.
        RuntimeFailed: The preprocessor fails.
    """
    if not paths:
        return
    windows = (window for path in paths for window in _windows(path, seconds, rate))
    if preprocessor is None:
        for name, wave, length in windows:
            yield Sample(name, _waveform(model, wave, length, name))
        return
    first = load(preprocessor, editable=False)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxforge-")))
        with about(preprocessor):
            session = stack.enter_context(
                Session(preprocessor, folder, Setup(timeout=timeout))
            )
        for name, wave, length in windows:
            feeds = _waveform(first, wave, length, str(preprocessor))
            with about(preprocessor):
                made = session.run(write_all(folder, "in", feeds))
            yield Sample(name, _assigned(read_all(made), model, name))


def _windows(
    path: Path, seconds: float | None, rate: int
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, values and length without silence of each window of a file."""
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise DataError(f"{path}: needs pip install 'onnxforge[audio]' ({error})") from None
    try:
        content, given = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not content.size:
        raise DataError(f"{path}: holds no sound")
    wave = soxr.resample(content.mean(1), given, rate)
    size = len(wave) if seconds is None else round(seconds * rate)
    for start in range(0, len(wave), max(1, size)):
        window = wave[start : start + size]
        name = str(path) if start == 0 else f"{path} from {start / rate:g} s"
        yield name, np.pad(window, (0, size - len(window))), len(window)


def _waveform(
    model: ir.Model, wave: np.ndarray, length: int, what: str
) -> dict[str, np.ndarray]:
    """What a model that takes sound is fed."""
    feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        rank = 0 if value.shape is None else len(value.shape)
        is_wave = value.dtype is not None and value.dtype.is_floating_point()
        if rank < is_wave or rank > 1 + 2 * is_wave or value.name in feeds:
            raise DataError(f"{what}: it is not clear what sound is to {value}")
        array = wave if is_wave else np.array(length)
        dtype = np.float32 if value.dtype is None else value.dtype.numpy()
        shape = (*[1] * (rank - array.ndim), *array.shape)
        feeds[value.name or ""] = array.astype(dtype).reshape(shape)
    return feeds


def _assigned(
    arrays: Mapping[str, np.ndarray], model: ir.Model, what: str
) -> dict[str, np.ndarray]:
    """What goes to each input: the array of that name, or the only one of that kind."""
    feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        alike = list(_alike(arrays, value))
        if len(alike) != 1:
            made = ", ".join(arrays)
            raise DataError(
                f"{what}: the preprocessor makes {made}; none is for {value.name!r}"
            )
        dtype = alike[0].dtype if value.dtype is None else value.dtype.numpy()
        feeds[value.name or ""] = alike[0].astype(dtype)
    return feeds


def _alike(arrays: Mapping[str, np.ndarray], value: ir.Value) -> Iterable[np.ndarray]:
    if (named := arrays.get(value.name or "")) is not None:
        return [named]
    rank = None if value.shape is None else len(value.shape)
    is_float = value.dtype is not None and value.dtype.is_floating_point()
    return [
        array
        for array in arrays.values()
        if array.ndim == rank and (array.dtype.kind == "f") == is_float
    ]
