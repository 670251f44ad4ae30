"""Averages of the weights: closed forms of both kinds, and how a recipe names them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanal.averaging import Exponential, Power, profiles
from fanal.errors import FanalError


def averaged(profile, weights):
    """Run the update over a sequence of weights, from an initial value that should not matter in the end."""
    mean = 1e3
    for i, weight in enumerate(weights):
        keep = profile.keep(i)
        mean = keep * mean + (1 - keep) * weight
    return mean


def test_exponents_are_the_published_ones():
    # Karras et al. 2024, arXiv:2312.02696, section 3.1: 5 % and 10 % stand for 16.97 and 6.94.
    assert Power(0.05).exponent == pytest.approx(16.97, abs=0.005)
    assert Power(0.10).exponent == pytest.approx(6.94, abs=0.005)


@given(st.floats(0.01, 0.28))
def test_the_width_of_a_profile_is_the_one_asked_for(sigma_rel):
    gamma = Power(sigma_rel).exponent
    tau = (np.arange(200_000) + 0.5) / 200_000
    weight = tau**gamma / (tau**gamma).sum()
    mean = (weight * tau).sum()
    assert np.sqrt((weight * (tau - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-3)


@given(st.floats(0.02, 0.28), st.lists(st.floats(-10, 10), min_size=1, max_size=60))
def test_the_power_average_of_any_weights(sigma_rel, weights):
    profile, t = Power(sigma_rel), len(weights)
    # The weights of step i hold from i-1 to i: the integral of τ^γ over that, divided by the integral up to t.
    edges = (np.arange(t + 1) / t) ** (profile.exponent + 1)
    assert averaged(profile, weights) == pytest.approx(float((np.diff(edges) * weights).sum()), abs=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_power_average_of_growing_weights(sigma_rel):
    # Of weights τ it is t·(γ + 1)/(γ + 2), up to half a step.
    profile, t = Power(sigma_rel), 4000
    closed = t * (profile.exponent + 1) / (profile.exponent + 2)
    assert averaged(profile, range(1, t + 1)) == pytest.approx(closed + 0.5, abs=0.01)


def test_the_exponential_average_forgets_the_start():
    profile = Exponential(0.9)
    weights = np.linspace(0, 1, 400)
    shares = 0.1 * 0.9 ** np.arange(400)[::-1]
    assert averaged(profile, weights) == pytest.approx(float((shares * weights).sum()), abs=1e-9)
    assert profile.keep(0) == 0.1
    assert [profile.keep(i) for i in (10, 80, 1000)] == [11 / 20, 0.9, 0.9]


def test_names():
    assert [p.name for p in profiles([0.999, "power:0.10", "power:0.05"])] == [
        "exponential-0.999",
        "power-0.1",
        "power-0.05",
    ]
    assert profiles(0.5) == (Exponential(0.5),)
    assert profiles("power:0.1") == (Power(0.1),)


@pytest.mark.parametrize(
    "wrong",
    [
        (),
        1.0,
        -0.1,
        True,
        None,
        float("nan"),
        "0.9",
        "power",
        "power:",
        "power:0.3",
        "power:0",
        "power:nan",
        (0.9, 0.9),
        ("power:0.1", "power:0.10"),
        [0.1 * k for k in range(9)],
        {"power": 0.1},
    ],
)
def test_what_is_no_average_is_refused(wrong):
    with pytest.raises(FanalError):
        profiles(wrong)
