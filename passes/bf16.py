"""Compute in bfloat16 inside of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxforge.core import Effect, Pass, Result
from onnxforge.halving import BFLOAT16, CODES, Policy, Target, halve

__all__ = ["Bf16BoundaryCastPass"]


@dataclass(frozen=True)
class Bf16BoundaryCastPass(Pass):
    """Turn the float32 inside into bfloat16, with casts only at boundaries.

    Attributes:
        keep_io: ``all``, ``none``, or globs on the inputs and outputs that stay float32; the
            others change their type.
        block_op_types: Operators that stay float32; ``default`` stands for the usual ones.
        block_nodes: Globs on names of nodes that stay float32.
        target: What has to run the result.
        samples: Archives of inputs (.npz); what is out of range on them stays float32.
        raise_opset: Raise a lower opset to this one first.

    Example:
        onnxforge run --passes 'bf16{keep_io=audio_embeds,logits}' in.onnx out.onnx
    """

    name: ClassVar[str] = "bf16"
    effect: ClassVar[Effect] = Effect.APPROX
    files: ClassVar[tuple[str, ...]] = ("samples",)
    codes: ClassVar[Mapping[str, str]] = CODES

    keep_io: tuple[str, ...] = ("all",)
    block_op_types: tuple[str, ...] = ("default",)
    block_nodes: tuple[str, ...] = ()
    target: Target = "cuda"
    samples: tuple[str, ...] = ()
    raise_opset: int | None = None

    def call(self, model: ir.Model) -> Result:
        """Turn all that may be bfloat16 into it."""
        policy = Policy(
            self.keep_io,
            self.block_op_types,
            self.block_nodes,
            self.target,
            self.samples,
            self.raise_opset,
        )
        return halve(model, BFLOAT16, policy)
