"""The risk index of RODS: computed a second time, against its exact maximum and the Hessian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fanal.exact import Gaussian
from fanal.hallucination import rods
from fanal.hallucination.perturbation import differentiate
from guards import MIXTURES, level, points
from problems import mixture, start

F64 = torch.float64


# --- the index, computed a second time ---------------------------------------------------------------------------


class ByHand:
    """[RODS] eq. 8 for one point of a mixture in numpy: its own posterior means, and central differences only."""

    POWER = {"residual": 0, "direction": 1, "score": 2}

    def __init__(self, D, sigma, v):
        self.means, self.prior, self.std = D.means.numpy(), D.prior.numpy(), D.std.double().numpy()
        self.sigma, self.v = sigma, v

    def norm(self, x):
        total = self.std**2 + self.sigma**2
        log = np.log(self.prior) - ((x - self.means) ** 2).sum(1) / (2 * total) - len(x) / 2 * np.log(total)
        w = np.exp(log - log.max())
        w /= w.sum()
        means = self.means + (self.std**2 / total)[:, None] * (x - self.means)
        return float(np.linalg.norm(x - w @ means)) / self.sigma ** self.POWER[self.v]

    def gradient(self, x, h=1e-3):
        """Central differences of fourth order."""
        out = np.zeros_like(x)
        for j in range(len(x)):
            e = np.zeros_like(x)
            e[j] = h
            f = [self.norm(x + k * e) for k in (-2, -1, 1, 2)]
            out[j] = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
        return out

    def index(self, x, r, steps):
        delta = np.zeros_like(x)
        for _ in range(steps):
            g = self.gradient(x + delta)
            delta = delta + r * g / np.linalg.norm(g)
            delta *= r / np.linalg.norm(delta)
        return float(np.linalg.norm(self.gradient(x + delta) - self.gradient(x))), delta


@pytest.mark.parametrize("d", MIXTURES)
@pytest.mark.parametrize("v", ["score", "direction", "residual"])
@pytest.mark.parametrize(("units", "rho"), [("absolute", 0.3), ("sigma", 0.4), ("shell", 0.1)])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_index_is_that_of_finite_differences(d, v, units, rho, steps):
    D, sigma = MIXTURES[d](), 0.6
    x = points(D, sigma, 2)
    H, delta = rods.index(D, x, sigma, v=v, rho=rho, rho_units=units, steps=steps)
    r = rho * {"absolute": 1.0, "sigma": sigma, "shell": sigma * math.sqrt(d)}[units]
    for b, point in enumerate(x.numpy()):
        expected, move = ByHand(D, sigma, v).index(point, r, steps)
        assert float(H[b]) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(delta[b].numpy(), move, atol=1e-6 * r)


@pytest.mark.parametrize("d", MIXTURES)
@pytest.mark.parametrize("sigma", [0.1, 0.6, 3.0])
@pytest.mark.parametrize(("product", "tolerance"), [("forward", 1e-10), ("difference", 1e-4)])
def test_all_products_agree_where_the_jacobian_is_symmetric(d, sigma, product, tolerance):
    D = MIXTURES[d]()
    x = points(D, sigma)
    exact, other = (differentiate(D, x, level(sigma), p) for p in ("backward", product))
    torch.testing.assert_close(other.gradient, exact.gradient, rtol=0, atol=tolerance)
    assert torch.equal(other.denoised, exact.denoised)
    for a, b in zip(*(rods.index(D, x, sigma, product=p) for p in ("backward", product)), strict=True):
        torch.testing.assert_close(a, b, rtol=30 * tolerance, atol=30 * tolerance / sigma**2)


def test_readings_differ_by_powers_of_sigma_and_each_sample_may_have_its_own():
    D, sigma = mixture(), torch.tensor([0.3, 1.0, 4.0], dtype=F64)
    x = start(D, 3, 1.0)
    H = {v: rods.index(D, x, sigma, v=v)[0] for v in ("residual", "direction", "score")}
    torch.testing.assert_close(H["direction"], H["residual"] / sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(H["score"], H["residual"] / sigma**2, rtol=1e-12, atol=0)
    for b in range(3):
        alone = rods.index(D, x[b : b + 1], float(sigma[b]))[0]
        torch.testing.assert_close(alone, H["score"][b : b + 1], rtol=1e-9, atol=1e-12)


def test_on_a_gaussian_with_one_variance_the_gradient_is_radial():
    # D = s²x/(s² + sigma²): ‖e‖ = c‖x‖ with c = sigma²/(s² + sigma²), so ∇‖e‖ = c·x/‖x‖, δ ∥ x, and H = 0
    D = Gaussian(torch.zeros(5, dtype=F64), 0.49)
    x = start(D, 4, 2.0)
    H, delta = rods.index(D, x, 2.0, v="residual", rho=0.3, rho_units="absolute")
    c = 4 / 4.49
    torch.testing.assert_close(differentiate(D, x, level(2.0)).gradient, c * x / x.norm(dim=1, keepdim=True))
    torch.testing.assert_close(delta, 0.3 * x / x.norm(dim=1, keepdim=True))
    assert float(H.max()) < 1e-14


# --- the index against the exact maximization, and the Hessian ----------------------------------------------------


def hessian(D, point, sigma):
    """The Hessian of ‖x − D‖ at one point."""
    return torch.autograd.functional.hessian(lambda y: (y - D(y[None], level(sigma))[0]).norm(), point)


@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_more_gradient_steps_come_near_the_exact_maximum_and_one_step_does_for_small_radii(sigma):
    D = mixture()
    angle = torch.linspace(0, 2 * math.pi, 7201, dtype=F64)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], 1)

    def of_the_best(point, r):
        y = point + r * circle
        norms = (y - D(y, level(sigma))).norm(dim=1)
        best = r * circle[norms.argmax()]
        return best, float(norms.max())

    gaps = {1: [], 10: []}
    for point in points(D, sigma, 6):
        best, top = of_the_best(point, 0.3)
        base = float((point[None] - D(point[None], level(sigma))).norm())
        for steps, gap in gaps.items():
            _, delta = rods.index(D, point[None], sigma, rho=0.3, rho_units="absolute", steps=steps)
            y = point[None] + delta
            gap.append((top - float((y - D(y, level(sigma))).norm())) / (top - base))
        best, _ = of_the_best(point, 1e-4)
        H, delta = rods.index(D, point[None], sigma, v="residual", rho=1e-4, rho_units="absolute")
        assert float((delta[0] - best).norm()) < 0.02 * 1e-4
        ahead, here = (differentiate(D, p[None], level(sigma)).gradient for p in (point + best, point))
        largest = float(torch.linalg.eigvalsh(hessian(D, point, sigma)).abs().max())
        assert float(H) == pytest.approx(float((ahead - here).norm()), abs=0.01 * 1e-4 * largest)
    assert min(gaps[1] + gaps[10]) > -1e-6  # nothing beats the dense search
    assert max(gaps[10]) < 0.01  # of what there is to gain
    assert sum(gaps[10]) < sum(gaps[1]) / 10


@pytest.mark.parametrize("d", MIXTURES)
def test_to_first_order_the_index_is_the_hessian_along_the_gradient_and_at_most_its_largest_eigenvalue(d):
    D, sigma, r = MIXTURES[d](), 0.5, 1e-4
    x = points(D, sigma, 4)
    H, delta = rods.index(D, x, sigma, v="residual", rho=r, rho_units="absolute")
    ratios = []
    for b, point in enumerate(x):
        curved = hessian(D, point, sigma)
        largest = float(torch.linalg.eigvalsh(curved).abs().max())
        assert float(H[b]) == pytest.approx(float((curved @ delta[b]).norm()), rel=2e-3)
        assert float(H[b]) <= r * largest * (1 + 2e-3)
        ratios.append(float(H[b]) / (r * largest))
        # along the eigenvector instead of the gradient the bound is met: it is the maximum over δ of A.2
        values, vectors = torch.linalg.eigh(curved)
        top = r * vectors[:, values.abs().argmax()]
        ahead, here = (differentiate(D, p[None], level(sigma)).gradient for p in (point + top, point))
        assert float((ahead - here).norm()) == pytest.approx(r * largest, rel=2e-3)
    assert max(ratios) > 0.1
