"""What the checks are run on: small laws whose answers are known, noise, and grids of time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fanal.exact import Mixture
from fanal.particles.reverse import sigma_of
from fanal.pde.grid import Array
from fanal.sampling import Solver
from fanal.solvers import DDPM

__all__ = [
    "EARLY",
    "SCHEMES",
    "START",
    "VARIANCE",
    "density",
    "float64",
    "grid",
    "humps",
    "normal",
    "plane",
    "points",
    "variance",
]

START, EARLY = 3.0, 0.05
"""Times between which schemes are compared."""

VARIANCE = 0.5
"""Of Gaussian data, with mean 0."""


def _schemes() -> dict[str, tuple[Solver, str]]:
    from fanal.particles.schemes import EulerMaruyama

    return {"Euler–Maruyama": (EulerMaruyama(), "plain"), "exact step": (DDPM(), "bridge")}


SCHEMES = _schemes()
"""Both schemes by name, each with the integral of a Brownian path that it sees."""


def float64(values: Any) -> Tensor:
    """Return values as a tensor in double precision."""
    return torch.tensor(values, dtype=torch.float64)


def humps() -> Mixture:
    """Return two unequal humps on a line, not centered."""
    return Mixture(float64([[-1.5], [1.0]]), [0.4, 0.6], std=float64([0.4, 0.6]))


def plane() -> Mixture:
    """Return three unequal humps in the plane."""
    return Mixture(float64([[1.0, 0.2], [-0.8, 0.9], [-0.3, -1.1]]), [0.5, 0.3, 0.2], std=float64([0.4, 0.5, 0.35]))


def points(count: int = 24, seed: int = 2) -> Tensor:
    """Return training points in the square [−2, 2]², (count, 2)."""
    return 4 * torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal noise in double precision."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grid(steps: int, end: float = EARLY, start: float = START, even: bool = False) -> Tensor:
    """Return noise levels at times even in log t, where no step is long beside the time left, or even in t."""
    times = (
        np.linspace(start, end, steps + 1) if even else np.exp(np.linspace(math.log(start), math.log(end), steps + 1))
    )
    return float64([sigma_of(t) for t in times])


def density(z: Array, time: float) -> Array:
    """Return the density of the two humps at a time, in the paper's variables."""
    x = torch.from_numpy(z * math.exp(time))[:, None]
    return (humps().log_density(x, float64(sigma_of(time))) + time).exp().numpy()


def variance(time: float) -> float:
    """Return the variance of the Gaussian data at a time, in the paper's variables."""
    return 1 + math.exp(-2 * time) * (VARIANCE - 1)
