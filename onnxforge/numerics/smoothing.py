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

__all__ = [
    "ALPHAS",
    "LEANS",
    "ActivationGrid",
    "Trial",
    "activation_grid",
    "factors",
    "to_power_of_two",
    "trial",
]

ALPHAS: Final = tuple(i / 10 for i in range(11))
"""The strengths that ``auto`` tries."""

LEANS: Final = (1.0, 0.5, 0.25, 0.125)
"""The leans that ``auto`` tries, see `factors`."""

_LARGEST: Final = 2.0**60  # of a factor, and its inverse: products with it stay finite
_SMALLEST: Final = 2.0**-126
_Floats = npt.NDArray[np.float64]


def factors(
    low: _Floats, high: _Floats, weight: _Floats, alpha: float, lean: float | None = None
) -> npt.NDArray[np.float32]:
    """What each channel of an activation is divided by, and its weights multiplied with.

    ``s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)``, equation 4 of the paper, in float64.

    Unsigned integers have a zero point, so values need not lie around zero. With a lean, a
    channel that goes further down than up gets a negative factor. Where most channels have one
    long side, all of these are up then, and hardly any integers are spent on the other side.
    Channels that have two long sides are in the way of that: their short side counts for
    ``1 / lean`` of its length.

    Args:
        low: Least value of each channel of the activation.
        high: Largest value of each channel.
        weight: Largest magnitude of the weights that the channel is multiplied with.
        alpha: Strength, 0 to 1.
        lean: How long the short sides of channels may be, of the long ones, up to 1; none
            leaves all sides where they are.

    Returns:
        Finite and not zero; 1 for a channel that is zero on either side.
    """
    down, up = np.maximum(-low, 0), np.maximum(high, 0)
    most = np.maximum(down, up)
    if lean is not None:
        most = np.maximum(most, np.minimum(down, up) / lean)
    dead = ~((most > 0) & np.isfinite(most) & (weight > 0))
    x, w = np.where(dead, 1.0, most), np.where(dead, 1.0, weight)
    found = np.clip(np.power(x, alpha) / np.power(w, 1 - alpha), 1 / _LARGEST, _LARGEST)
    turned = ~dead & (down > up) & (lean is not None)
    return np.where(dead, 1.0, np.where(turned, -found, found)).astype(np.float32)


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
        signal: Sum of the squares of the exact outputs, for each product.
        noise: Sum of the squares of their errors.
    """

    signal: _Floats
    noise: _Floats

    def __add__(self, other: Trial) -> Trial:
        """The trial on the rows of both."""
        return Trial(self.signal + other.signal, self.noise + other.noise)

    @property
    def loss(self) -> float:
        """Noise to signal, the mean of all products."""
        signal = np.where(self.signal > 0, self.signal, np.maximum(self.noise, _SMALLEST))
        # Sums of products differ in their last bits between processors; choices must not.
        return float(f"{(self.noise / signal).mean():.6g}")

    @property
    def sqnr_db(self) -> float:
        """Signal to noise in dB."""
        return float(-10 * np.log10(self.loss)) if self.loss else float("inf")


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
    signal, noise = np.zeros(len(weights)), np.zeros(len(weights))
    for i, weight in enumerate(weights):
        exact = rows @ weight
        levels = weight * s[:, None]  # in place from here on: it may be large
        most = np.maximum(levels.max(axis=0, initial=0), -levels.min(axis=0, initial=0))
        steps = np.where(most > 0, most, 127) / 127
        levels /= steps
        lost = decoded @ np.rint(levels, out=levels) * steps - exact
        signal[i], noise[i] = np.square(exact).sum(), np.square(lost).sum()
    return Trial(signal, noise)


def to_power_of_two(found: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Factors whose products and quotients lose nothing."""
    return np.copysign(np.exp2(np.rint(np.log2(np.abs(found)))), found)
