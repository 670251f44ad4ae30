"""Noncentral chi-squared probabilities as the uniform law on a ball needs them: logarithms far outside, gradients."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from scipy import special
from torch import Tensor

from fanal.supports.truncated import bessel_ratio, log_bessel

__all__ = ["inner_share", "log_chance"]

_SMALL = 1e-200  # below it scipy's distribution function comes near its underflow
_DIGITS = 40.0  # e^-40: terms of a series that are left out


def log_chance(order: float, bound: Tensor, center: Tensor) -> Tensor:
    """Return `log F_k(a; λ)`, the noncentral chi-squared distribution function; gradients reach both arguments.

    `F_k(a; λ) = P(‖m + z‖² <= a)` with `z ~ N(0, I_k)`, `‖m‖² = λ`. Its slopes are `∂F_k/∂λ = (F_{k+2} − F_k)/2` and the
    density `∂F_k/∂a = f_k` (Johnson, Kotz & Balakrishnan 1995, ch. 29).

    Args:
        order: k, at least 1.
        bound: a > 0, (B,) float64.
        center: λ >= 0, (B,) float64.
    """
    return cast(Tensor, _LogChance.apply(order, bound, center))


def inner_share(order: float, bound: Tensor, center: Tensor) -> Tensor:
    """Return `F_{k+2}(a; λ)/F_k(a; λ)`, between 0 and 1; gradients reach both arguments, again and again.

    Of m + z that is known to have `‖m + z‖² <= a` the mean is this share of m.

    Args:
        order: k, at least 1.
        bound: a > 0, (B,) float64.
        center: λ >= 0, (B,) float64.
    """
    return cast(Tensor, _Share.apply(order, bound, center))


class _LogChance(torch.autograd.Function):
    """`log_chance` with its slopes."""

    @staticmethod
    def forward(ctx: Any, order: float, bound: Tensor, center: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(bound, center)
        return _both(order, bound, center)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        (bound, center), order = ctx.saved_tensors, ctx.order
        rest = (1 - inner_share(order, bound, center)) / 2  # f_{k+2}/F_k
        return None, gradients[0] * rest / (bound * _fall(order, bound, center)), -gradients[0] * rest


class _Share(torch.autograd.Function):
    """`inner_share` q_k with its slopes `q_k(q_{k+2} − q_k)/2` in λ and `(1 − q_k)/2·(1 − q_k·f_k/f_{k+2})` in a."""

    @staticmethod
    def forward(ctx: Any, order: float, bound: Tensor, center: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(bound, center)
        return _both(order, bound, center)[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        (bound, center), order = ctx.saved_tensors, ctx.order
        share, next_share = (inner_share(k, bound, center) for k in (order, order + 2))
        by_bound = (1 - share) / 2 * (1 - share / (bound * _fall(order, bound, center)))
        return None, gradients[0] * by_bound, gradients[0] * share * (next_share - share) / 2


def _fall(order: float, bound: Tensor, center: Tensor) -> Tensor:
    """`f_{k+2}/(a·f_k) = I_{k/2}(κ)/(κ·I_{k/2−1}(κ))` with `κ = √(aλ)`: 1/k at 0."""
    tiny = bound * center < 1e-16
    kappa = torch.where(tiny, 1.0, bound * center).sqrt()
    return torch.where(tiny, 1 / order, bessel_ratio(order / 2, kappa) / kappa)


def _both(order: float, bound: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """`log F_k` and `F_{k+2}/F_k`: scipy's, or where they are tiny by a sum of densities."""
    a, shift = (value.detach().cpu().double().numpy() for value in torch.broadcast_tensors(bound, center))
    near, nearer = (special.chndtr(a, k, shift) for k in (order, order + 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, share = np.log(near), nearer / near
    far = ~(near > _SMALL)
    if far.any():
        total = _tail(order, a[far], shift[far])
        ends, means = (torch.from_numpy(value[far]) for value in (a, shift))
        logs[far] = _log_density(order + 2, ends, means).numpy() + math.log(2) + np.log1p(total)
        share[far] = total / (1 + total)
    return torch.from_numpy(logs).to(bound), torch.from_numpy(share.clip(0, 1)).to(bound)


def _tail(order: float, a: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """`F_{k+2}/(2 f_{k+2})` by `F_k = 2·Σ_j f_{k+2+2j}`: sums from the end, with the densities' ratios by recursion.

    `f_{k+2}/f_k = a·g_k`, and `g_k = 1/(k + aλ·g_{k+2})` is Gauss's continued fraction.
    """
    product = a * shift
    first = a * _ratio(order + 2, product)
    count = math.ceil(_DIGITS / (1 - float(first.max())))
    ratio = _ratio(order + 2 + 2 * count, product)
    rest = 1 / (1 - a * ratio)  # as if the densities went on falling at that rate
    for j in range(count - 1, -1, -1):
        ratio = 1 / (order + 2 + 2 * j + product * ratio)
        rest = 1 + a * ratio * rest
    return rest - 1


def _ratio(order: float, product: np.ndarray) -> np.ndarray:
    """`g_k` within the bounds of Amos (1974), which agree to 1/k."""
    return 1 / (order / 2 + np.sqrt((order / 2) ** 2 + product))


def _log_density(order: float, a: Tensor, shift: Tensor) -> Tensor:
    """`log f_k(a; λ)`."""
    half, kappa = order / 2 - 1, (a * shift).sqrt()
    return log_moment(half, kappa) - (a + shift) / 2 + half * torch.log(a / 2) - math.lgamma(half + 1) - math.log(2)
