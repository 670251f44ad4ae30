"""[PDE] sec. 2: the reverse equations, their generators, and diffusion between walls."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.interpolate import CubicSpline
from scipy.sparse.linalg import splu

from fanal.pde import equations
from fanal.pde.fokker_planck import Drift, evolve, generator
from fanal.pde.grid import Array, Grid
from fanal.pde.laws import averages, law
from fanal.pde.theory.findings import SAFETY, Finding, Refined, differences, refined, score_of_law
from fanal.pde.theory.panels import Panel, decay, overlaid

__all__ = [
    "deterministic_reverse",
    "reverse_generator",
    "stable_reverse",
    "uniform_equilibrium",
    "walled_forward",
    "walled_reverse",
    "without_walls",
]

CELLS, REACH, END = 240, 6.0, 1.0
_WIDTH = 2.0  # between the walls, which are at 0 and 2
_WAVES = {1: 0.5, 2: -0.3, 3: 0.15}  # amplitudes of a density between them


_ON_THE_WAY = (0.25, 0.6, END)


def _returned(
    make: Callable[..., Drift], diffusion: float, scheme: str, order: int, factor: float
) -> tuple[Refined, tuple[Panel, ...]]:
    """A reverse equation at three times on its way, from the forward density."""
    own = law("two-bumps")
    drift = make(score_of_law(own, factor), END)

    def solve(cells: int) -> Array:
        grid, steps = Grid.even(-REACH, REACH, cells), cells
        moments = np.linspace(0, END, steps + 1)
        found = evolve(grid, own.cells(grid, END), drift, moments, diffusion=diffusion, scheme=scheme)
        return np.stack([found[round(s * steps)] for s in _ON_THE_WAY])

    grid = Grid.even(-REACH, REACH, CELLS // 2)
    wanted = np.stack([own.cells(grid, END - s) for s in _ON_THE_WAY])
    found = refined(solve, wanted, grid.widths[0][0], CELLS, order)
    return found, found.panels(grid.centers[0], [f"s = {s:g}" for s in _ON_THE_WAY])


def stable_reverse(factor: float = 1.0) -> Finding:
    """(2.7), (2.37): from `ρ(·, T*)` the stable reverse passes through `ρ(·, T* − s)`, down to the data.

    Args:
        factor: of the score; 1 but for tests that must fail.
    """
    found, drawn = _returned(equations.reverse, 1.0, "trapezoid", 2, factor)
    says, measured = "from ρ(·, T*), the stable reverse diffusion at s is ρ(·, T* − s)", "largest total variation"
    return Finding("2.7, 2.36, 2.37", says, f"{measured} at s = 0.25, 0.6, 1", found.error, found.tolerance, {}, drawn)


def deterministic_reverse(factor: float = 1.0) -> Finding:
    """(2.8): so does the transport without diffusion; upwind differences are of order 1.

    Args:
        factor: of the score; 1 but for tests that must fail.
    """
    found, drawn = _returned(equations.reverse_ode, 0.0, "implicit", 1, factor)
    says, measured = "so does the equation without diffusion, with one score instead of two", "largest total variation"
    return Finding("2.8", says, f"{measured} at s = 0.25, 0.6, 1", found.error, found.tolerance, {}, drawn)


def reverse_generator(factor: float = 1.0) -> Finding:
    """(2.20)–(2.25), (2.35), prop. 2.1: `E[φ(X_0) | X_t = x]` solves the reverse process's backward equation.

    Args:
        factor: of the score; 1 but for tests that must fail.
    """
    own, t, inner = law("two-bumps"), 0.4, np.linspace(-2, 2, 17)
    drift = equations.reverse(score_of_law(own, factor), END)

    def solve(cells: int) -> Array:
        grid, steps = Grid.even(-REACH, REACH, cells), cells
        times = np.linspace(END - t, END, steps + 1)
        half = t / steps / 2
        eye = sparse.identity(cells, format="csc")
        later = generator(grid, drift, 1.0, END).T
        v = averages(grid, lambda x: np.cos(x[:, 0]))
        for s in times[-2::-1]:
            here = generator(grid, drift, 1.0, float(s)).T
            v = splu(sparse.csc_matrix(eye - half * here)).solve(v + half * (later @ v))
            later = here
        return CubicSpline(grid.centers[0], v)(inner)

    found = differences(solve, _expected_cosine(inner, t), CELLS, 2)
    says = "E[φ(X_0) | X_t = x] solves the backward equation with the generator (x + 2∇log ρ)·∇ + Δ"
    measured, drawn = "largest error for φ = cos, t = 0.4", found.panels(inner, ["solved"], "x", "E cos X_0", True)
    return Finding("2.20–2.25, 2.35", says, measured, found.error, found.tolerance, {}, drawn)


def _expected_cosine(x: Array, t: float) -> Array:
    """`E[cos X_0 | X_t = x]` of two bumps, by the normal laws of its components given x."""
    means, stds, shares = np.array([-1.5, 1.0]), np.array([0.4, 0.6]), np.array([0.4, 0.6])
    a, b = math.exp(-t), 1 - math.exp(-2 * t)
    total = a**2 * stds**2 + b
    joint = shares * np.exp(-((x[:, None] - a * means) ** 2) / (2 * total)) / np.sqrt(total)
    weights = joint / joint.sum(1, keepdims=True)
    center = means + a * stds**2 / total * (x[:, None] - a * means)
    return (weights * np.exp(-(stds**2) * b / total / 2) * np.cos(center)).sum(1)


def _walled(points: Array, time: float) -> Array:
    """A density between two walls that let nothing through, a sum of cosines at every time."""
    x, out = points[:, 0], np.full(len(points), 1 / _WIDTH)
    for n, amplitude in _WAVES.items():
        k = n * math.pi / _WIDTH
        out = out + amplitude / _WIDTH * math.exp(-(k**2) * time) * np.cos(k * x)
    return out


def _walled_score(factor: float) -> equations.Score:
    def score(points: Array, time: float) -> Array:
        slope = np.zeros(len(points))
        for n, amplitude in _WAVES.items():
            k = n * math.pi / _WIDTH
            slope -= k * amplitude / _WIDTH * math.exp(-(k**2) * time) * np.sin(k * points[:, 0])
        return (factor * slope / _walled(points, time))[:, None]

    return score


def _between(cells: int) -> Grid:
    return Grid.even(0.0, _WIDTH, cells)


def _walled_cells(grid: Grid, time: float) -> Array:
    return averages(grid, lambda x: _walled(x, time))


def walled_forward() -> Finding:
    """(2.9) on a bounded domain: a density of cosines stays one, each wave shrinking at `(nπ/W)²`."""
    times = (0.04, 0.1, 0.2)

    def solve(cells: int) -> Array:
        grid, steps = _between(cells), cells // 2
        moments = np.linspace(0, times[-1], steps + 1)
        found = evolve(grid, _walled_cells(grid, 0), equations.brownian, moments, scheme="trapezoid", steady=True)
        return np.stack([found[round(t / times[-1] * steps)] for t in times])

    grid = _between(100)
    found = refined(solve, np.stack([_walled_cells(grid, t) for t in times]), _WIDTH / 100, 200, 2)
    says = "between walls without flux, Brownian motion's density is a sum of shrinking cosines"
    measured, drawn = (
        "largest total variation at t = 0.04, 0.1, 0.2",
        found.panels(grid.centers[0], [f"t = {t:g}" for t in times]),
    )
    return Finding("2.9", says, measured, found.error, found.tolerance, {}, drawn)


def uniform_equilibrium() -> Finding:
    """(2.9): between walls the density tends to the uniform one, at the rate of the longest wave, `(π/W)²`."""
    theory, moments = (math.pi / _WIDTH) ** 2, np.linspace(0, 2, 11)

    def sizes(cells: int) -> Array:
        grid, steps = _between(cells), 5 * cells
        times = np.linspace(0, moments[-1], steps + 1)
        found = evolve(grid, _walled_cells(grid, 0), equations.brownian, times, scheme="trapezoid", steady=True)
        return np.abs(found[:: steps // 10] - 1 / _WIDTH).sum(1) * grid.widths[0][0] / 2

    known: dict[int, Array] = {cells: sizes(cells) for cells in (100, 200)}

    def solve(cells: int) -> Array:
        return np.array([math.log(known[cells][-3] / known[cells][-1]) / 0.4])

    found = differences(solve, np.array([theory]), 200, 2)
    # The second wave is still there: it shrinks by e^{−3(π/W)²t} against the first.
    more = SAFETY * abs(_WAVES[2] / _WAVES[1]) * math.exp(-3 * theory * 1.6) * 3 * theory
    says = "between walls the density tends to the uniform one at rate (π/W)²"
    values = {"rate": float(found.found[0, 0]), "theory": theory}
    drawn = decay(moments, {"from the uniform law": known[200]}, {"from the uniform law": theory}, "t", "TV")
    return Finding("2.9", says, "error of the rate", found.error, found.tolerance + more, values, drawn)


def walled_reverse(factor: float = 1.0) -> Finding:
    """(2.10): the reverse of Brownian motion between walls returns the density to its start.

    Args:
        factor: of the score; 1 but for tests that must fail.
    """
    end, moments = 0.2, (0.1, 0.16, 0.2)
    drift = equations.reverse(_walled_score(factor), end, equations.brownian)

    def solve(cells: int) -> Array:
        grid, steps = _between(cells), cells // 2
        times = np.linspace(0, end, steps + 1)
        found = evolve(grid, _walled_cells(grid, end), drift, times, scheme="trapezoid")
        return np.stack([found[round(s / end * steps)] for s in moments])

    grid = _between(100)
    found = refined(solve, np.stack([_walled_cells(grid, end - s) for s in moments]), _WIDTH / 100, 200, 2)
    says = "its reverse, with drift 2∇log ρ and the same walls, returns to the start"
    measured = "largest total variation at s = 0.1, 0.16 and T* = 0.2"
    drawn = found.panels(grid.centers[0], [f"s = {s:g}" for s in moments])
    return Finding("2.10", says, measured, found.error, found.tolerance, {}, drawn)


def without_walls() -> Finding:
    """Sec. 2.1.2: without walls Brownian motion's density tends to 0: its largest value falls as `t^{−1/2}`."""
    start, times = 0.5, np.array([1.6, 3.2, 4.0, 8.0, 16.0])

    def solve(cells: int) -> Array:
        grid = Grid.even(-40.0, 40.0, cells)
        begin = averages(grid, lambda x: np.exp(-(x[:, 0] ** 2) / (4 * start)) / math.sqrt(4 * math.pi * start))
        moments = np.linspace(0, times[-1], cells // 4 + 1)
        found = evolve(grid, begin, equations.brownian, moments, scheme="trapezoid", steady=True)
        tops = [found[round(t / times[-1] * (cells // 4))].max() for t in times]
        return np.array([*tops, math.log(tops[2] / tops[4]) / math.log((times[4] + start) / (times[2] + start))])

    wanted = np.array([*(1 / np.sqrt(4 * math.pi * (times + start))), 0.5])
    found = differences(solve, wanted, 800, 2)
    says = "without walls the density tends to 0, its largest value as t^(−1/2)"
    tops, closed = found.found[0, :-1], wanted[:-1]
    drawn = (
        Panel(
            "largest value", "t", "density", overlaid(times, closed, tops, ["solved"], "closed form", "points"), "xy"
        ),
        decay(times + start, {"": tops}, {"": -0.5}, "t + 0.5", "largest value", power=True)[1],
    )
    measured = "error of five largest values and of the power"
    return Finding("2.9", says, measured, found.error, found.tolerance, {"power": float(found.found[0, -1])}, drawn)
