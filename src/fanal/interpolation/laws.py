"""How much variance and length is left between two noise tensors: the laws, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fanal.errors import FanalError
from fanal.interpolation.methods import METHODS, coefficients
from fanal.metrics.estimates import Estimate, mean
from fanal.seeding import noise

__all__ = [
    "Shift",
    "expected_distance",
    "expected_length",
    "expected_variance",
    "length",
    "mean_square",
    "measure_shift",
    "variance",
]


def variance(method: str, weight: float | Tensor, psi: float | Tensor = math.pi / 2) -> Tensor:
    """Return `f`, the variance of the point between independent ends of unit variance, its coefficients held fixed.

    linear: `(1 − α)² + α²`; slerp: `(sin²((1 − α)ψ) + sin²(αψ))/sin²ψ`, so `½·sec²(ψ/2)` at α = ½;
    in_distribution: 1 ([GEO] eqs. 54, 55, 57; eq. 55 prints 2 for ½).

    Args:
        method: a key of `METHODS`.
        weight: α in [0, 1].
        psi: angle between the ends in [0, π]; slerp alone depends on it.

    Raises:
        FanalError: as `coefficients`.
    """
    first, second = coefficients(method, weight, psi)
    return first.square() + second.square()


def _product(d: int) -> float:
    """`E‖a‖·E‖b‖/d` of independent standard normal vectors: `(2/d)·(Γ((d+1)/2)/Γ(d/2))²`, just below 1."""
    if d < 1:
        raise FanalError(f"the dimension must be at least 1, got {d}")
    return 2 / d * math.exp(2 * (math.lgamma((d + 1) / 2) - math.lgamma(d / 2)))


def mean_square(method: str, weight: float | Tensor, psi: float | Tensor, d: int) -> Tensor:
    """Return `E‖x‖²/d` of the point between standard normal ends in d dimensions that are at the angle ψ.

    `c₁² + c₂² + 2·c₁·c₂·cos ψ·m` with `m = E‖a‖·E‖b‖/d`: length and direction of Gaussian noise are independent. For
    slerp this is `1 − 2·c₁·c₂·cos ψ·(1 − m)`. `variance` leaves the last term out.

    Args:
        method: a key of `METHODS`.
        weight: α in [0, 1].
        psi: the angle between the ends, in [0, π].
        d: dimension.

    Raises:
        FanalError: as `coefficients`, or the dimension is below 1.
    """
    first, second = coefficients(method, weight, psi)
    cosine = torch.cos(torch.as_tensor(psi, dtype=torch.float64))
    return first.square() + second.square() + 2 * first * second * cosine * _product(d)


def expected_variance(method: str, weight: float, d: int) -> float:
    """Return `E‖x‖²/d` of the point between independent standard normal ends in d dimensions.

    `mean_square` averaged over the angle, whose density is proportional to `sin^(d−2) ψ`; halfway along slerp this is
    `1 + (1 − m)/(d − 3)`. For slerp in two and three
    dimensions it is infinite: near-opposite ends of different lengths are joined by arbitrarily long detours.

    Args:
        method: a key of `METHODS`.
        weight: α in [0, 1].
        d: dimension, at least 2.

    Raises:
        FanalError: the method is unknown, the weight is out of range, or the dimension is below 2.
    """
    _check_plane(d)
    plain = float(variance(method, weight))
    if method != "slerp":
        return plain  # the angle's cosine has mean 0
    if not 0 < weight < 1:
        return 1.0
    if d < 4:
        return math.inf

    def bend(psi: float) -> float:
        return math.sin((1 - weight) * psi) * math.sin(weight * psi) * math.cos(psi)

    return 1 - 2 * (1 - _product(d)) * _over_angles(bend, d, d - 4)


def _check_plane(d: int) -> None:
    if d < 2:
        raise FanalError(f"two ends on a line have no angle to average over: the dimension must be at least 2, got {d}")


def _over_angles(part: Callable[[float], float], d: int, power: int) -> float:
    """Integrate `part·sin^power` over the angle between two directions in d dimensions, with the factor of its density,
    which is proportional to `sin^(d−2) ψ`."""
    from scipy.integrate import quad

    scale = math.lgamma(d / 2) - math.lgamma((d - 1) / 2) - 0.5 * math.log(math.pi)

    def weighted(psi: float) -> float:
        sine = math.sin(psi)
        return part(psi) * math.exp(scale + power * math.log(sine)) if sine > 0 else 0.0

    # the angle's density is a peak of width 1/√d around a right angle, which an adaptive rule could step over
    reach = min(math.pi / 2, 12 / math.sqrt(d))
    return quad(weighted, math.pi / 2 - reach, math.pi / 2 + reach, limit=200)[0]


def length(method: str, weight: float | Tensor, psi: float | Tensor) -> Tensor:
    """Return the length of the point between ends of length 1 at the angle ψ: `√(c₁² + c₂² + 2·c₁·c₂·cos ψ)`.

    [GEO] eq. 58. It is 1 for slerp ([GEO] remark 7) and `cos(ψ/2)` halfway along linear.

    Args:
        method: a key of `METHODS`.
        weight: α in [0, 1].
        psi: the angle between the ends, in [0, π].

    Raises:
        FanalError: as `coefficients`.
    """
    first, second = coefficients(method, weight, psi)
    cosine = torch.cos(torch.as_tensor(psi, dtype=torch.float64))
    return (first.square() + second.square() + 2 * first * second * cosine).clamp_min(0).sqrt()


def expected_length(method: str, weight: float, d: int) -> tuple[float, float]:
    """Return the mean of `length` over independent directions in d dimensions, and its root mean square error from 1.

    The magnitude shift of [GEO] table 2: (1, 0) for slerp; for in_distribution the error falls as
    `λ·√(1 − λ²)/√d`, halfway `1/(2√d)`; for linear the mean tends to `√((1 − α)² + α²)`.

    Args:
        method: a key of `METHODS`.
        weight: α in [0, 1].
        d: dimension, at least 2.

    Raises:
        FanalError: the method is unknown, the weight is out of range, or the dimension is below 2.
    """
    _check_plane(d)
    coefficients(method, weight)
    if method == "slerp":
        return 1.0, 0.0
    mean_length = _over_angles(lambda psi: float(length(method, weight, psi)), d, d - 2)
    square = _over_angles(lambda psi: (float(length(method, weight, psi)) - 1) ** 2, d, d - 2)
    return mean_length, math.sqrt(square)


def expected_distance(method: str, weight: float, d: int) -> float:
    """Return Kolmogorov's distance between the law of the point's ‖x‖² and that of noise, χ² with d degrees of freedom.

    The distribution shift of [GEO] table 2. Points of `linear` and `in_distribution` are Gaussian, with variance f: the
    distance is `F(x/f) − F(x)` at the x where both densities meet, `x = d·f·ln(1/f)/(1 − f)`. For slerp it is the limit
    of large d: ‖x‖² then varies `s = √(c₁⁴ + c₂⁴)` times as much as that of noise, around the same mean.

    Args:
        method: a key of `METHODS`.
        weight: α in [0, 1].
        d: dimension, at least 2.

    Raises:
        FanalError: as `expected_length`.
    """
    from scipy import stats

    _check_plane(d)
    first, second = coefficients(method, weight)
    if method == "slerp":
        s = float((first**4 + second**4).sqrt())
        if s >= 1:
            return 0.0
        at = math.sqrt(2 * math.log(1 / s) / (1 / s**2 - 1))
        return float(stats.norm.cdf(at / s) - stats.norm.cdf(at))
    f = float(first.square() + second.square())
    if f >= 1 - 1e-12:
        return 0.0
    law, at = stats.chi2(d), d * f * math.log(1 / f) / (1 - f)
    return float(law.cdf(at / f) - law.cdf(at))


@dataclass(frozen=True)
class Shift:
    """What an interpolation does to noise ([GEO] table 2, fig. 11).

    Attributes:
        method: its name.
        d: dimension.
        weight: α.
        expected: `expected_variance`.
        variance: measured `‖x‖²/d`, its mean; 1 for noise. The error means nothing where `expected` is infinite.
        distance: Kolmogorov's distance between the law of ‖x‖² and that of noise, χ² with d degrees of freedom, in
            [0, 1].
        chance: distance that noise itself exceeds in one of a hundred measurements.
        length: `‖x‖/√d` between ends of length √d, its mean; 1 where the length is kept.
        length_error: root mean square of `‖x‖/√d − 1` between such ends.
    """

    method: str
    d: int
    weight: float
    expected: float
    variance: Estimate
    distance: float
    chance: float
    length: Estimate
    length_error: float


def measure_shift(method: str, d: int, *, weight: float = 0.5, count: int = 2000, seed: int = 0) -> Shift:
    """Measure how far the points between pairs of noise vectors are from noise, in distribution and in length.

    Args:
        method: a key of `METHODS`.
        d: dimension, at least 2.
        weight: α in [0, 1].
        count: number of independent pairs, at least 2.
        seed: seed of the first of the 2·count vectors.

    Raises:
        FanalError: the method is unknown, or a number is out of range.
    """
    from scipy import stats

    if count < 2:
        raise FanalError(f"a measurement needs at least 2 pairs, got {count}")
    expected = expected_variance(method, weight, d)  # refuses what is out of range before anything is drawn
    squares, lengths = [], []
    for start in range(0, count, 256):
        pairs = min(256, count - start)
        first = seed + 2 * start
        drawn = noise((d,), range(first, first + 2 * pairs), stream="interpolation", dtype=torch.float64)
        a, b = drawn[:pairs], drawn[pairs:]
        squares.append(METHODS[method](a, b, weight).square().sum(1))
        even = [end * (math.sqrt(d) / torch.linalg.vector_norm(end, dim=1, keepdim=True)) for end in (a, b)]
        lengths.append(torch.linalg.vector_norm(METHODS[method](even[0], even[1], weight), dim=1) / math.sqrt(d))
    square, length = torch.cat(squares), torch.cat(lengths)
    distance = stats.kstest(np.asarray(square), stats.chi2(d).cdf).statistic
    return Shift(
        method=method,
        d=d,
        weight=weight,
        expected=expected,
        variance=mean(square / d),
        distance=float(distance),
        chance=float(stats.kstwo(count).ppf(0.99)),
        length=mean(length),
        length_error=float((length - 1).square().mean().sqrt()),
    )
