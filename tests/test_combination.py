"""Combinations of detectors: what the fit finds, how honest its figure is, and that files are only read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import fanal
from fanal import metrics
from fanal.datasets import DATASETS
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.hallucination import Calibration, Renoise, calibrate, combination, watch
from fanal.hallucination.calibration import settle
from fanal.hallucination.detectors import Combined, LastSlope, Part, Variance, build, describe
from fanal.hallucination.observation import observe, observe_block
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Churn, Euler, Heun
from toys import blurred

GRID, COUNT = polynomial(16), 24
EYES = {"variance": Variance((0.0, 0.9)), "last_slope": LastSlope()}
ASKING = {**EYES, "jacobian": build("jacobian", (0.1, 1.0))}


def verify(x):
    return DATASETS["grid2"].verify(x)


def start():
    return noise((2,), range(COUNT), 80.0, dtype=torch.float64)


def combined(eyes):
    parts = [Part(eye, 1e-6, -2.0 + k, 0.5 + k, (-1.0) ** k) for k, eye in enumerate(eyes.values())]
    return Combined(tuple(parts), 0.3)


def simulated(count, weights, seed=0, bias=-1.0):
    """Log-normal risks and labels drawn from a logistic regression on their logarithms."""
    generator = torch.Generator().manual_seed(seed)
    logs = torch.randn(count, len(weights), generator=generator).double()
    odds = bias + logs @ torch.tensor(weights).double()
    wrong = torch.rand(count, generator=generator).double() < odds.sigmoid()
    return {f"r{k}": (2.0 * logs[:, k] - 5 * k).exp() for k in range(len(weights))}, wrong, odds


def eyes(count):
    return {f"r{k}": Variance((0.0, 1.0 + k)) for k in range(count)}


def test_the_fit_finds_the_regression_that_made_the_labels():
    # the error of a coefficient is about 0.02 at this size
    risks, wrong, odds = simulated(20_000, [1.0, -0.5, 0.0])
    found = combination.fit(eyes(3), risks, wrong, strength=1e6)
    assert [part.weight for part in found.detector.parts] == pytest.approx([1.0, -0.5, 0.0], abs=0.1)
    assert [part.scale for part in found.detector.parts] == pytest.approx([2.0] * 3, rel=0.03)
    assert found.detector.intercept == pytest.approx(-1.0, abs=0.1)
    inside = found.detector.join([risks[f"r{k}"] for k in range(3)])
    assert float((inside.logit() - odds).abs().mean()) < 0.05
    best = metrics.auc(odds, wrong)
    assert abs(found.auc.value - best.value) < 4 * best.se


def test_its_figure_is_honest_where_there_is_nothing_to_find():
    # 20 risks that mean nothing: the fit to all samples flatters itself, the cross-validated figure does not
    inside, outside = [], []
    for seed in range(6):
        risks, _, _ = simulated(120, [0.0] * 20, seed)
        wrong = torch.rand(120, generator=torch.Generator().manual_seed(100 + seed)) < 0.3
        found = combination.fit(eyes(20), risks, wrong)
        own = found.detector.join([risks[f"r{k}"] for k in range(20)])
        inside.append(metrics.auc(own, wrong).value)
        outside.append(found.auc)
    assert min(inside) > 0.7
    errors = np.sqrt(np.mean([e.se**2 for e in outside]) / 6)
    assert abs(np.mean([e.value for e in outside]) - 0.5) < 4 * errors


def test_units_of_a_risk_do_not_matter():
    risks, wrong, _ = simulated(500, [1.0, 0.5])
    one = combination.fit(eyes(2), risks, wrong)
    two = combination.fit(eyes(2), {"r0": 1e6 * risks["r0"], "r1": risks["r1"] ** 3}, wrong)
    assert torch.allclose(one.risk, two.risk, rtol=1e-6)
    assert one.auc.value == two.auc.value


def test_it_does_better_than_each_part_on_samples_it_never_saw():
    risks, wrong, _ = simulated(1000, [1.0, 1.0], seed=3)
    found = combination.fit(eyes(2), risks, wrong)
    fresh, truth, _ = simulated(4000, [1.0, 1.0], seed=4)
    whole = metrics.auc(found.detector.join([fresh["r0"], fresh["r1"]]), truth)
    assert abs(whole.value - found.auc.value) < 4 * np.hypot(whole.se, found.auc.se)
    for risk in fresh.values():
        alone = metrics.auc(risk, truth)
        assert whole.value - alone.value > 4 * np.hypot(whole.se, alone.se)


@pytest.mark.parametrize("solver", [Euler(), Heun(), Churn()])
def test_its_risk_is_the_formula_on_its_parts_risks(solver):
    detector, seeds = combined(ASKING), range(COUNT)
    both = observe_block(blurred(), start(), GRID, solver, {**ASKING, "all": detector}, seeds)
    odds = 0.3 + sum(
        (-1.0) ** k * (both.risks[name].clamp(min=1e-6).log() + 2 - k) / (0.5 + k) for k, name in enumerate(ASKING)
    )
    assert torch.allclose(both.risks["all"], 1 / (1 + (-odds).exp()), rtol=1e-9)
    steps = both.per_step["all"]
    assert torch.equal(steps[-1], both.risks["all"])
    blind = next(i for i, step in enumerate(both.per_step["variance"]) if (step > 0).any())
    assert (steps[:blind] == 0).all()
    assert (steps[blind:] > 0).all()


def test_it_is_a_detector_like_any_other():
    detector, model = combined(ASKING), Counted(blurred())
    assert (detector.free, combined(EYES).free) == (False, True)
    assert detector.window == (0.0, 1.0)
    first = watch(model, start(), GRID, Euler(), detector, range(COUNT))
    asked = sum(0.1 <= sigma <= 1.0 for sigma in GRID.tolist())
    assert model.calls == 16 + asked
    after = Renoise(1.5, 2).repair(model, start(), GRID, Euler(), detector, range(COUNT), first, 0.5)
    assert (after.risk <= first.risk).all()
    with pytest.raises(FanalError, match="a part of the combination asks the network itself"):
        detector.start()
    assert combined(EYES).start() is not None


def test_it_is_calibrated_and_kept_on_a_card():
    made = combined(EYES)
    risk = torch.arange(40.0).double() / 40
    found = settle(made, risk, risk > 0.5, solver_name="euler", sigmas=GRID, first_seed=7)
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again == found
    assert again.build() == made
    what = describe(made)
    run = calibrate(
        blurred(),
        GRID,
        Euler(),
        "combined",
        made.window,
        options=what["options"],
        solver_name="euler",
        count=40,
        verify=verify,
    )
    seen = watch(blurred(), noise((2,), range(2**40, 2**40 + 40), 80.0), GRID, Euler(), made, range(40))
    assert run.auc == pytest.approx(metrics.auc(seen.risk, verify(seen.x) != 0).value, abs=1e-6)


def test_from_seeds_to_a_file_and_back(tmp_path):
    seen = observe(blurred(), GRID, Euler(), EYES, range(300), block=100, verify=verify)
    found = combination.fit(EYES, seen.risks, seen.wrong)
    path = tmp_path / "detector.json"
    combination.save(path, found.detector, {"auc": found.auc.value})
    again = combination.load(path)
    assert again == found.detector
    assert json.loads(path.read_text())["about"] == {"auc": found.auc.value}
    other = watch(blurred(), start(), GRID, Euler(), again, range(COUNT)).risk
    assert torch.equal(other, watch(blurred(), start(), GRID, Euler(), found.detector, range(COUNT)).risk)
    combination.save(path, Variance((0.0, 1.0)))
    assert combination.load(path) == Variance((0.0, 1.0))


HOSTILE = [
    ("format", "fanal-model-1", "not a detector that fanal wrote"),
    ("detector", "os.system", "unknown detector 'os.system'"),
    ("detector", ["combined"], "unknown detector"),
    ("window", [0.0], "no readable detector"),
    ("options", {"parts": [], "intercept": 0.0}, "1 to 64 parts"),
    ("options", {"parts": "many", "intercept": 0.0}, "no readable combination"),
    ("options", {"parts": [{}], "intercept": 0.0}, "no readable combination"),
    ("options", {"parts": [{}] * 65, "intercept": 0.0}, "no readable combination"),
    ("options", {"intercept": 0.0}, "no readable combination"),
    ("options", {"surprise": 1}, "combined has no option 'surprise'"),
    ("options", 7, "no readable detector"),
]


@pytest.mark.parametrize(("key", "value", "words"), HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, key, value, words):
    path = tmp_path / "detector.json"
    combination.save(path, combined(EYES))
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(FanalError, match=words):
        combination.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": float("nan")},
        {"weight": "1"},
        {"scale": 0.0},
        {"floor": 0.0},
        {"center": None},
        {"detector": "combined"},
        {"window": [2.0, 1.0]},
        {"window": [float("nan"), 1.0]},
        {"options": {"rho": 1.0}},
        {"options": None},
    ],
)
def test_a_hostile_part_is_refused(change):
    what = combined(EYES).to_dict()
    what["parts"][0] = {**what["parts"][0], **change}
    with pytest.raises(FanalError):
        Combined.from_dict(what)


def test_what_cannot_be_fitted_is_told():
    risks, wrong, _ = simulated(100, [1.0, 1.0])
    with pytest.raises(FanalError, match=r"missing or of another length: \['r1'\]"):
        combination.fit(eyes(2), {"r0": risks["r0"]}, wrong)
    with pytest.raises(FanalError, match="missing or of another length"):
        combination.fit(eyes(2), risks, wrong[:50])
    few = torch.arange(100) < 3
    with pytest.raises(FanalError, match="3 samples of the rarer kind do not fill 5 folds"):
        combination.fit(eyes(2), risks, few)
    with pytest.raises(FanalError, match="a risk is not finite"):
        combination.fit(eyes(2), {**risks, "r0": risks["r0"] / 0}, wrong)


# Watching with many detectors at once


def test_one_run_gives_what_many_runs_give():
    seen = observe(blurred(), GRID, Churn(), ASKING, range(30), block=7, verify=verify, judged=(0.2, 3.0))
    x = noise((2,), range(30), 80.0)
    for name, detector in ASKING.items():
        alone = watch(blurred(), x, GRID, Churn(), detector, range(30))
        assert torch.allclose(seen.risks[name], alone.risk, rtol=1e-4, atol=1e-9)
        assert torch.allclose(seen.per_step[name], alone.per_step, rtol=1e-4, atol=1e-9)
        assert seen.costs[name].evaluations == float(alone.evaluations[0]) - 31
    assert torch.allclose(seen.x, alone.x, atol=1e-4)
    assert torch.equal(seen.verdicts, verify(seen.x).long())
    assert seen.evaluations == 31
    levels = [sigma for sigma in GRID.tolist() if 0.2 <= sigma <= 3.0]
    assert seen.judged.tolist() == levels
    run = fanal.Trajectory.record(fanal.trace(blurred(), x, GRID, Churn(), range(30)))
    for codes, level in zip(seen.by_step, levels, strict=True):
        wanted = verify(run.denoised[GRID.tolist().index(level)])
        assert (codes == wanted).double().mean() > 0.96  # blocks differ in rounding


def test_without_a_verifier_nothing_is_known_and_samples_need_not_be_kept():
    seen = observe(blurred(), GRID, Euler(), EYES, range(10), block=4, keep=False)
    assert seen.x.shape == (0, 2)
    assert (seen.verdicts, seen.by_step.shape) == (None, (0, 10))
    with pytest.raises(FanalError, match="observe them with a verifier"):
        _ = seen.wrong
    with pytest.raises(FanalError, match="no seeds"):
        observe(blurred(), GRID, Euler(), EYES, range(0))
