"""The laws that passes are held to, on any model: CHECK, LAYOUT, STORAGE, and two for all."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from onnxforge.core import Effect
from onnxforge.errors import BrokenPass, Refused, RuntimeFailed
from onnxforge.layout import layout
from onnxforge.lazy import identity, sha256
from onnxforge.model_io import load
from onnxforge.numerics.samples import random_inputs
from onnxforge.placement import PLACEMENT
from onnxforge.runtime.session import run
from onnxforge.saving import save
from onnxforge.skeleton import skeleton, twin
from onnxforge.walk import proto_graphs, proto_tensors
from onnxforge.weights import Weights

if TYPE_CHECKING:
    from onnxforge.core import Pass, Result

__all__ = ["Witness", "content", "digest", "payloads"]

_Arrays = Mapping[str, np.ndarray]
_PAYLOADS = (
    "raw_data",
    "external_data",
    "data_location",
    *(f"{kind}_data" for kind in ("float", "double", "string", "int32", "int64", "uint64")),
)
_SIZES = (8, 16, 64, 1, 3, 128)  # lengths to try for open axes


def digest(model: ir.Model) -> str:
    """SHA-256 of the graph, in which weights stand for where their bytes come from."""
    content = skeleton(model)
    text = content.proto.SerializeToString(deterministic=True)
    text = text.replace(content.location.encode(), b"")
    sources = repr([identity(tensor) for tensor in content.tensors])
    return hashlib.sha256(text + sources.encode()).hexdigest()


def payloads(model: ir.Model) -> list[tuple[str, str]]:
    """Path and SHA-256 of the bytes of every weight, in order of the paths."""
    found = []
    for weight in Weights(model):
        if weight.dtype == ir.DataType.STRING:
            text = repr(weight.tensor.numpy().tolist())
            found.append((weight.where, hashlib.sha256(text.encode()).hexdigest()))
        else:
            found.append((weight.where, sha256(weight.tensor)))
    return sorted(found)


def content(model: ir.Model) -> str:
    """SHA-256 of the graph, the functions and the bytes of all weights, wherever they lie."""
    return hashlib.sha256(_graph(model) + repr(payloads(model)).encode()).hexdigest()


def _graph(model: ir.Model) -> bytes:
    """The graph and the functions; weights stand for their type and shape.

    A Constant node says the same as an initializer: weights are sorted by name.
    """
    proto = skeleton(model).proto
    for graph in proto_graphs(proto):
        _lift_all(graph)
    for tensor in proto_tensors(proto):
        for field in _PAYLOADS:
            tensor.ClearField(field)
    # Types of values in functions stand in one of two places, by the IR version.
    prefixes = tuple(f"{function.domain}::{function.name}/" for function in proto.functions)
    kept = [v for v in proto.graph.value_info if not v.name.startswith(prefixes)]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    for function in proto.functions:
        function.ClearField("value_info")
    parts = [proto.graph, *proto.functions]
    return b"".join(part.SerializeToString(deterministic=True) for part in parts)


def _lift_all(graph: onnx.GraphProto) -> None:
    """Make initializers of the Constant nodes."""
    nodes = list(graph.node)
    weights = list(graph.initializer)
    for node in [node for node in nodes if node.op_type == "Constant" and not node.domain]:
        if (tensor := _value(node)) is not None:
            nodes.remove(node)
            weights.append(tensor)
    weights.sort(key=lambda tensor: tensor.name)
    names = {tensor.name for tensor in weights}
    types = [value for value in graph.value_info if value.name not in names]
    for field, values in (("node", nodes), ("initializer", weights), ("value_info", types)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def _value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor that a Constant node holds; None for scalars and text, which stay there."""
    if len(node.attribute) != 1 or not node.output:
        return None
    (attribute,) = node.attribute
    if attribute.HasField("t"):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(attribute.t)
    elif attribute.name == "value_floats":
        tensor = onnx.TensorProto(
            data_type=onnx.TensorProto.FLOAT, dims=[len(attribute.floats)]
        )
    elif attribute.name == "value_ints":
        tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT64, dims=[len(attribute.ints)])
    else:
        return None
    tensor.name = node.output[0]
    if node.doc_string and not tensor.doc_string:
        tensor.doc_string = node.doc_string
    tensor.metadata_props.extend(node.metadata_props)
    return tensor


class Witness:
    """Sees a model before a pass and holds the pass to its laws afterwards."""

    def __init__(self, step: Pass, model: ir.Model, inputs: _Arrays | None = None) -> None:
        """Look at the model before the pass runs.

        Args:
            step: The pass.
            model: The model, unchanged so far.
            inputs: Values to run it on; drawn at random if not given.
        """
        self._step = step
        self._inputs = inputs
        self._digest = digest(model)
        self._graph = _graph(model) if step.effect is Effect.LAYOUT else b""
        self._payloads = payloads(model) if step.effect is Effect.LAYOUT else []
        self._parent = twin(model) if step.effect is Effect.STORAGE else None

    def hold(self, result: Result) -> None:
        """Check the flag, idempotence and the law of the effect.

        Raises:
            BrokenPass: The pass broke a law.
            Refused: The law needs the model to run and it does not, on the given inputs.
        """
        name = self._step.name
        changed = digest(result.model) != self._digest
        if changed != result.modified:
            raise BrokenPass(f"{name} says modified={result.modified}, which is not so")
        if self._step.effect is Effect.CHECK and changed:
            raise BrokenPass(f"{name} is a check and changed the model")
        if self._step.effect is Effect.LAYOUT and payloads(result.model) != self._payloads:
            raise BrokenPass(f"{name} changed the bytes of a weight")
        if self._step.effect is Effect.LAYOUT and _graph(result.model) != self._graph:
            raise BrokenPass(f"{name} changed the graph")
        if self._step.effect is Effect.LAYOUT and PLACEMENT in result.model.meta:
            self._hold_placement(result.model)
        if self._parent is not None and changed:
            self._hold_storage(self._parent, result)
        if changed and self._step(result.model).modified:
            raise BrokenPass(f"{name} changes its own result when it runs again")

    def _hold_placement(self, model: ir.Model) -> None:
        """Data files as they will be saved hold the same bytes, and no others."""
        with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
            path = Path(folder) / "model.onnx"
            save(model, path)
            if payloads(load(path, editable=False)) != self._payloads:
                raise BrokenPass(f"{self._step.name} changes the bytes of a weight when saved")
            align = model.meta[PLACEMENT].align
            for file in layout(path).files:
                gaps = [part.size for part in file.ranges if not part.owners]
                if max(gaps, default=0) >= align or not file.ranges[-1].owners:
                    raise BrokenPass(f"{self._step.name} leaves holes in a data file")

    def _hold_storage(self, parent: ir.Model, result: Result) -> None:
        """The result equals the parent whose weights have the decoded values, bit for bit."""
        for weight in Weights(parent):
            if (decoded := result.decoded.get(weight.where)) is not None:
                weight.store(decoded)
        with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
            expected, tier = Path(folder) / "parent.onnx", Path(folder) / "tier.onnx"
            save(parent, expected)
            save(result.model, tier)
            for inputs, outputs in self._samples(parent, expected):
                self._compare(expected, tier, inputs, outputs)

    def _samples(self, model: ir.Model, path: Path) -> list[tuple[_Arrays, _Arrays]]:
        """What the model makes of the inputs given, or of two draws of a size it takes."""
        failures: list[RuntimeFailed] = []
        given = None if self._inputs is None else [[self._inputs]]
        for samples in given or _drawn(model):
            if found := _outputs(path, samples, failures):
                return found
        raise Refused(f"the law needs inputs that the model runs on: {failures[0]}")

    def _compare(self, expected: Path, tier: Path, inputs: _Arrays, wanted: _Arrays) -> None:
        name = self._step.name
        try:
            found = run(tier, inputs)
        except RuntimeFailed as error:
            raise BrokenPass(f"{name} made a model that does not run: {error}") from error
        if not wanted:
            raise Refused("the law cannot compare: no output is a tensor of numbers")
        for output, values in wanted.items():
            if found[output].tobytes() == values.tobytes():
                continue
            if run(expected, inputs)[output].tobytes() != values.tobytes():
                raise Refused(f"the law cannot compare: output {output!r} is random")
            raise BrokenPass(f"{name} is not bit-equal to its parent: output {output!r}")


def _drawn(model: ir.Model) -> Iterator[Sequence[_Arrays]]:
    """Pairs of random inputs, of one size after the other."""
    needed = [value for value in model.graph.inputs if not value.is_initializer()]
    for size in _SIZES:
        drawn = random_inputs(needed, size=size)
        # Both branches of an If on an input are to be seen.
        flipped = {k: ~v for k, v in drawn.items() if v.dtype == np.bool_}
        yield drawn, random_inputs(needed, size=size, seed=1) | flipped


def _outputs(
    path: Path, samples: Sequence[_Arrays], failures: list[RuntimeFailed]
) -> list[tuple[_Arrays, _Arrays]]:
    """The samples that a model runs on, each with its outputs; why not of the others."""
    found: list[tuple[_Arrays, _Arrays]] = []
    for inputs in samples:
        try:
            found.append((inputs, run(path, inputs)))
        except RuntimeFailed as error:
            failures.append(error)
    return found
