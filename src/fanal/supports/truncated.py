"""Truncated normals and Bessel ratios, accurate far outside the interval and at large arguments."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

__all__ = ["bessel_fall", "bessel_ratio", "log_bessel", "log_mass", "log_moment", "truncated_mean"]

_ROOT2 = math.sqrt(2)
_WIDE = 1e9  # beyond 2^30 scipy's scaled Bessel functions are NaN


def _ends(x: Tensor, sigma: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standardized ends `a <= b` over √2, mirrored so that the interval lies to the right of or around 0."""
    a, b = (low - x) / sigma / _ROOT2, (high - x) / sigma / _ROOT2
    mirrored = a + b < 0
    return torch.where(mirrored, -b, a), torch.where(mirrored, -a, b), mirrored


def _far(a: Tensor, b: Tensor) -> Tensor:
    """`e^(a²)·(erf b − erf a)` for 0 <= a <= b, where the difference itself underflows."""
    return torch.special.erfcx(a.clamp(min=0)) - torch.exp(a**2 - b**2) * torch.special.erfcx(b.clamp(min=0))


def log_mass(x: Tensor, sigma: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return `log P(low <= X <= high)` for X ~ N(x, sigma²), without underflow far outside.

    Args:
        x: mean.
        sigma: standard deviation, above 0.
        low: lower end.
        high: upper end, above the lower.
    """
    a, b, _ = _ends(x, sigma, low, high)
    inside = torch.log((torch.erf(b) - torch.erf(a.clamp(max=1))) / 2)  # erf has not saturated below 1
    outside = torch.log(_far(a, b) / 2) - a**2
    return torch.where(a > 0.5, outside, inside)


def truncated_mean(x: Tensor, sigma: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return `E[X | low <= X <= high]` for X ~ N(x, sigma²): the denoiser of a uniform law on an interval.

    `x + sigma·(φ(α) − φ(β))/(Φ(β) − Φ(α))`, by scaled error functions where the interval is far away.

    Args:
        x: where.
        sigma: noise level, above 0.
        low: lower end.
        high: upper end, above the lower.
    """
    a, b, mirrored = _ends(x, sigma, low, high)
    drop = -torch.expm1(a**2 - b**2)  # 1 − e^(a² − b²): both ends' densities, relative to the nearer one's
    # Deep inside e^(a²) overflows: its inverse has a derivative.
    inner = torch.exp(-torch.where(a > 0.5, 0, a**2))
    shift = math.sqrt(2 / math.pi) * drop * inner / torch.where(a > 0.5, _far(a, b), torch.erf(b) - torch.erf(a))
    middle = torch.where(mirrored, -shift, shift)
    return torch.minimum(torch.maximum(x + sigma * middle, low), high)


class _Ratio(torch.autograd.Function):
    """`bessel_ratio` with its derivative `1 − R² − (2ν − 1)·R/x`, which is 1/(2ν) at 0."""

    @staticmethod
    def forward(ctx: Any, order: float, x: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(x)
        return _ratio(order, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (x,), order = ctx.saved_tensors, ctx.order
        ratio, tiny = bessel_ratio(order, x), x < 1e-6
        slope = 1 - ratio**2 - (2 * order - 1) * ratio / torch.where(tiny, 1.0, x)
        return None, gradients[0] * torch.where(tiny, 1 / (2 * order), slope)


class _Log(torch.autograd.Function):
    """`log_bessel` with its derivative `I_{ν+1}/I_ν + ν/x − 1`."""

    @staticmethod
    def forward(ctx: Any, order: float, x: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(x)
        return _log(order, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (x,), order = ctx.saved_tensors, ctx.order
        # The share of ν/x is infinite at 0 where ν > 0, as the logarithm is.
        first = order / x if order else torch.zeros_like(x)
        return None, gradients[0] * (bessel_ratio(order + 1, x) + first - 1)


def bessel_ratio(order: float, x: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return `I_ν(x)/I_{ν−1}(x)` for x >= 0: how long the mean of a von Mises–Fisher law is; gradients reach x.

    By scaled Bessel functions; by Gauss's continued fraction where those underflow, in many dimensions; by their
    expansion `exp(−(ν − ½)/x)` at large arguments, where scipy's are NaN.

    Args:
        order: ν, at least 1/2.
        x: arguments.
    """
    return cast(Tensor, _Ratio.apply(order, x))


def _ratio(order: float, x: Tensor) -> Tensor:
    values = x.detach().cpu().double().numpy()
    top, bottom = special.ive(order, values), special.ive(order - 1, values)
    safe = (bottom > 1e-280) & (top > 1e-280)
    ratio = np.divide(top, bottom, out=np.zeros_like(values), where=safe)
    wide = values > _WIDE
    ratio[wide] = np.exp(-(order - 0.5) / values[wide])
    rest = ~safe & ~wide
    if rest.any():
        argument, tail = values[rest], np.zeros(int(rest.sum()))
        for k in range(2000, -1, -1):  # from its end: 1/(2ν/x + 1/(2(ν + 1)/x + …)), without dividing by x
            tail = argument / (2 * (order + k) + argument * tail)
        ratio[rest] = tail
    return torch.from_numpy(ratio).to(x)


def log_bessel(order: float, x: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return `log I_ν(x) − x` for x >= 0; gradients reach x.

    Where the scaled function underflows, by its expansion for large orders (Abramowitz & Stegun 9.7.7), which is good
    to 1/ν² there; at large arguments, where scipy's is NaN, by the first terms of 9.7.1.

    Args:
        order: ν >= 0.
        x: arguments.
    """
    return cast(Tensor, _Log.apply(order, x))


def _log(order: float, x: Tensor) -> Tensor:
    values = x.detach().cpu().double().numpy()
    scaled = special.ive(order, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = np.log(scaled)
        if order > 0:
            z = values / order
            root = np.sqrt(1 + z**2)
            eta = root + np.log(z / (1 + root))
            t = 1 / root
            first = (3 * t - 5 * t**3) / 24
            large = order * eta - 0.5 * np.log(2 * np.pi * order * root) + np.log1p(first / order) - values
            plain = np.where(scaled > 1e-280, plain, large)
        tail = (1 - 4 * order**2) / (8 * values) - np.log(2 * np.pi * values) / 2
        plain = np.where(values > _WIDE, tail, plain)
    return torch.from_numpy(plain).to(x)


def bessel_fall(order: float, squared: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return `I_ν(x)/(x·I_{ν−1}(x))` as a function of x², which is smooth at 0, where it is 1/(2ν).

    Args:
        order: ν, at least 1/2.
        squared: x² >= 0.
    """
    tiny = squared < 1e-16
    x = torch.where(tiny, 1.0, squared).sqrt()
    return torch.where(tiny, 1 / (2 * order), bessel_ratio(order, x) / x)


class _Moment(torch.autograd.Function):
    """`log_moment` with its slope `I_{ν+1}/(2x·I_ν)` in x²."""

    @staticmethod
    def forward(ctx: Any, order: float, squared: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(squared)
        # Where the terms cancel, by a series in y whose next term is less than 1e-10 of the first.
        small, y = squared < 4e-5 * (order + 1) ** 2, squared / (4 * (order + 1))
        x = torch.where(small, 1.0, squared).sqrt()
        value = math.lgamma(order + 1) + order * torch.log(2 / x) + _log(order, x) + x
        return torch.where(small, y - y**2 / (2 * order + 4), value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (squared,) = ctx.saved_tensors
        return None, gradients[0] * bessel_fall(ctx.order + 1, squared) / 2


def log_moment(order: float, squared: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return `log(Γ(ν + 1)·(2/x)^ν·I_ν(x))`, smooth in x², 0 at 0; gradients reach x².

    It is `log E exp⟨m, u⟩` with `‖m‖ = x` and u uniform on the unit sphere of 2ν + 2 dimensions.

    Args:
        order: ν >= 0.
        squared: x² >= 0.
    """
    return cast(Tensor, _Moment.apply(order, squared))
