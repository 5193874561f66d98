"""Static int8 that keeps its accuracy: activations smoothed into the weights behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxforge import products, selection
from onnxforge.core import Effect, Fate, Finding, Pass, Result
from onnxforge.errors import Refused
from onnxforge.integer import Product
from onnxforge.numerics.int8 import choose
from onnxforge.options import ByteSize
from onnxforge.products import Candidate, Reason, Search, stored_type, told
from onnxforge.qdq import Qdq, StaticIntegers
from onnxforge.selection import Selection, skipped, treated
from onnxforge.smoothing import (
    Group,
    Rules,
    Smoothed,
    group_of,
    is_finite,
    known_activations,
)
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
    Channels that go further down than up get a negative one: all on one side of the zero
    point need one bit less. The division is folded into what makes the activation, if nobody
    else reads that: a norm, Mul, Div, Add or Sub with a constant, or the MatMul, Gemm or Conv
    before, also through Transpose, Reshape and Split; else a Mul is inserted. Ranges are those
    that `onnxforge calibrate` found, fixed when the model runs; weights are symmetric int8
    with a scale for each output channel.

    Left in float32, and reported: products of two activations, products in bodies and
    functions, where calibration does not see, and weights that others read as well.

    Attributes:
        stats: File of statistics, from `onnxforge calibrate` of this very model.
        alpha: Strength, 0 to 1: how much of the range goes into the weights; ``auto`` takes
            for each activation the one whose products lose least on rows kept, each with the
            ranges that other samples have.
        percentile: How many percent of the values kept, of an activation after smoothing, are
            not clipped; 100 clips none that was seen.
        op_types: Operators to rewrite; Conv needs ``onnxforge calibrate --op-type Conv``.
        format: ``qdq`` puts products between QuantizeLinear and DequantizeLinear, which
            runtimes fuse; ``integer`` writes MatMulInteger, for opsets before 13 as well.
        activations: ``int8`` is symmetric, and slow on x86: of activations that several
            products read, onnxruntime fuses ``uint8`` only.
        exclude: Globs on names of weights and of nodes that read them; those are left alone.
        keep_worst: What to leave in float32 of the activations whose products lose most: a
            share of them, or float32 bytes of their weights, ``20MB``.
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
        "OF250": "The statistics know nothing of the activation, or it was empty in every"
        " sample, or the product is in a body or function, where runtimes do not fuse it.",
        "OF251": "The product is not one of an activation with a matrix on the right, which it"
        " sums over the last axis.",
        "OF252": "The statistics are of another number of channels than the product has.",
        "OF253": "The products of the activation lose most: `keep_worst` leaves them float32.",
        "OF254": "How an activation was smoothed and what quantizing its products costs.",
        "OF255": "The model was smoothed before; that is not done twice.",
    }

    stats: str
    alpha: str = "0.5"
    percentile: float = 100.0
    op_types: tuple[Literal["MatMul", "Gemm", "Conv"], ...] = ("MatMul", "Gemm")
    format: Literal["qdq", "integer"] = "qdq"
    activations: Literal["uint8", "int8"] = "uint8"
    exclude: tuple[str, ...] = ()
    keep_worst: str = "0"
    fold: bool = True
    quantize: bool = True
    scales: Literal["real", "pow2"] = "real"
    min_bytes: ByteSize = ByteSize(1024)

    def call(self, model: ir.Model) -> Result:
        """Smooth and quantize every product that calibration knows."""
        self._refuse(model)
        weights = Weights(model)
        selected = Selection(frozenset({ir.DataType.FLOAT}), self.min_bytes, (), self.exclude)
        chosen, declined = selected.split(weights)
        excluded = {f.where for f in declined if f.fate is Fate.EXCLUDED}
        frozen = {weight for weight in weights if weight.where in excluded}
        search = Search(self.op_types, float_front_end=False, float_depthwise=False)
        candidates = search.candidates(weights)
        fates: dict[Weight, Finding] = {}
        if _DONE in model.metadata_props:
            fates = {weight: skipped(weight, "OF255", "is smoothed") for weight in chosen}
            found = []
        else:
            found = self._groups(model, frozenset(chosen), candidates, weights, fates)
        rewriter = (Qdq if self.format == "qdq" else StaticIntegers)(weights, frozen)
        remarks = list(self._smooth(found, rewriter, fates, frozen))
        rewriter.finish()
        modified = any(finding.fate is Fate.TREATED for finding in fates.values())
        if modified:
            model.metadata_props[_DONE] = "true"
        for weight in chosen:
            if weight not in fates:
                fates[weight] = skipped(weight, "OF231", "no product reads it")
        findings = *declined, *fates.values(), *told(candidates, fates, declined)
        return Result(model, modified, {}, (*findings, *remarks))

    def _refuse(self, model: ir.Model) -> None:
        """Refuse options without sense, and opsets without the operators."""
        if self.alpha != "auto" and not _is_share(self.alpha):
            raise Refused(f"alpha: wanted a number from 0 to 1 or auto, not {self.alpha!r}")
        if not (_is_share(self.keep_worst) or _is_size(self.keep_worst)):
            raise Refused(f"keep_worst: wanted 0 to 1 or 20MB, not {self.keep_worst!r}")
        if not 0 < self.percentile <= 100:
            raise Refused(f"percentile: wanted more than 0, to 100, not {self.percentile:g}")
        needed, operator = _OPSETS[self.format]
        version = Scope(model.graph, "").opset_imports.get("", 0)
        if self.format == "integer" and self.activations == "int8" and "Conv" in self.op_types:
            raise Refused("op_types: Conv with format=integer takes activations=uint8")
        if self.quantize and 0 < version < needed:
            raise Refused(
                f"opset {version}: {operator} needs opset {needed}; format=integer needs 10,"
                " or raise it with onnxscript.version_converter"
            )

    def _groups(
        self,
        model: ir.Model,
        chosen: Set[Weight],
        candidates: Sequence[Candidate],
        weights: Weights,
        fates: dict[Weight, Finding],
    ) -> list[Group]:
        """Activations with their products, in order; why weights are in none of them."""
        readers: dict[ir.Value, list[Product]] = {}
        for candidate in candidates:
            weight = candidate.weight
            if weight is None or weight not in chosen:
                continue
            if isinstance(candidate.found, Product):
                readers.setdefault(candidate.found.activation, []).append(candidate.found)
            else:
                fates.setdefault(weight, skipped(weight, *candidate.found))
        if not readers:
            return []
        activations = known_activations(model, self.stats)
        groups: list[Group] = []
        for activation, mine in readers.items():
            # Bodies and functions may use a name of the main graph for another value.
            is_main = activation.graph is model.graph
            stats = activations.get(activation.name or "") if is_main else None
            made: Group | Reason = Reason("OF250", "is not in statistics")
            if stats is not None:
                outside = [p for p in mine if p.node.graph is model.graph]
                made = group_of(outside, stats)
            kept = []
            for product in mine:
                why = _obstacle(product, made, weights)
                if why is None:
                    kept.append(product)
                else:
                    fates[product.operand.weight] = skipped(product.operand.weight, *why)
            if kept and stats is not None:
                groups.append(Group(tuple(kept), stats))
        return groups

    def _smooth(
        self,
        groups: Sequence[Group],
        rewriter: StaticIntegers,
        fates: dict[Weight, Finding],
        frozen: Set[Weight],
    ) -> Iterator[Finding]:
        """Smooth and quantize, the last first: a fold changes weights of products before."""
        alpha = None if self.alpha == "auto" else float(self.alpha)
        signed = self.activations == "int8"
        rules = Rules(alpha, self.scales == "pow2", self.percentile, signed)
        found = {group: group.smoothed(rules) for group in groups}
        worst = self._worst(found)
        tensors = {w: w.tensor for group in groups for w in group.weights}
        for group in reversed(groups):
            if group in worst:
                for weight in group.weights:
                    fates[weight] = skipped(weight, "OF253", "loses most, stays float32")
                continue
            if any(w.tensor is not tensors[w] for w in group.weights):
                found[group] = group.smoothed(rules)
            yield self._rewritten(group, found[group], rewriter, fates, frozen)

    def _worst(self, found: Mapping[Group, Smoothed]) -> set[Group]:
        """The activations that lose most, as many as are to stay."""
        ranked = sorted(found, key=lambda group: -found[group].after.loss)
        if _is_share(self.keep_worst):
            return set(ranked[: int(float(self.keep_worst) * len(ranked))])
        sums = accumulate(sum(w.nbytes for w in group.weights) for group in ranked)
        most = ByteSize(self.keep_worst)
        return {group for group, total in zip(ranked, sums, strict=True) if total <= most}

    def _rewritten(
        self,
        group: Group,
        smoothed: Smoothed,
        rewriter: StaticIntegers,
        fates: dict[Weight, Finding],
        frozen: Set[Weight],
    ) -> Finding:
        name = group.activation.name or ""
        word = "smoothed, multiplied as int8" if self.quantize else "smoothed"
        fates.update((weight, treated(weight, word)) for weight in group.weights)
        activation, place = group.smooth(
            smoothed.factors, rewriter.surgery, folds=self.fold, frozen=frozen
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
                    is_unsigned = self.format == "integer" and product.needs_uint8
                    rewriter.store(weight, grid, "uint8" if is_unsigned else "int8")
                rewriter.rewrite(product, scales[weight])
        return Finding("OF254", name, f"{smoothed}, divided at {place}")


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _is_size(text: str) -> bool:
    """Whether a text is a size with a unit: a bare number could be one of activations."""
    try:
        return not text[-1:].isdecimal() and ByteSize(text) >= 0
    except ValueError:
        return False


def _obstacle(product: Product, made: Group | Reason, weights: Weights) -> Reason | None:
    """Why a product is not smoothed with the others of its activation."""
    if product.node.graph is not weights.model.graph:
        return Reason("OF250", "is in a body or function")
    if isinstance(made, Reason):
        return made
    if product not in made.products:
        return Reason("OF251", "is no activation x matrix")
    weight = product.operand.weight
    mine = [p for p in made.products if p.operand.weight is weight]
    found = stored_type(weight, mine, weights, "int8")
    if isinstance(found, Reason):
        return found
    return None if is_finite(product) else Reason("OF223", "holds NaN or infinity")
