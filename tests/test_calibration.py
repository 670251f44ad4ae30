"""Calibration: the share it flags, the seeds it uses, what it holds for, and what it refuses to read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fanal import cards, generation, metrics, preparation
from fanal.datasets import DATASETS
from fanal.errors import FanalError
from fanal.hallucination import Calibration, calibrate, watch
from fanal.hallucination.calibration import (
    FIRST_SEED,
    WINDOWS,
    calibrate_each,
    labelled,
    settle,
    threshold_at,
    threshold_for,
    window_of,
)
from fanal.hallucination.detectors import build, last_window
from fanal.hallucination.thresholds import interval
from fanal.schedules import logsnr, polynomial
from fanal.seeding import SEED_STRIDE, noise
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
    last = (FIRST_SEED // SEED_STRIDE) - 1
    for seed in (0, 1, last):
        seeds = preparation.SampleConfig("hands32", seed=seed, count=SEED_STRIDE).seeds()
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


# Thresholds for a wanted rate, and labels of a person

RISKS = st.lists(st.tuples(st.integers(0, 15), st.booleans()), min_size=1, max_size=50)
SHARES = st.floats(0.02, 0.98)


def batch(pairs):
    return torch.tensor([float(a) for a, _ in pairs]).double(), torch.tensor([b for _, b in pairs])


@given(RISKS, SHARES)
@settings(max_examples=80, deadline=None)
def test_the_threshold_catches_the_wanted_share_and_no_higher_one_does(pairs, tpr):
    risk, wrong = batch(pairs)
    if not wrong.any():
        with pytest.raises(FanalError, match="none of .* is labelled wrong"):
            threshold_for(risk, wrong, tpr=tpr)
        return
    found = threshold_for(risk, wrong, tpr=tpr)
    high = risk[wrong]
    assert found.caught.value == float((high > found.value).double().mean()) >= tpr - 1e-9
    above = high[high > found.value].min()  # the least that is caught: a threshold there catches fewer
    assert float((high > above).double().mean()) < tpr
    assert found.flagged.value == pytest.approx(float((risk > found.value).double().mean()))


@given(RISKS, SHARES)
@settings(max_examples=80, deadline=None)
def test_the_threshold_disturbs_no_more_than_the_wanted_share_and_no_lower_one_does(pairs, fpr):
    risk, wrong = batch(pairs)
    if wrong.all():
        with pytest.raises(FanalError, match="none of .* is labelled right"):
            threshold_for(risk, wrong, fpr=fpr)
        return
    found = threshold_for(risk, wrong, fpr=fpr)
    low = risk[~wrong]
    assert found.alarms.value == float((low > found.value).double().mean()) <= fpr + 1e-9
    below = torch.nextafter(torch.tensor(found.value).double(), torch.tensor(-1.0).double())
    assert float((low > below).double().mean()) > fpr - 1e-9


def test_the_threshold_for_a_share_to_flag_is_the_quantile():
    risk = torch.rand(101, generator=torch.Generator().manual_seed(0)).double()
    found = threshold_for(risk, flag=0.3)
    assert found.value == threshold_at(risk, 0.3)
    assert (found.caught, found.alarms) == (None, None)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("rate", ["tpr", "fpr"])
def test_the_interval_of_a_threshold_holds_the_true_one_as_often_as_it_says(rate):
    # 150 sets of 50; at 95 % the share covered has a standard error of 1.8 %: four of them below
    covered, share = 0, 0.3
    for seed in range(150):
        risk = torch.rand(50, generator=torch.Generator().manual_seed(seed)).double()
        found = threshold_for(risk, torch.full((50,), rate == "tpr"), **{rate: share})
        covered += found.low <= 1 - share <= found.high
    assert covered / 150 > 0.95 - 4 * 0.018
    few = threshold_for(torch.tensor([1.0, 2.0]).double(), flag=0.1)
    assert (few.low, few.high) == (1.0, float("inf"))


def test_shares_have_exact_intervals():
    none = interval(torch.zeros(10, dtype=torch.bool))
    assert (none.value, none.low, none.n) == (0.0, 0.0, 10)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 10))  # no hit in ten throws
    assert interval(torch.zeros(0, dtype=torch.bool)) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "set by one rate, tpr, fpr or flag, got none"),
        ({"tpr": 0.5, "flag": 0.5}, "set by one rate"),
        ({"tpr": 1.0}, "the caught share must be strictly between 0 and 1"),
        ({"fpr": 0.0}, "the false-alarm share"),
        ({"tpr": 0.5, "wrong": None}, "label more samples, or set the share to flag"),
        ({"flag": 0.5, "wrong": torch.zeros(3)}, "over the same samples, got 5 and 3"),
        ({"flag": 0.5, "risk": torch.tensor([1.0, float("nan")])}, "none of them NaN"),
    ],
)
def test_a_rate_that_cannot_be_had_is_told(options, words):
    given = {"risk": torch.arange(5.0), "wrong": torch.ones(5), **options}
    if "risk" in options:
        given["wrong"] = None
    with pytest.raises(FanalError, match=words):
        threshold_for(given.pop("risk"), given.pop("wrong"), **given)


def test_a_persons_labels_set_the_threshold_like_a_rules():
    rule = run(detector="variance", tpr=0.8)
    seeds = range(FIRST_SEED, FIRST_SEED + 100)
    outcome = watch(blurred(), noise((2,), seeds, 80.0), GRID, Euler(), rule.build(), seeds)
    told = dict(enumerate(verify(outcome.x).long().tolist()))
    rows, codes = labelled(told, 100)
    found = settle(
        rule.build(), outcome.risk[rows], codes, solver_name="euler", sigmas=GRID, first_seed=FIRST_SEED, tpr=0.8
    )
    assert found.threshold == pytest.approx(rule.threshold, rel=1e-4)
    assert (found.caught, found.wrong, found.alarms) == (rule.caught, rule.wrong, rule.alarms)
    assert found.caught >= 0.8
    assert found.caught_ci[0] < found.caught < found.caught_ci[1]
    assert found.alarms_ci[0] < found.alarms < found.alarms_ci[1]
    assert found.flag == pytest.approx(float((outcome.risk > found.threshold).double().mean()), abs=0.011)
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_only_what_was_labelled_counts_and_any_kind_of_wrong_is_wrong():
    rows, codes = labelled({7: 3, 2: 0, 4: None, 0: True, 5: False}, 8)
    assert (rows.tolist(), codes.tolist()) == ([0, 2, 5, 7], [1, 0, 0, 3])
    assert labelled({}, 8)[0].shape == (0,)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({8: 1}, "labels name the samples 0 to 7, got 8"),
        ({"3": 1}, "labels name the samples 0 to 7, got '3'"),
        ({True: 1}, "labels name the samples"),
        ({3: "hand"}, "the label of sample 3 must be a whole number, 0 for right, got 'hand'"),
        ({3: 0.5}, "must be a whole number"),
    ],
)
def test_labels_that_are_none_are_refused(labels, words):
    with pytest.raises(FanalError, match=words):
        labelled(labels, 8)


def test_detectors_with_options_are_calibrated_and_rebuilt():
    found = run(detector="rods_index", options={"v": "score", "rho": 0.2}, count=32)
    assert found.build() == build("rods_index", WINDOW, v="score", rho=0.2)
    inside = sum(WINDOW[0] <= sigma <= WINDOW[1] for sigma in GRID[:-1].tolist())
    assert found.evaluations == 32 * (16 + 2 * inside)
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.build() == found.build()
    for options in ({"v": "speed"}, {"row": 1}, 7, [1]):
        with pytest.raises(FanalError, match="no readable calibration"):
            Calibration.from_dict({**found.to_dict(), "options": options})


def test_all_detectors_are_calibrated_in_one_run():
    eyes = {name: build(name, WINDOW) for name in ("variance", "path_length", "last_slope")}
    found = calibrate_each(
        blurred(), GRID, Euler(), eyes, solver_name="euler", count=100, block=32, verify=verify, fpr=0.1
    )
    for name, one in found.items():
        alone = run(detector=name, fpr=0.1)
        assert (one.threshold, one.auc, one.alarms) == (alone.threshold, alone.auc, alone.alarms)
        assert one.alarms <= 0.1
        assert one.build() == eyes[name]


def test_windows_are_those_of_the_data_or_the_last_part_of_the_grid():
    for data, some in WINDOWS.items():
        assert data in DATASETS
        for name, window in some.items():
            assert window_of(name, polynomial(40), data) == window
            assert build(name, window).window == window
    assert window_of("variance", GRID) == window_of("last_slope", GRID, "grid2") == WINDOW
