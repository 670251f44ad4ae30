"""The figures of a run: paired, by kind, and with a diversity that a collapse shows in."""

import json
import math

import pytest
import torch

from fanal import metrics
from fanal.datasets import DATASETS
from fanal.summary import as_json, estimated, summarize

HANDS = DATASETS["hands32"]


@pytest.mark.parametrize("value", [(0.5, 0.1, 9), (0.5, math.nan, 1), (math.nan, math.nan, 0)])
def test_an_estimate_is_read_as_it_was_written(value):
    """One sample has no standard error, and none no mean: both are null in run.json."""
    written = as_json(metrics.Estimate(*value))
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    read = estimated(written)
    assert [read.value, read.se, read.n] == pytest.approx(value, nan_ok=True)
    assert math.isnan(estimated({"value": 0.5}).se)


def whole(x, after, risk):
    wrong = {"verdict": HANDS.verify(x), "verdict.redo": HANDS.verify(after)}
    calls = torch.full((len(x),), 40.0, dtype=torch.float64)
    return {"x": x, "x.redo": after, "risk": risk, "evaluations": calls, "evaluations.redo": calls + 1, **wrong}


@pytest.fixture(scope="module")
def found():
    """40 right hands and 24 broken ones, of which a repair mends 20 and breaks 2 others."""
    good = HANDS.data("held out", 80, seed=5).x
    bad = torch.cat([HANDS.broken("6 fingers", 12, 0), HANDS.broken("4 fingers", 12, 0)])
    x = torch.cat([good[:40], bad])
    after = torch.cat([bad[:2], good[2:40], good[40:60], bad[20:]])
    risk = torch.arange(64, dtype=torch.float64)
    seconds = {"plain": torch.tensor([1.0, 3.0]), "redo": torch.tensor([2.0, 2.0])}
    return summarize(whole(x, after, risk), seconds, ["plain", "redo"], HANDS)


def test_rates_are_counted_and_paired(found):
    plain, redo = found["table"]
    assert plain["wrong"]["value"] == 24 / 64
    assert "change" not in plain
    assert redo["wrong"]["value"] == 6 / 64
    assert redo["corrected"]["value"] == 20 / 24
    assert redo["newly_wrong"]["value"] == 2 / 64
    assert redo["change"]["value"] == pytest.approx(-18 / 64)
    pairs = torch.tensor([1.0] * 2 + [0.0] * 42 + [-1.0] * 20)
    assert redo["change"]["se"] == pytest.approx(float(pairs.std()) / 8)
    assert plain["seconds"]["value"] == 2.0
    assert redo["evaluations"]["value"] == 41.0


def test_errors_are_told_apart_by_kind(found):
    names = found["verdicts"]
    counts = dict(zip(names, found["table"][0]["verdicts"], strict=True))
    assert counts["ok"] == 40
    assert counts["extra finger"] == 12
    assert counts["missing finger"] == 12
    assert set(found["auc_by_verdict"]) == {"extra finger", "missing finger"}
    assert found["auc_by_verdict"]["extra finger"]["value"] == 1.0
    assert found["auc_by_verdict"]["extra finger"]["se"] is None  # perfect separation does not tell its error


def test_a_collapse_shows_in_the_diversity():
    good = HANDS.data("held out", 200, seed=6).x
    collapsed = good[:1].expand(200, -1, -1, -1) + 0.01 * torch.randn(200, 1, 32, 32, generator=torch.manual_seed(0))
    seconds = {"plain": torch.ones(2), "redo": torch.ones(2)}
    rows = summarize(whole(good, collapsed, torch.rand(200)), seconds, ["plain", "redo"], HANDS)["table"]
    for name in HANDS.features:
        assert abs(rows[0]["diversity"][name]["value"] - 1) < 4 * rows[0]["diversity"][name]["se"]
        assert rows[1]["diversity"][name]["value"] < 0.3


def test_the_error_of_a_ratio_of_deviations_is_its_spread():
    """Against 400 repetitions, for normal figures; the relative error of a standard deviation over 400 is 3.5 %."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 300, dtype=torch.float64, generator=generator)
    real = torch.randn(400, 500, dtype=torch.float64, generator=generator) / 2
    found = [metrics.std_ratio(a, b) for a, b in zip(draws, real, strict=True)]
    values = torch.tensor([f.value for f in found])
    assert float(values.mean()) == pytest.approx(2.0, abs=5 * float(values.std()) / 20)
    assert sum(f.se for f in found) / 400 == pytest.approx(float(values.std()), rel=0.15)


def test_a_figure_that_does_not_vary_has_no_error():
    constant, varied = torch.ones(10), torch.arange(10.0)
    assert metrics.std_ratio(constant, varied).value == 0
    assert math.isnan(metrics.std_ratio(varied, constant).value)
