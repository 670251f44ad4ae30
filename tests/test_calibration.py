"""Calibration: the share it flags, the seeds it uses, what it holds for, and what it refuses to read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fanal import cards, generation, metrics, preparation
from fanal.datasets import DATASETS
from fanal.errors import FanalError
from fanal.hallucination import Calibration, calibrate, watch
from fanal.hallucination.calibration import FIRST_SEED, threshold_at
from fanal.hallucination.detectors import last_window
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import Churn, Euler
from toys import blurred, mixture

GRID = polynomial(16)
WINDOW = last_window(GRID)


def verify(x):
    return DATASETS["grid2"].verify(x) != 0


def run(**changes):
    options = {"solver_name": "euler", "count": 100, "block": 32, "verify": verify, **changes}
    solver = options.pop("solver", Euler())
    return calibrate(blurred(), GRID, solver, options.pop("detector", "last_slope"), WINDOW, **options)


@pytest.mark.parametrize("flag", [0.05, 0.35, 0.8])
@pytest.mark.parametrize("detector", ["variance", "last_slope"])
def test_the_threshold_flags_the_asked_share_of_the_calibration_seeds(flag, detector):
    found = run(flag=flag, detector=detector)
    seeds = range(FIRST_SEED, FIRST_SEED + 100)
    risk = watch(blurred(), noise((2,), seeds, 80.0), GRID, Euler(), found.build(), seeds).risk
    assert float((risk > found.threshold).double().mean()) == pytest.approx(flag, abs=1 / 100)
    assert (found.count, found.flag, found.first_seed, found.window) == (100, flag, FIRST_SEED, WINDOW)


def test_its_figures_are_those_of_its_own_seeds():
    found = run(detector="variance")
    seeds = range(FIRST_SEED, FIRST_SEED + 100)
    outcome = watch(blurred(), noise((2,), seeds, 80.0), GRID, Euler(), found.build(), seeds)
    wrong = verify(outcome.x)
    area = metrics.auc(outcome.risk, wrong)
    assert found.auc == pytest.approx(area.value, abs=1e-6)
    assert found.auc_se == pytest.approx(area.se, abs=1e-6)
    assert found.wrong == float(wrong.double().mean())
    assert found.caught == pytest.approx(float((outcome.risk[wrong] > found.threshold).double().mean()))
    assert found.evaluations == 100 * 16


def test_blocks_and_progress_change_nothing_but_rounding():
    seen = []

    def progress(items):
        seen.extend(items := list(items))
        return items

    one, two = run(block=100), run(block=7, progress=progress)
    assert one.threshold == pytest.approx(two.threshold, rel=1e-4)
    assert len(seen) == 15


def test_a_stochastic_solver_is_calibrated_with_its_noise():
    found = run(solver=Churn(), solver_name="churn")
    assert found.solver == "churn"
    assert found.evaluations == 100 * 31
    assert found.threshold != run().threshold


def test_without_a_verifier_nothing_is_claimed():
    found = run(verify=None)
    assert (found.auc, found.auc_se, found.caught, found.wrong) == (None, None, None, None)


@pytest.mark.parametrize("wrong", [[], [0], list(range(100))])
def test_with_one_kind_alone_the_figures_are_absent_and_still_json(wrong):
    left = iter([b in wrong for b in range(100)])
    found = run(verify=lambda x: torch.tensor([next(left) for _ in x]))
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.auc_se is None
    assert (found.auc is None) == (len(wrong) != 1)
    assert found.wrong == len(wrong) / 100


def test_no_seed_of_a_run_is_ever_a_seed_of_a_calibration_or_of_a_card():
    last = (FIRST_SEED // preparation.SEED_STRIDE) - 1
    for seed in (0, 1, last):
        seeds = preparation.SampleConfig("hands32", seed=seed, count=preparation.SEED_STRIDE).seeds()
        assert seeds.stop <= FIRST_SEED
    with pytest.raises(FanalError, match="seed must be in"):
        preparation.SampleConfig("hands32", seed=last + 1)
    assert FIRST_SEED + 2**32 < cards.REPORT_SEED


def test_the_seeds_that_are_used_are_the_ones_that_are_told(tmp_path, monkeypatch):
    used, philox = set(), np.random.Philox

    def spy(key):
        used.add(int(key[0]))
        return philox(key=key)

    monkeypatch.setattr("numpy.random.Philox", spy)
    config = preparation.SampleConfig("python:toys:blurred", steps=8, count=6, block=4, seed=3, guard=("redo",))
    generation.generate(config, tmp_path / "run")
    assert used == {*range(3_000_000, 3_000_006), *range(FIRST_SEED, FIRST_SEED + 256)}


def test_it_fits_its_own_solver_and_grid_and_no_other():
    found = run()
    assert found.fits("euler", GRID)
    assert not found.fits("heun", GRID)
    assert not found.fits("churn:s_churn=20", GRID)
    for other in (polynomial(17), polynomial(16, rho=5), polynomial(16, zero=False), logsnr(16), GRID[1:]):
        assert not found.fits("euler", other)
    nearly = GRID.clone()
    nearly[7] *= 1 + 1e-6
    assert not found.fits("euler", nearly)


def test_it_survives_a_card():
    found = run()
    text = json.dumps(found.to_dict(), allow_nan=False)
    again = Calibration.from_dict(json.loads(text))
    assert again == found
    assert again.fits("euler", GRID)
    assert again.build() == found.build()


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": float("nan")},
        {"threshold": "0.5"},
        {"threshold": None},
        {"threshold": float("inf")},
        {"detector": "os.system"},
        {"detector": ["variance"]},
        {"window": 3},
        {"window": [0.0]},
        {"window": [0.0, "x"]},
        {"sigmas": []},
        {"sigmas": [1.0, 2.0, 1.5]},
        {"sigmas": "many"},
        {"count": "256"},
        {"solver": 7},
        {"auc": "high"},
        {"surprise": 1},
        {"flag": None},
    ],
)
def test_a_hostile_card_is_refused(change):
    with pytest.raises(FanalError, match="the model's card holds no readable calibration"):
        Calibration.from_dict({**run().to_dict(), **change})


@pytest.mark.parametrize("value", [{}, [], "variance", None, {"threshold": 1.0}])
def test_what_is_no_calibration_is_refused(value):
    with pytest.raises(FanalError, match="no readable calibration"):
        Calibration.from_dict(value)


@pytest.mark.parametrize("flag", [0.0, 1.0, -0.5, 35, float("nan")])
def test_a_share_that_is_none_is_refused(flag):
    with pytest.raises(FanalError, match="strictly between 0 and 1"):
        threshold_at(torch.arange(10.0), flag)


def test_the_true_denoiser_leaves_little_to_find():
    # The closed form itself goes wrong where 16 Euler steps are too few; the stand-in network far more often.
    seeds = range(300)
    rates = []
    for model in (mixture(), blurred()):
        x = watch(model, noise((2,), seeds, 80.0), polynomial(40), Euler(), run().build(), seeds).x
        rates.append(metrics.rate(verify(x)))
    assert rates[0].value + 5 * rates[0].se < rates[1].value - 5 * rates[1].se
