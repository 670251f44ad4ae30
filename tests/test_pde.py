"""Densities against closed forms: laws of Gaussian mixtures, mass, signs, orders, and the reverse equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats

from fanal import pde
from fanal.errors import FanalError
from fanal.exact import Mixture
from fanal.pde import fokker_planck

MEANS, STDS, SHARES = (-1.5, 1.0), (0.4, 0.6), (0.4, 0.6)
T = 1.0


def mixture():
    means = torch.tensor(MEANS, dtype=torch.float64)[:, None]
    return Mixture(means, list(SHARES), std=torch.tensor(STDS, dtype=torch.float64))


def law(x, time):
    """The forward law of the mixture under Ornstein–Uhlenbeck."""
    scale, noise = math.exp(-time), 1 - math.exp(-2 * time)
    parts = zip(MEANS, STDS, SHARES, strict=True)
    return sum(w * stats.norm.pdf(x, scale * m, math.sqrt(scale**2 * s**2 + noise)) for m, s, w in parts)


def cells(n, reach=6.0):
    return pde.Grid.even(-reach, reach, n)


def at(grid, time):
    return law(grid.centers[0], time)


def l1(grid, a, b):
    return float((np.abs(a - b) * grid.volumes).sum())


def forward(n, steps, scheme="trapezoid"):
    grid = cells(n)
    out = pde.evolve(
        grid, at(grid, 0), pde.ornstein_uhlenbeck, np.linspace(0, T, steps + 1), scheme=scheme, steady=True
    )
    return l1(grid, out[-1], at(grid, T))


def test_orders_in_space_and_time():
    space = [forward(n, 400) for n in (40, 80, 160)]
    assert [math.log2(a / b) for a, b in zip(space[:-1], space[1:], strict=True)] == pytest.approx([2, 2], abs=0.15)
    fine = cells(800)
    exact = pde.evolve(
        fine, at(fine, 0), pde.ornstein_uhlenbeck, np.linspace(0, T, 801), scheme="trapezoid", steady=True
    )
    for scheme, order in (("implicit", 1), ("trapezoid", 2)):
        ends = [
            pde.evolve(fine, at(fine, 0), pde.ornstein_uhlenbeck, np.linspace(0, T, n + 1), scheme=scheme, steady=True)
            for n in (20, 40)
        ]
        errors = [l1(fine, end[-1], exact[-1]) for end in ends]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2), scheme


@given(st.integers(3, 40), st.floats(1e-3, 1e3), st.floats(-30, 30), st.floats(0, 3), st.integers(0, 99))
def test_mass_and_sign_are_kept_for_any_step(n, step, pull, diffusion, seed):
    rng = np.random.default_rng(seed)
    grid = pde.Grid((np.cumsum(0.05 + rng.random(n + 1)),))
    density = rng.random(n) * (rng.random(n) > 0.5) + 1e-3
    density /= grid.mass(density)
    matrix = pde.generator(grid, lambda x, t: pull * np.sin(x), diffusion)
    assert np.abs(grid.volumes.ravel() @ matrix).max() <= 1e-12 * np.abs(matrix.data).max(initial=1.0)
    out = pde.evolve(grid, density, lambda x, t: pull * np.sin(x), [0, step, 3 * step], diffusion=diffusion)
    assert out.min() >= 0
    assert [grid.mass(p) for p in out] == pytest.approx([1, 1, 1], abs=1e-12)


def test_a_matrix_that_loses_mass_is_refused(monkeypatch):
    """A decay of 1e-6 in a step: rounding is given back, this is not."""
    grid = pde.Grid.even(-3.0, 3.0, 30)
    density = np.full(30, 1 / 6)
    right = fokker_planck.generator

    def leaky(*args):
        matrix = right(*args)
        return matrix - 1e-6 * sparse.identity(matrix.shape[0], format="csc")

    monkeypatch.setattr(fokker_planck, "generator", leaky)
    with pytest.raises(FanalError, match="of the mass"):
        pde.evolve(grid, density, pde.ornstein_uhlenbeck, [0, 1.0])


@pytest.mark.parametrize(("pull", "place"), [(1.0, 40), (-1.0, 60)])
def test_drift_keeps_its_speed_where_diffusion_is_small(pull, place):
    """A Péclet number of 1e4 on each face: a blob moves by pull·t, to either side, but for the cells' own blur."""
    grid = pde.Grid.even(0.0, 1.0, 100)
    blob = np.zeros(100)
    blob[place] = 100
    (_, end) = pde.evolve(grid, blob, lambda x, t: np.full_like(x, pull), [0, 0.05], diffusion=1e-6)
    moved = float((grid.centers[0] * end * grid.widths[0]).sum()) - float(grid.centers[0][place])
    assert moved == pytest.approx(0.05 * pull, rel=1e-2)


def test_short_steps_of_unlike_size_are_their_own():
    grid, blob = pde.Grid.even(0.0, 1e-3, 50), np.zeros(50)
    blob[25] = 1
    times = [0, 1e-9, 5e-9]
    same, anew = (pde.evolve(grid, blob, pde.brownian, times, steady=steady) for steady in (True, False))
    assert np.allclose(same, anew, rtol=1e-12)


def test_the_normal_law_stands_still():
    """Its neighbors' ratios are exact in the flux of Scharfetter and Gummel, on uneven cells too."""
    rng = np.random.default_rng(1)
    edges = np.concatenate([[-8], np.sort(rng.uniform(-8, 8, 80)), [8]])
    even = cells(60, 8)
    p = stats.norm.pdf(even.centers[0])
    assert l1(even, pde.evolve(even, p, pde.ornstein_uhlenbeck, [0, 50.0], steady=True)[-1], p) < 1e-9
    grid = pde.Grid((edges,))
    end = pde.evolve(grid, np.ones(grid.shape) / 16, pde.ornstein_uhlenbeck, [0, 1e5, 2e5], steady=True)[-1]
    want = np.exp(-np.concatenate([[0], np.cumsum(edges[1:-1] * np.diff(grid.centers[0]))]))
    want /= grid.mass(want)
    assert l1(grid, end, want) < 1e-9


@pytest.mark.parametrize(("make", "diffusion", "limit"), [(pde.reverse, 1.0, 0.02), (pde.reverse_ode, 0.0, 0.06)])
def test_the_reverse_returns_the_forward_curve(make, diffusion, limit):
    """[PDE] eq. 2.7 and 2.8 from ρ(·, T): at s the solution is ρ(·, T − s), with the score of the exact denoiser."""
    grid, early = cells(600), 0.02
    drift = make(pde.score_of_denoiser(mixture()), T)
    times = np.linspace(0, T - early, 400)
    out = pde.evolve(grid, at(grid, T), drift, times, diffusion=diffusion)
    for i in (100, 250, 399):
        assert l1(grid, out[i], at(grid, T - times[i])) < limit


def test_the_stable_reverse_forgets_where_it_began_only_slowly():
    """[PDE] sec. 3: from another law the support is kept, the density is not; the farther T, the less it matters."""
    grid, early = cells(300, 8), 0.05
    score, errors = pde.score_of_denoiser(mixture()), []
    for end in (0.5, 1.0, 2.0):
        wrong = stats.norm.pdf(grid.centers[0], 0, 1)
        out = pde.evolve(grid, wrong, pde.reverse(score, end), np.linspace(0, end - early, 300))
        errors.append(l1(grid, out[-1], at(grid, early)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_score_may_come_from_the_forward_solution():
    grid = cells(400)
    times = np.linspace(0, T, 401)
    densities = pde.evolve(grid, at(grid, 0), pde.ornstein_uhlenbeck, times, scheme="trapezoid", steady=True)
    own, exact = pde.score_of_densities(grid, times, densities), pde.score_of_denoiser(mixture())
    points = np.linspace(-3, 3, 25)[:, None]
    for time in (0.2, 0.5, 1.0):
        assert np.allclose(own(points, time), exact(points, time), atol=0.03)
    back = pde.evolve(grid, densities[-1], pde.reverse(own, T), np.linspace(0, 0.95 * T, 300))
    assert l1(grid, back[-1], at(grid, 0.05 * T)) < 0.03


def test_two_dimensions_are_two_times_one():
    """Independent coordinates: the law is a product at every time."""
    one, two = cells(80), pde.Grid.even([-6, -6], [6, 6], [80, 80])
    times = np.linspace(0, 0.5, 11)
    a = pde.evolve(one, at(one, 0), pde.ornstein_uhlenbeck, times, steady=True)[-1]
    start = np.multiply.outer(at(one, 0), stats.norm.pdf(one.centers[0], 0, 0.7))
    b = pde.evolve(one, stats.norm.pdf(one.centers[0], 0, 0.7), pde.ornstein_uhlenbeck, times, steady=True)[-1]
    both = pde.evolve(two, start, pde.ornstein_uhlenbeck, times, steady=True)[-1]
    assert two.mass(both) == pytest.approx(two.mass(start), abs=1e-12)
    assert l1(two, both, np.multiply.outer(a, b)) < 0.02  # implicit steps split differently, by their own order


def test_anti_diffusion_grows_as_the_theory_says():
    """[PDE] eq. 2.3: a wave of wave number k grows like e^{k² s}, so the finest grows fastest and refining is worse."""
    rates = []
    for n in (50, 100):
        matrix = pde.generator(pde.Grid.even(0, math.pi, n), pde.brownian, -1.0)
        values = np.linalg.eigvals(matrix.toarray()).real
        ordered = np.sort(values)
        assert ordered[:4] == pytest.approx([0, 1, 4, 9], rel=0.02, abs=1e-8)
        rates.append(ordered[-1])
    assert rates[1] / rates[0] == pytest.approx(4, rel=0.01)
    with pytest.raises(FanalError, match="smallest waves"):
        pde.evolve(cells(20), at(cells(20), 0), pde.brownian, [0, 0.1], diffusion=-1.0)


def test_particles_have_the_density():
    """200,000 exact draws of the forward law: Kolmogorov–Smirnov at the 0.1 % level against the PDE's distribution."""
    grid = cells(400)
    out = pde.evolve(grid, at(grid, 0), pde.ornstein_uhlenbeck, np.linspace(0, T, 401), scheme="trapezoid", steady=True)
    rng = np.random.default_rng(0)
    which = rng.random(200_000) < SHARES[0]
    x0 = np.where(which, MEANS[0], MEANS[1]) + np.where(which, STDS[0], STDS[1]) * rng.standard_normal(200_000)
    x = math.exp(-T) * x0 + math.sqrt(1 - math.exp(-2 * T)) * rng.standard_normal(200_000)
    total = np.concatenate([[0], np.cumsum(out[-1] * grid.volumes)])
    assert stats.kstest(x, lambda v: np.interp(v, grid.edges[0], total)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: pde.Grid((np.array([0.0, 1.0]),)), "three or more"),
        (lambda: pde.Grid((np.array([0.0, 2.0, 1.0]),)), "increasing"),
        (lambda: pde.Grid.even([0, 0], 1, 5), "same axes"),
        (lambda: pde.evolve(cells(9), np.ones(8), pde.brownian, [0, 1]), "shape"),
        (lambda: pde.evolve(cells(9), -np.ones(9), pde.brownian, [0, 1]), "negative"),
        (lambda: pde.evolve(cells(9), np.zeros(9), pde.brownian, [0, 1]), "0 everywhere"),
        (lambda: pde.evolve(cells(9), np.ones(9), pde.brownian, [1, 0]), "increasing"),
        (lambda: pde.evolve(cells(9), np.ones(9), pde.brownian, [0, 1], scheme="magic"), "implicit"),
        (lambda: pde.evolve(cells(9), np.ones(9), lambda x, t: x * np.nan, [0, 1]), "finite"),
        (
            lambda: pde.evolve(cells(99), np.eye(1, 99, 50)[0], pde.brownian, [0, 9], scheme="trapezoid"),
            "smaller steps",
        ),
        (lambda: pde.score_of_denoiser(mixture(), "ve"), "ou or brownian"),
        (lambda: pde.score_of_denoiser(mixture())(np.zeros((1, 1)), 0.0), "above 0"),
        (lambda: pde.score_of_densities(cells(9), [0, 1], np.ones((2, 8))), "shape"),
    ],
)
def test_what_cannot_be_solved_is_told(ask, said):
    with pytest.raises(FanalError, match=said):
        ask()
