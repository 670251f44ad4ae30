"""Drifts of the diffusion equations of [PDE] sec. 2: forward, and reverse with a score from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.pde.fokker_planck import Drift
from fanal.pde.grid import Array, Grid

__all__ = [
    "Score",
    "brownian",
    "ornstein_uhlenbeck",
    "reverse",
    "reverse_ode",
    "score_of_densities",
    "score_of_denoiser",
]

Score = Callable[[Array, float], Array]
"""`∇ log ρ(x, t)` at points (n, axes) and a time of the forward process."""


def ornstein_uhlenbeck(x: Array, time: float) -> Array:
    """Return the forward drift `−x` ([PDE] eq. 2.1, 2.11)."""
    return -x


def brownian(x: Array, time: float) -> Array:
    """Return the drift of plain diffusion, 0 ([PDE] eq. 2.9)."""
    return np.zeros_like(x)


def reverse(score: Score, end: float, forward: Drift = ornstein_uhlenbeck) -> Drift:
    """Return the drift of the stable reverse diffusion, `−b + 2∇log ρ(x, end − s)` ([PDE] eq. 2.7 and 2.10).

    With diffusion 1 and from `ρ(·, end)`, its solution at s is `ρ(·, end − s)`.

    Args:
        score: of the forward solution.
        end: T*, the forward time that it starts from.
        forward: b, the forward drift.
    """
    return lambda x, s: -forward(x, end - s) + 2 * score(x, end - s)


def reverse_ode(score: Score, end: float, forward: Drift = ornstein_uhlenbeck) -> Drift:
    """Return the drift of the deterministic reverse, `−b + ∇log ρ(x, end − s)`, without diffusion ([PDE] eq. 2.8).

    Args:
        score: of the forward solution.
        end: T*.
        forward: b, the forward drift.
    """
    return lambda x, s: -forward(x, end - s) + score(x, end - s)


def score_of_denoiser(denoiser: Denoiser, process: str = "ou") -> Score:
    """Return the score of a denoiser in the paper's variables.

    For Ornstein–Uhlenbeck, `x_t = e^{−t}·(x0 + sigma·n)` with `sigma = sqrt(e^{2t} − 1)`; for Brownian motion
    `x_t = x0 + sigma·n` with `sigma = sqrt(2t)`. The score of x_t is `(D − x)/sigma²` at the scaled point, over the
    scale.

    Args:
        denoiser: D(x, sigma).
        process: "ou" or "brownian".

    Raises:
        FanalError: the process is neither.
    """
    if process not in ("ou", "brownian"):
        raise FanalError(f"process is ou or brownian, got {process!r}")

    def score(points: Array, time: float) -> Array:
        if not time > 0:
            raise FanalError(f"a score exists for times above 0, got {time:.4g}")
        scale = math.exp(-time) if process == "ou" else 1.0
        sigma = math.sqrt(math.expm1(2 * time)) if process == "ou" else math.sqrt(2 * time)
        x = torch.from_numpy(points / scale)
        with torch.no_grad():
            found = (denoiser(x, torch.tensor(sigma, dtype=torch.float64)) - x) / sigma**2
        return found.numpy() / scale

    return score


def score_of_densities(grid: Grid, times: Sequence[float] | Array, densities: Array) -> Score:
    """Return the score of a forward solution on a grid: differences of its logarithm, linear in between.

    Where the density has vanished to rounding its logarithm is held at that of the smallest positive number.

    Args:
        grid: the cells.
        times: of the densities, increasing.
        densities: (T, *shape), as `evolve` returns them.

    Raises:
        FanalError: the shapes do not fit.
    """
    moments = np.asarray(times, dtype=np.float64)
    if densities.shape != (len(moments), *grid.shape):
        raise FanalError(f"expected densities of shape {(len(moments), *grid.shape)}, got {densities.shape}")
    logs = np.log(np.maximum(densities, np.finfo(np.float64).tiny))
    slopes = [np.gradient(logs, axis, axis=k + 1, edge_order=2) for k, axis in enumerate(grid.centers)]
    tables = [
        RegularGridInterpolator((moments, *grid.centers), slope, bounds_error=False, fill_value=None)  # pyright: ignore[reportArgumentType]
        for slope in slopes
    ]

    def score(points: Array, time: float) -> Array:
        where = np.concatenate([np.full((len(points), 1), float(np.clip(time, moments[0], moments[-1]))), points], 1)
        return np.stack([table(where) for table in tables], 1)

    return score
