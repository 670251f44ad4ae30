"""The exact derivative of the denoising trajectory; [GEO] table 1: the difference each second-order solver takes."""

import math

import pytest
import torch

import fanal
import pipelines
from fanal.adapters.predictions import Timesteps, denoised_of, input_of
from fanal.denoiser import Counted, slope
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.sampling import Span, sample, toward, trace
from fanal.schedules import logsnr, polynomial, stable_diffusion_alphas
from fanal.seeding import noise
from fanal.solvers import (
    DPM2,
    IPNDM,
    LMS,
    SOLVERS,
    Euler,
    Heun,
    Taylor2,
    generalized,
    implied,
    total_derivative,
)
from problems import DETERMINISTIC, mixture, observed_order, quiet, start

F64 = torch.float64


def at(value):
    return torch.tensor(value, dtype=F64)


VARIANCES = torch.tensor([2.0, 0.3, 0.01], dtype=F64)


def curve(x, sigma):
    """Derivatives 0 to 4 of `x(sigma') = c·sqrt(λ + sigma'²)` at sigma, through x: the trajectory of Gaussian data."""
    total = VARIANCES + sigma**2
    c = x / total.sqrt()
    return (
        x,
        c * sigma / total**0.5,
        c * VARIANCES / total**1.5,
        -3 * c * VARIANCES * sigma / total**2.5,
        -3 * c * VARIANCES * (total**-2.5 - 5 * sigma**2 * total**-3.5),
    )


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_the_total_derivative_in_closed_form(sigma):
    """`dD/dsigma = −sigma·d²x/dsigma²` ([REG] eq. 16, [GEO] eq. 5)."""
    D, x = Gaussian(torch.zeros(3), VARIANCES), noise((3,), range(4), sigma, dtype=F64)
    denoised, derivative = total_derivative(D, x, at(sigma))
    assert torch.equal(denoised, D(x, at(sigma)))
    torch.testing.assert_close(derivative, -sigma * curve(x, sigma)[2], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_the_total_derivative_is_the_change_along_the_trajectory(sigma):
    """On the mixture, by central differences of D along an accurate trajectory."""
    D = mixture()
    x = start(D, sigma=sigma)
    h = 1e-4 * sigma
    ends = [sample(D, x, torch.linspace(sigma, sigma + sign * h, 5, dtype=F64), SOLVERS["rk4"]()) for sign in (1, -1)]
    want = (D(ends[0], at(sigma + h)) - D(ends[1], at(sigma - h))) / (2 * h)
    torch.testing.assert_close(total_derivative(D, x, at(sigma))[1], want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_generalized_prediction_in_closed_form(order):
    """[REG] eq. 18 with the Gaussian's own derivatives; order 1 is D (corollary 1)."""
    D, x = Gaussian(torch.zeros(3), VARIANCES), noise((3,), range(4), 3.0, dtype=F64)
    sigma, end = 3.0, 1.2
    derivatives = curve(x, sigma)
    want = D(x, at(sigma)) - sum(
        derivatives[i] * sigma * (end - sigma) ** (i - 1) / math.factorial(i) for i in range(2, order + 1)
    )
    got = generalized(D, x, at(sigma), at(end), order)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    taylor = sum(derivatives[i] * (end - sigma) ** i / math.factorial(i) for i in range(order + 1))
    torch.testing.assert_close(toward(x, got, sigma, end), taylor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_steps_have_their_order(order):
    """One step of order k errs by the step to the power k + 1."""
    D, x = mixture(), start(mixture(), sigma=2.0)
    steps, errors = [4, 8, 16], []
    for n in steps:
        end = at(2.0 * (1 - 0.3 / n))
        exact = sample(D, x, torch.linspace(2.0, float(end), 9, dtype=F64), SOLVERS["rk4"]())
        errors.append(float((toward(x, generalized(D, x, at(2.0), end, order), 2.0, float(end)) - exact).norm()))
    assert observed_order(steps, errors) == pytest.approx(order + 1, abs=0.15)


def test_taylor2_is_eulers_step_with_the_prediction_of_order_2():
    D, sigmas = mixture(), logsnr(6, 0.1, 10.0, zero=False)
    for t in trace(D, start(D), sigmas, Taylor2()):
        better = generalized(D, t.x, t.span.sigma, t.span.sigma_next, 2)
        torch.testing.assert_close(
            t.step.x_next, toward(t.x, better, t.span.sigma, t.span.sigma_next), rtol=1e-11, atol=1e-12
        )
        torch.testing.assert_close(t.step.info["derivative"], total_derivative(D, t.x, t.span.sigma)[1], rtol=0, atol=0)


def test_orders_cost_what_they_say():
    for order in (1, 2, 3):
        D = Counted(mixture())
        generalized(D, start(D), at(3.0), at(1.0), order)
        assert D.calls >= order
    D = Counted(mixture())
    total_derivative(D, start(D), at(3.0))
    assert D.calls == 2


@pytest.mark.parametrize("order", [0, -1, 1.5, True])
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(FanalError, match="order"):
        generalized(mixture(), start(mixture()), at(3.0), at(1.0), order)


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n != "afs"])
def test_the_implied_prediction_leads_euler_to_the_same_place(name):
    """Any solver's step is Euler's with some prediction ([REG] prop. 1); for Euler it is D."""
    D = mixture()
    for t in trace(D, start(D), polynomial(6, 0.05, 10.0), quiet(name)):
        found = implied(t)
        torch.testing.assert_close(
            toward(t.x, found, t.span.sigma, t.span.sigma_next), t.step.x_next, rtol=1e-9, atol=1e-11
        )
        if name == "euler":
            torch.testing.assert_close(found, t.step.denoised, rtol=1e-9, atol=1e-10)


# [GEO] table 1.


def by_difference(x, r, difference, t, t_next):
    """[GEO] eq. 6 with a difference in place of dr/dt: the sampling step in terms of the denoising trajectory."""
    h = t_next - t
    return x + h / t * (x - r) - h**2 / (2 * t) * difference


class Logged:
    """Writes down every answer."""

    def __init__(self, denoiser):
        self.denoiser, self.answers = denoiser, []

    def __call__(self, x, sigma):
        self.answers.append(self.denoiser(x, sigma))
        return self.answers[-1]


@pytest.mark.parametrize(
    ("solver", "gamma"),
    [
        (Heun(), lambda t, s, t_next: (t / t_next, t_next - t)),
        (DPM2(), lambda t, s, t_next: (t / s, (t_next - t) / 2)),
    ],
    ids=["EDM", "DPM-Solver-2"],
)
def test_one_step_samplers_are_forward_differences(solver, gamma):
    """`γ·(r(second) − r)/length`, exactly: γ = t/t' over the step for Heun, t/s over half of it for DPM-Solver-2."""
    D = mixture()
    for t in trace(D, start(D, sigma=80.0), polynomial(8, 0.01, 80.0, zero=False), solver):
        a, b = t.span.sigma, t.span.sigma_next
        log = Logged(D)
        solver.step(log, t.x, t.span, ())
        factor, length = gamma(a, (a * b).sqrt(), b)
        difference = factor * (log.answers[1] - log.answers[0]) / length
        torch.testing.assert_close(
            t.step.x_next, by_difference(t.x, log.answers[0], difference, a, b), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize(
    ("solver", "length"),
    [
        (IPNDM(2), lambda before, t, t_next: t_next - t),
        (LMS(2), lambda before, t, t_next: t - before),
    ],
    ids=["S-PNDM", "DEIS rho-AB1"],
)
def test_two_step_samplers_are_backward_differences_after_an_euler_step(solver, length):
    """Exact where the step before was Euler's, as the second step is; later it holds up to the local error.

    The table prints γ = 1 without that condition. On sigma 80 → 40 → 20 → 10 the third step misses by under 1e-2.
    """
    D, sigmas = mixture(), torch.tensor([80.0, 40.0, 20.0, 10.0], dtype=F64)
    run = list(trace(D, start(D, sigma=80.0), sigmas, solver))
    gaps = []
    for before, t in zip(run, run[1:], strict=False):
        past, a, b = before.span.sigma, t.span.sigma, t.span.sigma_next
        difference = (t.step.denoised - before.step.denoised) / length(past, a, b)
        gaps.append(float((t.step.x_next - by_difference(t.x, t.step.denoised, difference, a, b)).abs().max()))
    assert gaps[0] < 1e-12
    assert 1e-6 < gaps[1] < 1e-2


def test_that_gap_is_of_the_order_of_the_local_error():
    """Halving the steps divides the third step's gap by eight: it is the step's own local error, h³."""
    D, steps, gaps = mixture(), [8, 16, 32], []
    x = start(D, sigma=10.0)
    for n in steps:
        sigmas = 10.0 * (1 - torch.arange(4, dtype=F64) / n)
        run = list(trace(D, x, sigmas, IPNDM(2)))
        a, b = run[2].span.sigma, run[2].span.sigma_next
        difference = (run[2].step.denoised - run[1].step.denoised) / (b - a)
        gaps.append(
            float((run[2].step.x_next - by_difference(run[2].x, run[2].step.denoised, difference, a, b)).norm())
        )
    assert observed_order(steps, gaps) > 2.7


def test_ddim_has_no_difference_and_genie_the_exact_one():
    D, sigmas = mixture(), polynomial(6, 0.1, 10.0, zero=False)
    x, span = start(D), Span(0, 1, sigmas[0], sigmas[1])
    r, derivative = total_derivative(D, x, sigmas[0])
    a, b = sigmas[0], sigmas[1]
    torch.testing.assert_close(Euler().step(D, x, span).x_next, by_difference(x, r, 0.0, a, b))
    torch.testing.assert_close(Taylor2().step(D, x, span).x_next, by_difference(x, r, derivative, a, b))


# Networks.


def differences(D, x, sigma, h=1e-3):
    """dD/dsigma along the slope by central differences."""
    d = slope(x, D(x, at(sigma)), at(sigma))
    step = h * sigma
    return (D(x + step * d, at(sigma + step)) - D(x - step * d, at(sigma - step))) / (2 * step)


class Attention(torch.nn.Module):
    """A denoiser with attention, whose fused kernel has no forward mode."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 24).double()

    def forward(self, x, sigma):
        q, k, v = self.project(x / (1 + sigma)).chunk(3, dim=-1)
        parts = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v)]
        mixed = torch.nn.functional.scaled_dot_product_attention(*parts)
        return mixed.transpose(1, 2).flatten(2) / (1 + sigma**2)


def test_fused_attention_is_replaced_by_the_one_that_can_be_differentiated():
    torch.manual_seed(0)
    D, x = Attention(), noise((5, 8), range(3), dtype=F64)
    with torch.no_grad():
        sigma = at(1.3)
        with pytest.raises(NotImplementedError, match="forward AD"):
            torch.func.jvp(D, (x, sigma), (x, torch.ones_like(sigma)))
        torch.testing.assert_close(total_derivative(D, x, sigma)[1], differences(D, x, 1.3), rtol=1e-5, atol=1e-7)
        assert sample(D, x, polynomial(4, 0.1, 3.0), Taylor2()).isfinite().all()


def test_an_embedded_network_has_the_right_derivative():
    """Its noise level enters through an embedding, in float32: differences agree to a few parts in a thousand."""
    D = fanal.load("digits8")
    x = noise(D.shape, range(2), 2.0)
    with torch.no_grad():
        got, want = total_derivative(D, x, at(2.0))[1], differences(D, x, 2.0)
    assert float((got - want).norm()) < 5e-3 * float(want.norm())


def test_the_time_of_a_discrete_network_is_differentiated_too():
    """A U-Net of diffusers, whose times are interpolated in log sigma, with attention and normalization blocks."""
    pytest.importorskip("diffusers")
    net, times = pipelines.make_ddpm().unet.double(), Timesteps.of_alphas(stable_diffusion_alphas())

    def D(x, sigma):
        time = times.time_of(sigma).to(x.dtype).expand(len(x))
        out = net(input_of(x, sigma, "vp"), time).sample
        return denoised_of(out, x, sigma, "epsilon")

    x = noise((3, 8, 8), range(2), 2.0, dtype=F64)
    with torch.no_grad():
        got, want = total_derivative(D, x, at(2.0))[1], differences(D, x, 2.0, h=3e-4)
        fixed = total_derivative(lambda y, sigma: D(y, at(2.0)), x, at(2.0))[1]
    assert float((got - want).norm()) < 2e-2 * float(want.norm())
    assert float((fixed - want).norm()) > 5 * float((got - want).norm())


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@pytest.mark.parametrize(
    "network",
    [
        lambda x, sigma: Opaque.apply(x),
        lambda x, sigma: x * float(sigma.detach().numpy()) / 9,
    ],
)
def test_a_network_that_cannot_be_differentiated_is_told(network):
    with pytest.raises(FanalError, match="forward mode .* such as heun"):
        sample(network, noise((2,), range(3), 3.0), polynomial(4, 0.1, 3.0), Taylor2())
