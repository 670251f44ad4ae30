"""How a run of `fanal sample` is watched: the card's calibration, or what its grid allows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import generated
from fanal.detecting import detector_of
from fanal.errors import FanalError
from fanal.generation import SampleConfig, generate
from fanal.hallucination import LastSlope, Variance, watch
from fanal.hallucination.detectors import Contrast, last_window
from fanal.preparation import prepare
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Euler
from generated import SMALL
from toys import logged, record, samples, tiny

# Fixtures
the_toys_count_only_where_asked = generated.the_toys_count_only_where_asked


def test_a_model_without_a_card_is_watched_by_the_variance_over_the_last_part(tmp_path):
    config = dataclasses.replace(SMALL, model="python:toys:logged", block=22)
    seeds, grid = config.seeds(), polynomial(8)
    eye = Variance(last_window(grid))
    wanted = watch(logged(), noise((2,), seeds, 80.0), grid, Euler(), eye, seeds)
    found = samples(generate(config, tmp_path / "run"))
    assert torch.equal(found["risk"], wanted.risk)
    assert torch.equal(found["per_step"], wanted.per_step.T)
    assert "verdict" not in found


@pytest.mark.parametrize(
    ("sigmas", "named"),
    [
        ([80.0, 0.8, 0.5, 0.0], Variance((0.0, 0.9))),  # two steps in the tuned window
        ([80.0, 5.0, 0.5, 0.0], Variance((0.0, 5.0))),  # one: the last part of the grid
        ([80.0, 0.0], LastSlope()),
        ([math.inf, 80.0, 5.0, 0.0], Variance((0.0, 80.0))),
        ([math.inf, 5.0, 0.0], LastSlope()),  # one that has a state
        ([math.inf, 0.0], Contrast()),
    ],
)
def test_a_run_without_a_threshold_is_watched_by_what_its_grid_allows(sigmas, named):
    setup, _ = prepare(SampleConfig(model="hands32", steps=3))
    grid = torch.tensor(sigmas, dtype=torch.float64)
    assert detector_of(dataclasses.replace(setup, sigmas=grid, detector="variance")) == named
    if sigmas[0] < math.inf:
        x = noise(setup.network.shape, range(2), sigmas[0])
        assert (watch(setup.network, x, grid, setup.solver, named, range(2)).risk > 0).all()


def test_a_detector_that_was_asked_for_says_what_it_lacks(tmp_path):
    with pytest.raises(FanalError, match="trajectory variance needs two steps"):
        generate(dataclasses.replace(SMALL, steps=1, detector="variance"), tmp_path / "run")


def test_a_card_that_fits_is_used_and_another_solver_says_so_and_recalibrates(tmp_path):
    from fanal.hallucination import calibrate
    from fanal.nets import load_model

    path = tmp_path / "model"
    tiny(path, shape=(3,))
    grid = polynomial(8)
    found = calibrate(
        load_model(path), grid, Euler(), "variance", last_window(grid), solver_name="euler", count=16, flag=0.5
    )
    tiny(path, shape=(3,), card={"calibration": found.to_dict(), "flag": 0.5})
    config = dataclasses.replace(SMALL, model=str(path), guard=("redo",))
    told = []
    used = record(generate(config, tmp_path / "a", say=told.append))
    assert used["results"]["calibration"] == {**found.to_dict(), "window": list(found.window), "sigmas": grid.tolist()}
    assert used["network"]["calibration"] == 0  # paid for when the card was made
    assert told == []
    for k, change in enumerate(({"solver": "heun"}, {"steps": 9}, {"flag": 0.2}, {"sigma_max": 70.0})):
        told = []
        again = record(generate(dataclasses.replace(config, **change), tmp_path / f"b{k}", say=told.append))
        assert again["results"]["calibration"]["count"] == 256
        assert again["network"]["calibration"] == again["results"]["calibration"]["evaluations"] > 0
        assert again["results"]["calibration"]["flag"] == change.get("flag", 0.5)
        assert ["calibrating on other seeds" in line for line in told] == [True]


@pytest.mark.parametrize(
    "card",
    [
        {"data": ["hands32"]},
        {"flag": "0.5"},
        {"flag": 35},
        {"repair": "rm"},
        {"repair": {"redo": 3}},
        {"repair": {"redo": {"kappa": "x"}}},
        {"repair": {"redo": {"window": [1]}}},
        {"calibration": {"detector": "variance"}},
        {"calibration": 3},
    ],
)
def test_a_hostile_card_is_refused(tmp_path, card):
    tiny(tmp_path / "model", card=card)
    config = dataclasses.replace(SMALL, model=str(tmp_path / "model"), guard=("redo",))
    with pytest.raises(FanalError, match="card"):
        generate(config, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
