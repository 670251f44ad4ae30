"""The reverse equation as it stands, `∂q/∂s = −L*q` ([PDE] eq. 2.3), which no step makes stable: how it grows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import hermite_e
from scipy import sparse
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import expm_multiply

from fanal.errors import FanalError
from fanal.pde.fokker_planck import Drift, generator
from fanal.pde.grid import Array, Grid

__all__ = ["BlowUp", "blow_up", "mode", "mode_rate", "unstable"]

_CELLS = 60  # of the grid on which single modes are watched: the coarser, the longer they are seen
_SPAN = 12.0  # e-foldings of the fastest wave for which they are


@dataclass(frozen=True)
class BlowUp:
    """What the unstable reverse did.

    Attributes:
        times: (T,) since the start.
        densities: (T, *shape).
        growth: (T,) total size of the difference from the density that it should have followed.
        rate: slope of the growth's logarithm where it grows from rounding to the size of the density.
        fastest: largest growth rate of the grid's matrix.
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
        grid: the cells, of one axis.
        drift: of the forward equation.
        density: at the start, (*shape).
        truth: density (cells,) that it should have, as `truth(points, s)`.
        end: the last time, if it is not lost before.
        points: times that are kept.

    Raises:
        FanalError: the grid has several axes.
    """
    if len(grid.edges) != 1:
        raise FanalError(f"the unstable reverse is shown on one axis, got {len(grid.edges)}")
    matrix = unstable(grid, drift)
    fastest = _largest(matrix)
    times = np.linspace(0, min(end, 50 / fastest), points)
    densities = np.asarray(expm_multiply(matrix, density.ravel(), 0.0, times[-1], points))
    wanted = np.stack([truth(grid.centers[0][:, None], float(s)).ravel() for s in times])
    growth = (np.abs(densities - wanted) * grid.widths[0]).sum(1)
    # Below, the error of cells and rounding; from there on, the fastest waves alone.
    grown = growth > 10 * growth[: points // 4].max()
    rate = float(np.polyfit(times[grown], np.log(growth[grown]), 1)[0]) if grown.sum() > 3 else math.nan
    over = np.flatnonzero(growth > 1)
    theory = 4 * float((1 / grid.widths[0] ** 2).max())
    return BlowUp(times, densities, growth, rate, fastest, theory, float(times[over[0]]) if len(over) else None)


def _largest(matrix: sparse.csc_matrix) -> float:
    """The largest eigenvalue of a tridiagonal matrix whose neighbors act on each other with one sign."""
    middle, product = matrix.diagonal(), matrix.diagonal(1) * matrix.diagonal(-1)
    if (product < 0).any():
        return float(np.linalg.eigvals(matrix.toarray()).real.max())
    last = (len(middle) - 1,) * 2
    return float(eigh_tridiagonal(middle, np.sqrt(product), eigvals_only=True, select="i", select_range=last)[0])


def mode(grid: Grid, number: int, process: str) -> tuple[Array, float]:
    """Return a wave that the forward equation only shrinks, in cells, and by which rate.

    For Ornstein–Uhlenbeck the Hermite function `He_n(x)·N(x)`, rate n; for Brownian motion between walls
    `cos(nπ(x − a)/W)`, rate `(nπ/W)²`.

    Args:
        grid: the cells, of one axis.
        number: n.
        process: "ou" or "brownian".
    """
    x, edges = grid.centers[0], grid.edges[0]
    if process == "brownian":
        k = number * math.pi / (edges[-1] - edges[0])
        return np.cos(k * (x - edges[0])), k**2
    series = np.zeros(number + 1)
    series[number] = 1
    return np.asarray(hermite_e.hermeval(x, series) * np.exp(-(x**2) / 2), dtype=np.float64), float(number)


def mode_rate(low: float, high: float, number: int, drift: Drift, process: str, cells: int = _CELLS) -> float:
    """Return the rate at which the unstable reverse makes one wave grow, measured on a coarse grid.

    Args:
        low: left wall; for Ornstein–Uhlenbeck so far out that waves end before it, as −8.
        high: right wall.
        number: of the wave, as `mode` counts.
        drift: of the forward equation.
        process: "ou" or "brownian".
        cells: of the grid.
    """
    grid = Grid.even(low, high, cells)
    wave, _ = mode(grid, number, process)
    matrix = unstable(grid, drift)
    span = _SPAN * float(grid.widths[0].min()) ** 2 / 4
    grown = np.asarray(expm_multiply(matrix * span, wave))
    # A mode is orthogonal to the others with the weight 1/N (1 between walls): the share is read off with it.
    weight = np.ones_like(wave) if process == "brownian" else np.exp(grid.centers[0] ** 2 / 2)
    return math.log(float((grown * wave * weight).sum() / (wave * wave * weight).sum())) / span
