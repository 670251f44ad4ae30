"""[PDE] sec. 4.1 and 4.2, statement by statement: the explicit reverse SDE, its limits, the Dirac case.

The checks are those of `fanal.particles.theory`: identities hold to rounding, limits by rates whose corrections two
windows tell, laws within the standard errors that are given. That they can fail is tested here too.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks import holds
from fanal import particles
from fanal.exact import Gaussian
from fanal.particles.theory import SHEETS, STATEMENTS, cells, equation, losses, schemes
from fanal.particles.theory.problem import float64
from fanal.solvers import DDPM


def test_eq_4_6_4_10_and_4_11_are_one_drift():
    holds(equation.forms())


@pytest.mark.parametrize("offset", [0.7, 0.0])
def test_eq_4_7_far_from_the_data_the_reverse_is_the_forward(offset):
    holds(equation.far(offset))


def test_eq_4_8_near_the_data_the_reverse_relaxes_as_1_over_t():
    holds(equation.near())


def test_eq_4_9_the_bridge_near_the_data_is_brownian():
    """And the printed mean, with t/T for s/T, would begin at x̄."""
    holds(equation.brownian())
    start = particles.brownian_bridge(1.0, 1 - 1e-12)
    assert (start.keep, start.pull) == pytest.approx((1, 0), abs=1e-9)
    assert particles.brownian_bridge(1.0, 0.25).std ** 2 == pytest.approx(2 * 0.25 * 0.75)


def test_eq_4_12_the_dirac_case_is_exact():
    holds(equation.dirac())


@given(st.lists(st.floats(0.02, 0.98), min_size=1, max_size=8, unique=True), st.floats(0.5, 4), st.floats(-3, 3))
def test_eq_4_12_steps_of_any_length_have_the_law_of_the_exact_solution(cuts, start, point):
    """For data in one point the exact-step scheme is no approximation: on any grid, offset, factor and noise agree."""
    times = [start, *(start * c for c in sorted(cuts, reverse=True)), 0.01 * start]
    if min(-np.diff(times)) < 1e-6:
        return
    run = particles.affine(DDPM(), Gaussian(float64([point]), 0.0), float64([particles.sigma_of(t) for t in times]))
    want, scale = particles.bridge(start, 0.01 * start), math.exp(0.01 * start)
    assert run.offset / scale == pytest.approx(want.pull * point, abs=1e-11)
    assert run.keep / scale * math.exp(start) == pytest.approx(want.keep, rel=1e-9)
    assert run.std() / scale == pytest.approx(want.std, rel=1e-9)


def test_eq_4_12_composes():
    """Two exact steps towards one point are one."""
    whole, parts = particles.bridge(2.0, 0.3), particles.bridge(1.1, 0.3).after(particles.bridge(2.0, 1.1))
    for name in ("keep", "pull", "std"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name), rel=1e-12)


def test_eq_4_17_the_distance_to_the_point_vanishes():
    holds(equation.to_the_point())
    assert holds(equation.vanishing_distance()).values["W2/sqrt(2dt)"] == pytest.approx(1, abs=0.01)


def test_every_check_is_in_the_table_and_drawn_once():
    helpers = {"growing", "judged", "reference", "wrong"}
    made = {getattr(check, "func", check) for check in STATEMENTS.values()}
    known = {getattr(m, n) for m in (equation, schemes, losses, cells) for n in m.__all__ if n not in helpers}
    assert made == known
    assert sorted(name for names in SHEETS.values() for name in names) == sorted(STATEMENTS)


def _printed(time, end):
    """The mean of eq. 4.9 as it is printed."""
    share = end / time
    return particles.Bridge(1 - share, share, math.sqrt(2 * share * (time - end)))


@pytest.mark.parametrize(
    ("check", "where", "name", "wrong"),
    [
        (equation.forms, particles.FORMS, "tanh", lambda z, mean, t: (mean / math.cosh(t) - z) / math.tanh(t + 1e-12)),
        (equation.near, particles, "foot", lambda data, z, t: 1.001 * data(z, float64(particles.sigma_of(t)))),
        (equation.brownian, particles, "brownian_bridge", _printed),
        (equation.dirac, particles, "bridge", lambda t, end: particles.brownian_bridge(t, end)),
        (equation.to_the_point, particles, "bridge", lambda t, end: particles.brownian_bridge(t, end)),
        (schemes.exact_step, particles, "posterior", lambda t, end: particles.brownian_bridge(t, end)),
        (losses.fisher, particles, "floor", lambda data, t: 1 / (2 * t)),
        (losses.split, particles, "floor", lambda data, t: 1 / (2 * t)),
        (cells.kernel, particles, "foot", lambda data, z, t: data(z, float64(particles.sigma_of(t)))),
        (cells.trapped, particles, "chance_outside", lambda data, sigma: particles.Endings.of(data, data).index >= 0),
        (cells.last_level, particles, "chance_off", lambda data, sigma, count: particles.gaps(data) > sigma),
        (cells.bounded, particles, "off_bound", lambda data, sigma, std, distance: sigma / 10),
    ],
)
def test_a_wrong_formula_breaks_the_statement(check, where, name, wrong, monkeypatch):
    if isinstance(where, dict):
        monkeypatch.setitem(where, name, wrong)
    else:
        monkeypatch.setattr(where, name, wrong)
    assert not check().holds
