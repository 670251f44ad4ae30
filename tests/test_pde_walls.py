"""Brownian motion between walls: its closed form against a series, against differences, and against the solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from fanal import pde
from fanal.errors import FanalError
from fanal.exact import Mixture


def between(name="two-bumps", dimension=None, cells=200, reach=3.0):
    own = pde.law(name, dimension)
    return pde.Walled(own, own.grid(cells, reach))


@pytest.mark.parametrize("time", [1e-4, 0.02, 0.3, 2.0, 8.0])
def test_a_density_between_walls_is_a_series_of_cosines(time):
    """`1/W + (2/W) Σ c_n cos(nπ(x − a)/W) e^{−(nπ/W)²t}`, its coefficients by SciPy's quadrature of the box's ends."""
    own = pde.law("box")
    walled = pde.Walled(own, pde.Grid((np.array([-1.5, 0.0, 2.0]),)))
    x, low, width = np.linspace(-1.49, 1.99, 40), -1.5, 3.5
    wanted = np.full_like(x, 1 / width)
    for n in range(1, 2000):
        k = n * math.pi / width
        share = (math.sin(k * (1 - low)) - math.sin(k * (-1 - low))) / (2 * k)
        wanted += 2 / width * share * np.cos(k * (x - low)) * math.exp(-(k**2) * time)
    assert np.allclose(walled.density(x[:, None], time), wanted, atol=1e-12)


def test_far_tails_are_those_of_images():
    """A Gaussian near a wall, 20 deviations away, where a density of 1e-88 is a sum of two normal ones."""
    own = pde.Law("one", Mixture(torch.tensor([[2.0]]), std=0.1), 3.0)
    walled, t = pde.Walled(own, pde.Grid.even(-3, 3, 50)), 0.02
    x, std = np.array([-2.5, -1.0, 0.0, 2.9]), math.sqrt(0.01 + 2 * t)
    wanted = stats.norm.pdf(x, 2, std) + stats.norm.pdf(x, 4, std)
    assert wanted[0] < 1e-87
    assert np.allclose(walled.density(x[:, None], t), wanted, rtol=1e-9)
    assert walled.score(x[:1, None], t)[0, 0] == pytest.approx(4.5 / std**2, rel=1e-9)


@pytest.mark.parametrize(("name", "dimension"), [("two-bumps", 1), ("box", 2), ("ring", 2)])
@pytest.mark.parametrize("time", [1e-3, 0.05, 0.5, 4.0])
def test_the_score_is_the_slope_of_the_log_density(name, dimension, time):
    walled, h = between(name, dimension), 1e-5
    points = np.random.default_rng(0).uniform(-1.6, 1.6, (30, walled.law.axes))
    found = walled.score(points, time)
    for axis, step in enumerate(h * np.eye(walled.law.axes)):
        slope = (np.log(walled.density(points + step, time)) - np.log(walled.density(points - step, time))) / (2 * h)
        assert np.allclose(found[:, axis], slope, rtol=2e-5, atol=1e-5)


def test_nothing_is_lost_and_nothing_crosses_a_wall():
    walled = between("two-bumps", 1, reach=2.0)
    for time in (0.01, 0.2, 3.0):
        total = integrate.quad(lambda x, t=time: walled.density(np.array([[x]]), t)[0], -2, 2, limit=200)[0]
        assert total == pytest.approx(1, abs=1e-4)  # 3e-3 of the law lies beyond the walls, and is mirrored twice
        assert walled.score(np.array([[-2.0], [2.0]]), time) == pytest.approx(0, abs=1e-7)


def test_the_solver_converges_to_it_and_so_does_a_score_from_the_solution():
    """Order 2 in space and time forward; the score that is read off the solution comes nearer at that order, too."""
    errors, scores, backs = [], [], []
    for cells in (60, 120, 240):
        walled = between(cells=cells)
        grid, times = walled.grid, np.linspace(0.05, 1.0, cells + 1)
        out = pde.evolve(grid, walled.cells(grid, 0.05), pde.brownian, times, scheme="trapezoid", steady=True)
        errors.append(pde.tv(grid, out[-1], walled.cells(grid, 1.0)))
        read, points = pde.score_of_densities(grid, times, out), np.linspace(-2.5, 2.5, 41)[:, None]
        scores.append(max(np.abs(read(points, t) - walled.score(points, t)).max() for t in (0.2, 0.5, 0.9)))
        drift = pde.reverse(walled.score, 1.0, pde.brownian)
        back = pde.evolve(grid, walled.cells(grid, 1.0), drift, 1.0 - times[::-1], scheme="trapezoid")
        backs.append(pde.tv(grid, back[-1], walled.cells(grid, 0.05)))
    for coarse, middle, fine in (errors, scores, backs):
        assert math.log2(coarse / middle) == pytest.approx(2, abs=0.35)
        assert math.log2(middle / fine) == pytest.approx(2, abs=0.25)


def test_without_walls_near_it_is_the_score_of_the_denoiser():
    walled = between(reach=9.0)
    points = np.linspace(-2, 2, 21)[:, None]
    free = pde.score_of_denoiser(walled.law.denoiser, "brownian")
    assert np.allclose(walled.score(points, 0.3), free(points, 0.3), rtol=1e-9, atol=1e-9)


def test_draws_between_walls():
    """20,000 draws at two times, Kolmogorov–Smirnov at level 1e-3, seeded."""
    walled = between("two-bumps", 1)
    for time in (0.2, 2.0):
        x = walled.part(0, 20_000, time, seed=3)[:, 0]
        assert np.abs(x).max() <= 3
        total = np.concatenate([[0], np.cumsum(walled.cells(walled.grid, time) * walled.grid.widths[0])])
        assert stats.kstest(x, lambda v, t=total: np.interp(v, walled.grid.edges[0], t)).pvalue > 1e-3


def test_walls_are_no_mirrors_of_distances():
    own = pde.law("shell", 3)
    with pytest.raises(FanalError, match="no closed form"):
        pde.Walled(own, own.grid(50))
