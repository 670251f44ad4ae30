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
from fanal.pde.laws import noise_of, pieces, place

__all__ = [
    "Score",
    "brownian",
    "ornstein_uhlenbeck",
    "radial",
    "radial_score",
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


def radial(drift: Drift, dimension: int, diffusion: float = 1.0) -> Drift:
    """Return the drift of the distance r = |x| in so many dimensions, `b(r) + a(d − 1)/r`.

    The density of the distance, `r^{d−1}` times the density of x times the area of the unit sphere, obeys the equation
    on one axis with this drift, for any d: nothing overflows where `r^d` would.

    Args:
        drift: b, outward, at distances (n, 1).
        dimension: d.
        diffusion: a.
    """
    return lambda r, time: drift(r, time) + diffusion * (dimension - 1) / r


def radial_score(score: Score, dimension: int) -> Score:
    """Return `∂ log ρ/∂r` of the density of x from that of the distance's density, `score − (d − 1)/r`.

    Args:
        score: of the density of r, as `score_of_densities` reads it off a solution.
        dimension: d.
    """
    return lambda r, time: score(r, time) - (dimension - 1) / r


def score_of_denoiser(
    denoiser: Denoiser,
    process: str = "ou",
    dimension: int | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Score:
    """Return the score of a denoiser in the paper's variables.

    With scale and sigma of `noise_of`, `x_t = scale·(x0 + sigma·n)`: the score of x_t is `(D − x)/sigma²` at the scaled
    point, over the scale.

    Args:
        denoiser: D(x, sigma).
        process: "ou" or "brownian".
        dimension: for the score along the radius of a law that no rotation changes: the coordinates of a sample; None:
            points are samples.
        device: where the denoiser is.
        dtype: of the x that it is asked with; scores are float64 on the CPU.

    Raises:
        FanalError: the process is neither.
    """
    noise_of(1.0, process)

    def score(points: Array, time: float) -> Array:
        if not time > 0:
            raise FanalError(f"a score exists for times above 0, got {time:.4g}")
        scale, sigma = noise_of(time, process)
        axes, level = points.shape[1], torch.tensor(sigma, dtype=torch.float64)
        shape, found = getattr(denoiser, "shape", (dimension or axes,)), []
        for part in pieces(points, math.prod(shape)):
            x = place(part / scale, shape, dimension is not None).to(dtype)  # before it moves: mps has no float64
            with torch.no_grad():
                denoised = denoiser(x.to(device), level).cpu()
            found.append((denoised.double() - x.double()).reshape(len(part), -1)[:, :axes] / sigma**2)
        return torch.cat(found).numpy() / scale

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
