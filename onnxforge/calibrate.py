"""Running a model on samples and taking statistics of what its products multiply."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxforge import laws
from onnxforge.compare.pieces import Pieces
from onnxforge.compare.samples import Data, Sample, fit, samples
from onnxforge.errors import DataError, Refused, RuntimeFailed
from onnxforge.integer import Product
from onnxforge.model_io import load
from onnxforge.numerics.calibration import ROWS, ActivationStats, Statistics, sample_key
from onnxforge.products import Search
from onnxforge.runtime.session import ArrayFile, Session, Setup, write_all
from onnxforge.weights import Weights

if TYPE_CHECKING:
    import os

__all__ = ["Options", "Progress", "Watch", "calibrate", "watches"]

Progress = Callable[[int, Statistics], None]
"""Told how many samples are done, and what is known so far."""

_BUDGET = 512 << 20  # bytes that what is watched at a time should take
_FIRST = 4  # activations watched at a time before the size of any is known


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    Attributes:
        setup: How the model is run; always unoptimized, see `calibrate`.
        op_types: Products whose activations are watched.
        rows: Most rows of each activation to keep.
    """

    setup: Setup = field(default_factory=Setup)
    op_types: Sequence[str] = ("MatMul", "Gemm")
    rows: int = ROWS

    def __post_init__(self) -> None:
        """Refuse a number that makes no sense.

        Raises:
            DataError: ``rows`` is negative.
        """
        if self.rows < 0:
            raise DataError(f"rows: wanted at least 0, not {self.rows}")


@dataclass(frozen=True)
class Watch:
    """An activation to watch.

    Attributes:
        name: Of the value.
        channel_axis: The axis that its products sum over.
        channels: Length of that axis.
    """

    name: str
    channel_axis: int
    channels: int


def watches(model: ir.Model, op_types: Sequence[str]) -> list[Watch]:
    """The activations of a model that products with a weight read, in order.

    Those in bodies of If, Loop and Scan and in functions cannot be seen from outside and are
    left out, and so is one that products sum over different axes: they stay unknown.

    Args:
        model: The model.
        op_types: The products.
    """
    search = Search(op_types, float_front_end=False, float_depthwise=False)
    found: dict[str, set[Watch]] = {}
    for candidate in search.candidates(Weights(model)):
        product = candidate.found
        if isinstance(product, Product) and product.activation.graph is model.graph:
            watch = _watch(product)
            found.setdefault(watch.name, set()).add(watch)
    return [one for each in found.values() if len(each) == 1 for one in each]


def _watch(product: Product) -> Watch:
    node, shape = product.node, product.operand.shape
    name = product.activation.name or ""
    if node.op_type == "Conv":
        return Watch(name, 1, shape[1] * node.attributes.get_int("group", 1))
    summed = product.shared[0]
    if node.op_type == "Gemm":
        flag = "transB" if product.is_left else "transA"
        turned = node.attributes.get_int(flag, 0) == 1
        return Watch(name, int(turned == product.is_left) - 2, shape[summed])
    return Watch(name, -2 if product.is_left else -1, shape[summed])


def calibrate(
    model: str | os.PathLike[str],
    data: Data | Iterable[Sample],
    options: Options | None = None,
    *,
    known: Statistics | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run a model on samples and take statistics of its activations.

    The model runs in a process of its own. What is watched comes back through disk and is
    dropped when it was counted: memory is bounded by what one sample needs, however many
    there are. What is too much at a time is watched in groups, each by a piece of the model
    that makes nothing else. The runtime fuses no nodes, or values would depend on the group.
    A sample that comes twice counts once.

    Args:
        model: The model, float32.
        data: The samples, of any lengths, or where they come from.
        options: How to calibrate.
        known: Statistics to go on from, which stay as they are; samples in them are passed
            over.
        progress: Called after each sample.

    Raises:
        ModelError: The model cannot be read.
        DataError: There are no samples, one does not fit the model, or an activation holds
            NaN or infinity.
        Refused: The model has no product whose activation can be watched, or ``known`` is
            of another model or keeps another number of rows.
        RuntimeFailed: onnxruntime is missing, or does not run the model.
    """
    wanted = options or Options()
    loaded = load(model, editable=False)
    watched = watches(loaded, wanted.op_types)
    if not watched:
        products = " or ".join(wanted.op_types)
        raise Refused(f"{model}: no {products} multiplies a float32 activation with a weight")
    fresh = {w.name: _empty(w, wanted.rows) for w in watched}
    found = Statistics(laws.content(loaded), fresh)
    if known is not None:
        _go_on(found, known, model)
    timeout = wanted.setup.timeout
    drawn = samples(loaded, data, timeout=timeout) if isinstance(data, Data) else iter(data)
    with (
        tempfile.TemporaryDirectory(prefix="onnxforge-") as folder,
        _Run(loaded, watched, wanted.setup, Path(folder)) as run,
    ):
        for done, sample in enumerate(drawn, 1):
            run.count(sample, found)
            if progress is not None:
                progress(done, found)
    if not found.samples:
        raise DataError("there are no samples")
    return found


def _empty(watch: Watch, rows: int) -> ActivationStats:
    return ActivationStats.empty(watch.channel_axis, watch.channels, rows)


def _go_on(found: Statistics, known: Statistics, model: str | os.PathLike[str]) -> None:
    try:
        found.merge(known)
    except DataError as error:
        raise Refused(f"{model}: cannot go on from these statistics: {error}") from None


class _Run:
    """Runs a model so that it shows its activations, a group of them at a time."""

    def __init__(
        self, model: ir.Model, watched: Sequence[Watch], setup: Setup, folder: Path
    ) -> None:
        self._model = model
        self._folder = folder
        self._setup = dataclasses.replace(setup, optimization="none")
        self._sizes: dict[str, float] = {}
        self._pieces = Pieces(model)
        self._types = {
            v.name or "": v.dtype or ir.DataType.FLOAT
            for v in model.graph.inputs
            if not v.is_initializer()
        }
        # What depends on no input is a constant, and no sample tells more of it.
        self._made = [w.name for w in watched if w.name in self._pieces.made]
        self._fed = [w.name for w in watched if w.name in self._types]
        self._group: Sequence[str] = ()
        self._session: Session | None = None
        self._inputs: set[str] = set()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def count(self, sample: Sample, found: Statistics) -> None:
        """Run a sample and count what it gives, if it is new."""
        fitted = fit(sample, self._model)
        for name in fitted.keys() - self._types.keys():
            raise DataError(f"{sample.name}: input {name!r} has a value in the model")
        key = sample_key(fitted)
        if key in found.samples:
            return
        feeds = write_all(self._folder, "feed-", fitted)
        size = sum(array.nbytes for array in fitted.values())
        fed = {name: feeds[name] for name in self._fed}
        try:
            for name, file in itertools.chain(fed.items(), self._watched(feeds, size)):
                _add(found, name, file, key)
        except (DataError, RuntimeFailed) as error:
            raise type(error)(f"{sample.name}: {error}") from None
        found.samples.add(key)
        for file in feeds.values():
            file.path.unlink()

    def _watched(
        self, feeds: Mapping[str, ArrayFile], size: int
    ) -> Iterator[tuple[str, ArrayFile]]:
        """What the model makes of a sample, group by group; each is gone with the next."""
        left = self._made
        while left:
            group = self._next(left, size)
            left = left[len(group) :]
            session = self._opened(group)
            for name, file in session.run(
                {name: feeds[name] for name in self._inputs}
            ).items():
                # As long as the sample, so that the next one's can be told.
                self._sizes[name] = file.path.stat().st_size / max(1, size)
                yield name, file
                file.path.unlink()

    def _next(self, names: Sequence[str], size: int) -> Sequence[str]:
        """As many activations as should fit into the budget, at least one."""
        if not self._sizes:
            return names[:_FIRST]
        unknown = max(self._sizes.values())
        sums = itertools.accumulate(self._sizes.get(name, unknown) * size for name in names)
        return names[: max(1, sum(total <= _BUDGET for total in sums))]

    def _opened(self, group: Sequence[str]) -> Session:
        """A session that makes a group of activations; one is open at a time.

        A runtime keeps every output until the end of a run, whoever asks for it: the others
        must not be outputs.
        """
        if self._session is None or group != self._group:
            self._open.close()
            path = self._folder / "watching.onnx"
            proto, self._inputs = self._pieces.piece({n: n for n in group}, self._types)
            path.write_bytes(proto.SerializeToString())
            session = Session(path, self._folder, self._setup, data=self._pieces.folder)
            self._session = self._open.enter_context(session)
            self._group = group
        return self._session


def _add(found: Statistics, name: str, file: ArrayFile, key: int) -> None:
    try:
        found.activations[name].add(file.open(), key)
    except DataError as error:
        raise DataError(f"activation {name!r} {error}") from None
