"""What holds of every support: projections, distances, the limits of denoisers, and parts that make up the whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fanal
from fanal import supports
from fanal.supports import TARGETS, target
from fanal.supports.forms import exact, guided
from fanal.supports.targets import chain
from fanal.supports.truncated import bessel_ratio, log_bessel

SEEDS = st.integers(0, 10**6)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def corners_of(seed, count=5):
    return 2 * torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def laws(seed):
    """One law of each kind with its mean, and a union of some."""
    box, sphere = supports.Box(t(-1.0, 0.0), t(0.5, 2.0)), supports.Sphere(t(0.3, -0.2), 1.5)
    line, points = supports.Polyline(corners_of(seed)), supports.FiniteSet(normal(6, 2, seed=seed))
    middle = ((line.corners[:-1] + line.corners[1:]) / 2 * (line.lengths / line.lengths.sum())[:, None]).sum(0)
    flat = supports.Affine(t(0.5, 0.5), t([0.6], [0.8]), t(1.5))
    means = [t(-0.25, 1.0), sphere.center, middle]
    union = supports.Union([box, sphere, line], [0.5, 0.3, 0.2])
    mixed = sum((share * mean for share, mean in zip((0.5, 0.3, 0.2), means, strict=True)), t(0.0, 0.0))
    return {
        "box": (box, means[0]), "sphere": (sphere, means[1]), "line": (line, middle),
        "points": (points, normal(6, 2, seed=seed).mean(0)), "affine": (flat, t(0.5, 0.5)), "union": (union, mixed),
    }  # fmt: skip


def every(seed):
    """The laws, and the sets without one."""
    turned = normal(7, 2, seed=seed)
    bounded = torch.cat([turned, t([1.0, 0], [-1, 0], [0, 1], [0, -1])])
    polytope = supports.Polytope(bounded, torch.cat([turned.norm(dim=1), torch.ones(4)]))
    own = {name: law for name, (law, _) in laws(seed).items()}
    return own | {"ball": supports.Ball(t(0.2, -0.4), 0.7), "polytope": polytope}


@given(SEEDS)
def test_projections_are_idempotent_and_distances_lipschitz(seed):
    x, y = 3 * normal(6, 2, seed=seed), 3 * normal(6, 2, seed=seed + 1)
    y[3:] = x[3:] + 0.01 * y[3:]  # close by, where a jump would show
    for name, law in every(seed).items():
        near = law.project(x)
        assert torch.allclose(law.project(near), near, atol=1e-9), name
        steps = (law.distance(x) - law.distance(y)).abs()
        assert bool((steps <= (x - y).norm(dim=1) + 1e-9).all()), name


def nearly_nearest(law, x, sigma):
    """How far from the projection the drawn points lie that are nearly as near: `|x − y|² <= d² + 2·sigma²·20`."""
    drawn = (
        law.points.rows(torch.arange(len(law)), x.device, torch.float64) if hasattr(law, "points") else law.draw(4000)
    )
    near = law.project(x)
    gap = torch.cdist(x, drawn.reshape(-1, 2)).square() - (x - near).square().sum(1, keepdim=True)
    reach = torch.cdist(near, drawn.reshape(-1, 2))
    return torch.where(gap <= 40 * sigma**2, reach, 0.0).amax(1)


@given(SEEDS)
def test_denoisers_tend_to_the_projection_and_to_the_mean(seed):
    """At small sigma all but e^-20 of the posterior is on points that are nearly nearest; at large sigma, on all alike.

    Between drawn points there are gaps, of 0.02 in the box and less on curves: 0.1 is five of them.
    """
    x, sigma, decided = 2 * normal(8, 2, seed=seed), 1e-3, 0
    for name, (law, mean) in laws(seed).items():
        if name not in ("affine", "union"):
            reach = nearly_nearest(law, x, sigma)
            assert bool(((law(x, t(sigma)[0]) - law.project(x)).norm(dim=1) <= reach + 0.1).all()), name
            decided += int((reach < 0.2).sum())
        far = law(x, t(1e4)[0])
        # the covariance is below 3², so D moves from the mean by at most that times |x − mean|/sigma², to first order
        assert float((far - mean).norm(dim=1).max()) < 2 * 9 * (float(x.norm(dim=1).max()) + 3) / 1e8, name
    assert decided >= 16  # half of the points have one nearest point, so that it is no empty statement


def parted(seed):
    """Laws with their classes, each with its share."""
    corners = corners_of(seed, 7)
    whole = supports.Polyline(corners)
    pieces = [supports.Polyline(corners[a : b + 1]) for a, b in ((0, 2), (2, 3), (3, 6))]
    yield whole, pieces, [float(piece.lengths.sum() / whole.lengths.sum()) for piece in pieces]
    low, cut, high = t(-1.0, -1.0), t(0.3, 1.0), t(1.0, 1.0)
    halves = [supports.Box(low, cut), supports.Box(t(0.3, -1.0), high)]
    yield supports.Box(low, high), halves, [0.65, 0.35]
    points = normal(9, 2, seed=seed)
    yield supports.FiniteSet(points), [supports.FiniteSet(points[:4]), supports.FiniteSet(points[4:])], [4 / 9, 5 / 9]
    spheres = [supports.Sphere(t(1.0, 0.0), 0.7), supports.Sphere(t(-1.0, 0.5), 0.4)]
    yield supports.Union(spheres, [0.2, 0.8]), spheres, [0.2, 0.8]


@given(SEEDS, st.sampled_from([0.01, 0.1, 1.0, 80.0]))
def test_the_parts_of_a_condition_sum_to_the_whole_posterior(seed, sigma):
    """`p = Σ π_k p_k` and `D = Σ w_k D_k` with `w_k = π_k p_k/p`: classes partition the support."""
    level, x = t(sigma)[0], (1 + sigma) * normal(5, 2, seed=seed)
    for whole, parts, shares in parted(seed):
        logs = torch.stack([part.log_density(x, level) for part in parts]) + t(*shares).log()[:, None]
        assert torch.allclose(torch.logsumexp(logs, 0), whole.log_density(x, level), rtol=1e-9, atol=1e-8)
        means = torch.stack([part(x, level) for part in parts])
        summed = (torch.softmax(logs, 0)[:, :, None] * means).sum(0)
        assert torch.allclose(summed, whole(x, level), rtol=1e-7, atol=1e-7)


@given(SEEDS)
def test_the_size_of_a_target_is_the_spread_of_its_samples(seed):
    """Root mean square distance from the mean, of 20,000 draws: within 5 standard errors."""
    for goal in (target("circle"), target("square"), chain("chain", corners_of(seed), 1, 2, "")):
        assert isinstance(goal.whole, supports.Box | supports.Polyline)
        drawn = goal.whole.draw(20_000, seed)
        squares = (drawn - drawn.mean(0)).square().sum(1)
        error = float(squares.std()) / math.sqrt(len(squares))
        assert abs(float(squares.mean()) - goal.size**2) < 5 * error, goal.name


def test_a_polytope_is_as_exact_from_far_away():
    """Ends of runs that blew up lie a million sizes away and more: the nearest corner is still the corner."""
    square = supports.Polytope(t([1.0, 0], [-1, 0], [0, 1], [0, -1]), torch.ones(4))
    box = supports.Box(t(-1.0, -1.0), t(1.0, 1.0))
    for far in (1e3, 1e6, 1e8):
        x = far * normal(12, 2, seed=4)
        assert torch.allclose(square.project(x), box.project(x), atol=1e-13 * far + 1e-9)
        assert torch.allclose(square.distance(x), box.distance(x), rtol=1e-12)


@pytest.mark.parametrize("order", [1.0, 1.5, 8.0, 500.0])
def test_bessel_functions_have_the_derivatives_that_differences_give(order):
    x = t(0.3, 5.0, 200.0, 3000.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bessel_ratio(order, x), x, eps=1e-5, atol=1e-8, rtol=1e-4)
    assert torch.autograd.gradcheck(lambda x: log_bessel(order, x), x, eps=1e-5, atol=1e-6, rtol=1e-4)
    zero = t(0.0).requires_grad_()
    (slope,) = torch.autograd.grad(bessel_ratio(order, zero).sum(), zero)
    assert float(slope) == pytest.approx(1 / (2 * order))


@pytest.mark.parametrize("d", [2, 3, 16])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 80.0])
def test_a_sphere_can_be_differentiated(d, sigma):
    law, level = supports.Sphere(torch.full((d,), 0.1, dtype=torch.float64), 1.5), t(sigma)[0]
    x = (1 + sigma) * normal(5, d, seed=d)
    point = x.clone().requires_grad_()
    (own,) = torch.autograd.grad(law.log_density(point, level).sum(), point)
    assert torch.allclose(x + level**2 * own, law(x, level), rtol=1e-6, atol=1e-8 * (1 + sigma))  # Tweedie
    assert torch.autograd.gradcheck(lambda x: law(x, level), point, eps=1e-6 * (1 + sigma), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["reward", "inverse", "classifier"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_target_can_be_guided_by_gradients(form, name):
    """Towards the condition; the exact classifier is classifier-free guidance."""
    goal = target(name)
    x, level = fanal.noise(goal.shape, range(6), 1.5, dtype=torch.float64), t(1.0)[0]
    led, plain = guided(form, goal, exact(goal), 2.0)(x, level), goal.whole(x, level)
    ahead = ((led - plain).flatten(1) @ goal.way.flatten()).mean()
    assert float(ahead) > 0.01  # towards the condition
    if form == "classifier":
        free = guided("classifier-free", goal, exact(goal), 2.0)(x, level)
        assert torch.allclose(led, free, atol=1e-7)


def test_projections_stay_on_the_device_of_their_points():
    x = torch.empty(3, 2, device="meta")
    for name, law in every(1).items():
        if name not in ("points", "polytope"):  # those go through tables of points and through scipy
            assert law.project(x).device.type == "meta", name
            assert law.distance(x).device.type == "meta", name
