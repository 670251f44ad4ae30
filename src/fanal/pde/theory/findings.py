"""One checked statement, and solutions whose own refinement says how wrong they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fanal.errors import FanalError
from fanal.pde.fokker_planck import Drift, evolve
from fanal.pde.grid import Array, Grid
from fanal.pde.laws import Law, noise_of
from fanal.pde.theory.panels import Panel, overlaid

__all__ = [
    "SAFETY",
    "Finding",
    "Refined",
    "differences",
    "halved",
    "point",
    "refined",
    "score_of_law",
    "settled",
    "smooth",
]

SAFETY = 2.0
"""How many times the estimated error of a solution a statement may be off."""

_START = 4  # implicit steps of half the size before the trapezoidal rule, so that a point's short waves die


@dataclass(frozen=True)
class Finding:
    """A statement of [PDE], and how far a solution is from it.

    Attributes:
        number: of its equation.
        says: the statement.
        measured: what the error is an error of.
        error: how far it is from the statement.
        tolerance: how far it may be, from the solution's own discretization or rounding.
        values: other figures that were measured on the way.
        panels: what was compared, as curves.
    """

    number: str
    says: str
    measured: str
    error: float
    tolerance: float
    values: dict[str, float]
    panels: tuple[Panel, ...] = field(default=(), repr=False, compare=False)

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance."""
        return bool(self.error <= self.tolerance)


def score_of_law(law: Law, factor: float = 1.0) -> Callable[[Array, float], Array]:
    """Return the score of a smooth law under Ornstein–Uhlenbeck, by differentiating its log density: at t = 0 too.

    Args:
        law: without edges.
        factor: what it is multiplied with: 1, but for tests that must fail.
    """

    def score(points: Array, time: float) -> Array:
        scale, sigma = noise_of(time)
        x = torch.from_numpy(points / scale).requires_grad_()
        law.denoiser.log_density(x, torch.tensor(sigma, dtype=torch.float64)).sum().backward()
        assert x.grad is not None
        return factor * x.grad.numpy() / scale

    return score


def halved(fine: Array) -> Array:
    """Return the averages of each two neighbors on the last axis."""
    return (fine[..., ::2] + fine[..., 1::2]) / 2


@dataclass(frozen=True, eq=False)
class Refined:
    """A solution beside what it should be, and its own guess of the difference.

    Attributes:
        wanted: (cases, n) what should be found.
        found: (cases, n) the fine solution.
        predicted: (cases, n) its error by Richardson's rule, `(u_2h − u_h)/(2^order − 1)`, of solutions alone.
        size: norm of a difference.
    """

    wanted: Array
    found: Array
    predicted: Array
    size: Callable[[Array], float] = field(repr=False)

    @property
    def error(self) -> float:
        """Size of the difference."""
        return self.size(self.found - self.wanted)

    @property
    def tolerance(self) -> float:
        """`SAFETY` times the size of the error that it predicts."""
        return SAFETY * self.size(self.predicted)

    def panels(
        self, x: Array, names: Sequence[str], axis: str = "x", value: str = "density", points: bool = False
    ) -> tuple[Panel, Panel]:
        """Return solution and closed form over each other, and their difference over the predicted one.

        Args:
            x: (n,) where the values are.
            names: of the cases.
            axis: of x.
            value: what is solved for.
            points: whether they are numbers, drawn as points.
        """
        look, off = "points" if points else "line", self.found - self.wanted
        return (
            Panel(f"{value}, solved", axis, value, overlaid(x, self.wanted, self.found, names, "closed form", look)),
            Panel(
                "solved − closed form",
                axis,
                "difference",
                overlaid(x, self.predicted, off, names, "predicted by refinement", look),
            ),
        )


def refined(solve: Callable[[int], Array], wanted: Array, width: float, count: int, order: int) -> Refined:
    """Return a fine solution, and what may be left of its error by halving cells and steps.

    The tolerance is Richardson's: `SAFETY·‖u_h − u_2h‖/(2^order − 1)`, of solutions alone, without what is wanted; of
    several cases the largest.

    Args:
        solve: averages over `count` cells, (…, cells), with steps in proportion.
        wanted: averages over the coarse cells, (…, count/2).
        width: of a coarse cell.
        count: fine cells, even.
        order: of the scheme.
    """
    coarse, fine = solve(count // 2), halved(solve(count))
    return _refined(wanted, fine, coarse, order, lambda off: float(np.abs(off).sum(-1).max()) * width / 2)


def differences(solve: Callable[[int], Array], wanted: Array, count: int, order: int) -> Refined:
    """Return the same as `refined` for numbers instead of densities, their largest difference as size.

    Args:
        solve: numbers found with so many cells.
        wanted: what they should be.
        count: fine cells.
        order: of the scheme.
    """
    return _refined(wanted, solve(count), solve(count // 2), order, lambda off: float(np.abs(off).max()))


def _refined(wanted: Array, fine: Array, coarse: Array, order: int, size: Callable[[Array], float]) -> Refined:
    wanted, fine, coarse = (np.atleast_2d(each) for each in (wanted, fine, coarse))
    return Refined(wanted, fine, (coarse - fine) / (2**order - 1), size)


def settled(exponents: Array, wanted: float, shrink: float) -> tuple[float, float, float]:
    """Return the last of a row of exponents, its error, and what may be left of it.

    Corrections fall by a factor from one exponent to the next, so that the last two tell what is left:
    `SAFETY·|e_n − e_{n−1}|/(shrink − 1)`.

    Args:
        exponents: (n,) local rates or powers, towards where they hold.
        wanted: in theory.
        shrink: the factor.
    """
    last, left = float(exponents[-1]), abs(float(exponents[-1] - exponents[-2])) / (shrink - 1)
    return last, abs(last - wanted), SAFETY * left


def point(grid: Grid, x: float) -> Array:
    """Return all mass at x, an edge of the grid: half in each of its two cells.

    Raises:
        FanalError: x is no edge between two cells.
    """
    out = np.zeros(grid.shape)
    k = int(np.argmin(np.abs(grid.edges[0] - x)))
    if not np.isclose(grid.edges[0][k], x, rtol=0, atol=1e-9) or not 0 < k < len(out):
        raise FanalError(f"{x} is no edge between two cells of the grid")
    out[k - 1 : k + 1] = 0.5 / grid.widths[0][k - 1 : k + 1]
    return out


def smooth(
    grid: Grid, density: Array, drift: Drift, start: float, stop: float, steps: int, steady: bool = False
) -> Array:
    """Return the density at `stop` by the trapezoidal rule, after some implicit steps of half the size.

    Order 2 also from a point (Rannacher 1984).

    Args:
        grid: the cells.
        density: at `start`.
        drift: b.
        start: first time.
        stop: last time.
        steps: of the trapezoidal rule, if it took all.
        steady: whether the drift does not depend on time.
    """
    times = np.linspace(start, stop, steps + 1)
    first = np.linspace(times[0], times[_START // 2], _START + 1)
    begun = evolve(grid, density, drift, first, steady=steady)[-1]
    return evolve(grid, begun, drift, times[_START // 2 :], scheme="trapezoid", steady=steady)[-1]
