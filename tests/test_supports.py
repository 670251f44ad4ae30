"""Exact denoisers on supports against quadrature and Monte Carlo; projections and distances against brute force."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

import fanal
from fanal import supports
from fanal.errors import FanalError
from fanal.supports.truncated import bessel_ratio, log_bessel, log_mass, truncated_mean


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def laws():
    angle = torch.linspace(0, 2 * math.pi, 7, dtype=torch.float64)
    ring = torch.stack([2 * angle.cos(), 2 * angle.sin()], 1)
    box, sphere = supports.Box(t(-1.0, 0.0), t(0.5, 2.0)), supports.Sphere(t(0.3, -0.2), 1.5)
    line, points = supports.Polyline(ring), supports.FiniteSet(normal(6, 2, seed=1))
    flat = supports.Affine(t(0.5, 0.5), t([0.6], [0.8]), t(1.5))
    return {"box": box, "sphere": sphere, "line": line, "points": points, "affine": flat,
            "union": supports.Union([box, sphere, line], [0.5, 0.3, 0.2])}  # fmt: skip


@pytest.mark.parametrize("name", laws())
@pytest.mark.parametrize("sigma", [3.0, 0.4, 0.05])
def test_denoisers_are_tweedies(name, sigma):
    """`D = x + sigma²·∇log p`, with the density that the law itself gives."""
    law, step = laws()[name], 1e-5 * sigma
    x, level = (1 + sigma) * normal(8, 2, seed=3), torch.tensor(sigma, dtype=torch.float64)
    for axis in torch.eye(2, dtype=torch.float64):
        up, down = law.log_density(x + step * axis, level), law.log_density(x - step * axis, level)
        slope = sigma**2 * (up - down) / (2 * step)
        along = ((law(x, level) - x) * axis).sum(1)
        assert torch.allclose(along, slope, rtol=1e-4, atol=1e-6 * (1 + float(x.abs().max()))), axis


@pytest.mark.parametrize("name", ["box", "sphere", "line", "union"])
def test_densities_are_those_of_drawn_samples(name):
    """Monte Carlo over 400,000 draws: within 5 standard errors."""
    law, sigma, x = laws()[name], 0.5, normal(3, 2, seed=5)
    if name == "union":
        drawn = torch.cat(
            [part.draw(int(400_000 * p), seed=k) for k, (part, p) in enumerate(zip(law.parts, law.prior, strict=True))]
        )
    else:
        drawn = law.draw(400_000, seed=2)
    for b in range(3):
        weight = torch.exp(-((x[b] - drawn) ** 2).sum(1) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
        error = float(weight.std()) / math.sqrt(len(weight))
        assert abs(float(weight.mean()) - math.exp(float(law.log_density(x[b : b + 1], sigma)))) < 5 * error


@given(st.floats(-200, 200), st.floats(0.01, 100), st.floats(-3, 3), st.floats(0.01, 4))
def test_truncated_normals_match_high_precision(x, sigma, low, width):
    high = low + width
    with mpmath.workdps(60):
        a, b = (mpmath.mpf(low) - x) / sigma, (mpmath.mpf(high) - x) / sigma
        mass = (mpmath.erfc(a / mpmath.sqrt(2)) - mpmath.erfc(b / mpmath.sqrt(2))) / 2
        if mass < mpmath.mpf(10) ** -45:  # cancelled away even in 60 digits
            a, b = (-b, -a) if a + b < 0 else (a, b)
            mass = (mpmath.erfc(a / mpmath.sqrt(2)) - mpmath.erfc(b / mpmath.sqrt(2))) / 2
        log = float(mpmath.log(mass)) if mass > 0 else None
        if log is not None and log > -90:
            a, b = (mpmath.mpf(low) - x) / sigma, (mpmath.mpf(high) - x) / sigma
            mean = float(x + sigma * (mpmath.npdf(a) - mpmath.npdf(b)) / mass)
            assert float(truncated_mean(t(x), t(sigma), t(low), t(high))) == pytest.approx(
                mean, abs=1e-9 * max(1.0, sigma, abs(x))
            )
            assert float(log_mass(t(x), t(sigma), t(low), t(high))) == pytest.approx(log, rel=1e-8, abs=1e-8)
    inside = float(truncated_mean(t(x), t(sigma), t(low), t(high)))
    assert low <= inside <= high


@pytest.mark.parametrize("order", [1.0, 1.5, 16.0, 500.0, 1536.0])
def test_bessel_functions_match_high_precision(order):
    x = t(1e-6, 0.3, 5.0, 200.0, 3000.0, 50_000.0)
    with mpmath.workdps(40):
        want = [mpmath.besseli(order, float(v)) / mpmath.besseli(order - 1, float(v)) for v in x]
        logs = [mpmath.log(mpmath.besseli(order, float(v))) - float(v) for v in x]
    assert torch.allclose(bessel_ratio(order, x), t(*map(float, want)), rtol=1e-9)
    assert torch.allclose(log_bessel(order, x), t(*map(float, logs)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [1.0, 1.5, 1536.0])
def test_bessel_functions_have_large_arguments(order):
    """A large sphere at a small sigma: r·‖x‖/sigma² is 1e10 for r = 200, sigma = 0.002."""
    x = t(2e9, 1e10, 1e13)
    with mpmath.workdps(40):
        log = lambda order, v: mpmath.log(mpmath.besseli(order, v)) - v  # noqa: E731
        logs = [(log(order, float(v)), log(order - 1, float(v))) for v in x]
    assert torch.allclose(bessel_ratio(order, x), t(*(float(mpmath.exp(a - b)) for a, b in logs)), rtol=1e-12)
    assert torch.allclose(log_bessel(order, x), t(*(float(a) for a, _ in logs)), rtol=1e-9)
    circle, far = supports.Sphere(torch.zeros(2, dtype=torch.float64), 200.0), t(0.0, 201.0)[None]
    assert torch.allclose(circle(far, torch.tensor(0.002)), t(0.0, 200.0)[None])
    assert float(circle.log_density(far, 0.002)) == pytest.approx(-0.5 / 0.002**2, rel=1e-3)


def test_a_sphere_in_many_dimensions():
    """3,072 dimensions, radius √d: against one-dimensional quadrature over the cosine."""
    d, sigma = 3072, 2.0
    law = supports.Sphere(torch.zeros(d, dtype=torch.float64), math.sqrt(d))
    x = (law.draw(2) + sigma * normal(2, d, seed=7)).double()
    got = law(x, torch.tensor(sigma))
    for b in range(2):
        kappa = math.sqrt(d) * float(x[b].norm()) / sigma**2
        log = lambda c, kappa=kappa: kappa * c + (d - 3) / 2 * np.log1p(-(c**2))  # noqa: E731
        grid = np.linspace(-1 + 1e-9, 1 - 1e-9, 400_001)
        weight = np.exp(log(grid) - log(grid).max())
        mean = integrate.simpson(weight * grid, x=grid) / integrate.simpson(weight, x=grid)
        assert float(got[b].norm()) / math.sqrt(d) == pytest.approx(mean, rel=1e-6)


@given(st.integers(0, 10**6))
def test_projections_are_the_nearest_points(seed):
    x = 3 * normal(4, 2, seed=seed)
    for name, law in laws().items():
        near = law.project(x)
        assert float(law.distance(near).max()) < 1e-9, name
        gap = (x - near).norm(dim=1)
        outside = law.distance(x) > 0
        assert torch.allclose(law.distance(x)[outside], gap[outside], atol=1e-9), name
        if name in ("box", "sphere", "line"):
            drawn = law.draw(300, seed=seed)
            assert bool((torch.cdist(x, drawn).amin(1) >= gap - 1e-9).all()), name


def test_sets_without_a_law_measure_distances():
    square = supports.Polytope(t([1.0, 0], [-1, 0], [0, 2], [0, -1]), t(1.0, 1.0, 2.0, 1.0))
    box = supports.Box(t(-1.0, -1.0), t(1.0, 1.0))
    x = 2 * normal(50, 2, seed=8)
    assert torch.allclose(square.project(x), box.project(x), atol=1e-9)
    assert torch.allclose(square.distance(x), box.distance(x), atol=1e-9)
    ball = supports.Ball(t(1.0, 0.0), 2.0)
    assert torch.allclose(ball.distance(t([4.0, 0.0], [1.0, 0.5])), t(1.0, -1.5))
    assert torch.allclose(ball.project(t([5.0, 0.0], [1.0, 0.5])), t([3.0, 0.0], [1.0, 0.5]))
    for each in (square, ball, *laws().values()):
        assert isinstance(each, supports.Support)


@pytest.mark.parametrize("name", ["box", "sphere", "line", "points", "affine", "union"])
def test_exact_runs_end_on_the_support(name):
    law = laws()[name]
    x = fanal.noise((2,), range(40), 80.0).double()
    end = fanal.sample(law, x, fanal.schedules.polynomial(60), fanal.solvers.Euler())
    assert float(law.distance(end).max()) < 1e-2


def test_a_guided_run_on_a_circle_stays_on_it():
    """A circle of which the first arc is wanted, at scale 5: the end lies on the circle."""
    angle = torch.linspace(-math.pi / 3, math.pi / 3, 65, dtype=torch.float64)
    rest = torch.linspace(math.pi / 3, 5 * math.pi / 3, 129, dtype=torch.float64)
    arcs = [supports.Polyline(torch.stack([a.cos(), a.sin()], 1)) for a in (angle, rest)]
    whole = supports.Union(arcs, [1 / 3, 2 / 3])
    guided = fanal.guidance.ClassifierFree(whole.parts[0], whole, 5.0)
    x = fanal.noise((2,), range(64), 80.0).double()
    end = fanal.sample(guided, x, fanal.schedules.polynomial(40), fanal.solvers.Euler())
    assert float(whole.parts[0].distance(end).max()) < 0.02


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: supports.Box(t(1.0), t(0.0)), "corners"),
        (lambda: supports.Sphere(t(0.0, 0.0), 0.0), "radius"),
        (lambda: supports.Sphere(t(0.0), 1.0), "two or more coordinates"),
        (lambda: supports.Polyline(t([0.0, 0.0], [0.0, 0.0])), "equal"),
        (lambda: supports.Polyline(t([0.0, 0.0])), "two or more"),
        (lambda: supports.Ball(t(0.0, 0.0), -1), "positive"),
        (lambda: supports.Polytope(t([1.0], [-1.0]), t(-1.0, -1.0)), "empty"),
        (lambda: supports.Polytope(t([0.0]), t(1.0)), "not zero"),
        (lambda: supports.Union([]), "parts"),
        (lambda: supports.Union([supports.Sphere(t(0.0, 0.0), 1.0)], [0.0]), "positive"),
        (lambda: laws()["box"](t([0.0, 0.0]), torch.tensor(0.0)), "sigma > 0"),
    ],
)
def test_what_is_no_support_is_refused(make, said):
    with pytest.raises(FanalError, match=said):
        make()
