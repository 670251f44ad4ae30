"""Linear processes by name: variance-exploding, three variance-preserving ones, flow matching."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fanal.errors import FanalError
from fanal.sde.linear import LinearProcess, TimeFunction, checked

__all__ = ["PROCESSES", "cosine", "flow", "quadratic", "ve", "vp"]


def ve(t_max: float = 80.0) -> LinearProcess:
    """Variance-exploding with sigma = t: `s = 1, f = 0, g = sqrt(2t)` (Karras et al. 2022, arXiv:2206.00364)."""
    return checked(
        torch.ones_like,
        lambda t: t,
        torch.zeros_like,
        lambda t: (2 * t).sqrt(),
        0.0,
        t_max,
        inverse=lambda sigma: sigma,
    )


def _preserving(beta: TimeFunction, total: TimeFunction, t_max: float, inverse: TimeFunction) -> LinearProcess:
    """`s = exp(−B/2), sigma² = exp(B) − 1, f = −beta/2, g = sqrt(beta)` with `B = ∫beta`; `inverse` maps B to t."""
    return checked(
        lambda t: (-total(t) / 2).exp(),
        lambda t: total(t).expm1().sqrt(),
        lambda t: -beta(t) / 2,
        lambda t: beta(t).sqrt(),
        0.0,
        t_max,
        lambda sigma: inverse((sigma**2).log1p()),
    )


def _check_betas(beta_min: float, beta_max: float) -> None:
    if not 0 < beta_min < beta_max < math.inf:
        raise FanalError(f"need 0 < beta_min < beta_max, got {beta_min} and {beta_max}")


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> LinearProcess:
    """Variance-preserving with `beta(t) = beta_min + (beta_max − beta_min)·t`, t from 0 to 1.

    Reference: Ho et al. 2020, arXiv:2006.11239; Song et al. 2021, arXiv:2011.13456, eq. 32.

    Raises:
        FanalError: the betas are not positive and increasing.
    """
    _check_betas(beta_min, beta_max)
    rise = beta_max - beta_min
    return _preserving(
        lambda t: beta_min + rise * t,
        lambda t: beta_min * t + rise * t**2 / 2,
        1.0,
        lambda total: 2 * total / (beta_min + (beta_min**2 + 2 * rise * total).sqrt()),
    )


def quadratic(beta_min: float = 0.85, beta_max: float = 12.0) -> LinearProcess:
    """Variance-preserving with `beta(t) = (sqrt(beta_min) + (sqrt(beta_max) − sqrt(beta_min))·t)²`, t from 0 to 1.

    The "quad" betas of DDPM's code, called "scaled linear" elsewhere; the defaults are those of latent diffusion
    (Rombach et al. 2022, arXiv:2112.10752), whose beta is a thousandth of this one.

    Raises:
        FanalError: the betas are not positive and increasing.
    """
    _check_betas(beta_min, beta_max)
    low, rise = math.sqrt(beta_min), math.sqrt(beta_max) - math.sqrt(beta_min)
    return _preserving(
        lambda t: (low + rise * t) ** 2,
        lambda t: low**2 * t + low * rise * t**2 + rise**2 * t**3 / 3,
        1.0,
        lambda total: ((low**3 + 3 * rise * total) ** (1 / 3) - low) / rise,
    )


def cosine(offset: float = 0.008, t_max: float = 0.999) -> LinearProcess:
    """Variance-preserving with `s = cos φ(t)/cos φ(0)`, `φ = π/2·(t + offset)/(1 + offset)`; infinite at t = 1.

    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.

    Raises:
        FanalError: the offset is not in [0, 1), or t_max not in (0, 1).
    """
    if not 0 <= offset < 1 or not 0 < t_max < 1:
        raise FanalError(f"need 0 <= offset < 1 and 0 < t_max < 1, got {offset} and {t_max}")
    speed = math.pi / 2 / (1 + offset)
    start = speed * offset

    def beta(t: Tensor) -> Tensor:
        return 2 * speed * (start + speed * t).tan()

    def total(t: Tensor) -> Tensor:
        # −2·ln(cos(φ)/cos(φ0)), and cos(φ)/cos(φ0) − 1 without cancellation near t = 0.
        turn = speed * t
        return -2 * (-2 * (turn / 2).sin() ** 2 - math.tan(start) * turn.sin()).log1p()

    def inverse(whole: Tensor) -> Tensor:
        return ((math.cos(start) * (-whole / 2).exp()).acos() - start) / speed

    return _preserving(beta, total, t_max, inverse)


def flow(t_max: float = 0.999) -> LinearProcess:
    """Flow matching on a straight line, `z = (1 − t)·x0 + t·n`: `s = 1 − t, sigma = t/(1 − t)`; infinite at t = 1.

    Reference: Lipman et al. 2023, arXiv:2210.02747; [REG] eq. 26.

    Raises:
        FanalError: t_max is not in (0, 1).
    """
    if not 0 < t_max < 1:
        raise FanalError(f"need 0 < t_max < 1, got {t_max}")
    return checked(
        lambda t: 1 - t,
        lambda t: t / (1 - t),
        lambda t: -1 / (1 - t),
        lambda t: (2 * t / (1 - t)).sqrt(),
        0.0,
        t_max,
        lambda sigma: sigma / (1 + sigma),
    )


PROCESSES: dict[str, Callable[[], LinearProcess]] = {
    "ve": ve,
    "vp": vp,
    "cosine": cosine,
    "quadratic": quadratic,
    "flow": flow,
}
"""Name → maker."""
