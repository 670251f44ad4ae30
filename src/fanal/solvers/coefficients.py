"""The numbers solvers are made of: φ-functions, moments and interpolation weights. Float64, no model.

A multistep step is Euler's step with a weighted mean of values, `Σ_k q_k·v_k`, in place of the newest one. The values
are slopes d or denoised predictions D. With s = 0 at the start of the interval and s = 1 at its end, in whatever time
the values are taken to be polynomials of, the weights integrate the polynomial through them:

    q_k = Σ_j L_kj·m_j,   L_k(s) = Π_{m≠k} (s − s_m)/(s_k − s_m) = Σ_j L_kj·s^j,   m_j = ∫ s^j w(s) ds / ∫ w(s) ds

All that differs between the methods is the time and the weight w, that is, the nodes and the moments:

| method | values | time | moments m_j |
| --- | --- | --- | --- |
| Adams–Bashforth (LMS, DEIS-ρAB) | d | sigma | `1/(j + 1)` |
| DEIS log-ρ, DPM-Solver | d | log sigma | `j!·φ_{j+1}(h)/φ_1(h)`, h = log(sigma/sigma') |
| DPM-Solver++, RES, UniPC | D | log sigma | `j!·φ_{j+1}(−h)/φ_1(−h)` |
| DEIS-tAB | d | VP time | by quadrature |

Every function takes Python floats; where a gradient to sigma is wanted it takes 0-d float64 tensors instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fanal.schedules import vp_rates

__all__ = [
    "Real",
    "between",
    "call",
    "exponential_moments",
    "interpolation",
    "log_ratio",
    "number",
    "phi",
    "plain",
    "power_moments",
    "quadrature_moments",
    "tensor_of",
    "units",
    "vp_time",
]

Real = float | Tensor
"""A coefficient: a Python float, or a 0-d float64 tensor that carries a gradient."""

_TERMS = 20  # of the series below |z| = 1: the next one is under 1e-18
_NODES = 64  # of the Gauss–Legendre rule in log sigma; 1e-15 over a range of 10


def number(sigma: Tensor) -> Real:
    """Return sigma as a Python float, or as it is where it carries a gradient."""
    return sigma if sigma.requires_grad else float(sigma)


def plain(z: Real) -> float:
    """Return a coefficient as a float, without its gradient."""
    return float(z.detach()) if isinstance(z, Tensor) else z


def call(name: str, z: Real) -> Real:
    """Return a function's value by its name, from torch for tensors and from math for floats."""
    function: Callable[..., Real] = getattr(torch if isinstance(z, Tensor) else math, name)
    return function(z)


def tensor_of(sigma: Real) -> Tensor:
    """Return sigma as denoisers take it: 0-d float64 on the CPU."""
    return torch.as_tensor(sigma, dtype=torch.float64)


def between(sigma: Real, sigma_next: Real, share: float, *, log: bool) -> Real:
    """Return the noise level at a share of the interval, of log sigma or of sigma."""
    if log:
        return sigma * (sigma_next / sigma) ** share
    return sigma + share * (sigma_next - sigma)


def log_ratio(a: Real, b: Real) -> Real:
    """Return `log(a/b)`."""
    return call("log", a / b)


def phi(k: int, z: Real) -> Real:
    """Return `φ_k(z) = Σ_j z^j/(j + k)!`, the functions of exponential integrators.

    `φ_0(z) = e^z` and `φ_{k+1}(z) = (φ_k(z) − 1/k!)/z`; below |z| = 1 the series, where the recursion cancels.

    Source: (Hochbruck & Ostermann 2010, Acta Numerica 19, eq. 2.10).
    """
    if abs(plain(z)) < 1:
        total: Real = 0.0
        for j in reversed(range(_TERMS)):
            total = total * z + 1 / math.factorial(j + k)
        return total
    if k == 0:
        return call("exp", z)
    value = call("expm1", z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def power_moments(count: int) -> list[Real]:
    """Return the moments `∫_0^1 s^j ds = 1/(j + 1)` of an unweighted interval."""
    return [1 / (j + 1) for j in range(count)]


def exponential_moments(count: int, z: Real) -> list[Real]:
    """Return `∫_0^1 s^j e^{z(1 − s)} ds / ∫_0^1 e^{z(1 − s)} ds = j!·φ_{j+1}(z)/φ_1(z)`."""
    whole = phi(1, z)
    return [1.0, *(math.factorial(j) * phi(j + 1, z) / whole for j in range(1, count))]


def units(times: Sequence[Real], end: Real) -> list[Real]:
    """Return times in units of the interval: 0 at `times[0]`, its start, and 1 at `end`; earlier ones are negative."""
    length = end - times[0]
    return [(time - times[0]) / length for time in times]


def interpolation(nodes: Sequence[Real], moments: Sequence[Real]) -> list[Real]:
    """Return the weights q_k that integrate the polynomial through values at `nodes`.

    Args:
        nodes: distinct, in units of the interval.
        moments: one per node, `m_j`; with m_0 = 1 the weights sum to 1.
    """
    weights: list[Real] = []
    for k, own in enumerate(nodes):
        basis: list[Real] = [1.0]  # coefficients of s^0, s^1, …
        for other in (node for m, node in enumerate(nodes) if m != k):
            scale = 1 / (own - other)
            raised: list[Real] = [0.0, *basis]
            basis = [(high - other * low) * scale for high, low in zip(raised, [*basis, 0.0], strict=True)]
        weight: Real = 0.0
        for coefficient, moment in zip(basis, moments, strict=True):
            weight = weight + coefficient * moment
        weights.append(weight)
    return weights


def vp_time(sigma: Real, sigma_min: float, sigma_max: float) -> Real:
    """Return the VP time u of a noise level, or of a tensor of them: 0.001 at sigma_min and 1 at sigma_max.

    The inverse of `sigma = sqrt(exp(β_d·u²/2 + β_min·u) − 1)` ([REG] sec. C.3; `fanal.schedules.uniform`).
    """
    beta_d, beta_min = vp_rates(sigma_min, sigma_max)
    return (call("sqrt", beta_min**2 + 2 * beta_d * call("log1p", sigma**2)) - beta_min) / beta_d


@functools.lru_cache(maxsize=1)
def _gauss() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def quadrature_moments(
    count: int, sigma: Real, sigma_next: Real, sigma_min: float, sigma_max: float, points: int = 0
) -> list[Real]:
    """Return `∫ s^j dsigma / (sigma' − sigma)` over the interval, with s linear in VP time.

    Args:
        count: how many moments.
        sigma: start of the interval.
        sigma_next: its end.
        sigma_min: where VP time is 0.001.
        sigma_max: where it is 1.
        points: 0 for a Gauss–Legendre rule in log sigma, exact to rounding. Otherwise the mean over this many
            equally spaced times, both ends included, times the whole interval: the diff-sampler toolbox has 10,000.
            The spacing is then one part in `points` too small, and so are the weights.
    """
    start, end = (vp_time(level, sigma_min, sigma_max) for level in (sigma, sigma_next))
    length = sigma_next - sigma
    if points:
        ramp = torch.linspace(0, 1, points, dtype=torch.float64)
        time = start + ramp * (end - start)
        beta_d, beta_min = vp_rates(sigma_min, sigma_max)
        kept = torch.exp(-beta_d * time**2 / 2 - beta_min * time)  # ᾱ
        density = (beta_d * time + beta_min) / 2 / (kept * (1 - kept)).sqrt() * ((end - start) / points / length)
    else:
        ramp, share = _gauss()
        width = log_ratio(sigma_next, sigma)
        level = sigma * torch.exp(ramp * width)
        density = share * level * (width / length)
        ramp = (vp_time(level, sigma_min, sigma_max) - start) / (end - start)
    moments = [(density * ramp**j).sum() for j in range(count)]
    return [m if m.requires_grad else float(m) for m in moments]
