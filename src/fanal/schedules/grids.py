"""Grids of sigma by formula, the check that a grid is one, and the jump."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = [
    "SCHEDULES",
    "Grid",
    "check_sigmas",
    "cosine",
    "double",
    "jump",
    "logsnr",
    "plain_sigmas",
    "polynomial",
    "quadratic",
    "uniform",
    "vp_rates",
]

Grid = Float[Tensor, " n"]

_EPSILON = 1e-3  # where the VP time of [REG] sec. C.3 starts


def double(values: Tensor | Sequence[float]) -> Tensor:
    """Return `values` in float64 on the CPU; Python's floats never pass through torch's float32 default."""
    return torch.as_tensor(values, dtype=None if isinstance(values, Tensor) else torch.float64).to("cpu", torch.float64)


def check_sigmas(sigmas: Tensor | Sequence[float]) -> Grid:
    """Return `sigmas` as a schedule: 1-D float64 on the CPU, >= 0 and strictly monotone.

    A decreasing grid may end at 0, and may start at infinity (see `fanal.sampling.depart`); an increasing one (to
    encode) must start above 0. Gradients are kept.

    Raises:
        FanalError: it is not such a grid; the message names the entry.
    """
    grid = double(sigmas)
    if grid.ndim != 1 or len(grid) < 2:
        raise FanalError(f"sigmas must be one-dimensional with at least two entries, got shape {tuple(grid.shape)}")
    values: list[float] = grid.tolist()
    for i, value in enumerate(values):
        if not value >= 0 or (math.isinf(value) and i):
            raise FanalError(f"sigmas must be finite and >= 0 (the first may be infinite), got sigmas[{i}] = {value}")
    falls = values[1] < values[0]
    for i, (a, b) in enumerate(zip(values, values[1:], strict=False)):
        if a == b or (b < a) != falls:
            raise FanalError(
                f"sigmas must be strictly monotone, got sigmas[{i}] = {a:.6g}, sigmas[{i + 1}] = {b:.6g}; "
                "sort them and drop repeats"
            )
    if values[0] == 0:
        raise FanalError("an increasing grid must start above 0, got sigmas[0] = 0; try a small sigma such as 0.002")
    return grid


def plain_sigmas(sigmas: Tensor) -> list[float | str]:
    """Return a grid as JSON values: numbers, and `"inf"` at the start of grids from infinity."""
    return [value if math.isfinite(value) else "inf" for value in sigmas.tolist()]


def _grid(steps: int, sigma_min: float, sigma_max: float, zero: bool, at: Callable[[Tensor], Tensor]) -> Grid:
    """Place nodes by `at`, which maps a ramp from 0 (at sigma_max) to 1 (at sigma_min) to sigma."""
    if int(steps) != steps or steps < 1:
        raise FanalError(f"steps must be a whole number >= 1, got {steps}")
    if not 0 < sigma_min < sigma_max < math.inf:
        hint = (
            "; a grid from infinity is the model's own (native), or give a finite sigma_max"
            if sigma_max == math.inf
            else ""
        )
        raise FanalError(f"need 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}{hint}")
    nodes = int(steps) if zero else int(steps) + 1
    ramp = torch.arange(nodes, dtype=torch.float64) / max(nodes - 1, 1)
    sigmas = at(ramp)
    sigmas[0] = sigma_max  # the ends are what was asked for, not what the powers round to
    if nodes > 1:
        sigmas[-1] = sigma_min
    if not bool((sigmas.diff() < 0).all()):
        raise FanalError(
            f"no decreasing grid of this kind runs from sigma_max={sigma_max} to sigma_min={sigma_min} in {steps} "
            "steps (VP time needs a small sigma_min); try logsnr or polynomial"
        )
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if zero else sigmas


def polynomial(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, zero: bool = True
) -> Grid:
    """`sigma_i = (sigma_max^(1/rho) + i/(n−1)·(sigma_min^(1/rho) − sigma_max^(1/rho)))^rho`.

    Source: (Karras et al. 2022, eq. 5); [REG] sec. C.3.

    Raises:
        FanalError: `steps`, the sigmas or `rho` make no grid.
    """
    if not rho > 0:
        raise FanalError(f"rho must be positive, got {rho}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _grid(steps, sigma_min, sigma_max, zero, lambda ramp: (high + ramp * (low - high)) ** rho)


def logsnr(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, zero: bool = True) -> Grid:
    """Nodes uniform in `log sigma` ([REG] sec. C.3; Lu et al. 2022).

    Raises:
        FanalError: `steps` or the sigmas make no grid.
    """
    return _grid(
        steps,
        sigma_min,
        sigma_max,
        zero,
        lambda ramp: torch.exp(math.log(sigma_max) + ramp * math.log(sigma_min / sigma_max)),
    )


def vp_rates(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Return β_d and β_min that put sigma_min at the VP time 0.001 and sigma_max at 1.

    `β_d = 2/(ε − 1)·(log(1 + sigma_min²)/ε − log(1 + sigma_max²))`, `β_min = log(1 + sigma_max²) − β_d/2`, ε = 0.001.
    Source: [REG] sec. C.3, where the brackets of β_d are misprinted; its table 9 confirms this form.
    """
    top, bottom = math.log1p(sigma_max**2), math.log1p(sigma_min**2)
    beta_d = 2 / (_EPSILON - 1) * (bottom / _EPSILON - top)
    return beta_d, top - beta_d / 2


def uniform(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, power: float = 1.0, zero: bool = True
) -> Grid:
    """Nodes uniform in VP time u, raised to a power: `sigma = sqrt(exp(β_d·u²/2 + β_min·u) − 1)`.

    `u_i = (1 + i/(n−1)·(ε^(1/power) − 1))^power`, ε = 0.001; `vp_rates` puts the ends at sigma_max and sigma_min
    ([REG] sec. C.3).

    Raises:
        FanalError: `steps`, the sigmas or `power` make no grid.
    """
    if not power > 0:
        raise FanalError(f"power must be positive, got {power}")
    beta_d, beta_min = vp_rates(sigma_min, sigma_max)

    def at(ramp: Tensor) -> Tensor:
        u = (1 + ramp * (_EPSILON ** (1 / power) - 1)) ** power
        return torch.expm1(beta_d * u**2 / 2 + beta_min * u).sqrt()

    return _grid(steps, sigma_min, sigma_max, zero, at)


def quadratic(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, zero: bool = True) -> Grid:
    """Nodes quadratic in VP time: `uniform` with power 2 (the quadratic sub-sequence of Song et al. 2021, DDIM).

    Raises:
        FanalError: `steps` or the sigmas make no grid.
    """
    return uniform(steps, sigma_min, sigma_max, power=2.0, zero=zero)


def cosine(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, offset: float = 0.008, zero: bool = True
) -> Grid:
    """Nodes uniform in the time of the cosine schedule: `1/(1 + sigma²) = cos²φ(t)/cos²φ(0)`.

    `φ(t) = π/2·(t + offset)/(1 + offset)` (Nichol & Dhariwal 2021, eq. 17), t uniform between the ends.

    Raises:
        FanalError: `steps`, the sigmas or `offset` make no grid.
    """
    if not 0 <= offset < 1:
        raise FanalError(f"offset must be in [0, 1), got {offset}")
    base = math.cos(math.pi / 2 * offset / (1 + offset))

    def angle(sigma: float) -> float:
        return math.acos(base / math.sqrt(1 + sigma**2))

    high, low = angle(sigma_max), angle(sigma_min)

    def at(ramp: Tensor) -> Tensor:
        return ((base / torch.cos(high + ramp * (low - high))) ** 2 - 1).clamp_min(0).sqrt()

    return _grid(steps, sigma_min, sigma_max, zero, at)


def jump(sigmas: Tensor | Sequence[float], at: float) -> Grid:
    """Cut a decreasing grid at the first node <= `at` and go from there straight to 0 (ODE-Jump, [GEO] sec. 3.2).

    Args:
        sigmas: the grid to cut.
        at: sigma from which the run jumps to its denoised prediction.

    Raises:
        FanalError: no positive node lies at or below `at`.
    """
    grid = check_sigmas(sigmas)
    kept = [i for i, value in enumerate(grid.tolist()) if 0 < value <= at]
    if not kept or grid[0] < grid[-1]:
        raise FanalError(f"jump needs a decreasing grid with a positive node at or below at={at}")
    return torch.cat([grid[: kept[0] + 1], grid.new_zeros(1)])


SCHEDULES: dict[str, Callable[..., Grid]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "uniform": uniform,
    "quadratic": quadratic,
    "cosine": cosine,
}
"""Name → maker, for the command line and for parametrized tests."""
