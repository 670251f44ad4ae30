"""Laws on round and flat supports: derivatives, balls against other closed forms, and sets far away."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

import fanal
from fanal import supports
from fanal.errors import FanalError
from fanal.supports.noncentral import inner_share, log_chance
from fanal.supports.truncated import log_moment


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def rounds(d):
    center = normal(d, seed=d) / 3
    return {"sphere": supports.Sphere(center, 1.5), "ball": supports.Ball(center, 1.5)}


@pytest.mark.parametrize("name", ["sphere", "ball"])
@pytest.mark.parametrize("d", [2, 3, 16])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 80.0])
def test_round_laws_have_first_and_second_derivatives(name, d, sigma):
    """Inside, at the center, on the wall and outside; `D = x + sigma²·∇log p` ties prediction and density together."""
    law = rounds(d)[name]
    wall = law.project(law.center + 5 * normal(2, d, seed=1))
    x = torch.cat([law.center[None], law.center + 0.1 * normal(2, d, seed=2), wall, (1 + sigma) * normal(2, d, seed=3)])
    x, level = x.requires_grad_(), t(sigma)[0].requires_grad_()
    (score,) = torch.autograd.grad(law.log_density(x, level).sum(), x)
    assert torch.allclose(x + level**2 * score, law(x, level), rtol=1e-7, atol=1e-9 * (1 + sigma))
    step = 1e-6 * (0.1 + sigma)
    assert torch.autograd.gradcheck(lambda x: law(x, level), x, eps=step, atol=1e-5, rtol=1e-3, fast_mode=True)
    assert torch.autograd.gradcheck(lambda s: law(x, s), level, eps=1e-6 * sigma, atol=1e-5, rtol=1e-3, fast_mode=True)
    way = normal(len(x), d, seed=4)

    def slope(x):
        return torch.autograd.grad((law(x, level) * way).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, x, eps=step, atol=1e-4 / sigma**2 + 1e-7, rtol=1e-3, fast_mode=True)


def test_a_sphere_in_its_center_moves_with_the_state():
    """The posterior's covariance there is that of the sphere, r²/d in every direction: `∂D/∂x = r²/(d·sigma²)`."""
    law, x = supports.Sphere(t(0.2, -0.1, 0.4), 2.0), t([0.2, -0.1, 0.4])
    x.requires_grad_()
    rows = [torch.autograd.grad(law(x, t(0.7)[0])[0, i], x)[0] for i in range(3)]
    assert torch.allclose(torch.cat(rows), 4 / (3 * 0.49) * torch.eye(3, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("order", [0.0, 0.5, 7.0, 1535.0])
def test_moments_of_directions_match_high_precision(order):
    x = t(0.0, 1e-7, 1e-3, 0.3, 5.0, 200.0, 3000.0)
    with mpmath.workdps(40):
        want = [mpmath.log(mpmath.hyp0f1(order + 1, mpmath.mpf(float(v)) ** 2 / 4)) for v in x]
    assert torch.allclose(log_moment(order, x**2), t(*map(float, want)), rtol=1e-7, atol=2e-9)


def chance(k, a, shift):
    """`F_k` and `F_{k+2}/F_k` as the sum of densities `F_k = 2·Σ f_{k+2+2j}`, in 60 digits."""
    a, shift = mpmath.mpf(a), mpmath.mpf(shift)

    def density(m):
        return (a / 2) ** (m / 2 - 1) / mpmath.gamma(m / 2) * mpmath.hyp0f1(m / 2, a * shift / 4)

    terms = [density(mpmath.mpf(k) + 2)]
    while terms[-1] > terms[0] * mpmath.mpf(10) ** -30 or len(terms) < 10:
        terms.append(density(mpmath.mpf(k) + 2 + 2 * len(terms)))
    whole = mpmath.fsum(terms)
    return float(mpmath.log(whole) - (a + shift) / 2), float(mpmath.fsum(terms[1:]) / whole)


@pytest.mark.parametrize("k", [1, 2, 3, 16])
def test_noncentral_chances_match_high_precision_also_where_they_underflow(k):
    """The logarithms go down to −5·10^7, where scipy's distribution function is 0."""
    pairs = [(1.0, 0.5), (4.0, 0.0), (9.0, 9.0), (1.0, 41.0**2), (25.0, 60.0**2), (1e-6, 2500.0), (900.0, 75.0**2),
             (1.0, 1e8)]  # fmt: skip
    with mpmath.workdps(60):
        logs, shares = zip(*(chance(k, a, shift) for a, shift in pairs), strict=True)
    a, shift = (t(*side) for side in zip(*pairs, strict=True))
    assert torch.allclose(log_chance(k, a, shift), t(*logs), rtol=1e-12, atol=1e-13)
    assert torch.allclose(inner_share(k, a, shift), t(*shares), rtol=1e-11, atol=0)


def test_large_balls_look_flat():
    """Around a radius of 10^4 noise levels both formulas agree, deep inside, at the wall and outside."""
    for gap in (-50.0, -2.0, 0.0, 2.0, 4.0, 6.0, 9.0):
        logs, means = [], []
        for bound in (t(0.99999e8), t(1.00001e8)):
            away = bound.sqrt() + gap
            logs.append(log_chance(3, bound, away**2))
            means.append((1 - inner_share(3, bound, away**2)) * away)
        assert torch.allclose(*logs, rtol=1e-6, atol=1e-9)
        assert torch.allclose(*means, rtol=1e-5, atol=1e-9)
    level, x = t(1e-3)[0], torch.cat([t(2e3), 2e3 + t(0.01, 1e3), t(0.0)])[:, None]
    ball, box = supports.Ball(t(0.0), 2e3), supports.Box(t(-2e3), t(2e3))
    assert torch.allclose(ball(x, level), box(x, level), rtol=1e-12)
    assert torch.allclose(ball.log_density(x, level), box.log_density(x, level), rtol=1e-12)


@given(st.floats(-300, 300), st.floats(0.01, 100), st.floats(0.1, 5))
def test_a_ball_on_a_line_is_a_box(x, sigma, radius):
    level, state = t(sigma)[0], t(x)[:, None].requires_grad_()
    ball, box = supports.Ball(t(0.3), radius), supports.Box(t(0.3 - radius), t(0.3 + radius))
    assert torch.allclose(ball(state, level), box(state, level), rtol=1e-9, atol=1e-9)
    assert torch.allclose(ball.log_density(state, level), box.log_density(state, level), rtol=1e-9, atol=1e-9)
    slopes = [torch.autograd.grad(law(state, level).sum(), state)[0] for law in (ball, box)]
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_a_ball_is_what_its_samples_say(d, sigma):
    """Importance sampling over 200,000 uniform points, in and outside: within 5 standard errors."""
    law = rounds(d)["ball"]
    drawn = law.draw(200_000, seed=d)
    assert float(law.distance(drawn).max()) <= 0
    for x in law.center + t(0.2, 1.0, 1.6, 2.4)[:, None] * torch.nn.functional.normalize(normal(4, d, seed=6), dim=1):
        weight = torch.exp(-(x - drawn).square().sum(1) / (2 * sigma**2)) / (2 * math.pi * sigma**2) ** (d / 2)
        density, mean = weight.mean(), (weight[:, None] * drawn).mean(0) / weight.mean()
        error = weight.std() / math.sqrt(len(weight))
        assert abs(float(density - law.log_density(x[None], sigma).exp())) < 5 * float(error)
        errors = (weight[:, None] * (drawn - mean)).std(0) / density / math.sqrt(len(weight))
        assert bool(((law(x[None], t(sigma)[0])[0] - mean).abs() < 5 * errors).all())


def test_samples_of_a_ball_fill_it_and_a_run_ends_in_it():
    law = supports.Ball(torch.zeros(3, dtype=torch.float64), 2.0)
    share = (law.draw(20_000).norm(dim=1) < 1.0).double().mean()
    assert abs(float(share) - 1 / 8) < 5 * math.sqrt(7 / 64 / 20_000)
    end = fanal.sample(
        law, fanal.noise((3,), range(64), 80.0).double(), fanal.schedules.polynomial(60), fanal.solvers.Euler()
    )
    assert float(law.distance(end).max()) < 1e-2


def test_inside_parts_that_overlap_a_union_gives_a_bound():
    parts = [supports.Box(t(-1.0, -1.0), t(0.1, 1.0)), supports.Box(t(-0.1, -1.0), t(1.0, 1.0))]
    union, whole, x = supports.Union(parts), supports.Box(t(-1.0, -1.0), t(1.0, 1.0)), 2 * normal(200, 2, seed=9)
    own, true = union.distance(x), whole.distance(x)
    assert torch.allclose(own[true > 0], true[true > 0], atol=1e-12)
    assert bool((own >= true - 1e-12).all())
    assert bool(((own <= 0) == (true <= 0)).all())
    assert float(union.distance(t([0.0, 0.0]))) == pytest.approx(-0.1)


def sets():
    """Points with classes, and a union of points with a flat and a round law."""
    points = supports.FiniteSet(normal(7, 2, seed=1), torch.tensor([0, 0, 1, 1, 1, 0, 1]))
    flat = supports.Affine(t(0.5, 0.5), t([0.6], [0.8]), t(1.5))
    return points, supports.Union([supports.FiniteSet(normal(4, 2, seed=2)), supports.Ball(t(1.0, 0.0), 0.7), flat])


@pytest.mark.parametrize("sigma", [0.05, 0.7, 80.0])
def test_densities_of_points_have_first_and_second_derivatives(sigma):
    """`D = x + sigma²·∇log p` in float64 and 32; the slopes in x and sigma, theirs, and those of one class's points."""
    points, union = sets()
    x, level = ((0.3 + sigma) * normal(4, 2, seed=3)).requires_grad_(), t(sigma)[0].requires_grad_()
    labels = torch.tensor([0, 1, 2, 1])
    for dtype, tol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        for law in (points, union):
            state = x.detach().to(dtype).requires_grad_()
            (score,) = torch.autograd.grad(law.log_density(state, level).sum(), state)
            assert score.dtype == dtype
            assert torch.allclose(state + level**2 * score, law(state, level), rtol=tol, atol=tol * (1 + sigma))
    sizes = {"eps": 1e-6 * sigma, "rtol": 1e-4}

    def density(x, s):
        return points.log_density(x, s, labels)

    def slopes(x, s):
        return torch.autograd.grad(density(x, s).sum(), (x, s), create_graph=True)

    assert torch.autograd.gradcheck(density, (x, level), atol=1e-5 / sigma, **sizes)
    assert torch.autograd.gradcheck(slopes, (x, level), atol=1e-5 / sigma**2, **sizes)
    levels = level.detach().expand(4).clone().requires_grad_()  # one noise level per sample
    assert torch.autograd.gradcheck(density, (x, levels), atol=1e-5 / sigma, **sizes)


def test_what_has_no_gradient_says_so():
    points, union = sets()
    x = normal(3, 2, seed=5).requires_grad_()
    for ask in (points.entropy, points.posterior, lambda x, s: points.top(x, s, 2)):
        with pytest.raises(FanalError, match="only the denoiser and log_density have gradients"):
            ask(x, 0.5)
    assert torch.equal(points.distance(x), points.distance(x.detach()))
    (slope,) = torch.autograd.grad(union.distance(x).sum(), x)
    assert torch.allclose(slope.norm(dim=1), torch.ones(3, dtype=torch.float64))


def nearest(faces, offsets, x):
    """The nearest point of `A y <= b` by scipy's sequential quadratic programming, in units of the distance."""
    size = x.norm()
    done = minimize(
        lambda y: float(((torch.from_numpy(y) - x / size) ** 2).sum()),
        np.zeros(len(x)),
        jac=lambda y: 2 * (y - (x / size).numpy()),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda y: (offsets / size).numpy() - faces.numpy() @ y,
                     "jac": lambda y: -faces.numpy()},
        options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    return torch.from_numpy(done.x) * size


@pytest.mark.parametrize("far", [2.0, 1e3, 1e6])
@pytest.mark.parametrize("d", [2, 4])
def test_an_oblique_polytope_is_that_of_another_solver(far, d):
    faces = torch.nn.functional.normalize(normal(9, d, seed=d), dim=1)
    offsets = 0.2 + torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    law, x = supports.Polytope(faces, offsets), far * normal(6, d, seed=11)
    near = law.project(x)
    assert float((near @ faces.T - offsets).max()) < 1e-9 * far
    best = torch.stack([nearest(faces, offsets, state) for state in x])
    for own, other, state in zip(near, best, x, strict=True):
        assert float((own - state).norm()) <= float((other - state).norm()) + 1e-7 * far
    assert torch.allclose(near, best, atol=1e-4 * far)
    assert torch.allclose(law.project(near), near, atol=1e-9 * far)


def test_a_polytope_keeps_its_corners_from_any_distance():
    square = supports.Polytope(t([1.0, 0], [-1, 0], [0, 1], [0, -1]), torch.ones(4))
    x = t([1e5, 0.3], [9e5, 0.3], [2e6, 0.3], [1e9, -1e9], [-3e6, 5.0])
    assert torch.allclose(square.project(x), t([1.0, 0.3], [1.0, 0.3], [1.0, 0.3], [1.0, -1.0], [-1.0, 1.0]), atol=1e-9)


@pytest.mark.parametrize("slope", [1e-2, 1e-5, 1e-8])
def test_a_thin_wedge_has_its_tip(slope):
    """Of `|y| <= slope·x` the nearest point is the tip from the left, where both faces are only `slope` away."""
    wedge = supports.Polytope(t([-slope, 1.0], [-slope, -1.0]), t(0.0, 0.0))
    x = t([-1.0, 0.0], [-7e6, 0.0], [3.0, 1.0])
    foot = (3 + slope) / (1 + slope**2)
    near = wedge.project(x)
    assert torch.allclose(near[[0, 2]], t([0.0, 0.0], [foot, slope * foot]), atol=1e-9)
    assert float(near[1].norm()) < 1e-15 * 7e6 / slope  # a digit of x, seen along faces that are nearly parallel
    assert torch.allclose(wedge.distance(x[:2]), t(1.0, 7e6), rtol=1e-9)


def test_sets_far_away_and_thin_ones_are_not_empty():
    slab = supports.Polytope(t([1.0], [-1.0]), t(3e6, -2e6))
    assert torch.allclose(slab.project(t([0.0], [2.5e6], [9e9])), t([2e6], [2.5e6], [3e6]), rtol=1e-9)
    point = supports.Polytope(t([1.0], [-1.0]), t(5.0, -5.0))
    assert torch.allclose(point.project(t([0.0], [9.0])), t([5.0], [5.0]))
    half = supports.Polytope(t([0.0, 1.0]), t(0.0))  # without bounds
    assert torch.allclose(half.project(t([3.0, 2.0])), t([3.0, 0.0]), atol=1e-12)
    for offsets, gap in ((t(2e6, -3e6), "5e\\+05"), (t(1.0, -1.01), "0.005"), (t(1e-9, -2e-9), "5e-10")):
        with pytest.raises(FanalError, match=f"empty.*by {gap}"):
            supports.Polytope(t([1.0], [-1.0]), offsets)


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 20]), st.floats(0.01, 1e6))
def test_round_laws_tend_to_the_projection_and_to_the_mean(seed, d, reach):
    """At small sigma, from any distance, and at large sigma; between them the prediction stays in the ball."""
    x = reach * torch.nn.functional.normalize(normal(4, d, seed=seed), dim=1)
    for law in rounds(d).values():
        state = law.center + x
        # One noise level across a curved or flat wall moves it by about d·sigma at most.
        near = law(state, t(1e-4)[0])
        if isinstance(law, supports.Ball) or reach > 0.1:
            assert torch.allclose(near, law.project(state), atol=5e-3)
        far = law(state, t(1e5 * (1 + reach))[0])
        assert torch.allclose(far, law.center.expand_as(far), atol=1e-6)
        middle = law(state, t(0.3)[0])
        assert float((middle - law.center).norm(dim=1).max()) <= 1.5 * (1 + 1e-12)
