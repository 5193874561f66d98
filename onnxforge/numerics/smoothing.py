"""Smoothing: moving the range of an activation's channels into the weights behind it.

Xiao, Lin, Seznec, Wu, Demouth and Han, SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models, ICML 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["ALPHAS", "ActivationGrid", "Trial", "activation_grid", "factors", "trial"]

ALPHAS: Final = tuple(i / 20 for i in range(21))
"""The strengths that ``auto`` tries."""

_LARGEST: Final = 2.0**60  # of a factor, and its inverse: products with it stay finite
_SMALLEST: Final = 2.0**-126
_Floats = npt.NDArray[np.float64]


def factors(
    activation: _Floats, weight: _Floats, alpha: float, *, pow2: bool = False
) -> npt.NDArray[np.float32]:
    """What each channel of an activation is divided by, and its weights multiplied with.

    ``s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)``, equation 4 of the paper, in float64.

    Args:
        activation: Largest magnitude of each channel of the activation.
        weight: Largest magnitude of the weights that the channel is multiplied with.
        alpha: Strength, 0 to 1.
        pow2: Round to powers of two, so that dividing and multiplying lose nothing.

    Returns:
        Positive and finite; 1 for a channel that is zero on either side.
    """
    dead = (activation == 0) | (weight == 0)
    ones = np.ones_like(activation)
    x, w = np.where(dead, ones, activation), np.where(dead, ones, weight)
    found = np.where(dead, ones, np.power(x, alpha) / np.power(w, 1 - alpha))
    found = np.clip(found, 1 / _LARGEST, _LARGEST)
    if pow2:
        found = np.exp2(np.rint(np.log2(found)))
    return found.astype(np.float32)


@dataclass(frozen=True)
class ActivationGrid:
    """Scale and zero point of an activation, as QuantizeLinear has them.

    Attributes:
        scale: Of all channels, float32.
        zero_point: 0 to 255, or 0 where integers are signed.
        signed: Whether integers are int8 around zero.
        low: Least value that is not clipped.
        high: Largest value that is not clipped.
    """

    scale: np.float32
    zero_point: int
    signed: bool
    low: float
    high: float

    def decoded(self, values: _Floats) -> _Floats:
        """Values after 8 bits."""
        least, most = (-128, 127) if self.signed else (0, 255)
        levels = np.clip(np.rint(values / self.scale) + self.zero_point, least, most)
        found: _Floats = (levels - self.zero_point) * np.float64(self.scale)
        return found


def activation_grid(low: float, high: float, *, signed: bool = False) -> ActivationGrid:
    """The grid of a range; zero is always exact.

    Args:
        low: Least value.
        high: Largest value.
        signed: Integers are int8 around zero, of the same range on both sides.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if signed:
        largest = max(-low, high)
        scale = _scale(largest / 127)
        return ActivationGrid(scale, 0, True, -127 * float(scale), 127 * float(scale))
    scale = _scale((high - low) / 255)
    zero = int(np.clip(np.rint(-low / np.float64(scale)), 0, 255))
    first, last = -zero * float(scale), (255 - zero) * float(scale)
    return ActivationGrid(scale, zero, False, first, last)


def _scale(exact: float) -> np.float32:
    """A scale that divides safely: not of a subnormal number."""
    return np.float32(exact if exact >= _SMALLEST else 1)


@dataclass(frozen=True)
class Trial:
    """What quantizing the products of an activation costs on some of its rows.

    Attributes:
        signal: Sum of the squares of the exact outputs.
        noise: Sum of the squares of their errors.
    """

    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """Signal to noise in dB."""
        if self.noise == 0:
            return float("inf")
        return float(10 * np.log10(self.signal / self.noise)) if self.signal else 0.0


def trial(
    rows: _Floats,
    weights: Sequence[_Floats],
    scale: npt.NDArray[np.float32],
    grid: ActivationGrid,
) -> Trial:
    """Multiply as integers do, and compare.

    Args:
        rows: Of the activation, rows by channels.
        weights: What multiplies it, channels by outputs.
        scale: What each channel is divided by.
        grid: Of the activation after that.
    """
    s = scale.astype(np.float64)
    decoded = grid.decoded(rows / s)
    signal = noise = 0.0
    for weight in weights:
        exact = rows @ weight
        scaled = weight * s[:, None]
        steps = np.abs(scaled).max(axis=0, initial=0) / 127
        steps[steps == 0] = 1
        lost = decoded @ (np.clip(np.rint(scaled / steps), -127, 127) * steps) - exact
        signal += float(np.square(exact).sum())
        noise += float(np.square(lost).sum())
    # Sums of products differ in their last bits between processors; choices must not.
    return Trial(float(f"{signal:.9g}"), float(f"{noise:.9g}"))
