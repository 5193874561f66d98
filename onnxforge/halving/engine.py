"""Turning the float32 inside of a model into a half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxforge.compare.samples import Sample
from onnxforge.core import Fate, Finding, Result
from onnxforge.emulation import calculates, computes_in
from onnxforge.errors import Refused
from onnxforge.halving.blocks import PRODUCTS, block, keep_interface, usual
from onnxforge.halving.colours import colour
from onnxforge.halving.formats import Format
from onnxforge.halving.limits import Limits
from onnxforge.halving.opset import raise_opset
from onnxforge.halving.parts import Part, Parts
from onnxforge.halving.rewrite import Rewriter
from onnxforge.halving.samples import keep_strained
from onnxforge.halving.targets import Kernels, Target
from onnxforge.known import KnownSample, handed
from onnxforge.selection import CODES as WEIGHT_CODES
from onnxforge.selection import skipped
from onnxforge.weights import Weights

__all__ = ["CODES", "Policy", "halve"]

_DEFAULT = "default"

CODES: Mapping[str, str] = {
    **{c: WEIGHT_CODES[c] for c in ("OF201", "OF204", "OF206", "OF207", "OF208", "OF209")},
    "OF260": "Only operators that stay float32 read the weight, so that it stays too.",
    "OF261": "A constant is beyond the range of the half type and no mask before a Softmax: it"
    " stays float32, and what reads it.",
    "OF262": "A small constant would become zero or subnormal: it stays float32, and what"
    " reads it, up to the division or root that it guards. Where it is only added it becomes"
    " half.",
    "OF263": "A mask that is added before a Softmax holds values below the lowest of the half"
    " type; they become finite ones that mask as well. Infinities stay.",
    "OF264": "`block_op_types`, `block_nodes` or `keep_io` keeps it float32.",
    "OF265": "The operator does not take the half type at the opset of the model.",
    "OF266": "The target has no kernel for the operator in the half type.",
    "OF267": "An integer or a size is computed from it, which rounding would change.",
    "OF268": "It computes with positions or lengths, of which half types hold few.",
    "OF269": "It stands between operators that stay float32: so fewer values are cast.",
    "OF270": "It overflows on a sample, or is made of what does.",
    "OF271": "Its type is not known, no tensor, or different from call to call.",
}
"""What the codes of the passes mean that turn float32 into a half type."""


@dataclass(frozen=True)
class Policy:
    """What stays float32.

    Attributes:
        keep_io: ``all``, ``none``, or globs on inputs and outputs that stay.
        block_op_types: Operators that stay; ``default`` stands for a list.
        block_nodes: Globs on nodes that stay.
        target: What has to run the result.
        samples: Files of samples whose values out of range stay, as ``Model.meta[FILES]``
            knows them.
        raise_opset: The opset to raise a lower one to first.
    """

    keep_io: tuple[str, ...] = ("all",)
    block_op_types: tuple[str, ...] = ("default",)
    block_nodes: tuple[str, ...] = ()
    target: Target = "any"
    samples: tuple[str, ...] = ()
    raise_opset: int | None = None


def halve(model: ir.Model, form: Format, policy: Policy) -> Result:
    """Turn the float32 inside of a model into a half type.

    Args:
        model: The model, changed in place.
        form: The half format.
        policy: What stays float32.

    Raises:
        Refused: The opset has no such type, the target cannot run the result, or the policy
            names what is not there.
    """
    raised = policy.raise_opset is not None and raise_opset(model, policy.raise_opset)
    weights = Weights(model)
    _refuse_old(weights, form)
    parts = Parts(weights, form.dtype)
    keep_interface(parts, policy.keep_io)
    lacking = _kernels(parts, policy.target)
    block(parts, _op_types(policy), policy.block_nodes)
    limits = Limits(parts, weights, form)
    strained: list[Finding] = []
    if policy.samples:
        given = [handed(model, name, KnownSample) for name in policy.samples]
        samples = [Sample(str(one.path), one.feeds) for one in given]
        strained = keep_strained(parts, form, samples)
    colour(parts)
    _refuse_unable(parts, lacking, policy.target)
    told = list(_told(parts))
    modified = raised or any(part.half and part.makes for part in parts)
    rewriter = Rewriter(parts, weights, form, limits.saturated)
    others = [
        skipped(w, "OF204", f"is {w.dtype.name.lower()}")
        for w in weights
        if w.dtype != ir.DataType.FLOAT
    ]
    retyped = {part.where: form.dtype for part in (*parts.inputs, *parts.outputs) if part.half}
    found = rewriter.run()
    modified = modified or any(finding.fate is Fate.TREATED for finding in found)
    findings = (*others, *found, *limits.findings, *strained, *told)
    stats = {"casts added": rewriter.casts}
    return Result(model, modified, stats, findings, retyped=retyped)


def _op_types(policy: Policy) -> set[str]:
    named = set(policy.block_op_types)
    if unknown := sorted(name for name in named - {_DEFAULT} if not onnx.defs.has(name)):
        raise Refused(f"block_op_types: {unknown[0]!r} is no operator of ai.onnx")
    return named - {_DEFAULT} | usual(policy.target) if _DEFAULT in named else named


def _refuse_old(weights: Weights, form: Format) -> None:
    for scope in weights.scopes:
        version = scope.opset_imports.get("", form.opset)
        if version < form.opset:
            where = f" of {scope.path.rstrip('/')}" if scope.path else ""
            raise Refused(
                f"opset {version}{where}: {form.dtype.name.lower()} needs opset"
                f" {form.opset}; raise_opset={form.opset} raises it"
            )


def _kernels(parts: Parts, target: Target) -> list[Part]:
    """Keep what the target cannot run in the half type."""
    lacking = []
    kernels = Kernels(target, parts)
    for part in parts:
        if part.scope is None or part.reason is not None:
            continue
        if kernels.lack(part):
            part.keep("OF266", f"{target} has no kernel for {part.op_type}")
            lacking.append(part)
    return lacking


def _refuse_unable(parts: Parts, lacking: Sequence[Part], target: Target) -> None:
    """Refuse a target that has no kernel for any product, or for nothing at all."""
    products = [part for part in lacking if part.op_type in PRODUCTS]
    halves = [part for part in parts if part.half and part.node and calculates(part.node)]
    gained = any(part.op_type in PRODUCTS or not products for part in halves)
    if lacking and not gained and parts.dtype not in computes_in(parts.model):
        first = (products or lacking)[0]
        raise Refused(
            f"target={target} has no {parts.dtype.name.lower()} kernel for"
            f" {first.op_type} ({first.where})"
        )


def _told(parts: Parts) -> Iterator[Finding]:
    """What became of each operator."""
    for part in parts:
        if part.node is None or not (part.reads or part.makes):
            continue
        if part.half:
            yield Finding("OF201", part.where, "is half", fate=Fate.TREATED, op=part.op_type)
        elif part.reason is not None:
            code, message = part.reason
            yield Finding(code, part.where, message, fate=Fate.SKIPPED, op=part.op_type)
