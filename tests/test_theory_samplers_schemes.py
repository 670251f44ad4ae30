"""[PDE] sec. 4.3: Euler–Maruyama and the exact step, their orders, and the noise that drives them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checks import holds
from fanal import particles, pde
from fanal.errors import FanalError
from fanal.exact import Gaussian, Mixture
from fanal.metrics import mean
from fanal.particles.theory import cells, schemes
from fanal.particles.theory.problem import VARIANCE, float64, grid, humps, normal, plane, points
from fanal.sampling import sample
from fanal.seeding import noise
from fanal.solvers import DDPM
from problems import observed_order


def test_eq_4_21_the_exact_step_is_bayes_and_ddpm():
    holds(schemes.exact_step())


@given(st.floats(1e-3, 5), st.floats(0, 0.99))
def test_eq_4_21_is_4_22_is_the_posterior_of_ddpm(time, share):
    """By the integrating factor, by Bayes' formula (prop. A.1, lemma A.2 on precisions), and fanal's solver."""
    end = share * time
    one, two = particles.bridge(time, end), particles.posterior(time, end)
    assert (one.keep, one.pull, one.std) == pytest.approx((two.keep, two.pull, two.std), rel=1e-9, abs=1e-12)
    if end == 0:
        return
    h = time - end
    ahead, behind = math.expm1(2 * h), -math.expm1(-2 * end)  # variances of A.7 and A.8
    total = ahead * behind / (ahead + behind)
    assert one.std**2 == pytest.approx(total, rel=1e-9)
    assert one.keep == pytest.approx(total / ahead * math.exp(h), rel=1e-9)
    run = particles.affine(
        DDPM(), Gaussian(float64([1.0]), 0.0), float64([particles.sigma_of(time), particles.sigma_of(end)])
    )
    scale = math.exp(-end)
    assert (run.offset * scale, run.keep * math.exp(time) * scale) == pytest.approx((one.pull, one.keep), rel=1e-7)


def test_eq_4_19_needs_the_root_of_twice_the_step():
    holds(schemes.printed_noise())


def test_weak_order_on_a_gaussian_is_1():
    holds(schemes.weak_gaussian())


def test_strong_order_on_a_gaussian_is_1():
    holds(schemes.strong())


def test_a_path_has_the_law_of_brownian_motion():
    """Integrals over disjoint intervals are independent, and jointly normal with the covariance ∫ w v dt."""
    path = particles.Path.draw([2.0, 1.0, 0.25], 4000, (1,))
    plain, bridge = (path.integrals[name][..., 0] for name in ("plain", "bridge"))
    assert path.variances["plain"] == pytest.approx([1.0, 0.75])
    coth = 1 / np.tanh([2.0, 1.0, 0.25])
    assert path.variances["bridge"] == pytest.approx(np.diff(coth), rel=1e-6)
    cross = math.log(math.tanh(0.5) / math.tanh(0.125))  # ∫ dt/sinh t
    products = {"own": mean(plain[1] * bridge[1]), "apart": mean(plain[0] * bridge[1])}
    assert abs(products["own"].value - cross) < 4 * products["own"].se
    assert abs(products["apart"].value) < 4 * products["apart"].se
    assert torch.allclose(path.normal("plain", 2.0, 0.25), (plain.sum(0) / math.sqrt(1.75))[:, None])


def test_weak_order_on_a_mixture_is_1():
    holds(schemes.weak_mixture())


def test_particles_have_the_density_of_the_reverse_equation():
    holds(cells.densities())


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: particles.drift(humps(), normal(1, 1), 0.5, "cosh"), "form of the reverse drift"),
        (lambda: particles.foot(humps(), normal(1, 1), 0.0), "above 0"),
        (lambda: particles.bridge(1.0, 1.0), "down to"),
        (lambda: particles.EulerMaruyama("vp"), "process"),
        (lambda: particles.Path.draw([1.0, 2.0], 2, (1,)), "decreasing"),
        (lambda: particles.Path.draw([2.0, 1.0], 2, (1,)).normal("plain", 2.0, 1.5), "no interval"),
        (lambda: particles.law(DDPM(), humps(), grid(400), pde.Grid.even(-5, 5, 50), np.ones(50)), "finer grid"),
        (lambda: particles.law(DDPM(), humps(), grid(4), pde.Grid.even(-5, 5, 50), np.ones(9)), "one axis"),
        (lambda: particles.floor(plane(), 0.5), "one dimension"),
        (lambda: particles.mean_floor(humps(), 0.0, 1.0), "early"),
        (lambda: particles.gaps(torch.zeros(3, 2)), "equal"),
        (lambda: particles.off_bound(points(), 0.0, 1.0, 1.0), "positive"),
        (lambda: particles.posterior_variance(Mixture(float64([[0.0]]), cov=[1.0]), normal(1, 1), 1.0), "isotropic"),
        (
            lambda: particles.Losses.of(humps(), humps(), normal(1, 1), float64([0.0]), normal(1, 1)),
            "above 0",
        ),
        (lambda: sample(humps(), normal(1, 1), float64([1.0, 2.0]), particles.EulerMaruyama(), [0]), "only runs down"),
    ],
)
def test_what_has_no_answer_is_told(ask, said):
    with pytest.raises(FanalError, match=said):
        ask()


def test_euler_maruyama_draws_from_the_samples_seeds():
    """Without `Driven` a sample depends on its seed alone."""
    x = noise((2,), range(4), 20.0, dtype=torch.float64)
    for process in ("ou", "brownian"):
        solver, sigmas = particles.EulerMaruyama(process), grid(10)
        whole = sample(plane(), x, sigmas, solver, range(4))
        assert torch.equal(sample(plane(), x[2:], sigmas, solver, [2, 3]), whole[2:])


def test_brownian_euler_maruyama_is_of_order_1_too():
    data, steps, errors = Gaussian(float64([0.0]), VARIANCE), [32, 64, 128], []
    for n in steps:
        sigmas = grid(n)
        run = particles.affine(particles.EulerMaruyama("brownian"), data, sigmas)
        start = math.sqrt(VARIANCE + float(sigmas[0]) ** 2)
        errors.append(abs(run.std(start) ** 2 - VARIANCE - float(sigmas[-1]) ** 2))
    assert observed_order(steps, errors) == pytest.approx(1, abs=0.1)
