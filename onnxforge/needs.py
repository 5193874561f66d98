"""Values that a runtime has to know when it loads a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    import onnx_ir as ir

    from onnxforge.walk import Scope

__all__ = ["needed_constants", "needs_constant"]

# Inputs whose values a runtime needs when it loads a model, by operator: a shape or a scale
# that has to be a constant there, not the output of a Cast.
_NEEDS_CONSTANT: Mapping[str, tuple[int, ...]] = {
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Clip": (1, 2),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "DequantizeLinear": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "NonMaxSuppression": (2, 3, 4),
    "OneHot": (1,),
    "Pad": (1, 2, 3),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QuantizeLinear": (1, 2),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}


def needs_constant(domain: str, op_type: str) -> tuple[int, ...]:
    """Positions of the inputs of an operator that have to be constants at load time."""
    return _NEEDS_CONSTANT.get(op_type, ()) if domain in ("", "ai.onnx") else ()


def needed_constants(model: ir.Model, all_scopes: Iterable[Scope]) -> set[ir.Value]:
    """Values that a runtime has to know when it loads a model.

    Those that `needs_constant` tells, and what they are made from by Identity and Cast or
    come from as arguments of a function.

    Args:
        model: The model.
        all_scopes: All its scopes.
    """
    calls: dict[Hashable, list[ir.Node]] = {}
    waiting: list[ir.Value | None] = []
    for scope in all_scopes:
        for node in scope.graph:
            calls.setdefault(node.op_identifier(), []).append(node)
            fixed = needs_constant(node.domain, node.op_type)
            waiting += [node.inputs[i] for i in fixed if i < len(node.inputs)]
    formal = {
        value: (i, calls.get(function.identifier(), []))
        for function in model.functions.values()
        for i, value in enumerate(function.inputs)
    }
    needed: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        if value is None or value in needed:
            continue
        needed.add(value)
        maker = value.producer()
        if maker is not None and maker.op_type in ("Cast", "Identity") and not maker.domain:
            waiting += maker.inputs[:1]
        index, callers = formal.get(value, (0, []))
        waiting += [call.inputs[index] for call in callers if index < len(call.inputs)]
    return needed
