"""Whether a model was made from another one as it says."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxforge import model_io
from onnxforge.errors import Refused, about
from onnxforge.fidelity import difference
from onnxforge.known import BY_HASH, named
from onnxforge.layout import layout
from onnxforge.lazy import BLOCK_BYTES, blocks, reader
from onnxforge.manager import PIPELINE_KEY, VERSION_KEY, PassManager
from onnxforge.registry import parse
from onnxforge.skeleton import skeleton
from onnxforge.walk import tensors
from onnxforge.weights import Weights, for_each

if TYPE_CHECKING:
    import onnx

    from onnxforge.core import Pass

__all__ = ["Verification", "verify"]

_MOST = 100  # passes that are run because a model says so


@dataclass(frozen=True)
class Verification:
    """Whether a model was made from its parent.

    Attributes:
        pipeline: What made it, replayed on the parent.
        differences: Where the model is not what the replay gives; empty if it is.
        remarks: What proves nothing either way: bytes that belong to no weight, another
            version of onnxforge.
        weights: Number of weights compared.
        nbytes: Their size in bytes.
    """

    pipeline: str
    differences: tuple[str, ...]
    remarks: tuple[str, ...]
    weights: int
    nbytes: int

    @property
    def derived(self) -> bool:
        """Whether the model is what the pipeline makes of the parent."""
        return not self.differences


def verify(
    parent: str | os.PathLike[str],
    child: str | os.PathLike[str],
    passes: str | None = None,
    *,
    statistics: Sequence[str | os.PathLike[str]] = (),
    announce: Callable[[str], None] = lambda pipeline: None,
) -> Verification:
    """Make a model again from its parent, in memory, and compare graph and weights.

    Every weight is compared byte by byte; where it lies does not matter. Nothing is written,
    and memory does not grow with the models.

    Args:
        parent: The model that ``child`` is said to be made from.
        child: The model.
        passes: The pipeline; without one, that which the child has in its metadata. Such a
            text is foreign: only passes that are built in are run.
        statistics: Files of statistics that the pipeline names by their SHA-256.
        announce: Told the pipeline before it is run.

    Raises:
        OnnxforgeError: A model cannot be read, the child does not say how it was made, or its
            pipeline is refused by the parent.
    """
    expected, found = model_io.load(parent), model_io.load(child)
    pipeline = passes
    if pipeline is None:
        with about(Path(child)):
            pipeline = _recorded(expected, found)
    announce(pipeline)
    with about(Path(child if passes is None else parent)):
        steps = _steps(pipeline, recorded=passes is None)
    with about(Path(parent)):
        PassManager(steps, verify=False, statistics=statistics).apply(expected)
    remarks = _remarks(found, Path(child))
    if passes is not None:  # then what the child says of itself is not what is asked
        for model in (expected, found):
            model.metadata_props.pop(PIPELINE_KEY, None)
    for model in (expected, found):
        model.metadata_props.pop(VERSION_KEY, None)
    (wanted, ours), (seen, theirs) = _parted(expected), _parted(found)
    differences = [graph] if (graph := difference(wanted, seen)) else []
    both = sorted(ours.keys() & theirs.keys())
    unequal = for_each(lambda key: _unequal(ours[key], theirs[key]), both)
    differences += [f"{w}: {text}" for (w, _), text in zip(both, unequal, strict=True) if text]
    size = sum(theirs[key].nbytes for key in both)
    return Verification(pipeline, tuple(differences), remarks, len(both), size)


def _recorded(parent: ir.Model, child: ir.Model) -> str:
    """What the child says it went through after its parent."""
    before = parent.metadata_props.get(PIPELINE_KEY, "")
    text = child.metadata_props.get(PIPELINE_KEY, "")
    if text == before:
        return ""
    if before and text.startswith(f"{before},"):
        return text[len(before) + 1 :]
    if not text or before:
        raise Refused("does not say how it was made from the parent: give --passes")
    return text


def _steps(pipeline: str, *, recorded: bool) -> tuple[Pass, ...]:
    """The passes of a text, which anybody may have written if it is recorded in a model."""
    steps = parse(pipeline, third_party=not recorded) if pipeline else ()
    if recorded and len(steps) > _MOST:
        raise Refused(f"{len(steps)} passes are recorded, more than {_MOST}: give --passes")
    for step in steps if recorded else ():
        names = [name for words in named(step).values() for name in words]
        if not all(name.startswith(BY_HASH) for name in names):
            raise Refused(f"the recorded {step.name} names a file by its path: give --passes")
    return steps


def _remarks(child: ir.Model, path: Path) -> tuple[str, ...]:
    remarks = [
        f"{file.path.name}: {file.orphaned} bytes belong to no weight"
        for file in layout(path).files
        if file.orphaned
    ]
    made_by = child.metadata_props.get(VERSION_KEY)
    ours = importlib.metadata.version("onnxforge")
    if made_by not in (None, ours):
        remarks.append(f"made by onnxforge {made_by}, replayed by {ours}")
    return tuple(remarks)


def _parted(
    model: ir.Model,
) -> tuple[onnx.ModelProto, dict[tuple[str, int], ir.TensorProtocol]]:
    """The graph, which of weights has only names, types and shapes; and all these weights.

    They are known by path, and by number among those of one path, as names of nodes need not
    be unique. Text is part of the graph.
    """
    everything = {id(t) for t in tensors(model) if t.dtype != ir.DataType.STRING}
    content = skeleton(model, also=everything)
    paths = {id(weight.tensor): weight.where for weight in Weights(model)}
    taken: dict[tuple[str, int], ir.TensorProtocol] = {}
    count: Counter[str] = Counter()
    for stub, tensor in zip(content.stubs, content.tensors, strict=True):
        stub.ClearField("external_data")
        stub.ClearField("data_location")
        path = paths.get(id(tensor), stub.name)
        taken[path, count[path]] = tensor
        count[path] += 1
    return content.proto, taken


def _unequal(expected: ir.TensorProtocol, found: ir.TensorProtocol) -> str | None:
    """Where the bytes of two tensors first differ, or None."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"should be {expected.dtype}{expected.shape}, is {found.dtype}{found.shape}"
    read, check = reader(expected), reader(found)
    buffers = np.empty((2, min(BLOCK_BYTES, expected.nbytes)), np.uint8)
    for start, stop in blocks(expected):
        ours, theirs = buffers[:, : stop - start]
        read(start, ours)
        check(start, theirs)
        if not np.array_equal(ours, theirs):
            at = start + int(np.flatnonzero(ours != theirs)[0])
            return f"differs from byte {at} of {expected.nbytes} on"
    return None
