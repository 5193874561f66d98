"""Samples for a comparison: from files, from sound, or drawn; one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from onnxforge.errors import DataError
from onnxforge.numerics.samples import read_archive, read_array

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Cache", "Data", "Sample", "fit", "from_paths", "samples"]

Cache = Literal["empty", "filled"]
_ARRAYS = (".npz", ".npy")
_SOUNDS = (".wav", ".flac", ".ogg")


@dataclass(frozen=True)
class Sample:
    """Values for the inputs of a model.

    Attributes:
        name: What it is called in messages and results.
        feeds: Value of each input, by name.
    """

    name: str
    feeds: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Data:
    """Where samples come from.

    Attributes:
        paths: Archives and arrays by input name, folders of them, and sound.
        preprocessor: Model that makes the inputs from sound; none where the model takes sound.
        seconds: Length of the windows that sound is cut into; None takes whole files.
        rate: Samples per second that sound is converted to.
        count: How many samples are drawn at random.
        seed: Equal seeds draw equal samples.
        sizes: Lengths of open axes, by the name of the axis or as ``input:axis``.
        cache: Draw with an empty or a filled key-value cache; None draws both in turn.
    """

    paths: Sequence[Path] = ()
    preprocessor: Path | None = None
    seconds: float | None = None
    rate: int = 16000
    count: int = 0
    seed: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    cache: Cache | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that make no samples.

        Raises:
            DataError: A number is too small.
        """
        if self.seconds is not None and not 1 <= self.seconds * self.rate < math.inf:
            raise DataError(f"windows of {self.seconds} s: wanted at least one value in each")
        for name, number, least in (
            ("rate", self.rate, 1),
            ("number of samples", self.count, 0),
            ("seed", self.seed, 0),
            *((f"size of {name!r}", size, 0) for name, size in self.sizes.items()),
        ):
            if number < least:
                raise DataError(f"{name}: wanted at least {least}, not {number}")


def samples(model: ir.Model, data: Data, *, timeout: float | None = None) -> Iterator[Sample]:
    """All samples of ``data``, made for a model.

    Args:
        model: The model that is to be fed.
        data: Where they come from.
        timeout: Seconds that the preprocessor may take, see `Setup`.

    Raises:
        DataError: A sample cannot be read or made.
    """
    from onnxforge.compare.audio import from_audio
    from onnxforge.compare.drawing import drawn

    files = list(_files(data.paths, model))
    sounds = [path for path in files if path.suffix.lower() in _SOUNDS]
    if data.preprocessor is not None and not sounds:
        raise DataError(f"{data.preprocessor}: there is no sound for the preprocessor")
    yield from from_paths([path for path in files if path not in sounds], model)
    yield from from_audio(
        sounds,
        model,
        preprocessor=data.preprocessor,
        seconds=data.seconds,
        rate=data.rate,
        timeout=timeout,
    )
    yield from drawn(model, data.count, seed=data.seed, sizes=data.sizes, cache=data.cache)


def from_paths(paths: Iterable[Path], model: ir.Model) -> Iterator[Sample]:
    """Samples from files.

    Args:
        paths: ``.npz`` archives of inputs by name; ``.npy`` files for a model with one input;
            folders of ``.npy`` files named after inputs.
        model: The model that is to be fed.

    Raises:
        DataError: A file cannot be read.
    """
    for path in paths:
        if path.is_dir():
            feeds = {file.stem: read_array(file) for file in sorted(path.glob("*.npy"))}
        elif path.suffix.lower() == ".npz":
            feeds = read_archive(path)
        else:
            names = [value.name or "" for value in model.graph.inputs if _is_needed(value)]
            if len(names) != 1:
                raise DataError(f"{path}: one array, but the model takes {', '.join(names)}")
            feeds = {names[0]: read_array(path)}
        yield Sample(str(path), feeds)


def fit(sample: Sample, model: ir.Model) -> dict[str, np.ndarray]:
    """The values of a sample as a model takes them.

    Types that numpy lacks come as raw bytes or unsigned integers of that size, or as float32,
    which is rounded.

    Raises:
        DataError: An input is missing, unknown, or of another type or shape.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    if unknown := sorted(sample.feeds.keys() - inputs.keys()):
        known = ", ".join(inputs)
        raise DataError(f"{sample.name}: no input is called {unknown[0]!r}, but {known}")
    missing = [n for n, v in inputs.items() if _is_needed(v) and n not in sample.feeds]
    if missing:
        raise DataError(f"{sample.name}: lacks the input {missing[0]!r}")
    return {
        name: _fitted(array, inputs[name], f"{sample.name}: input {name!r}")
        for name, array in sample.feeds.items()
    }


def _fitted(array: np.ndarray, value: ir.Value, what: str) -> np.ndarray:
    if not isinstance(value.type, ir.TensorType) or value.type.dtype == ir.DataType.STRING:
        raise DataError(f"{what} is no tensor of numbers: {value.type}")
    dtype = value.type.dtype.numpy()
    foreign = dtype.isbuiltin != 1
    if foreign and array.dtype.kind in "Vu" and array.dtype.itemsize == dtype.itemsize:
        array = array.view(dtype)
    elif foreign and array.dtype == np.float32:
        array = array.astype(dtype)
    if array.dtype != dtype:
        raise DataError(f"{what} is {array.dtype}, the model takes {dtype}")
    dims = array.shape if value.shape is None else tuple(value.shape)
    pairs = zip(array.shape, dims, strict=False)
    if len(dims) != array.ndim or any(isinstance(d, int) and n != d for n, d in pairs):
        raise DataError(f"{what} has the shape {array.shape}, the model takes {value.shape}")
    return array


def _is_needed(value: ir.Value) -> bool:
    return not value.is_initializer()


def _files(paths: Iterable[Path], model: ir.Model) -> Iterator[Path]:
    """The files in folders, and folders that are a sample themselves."""
    inputs = {value.name for value in model.graph.inputs}
    for path in paths:
        if not path.is_dir():
            if path.suffix.lower() not in (*_ARRAYS, *_SOUNDS):
                raise DataError(f"{path}: no {', '.join((*_ARRAYS, *_SOUNDS))}")
            yield path
            continue
        names = {file.stem for file in path.glob("*.npy")}
        if names and names <= inputs:
            yield path
            continue
        known = (*_ARRAYS, *_SOUNDS)
        inside = [p for p in sorted(path.iterdir()) if p.is_dir() or p.suffix.lower() in known]
        if not inside:
            raise DataError(f"{path}: holds no samples")
        yield from _files(inside, model)
