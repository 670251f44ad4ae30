"""Orders of the solver where the numbered checks do not look: planes, balls, uneven cells, and the reverse equations.

A solution on cells of width h differs from its closed form by about `C·h²`, by `C·h` where nothing diffuses and the
scheme is upwind: halving h must divide the error by 4, or 2. Bounds on the exponent are those of the coarsest pair.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from fanal import pde
from fanal.errors import FanalError
from fanal.pde.laws import averages
from fanal.pde.walls import Walled

T = 0.6


def orders(errors):
    return [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]


def uneven(low, high, count, seed=3):
    """Cells whose widths differ by up to three times at random, halved for each finer grid: grids are nested."""
    rng = np.random.default_rng(seed)
    edges = np.concatenate([[0], np.cumsum(1 + 2 * rng.random(20))])
    edges = low + (high - low) * edges / edges[-1]
    while len(edges) - 1 < count:
        edges = np.sort(np.concatenate([edges, (edges[1:] + edges[:-1]) / 2]))
    return edges


def test_brownian_motion_on_a_plane_between_walls():
    """[PDE] eq. 2.9: `1 + cos(πx/a)·cos(2πy/b)/2` keeps its form and fades at the rate of its wave numbers."""
    a, b, end = 2.0, 3.0, 0.05
    fade = math.exp(-end * math.pi**2 * (1 / a**2 + 4 / b**2))

    def density(points, amplitude):
        wave = np.cos(math.pi * points[:, 0] / a) * np.cos(2 * math.pi * points[:, 1] / b)
        return (1 + amplitude * wave / 2) / (a * b)

    errors = []
    for n in (20, 40, 80):
        grid = pde.Grid((uneven(0, a, n), uneven(0, b, n, seed=4)))
        start = averages(grid, lambda x: density(x, 1.0))
        times = np.linspace(0, end, n // 2 + 1)
        out = pde.evolve(grid, start, pde.brownian, times, scheme="trapezoid", steady=True)[-1]
        errors.append(pde.tv(grid, out, averages(grid, lambda x: density(x, fade))))
    assert orders(errors) == pytest.approx([2, 2], abs=0.25)
    assert errors[-1] < 1e-3


def test_brownian_motion_in_a_ball():
    """[PDE] eq. 2.9 by distance in three dimensions: `1 + c·sin(kr)/r` with `tan kR = kR` has no flux at R."""
    R, end, d = 2.0, 0.1, 3
    k = float(optimize.root_scalar(lambda z: math.tan(z) - z, bracket=(4.4, 4.49999)).root) / R

    def density(r, amplitude):
        return 3 / R**3 * (r[:, 0] ** 2 + 0.3 * amplitude * r[:, 0] * np.sin(k * r[:, 0]))

    errors = []
    for n in (40, 80, 160):
        grid = pde.Grid.even(0.0, R, n)
        drift = pde.radial(pde.brownian, d)
        start = averages(grid, lambda r: density(r, 1.0))
        out = pde.evolve(grid, start, drift, np.linspace(0, end, n + 1), scheme="trapezoid", steady=True)[-1]
        errors.append(pde.tv(grid, out, averages(grid, lambda r: density(r, math.exp(-(k**2) * end)))))
    assert orders(errors) == pytest.approx([2, 2], abs=0.2)


def test_the_stable_reverse_on_a_plane():
    """[PDE] eq. 2.7 from ρ(·, T) back to ρ(·, 0.1)."""
    own, early, errors = pde.law("two-bumps", 2), 0.1, []
    drift = pde.reverse(pde.score_of_denoiser(own.denoiser), T)
    for n in (24, 48):
        grid = own.grid(n, 5.0)
        out = pde.evolve(grid, own.cells(grid, T), drift, np.linspace(0, T - early, n + 1), scheme="trapezoid")
        errors.append(pde.tv(grid, out[-1], own.cells(grid, early)))
    assert orders(errors)[0] == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(("make", "diffusion", "scheme", "order"), [
    (pde.reverse, 1.0, "trapezoid", 2), (pde.reverse, 1.0, "implicit", 1), (pde.reverse_ode, 0.0, "implicit", 1),
])  # fmt: skip
def test_the_reverse_has_the_order_that_tolerances_assume(make, diffusion, scheme, order):
    own, early, errors = pde.law("two-bumps"), 0.1, []
    drift = make(pde.score_of_denoiser(own.denoiser), T)
    for n in (200, 400, 800):
        grid = own.grid(n)
        times = np.linspace(0, T - early, n // 4 + 1)
        out = pde.evolve(grid, own.cells(grid, T), drift, times, diffusion=diffusion, scheme=scheme)
        errors.append(pde.tv(grid, out[-1], own.cells(grid, early)))
    assert orders(errors)[-1] == pytest.approx(order, abs=0.2)


def test_graded_cells_keep_the_order_and_spend_cells_where_they_count():
    """A bump of width 0.02 at 1, on [−8, 8]: graded cells are as exact as ten times as many even ones."""

    def bump(points, time=0.0):
        spread = math.sqrt(0.02**2 * math.exp(-2 * time) - math.expm1(-2 * time))
        return stats.norm.pdf(points[:, 0], math.exp(-time), spread)

    def error(grid, steps=200):
        out = pde.evolve(
            grid, averages(grid, bump), pde.ornstein_uhlenbeck, np.linspace(0, 0.002, steps + 1), scheme="trapezoid",
            steady=True,
        )  # fmt: skip
        return pde.tv(grid, out[-1], averages(grid, lambda x: bump(x, 0.002)))

    def monitor(x):
        return 1 / np.sqrt((x - 1) ** 2 + 0.05**2)

    graded = [error(pde.Grid.graded(-8, 8, n, monitor)) for n in (80, 160)]
    assert orders(graded)[0] == pytest.approx(2, abs=0.3)
    assert error(pde.Grid.even(-8, 8, 800)) > graded[0]
    with pytest.raises(FanalError, match="above 0"):
        pde.Grid.graded(-1, 1, 10, np.zeros_like)


def distribution(grid, density):
    """The distribution function of a solution, linear within cells."""
    total = np.concatenate([[0.0], np.cumsum(density * grid.volumes)])
    return lambda x: np.interp(x, grid.edges[0], total)


def test_independent_particles_agree_on_the_deterministic_reverse():
    """[PDE] eq. 2.8: 20,000 exact draws of ρ(·, T) moved by SciPy's RK45; Kolmogorov–Smirnov at level 1e-3."""
    own, early = pde.law("two-bumps"), 0.1
    drift = pde.reverse_ode(pde.score_of_denoiser(own.denoiser), T)
    x = own.draw(20_000, T, seed=5)[:, 0]
    moved = integrate.solve_ivp(lambda s, y: drift(y[:, None], s)[:, 0], (0, T - early), x, rtol=1e-6, atol=1e-8)
    grid = own.grid(2000)
    times = np.linspace(0, T - early, 401)
    out = pde.evolve(grid, own.cells(grid, T), drift, times, diffusion=0.0)
    assert stats.kstest(moved.y[:, -1], distribution(grid, out[-1])).pvalue > 1e-3


def test_independent_particles_agree_on_the_brownian_reverse_between_walls():
    """[PDE] eq. 2.10: 20,000 particles, 1,000 reflected Euler steps; Kolmogorov–Smirnov at level 1e-3."""
    end, early, reach = 0.3, 0.1, 3.0
    grid = pde.Grid.even(-reach, reach, 600)
    own = Walled(pde.law("two-bumps"), grid)
    drift = pde.reverse(own.score, end, pde.brownian)
    out = pde.evolve(grid, own.cells(grid, end), drift, np.linspace(0, end - early, 401), scheme="trapezoid")
    rng, steps = np.random.default_rng(6), 1000
    edges, total = grid.edges[0], np.cumsum(own.cells(grid, end) * grid.volumes)
    x = np.interp(rng.random(20_000) * total[-1], np.concatenate([[0.0], total]), edges)
    step = (end - early) / steps
    for k in range(steps):
        pull = np.interp(x, edges[::4], drift(edges[::4, None], k * step)[:, 0])
        x = x + step * pull + math.sqrt(2 * step) * rng.standard_normal(len(x))
        x = np.where(x > reach, 2 * reach - x, np.where(x < -reach, -2 * reach - x, x))
    assert stats.kstest(x, distribution(grid, out[-1])).pvalue > 1e-3


@pytest.mark.parametrize("deterministic", [False, True])
def test_scipy_agrees_on_the_reverses(deterministic):
    """BDF of the same cells to 1e-8: the difference is that of the steps, order 2 (2.10) and 1 (2.8)."""
    end, early, reach = 0.3, 0.1, 3.0
    grid = pde.Grid.even(-reach, reach, 60)
    own = Walled(pde.law("two-bumps"), grid)
    make, diffusion, scheme, order = (
        (pde.reverse_ode, 0.0, "implicit", 1) if deterministic else (pde.reverse, 1.0, "trapezoid", 2)
    )
    drift, start = make(own.score, end, pde.brownian), own.cells(grid, end)
    exact = integrate.solve_ivp(
        lambda s, p: pde.generator(grid, drift, diffusion, s) @ p, (0, end - early), start, method="BDF",
        jac=lambda s, p: pde.generator(grid, drift, diffusion, s), rtol=1e-8, atol=1e-10,
    )  # fmt: skip
    errors = [
        pde.tv(grid, pde.evolve(grid, start, drift, np.linspace(0, end - early, n + 1), diffusion=diffusion,
                                scheme=scheme)[-1], exact.y[:, -1])
        for n in (20, 40, 80)
    ]  # fmt: skip
    assert orders(errors)[-1] == pytest.approx(order, abs=0.2)
