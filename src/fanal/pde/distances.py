"""Distances between two densities on one grid, and between two sets of points."""

from __future__ import annotations

import numpy as np

from fanal.errors import FanalError
from fanal.pde.grid import Array, Grid

__all__ = ["equal_parts", "kl", "tv", "w2", "wasserstein"]

_PARTS, _MOST = 600, 5000


def tv(grid: Grid, p: Array, q: Array) -> float:
    """Return the total variation `½∫|p − q|`."""
    return float((np.abs(p - q) * grid.volumes).sum()) / 2


def kl(grid: Grid, p: Array, q: Array) -> float:
    """Return `KL(p‖q) = ∫ p log(p/q)` in nats; infinite where q vanishes and p does not."""
    held = p > 0
    if (q[held] <= 0).any():
        return float("inf")
    return float((p[held] * np.log(p[held] / q[held]) * grid.volumes[held]).sum())


def w2(grid: Grid, p: Array, q: Array, parts: int = _PARTS) -> float:
    """Return the Wasserstein distance of order 2.

    On one axis from the quantiles, `sqrt(∫ (F⁻¹ − G⁻¹)² du)`: within a cell mass is spread evenly, so that they are
    straight between the levels of both distributions, and the integral is exact. On two axes each density is cut into
    parts of equal mass (`equal_parts`), and the distance between these is exact; it is 0 where p is q.

    Args:
        grid: the cells, of one or two axes.
        p: a density.
        q: another.
        parts: on two axes: how many.

    Raises:
        FanalError: the grid has three axes.
    """
    p, q = np.maximum(p, 0), np.maximum(q, 0)  # what rounding leaves below 0, as `evolve` allows
    if len(grid.edges) == 2:
        return wasserstein(equal_parts(grid, p, parts), equal_parts(grid, q, parts))
    if len(grid.edges) != 1:
        raise FanalError(f"w2 is for grids of one or two axes, got {len(grid.edges)}")
    levels = [_levels(density * grid.widths[0]) for density in (p, q)]
    union = np.unique(np.concatenate(levels))
    middle, half = (union[1:] + union[:-1]) / 2, np.diff(union) / 2
    total = 0.0
    for node, weight in ((-(3**-0.5), 1.0), (3**-0.5, 1.0)):  # exact for the square of a straight line
        gap = np.subtract(*(_quantiles(grid.edges[0], level, middle + node * half) for level in levels))
        total += float((weight * half * gap**2).sum())
    return total**0.5


def wasserstein(x: Array, y: Array, order: int = 2) -> float:
    """Return the Wasserstein distance between two sets of points, exactly: `min_π (mean_i |x_i − y_π(i)|^p)^(1/p)`.

    The best permutation by SciPy's solver of assignments; of 1,000 points it takes about a second.

    Args:
        x: (n, d).
        y: (n, d).
        order: p, at least 1.

    Raises:
        FanalError: the sets are not finite, differ in their sizes, or have more than 5,000 points.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    if x.ndim != 2 or x.shape != y.shape or not 1 <= len(x) <= _MOST:
        raise FanalError(
            f"an exact distance is between two sets of as many points, (n, d) with n up to {_MOST:,}, got {x.shape} "
            f"and {y.shape}: draw as many, or take fanal.metrics.sliced_wasserstein"
        )
    if order < 1 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise FanalError(f"points must be finite and the order at least 1, got order {order}")
    cost = cdist(x, y) ** order
    return float(cost[linear_sum_assignment(cost)].mean() ** (1 / order))


def equal_parts(grid: Grid, density: Array, count: int = _PARTS) -> Array:
    """Return points (count, 2) that each stand for as much of a density on two axes, without chance.

    Quantiles along the first axis, then those of the second one given the first, at the levels of a golden-ratio
    lattice. Between columns of cells the latter are straight, so that points of like densities are near each other,
    as the middles of cells would not be.

    Args:
        grid: the cells, of two axes.
        density: (*shape).
        count: how many.

    Raises:
        FanalError: the grid does not have two axes, or the density is not that of one.
    """
    if len(grid.edges) != 2 or density.shape != grid.shape or not (density >= 0).all() or not density.any():
        raise FanalError(f"equal parts are of a density >= 0 on two axes, got {density.shape} on {len(grid.edges)}")
    along = (np.arange(count) + 0.5) / count
    across = ((np.arange(count) + 0.5) * (5**0.5 - 1) / 2) % 1
    mass = density * grid.volumes
    first = _quantiles(grid.edges[0], _levels(mass.sum(1)), along)
    held = np.flatnonzero(mass.sum(1) > 0)
    column = np.interp(first, grid.centers[0][held], np.arange(len(held), dtype=np.float64))
    left = column.astype(int)
    right, share = np.minimum(left + 1, len(held) - 1), column - left
    levels = _levels(mass[held])
    low, high = (
        np.array([_quantiles(grid.edges[1], levels[c], u) for c, u in zip(columns, across, strict=True)])
        for columns in (left, right)
    )
    return np.stack([first, (1 - share) * low + share * high], 1)


def _levels(mass: Array) -> Array:
    """A distribution function at the edges of its cells, from 0 to 1 along the last axis."""
    total = np.concatenate([np.zeros_like(mass[..., :1]), np.cumsum(mass, -1)], -1)
    return total / total[..., -1:]


def _quantiles(edges: Array, levels: Array, u: Array | float) -> Array:
    """Where a distribution function reaches u: its cell, and the share of the cell's mass, which is at most 1.

    Not `numpy.interp`: where a density underflows, its slope, width over mass, is infinite.
    """
    cell = np.clip(np.searchsorted(levels, u, "right") - 1, 0, len(edges) - 2)
    mass = levels[cell + 1] - levels[cell]
    share = (u - levels[cell]) / np.where(mass > 0, mass, 1)
    return edges[cell] + np.clip(share, 0, 1) * (edges[cell + 1] - edges[cell])
