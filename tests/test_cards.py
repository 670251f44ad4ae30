"""Cards: how they are made, and whether those of the embedded models are true."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import fanal
from fanal import cards, metrics
from fanal.config import build_schedule
from fanal.datasets import DATASETS
from fanal.errors import FanalError
from fanal.generation import SampleConfig, generate
from fanal.hallucination import Calibration
from fanal.hallucination.detectors import FREE
from fanal.loading import card, embedded
from fanal.nets import read_card
from fanal.recipes import Recipe
from fanal.seeding import noise
from fanal.solvers import Euler
from toys import record, samples, tiny

SHIPPED = embedded()
JUDGED = [name for name in SHIPPED if "hallucination" in card(name)]
FOLDER = Path(fanal.__file__).parent / "models"


# How a card is made


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A random network on the plane with a card of 64 samples."""
    path = tmp_path_factory.mktemp("judged") / "model"
    tiny(path, shape=(2,), card={"recipe": {"data": "grid2"}, "parameters": 1234})
    return path, cards.evaluate_model(path, count=64)


def test_a_card_says_what_the_report_seeds_say(judged):
    path, about = judged
    assert read_card(path) == json.loads(json.dumps(about))
    seeds = range(cards.REPORT_SEED, cards.REPORT_SEED + 64)
    model = fanal.load(str(path))
    x = fanal.sample(model, noise((2,), seeds, 80.0), build_schedule("polynomial", 40, 0.002, 80.0), Euler())
    codes = DATASETS["grid2"].verify(x)
    wanted = metrics.rate(codes != 0)
    figure = about["hallucination"]
    assert (figure["value"], figure["se"], figure["n"]) == (wanted.value, wanted.se, 64)
    assert figure["first_seed"] == cards.REPORT_SEED
    assert figure["verdicts"] == {
        name: pytest.approx(float((codes == k).double().mean()), abs=1e-6)
        for k, name in enumerate(DATASETS["grid2"].verdicts)
        if bool((codes == k).any())
    }
    assert sum(figure["verdicts"].values()) == pytest.approx(1, abs=1e-5)


def test_a_card_keeps_the_better_detector_and_its_datas_hints(judged):
    _, about = judged
    found = Calibration.from_dict(about["calibration"])
    assert found.fits("euler", build_schedule("polynomial", 40, 0.002, 80.0))
    assert (found.count, found.flag, about["flag"]) == (64, 0.05, 0.05)
    assert about["repair"]["renoise"] == {"sigma": 1.5, "rounds": 4}
    assert about["summary"] == "MLP on grid2, 1,234 parameters"
    model = fanal.load(str(judged[0]))
    others = cards._calibrations(model, DATASETS["grid2"], 64, 0.05, "cpu", lambda items, what: items)
    assert set(others) == set(FREE) >= {"variance", "last_slope", "path_length"}
    assert found.auc == max(other.auc for other in others.values())


def test_judging_leaves_the_weights_alone(tmp_path):
    path = tmp_path / "model"
    tiny(path, card={"recipe": {"data": "digits8"}, "parameters": 1})
    before = (path / "model.safetensors").read_bytes()
    about = cards.evaluate_model(path, count=8)
    assert (path / "model.safetensors").read_bytes() == before
    assert "hallucination" not in about  # nothing knows a wrong digit
    assert about["calibration"]["detector"] == "variance"
    assert about["calibration"]["auc"] is None


def test_a_card_needs_enough_samples(tmp_path):
    tiny(tmp_path / "model")
    with pytest.raises(FanalError, match="at least 8 samples, got 7"):
        cards.evaluate_model(tmp_path / "model", count=7)


# The embedded models


def test_the_models_that_are_promised_are_there():
    assert {"grid2", "shapes32", "hands32", "digits8"} <= set(SHIPPED)


def test_all_models_together_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12 * 2**20


@pytest.mark.parametrize("name", SHIPPED)
def test_an_embedded_model_is_what_its_card_says(name):
    about, model = card(name), fanal.load(name)
    recipe = Recipe.from_dict(about["recipe"])
    data = DATASETS[recipe.data]
    assert model.shape == data.shape
    assert (model.sigma_min, model.sigma_max) == (recipe.sigma_min, recipe.sigma_max)
    assert (about["seed"], about["iterations"], about["data"]) == (recipe.seed, recipe.iterations, data.name)
    assert about["seconds"] > 0
    assert 0 < about["loss"]["last_200"] < about["loss"]["first_200"]
    assert about["parameters"] == sum(v.numel() for v in model.denoiser.parameters())
    assert sorted(path.name for path in (FOLDER / name).iterdir()) == ["model.json", "model.safetensors"]
    if data.verdicts:
        figure = about["hallucination"]
        assert 0 < figure["se"] < 0.03
        assert figure["n"] >= 512
        assert figure["first_seed"] in (
            2**41,
            cards.REPORT_SEED,
        )  # older cards are from before anything was tuned there
        assert 1 - figure["verdicts"]["ok"] == pytest.approx(figure["value"], abs=1e-5)
    json.dumps(about, allow_nan=False)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_calibration_of_an_embedded_model_fits_the_default_run(name):
    model, found = fanal.load(name), Calibration.from_dict(card(name)["calibration"])
    assert found.fits("euler", build_schedule("polynomial", 40, model.sigma_min, model.sigma_max))
    assert not found.fits("heun", build_schedule("polynomial", 40, model.sigma_min, model.sigma_max))
    assert found.flag == card(name)["flag"]
    assert found.evaluations == 40 * found.count


@pytest.mark.parametrize("name", SHIPPED)
def test_an_embedded_model_denoises(name):
    # At a small sigma it returns real data with less noise than it got; at a large one, about the mean of the data.
    model, data = fanal.load(name), DATASETS[card(name)["data"]]
    real = data.data("held out", 64).x
    sigma = torch.tensor(0.1 * float(real.std()))
    noisy = real + noise(model.shape, range(64), sigma)
    assert float((model(noisy, sigma) - real).square().mean()) < 0.7 * float(sigma) ** 2
    far = model(noise(model.shape, range(64), 80.0), torch.tensor(80.0)).mean(0)
    mean = data.data("train", 1000).x.mean(0)
    assert float((far - mean).square().mean()) < 0.15 * float(real.var())


def test_an_embedded_conditional_model_draws_the_class_it_is_asked_for():
    assert [name for name in SHIPPED if card(name)["recipe"]["conditional"]] == ["digits8"]
    digits = DATASETS["digits8"].data("train")
    grid, right = build_schedule("polynomial", 18, 0.002, 80.0), 0
    for label in range(10):
        x = fanal.sample(fanal.load("digits8", labels=label), noise((1, 8, 8), range(8), 80.0), grid, Euler())
        nearest = torch.cdist(x.flatten(1), digits.x.flatten(1)).argmin(1)
        right += int((digits.labels[nearest] == label).sum())
    assert right >= 60  # of 80; chance gives 8 ± 2.7


def agrees(found, figure, errors=3):
    """Whether two independent figures are within some combined standard errors of each other."""
    return abs(found.value - figure["value"]) <= errors * math.hypot(found.se, figure["se"])


@pytest.fixture(scope="module")
def hands(tmp_path_factory):
    """256 fresh hands, watched, flagged and redone."""
    out = tmp_path_factory.mktemp("hands") / "run"
    return generate(SampleConfig("hands32", count=256, seed=5, block=64, guard=("redo",)), out)


def test_fresh_hands_go_wrong_as_often_as_the_card_says(hands):
    wrong = samples(hands)["verdict"] != 0
    figure = card("hands32")["hallucination"]
    assert agrees(metrics.rate(wrong), figure)
    assert 0.10 <= figure["value"] <= 0.25  # what a benchmark of repairs needs


def test_the_detector_finds_them_as_well_as_the_card_says(hands):
    found, about = samples(hands), card("hands32")
    area = metrics.auc(found["risk"], found["verdict"] != 0)
    assert agrees(area, {"value": about["detection"]["auc"], "se": about["detection"]["se"]})
    assert agrees(area, {"value": about["calibration"]["auc"], "se": about["calibration"]["auc_se"]})
    assert about["detection"]["auc"] - 5 * about["detection"]["se"] > 0.5
    assert record(hands)["results"]["calibration"]["threshold"] == about["calibration"]["threshold"]
    assert record(hands)["network"]["calibration"] == 0


def test_the_threshold_flags_about_the_asked_share_of_fresh_samples(hands):
    flagged = metrics.rate(samples(hands)["flagged"].bool())
    assert abs(flagged.value - 0.35) <= 3 * math.hypot(flagged.se, math.sqrt(0.35 * 0.65 / 1024))


def test_redoing_the_flagged_hands_mends_some(hands):
    # Paired over 256 fixed seeds; the change is at least 3 standard errors below none (chance: 1 in 700).
    found = samples(hands)
    before, after = found["verdict"] != 0, found["verdict.redo"] != 0
    change = metrics.paired_rate(before, after)
    assert change.value + 2 * change.se < 0  # by chance once in 44
    untouched = ~found["flagged"].bool()
    assert torch.equal(found["x"][untouched], found["before"][untouched])


def test_fresh_points_leave_the_grid_as_often_as_the_card_says():
    model, about, seeds = fanal.load("grid2"), card("grid2"), range(7_000_000, 7_004_000)
    x = fanal.sample(model, noise((2,), seeds, 80.0), build_schedule("polynomial", 40, 0.002, 80.0), Euler())
    assert agrees(metrics.rate(DATASETS["grid2"].verify(x) != 0), about["hallucination"])
    assert about["calibration"]["detector"] == "last_slope"


@pytest.mark.slow
@pytest.mark.parametrize("name", JUDGED)
def test_fresh_samples_of_every_model_go_wrong_as_often_as_its_card_says(name, tmp_path):
    out = generate(SampleConfig(name, count=1024, seed=6, block=64, guard=("redo", "renoise")), tmp_path / "run")
    found, about = samples(out), card(name)
    wrong = found["verdict"] != 0
    assert agrees(metrics.rate(wrong), about["hallucination"])
    if about.get("detection"):
        told = {"value": about["detection"]["auc"], "se": about["detection"]["se"]}
        assert agrees(metrics.auc(found["risk"], wrong), told)
    for repair in ("redo", "renoise"):
        change = metrics.paired_rate(wrong, found[f"verdict.{repair}"] != 0)
        assert change.value + 2 * change.se < 0  # by chance once in 44
