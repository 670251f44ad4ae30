"""Distances between two densities on one grid."""

from __future__ import annotations

import numpy as np

from fanal.errors import FanalError
from fanal.pde.grid import Array, Grid

__all__ = ["kl", "tv", "w2"]


def tv(grid: Grid, p: Array, q: Array) -> float:
    """Return the total variation `½∫|p − q|`."""
    return float((np.abs(p - q) * grid.volumes).sum()) / 2


def kl(grid: Grid, p: Array, q: Array) -> float:
    """Return `KL(p‖q) = ∫ p log(p/q)` in nats; infinite where q vanishes and p does not."""
    held = p > 0
    if (q[held] <= 0).any():
        return float("inf")
    return float((p[held] * np.log(p[held] / q[held]) * grid.volumes[held]).sum())


def w2(grid: Grid, p: Array, q: Array) -> float:
    """Return the Wasserstein distance of order 2 on one axis, from the quantiles: `sqrt(∫ (F⁻¹ − G⁻¹)² du)`.

    Within a cell mass is spread evenly, so that quantiles are straight between the levels of both distributions, and
    the integral is exact.

    Raises:
        FanalError: the grid has several axes.
    """
    if len(grid.edges) != 1:
        raise FanalError(f"w2 is for grids of one axis, got {len(grid.edges)}")
    levels = []
    for density in (p, q):
        mass = density * grid.widths[0]
        levels.append(np.concatenate([[0.0], np.cumsum(mass)]) / mass.sum())
    union = np.unique(np.concatenate(levels))
    middle, half = (union[1:] + union[:-1]) / 2, np.diff(union) / 2
    total = 0.0
    for node, weight in ((-(3**-0.5), 1.0), (3**-0.5, 1.0)):  # exact for the square of a straight line
        gap = np.subtract(*(np.interp(middle + node * half, level, grid.edges[0]) for level in levels))
        total += float((weight * half * gap**2).sum())
    return total**0.5
