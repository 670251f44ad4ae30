"""Figures and their standard errors against simulation, scikit-learn and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fanal import metrics
from fanal.errors import FanalError


@pytest.mark.parametrize(("p", "n"), [(0.2, 256), (0.5, 64), (0.02, 1000)])
def test_the_error_of_a_rate_is_what_repetition_shows(p, n):
    rng = np.random.default_rng(0)
    found = [metrics.rate(torch.from_numpy(rng.random(n) < p)) for _ in range(2000)]
    values, errors = np.array([f.value for f in found]), np.array([f.se for f in found])
    assert values.mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n / 2000))  # 4 standard errors
    # The standard deviation of 2000 repetitions is known to 1.6 %; Agresti and Coull shrink towards 1/2.
    assert errors.mean() == pytest.approx(values.std(), rel=0.07)


def test_a_rate_is_exact_and_nothing_seen_is_not_certainty():
    hits = torch.tensor([True, False, False, True, False])
    found = metrics.rate(hits)
    q = 4 / 9
    assert (found.value, found.se, found.n) == (0.4, math.sqrt(q * (1 - q) / 9), 5)
    none = metrics.rate(torch.zeros(50, dtype=torch.bool))
    assert none.value == 0
    assert 0.02 < none.se < 0.04
    assert math.isnan(metrics.rate(torch.zeros(0, dtype=torch.bool)).value)
    assert metrics.rate(torch.tensor([0, 1, 1, 0])).value == 0.5


def test_the_error_of_a_mean_is_the_textbooks():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    found = metrics.mean(values)
    assert found.value == 4.0
    assert found.se == pytest.approx(np.std(values.numpy(), ddof=1) / 2, rel=1e-12)
    assert math.isnan(metrics.mean(values[:1]).se)
    assert metrics.mean(values[:1]).value == 1.0
    assert math.isnan(metrics.mean(values[:0]).value)
    assert metrics.mean(torch.tensor([1, 2])).value == 1.5


def test_paired_rates_know_that_the_samples_are_the_same():
    before = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()
    after = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]).bool()
    found = metrics.paired_rate(before, after)
    steps = np.array([0, -1, -1, 0, 0, 0, 0, 1])
    assert found.value == steps.mean()
    assert found.se == pytest.approx(steps.std(ddof=1) / math.sqrt(8), rel=1e-12)
    assert metrics.paired_rate(before, before).se == 0
    with pytest.raises(FanalError, match="got 8 and 3"):
        metrics.paired_rate(before, after[:3])


def test_the_error_of_a_paired_rate_is_what_repetition_shows():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(1500):
        u, v = rng.random(200), rng.random(200)
        before = torch.from_numpy(u < 0.2)
        after = torch.from_numpy((u < 0.1) | (v < 0.02))
        found.append(metrics.paired_rate(before, after))
    spread = np.std([f.value for f in found])
    assert np.mean([f.se for f in found]) == pytest.approx(spread, rel=0.06)  # known to 1.8 %


@given(st.integers(0, 2**32 - 1), st.integers(4, 60), st.integers(1, 8))
def test_the_auc_is_scikit_learns_ties_included(seed, n, levels):
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < 0.4
    wrong[:4] = [True, True, False, False]
    risk = rng.integers(0, levels, n) + 0.5 * wrong * (levels > 3)
    found = metrics.auc(torch.from_numpy(risk.astype(float)), torch.from_numpy(wrong))
    assert found.value == pytest.approx(roc_auc_score(wrong, risk), abs=1e-12)
    assert found.n == n


def test_the_auc_of_a_perfect_and_of_a_useless_detector():
    wrong = torch.tensor([False, False, True, True])
    assert metrics.auc(torch.tensor([0.0, 1.0, 2.0, 3.0]), wrong).value == 1
    assert metrics.auc(torch.tensor([3.0, 2.0, 1.0, 0.0]), wrong).value == 0
    assert metrics.auc(torch.ones(4), wrong).value == 0.5


@pytest.mark.parametrize("wrong", [[True] * 5, [False] * 5])
def test_the_auc_of_one_kind_alone_is_unknown(wrong):
    found = metrics.auc(torch.arange(5.0), torch.tensor(wrong))
    assert math.isnan(found.value)
    assert math.isnan(found.se)


@pytest.mark.parametrize("wrong", [[True, False, False, False], [False, True, True, True], [True, False]])
def test_the_error_of_an_auc_with_one_sample_of_a_kind_is_unknown(wrong):
    found = metrics.auc(torch.tensor([3.0, 1.0, 4.0, 1.5][: len(wrong)]), torch.tensor(wrong))
    assert 0 <= found.value <= 1
    assert math.isnan(found.se)


def test_delongs_error_is_the_bootstraps():
    rng = np.random.default_rng(2)
    wrong = rng.random(300) < 0.25
    risk = rng.normal(size=300) + 1.1 * wrong
    found = metrics.auc(torch.from_numpy(risk), torch.from_numpy(wrong))
    high, low = np.flatnonzero(wrong), np.flatnonzero(~wrong)
    again = []
    above = risk[high][:, None] > risk[low]
    for _ in range(1000):
        again.append(above[rng.choice(len(high), len(high))][:, rng.choice(len(low), len(low))].mean())
    assert found.se == pytest.approx(np.std(again), rel=0.1)  # known to 2.2 %


def test_delongs_error_is_what_repetition_shows():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(1000):
        wrong = np.arange(160) < 40
        risk = rng.normal(size=160) + 0.9 * wrong
        found.append(metrics.auc(torch.from_numpy(risk), torch.from_numpy(wrong)))
    assert np.mean([f.se for f in found]) == pytest.approx(np.std([f.value for f in found]), rel=0.08)


def test_spread_is_one_on_the_data_themselves_and_scales_with_the_variance():
    real = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert metrics.spread(real, real).value == pytest.approx(1, rel=1e-12)
    half = metrics.spread(0.5 * real + 3, real)
    assert half.value == pytest.approx(0.25, rel=1e-6)
    assert metrics.spread(real[:1].expand(9, 1, 4, 4), real).value == pytest.approx(0, abs=1e-12)


def test_the_error_of_spread_is_the_jackknifes_and_what_repetition_shows():
    rng = np.random.default_rng(4)
    real = torch.from_numpy(rng.normal(size=(4000, 6)))
    x = torch.from_numpy(rng.normal(size=(30, 6)) * 1.3)
    found = metrics.spread(x, real)
    without = np.array([metrics.spread(torch.cat([x[:i], x[i + 1 :]]), real).value for i in range(30)])
    wanted = math.sqrt(29 / 30 * ((without - without.mean()) ** 2).sum())
    assert found.se == pytest.approx(wanted, rel=1e-9)
    many = [metrics.spread(torch.from_numpy(rng.normal(size=(100, 6)) * 1.3), real) for _ in range(1000)]
    assert np.mean([f.se for f in many]) == pytest.approx(np.std([f.value for f in many]), rel=0.08)


def test_spread_needs_three_samples():
    with pytest.raises(FanalError, match="got 2"):
        metrics.spread(torch.randn(2, 4), torch.randn(9, 4))


def test_estimates_read_as_figures():
    assert metrics.Estimate(0.2187, 0.0132, 900).percent() == "21.9 ± 1.3 %"
    assert metrics.Estimate(0.8149, 0.0151, 900).plain() == "0.81 ± 0.02"
    assert metrics.Estimate(54.25, math.nan, 1).plain(1) == "54.2"
    assert metrics.Estimate(math.nan, math.nan, 0).percent() == "–"
    assert metrics.Estimate(math.nan, math.nan, 0).plain() == "–"
