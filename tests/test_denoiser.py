"""Identities that can be read off a denoiser, and its wrappers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fanal.denoiser import Counted, Denoiser, Model, Temperature, Wrapper, counters, evaluations, expand, score, slope
from fanal.errors import FanalError
from fanal.guidance import ClassifierFree
from problems import gaussian, mixture, start

ONE = torch.tensor(1.3, dtype=torch.float64)
MANY = torch.tensor([0.1, 1.0, 2.0, 9.0], dtype=torch.float64)


@pytest.mark.parametrize("D", [gaussian(), mixture()], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("sigma", [ONE, MANY], ids=["one", "per-sample"])
def test_score_and_slope_are_those_of_the_density(D, sigma):
    """`score = ∇log p`, and along the trajectory `dx/dsigma = −sigma·∇log p`."""
    x = start(D)
    denoised = D(x, sigma)
    exact = D.score(x, sigma)
    torch.testing.assert_close(score(x, denoised, sigma), exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slope(x, denoised, sigma), -expand(sigma, x) * exact, rtol=1e-10, atol=1e-10)


def test_expand_follows_the_shape_of_x():
    x = torch.zeros(4, 2, 3, 3)
    assert expand(ONE, x) is ONE
    assert expand(MANY, x).shape == (4, 1, 1, 1)
    torch.testing.assert_close((x + expand(MANY, x))[:, 1, 2, 0], MANY)


def test_counted_counts_batches_and_samples():
    D = Counted(mixture())
    assert torch.equal(D(start(D), ONE), mixture()(start(D), ONE))
    D(start(D, count=7), ONE)
    assert (D.calls, D.evaluations) == (2, 11)


def test_counters_finds_every_count_inside_once():
    inner, other = Counted(mixture()), Counted(mixture())
    outer = Temperature(inner, 0.1)
    assert counters(outer) == [inner]
    outer(start(inner), ONE)
    assert inner.calls == 1
    assert counters(mixture()) == []
    guided = Temperature(ClassifierFree(inner, other, 2.0), 0.1)
    assert counters(guided) == [inner, other]
    assert counters(ClassifierFree(inner, inner, 2.0)) == [inner]
    before = evaluations(guided)
    guided(start(inner), ONE)
    assert evaluations(guided) - before == 2 * len(start(inner))


def test_wrappers_pass_the_model_through():
    D = Temperature(Counted(mixture()), 0.1)
    assert (D.shape, D.sigma_min, D.sigma_max) == ((2,), 0.002, 80.0)
    assert isinstance(D, Model)
    bare = Wrapper(lambda x, sigma: x)
    for name in ("shape", "sigma_min", "sigma_max"):
        with pytest.raises(AttributeError, match="does not say"):
            getattr(bare, name)
    assert not isinstance(bare, Model)


def test_any_function_is_a_denoiser():
    assert isinstance(lambda x, sigma: x, Denoiser)
    assert not isinstance(lambda x, sigma: x, Model)


@pytest.mark.parametrize("sigma", [ONE, MANY], ids=["one", "per-sample"])
def test_temperature_zero_is_the_denoiser(sigma):
    D = mixture()
    assert torch.equal(Temperature(D, 0.0)(start(D), sigma), D(start(D), sigma))


def test_temperature_scales_the_residual_inside_its_window():
    """Both ends of the window belong to it."""
    D = mixture()
    x = start(D)
    got = Temperature(D, 0.3, window=(1.0, 2.0))(x, MANY)
    denoised = D(x, MANY)
    inside = torch.tensor([False, True, True, False])
    torch.testing.assert_close(x - got, torch.where(inside[:, None], 1.3, 1.0) * (x - denoised))
    assert torch.equal(got[~inside], denoised[~inside])
    for b in range(4):
        assert torch.equal(Temperature(D, 0.3, window=(1.0, 2.0))(x[b : b + 1], MANY[b]), got[b : b + 1])


@given(kappa=st.floats(-0.5, 2.0))
def test_temperature_scales_the_slope(kappa):
    D = mixture()
    x = start(D)
    hot, cold = slope(x, D(x, ONE), ONE), slope(x, Temperature(D, kappa)(x, ONE), ONE)
    torch.testing.assert_close(cold, (1 + kappa) * hot, rtol=1e-9, atol=1e-9)


def test_temperature_keeps_the_dtype_and_refuses_an_empty_window():
    D = mixture()
    assert Temperature(D, 0.3)(start(D).float(), ONE).dtype == torch.float32
    with pytest.raises(FanalError, match="window"):
        Temperature(D, 0.1, window=(2.0, 1.0))


def test_backward_products_are_counted():
    """One for each vector–Jacobian product, through guidance too; none without gradients."""
    net = Counted(gaussian())
    x, sigma = start(gaussian(), 4, 2.0), torch.tensor(2.0, dtype=torch.float64)
    with torch.no_grad():
        net(x, sigma)
    assert net.products == 0
    free = x.requires_grad_()
    denoised = Temperature(net, 0.1)(free, sigma)
    for seen in (1, 2):
        torch.autograd.grad(denoised.square().sum(), free, retain_graph=True)
        assert (net.calls, net.products) == (2, seen)
