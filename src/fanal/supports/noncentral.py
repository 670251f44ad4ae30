"""Noncentral chi-squared probabilities as the uniform law on a ball needs them: logarithms far outside, gradients."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from scipy import special
from torch import Tensor

from fanal.supports.truncated import bessel_fall, log_mass, log_moment, truncated_mean

__all__ = ["inner_share", "log_chance"]

_SMALL = 1e-6  # far below, scipy's distribution function loses digits and underflows; the sum is short there
_DIGITS = 40.0  # e^-40: terms of a series that are left out
_FLAT = 1e8  # near the wall of a ball of √a noise levels its curvature is nothing; scipy is slow there, then NaN


def log_chance(order: float, bound: Tensor, center: Tensor) -> Tensor:
    """Return `log F_k(a; λ)`, the noncentral chi-squared distribution function; gradients reach both arguments.

    `F_k(a; λ) = P(‖m + z‖² <= a)` with `z ~ N(0, I_k)` and `‖m‖² = λ`. Its slopes are `∂F_k/∂λ = (F_{k+2} − F_k)/2` and
    the density `∂F_k/∂a = f_k` (Johnson, Kotz & Balakrishnan 1995, ch. 29).

    Args:
        order: k, at least 1.
        bound: a > 0, (B,) float64.
        center: λ >= 0, (B,) float64.
    """
    flat = _flat(bound, center)
    if not bool(flat.any()):
        return cast(Tensor, _LogChance.apply(order, bound, center))
    wall, away = _wall(order, bound, center, flat)
    near = log_chance(order, bound.where(~flat, 1.0), center.where(~flat, 1.0))
    return torch.where(flat, log_mass(away, torch.ones_like(away), -wall, wall), near)


def inner_share(order: float, bound: Tensor, center: Tensor) -> Tensor:
    """Return `F_{k+2}(a; λ)/F_k(a; λ)`, between 0 and 1; gradients reach both arguments, again and again.

    Of m + z that is known to have `‖m + z‖² <= a` the mean is this share of m.

    Args:
        order: k, at least 1.
        bound: a > 0, (B,) float64.
        center: λ >= 0, (B,) float64.
    """
    flat = _flat(bound, center)
    if not bool(flat.any()):
        return cast(Tensor, _Share.apply(order, bound, center))
    wall, away = _wall(order, bound, center, flat)
    near = inner_share(order, bound.where(~flat, 1.0), center.where(~flat, 1.0))
    return torch.where(flat, truncated_mean(away, torch.ones_like(away), -wall, wall) / away, near)


def _flat(bound: Tensor, center: Tensor) -> Tensor:
    return (bound > _FLAT) & (center < 1.002 * bound)


def _wall(order: float, bound: Tensor, center: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Half the length of a large ball along its axis, less what curvature takes on average, and ‖m‖."""
    half = bound.where(flat, _FLAT).sqrt()
    return half - (order - 1) / (2 * half), center.where(flat, 1.0).clamp_min(1e-30).sqrt()


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
        return None, gradients[0] * rest / (bound * bessel_fall(order / 2, bound * center)), -gradients[0] * rest


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
        by_bound = (1 - share) / 2 * (1 - share / (bound * bessel_fall(order / 2, bound * center)))
        return None, gradients[0] * by_bound, gradients[0] * share * (next_share - share) / 2


def _both(order: float, bound: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """`log F_k` and `F_{k+2}/F_k`: scipy's, or where they are tiny by a sum of densities."""
    a, shift = (value.detach().cpu().double().numpy() for value in torch.broadcast_tensors(bound, center))
    near, nearer = (special.chndtr(a, k, shift) for k in (order, order + 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, share = np.log(near), nearer / near
    far = (near < _SMALL) | (a > _FLAT)
    if far.any():
        rest = _rest(order, a[far], shift[far])
        ends, means = (torch.from_numpy(value[far]) for value in (a, shift))
        logs[far] = _log_density(order + 2, ends, means).numpy() + math.log(2) + np.log1p(rest)
        share[far] = rest / (1 + rest)
    return torch.from_numpy(logs).to(bound), torch.from_numpy(share.clip(0, 1)).to(bound)


def _rest(order: float, a: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """`F_{k+2}/(2 f_{k+2})` by `F_{k+2} = 2·Σ_j f_{k+4+2j}`, from its end.

    One density over the one before is `f_{k+2}/f_k = a·g_k`; `g_k = 1/(k + aλ·g_{k+2})`, Gauss's continued fraction.
    """
    product = a * shift
    half = (order + 1) / 2  # an upper bound of g_{k+2} (Amos 1974)
    fastest = float((a / (half + np.sqrt(half**2 + product))).max())
    count = math.ceil(_DIGITS / max(-math.log(fastest), 1e-6))
    fall = bessel_fall(order / 2 + count + 1, torch.from_numpy(product)).numpy()
    rest = a * fall / (1 - a * fall)  # as if densities went on falling at that rate
    for j in range(count, 0, -1):
        fall = 1 / (order + 2 * j + product * fall)
        rest = a * fall * (1 + rest)
    return rest


def _log_density(order: float, a: Tensor, shift: Tensor) -> Tensor:
    """`log f_k(a; λ)`."""
    half = order / 2 - 1
    return log_moment(half, a * shift) - (a + shift) / 2 + half * torch.log(a / 2) - math.lgamma(half + 1) - math.log(2)
