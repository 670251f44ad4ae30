"""Averages of the weights over a training: how much of the past each of them keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fanal.errors import FanalError, is_number

__all__ = ["Exponential", "Power", "Profile", "profiles"]

_POWER = re.compile(r"power:([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)")
_WIDEST = 12**-0.5  # of a power function with exponent 0, the plain mean of all weights


@dataclass(frozen=True)
class Exponential:
    """The exponential moving average: `mean ← decay·mean + (1 − decay)·weights`.

    The first steps use less, `(i + 1)/(i + 10)` at step i, so that the initial weights are forgotten.

    Args:
        decay: share of the old mean that a step keeps, in [0, 1).

    Raises:
        FanalError: the decay is out of range.
    """

    decay: float

    def __post_init__(self) -> None:
        if not is_number(self.decay) or not 0 <= self.decay < 1:
            raise FanalError(f"the decay of ema must be in [0, 1), got {self.decay!r:.80}")

    @property
    def name(self) -> str:
        """Name of the average, also of its folder."""
        return f"exponential-{self.decay:g}"

    def keep(self, iteration: int) -> float:
        """Return the share of the old mean that step `iteration` (from 0) keeps."""
        return min(self.decay, (iteration + 1) / (iteration + 10))


@dataclass(frozen=True)
class Power:
    """The average with a power function as its profile: after t steps, weights of step τ count as `τ^γ`.

        mean(t) = (γ + 1)/t^(γ+1) · ∫₀ᵗ τ^γ weights(τ) dτ
        mean ← β·mean + (1 − β)·weights,   β = (1 − 1/t)^(γ+1)

    Its width is a fixed share of the training, however long that is. (Karras et al. 2024, arXiv:2312.02696, section
    3.1 and appendix C.)

    Args:
        sigma_rel: standard deviation of the profile relative to t, in (0, 1/√12):
            `sigma_rel² = (γ + 1) / ((γ + 2)² (γ + 3))`; 0.05 to 0.15 are usual.

    Raises:
        FanalError: sigma_rel is out of range.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        if not is_number(self.sigma_rel) or not 1e-4 <= self.sigma_rel < _WIDEST:
            raise FanalError(
                f"the sigma_rel of a power-function average must be in [0.0001, {_WIDEST:.4f}), "
                f"got {self.sigma_rel!r:.80}; 0.1 is usual"
            )

    @property
    def name(self) -> str:
        """Name of the average, also of its folder."""
        return f"power-{self.sigma_rel:g}"

    @property
    def exponent(self) -> float:
        """The exponent γ: the positive root of `γ³ + 7γ² + (16 − s)γ + 12 − s` with `s = sigma_rel⁻²`."""
        s = self.sigma_rel**-2
        return float(max(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real))

    def keep(self, iteration: int) -> float:
        """Return the share of the old mean that step `iteration` (from 0) keeps; the first keeps nothing."""
        return math.pow(1 - 1 / (iteration + 1), self.exponent + 1)


Profile = Exponential | Power


def _profile(text: object) -> Profile:
    if isinstance(text, str) and (found := _POWER.fullmatch(text)):
        return Power(float(found[1]))
    if isinstance(text, int | float) and is_number(text):
        return Exponential(text)
    raise FanalError(f"ema must be a decay like 0.999, or power:SIGMA_REL like power:0.1, got {text!r:.80}")


def profiles(ema: object) -> tuple[Profile, ...]:
    """Return the averages that a recipe's `ema` asks for: a decay, "power:SIGMA_REL", or a list of these.

    The first becomes the model.

    Raises:
        FanalError: it is none of these, the list is empty or longer than 8, or holds one average twice.
    """
    several = list(ema) if isinstance(ema, Iterable) and not isinstance(ema, str) else [ema]
    found = tuple(_profile(one) for one in several)
    if not 1 <= len(found) <= 8 or len({each.name for each in found}) < len(found):
        raise FanalError(f"ema must name 1 to 8 different averages, got {ema!r:.80}")
    return found
