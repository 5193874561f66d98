"""Whether a target has a kernel for an operator in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from onnxforge.runtime.kernels import Provider, documented, releases
from onnxforge.runtime.support import node_reason
from onnxforge.runtime.types import of_value
from onnxforge.runtime.uses import Use

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxforge.halving.parts import Part, Parts

__all__ = ["Target", "lacks_kernel"]

Target = Literal["cuda", "tensorrt", "webgpu", "cpu", "any"]

# TensorRT leaves to CUDA what it does not take; what runs anywhere runs on a processor.
_PROVIDERS: Mapping[Target, Provider] = {
    "any": "cpu",
    "cpu": "cpu",
    "cuda": "cuda",
    "tensorrt": "cuda",
    "webgpu": "webgpu",
}


def lacks_kernel(target: Target, part: Part, parts: Parts) -> bool:
    """Whether onnxruntime has no kernel on a target for an operator in half precision.

    Args:
        target: The target, as the newest release knows it that the tables are of.
        part: The operator.
        parts: All parts.
    """
    node, scope = part.node, part.scope
    if node is None or scope is None:
        return False
    if target == "webgpu" and parts.dtype == ir.DataType.BFLOAT16:
        return True  # its shaders have no such type, which the documents do not tell
    provider = _PROVIDERS[target]
    release = (releases() if provider == "cpu" else documented())[-1]
    inputs = tuple(_types(node.inputs, part.turned[0], parts))
    outputs = tuple(_types(node.outputs, part.turned[1], parts))
    use = Use(part.where, node, scope.opset_imports, inputs, outputs, node.attributes)
    reason = node_reason(use, release, provider)
    return reason is not None and reason.kind == "kernel"


def _types(
    values: Sequence[ir.Value | None], turned: set[int], parts: Parts
) -> Iterator[str | None]:
    for index, value in enumerate(values):
        if value is None:
            yield ""
        elif index in turned:
            yield of_value(ir.TensorType(parts.dtype))
        else:
            yield of_value(parts.elements.type(value))
