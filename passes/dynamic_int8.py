"""Multiply integers: int8 weights, activations quantized when the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from onnxforge import dequantized, products, selection
from onnxforge.core import Effect, Fate, Finding, Pass, Result
from onnxforge.errors import Refused
from onnxforge.integer import Integers, Product, Stored
from onnxforge.numerics.int8 import Grid, ScaleRule, choose, saturating_pairs
from onnxforge.operands import weight_channels
from onnxforge.options import ByteSize
from onnxforge.products import LEFT_FLOAT, Candidate, Reason, Search, stored_type, told
from onnxforge.selection import Selection, skipped, too_old, treated
from onnxforge.walk import Scope
from onnxforge.weights import Weight, Weights, for_each

__all__ = ["DynamicInt8Pass"]

_OPSET = 11
_DTYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8}
)


class _Plan(NamedTuple):
    """A weight that is to be multiplied as integers.

    Attributes:
        weight: The weight.
        products: Who multiplies it.
        stored: As what.
    """

    weight: Weight
    products: Sequence[Product]
    stored: Stored


class _Scan(NamedTuple):
    """What is found out about a weight before it is stored.

    Attributes:
        scales: Its scales, of a shape that broadcasts against it.
        grid: The same, with what they scale; None where it is int8 already.
        over: How many sums of two products can saturate.
        pairs: Of how many.
    """

    scales: np.ndarray
    grid: Grid | None = None
    over: int = 0
    pairs: int = 0


@dataclass(frozen=True)
class DynamicInt8Pass(Pass):
    """Multiply int8 weights with activations quantized when the model runs.

    MatMul, Gemm and Conv with a constant operand become DynamicQuantizeLinear and
    MatMulInteger or ConvInteger of ai.onnx, in the order of nodes that onnxruntime fuses.
    Weights are symmetric with a scale for each output channel; those of Conv, and those on
    the left, are uint8 around 128, which every runtime has kernels for. Weights behind
    Transpose, Reshape or a Cast from half precision, in Constant nodes, bodies and functions
    are found. A weight that several products read is stored once.

    Left in float32, and reported: products of two activations; depthwise Conv, which is
    slower as integers; and the convolutional front end, every Conv with no MatMul or Gemm
    before it in a model that has some behind it: to quantize a raw signal destroys it.

    Attributes:
        op_types: Operators to rewrite.
        include: Globs on names of weights and of nodes that read them; only those are treated.
        exclude: The same, of what to leave alone.
        per_channel: A scale for each output channel; false takes one for each weight.
        reduce_range: Use 7 bits, so that no sum of two products saturates on processors
            without VNNI.
        weight_type: ``uint8``, around 128, cannot saturate there either; onnxruntime 1.25 and
            newer multiply it more slowly.
        scale: ``absmax`` maps the largest magnitude of a channel to 127; ``mse`` clips where
            that makes the squared error of the channel least.
        min_bytes: Leave smaller weights alone.
        float_front_end: Leave the convolutional front end in float32.
        float_depthwise: Leave depthwise Conv in float32.
        leftover: ``int8w`` stores the weights of those two as the pass of that name does.

    Example:
        onnxforge run --passes 'gather-int8,dynamic-int8{leftover=int8w}' in.onnx out.onnx
    """

    name: ClassVar[str] = "dynamic-int8"
    effect: ClassVar[Effect] = Effect.APPROX
    codes: ClassVar[Mapping[str, str]] = {
        **selection.CODES,
        **products.CODES,
        "OF223": "The weight holds NaN or infinity, which int8 has no place for.",
        "OF241": "How many sums of two products can exceed 16 bits, where processors without"
        " VNNI saturate; weight_type=uint8 and reduce_range cannot.",
    }

    op_types: tuple[Literal["MatMul", "Gemm", "Conv"], ...] = ("MatMul", "Gemm", "Conv")
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    per_channel: bool = True
    reduce_range: bool = False
    weight_type: Stored = "int8"
    scale: ScaleRule = "absmax"
    min_bytes: ByteSize = ByteSize(1024)
    float_front_end: bool = True
    float_depthwise: bool = True
    leftover: Literal["float", "int8w"] = "float"

    def call(self, model: ir.Model) -> Result:
        """Rewrite every product that has a constant operand."""
        version = Scope(model.graph, "").opset_imports.get("", 0)
        if 0 < version < _OPSET:
            raise Refused(
                f"opset {version}: DynamicQuantizeLinear needs opset {_OPSET}; raise it with"
                " onnxscript.version_converter, or store weights only with int8w"
            )
        weights = Weights(model)
        selected = Selection(_DTYPES, self.min_bytes, self.include, self.exclude)
        chosen, declined = selected.split(weights)
        candidates = Search(
            self.op_types, self.per_channel, self.float_front_end, self.float_depthwise
        ).candidates(weights)
        plans, fates = self._plans(chosen, candidates, weights)
        integers = Integers(weights)
        scans: dict[Weight, _Scan] = {}
        for plan, scan in zip(plans, for_each(self._scan, plans), strict=True):
            weight = plan.weight
            if scan is None:
                fates[weight] = skipped(weight, "OF223", "holds NaN or infinity")
                continue
            fates[weight] = treated(weight, f"multiplied as {plan.stored}")
            scans[weight] = scan
            if scan.grid is not None:
                integers.store(weight, scan.grid, plan.stored)
        for candidate in candidates:
            product = candidate.found
            if isinstance(product, Product) and (scan := scans.get(product.operand.weight)):
                integers.rewrite(product, scan.scales)
        if self.leftover == "int8w":
            self._store_leftover(fates, weights, integers)
        integers.finish()
        modified = any(finding.fate is Fate.TREATED for finding in fates.values())
        waits = any(finding.code == "OF233" for finding in fates.values())
        findings = *declined, *fates.values(), *told(candidates, fates, declined)
        findings += tuple(_saturation(scans))
        return Result(model, modified, {}, findings, again=waits)

    def _plans(
        self, chosen: Sequence[Weight], candidates: Sequence[Candidate], weights: Weights
    ) -> tuple[list[_Plan], dict[Weight, Finding]]:
        """The weights that can be multiplied as integers, and why the others cannot."""
        readers: dict[Weight | None, list[Product | Reason]] = {}
        for candidate in candidates:
            readers.setdefault(candidate.weight, []).append(candidate.found)
        plans: list[_Plan] = []
        fates: dict[Weight, Finding] = {}
        for weight in chosen:
            found = [r for r in readers.get(weight, ()) if isinstance(r, Product)]
            reasons = [r for r in readers.get(weight, ()) if isinstance(r, Reason)]
            if found:
                stored = stored_type(weight, found, weights, self.weight_type)
            elif weight.dtype == ir.DataType.INT8:
                stored = Reason("OF204", "is int8")
            else:
                stored = next(iter(reasons), Reason("OF231", "no product reads it"))
            if isinstance(stored, Reason):
                fates[weight] = skipped(weight, *stored)
            elif (obstacle := too_old(weight, _OPSET, "DynamicQuantizeLinear")) is not None:
                fates[weight] = obstacle
            else:
                plans.append(_Plan(weight, found, stored))
        return plans, fates

    def _scan(self, plan: _Plan) -> _Scan | None:
        """Scales of a weight and its saturating pairs; None if it is not finite."""
        weight, product = plan.weight, plan.products[0]
        if product.operand.scale is not None:
            return _Scan(product.operand.scale.tensor.numpy())
        limit = 64 if self.reduce_range else 127
        grid = choose(weight.tensor, product.channels, self.scale, limit)
        if grid is None:
            return None
        counts = (0, 0) if plan.stored == "uint8" else saturating_pairs(weight.tensor, grid)
        return _Scan(grid.scales, grid, *counts)

    def _store_leftover(
        self, fates: dict[Weight, Finding], weights: Weights, integers: Integers
    ) -> None:
        """Store the weights of products that stay float32 as the pass int8w does."""
        for weight, fate in fates.items():
            left = fate.code in LEFT_FLOAT and weight.dtype == ir.DataType.FLOAT
            channels = weight_channels(weight, weights) if left else None
            if channels is None:
                continue
            storage = dequantized.plan(weight, channels, self.scale, input_scales=True)
            if storage is not None:
                fates[weight] = treated(weight, "stored as int8, multiplied as float32")
                dequantized.store(weight, storage, integers.surgery)


def _saturation(scans: Mapping[Weight, _Scan]) -> Iterator[Finding]:
    """The share of sums that can saturate: of all, and of the worst weight."""
    over = sum(scan.over for scan in scans.values())
    pairs = sum(scan.pairs for scan in scans.values())
    if not over:
        return
    worst = max(scans, key=lambda weight: scans[weight].over / max(1, scans[weight].pairs))
    share = scans[worst].over / scans[worst].pairs
    yield Finding(
        "OF241",
        "model",
        f"{over / pairs:.2%} of sums of two products can saturate without VNNI",
        detail=f"{share:.2%} of {worst.where}",
    )
