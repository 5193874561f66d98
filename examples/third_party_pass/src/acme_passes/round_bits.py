"""Round float32 weights to fewer bits, so that archives of the model become smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxforge.core import Effect, Pass, Result
from onnxforge.lazy import DerivedTensor, stream
from onnxforge.options import ByteSize
from onnxforge.selection import CODES, Selection, skipped, treated
from onnxforge.weights import Weight, Weights

__all__ = ["RoundBitsPass"]

_FRACTION = 23  # bits of the fraction of a float32


@dataclass(frozen=True)
class RoundBitsPass(Pass):
    """Round float32 weights to fewer bits; they stay float32.

    The bits that go become zero, of which gzip and zstd make little: with ``keep=10`` a
    compressed download shrinks by a third, and weights are as exact as TensorFloat-32. Values
    are rounded to the nearest, ties to even; NaN and infinities stay as they are.

    Attributes:
        keep: How many bits of the fraction stay, 0 to 22.
        min_bytes: Leave smaller weights alone.
        include: Globs on names of weights and of nodes that read them; only those are treated.
        exclude: The same, of what to leave alone.

    Example:
        onnxforge run --passes 'round-bits{keep=10}' in.onnx out.onnx
    """

    name: ClassVar[str] = "round-bits"
    effect: ClassVar[Effect] = Effect.STORAGE
    codes: ClassVar[Mapping[str, str]] = {
        **CODES,
        "ACME101": "All values of the weight have no more bits than that already.",
    }

    keep: int = 10
    min_bytes: ByteSize = ByteSize(1024)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a number of bits that float32 has not.

        Raises:
            ValueError: ``keep`` is out of range.
        """
        super().__post_init__()
        if not 0 <= self.keep < _FRACTION:
            raise ValueError(f"keep must be 0 to {_FRACTION - 1}, not {self.keep}")

    def call(self, model: ir.Model) -> Result:
        """Round every weight that has more bits."""
        kernel = _Round(self.keep)
        selection = Selection(
            frozenset({ir.DataType.FLOAT}), self.min_bytes, self.include, self.exclude
        )
        chosen, findings = selection.split(Weights(model))
        decoded: dict[str, ir.TensorProtocol] = {}
        for weight in chosen:
            if _is_round(weight, kernel):
                findings.append(skipped(weight, "ACME101", "is round already"))
                continue
            findings.append(treated(weight, f"rounded to {self.keep} bits"))
            # Nothing is computed here: the kernel runs block by block when the model is saved.
            decoded[weight.where] = DerivedTensor(weight.tensor, ir.DataType.FLOAT, kernel)
            weight.store(decoded[weight.where])
        return Result(model, bool(decoded), findings=tuple(findings), decoded=decoded)


@dataclass(frozen=True)
class _Round:
    """Round to the nearest, ties to even, by integer arithmetic: alike on every machine."""

    keep: int

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        gone = np.uint32(_FRACTION - self.keep)
        one = np.uint32(1)
        bits = block.view(np.uint32)
        odd = (bits >> gone) & one
        rounded = (bits + ((one << (gone - one)) - one) + odd) >> gone << gone
        out[...] = np.where(np.isfinite(block), rounded.view(np.float32), block)


def _is_round(weight: Weight, kernel: _Round) -> bool:
    for content in stream(weight.tensor):
        block = content.view(np.float32)
        rounded = np.empty_like(block)
        kernel(block, rounded, 0)
        if rounded.tobytes() != block.tobytes():
            return False
    return True
