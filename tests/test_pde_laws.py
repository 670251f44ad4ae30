"""Laws to start from and distances: against other closed forms, other libraries, and what symmetry asks for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from fanal import pde
from fanal.errors import FanalError
from fanal.pde.laws import LAWS, averages


@pytest.mark.parametrize(("name", "dimension"), [("two-bumps", 1), ("two-bumps", 2), ("box", 1), ("ring", 2)])
def test_densities_are_those_of_the_draws(name, dimension):
    """20,000 draws at two times, Kolmogorov–Smirnov per axis at level 1e-4: eleven tests fail once in a thousand."""
    own = pde.law(name, dimension)
    grid = own.grid(240)
    for time in (0.05, 0.7):
        p, x = own.cells(grid, time), own.draw(20_000, time, seed=1)
        assert grid.mass(p) == pytest.approx(1, abs=1e-6)
        for axis in range(own.axes):
            others = tuple(k for k in range(own.axes) if k != axis)
            total = np.concatenate([[0], np.cumsum((p * grid.volumes).sum(others))])
            found = stats.kstest(x[:, axis], lambda v, e=grid.edges[axis], t=total: np.interp(v, e, t))
            assert found.pvalue > 1e-4, (time, axis)


def test_draws_are_parts_that_stand_alone():
    """However they are cut into calls, and only distances of a radial law are kept."""
    own = pde.law("shell", 4096)
    assert own.rows == 256
    whole = own.draw(600, 0.3, seed=2)
    assert whole.shape == (600, 1)
    alone = own.part(1, 256, 0.3, 2)
    assert np.array_equal(whole[256:512], alone)
    assert np.array_equal(whole[512:], own.part(2, 88, 0.3, 2))
    assert not np.isin(whole[:256], alone).any()
    assert pde.law("ring").draw(0).shape == (0, 2)
    points = np.linspace(20, 44, 600)[:, None]
    score = pde.score_of_denoiser(own.denoiser, "ou", 4096)
    for ask in (lambda x: own.density(x, 0.3), lambda x: score(x, 0.3)):
        assert np.allclose(ask(points)[250:270], ask(points[250:270]), rtol=1e-9)
    # Noncentral chi at that time: mean and deviation of 600 distances within four standard errors.
    scale = math.exp(-0.3)
    tau = math.sqrt(scale**2 * 0.2**2 + 1 - scale**2)
    mean, var = stats.ncx2.stats(4096, (scale * 32 / tau) ** 2)
    squares = (whole / tau) ** 2
    assert abs(squares.mean() - mean) < 4 * math.sqrt(var / 600)
    assert squares.std() == pytest.approx(math.sqrt(var), rel=4 / math.sqrt(1200))


@pytest.mark.parametrize("dimension", [2, 3, 20, 784])
def test_a_shell_is_noncentral_chi(dimension):
    """`|x|²/τ²` of a sphere with noise τ is noncentral chi-squared: SciPy's law, from another formula."""
    own, time = pde.law("shell", dimension), 0.3
    grid, scale = own.grid(400), math.exp(-0.3)
    tau = math.sqrt(scale**2 * 0.2**2 + 1 - scale**2)
    total = stats.ncx2.cdf((grid.edges[0] / tau) ** 2, dimension, (scale * math.sqrt(dimension) / 2 / tau) ** 2)
    assert pde.tv(grid, own.cells(grid, time), np.diff(total) / grid.widths[0]) < 1e-6


@pytest.mark.parametrize(("name", "dimension"), [("shell", 2), ("shell", 5), ("core-and-halo", 40)])
def test_radial_equations_have_the_closed_form(name, dimension):
    """Forward and back by the distance alone: order 2, a little less on the plane, where the drift 1/r counts most."""
    own, errors, back = pde.law(name, dimension), [], []
    for cells in (100, 200):
        grid = own.grid(cells)
        forward = pde.radial(pde.ornstein_uhlenbeck, dimension)
        times = np.linspace(0.1, 1.0, cells + 1)
        out = pde.evolve(grid, own.cells(grid, 0.1), forward, times, scheme="trapezoid", steady=True)
        errors.append(pde.tv(grid, out[-1], own.cells(grid, 1.0)))
        score = pde.score_of_denoiser(own.denoiser, "ou", dimension)
        drift = pde.radial(pde.reverse(score, 1.0), dimension)
        out = pde.evolve(grid, own.cells(grid, 1.0), drift, 1.0 - times[::-1], scheme="trapezoid")
        back.append(pde.tv(grid, out[-1], own.cells(grid, 0.1)))
    for coarse, fine in (errors, back):
        assert fine < 6e-3
        assert math.log2(coarse / fine) > (1.6 if dimension == 2 else 1.85)


def test_a_radial_law_is_that_of_the_plane():
    """The shell in two dimensions, by distance, against the same circle on a grid of the plane."""
    flat, round_ = pde.law("ring"), pde.law("shell", 2)
    points = np.linspace(0.2, 3.5, 30)[:, None]
    in_plane = np.concatenate([points, np.zeros_like(points)], 1)
    shell = pde.Law("r", flat.denoiser, 3.0, radial=True)
    assert np.allclose(shell.density(points, 0.4), 2 * np.pi * points[:, 0] * flat.density(in_plane, 0.4), rtol=1e-10)
    assert round_.dimension == 2
    assert (round_.axes, flat.axes) == (1, 2)


def test_the_score_of_a_distance():
    """`∂ log ρ/∂r` from the denoiser is the slope of the distance's log density, less (d − 1)/r."""
    own, r, h = pde.law("shell", 6), np.linspace(0.3, 3, 12)[:, None], 1e-5
    slope = (np.log(own.density(r + h, 0.5)) - np.log(own.density(r - h, 0.5))) / (2 * h)
    want = pde.radial_score(lambda x, t: slope[:, None], 6)(r, 0.5)
    assert np.allclose(pde.score_of_denoiser(own.denoiser, "ou", 6)(r, 0.5), want, rtol=1e-6, atol=1e-6)


def test_a_blurred_law_has_its_own_denoiser():
    """Tweedie: `D = x + sigma²·∇log p`, the gradient by central differences."""
    own, h = pde.law("ring").denoiser, 1e-4
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(0.7, dtype=torch.float64)
    moved = [(own.log_density(x + h * e, sigma) - own.log_density(x - h * e, sigma)) / (2 * h) for e in torch.eye(2)]
    assert torch.allclose(own(x, sigma), x + sigma**2 * torch.stack(moved, 1), atol=1e-6)


def test_distances_of_normal_laws():
    """Closed forms of two normal laws."""
    grid = pde.Grid.even(-9, 9, 1800)
    p, q = (averages(grid, lambda x, m=m, s=s: stats.norm.pdf(x[:, 0], m, s)) for m, s in ((0.5, 1.0), (-0.2, 0.7)))
    assert pde.kl(grid, p, q) == pytest.approx(math.log(0.7) + (1 + 0.49) / (2 * 0.49) - 0.5, rel=1e-4)
    assert pde.w2(grid, p, q) == pytest.approx(math.hypot(0.7, 0.3), rel=1e-5)
    same = averages(grid, lambda x: stats.norm.pdf(x[:, 0], -0.2, 1))
    assert pde.tv(grid, p, same) == pytest.approx(2 * stats.norm.cdf(0.35) - 1, rel=1e-4)
    moved = np.roll(p, 150)  # by 1.5 to the right
    assert pde.w2(grid, p, moved) == pytest.approx(1.5, rel=1e-9)
    assert pde.kl(grid, p, np.where(grid.centers[0] < 0, 0, p)) == math.inf
    with pytest.raises(FanalError, match="one or two axes"):
        pde.w2(pde.Grid.even([0] * 3, [1] * 3, [3] * 3), np.ones((3, 3, 3)), np.ones((3, 3, 3)))


def test_averages_are_integrals():
    grid = pde.Grid((np.array([0.0, 0.3, 1.0, 2.5]), np.array([-1.0, 0.5, 1.0])))
    found = averages(grid, lambda x: x[:, 0] ** 2 * np.exp(0.3 * x[:, 1]))
    for i, j in np.ndindex(3, 2):
        (a, b), (c, d) = grid.edges[0][i : i + 2], grid.edges[1][j : j + 2]
        want = integrate.dblquad(lambda y, x: x**2 * math.exp(0.3 * y), a, b, c, d)[0] / ((b - a) * (d - c))
        assert found[i, j] == pytest.approx(want, rel=1e-5)


def test_a_box_has_its_mass_in_cells_of_any_width():
    grid = pde.Grid((np.array([-3.0, -1.2, -0.4, 0.1, 0.9, 1.7, 2.0]),))
    p = pde.law("box").cells(grid)
    assert grid.mass(p) == pytest.approx(1, abs=1e-14)
    assert p == pytest.approx([0, 0.6 / 0.8 * 0.5, 0.5, 0.5, 0.1 / 0.8 * 0.5, 0], abs=1e-14)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: pde.law("two-bump"), "two-bumps"),
        (lambda: pde.law("ring", 3), "2 to 2"),
        (lambda: pde.law("mixture:grid2", 3), "has 2 dimensions"),
        (lambda: pde.law("gaussian:digits8"), "one or two coordinates"),
        (lambda: pde.law("ring").cells(pde.Grid.even(0, 1, 5)), "2 axes"),
        (lambda: pde.score_of_denoiser(pde.law("ring").denoiser)(np.ones((3, 1)), 0.5), "1 coordinates"),
    ],
)
def test_what_is_no_law_is_told(ask, said):
    with pytest.raises(FanalError, match=said):
        ask()


def test_names_are_those_of_the_laws():
    for name, (make, (fewest, _)) in LAWS.items():
        assert make(fewest).name == name
        assert pde.law(name).name == name
