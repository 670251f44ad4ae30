"""The reverse equation as it stands, `∂q/∂s = −L*q` ([PDE] eq. 2.3), which no step makes stable: how it grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import hermite_e
from scipy import sparse, stats
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, eigs, expm_multiply
from scipy.special import eval_genlaguerre

from fanal.errors import FanalError
from fanal.pde.fokker_planck import Drift, generator
from fanal.pde.grid import Array, Grid

__all__ = ["BlowUp", "blow_up", "mode", "mode_rate", "unstable", "waves"]

_CELLS = 60  # of the grid on which single modes are watched: the coarser, the longer they are seen
_WAVES = {1: [(n,) for n in range(1, 6)], 2: [(1, 0), (0, 1), (1, 1), (2, 1), (2, 2)]}  # by axes
_SPAN = 12.0  # e-foldings of the fastest wave for which they are


@dataclass(frozen=True)
class BlowUp:
    """What the unstable reverse did.

    Attributes:
        times: (T,) since the start.
        densities: (T, *shape).
        growth: (T,) total size of the difference from the density that it should have followed.
        rate: slope of the growth's logarithm where it grows from rounding to the size of the density.
        fastest: largest growth rate of the grid's matrix; NaN: not found, as in cells too wide for their drift.
        theory: `4·Σ 1/h²`, the rate of the shortest wave a grid of such cells can hold.
        lost: the first time at which the difference is larger than the density itself; None: not reached.
    """

    times: Array
    densities: Array
    growth: Array
    rate: float
    fastest: float
    theory: float
    lost: float | None


def unstable(grid: Grid, drift: Drift) -> sparse.csc_matrix:
    """Return the matrix of the unstable reverse, `dq/ds = A q`: the forward equation's drift and diffusion, reversed.

    Args:
        grid: the cells.
        drift: of the forward equation, which does not depend on time.
    """
    return generator(grid, lambda x, time: -drift(x, time), -1.0)


def blow_up(
    grid: Grid, drift: Drift, density: Array, truth: Callable[[Array, float], Array], end: float, points: int = 41
) -> BlowUp:
    """Follow the unstable reverse, exactly in time, from a density until rounding has become larger than it.

    Args:
        grid: the cells.
        drift: of the forward equation.
        density: at the start, (*shape).
        truth: density (cells,) that it should have, as `truth(points, s)`.
        end: the last time, if it is not lost before.
        points: times that are kept.
    """
    matrix = unstable(grid, drift)
    fastest, theory = _largest(grid, matrix), _shortest(grid)
    times = np.linspace(0, min(end, 50 / (fastest if fastest > 0 else theory)), points)
    densities = np.asarray(expm_multiply(matrix, density.ravel(), 0.0, times[-1], points))
    wanted = np.stack([truth(grid.points, float(s)).ravel() for s in times])
    growth = (np.abs(densities - wanted) * grid.volumes.ravel()).sum(1)
    # Below, the error of cells and rounding; from there on, the fastest waves alone.
    grown = growth > 10 * growth[: points // 4].max()
    rate = float(np.polyfit(times[grown], np.log(growth[grown]), 1)[0]) if grown.sum() > 3 else math.nan
    over = np.flatnonzero(growth > 1)
    lost = float(times[over[0]]) if len(over) else None
    return BlowUp(times, densities.reshape(points, *grid.shape), growth, rate, fastest, theory, lost)


def _shortest(grid: Grid) -> float:
    """The rate of the shortest wave that the cells can hold: one up, one down, along every axis."""
    return 4 * sum(float((1 / widths**2).max()) for widths in grid.widths)


def _largest(grid: Grid, matrix: sparse.csc_matrix) -> float:
    """The largest growth rate of a matrix; NaN where it was not found, in cells too wide for their drift."""
    middle, product = matrix.diagonal(), matrix.diagonal(1) * matrix.diagonal(-1)
    if len(grid.edges) == 1 and (product >= 0).all():  # tridiagonal, neighbors act on each other with one sign
        last = (len(middle) - 1,) * 2
        return float(eigh_tridiagonal(middle, np.sqrt(product), eigvals_only=True, select="i", select_range=last)[0])
    board = (-1.0) ** np.indices(grid.shape).sum(0).ravel()  # near the fastest wave, and the same in every run
    try:
        found = eigs(matrix, 1, which="LR", v0=board, tol=1e-5, maxiter=2000, return_eigenvectors=False)  # pyright: ignore[reportArgumentType]
    except ArpackNoConvergence:
        return math.nan
    return float(np.real(np.asarray(found)).max())


def mode(grid: Grid, number: int | Sequence[int], process: str, dimension: int | None = None) -> tuple[Array, float]:
    """Return a wave that the forward equation only shrinks, in cells, and by which rate.

    For Ornstein–Uhlenbeck the Hermite function `He_n(x)·N(x)`, rate n; for Brownian motion between walls
    `cos(nπ(x − a)/W)`, rate `(nπ/W)²`. On several axes waves are products, and their rates add. Of the distance from 0
    under Ornstein–Uhlenbeck `L_n(r²/2)·chi(r)` with the Laguerre polynomial of index d/2 − 1, rate 2n.

    Args:
        grid: the cells.
        number: n, one per axis.
        process: "ou" or "brownian".
        dimension: d, where the axis is the distance from 0; None: it is not.

    Raises:
        FanalError: there is not one number per axis, or there are distances that no wave is known for.
    """
    numbers = [int(n) for n in np.atleast_1d(number)]
    if len(numbers) != len(grid.edges):
        raise FanalError(f"a wave has one number per axis, got {len(numbers)} for {len(grid.edges)}")
    if dimension is not None:
        if process != "ou":
            raise FanalError("waves of a distance are those of Ornstein–Uhlenbeck")
        r, (n,) = grid.centers[0], numbers
        return stats.chi.pdf(r, dimension) * eval_genlaguerre(n, dimension / 2 - 1, r**2 / 2), 2.0 * n
    wave, rate = np.ones(()), 0.0
    for x, edges, n in zip(grid.centers, grid.edges, numbers, strict=True):
        if process == "brownian":
            k = n * math.pi / (edges[-1] - edges[0])
            along, own = np.cos(k * (x - edges[0])), k**2
        else:
            along, own = hermite_e.hermeval(x, np.eye(n + 1)[n]) * np.exp(-(x**2) / 2), float(n)
        wave, rate = np.multiply.outer(wave, along), rate + own
    return wave, rate


def mode_rate(
    low: float | Sequence[float],
    high: float | Sequence[float],
    number: int | Sequence[int],
    drift: Drift,
    process: str,
    cells: int = _CELLS,
    dimension: int | None = None,
) -> float:
    """Return the rate at which the unstable reverse makes one wave grow, measured on a coarse grid.

    Args:
        low: left wall, one per axis; for Ornstein–Uhlenbeck so far out that waves end before it, as −8.
        high: right wall.
        number: of the wave, as `mode` counts.
        drift: of the forward equation.
        process: "ou" or "brownian".
        cells: of the grid, per axis.
        dimension: as in `mode`.
    """
    grid = Grid.even(low, high, [cells] * len(np.atleast_1d(low)))
    wave, _ = mode(grid, number, process, dimension)
    # A mode is orthogonal to the others with the weight 1/(wave 0): the share is read off with it.
    ground, _ = mode(grid, [0] * len(grid.edges), process, dimension)
    span = _SPAN / _shortest(grid)
    grown = np.asarray(expm_multiply(unstable(grid, drift) * span, wave.ravel())).reshape(wave.shape)
    return math.log(float((grown * wave / ground).sum() / (wave * wave / ground).sum())) / span


def waves(grid: Grid, drift: Drift, process: str, dimension: int | None = None) -> list[dict[str, Any]]:
    """Return how fast the slowest waves grow: `wave` (its numbers), `theory` and `measured`.

    Args:
        grid: whose box the walls of Brownian motion are; waves of Ornstein–Uhlenbeck are watched where they end.
        drift: of the forward equation.
        process: "ou" or "brownian".
        dimension: as in `mode`; there are none of Brownian motion in a ball.
    """
    axes, out = len(grid.edges), []
    if dimension is not None and process == "brownian":
        return []
    low, high = ([float(axis[end]) for axis in grid.edges] for end in (0, -1))
    if process == "ou":
        middle = math.sqrt(dimension or 0)
        low, high = ([-8.0] * axes, [8.0] * axes) if dimension is None else ([max(0.0, middle - 7)], [middle + 7])
    for number in _WAVES[axes]:
        theory = mode(Grid.even(low, high, [8] * axes), number, process, dimension)[1]
        measured = mode_rate(low, high, number, drift, process, dimension=dimension)
        out.append({"wave": list(number), "theory": theory, "measured": measured})
    return out
