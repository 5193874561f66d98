"""Compute in float16 inside of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxforge.core import Effect, Pass, Result
from onnxforge.halving import CODES, FLOAT16, Policy, Target, halve

__all__ = ["Fp16BoundaryCastPass"]


@dataclass(frozen=True)
class Fp16BoundaryCastPass(Pass):
    """Turn the float32 inside into float16, with casts only at boundaries.

    Weights, Constant nodes, values and attributes that name a type become float16, in bodies
    of If, Loop and Scan and in functions, which are converted once for all their calls.
    Float32 stay, and are reported: inputs and outputs that ``keep_io`` names, operators that
    are blocked, what an integer, a size or a position is computed from, and inputs that are
    float32 by definition, as the scales of Resize. A value that both read is cast once, and
    what stands between goes where it takes the fewest casts.

    Constants that float16 does not hold stay float32 with what reads them, a guard against
    zero up to the division that it guards; a mask before a Softmax becomes finite. Activations
    that overflow are found on ``samples``, or by `onnxforge emulate`, which names them.

    Attributes:
        keep_io: ``all``, ``none``, or globs on the inputs and outputs that stay float32; the
            others change their type.
        block_op_types: Operators that stay float32; ``default`` stands for the usual ones.
        block_nodes: Globs on names of nodes that stay float32.
        target: What has to run the result.
        samples: Archives of inputs (.npz); what is out of range on them stays float32.
        raise_opset: Raise a lower opset to this one first.

    Example:
        onnxforge run --passes 'fp16{keep_io=none}' in.onnx out.onnx
    """

    name: ClassVar[str] = "fp16"
    effect: ClassVar[Effect] = Effect.APPROX
    files: ClassVar[tuple[str, ...]] = ("samples",)
    codes: ClassVar[Mapping[str, str]] = CODES

    keep_io: tuple[str, ...] = ("all",)
    block_op_types: tuple[str, ...] = ("default",)
    block_nodes: tuple[str, ...] = ()
    target: Target = "any"
    samples: tuple[str, ...] = ()
    raise_opset: int | None = None

    def call(self, model: ir.Model) -> Result:
        """Turn all that may be float16 into it."""
        policy = Policy(
            self.keep_io,
            self.block_op_types,
            self.block_nodes,
            self.target,
            self.samples,
            self.raise_opset,
        )
        return halve(model, FLOAT16, policy)
