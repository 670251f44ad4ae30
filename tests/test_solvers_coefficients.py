"""φ-functions, moments and weights against mpmath, closed forms and quadrature."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from fanal.schedules import uniform
from fanal.solvers.coefficients import (
    exponential_moments,
    interpolation,
    phi,
    power_moments,
    quadrature_moments,
    units,
    vp_time,
)

F64 = torch.float64


def exact_phi(k, z):
    """As a confluent hypergeometric function, `1F1(1; k + 1; z)/k!`, in 40 digits."""
    with mpmath.workdps(40):
        return float(mpmath.hyp1f1(1, k + 1, z) / mpmath.factorial(k))


@given(k=st.integers(0, 5), z=st.floats(-50, 50))
def test_phi_to_fourteen_digits(k, z):
    """Above |z| = 1 the recursion loses at most what its subtractions cancel."""
    assert phi(k, z) == pytest.approx(exact_phi(k, z), rel=2e-13)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("z", [0.0, 1e-300, -1e-8, 1e-3, 0.999999, 1.0, -0.999999, -1.0, 12.0, -12.0])
def test_phi_at_its_seams(k, z):
    assert phi(k, z) == pytest.approx(exact_phi(k, z), rel=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("z", [-3.0, -0.4, 0.7, 5.0])
def test_phi_of_a_tensor_is_the_same_and_has_its_derivative(k, z):
    """`φ_k' = φ_k − k·φ_{k+1} + …`: by finite differences."""
    at = torch.tensor(z, dtype=F64, requires_grad=True)
    value = phi(k, at)
    assert isinstance(value, torch.Tensor)
    assert float(value.detach()) == pytest.approx(phi(k, z), rel=1e-14)
    value.backward()
    assert float(at.grad) == pytest.approx((phi(k, z + 1e-5) - phi(k, z - 1e-5)) / 2e-5, rel=1e-7)


@pytest.mark.parametrize("z", [-7.0, -0.3, 0.0, 2.0])
def test_exponential_moments_are_their_integrals(z):
    whole = quad(lambda s: math.exp(z * (1 - s)), 0, 1)[0]
    want = [quad(lambda s, j=j: s**j * math.exp(z * (1 - s)), 0, 1)[0] / whole for j in range(4)]
    assert exponential_moments(4, z) == pytest.approx(want, rel=1e-12)


def test_at_z_0_they_are_those_of_an_unweighted_interval():
    assert exponential_moments(4, 0.0) == pytest.approx(power_moments(4))


@pytest.mark.parametrize(
    ("order", "want"),
    [
        (1, [1]),
        (2, [3 / 2, -1 / 2]),
        (3, [23 / 12, -16 / 12, 5 / 12]),
        (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ],
)
def test_equal_steps_give_the_known_adams_weights(order, want):
    """Adams–Bashforth behind the interval, Adams–Moulton with its end among the nodes."""
    nodes = [-float(k) for k in range(order)]
    assert interpolation(nodes, power_moments(order)) == pytest.approx(want)
    moulton = {2: [1 / 2, 1 / 2], 3: [8 / 12, 5 / 12, -1 / 12], 4: [19 / 24, 9 / 24, -5 / 24, 1 / 24]}
    if order > 1:
        assert interpolation([0.0, 1.0, *nodes[1:-1]], power_moments(order)) == pytest.approx(moulton[order])


@given(
    gaps=st.lists(st.floats(0.05, 5.0), min_size=0, max_size=3),
    coefficients=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    z=st.floats(-6, 6),
)
def test_weights_integrate_polynomials_exactly(gaps, coefficients, z):
    nodes = [0.0, *(-np.cumsum(gaps)).tolist()]
    weights = interpolation(nodes, exponential_moments(len(nodes), z))
    polynomial = np.polynomial.Polynomial(coefficients[: len(nodes)])
    whole = quad(lambda s: math.exp(z * (1 - s)), 0, 1)[0]
    want = quad(lambda s: polynomial(s) * math.exp(z * (1 - s)), 0, 1)[0] / whole
    size = sum(abs(w * polynomial(s)) for w, s in zip(weights, nodes, strict=True))
    assert sum(w * polynomial(s) for w, s in zip(weights, nodes, strict=True)) == pytest.approx(
        want, abs=1e-11 * (1 + size)
    )


def test_units_put_the_interval_at_0_to_1():
    assert units([5.0, 7.0, 11.0], 3.0) == [0.0, -1.0, -3.0]


@pytest.mark.parametrize(("low", "high"), [(0.002, 80.0), (0.01, 50.0)])
def test_vp_time_is_what_the_uniform_grid_is_uniform_in(low, high):
    times = [vp_time(sigma, low, high) for sigma in uniform(11, low, high, zero=False).tolist()]
    assert times == pytest.approx(np.linspace(1, 1e-3, 12).tolist(), rel=1e-9)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(80.0, 39.0), (80.0, 0.002), (0.03, 0.002), (0.4, 3.0)])
def test_moments_in_vp_time_are_their_integrals(sigma, sigma_next):
    """Against adaptive quadrature in log sigma."""
    start, end = (vp_time(level, 0.002, 80.0) for level in (sigma, sigma_next))

    def integrand(w, j):
        level = math.exp(w)
        return ((vp_time(level, 0.002, 80.0) - start) / (end - start)) ** j * level / (sigma_next - sigma)

    ends = math.log(sigma), math.log(sigma_next)
    want = [quad(integrand, *ends, args=(j,), epsabs=1e-13, epsrel=1e-12, limit=200)[0] for j in range(4)]
    assert quadrature_moments(4, sigma, sigma_next, 0.002, 80.0) == pytest.approx(want, rel=1e-10)
