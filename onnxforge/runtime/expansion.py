"""Operators that onnx itself makes of others: a runtime without a kernel runs those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir import serde

from onnxforge.runtime.types import to_proto

__all__ = ["as_node", "function", "has_builder"]


def function(
    operator: tuple[str, str, int],
    inputs: Sequence[str | None],
    outputs: Sequence[str | None],
    attributes: Mapping[str, ir.Attr],
    shapes: Sequence[ir.Shape | None] = (),
) -> ir.Function | None:
    """The nodes that an operator is made of.

    Args:
        operator: Domain, name, and version of the operator set.
        inputs: Types of the inputs, "" for one that is left out.
        outputs: Types of the outputs, likewise.
        attributes: The attributes of the node.
        shapes: Shapes of the inputs, as far as they are known; some operators are made of
            others for each number of axes.

    Returns:
        None for an operator that is not made of others, or not with such inputs.
    """
    domain, op_type, version = operator
    try:
        schema: Any = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    if fixed := [v for v in schema.function_opset_versions if v <= version]:
        body = _read(schema.get_function_with_opset_version(max(fixed)))
        return body if body and _holds(body, max(fixed), version) else None
    built = [v for v in schema.context_dependent_function_opset_versions if v <= version]
    types = [to_proto(kind) if kind else onnx.TypeProto() for kind in inputs]
    if not built or None in types or None in inputs:
        return None
    for kind, shape in zip(types, shapes, strict=False):
        if kind is not None and shape is not None and kind.HasField("tensor_type"):
            serde.serialize_shape_into(kind, shape)
    text = schema.get_context_dependent_function_with_opset_version(
        max(built),
        as_node((domain, op_type), inputs, outputs, attributes).SerializeToString(),
        [kind.SerializeToString() for kind in types if kind is not None],
    )
    return _read(text)


def has_builder(operator: tuple[str, str, int]) -> bool:
    """Whether onnx makes an operator of others for what it is fed, shapes included."""
    domain, op_type, version = operator
    try:
        schema: Any = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return False
    return any(v <= version for v in schema.context_dependent_function_opset_versions)


def _holds(body: ir.Function, written: int, version: int) -> bool:
    """Whether its operators are, at a later version, still those it was written with."""
    return all(
        onnx.defs.get_schema(node.op_type, written, node.domain).since_version
        == onnx.defs.get_schema(node.op_type, version, node.domain).since_version
        for node in body.graph
        if node.domain == ""
    )


def _read(text: bytes) -> ir.Function | None:
    made = onnx.FunctionProto.FromString(text)
    # Outputs that the node does without are made by nothing, which onnx_ir does not read.
    known = {*made.input, *(name for node in made.node for name in node.output)}
    made.output[:] = [name for name in made.output if name in known]
    return serde.deserialize_function(made) if made.node else None


def as_node(
    operator: tuple[str, str],
    inputs: Sequence[str | None],
    outputs: Sequence[str | None],
    attributes: Mapping[str, ir.Attr],
) -> onnx.NodeProto:
    """A node by itself, whose inputs are called in0 and on, and its outputs out0."""
    node = onnx.NodeProto(domain=operator[0], op_type=operator[1])
    node.input.extend("" if kind == "" else f"in{i}" for i, kind in enumerate(inputs))
    node.output.extend("" if kind == "" else f"out{i}" for i, kind in enumerate(outputs))
    node.attribute.extend(serde.serialize_attribute(a) for a in attributes.values())
    return node
