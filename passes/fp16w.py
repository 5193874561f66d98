"""Store float32 weights as float16, widened again before they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxforge.core import Effect, Fate, Finding, Pass, Result
from onnxforge.errors import Refused
from onnxforge.lazy import DerivedTensor, stream
from onnxforge.numerics.half import OVERFLOW, SMALLEST_NORMAL, narrow, narrow_finite
from onnxforge.options import ByteSize
from onnxforge.selection import CODES, Selection
from onnxforge.weights import Use, Weight, Weights, for_each

__all__ = ["WeightsFp16CastPass"]

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
        for weight, scan in zip(chosen, scans, strict=True):
            if isinstance(scan, Finding):
                findings.append(scan)
                continue
            where, size = weight.where, weight.nbytes
            stored = DerivedTensor(weight.tensor, ir.DataType.FLOAT16, scan)
            decoded[where] = DerivedTensor(stored, ir.DataType.FLOAT, _Widen())
            weight.store(stored)
            self._widen(weight, weights)
            findings.append(Finding("OF201", where, "stored as float16", size, Fate.TREATED))
        return Result(model, bool(decoded), {}, tuple(findings), decoded)

    def _widen(self, weight: Weight, weights: Weights) -> None:
        """Give every user of a weight that is float16 now its float32 back."""
        direct = []
        for use in weight.uses:
            if use.node.op_type == "Gather" and not use.node.domain and use.index == 0:
                _cast_behind(use.node, weights)
            else:
                direct.append(use)
        assert weight.value is not None
        for users in _sharing(direct, share=self.share):
            cast = _cast(weight.value, weights.unique(f"{weight.value.name}_fp16w"), weights)
            users[0].scope.graph.insert_before(users[0].node, cast)
            for use in users:
                use.node.replace_input_with(use.index, cast.outputs[0])


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


def _scan(weight: Weight) -> _Narrow | Finding:
    """The kernel that narrows a weight, or the reason why it has to stay."""
    if (obstacle := _cannot_cast(weight)) is not None:
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
            return _skipped(weight, "OF221", "overflows float16", detail)
        lost = magnitude[(magnitude > 0) & (magnitude < SMALLEST_NORMAL)]
        if is_tiny and lost.size:
            detail = f"holds {lost.min():g}"
            return _skipped(weight, "OF222", "too small for float16", detail)
    return _Narrow(finite)


def _cannot_cast(weight: Weight) -> Finding | None:
    scopes = [weight.scope, *(use.scope for use in weight.uses)]
    version = min(scope.opset_imports.get("", 0) for scope in scopes)
    if version >= 6:
        return None
    detail = f"opset {version}" if version else "ai.onnx is not imported"
    return _skipped(weight, "OF210", "Cast needs opset 6", detail)


def _skipped(weight: Weight, code: str, message: str, detail: str) -> Finding:
    return Finding(code, weight.where, message, weight.nbytes, Fate.SKIPPED, detail=detail)


def _sharing(uses: Iterable[Use], *, share: bool) -> list[list[Use]]:
    """Uses that read one Cast, in order of their nodes: those of a graph, or of a node."""
    groups: dict[int, list[Use]] = {}
    for use in uses:
        reader = use.scope.graph if share else use.node
        groups.setdefault(id(reader), []).append(use)
    return list(groups.values())


def _cast_behind(gather: ir.Node, weights: Weights) -> None:
    """Cast what a Gather reads from a float16 table; the Cast takes over the output's name."""
    wide = gather.outputs[0]
    name = wide.name or ""
    cast = _cast(wide, name, weights)
    graph = gather.graph
    assert graph is not None
    graph.insert_after(gather, cast)
    whole = cast.outputs[0]
    wide.replace_all_uses_with(whole, replace_graph_outputs=True)
    cast.replace_input_with(0, wide)
    # What is said of the output holds for the Cast now.
    whole.type, whole.doc_string = wide.type, wide.doc_string
    whole.meta.update(wide.meta)
    whole.metadata_props.update(wide.metadata_props)
    wide.doc_string = None
    wide.meta.clear()
    wide.metadata_props.clear()
    wide.name = weights.unique(f"{name}_fp16w")
    wide.type = ir.TensorType(ir.DataType.FLOAT16)


def _cast(source: ir.Value, output: str, weights: Weights) -> ir.Node:
    shape = None if source.shape is None else source.shape.copy()
    return ir.node(
        "Cast",
        [source],
        {"to": ir.DataType.FLOAT},
        name=weights.unique(f"{source.name}_fp16w_cast"),
        outputs=[ir.Value(name=output, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)],
    )
