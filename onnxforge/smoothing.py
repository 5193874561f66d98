"""The activations of a model that are smoothed: with what, and how it is left to the model."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxforge.folding import Place, fold, scale_weight
from onnxforge.integer import Product
from onnxforge.known import Known, handed
from onnxforge.numerics.calibration import ActivationStats, Part
from onnxforge.numerics.channels import Channels, absmax
from onnxforge.numerics.smoothing import (
    ALPHAS,
    LEANS,
    ActivationGrid,
    Trial,
    activation_grid,
    factors,
    to_power_of_two,
    trial,
)
from onnxforge.products import Reason
from onnxforge.surgery import Surgery
from onnxforge.weights import Weight

__all__ = ["Group", "Rules", "Smoothed", "group_of", "is_finite", "known_activations"]


_WORTH = 1.25  # 1 dB: one side is the less robust choice, a short side is soon exceeded
_COLUMNS = 256  # of a weight, in trials: enough to tell a choice from another


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
        """Choose factors and a grid.

        What a choice costs is tried on rows kept, with the ranges that other samples have:
        with their own, a strength of nearly 1 would always look best.
        """
        weight = np.max([_input_absmax(product) for product in self.products], axis=0)
        matrices = [_columns(product) for product in self.products]
        parts = self.stats.parts()

        @functools.cache
        def tried(choice: _Choice | None) -> Trial:
            trials = [
                trial(p.rows.astype(np.float64), matrices, *_scaled(p, weight, choice, rules))
                for p in parts
            ]
            return functools.reduce(operator.add, trials)

        choice = _best(lambda choice: tried(choice).loss, rules)
        whole = self.stats.whole
        found, grid = _scaled(whole, weight, choice, rules)
        scaled, half = whole.rows / found, float(grid.scale) / 2  # less far beyond is rounding
        clipped = (scaled < grid.low - half) | (scaled > grid.high + half)
        share = float(clipped.mean()) if clipped.size else 0.0
        return Smoothed(choice.alpha, found, grid, share, tried(None), tried(choice))

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
            assert channels is not None, "the products are plain"
            scale_weight(weight, channels, found)
        uses = {(p.node, 0) for p in self.products}
        behind = max(0, len(self.products[0].operand.shape) - 2)  # axes of a Conv's input
        at = Place(-1 - behind, len(found), len(found))
        place = fold(self.activation, uses, at, weights) if folds else None
        if (
            place is not None
            and place.suits(found)
            and frozen.isdisjoint(place.weights(weights))
        ):
            place.apply(found, surgery)
            return self.activation, ", ".join(place.where)
        inverse = (1 / found.astype(np.float64)).astype(np.float32).reshape(-1, *[1] * behind)
        name = f"{self.activation.name}_factors"
        constant = surgery.initializer(weights.model.graph, name, inverse)
        output = weights.unique(f"{self.activation.name}_smoothed")
        node = surgery.node("Mul", [self.activation, constant], output, ir.DataType.FLOAT)
        node.outputs[0].shape = self.activation.shape
        surgery.insert_behind(self.activation, [node])
        for product in self.products:
            product.node.replace_input_with(0, node.outputs[0])
        return node.outputs[0], node.name or "Mul"


class _Choice(NamedTuple):
    alpha: float
    lean: float | None = None


def _best(loss: Callable[[_Choice], float], rules: Rules) -> _Choice:
    """The choice that loses least: a strength; channels as they are, or turned to one side."""
    best = _strength(loss, rules)
    if rules.signed:
        return best
    turned = _strength(loss, rules, LEANS[0])
    if rules.alpha is None:
        stronger = [alpha for alpha in ALPHAS if 0 <= alpha - turned.alpha < 0.15]
        leaning = [_Choice(alpha, lean) for lean in LEANS[1:] for alpha in stronger]
        turned = min([turned, *leaning], key=loss)
    return turned if loss(turned) * _WORTH < loss(best) else best


def _strength(
    loss: Callable[[_Choice], float], rules: Rules, lean: float | None = None
) -> _Choice:
    """The best strength: of every second one, then of those beside it."""
    if rules.alpha is not None:
        return _Choice(rules.alpha, lean)
    first = min([_Choice(alpha, lean) for alpha in ALPHAS[::2]], key=loss)
    near = [_Choice(alpha, lean) for alpha in ALPHAS if abs(alpha - first.alpha) < 0.15]
    return min(near, key=loss)


def _scaled(
    part: Part, weight: np.ndarray, choice: _Choice | None, rules: Rules
) -> tuple[np.ndarray, ActivationGrid]:
    """Factors by the ranges of a part, and the grid of what is divided by them."""
    low, high = part.low.astype(np.float64), part.high.astype(np.float64)
    found = np.ones(len(low), np.float32)
    if choice is not None:
        found = factors(low, high, weight, choice.alpha, choice.lean)
        found = to_power_of_two(found) if rules.pow2 else found
    ends = np.stack([low / found, high / found])
    ends = ends[:, np.isfinite(ends).all(axis=0)]
    least, most = float(ends.min(initial=0)), float(ends.max(initial=0))
    if rules.percentile < 100 and part.others.size:
        tail = (100 - rules.percentile) / 2
        first, last = np.percentile(part.others / found, [tail, 100 - tail])
        least, most = max(least, min(0.0, float(first))), min(most, max(0.0, float(last)))
    return found, activation_grid(least, most, signed=rules.signed)


def known_activations(model: ir.Model, stats: str) -> Mapping[str, ActivationStats]:
    """What a file of statistics, by its name in a pipeline, knows of a model's activations.

    Raises:
        Refused: The file holds no statistics, or those of another model.
    """
    known = handed(model, stats, Known)
    known.refuse_other(model)
    return known.statistics.activations


def is_finite(product: Product) -> bool:
    """Whether the weight of a product holds no NaN and no infinity."""
    return bool(np.isfinite(_input_absmax(product)).all())


def group_of(products: Sequence[Product], stats: ActivationStats) -> Group | Reason:
    """Products of one activation as a group, or why they are none.

    Args:
        products: Those that read it.
        stats: What is known of it.
    """
    if not stats.count:
        return Reason("OF250", "was empty in every sample")
    good = tuple(product for product in products if _is_plain(product))
    if not good:
        return Reason("OF251", "is no activation x matrix")
    kinds = {product.node.op_type == "Conv" for product in good}
    axis = 1 if True in kinds else -1
    width = good[0].operand.shape[_input_axis(good[0])]
    if len(kinds) > 1 or stats.channel_axis != axis or stats.channels != width:
        return Reason("OF252", "has statistics of other channels")
    return Group(good, stats)


def _is_plain(product: Product) -> bool:
    """Whether a product sums over one axis of its activation that no other moves."""
    node, operand = product.node, product.operand
    if node.op_type == "Conv":
        plain = node.attributes.get_int("group", 1) == 1
    else:
        turned = node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1
        plain = not product.is_left and not turned and len(operand.shape) == 2
    return plain and operand.scale is None and _inputs(product) is not None


def _input_axis(product: Product) -> int:
    """The axis of the operand that the channels of the activation are multiplied with."""
    return 1 if product.node.op_type == "Conv" else product.shared[0]


def _inputs(product: Product) -> Channels | None:
    """The stored weight by input channel: what it shares is all but what is summed."""
    axes = range(len(product.operand.shape))
    return product.operand.channels(set(axes) - {_input_axis(product)})


def _input_absmax(product: Product) -> np.ndarray:
    channels = _inputs(product)
    assert channels is not None, "the product is plain"
    found = absmax(product.operand.weight.tensor, channels)
    return found.reshape(-1).astype(np.float64)


def _columns(product: Product) -> np.ndarray:
    """A weight, channels by outputs, float64; evenly some of the outputs if there are many."""
    found = np.moveaxis(product.operand.array(), _input_axis(product), 0)
    found = found.reshape(len(found), -1)
    return found[:, :: max(1, -(-found.shape[1] // _COLUMNS))].astype(np.float64)
