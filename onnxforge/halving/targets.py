"""Whether a target has a kernel for an operator in half precision."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

__all__ = ["Target", "lacks_kernel"]

Target = Literal["cuda", "tensorrt", "webgpu", "cpu", "any"]

# What onnxruntime's CUDA provider documents no bfloat16 kernel for.
_NOT_ON_CUDA = frozenset(
    {"Log", "Pad", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "Sin", "TopK"}
)


def lacks_kernel(target: Target, dtype: ir.DataType, op_type: str, version: int) -> bool:
    """Whether a target cannot run an operator of ai.onnx on values of a half type.

    Args:
        target: The target.
        dtype: The type.
        op_type: The operator.
        version: Of ai.onnx.
    """
    if dtype == ir.DataType.FLOAT16:
        return False
    if target in ("cuda", "tensorrt"):
        return op_type in _NOT_ON_CUDA
    return True
