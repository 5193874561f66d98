"""Static int8 that keeps its accuracy: activations smoothed into the weights behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxforge import products, selection
from onnxforge.core import FILES, Effect, Fate, Finding, Pass, Result
from onnxforge.errors import Refused
from onnxforge.integer import Product
from onnxforge.numerics.int8 import choose
from onnxforge.options import ByteSize
from onnxforge.products import Candidate, Reason, Search, stored_type
from onnxforge.qdq import Qdq, StaticIntegers
from onnxforge.selection import Selection, skipped, treated
from onnxforge.smoothing import Group, Rules, Smoothed, group_of
from onnxforge.walk import Scope
from onnxforge.weights import Weight, Weights

__all__ = ["SmoothQuantFoldPass"]

_DONE = "onnxforge.smoothed"  # metadata: what is smoothed is not smoothed again
_OPSETS = {"qdq": (13, "DequantizeLinear by axis"), "integer": (10, "MatMulInteger")}


@dataclass(frozen=True)
class SmoothQuantFoldPass(Pass):
    """Smooth activations into weights, then quantize both to int8.

    Each channel of an activation is divided by a factor and the weights behind it are
    multiplied with it, so that one scale for the whole activation suits all of its channels.
    The division is folded into what makes the activation, if nobody else reads that: a
    LayerNormalization, Mul, Div, Add or Sub with a constant, or the MatMul or Gemm before;
    else a Mul is inserted. Ranges are those that `onnxforge calibrate` found, fixed when the
    model runs; weights are symmetric int8 with a scale for each output channel.

    Left in float32, and reported: products of two activations, products in bodies and
    functions, where calibration does not see, and weights that others read as well.

    Attributes:
        stats: File of statistics, from `onnxforge calibrate` of this very model.
        alpha: Strength, 0 to 1: how much of the range goes into the weights; ``auto`` takes
            for each activation what costs its products least on the rows kept.
        percentile: How many percent of the values kept, of an activation after smoothing, are
            not clipped; 100 clips none that was seen.
        op_types: Operators to rewrite.
        format: ``qdq`` puts products between QuantizeLinear and DequantizeLinear, which
            runtimes fuse; ``integer`` writes MatMulInteger, for opsets before 13 as well.
        activations: ``int8`` is symmetric.
        exclude: Globs on names of weights and of nodes that read them; those are left alone.
        keep_worst: Share of the activations whose products lose most to leave in float32.
        fold: Fold divisions; false inserts a Mul for each.
        quantize: False only smooths: the model computes what it did before.
        scales: ``pow2`` divides by powers of two, which loses no bit.
        min_bytes: Leave smaller weights alone.

    Example:
        onnxforge run --passes 'smoothquant{stats=stats.safetensors}' in.onnx out.onnx
    """

    name: ClassVar[str] = "smoothquant"
    effect: ClassVar[Effect] = Effect.APPROX
    files: ClassVar[tuple[str, ...]] = ("stats",)
    codes: ClassVar[Mapping[str, str]] = {
        **selection.CODES,
        **products.CODES,
        "OF223": "The weight holds NaN or infinity, which int8 has no place for.",
        "OF250": "The statistics know nothing of the activation: it is in a body or function.",
        "OF251": "The product is not one of an activation with a matrix on the right, which it"
        " sums over the last axis.",
        "OF252": "The statistics are of another number of channels than the product has.",
        "OF253": "The products of the activation lose most: `keep_worst` leaves them float32.",
        "OF254": "How an activation was smoothed and what quantizing its products costs.",
    }

    stats: str
    alpha: str = "0.5"
    percentile: float = 100.0
    op_types: tuple[Literal["MatMul", "Gemm"], ...] = ("MatMul", "Gemm")
    format: Literal["qdq", "integer"] = "qdq"
    activations: Literal["uint8", "int8"] = "uint8"
    exclude: tuple[str, ...] = ()
    keep_worst: float = 0.0
    fold: bool = True
    quantize: bool = True
    scales: Literal["real", "pow2"] = "real"
    min_bytes: ByteSize = ByteSize(1024)

    def call(self, model: ir.Model) -> Result:
        """Smooth and quantize every product that calibration knows."""
        self._refuse_old(model)
        weights = Weights(model)
        selected = Selection(frozenset({ir.DataType.FLOAT}), self.min_bytes, (), self.exclude)
        chosen, declined = selected.split(weights)
        search = Search(self.op_types, float_front_end=False, float_depthwise=False)
        candidates = search.candidates(weights)
        fates: dict[Weight, Finding] = {}
        found = (
            []
            if _DONE in model.metadata_props
            else self._groups(model, chosen, candidates, weights, fates)
        )
        rewriter = Qdq(weights) if self.format == "qdq" else StaticIntegers(weights)
        told = list(self._smooth(found, weights, rewriter, fates))
        rewriter.finish()
        modified = any(finding.fate is Fate.TREATED for finding in fates.values())
        if modified:
            model.metadata_props[_DONE] = "true"
        for weight in chosen:
            if weight not in fates:
                fates[weight] = skipped(weight, "OF231", "no product reads it")
        findings = (*declined, *fates.values(), *told)
        return Result(model, modified, {}, findings)

    def _refuse_old(self, model: ir.Model) -> None:
        needed, operator = _OPSETS[self.format]
        version = Scope(model.graph, "").opset_imports.get("", 0)
        if self.quantize and 0 < version < needed:
            raise Refused(
                f"opset {version}: {operator} needs opset {needed}; format=integer needs 10,"
                " or raise it with onnxscript.version_converter"
            )

    def _groups(
        self,
        model: ir.Model,
        chosen: Sequence[Weight],
        candidates: Sequence[Candidate],
        weights: Weights,
        fates: dict[Weight, Finding],
    ) -> list[Group]:
        """Activations with their products, in order; why weights are in none of them."""
        readers: dict[ir.Value, list[Product]] = {}
        for candidate in candidates:
            if isinstance(candidate.found, Product):
                readers.setdefault(candidate.found.activation, []).append(candidate.found)
            elif (weight := candidate.weight) in chosen and weight not in fates:
                assert weight is not None, "what is chosen is a weight"
                fates[weight] = skipped(weight, *candidate.found)
        if not readers:
            return []
        known = model.meta[FILES][self.stats]
        known.refuse_other(model)
        groups: list[Group] = []
        for activation, mine in readers.items():
            stats = known.statistics.activations.get(activation.name or "")
            made = group_of(activation, mine, stats) if stats else None
            reason = (
                made if isinstance(made, Reason) else Reason("OF250", "is not in statistics")
            )
            taken = made.products if isinstance(made, Group) else ()
            kept = []
            for product in mine:
                weight = product.operand.weight
                why = (
                    reason
                    if product not in taken
                    else stored_type(
                        weight,
                        [p for p in taken if p.operand.weight is weight],
                        weights,
                        "int8",
                    )
                )
                if weight not in chosen:
                    continue
                if isinstance(why, Reason):
                    fates[weight] = skipped(weight, *why)
                else:
                    kept.append(product)
            if kept and stats is not None:
                groups.append(Group(activation, tuple(kept), stats))
        return groups

    def _smooth(
        self,
        groups: Sequence[Group],
        weights: Weights,
        rewriter: StaticIntegers,
        fates: dict[Weight, Finding],
    ) -> Iterator[Finding]:
        """Smooth and quantize, the last first: a fold changes weights of products before."""
        alpha = None if self.alpha == "auto" else float(self.alpha)
        signed = self.activations == "int8"
        rules = Rules(alpha, self.scales == "pow2", self.percentile, signed)
        sound = [group for group in groups if _finite(group, fates)]
        found = {group: group.smoothed(rules) for group in sound}
        ranked = sorted(sound, key=lambda group: found[group].after.sqnr_db)
        worst = set(ranked[: int(self.keep_worst * len(ranked))])
        tensors = {w: w.tensor for group in sound for w in group.weights}
        for group in reversed(sound):
            if group in worst:
                for weight in group.weights:
                    fates[weight] = skipped(weight, "OF253", "loses most, stays float32")
                continue
            if any(w.tensor is not tensors[w] for w in group.weights):
                found[group] = group.smoothed(rules)
            yield self._rewritten(group, found[group], weights, rewriter, fates)

    def _rewritten(
        self,
        group: Group,
        smoothed: Smoothed,
        weights: Weights,
        rewriter: StaticIntegers,
        fates: dict[Weight, Finding],
    ) -> Finding:
        name = group.activation.name or ""
        word = "smoothed, multiplied as int8" if self.quantize else "smoothed"
        fates.update((weight, treated(weight, word)) for weight in group.weights)
        activation, place = group.smooth(
            smoothed.factors, weights, rewriter.surgery, folds=self.fold
        )
        if self.quantize:
            rewriter.expect(activation, smoothed.grid)
            scales = {}
            for product in group.products:
                weight = product.operand.weight
                if weight not in scales:
                    grid = choose(weight.tensor, product.channels)
                    assert grid is not None, "the weight is finite"
                    scales[weight] = grid.scales
                    rewriter.store(weight, grid, "int8")
                rewriter.rewrite(product, scales[weight])
        return Finding("OF254", name, f"{smoothed}, divided at {place}")


def _finite(group: Group, fates: dict[Weight, Finding]) -> bool:
    """Whether all weights of a group are finite; if not, the group stays."""
    if group.is_finite:
        return True
    for weight in group.weights:
        fates[weight] = skipped(weight, "OF223", "holds NaN or infinity")
    return False
