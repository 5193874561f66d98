"""Store float32 weights as float16, widened again before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxforge.core import Effect, Finding, Pass, Result
from onnxforge.errors import Refused
from onnxforge.lazy import DerivedTensor, stream
from onnxforge.numerics.half import OVERFLOW, SMALLEST_NORMAL, narrow, narrow_finite
from onnxforge.options import ByteSize
from onnxforge.selection import CODES, Selection, skipped, too_old, treated
from onnxforge.surgery import Surgery
from onnxforge.weights import Use, Weight, Weights, for_each
from onnxforge.widening import widen

__all__ = ["WeightsFp16CastPass"]

_REAL = ir.DataType.FLOAT
_TINY = 16  # elements; a tensor this small is a constant of a formula, not learned


@dataclass(frozen=True)
class WeightsFp16CastPass(Pass):
    """Store float32 weights as float16, cast back where they are used.

    Arithmetic, inputs and outputs stay float32: each weight is rounded to the nearest float16
    (ties to even) and read through a Cast; behind a Gather the Cast takes only the gathered
    rows. Runtimes fold these casts when they load the model, so that download and disk halve
    while memory and speed stay those of float32.

    A weight that float16 cannot hold stays float32 and is reported: one with a finite value
    that would become infinite, and a small constant (an epsilon, a log guard, a mask) that
    would lose more than rounding. Nothing is ever clamped.

    Attributes:
        min_bytes: Leave smaller weights alone.
        include: Globs on names of weights and of nodes that read them; only those are treated.
        exclude: The same, of what to leave alone.
        on_overflow: ``keep`` leaves a weight that does not fit in float32, ``error`` refuses
            the model.
        share: One Cast for all users of a weight in a graph; false makes one for each.

    Example:
        onnxforge run --passes 'fp16w{min_bytes=64KiB exclude=lm_head*}' in.onnx out.onnx
    """

    name: ClassVar[str] = "fp16w"
    effect: ClassVar[Effect] = Effect.STORAGE
    codes: ClassVar[Mapping[str, str]] = {
        **CODES,
        "OF221": "A finite value is beyond the range of float16 and would become infinite.",
        "OF222": "A small constant would become zero or subnormal in float16, which loses"
        " more than rounding.",
    }

    min_bytes: ByteSize = ByteSize(1024)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_overflow: Literal["keep", "error"] = "keep"
    share: bool = True

    def call(self, model: ir.Model) -> Result:
        """Narrow every weight that float16 can hold."""
        weights = Weights(model)
        selection = Selection(
            frozenset({ir.DataType.FLOAT}), self.min_bytes, self.include, self.exclude
        )
        chosen, findings = selection.split(weights)
        scans = for_each(_scan, chosen)
        for obstacle in (scan for scan in scans if isinstance(scan, Finding)):
            if obstacle.code == "OF221" and self.on_overflow == "error":
                raise Refused(f"{obstacle}; on_overflow=keep leaves it in float32")
        decoded: dict[str, ir.TensorProtocol] = {}
        surgery = Surgery(weights)
        for weight, scan in zip(chosen, scans, strict=True):
            if isinstance(scan, Finding):
                findings.append(scan)
                continue
            findings.append(treated(weight, "stored as float16"))
            stored = DerivedTensor(weight.tensor, ir.DataType.FLOAT16, scan)
            decoded[weight.where] = DerivedTensor(stored, ir.DataType.FLOAT, _Widen())
            weight.store(stored)
            widen(weight, _Halves(), surgery, share=self.share)
        return Result(model, bool(decoded), {}, tuple(findings), decoded)


@dataclass(frozen=True)
class _Narrow:
    """float32 to float16; most weights have neither NaN nor infinity and take the fast way."""

    finite: bool

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        (narrow_finite if self.finite else narrow)(block, out)


@dataclass(frozen=True)
class _Widen:
    """float16 to float32, exact."""

    def __call__(self, block: np.ndarray, out: np.ndarray, start: int) -> None:
        np.copyto(out, block)


class _Halves:
    """float16 for float32: one Cast, which after a Gather takes only what was gathered."""

    word = "fp16w"
    dtype = ir.DataType.FLOAT16

    def is_behind(self, use: Use) -> bool:
        return use.node.op_type == "Gather" and not use.node.domain and use.index == 0

    def whole(self, stored: ir.Value, output: str, surgery: Surgery) -> list[ir.Node]:
        cast = surgery.node("Cast", [stored], output, _REAL, {"to": _REAL})
        cast.outputs[0].shape = None if stored.shape is None else stored.shape.copy()
        return [cast]

    def taken(self, reader: ir.Node, output: str, surgery: Surgery) -> list[ir.Node]:
        return self.whole(reader.outputs[0], output, surgery)


def _scan(weight: Weight) -> _Narrow | Finding:
    """The kernel that narrows a weight, or the reason why it has to stay."""
    if (obstacle := too_old(weight, 6, "Cast")) is not None:
        return obstacle
    finite = True
    is_tiny = weight.tensor.size <= _TINY
    for content in stream(weight.tensor):
        block = content.view(np.float32)
        # NaN makes both extremes NaN and an infinity is one, so this settles most blocks.
        if block.min() > -OVERFLOW and block.max() < OVERFLOW and not is_tiny:
            continue
        magnitude = np.abs(block[np.isfinite(block)])
        finite = finite and len(magnitude) == len(block)
        if magnitude.size and magnitude.max() >= OVERFLOW:
            detail = f"holds {magnitude.max():g}"
            return skipped(weight, "OF221", "overflows float16", detail)
        lost = magnitude[(magnitude > 0) & (magnitude < SMALLEST_NORMAL)]
        if is_tiny and lost.size:
            detail = f"holds {lost.min():g}"
            return skipped(weight, "OF222", "too small for float16", detail)
    return _Narrow(finite)
