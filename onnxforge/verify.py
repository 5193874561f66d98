"""What a valid model means here, checked without reading a weight."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from onnxforge.skeleton import skeleton
from onnxforge.walk import proto_graphs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["interface", "problem"]


def problem(model: ir.Model) -> str | None:
    """The first thing that is wrong with a model, or None.

    Names are unique in their graph, nodes are sorted, and onnx's checker with its type
    inference finds nothing. Weights are stubs meanwhile; an empty file stands for their data.
    """
    content = skeleton(model)
    if found := next(_repeated_names(content.proto), None):
        return found
    with tempfile.TemporaryDirectory(prefix="onnxforge-") as folder:
        (Path(folder) / content.location).touch()
        path = Path(folder) / "model.onnx"
        path.write_bytes(content.proto.SerializeToString())
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            return " ".join(str(error).replace(content.location, "(data)").split())
    return None


def _repeated_names(model: onnx.ModelProto) -> Iterator[str]:
    for graph in proto_graphs(model):
        made = [name for node in graph.node for name in node.output if name]
        inputs = {value.name for value in graph.input}
        made += inputs | {tensor.name for tensor in graph.initializer}
        for name, count in Counter(made).items():
            if count > 1:
                yield f"value {name!r} is made twice"


def interface(
    model: ir.Model, retyped: Mapping[str, ir.DataType] | None = None
) -> tuple[object, ...]:
    """What callers of a model rely on: names, types and shapes of inputs and outputs.

    Args:
        model: The model.
        retyped: Tensors to describe with other elements than they have, by name.
    """

    def typed(value: ir.Value) -> str:
        dtype = (retyped or {}).get(value.name or "")
        is_tensor = dtype is not None and isinstance(value.type, ir.TensorType)
        return str(ir.TensorType(dtype) if dtype and is_tensor else value.type)

    def described(values: list[ir.Value]) -> tuple[object, ...]:
        return tuple((value.name, typed(value), str(value.shape)) for value in values)

    return described(list(model.graph.inputs)), described(list(model.graph.outputs))
