"""Diffusion sampling as a continuation method: the two theorems and the algorithms of [RODS], on mixtures."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal import schedules
from fanal.errors import FanalError
from fanal.exact import Mixture
from fanal.hallucination.continuation import (
    Descent,
    Proximal,
    continuation,
    modes,
    offset,
    proximal,
    relaxed,
    step_length,
)
from fanal.sampling import Span, sample
from fanal.solvers import Euler
from problems import mixture, observed_order, reference, start

F64 = torch.float64


def law(d=2, s=0.3):
    return Mixture(fanal.noise((d,), range(1000, 1005), 1.0, dtype=F64), [0.3, 0.25, 0.2, 0.15, 0.1], std=s)


def pair(a, s=0.3):
    """Two equal components at ±a."""
    return Mixture(torch.tensor([[a, 0.0], [-a, 0.0]], dtype=F64), std=s)


@pytest.mark.parametrize("d", [1, 2, 5, 48])
@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.7, 20.0])
def test_theorem_one_holds_in_any_dimension_with_half_d_for_the_papers_half(d, sigma):
    p, x = law(d), fanal.noise((d,), range(7), 2.0, dtype=F64)
    exact = -p.log_density(x, torch.tensor(sigma, dtype=F64))
    found = relaxed(p, x, sigma)
    torch.testing.assert_close(found + offset(p, sigma), exact, rtol=1e-11, atol=1e-10)
    printed = -0.5 * math.log(0.3**2 / (0.3**2 + sigma**2))
    assert offset(p, sigma) == pytest.approx(d * printed)  # the printed constant is that of d = 1
    if sigma == 0:
        torch.testing.assert_close(found, exact)


def test_theorem_one_says_what_it_needs():
    with pytest.raises(FanalError, match="share one std"):
        relaxed(mixture(), start(mixture()), 1.0)
    with pytest.raises(FanalError, match="share one std"):
        offset(Mixture(torch.zeros(1, 2), cov=[torch.eye(2)]), 1.0)


def span(sigma, after):
    return Span(0, 2, torch.tensor(sigma, dtype=F64), torch.tensor(after, dtype=F64))


@pytest.mark.parametrize("D", [mixture(), law(48)])
def test_a_gradient_step_is_an_euler_step(D):
    grid = schedules.polynomial(12)
    x = start(D, 4, 80.0)
    torch.testing.assert_close(sample(D, x, grid, Descent()), sample(D, x, grid, Euler()), rtol=1e-9, atol=1e-9)
    # and its gradient is that of −log p
    y, one = start(D, 4, 2.0), span(2.0, 1.5)
    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-D.log_density(leaf, one.sigma).sum(), leaf)
    torch.testing.assert_close(Descent().step(D, y, one).x_next, y - 2.0 * 0.5 * gradient, rtol=1e-10, atol=1e-10)


def test_a_proximal_step_solves_its_subproblem_and_nothing_nearby_is_better():
    D, x, one = mixture(), start(mixture(), 5, 1.5), span(1.0, 0.5)
    length = float(step_length(one.sigma, one.sigma_next))
    y = proximal(D, x, one.sigma, length)
    torch.testing.assert_close(y, x - length * (y - D(y, one.sigma)) / one.sigma**2, rtol=1e-9, atol=1e-9)
    line = torch.linspace(-3, 3, 241, dtype=F64)
    for point, end in zip(x, y, strict=True):
        around = end + torch.cartesian_prod(line, line)

        def value(z, point=point):
            return -D.log_density(z, one.sigma) + ((z - point) ** 2).sum(1) / (2 * length)

        assert float(value(end[None])) <= float(value(around).min()) + 1e-12


@pytest.mark.parametrize("D", [mixture(), law(48)])
def test_theorem_two_euler_and_proximal_steps_agree_to_first_order(D):
    sigma = 1.0
    x, gaps = D.draw(4, seed=3) + fanal.noise(D.shape, range(10, 14), sigma, dtype=F64), []
    for share in (2e-3, 1e-3, 5e-4):
        one = span(sigma, sigma * (1 - share))
        gaps.append(float((Proximal().step(D, x, one).x_next - Euler().step(D, x, one).x_next).norm()))
    for wide, narrow in zip(gaps, gaps[1:], strict=False):
        assert wide / narrow == pytest.approx(4, rel=0.05)  # what they differ by is of second order


def test_sampling_by_proximal_steps_converges_to_the_same_path_with_order_one():
    D, x, steps = mixture(), start(mixture(), 4, 3.0), [24, 48, 96]
    truth = reference(D, x, 3.0, 0.3)
    errors = [
        float((sample(D, x, torch.linspace(3.0, 0.3, n + 1, dtype=F64), Proximal()) - truth).norm()) for n in steps
    ]
    assert observed_order(steps, errors) == pytest.approx(1, abs=0.15)
    ends = sample(D, start(D), schedules.polynomial(40), Proximal())  # into sigma = 0 as any other solver
    assert float((ends - D(ends, torch.tensor(0.002, dtype=F64))).norm()) < 1e-3


def test_a_proximal_step_that_does_not_settle_is_told():
    def steep(x, sigma):
        return -3 * x

    with pytest.raises(FanalError, match="did not settle in 50 iterations"):
        proximal(steep, torch.ones(2, 2, dtype=F64), torch.tensor(1.0), 1.0, most=50)


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_two_components_have_two_modes_while_they_are_apart_by_more_than_two_spreads(a):
    critical = math.sqrt(a**2 - 0.3**2)  # a > sqrt(s² + t²)
    for sigma, count in ((0.0, 2), (0.98 * critical, 2), (1.02 * critical, 1), (10.0, 1)):
        assert len(modes(pair(a), sigma)) == count
    assert modes(pair(a), 10.0)[0].norm() < 1e-4


def test_modes_merge_as_the_noise_grows():
    p = law(s=0.15)
    counts = [len(modes(p, sigma)) for sigma in (0.0, 0.3, 0.6, 1.2, 5.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 5
    assert counts[-1] == 1
    mean = p.prior @ p.means
    assert float((modes(p, 200.0)[0] - mean).norm()) < 1e-3  # eq. 10: at t = ∞ the one mode is the mean
    for end in modes(p, 0.3):
        assert float((end - p(end[None], torch.tensor(0.3))[0]).norm()) < 1e-6  # the gradient of log p is (D − x)/t²


def test_the_continuation_method_leads_every_start_to_one_mode_and_sampling_to_all():
    p = law(s=0.2)
    starts = fanal.noise((2,), range(6), 5.0, dtype=F64)

    def smoothed(y, level):
        return -p.log_density(y, torch.tensor(level, dtype=F64))

    path = continuation(smoothed, starts, 10.0, decay=0.6, least=0.05)
    assert path.shape == (len(path), 6, 2)
    ends = path[-1]
    assert float((ends - ends[0]).norm(dim=1).max()) < 1e-5  # one minimum at first: the starts are forgotten
    assert min(float((ends[0] - mode).norm()) for mode in modes(p, 0.0)) < 1e-5
    for level, points in zip((10.0, 6.0, 3.6), path[1:], strict=False):
        best = modes(p, level)
        assert len(best) == 1
        assert float((points - best).norm(dim=1).max()) < 1e-4
    # algorithm 1 takes one step per level instead of minimizing, and so ends in every mode, as often as it should
    x = fanal.noise((2,), range(600), 80.0, dtype=F64)
    samples = sample(p, x, schedules.polynomial(40), Euler())
    found = torch.bincount(p.nearest(samples)[1][:, 0], minlength=5) / 600
    truth = torch.bincount(p.nearest(p.draw(40_000))[1][:, 0], minlength=5) / 40_000
    assert float((found - truth).abs().max()) < 0.08  # four standard errors of a share of 0.3


def test_a_vanishing_penalty_is_the_papers_algorithm_three():
    p = law(s=0.2)
    near = torch.tensor([0.5, -0.5], dtype=F64)

    def penalized(y, weight):
        return -p.log_density(y, torch.zeros(())) + weight * ((y - near) ** 2).sum(1)

    path = continuation(penalized, fanal.noise((2,), range(3), 5.0, dtype=F64), 1000.0, decay=0.3, least=1e-4)
    assert float((path[1] - near).norm(dim=1).max()) < 0.05  # a strong penalty decides alone
    assert float((path[-1] - path[-1][0]).norm(dim=1).max()) < 1e-5
    assert min(float((path[-1][0] - mode).norm()) for mode in modes(p, 0.0)) < 1e-5
    for bad in ({"decay": 1.0}, {"decay": 0.0}, {"least": 0.0}, {"least": 2000.0}):
        with pytest.raises(FanalError, match="0 < decay < 1"):
            continuation(penalized, torch.zeros(1, 2), 1000.0, **bad)
