"""The activations of a model that are smoothed: with what, and how it is left to the model."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxforge.folding import fold, scale_weight
from onnxforge.integer import Product
from onnxforge.numerics.calibration import ActivationStats
from onnxforge.numerics.channels import Channels, absmax
from onnxforge.numerics.smoothing import (
    ALPHAS,
    ActivationGrid,
    Trial,
    activation_grid,
    factors,
    trial,
)
from onnxforge.products import Reason
from onnxforge.surgery import Surgery
from onnxforge.weights import Weight

__all__ = ["Group", "Rules", "Smoothed", "group_of", "is_finite"]


_TOLERANCE = 2.0  # of the least noise, 3 dB: what a lower strength may cost


@dataclass(frozen=True)
class Rules:
    """How to smooth.

    Attributes:
        alpha: Strength; None tries several for each activation.
        pow2: Divide by powers of two only.
        percentile: Of the rows kept: how many percent of the values are not clipped.
        signed: Whether activations become int8 instead of uint8.
    """

    alpha: float | None = 0.5
    pow2: bool = False
    percentile: float = 100.0
    signed: bool = False


@dataclass(frozen=True)
class Smoothed:
    """What was found for an activation.

    Attributes:
        alpha: Strength.
        factors: What its channels are divided by, float32.
        grid: Scale and zero point after that.
        clipped: Share of the values kept that are beyond the grid.
        before: What quantizing costs without smoothing, on the rows kept.
        after: The same with it.
    """

    alpha: float
    factors: np.ndarray
    grid: ActivationGrid
    clipped: float
    before: Trial
    after: Trial

    def __str__(self) -> str:
        """Strength, range, what is clipped, and SQNR without and with smoothing."""
        return (
            f"alpha {self.alpha:g}, {self.grid.low:.3g} to {self.grid.high:.3g},"
            f" {self.clipped:.3%} clipped, SQNR {self.before.sqnr_db:.1f} ->"
            f" {self.after.sqnr_db:.1f} dB"
        )


@dataclass(frozen=True, eq=False)
class Group:
    """An activation and the products that multiply it.

    Attributes:
        products: Those with a weight that can be scaled, each on the right.
        stats: What calibration knows of the activation.
    """

    products: tuple[Product, ...]
    stats: ActivationStats

    @property
    def activation(self) -> ir.Value:
        """What they multiply; another value once the product that makes it is rewritten."""
        return self.products[0].activation

    @property
    def weights(self) -> list[Weight]:
        """The weights, each once."""
        return list(dict.fromkeys(product.operand.weight for product in self.products))

    def smoothed(self, rules: Rules) -> Smoothed:
        """Choose factors and a grid."""
        largest = np.maximum(-self.stats.low, self.stats.high).astype(np.float64)
        largest = np.maximum(largest, 0)
        weight = np.zeros(len(largest))
        for product in self.products:
            weight = np.maximum(weight, _input_absmax(product))
        rows = self.stats.rows.astype(np.float64)
        matrices = [_matrix(product) for product in self.products]
        ones = np.ones(len(largest), np.float32)
        before = trial(rows, matrices, ones, self._grid(ones, rules))
        fixed = 0.5 if rules.alpha is None else rules.alpha
        tried: list[tuple[float, np.ndarray, ActivationGrid, Trial]] = []
        for alpha in ALPHAS if rules.alpha is None and rows.size else (fixed,):
            found = factors(largest, weight, alpha, pow2=rules.pow2)
            grid = self._grid(found, rules)
            tried.append((alpha, found, grid, trial(rows, matrices, found, grid)))
        # The more goes into the weights, the more a value beyond the ranges seen is clipped.
        enough = _TOLERANCE * min(after.noise for *_, after in tried)
        alpha, found, grid, after = next(one for one in tried if one[3].noise <= enough)
        scaled, half = rows / found, float(grid.scale) / 2  # less far beyond is rounding
        clipped = (scaled < grid.low - half) | (scaled > grid.high + half)
        share = float(clipped.mean()) if clipped.size else 0.0
        return Smoothed(alpha, found, grid, share, before, after)

    def _grid(self, found: np.ndarray, rules: Rules) -> ActivationGrid:
        """The grid of the activation divided by factors."""
        low = float((self.stats.low / found).min(initial=0))
        high = float((self.stats.high / found).max(initial=0))
        if rules.percentile < 100 and self.stats.rows.size:
            tail = (100 - rules.percentile) / 2
            first, last = np.percentile(self.stats.rows / found, [tail, 100 - tail])
            low, high = max(low, min(0.0, float(first))), min(high, max(0.0, float(last)))
        return activation_grid(low, high, signed=rules.signed)

    def smooth(
        self, found: np.ndarray, surgery: Surgery, *, folds: bool, frozen: Set[Weight]
    ) -> tuple[ir.Value, str]:
        """Divide the activation and multiply its weights.

        Args:
            found: The factors.
            surgery: Adds nodes.
            folds: Leave the division to what makes the activation, where that can be.
            frozen: Weights that must not change for that.

        Returns:
            What products read now, and where the division is done.
        """
        weights = surgery.weights
        for weight, channels in {p.operand.weight: _inputs(p) for p in self.products}.items():
            scale_weight(weight, channels, found)
        uses = {(p.node, 0) for p in self.products}
        place = fold(self.activation, uses, len(found), weights) if folds else None
        if place is not None and frozen.isdisjoint(place.weights(weights)):
            place.apply(found, surgery)
            return self.activation, ", ".join(place.where)
        inverse = (1 / found.astype(np.float64)).astype(np.float32)
        name = f"{self.activation.name}_factors"
        constant = surgery.initializer(weights.model.graph, name, inverse)
        output = weights.unique(f"{self.activation.name}_smoothed")
        node = surgery.node("Mul", [self.activation, constant], output, ir.DataType.FLOAT)
        node.outputs[0].shape = self.activation.shape
        surgery.insert_behind(self.activation, [node])
        for product in self.products:
            product.node.replace_input_with(0, node.outputs[0])
        return node.outputs[0], node.name or "Mul"


def is_finite(product: Product) -> bool:
    """Whether the weight of a product holds no NaN and no infinity."""
    return bool(np.isfinite(_input_absmax(product)).all())


def group_of(products: Sequence[Product], stats: ActivationStats) -> Group | Reason:
    """Products of one activation as a group, or why they are none.

    Args:
        products: Those that read it.
        stats: What is known of it.
    """
    good = tuple(product for product in products if _is_plain(product))
    if not good:
        return Reason("OF251", "is no activation x matrix")
    width = good[0].operand.shape[good[0].shared[0]]
    if stats.channel_axis != -1 or len(stats.low) != width:
        return Reason("OF252", "has statistics of other channels")
    return Group(good, stats)


def _is_plain(product: Product) -> bool:
    """Whether a product sums over the last axis of its activation and one stored axis."""
    node, operand = product.node, product.operand
    turned = node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1
    plain = not product.is_left and not turned and operand.scale is None
    return plain and len(operand.shape) == 2 and len(product.channels.shared) == 1


def _inputs(product: Product) -> Channels:
    """The stored weight by input channel: what it shares is all but what is summed."""
    channels = product.channels
    shared = tuple(i for i in range(len(channels.shape)) if i not in channels.shared)
    return Channels(channels.shape, shared)


def _input_absmax(product: Product) -> np.ndarray:
    found = absmax(product.operand.weight.tensor, _inputs(product))
    return found.reshape(-1).astype(np.float64)


def _matrix(product: Product) -> np.ndarray:
    """A weight in memory, channels by outputs, float64."""
    found = product.operand.array().astype(np.float64)
    turned = product.node.attributes.get_int("transB", 0) == 1
    return found.T if product.node.op_type == "Gemm" and turned else found
