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

    Weights, Constant nodes, values and attributes that name a type become bfloat16, in bodies
    of If, Loop and Scan and in functions, which are converted once for all their calls.
    Float32 stay, and are reported: inputs and outputs that ``keep_io`` names, operators that
    are blocked, what an integer, a size or a position is computed from, and inputs that are
    float32 by definition, as the scales of Resize. A value that both read is cast once, and
    what stands between goes where it takes the fewest casts.

    A mask below the lowest bfloat16 becomes finite. bfloat16 came with opset 13, for
    convolutions with opset 22; what has no such type at the model's opset stays float32, and
    so does what the target has no kernel for. A model or a target without any is refused.

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
