"""Where programs that share a method's name do not share its numbers: which formula is whose, and by how much.

Sizes are the largest difference between final entries, on one mixture in 48 dimensions, on polynomial grids of 5, 8, 10
and 18 steps that end above 0.
"""

from dataclasses import dataclass

import pytest
import torch

from fanal.sampling import sample
from fanal.schedules import polynomial, vp_rates
from fanal.seeding import noise
from fanal.solvers import DEIS, IPNDM, LMS, RES, DPMpp, UniPC
from fanal.solvers.arithmetic import linear_step
from fanal.solvers.coefficients import interpolation, power_moments, quadrature_moments, units, vp_time
from fanal.thresholding import DynamicThreshold
from problems import scattered

F64 = torch.float64
STEPS = (5, 8, 10, 18)


def end(solver, steps, threshold=False):
    D = scattered()
    x = noise(D.shape, range(8), 80.0, dtype=F64)
    return sample(DynamicThreshold(D) if threshold else D, x, polynomial(steps, zero=False), solver)


def gaps(a, b, threshold=False):
    return [float((end(a, n, threshold) - end(b, n)).abs().max()) for n in STEPS]


def test_dynamic_thresholding_is_the_largest_disagreement_and_no_number_of_steps_mends_it():
    """The diff-sampler toolbox always applies it to data predictions; others do so when asked."""
    for solver, sizes in (
        (DPMpp(2), (0.86, 0.98, 0.92, 0.83)),
        (DPMpp(3), (0.93, 1.3, 0.92, 0.78)),
        (UniPC(3), (0.94, 1.4, 0.92, 0.77)),
    ):
        assert gaps(solver, solver, threshold=True) == pytest.approx(sizes, rel=0.05)


PAIRS = {
    # diff-sampler lowers at every number of steps, dpm-solver below 10, diffusers below 15, k-diffusion never
    "2M: always, below 10": (DPMpp(2), DPMpp(2, lower_final=10), (0, 0, 0.074, 0.0050)),
    "3M: always, below 10": (DPMpp(3), DPMpp(3, lower_final=10), (0, 0, 0.54, 0.044)),
    "2M: below 15, below 10": (DPMpp(2, lower_final=15), DPMpp(2, lower_final=10), (0, 0, 0.074, 0)),
    "2M: always, never": (DPMpp(2), DPMpp(2, lower_final="never"), (0.49, 0.16, 0.074, 0.0050)),
    "3M: always, never": (DPMpp(3), DPMpp(3, lower_final="never"), (2.3, 0.67, 0.54, 0.044)),
    # how two values are used on the way to three: dpm-solver's and k-diffusion's 3M
    "3M: midpoint, taylor": (
        DPMpp(3, lower_final="never"),
        DPMpp(3, "taylor", "never"),
        (6.0e-3, 7.8e-5, 2.0e-5, 1.0e-6),
    ),
    "2M: midpoint, taylor": (DPMpp(2), DPMpp(2, "taylor"), (0.22, 0.19, 0.13, 0.036)),
    "3M: as published, exact": (DPMpp(3, lower_final="never"), RES(3, lower_final="never"), (0.79, 0.35, 0.39, 0.042)),
    # two methods under the name DEIS
    "DEIS-3: tab, log rho": (DEIS(3), DEIS(3, "logrho", 15), (0.14, 0.13, 0.13, 0.039)),
    "DEIS-3: tab, rho": (DEIS(3), DEIS(3, "rho"), (0.43, 0.20, 0.12, 0.026)),
    "DEIS-3: exact, 10,000 points": (DEIS(3), DEIS(3, points=10_000), (3.8e-4, 5.1e-5, 2.1e-5, 9.1e-6)),
    "UniPC-3: bh2, bh1": (UniPC(3), UniPC(3, "bh1"), (0.97, 0.52, 0.17, 0.0090)),
    "iPNDM-4, LMS-4": (IPNDM(4), LMS(4), (0.79, 0.29, 0.18, 0.056)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_known_disagreement(name):
    a, b, sizes = PAIRS[name]
    assert gaps(a, b) == pytest.approx(sizes, rel=0.06, abs=0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_deis_in_sigma(order):
    for n in STEPS:
        assert torch.equal(end(LMS(order), n), end(DEIS(order, "rho"), n))


@pytest.mark.parametrize(("sigma", "sigma_next"), [(80.0, 39.0), (1.0, 0.4), (0.03, 0.002)])
def test_deis_weights_of_ten_thousand_points_are_off_by_parts_in_ten_thousand(sigma, sigma_next):
    """M points with both ends are 1/(M − 1) apart, each weighs 1/M, and the ends weigh as much as the others."""
    (exact,), (many,) = (quadrature_moments(1, sigma, sigma_next, 0.002, 80.0, points) for points in (0, 10_000))
    beta_d, beta_min = vp_rates(0.002, 80.0)
    times = [vp_time(level, 0.002, 80.0) for level in (sigma, sigma_next)]
    rates = [
        (beta_d * u + beta_min) / 2 * (1 + level**2) / level * (times[1] - times[0]) / (sigma_next - sigma)
        for u, level in zip(times, (sigma, sigma_next), strict=True)
    ]
    assert exact == pytest.approx(1.0, abs=1e-13)
    assert many == pytest.approx(1 - 1e-4 + sum(rates) / 2 * 1e-4, abs=1e-7)
    assert abs(many - 1) > 1e-6


# ipndm_v of the diff-sampler toolbox, which says variable-step Adams–Bashforth.


def ipndm_v(sigmas, sigma_next, corrected=False):
    """Its weights in units of the step, newest first, as coded and with three corrections."""
    times = [sigma_next, *sigmas]
    h = [a - b for a, b in zip(times, times[1:], strict=False)]
    p = len(sigmas)
    if p == 1:
        return (1.0,)
    a = h[0] / h[1]
    if p == 2:
        return (1 + a / 2, -a / 2)
    b, inner = h[1] / h[2], h[0] * (h[0] + h[1]) / (h[1] * (h[1] + h[2]))
    t1 = (1 - h[0] / (3 * (h[0] + h[1]))) * inner / 2 if corrected else (1 - h[0] / (3 * (h[0] + h[1])) * inner) / 2
    if p == 3:
        return (1 + a / 2 + t1, -a / 2 - (1 + b) * t1, b * t1)
    c = h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
    sign = -1 if corrected else 1
    t2 = (1 - h[0] / (3 * (h[0] + h[1]))) / 2 + sign * (1 - h[0] / (2 * (h[0] + h[1]))) * h[0] / (6 * sum(h[:3]))
    t2 *= h[0] * (h[0] + h[1]) * sum(h[:3]) / (h[1] * (h[1] + h[2]) * sum(h[1:4]))
    return (
        1 + a / 2 + t1 + t2,
        -a / 2 - (1 + b) * t1 - (1 + b + c) * t2,
        b * t1 + (b + c * (1 + h[2] / h[3])) * t2,
        -c * (h[2] / h[3] if corrected else b) * t2,
    )


@dataclass(frozen=True)
class Variable:
    order: int
    corrected: bool = False

    def step(self, denoiser, x, span, memory=()):
        return linear_step(
            denoiser,
            x,
            span,
            memory,
            lambda sigmas, sigma_next: ipndm_v(sigmas, sigma_next, self.corrected),
            order=self.order,
            keep=self.order - 1,
            predict="noise",
        )


def adams(sigmas, sigma_next):
    return interpolation(units(sigmas, sigma_next), power_moments(len(sigmas)))


def test_ipndm_v_agrees_with_adams_bashforth_up_to_order_2_only():
    assert max(gaps(Variable(2), LMS(2))) < 1e-12
    for order in (3, 4):
        assert gaps(Variable(order), LMS(order)) == pytest.approx((0.385, 0.192, 0.126, 0.0455), rel=0.1)


def test_ipndm_v_of_order_4_does_not_integrate_a_constant_nor_reduce_to_the_known_weights():
    sigmas = polynomial(10, zero=False).tolist()
    uneven = ipndm_v(sigmas[3::-1], sigmas[4])
    assert abs(sum(uneven) - 1) > 1e-4
    even = ipndm_v([3.0, 4.0, 5.0, 6.0], 2.0)
    assert even[0] == pytest.approx(2.375)
    assert adams([3.0, 4.0, 5.0, 6.0], 2.0) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24])


@pytest.mark.parametrize("order", [3, 4])
def test_three_corrections_make_ipndm_v_adams_bashforth(order):
    sigmas = polynomial(10, zero=False).tolist()
    for i in range(order - 1, 10):
        newest_first = sigmas[i : (i - order if i >= order else None) : -1]
        assert ipndm_v(newest_first, sigmas[i + 1], corrected=True) == pytest.approx(
            adams(newest_first, sigmas[i + 1]), abs=1e-13
        )
    assert max(gaps(Variable(order, corrected=True), LMS(order))) < 1e-11
