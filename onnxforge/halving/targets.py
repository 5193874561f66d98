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
    from collections.abc import Hashable, Iterator, Sequence

    from onnxforge.halving.parts import Part, Parts

__all__ = ["Kernels", "Target"]

Target = Literal["cuda", "tensorrt", "webgpu", "cpu", "any"]

# TensorRT leaves to CUDA what it does not take; what runs anywhere runs on a processor.
_PROVIDERS: Mapping[Target, Provider] = {
    "any": "cpu",
    "cpu": "cpu",
    "cuda": "cuda",
    "tensorrt": "cuda",
    "webgpu": "webgpu",
}


class Kernels:
    """What a target has kernels for, as the newest release knows it that the tables are of."""

    def __init__(self, target: Target, parts: Parts) -> None:
        """Ask about the parts of a model."""
        self._target = target
        self._parts = parts
        self._known: dict[Hashable, bool] = {}

    def lack(self, part: Part) -> bool:
        """Whether onnxruntime has no kernel there for an operator in half precision."""
        node, scope = part.node, part.scope
        if node is None or scope is None:
            return False
        if self._target == "webgpu" and self._parts.dtype == ir.DataType.BFLOAT16:
            return True  # its shaders have no such type, which the documents do not tell
        imports = scope.opset_imports
        inputs = tuple(_types(node.inputs, part.turned[0], self._parts))
        outputs = tuple(_types(node.outputs, part.turned[1], self._parts))
        key = node.op_type, imports.get(""), inputs, outputs, tuple(node.attributes)
        if key not in self._known:
            use = Use(part.where, node, imports, inputs, outputs, node.attributes)
            provider = _PROVIDERS[self._target]
            release = (releases() if provider == "cpu" else documented())[-1]
            reason = node_reason(use, release, provider)
            self._known[key] = reason is not None and reason.kind == "kernel"
        return self._known[key]


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
