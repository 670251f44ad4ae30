"""Solvers and schedules from text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fanal import schedules
from fanal.config import (
    build_detector,
    build_repair,
    build_schedule,
    build_solver,
    check_detector,
    fitted_options,
)
from fanal.errors import FanalError, is_number
from fanal.hallucination import Ladder, Redo, Renoise, Variance
from fanal.hallucination.detectors import RodsIndex
from fanal.solvers import SOLVERS, Ancestral, Churn, Euler, Heun


@pytest.mark.parametrize("name", SOLVERS)
def test_a_bare_name_is_the_solver_with_its_defaults(name):
    assert build_solver(name) == SOLVERS[name]()


@pytest.mark.parametrize(
    ("text", "solver"),
    [
        ("churn:s_churn=20", Churn(s_churn=20.0)),
        ("churn:s_churn=20,s_min=0.1,s_noise=1", Churn(s_churn=20.0, s_min=0.1, s_noise=1.0)),
        ("ancestral:solver=heun,eta=0.5", Ancestral(Heun(), eta=0.5)),
        ("ancestral:solver=churn:s_churn=3", Ancestral(Churn(s_churn=3.0))),
        ("churn:solver=euler", Churn(Euler())),
        ("churn:", Churn()),
    ],
)
def test_fields_reach_the_solver(text, solver):
    built = build_solver(text)
    assert built == solver
    if isinstance(built, Churn):
        assert isinstance(built.s_churn, float)


@given(st.floats(0, 100), st.floats(0, 2))
def test_numbers_arrive_as_they_were_written(s_churn, s_noise):
    assert build_solver(f"churn:s_churn={s_churn!r},s_noise={s_noise!r}") == Churn(s_churn=s_churn, s_noise=s_noise)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("eular", ["unknown solver 'eular'", "did you mean 'euler'", "heun"]),
        ("Euler", ["unknown solver 'Euler'", "did you mean 'euler'"]),
        ("", ["unknown solver ''"]),
        ("churn:s_chrun=20", ["unknown field of solver churn 's_chrun'", "did you mean 's_churn'"]),
        ("churn:20", ["expected field=value, got '20'", "s_churn"]),
        ("churn:s_churn=much", ["churn:s_churn must be like 40.0, got 'much'"]),
        ("churn:s_churn=-1", ["s_churn >= 0"]),
        ("churn:s_churn=1,s_churn=2", ["s_churn", "twice"]),
        ("euler:order=2", ["euler has no fields"]),
        ("ancestral:eta=2", ["eta must be in [0, 1], got 2.0"]),
        ("ancestral:solver=hoin", ["unknown solver 'hoin'"]),
    ],
)
def test_a_wrong_solver_is_refused_with_what_to_try(text, words):
    with pytest.raises(FanalError) as caught:
        build_solver(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("zero", [True, False])
def test_a_bare_name_is_the_schedule_over_the_given_range(name, zero):
    grid = build_schedule(name, 7, 0.01, 50.0, zero=zero)
    assert torch.equal(grid, schedules.SCHEDULES[name](7, sigma_min=0.01, sigma_max=50.0, zero=zero))
    assert len(grid) == 8
    assert float(grid[0]) == 50.0


def test_fields_reach_the_schedule():
    assert torch.equal(build_schedule("polynomial:rho=5", 9, 0.002, 80.0), schedules.polynomial(9, rho=5.0))
    assert torch.equal(build_schedule("uniform:power=2", 9, 0.002, 80.0), schedules.quadratic(9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("polynomail", ["unknown schedule", "did you mean 'polynomial'"]),
        ("karras", ["unknown schedule", "known:", "logsnr"]),
        ("polynomial:roh=5", ["unknown field of schedule polynomial 'roh'", "did you mean 'rho'"]),
        ("polynomial:steps=5", ["unknown field of schedule polynomial 'steps'"]),
        ("logsnr:rho=5", ["logsnr has no fields"]),
        ("polynomial:rho=0", ["rho must be positive, got 0.0"]),
        ("polynomial:rho=0.001", ["polynomial:rho=0.001", "milder"]),
        ("polynomial:rho=nan", ["rho"]),
        ("polynomial:rho=x", ["polynomial:rho must be like 7.0, got 'x'"]),
    ],
)
def test_a_wrong_schedule_is_refused_with_what_to_try(text, words):
    with pytest.raises(FanalError) as caught:
        build_schedule(text, 10, 0.002, 80.0)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("low", "high"), [(0.0, 80.0), (-1.0, 80.0), (80.0, 0.002), (1.0, 1.0), (0.1, float("inf"))])
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(FanalError, match="sigma_min < sigma_max"):
        build_schedule("polynomial", 10, low, high)


def test_a_repair_is_built_from_text_over_the_cards_hints():
    assert build_repair("redo") == Redo()
    assert build_repair("redo:kappa=0.1,window=0.5..20") == Redo(0.1, (0.5, 20.0))
    hints = {"sigma": 1.5, "rounds": 2, "unknown": 1}
    assert build_repair("renoise", hints) == Renoise(1.5, 2)
    assert build_repair("renoise:rounds=3", hints) == Renoise(1.5, 3)


def test_a_ladder_has_as_many_rungs_and_shares_as_are_written():
    built = build_repair("ladder:rungs=1.4/10..2.3/12,accept=0.3..0.2..0.1,eta=1")
    assert built == Ladder(((1.4, 10), (2.3, 12)), accept=(0.3, 0.2, 0.1), eta=1.0)
    hints = {"rungs": [[1.5, 6]], "accept": [0.2], "flag": 0.45}  # as a card has them
    assert build_repair("ladder:accept=0.1", hints) == Ladder(((1.5, 6),), accept=(0.1,), flag=0.45)


def test_a_detector_is_built_from_text_with_its_fields():
    assert build_detector("variance", (0.0, 2.0)) == Variance((0.0, 2.0))
    assert build_detector("variance:window=0.1..3", (0.0, 2.0)) == Variance((0.1, 3.0))
    built = build_detector("rods_index:v=score,window=0.2..1.5,over=max", (0.0, 2.0))
    assert built == RodsIndex((0.2, 1.5), v="score", over="max")
    assert fitted_options("variance:window=0.1..3") == {}
    assert fitted_options("combined:parts=variance+gray")["parts"] == ("variance", "gray")
    assert fitted_options("probe:sigmas=0.5..1..2,strength=0.1") == {
        "file": "",
        "sigmas": (0.5, 1.0, 2.0),
        "strength": 0.1,
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("varience", "did you mean 'variance'"),
        ("variance:windw=0..1", "did you mean 'window'"),
        ("variance:window=2..1", "0 <= low <= high"),
        ("variance:window=2", "window must be like 0.0..1.0, got '2'"),
        ("rods_index:v=slope", "v of RodsIndex"),
        ("probe:file=a,strength=2", "give file alone"),
        ("probe:strength=0", "numbers > 0"),
        ("probe:sigmas=a", "sigmas must be like 0.8..2.0"),
        ("combined:parts=varience", "part of a combination 'varience': did you mean 'variance'"),
        ("combined:window=0..1", "unknown field of detector combined 'window'"),
    ],
)
def test_a_detector_that_makes_no_sense_is_refused(text, told):
    with pytest.raises(FanalError, match=told):
        check_detector(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rdo", "did you mean 'redo'"),
        ("redo:kapa=1", "did you mean 'kappa'"),
        ("redo:window=3", "must be like"),
        ("redo:window=5..1", "low <= high"),
        ("renoise:rounds=2.5", "must be like"),
        ("renoise:rounds=0", "rounds in"),
        ("ladder:rungs=2.3", "rungs must be like 2.3/12..4.4/14"),
        ("ladder:rungs=2.3/1", "steps > 1"),
    ],
)
def test_a_repair_that_makes_no_sense_is_refused(text, told):
    with pytest.raises(FanalError, match=told):
        build_repair(text)


@pytest.mark.parametrize("value", [1, 0.5, -3, 10**400])
def test_a_finite_number_is_one(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, [1], float("nan"), float("inf"), -float("inf")])
def test_what_is_no_finite_number_is_none(value):
    assert not is_number(value)
