"""Tiers in half precision: made, checked from outside, and run.

What is checked here does not use onnxforge: types as onnx infers them, casts as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper, parser

from onnxforge import PassManager
from onnxforge.emulation import emulate
from onnxforge.manager import Report
from onnxforge.model_io import from_proto, to_proto
from support import oracle

Array = np.ndarray
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
ONNX = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
HALVES = frozenset(ONNX.values())


def parsed(text: str, **weights: Array) -> ModelProto:
    """A model from text, with initializers; graphs in it find theirs by ``graph__name``."""
    model = parser.parse_model(text)
    places = {graph.name: graph for graph in graphs(model)}
    for name, value in weights.items():
        place, _, inner = name.rpartition("__")
        graph = places[place] if place else model.graph
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), inner))
    for graph in [*graphs(model), *model.functions]:
        for node in graph.node:
            node.name = node.name or f"n_{node.output[0]}"
    return model


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The main graph and all bodies."""
    yield model.graph
    for owner in (model.graph, *model.functions):
        yield from _bodies(owner.node)


def _bodies(nodes: list[NodeProto]) -> Iterator[GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _bodies(attribute.g.node)


def nodes(model: ModelProto) -> Iterator[NodeProto]:
    """All nodes, wherever they are."""
    for owner in (*graphs(model), *model.functions):
        yield from owner.node


def tier(model: ModelProto, text: str) -> tuple[ModelProto, Report]:
    """The result of a pipeline; it is valid, sorted, and stays as it is the second time."""
    made, report = PassManager(text).apply(model)
    onnx.checker.check_model(made, full_check=True)
    again, second = PassManager(text).apply(made)
    assert not second.modified
    assert [n.op_type for n in nodes(again)] == [n.op_type for n in nodes(made)]
    assert list(idle_casts(made)) == []
    return made, report


def emulated(model: ModelProto) -> ModelProto:
    """The float32 model that rounds as a tier does."""
    wrapped = from_proto(model)
    emulate(wrapped)
    made = to_proto(wrapped)
    onnx.checker.check_model(made, full_check=True)
    return made


def outputs(model: ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What the emulation of a tier gives."""
    return oracle.run(emulated(model), inputs)


def idle_casts(model: ModelProto) -> Iterator[str]:
    """Casts that undo their neighbour, and those that repeat one."""
    seen: set[tuple[str, int]] = set()
    for owner in (*graphs(model), *model.functions):
        makers = {name: node for node in owner.node for name in node.output}
        for node in owner.node:
            if node.op_type != "Cast":
                continue
            key = node.input[0], node.attribute[0].i
            before = makers.get(node.input[0])
            if key in seen:
                yield f"{node.name} repeats a cast"
            if before is not None and before.op_type == "Cast":
                types = {before.attribute[0].i, node.attribute[0].i}
                if types & HALVES and TensorProto.FLOAT in types:
                    yield f"{node.name} undoes {before.name}"
            seen.add(key)


def types(model: ModelProto) -> dict[str, int]:
    """Type of each value of the main graph and its bodies, as onnx infers it."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    found: dict[str, int] = {}
    for graph in graphs(inferred):
        for value in (*graph.input, *graph.value_info, *graph.output):
            found[value.name] = value.type.tensor_type.elem_type
        found |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return found


def constants(model: ModelProto) -> set[str]:
    """Names of inputs, outputs of bodies and initializers."""
    found: set[str] = set()
    for graph in graphs(model):
        found |= {value.name for value in (*graph.input, *graph.output)}
        found |= {tensor.name for tensor in graph.initializer}
    return found


def ops(model: ModelProto, op_type: str) -> list[NodeProto]:
    """All nodes of an operator."""
    return [node for node in nodes(model) if node.op_type == op_type]


def rounded(values: Array, word: str) -> Array:
    """float32 values as a half type holds them."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(NUMPY[word]).astype(np.float32)
