"""[PDE] sec. 4.4: which losses are the same, and the floor under them."""

from __future__ import annotations

import pytest
import torch

from checks import holds
from fanal import particles
from fanal.exact import Mixture
from fanal.particles.theory import losses
from fanal.particles.theory.problem import float64, humps, normal, plane


def test_eq_4_26_is_4_28_and_4_30_is_4_33():
    holds(losses.same())


def test_eq_4_34_drawing_times_stands_in_for_the_weight():
    """Over uniform times the two denoisers' losses are not in the proportion of the total one's: another loss."""
    found = holds(losses.unweighted()).values
    assert found["plain over total at uniform times, wrong denoiser"] != pytest.approx(
        found["plain over total at uniform times, exact denoiser"], rel=0.02
    )


def test_eq_4_29_the_total_loss_is_the_score_loss_and_a_floor():
    holds(losses.split())
    assert float(losses.judged(humps(), 2000)[0].score.max()) < 1e-12
    assert float(losses.judged(losses.wrong, 2000)[0].score.mean()) > 0.01


def test_the_floor_is_what_fishers_information_leaves():
    holds(losses.fisher())


def test_the_floor_of_normal_data_and_the_printed_form():
    """N(0, 1) at t = 0.5: 0.582; the variance of the conditional mean, as printed in eq. 4.29, is 0.338."""
    holds(losses.normal_data())
    assert particles.floor(Mixture(float64([[0.0]]), std=1.0), 0.5) == pytest.approx(0.58198, abs=1e-5)


def test_the_total_loss_is_infinite_down_to_time_0():
    assert holds(losses.infinite()).values["2t·floor at 1e-4"] == pytest.approx(1, rel=0.01)


def test_the_posterior_variance_is_the_slope_of_the_denoiser():
    """Cov(x0 | x) = sigma²·∂D/∂x, by automatic differentiation."""
    x, sigma = normal(9, 2), float64(0.7)
    slopes = [torch.autograd.functional.jacobian(lambda p: plane()(p[None], sigma)[0], p).trace() for p in x]
    found = particles.posterior_variance(plane(), x, 0.7)
    assert torch.allclose(found, 0.49 * torch.stack(slopes), rtol=1e-9)
