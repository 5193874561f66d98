"""The float32 parent that a tier which stores weights in another form has to equal.

Nothing here uses onnxforge.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import oracle

LARGEST = 127
Held = tuple[TensorProto, Callable[[TensorProto], Any]]


def write(source: Path, tier: Path, target: Path) -> int:
    """Write the parent, its weights rounded as those of the tier are; how many are."""
    model, count = onnx.load(source), 0
    for own, other in zip(_scopes(model), _scopes(onnx.load(tier)), strict=True):
        weights, stored = _held(own), _held(other)
        added = stored.keys() - weights.keys()
        for name in weights.keys() & stored.keys():
            tensor, put = weights[name]
            values, kind = numpy_helper.to_array(tensor), stored[name][0].data_type
            if tensor.data_type != TensorProto.FLOAT or kind == TensorProto.FLOAT:
                continue
            if kind == TensorProto.FLOAT16:
                rounded = oracle.rounded_fp16(values)
            else:
                scales = [
                    numpy_helper.to_array(stored[found][0])
                    for kind in ("scale", "input_scale")
                    for found in added
                    if re.fullmatch(rf"{re.escape(name)}_{kind}(_\d+)?", found)
                ]
                rounded = rounded_int8(values, *scales)
            put(numpy_helper.from_array(rounded, tensor.name))
            count += 1
    onnx.save(model, target)
    return count


def rounded_int8(
    values: np.ndarray, scale: np.ndarray, inputs: np.ndarray | None = None
) -> np.ndarray:
    """Return float32 values that went through int8, divided by a scale of inputs if any."""
    divided = values if inputs is None else values / inputs
    levels = np.clip(np.rint(divided / scale), -LARGEST, LARGEST)
    outputs = levels.astype(np.int8).astype(np.float32) * scale
    return outputs if inputs is None else outputs * inputs


def _scopes(model: ModelProto) -> Iterator[Any]:
    """Every graph and function, in the same order for a model and its tier."""
    waiting: list[Any] = [model.graph, *model.functions]
    for scope in waiting:
        yield scope
        for node in scope.node:
            for attribute in node.attribute:
                own = [attribute.g] if attribute.HasField("g") else []
                waiting += [*attribute.graphs, *own]


def _held(scope: Any) -> dict[str, Held]:
    """Initializers and Constants by name, and what puts another tensor in their place."""
    found: dict[str, Held] = {}
    for tensor in getattr(scope, "initializer", ()):
        found[tensor.name] = tensor, tensor.CopyFrom
    for node in scope.node:
        if node.op_type != "Constant":
            continue
        (attribute,) = node.attribute
        if attribute.name in ("value", "value_floats"):
            value = helper.get_attribute_value(attribute)
            if attribute.name == "value_floats":
                value = numpy_helper.from_array(np.array(value, np.float32))
            found[node.output[0]] = value, functools.partial(_put, node)
    return found


def _put(node: NodeProto, tensor: TensorProto) -> None:
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("value", tensor))
