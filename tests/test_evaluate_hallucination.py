"""ROC curves, sweeps, confusion, comparisons: against scikit-learn, by identities, and errors against repetition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from fanal import metrics
from fanal.errors import FanalError
from fanal.hallucination import evaluate

RISKS = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60)
CODES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


def batch(pairs):
    return torch.tensor([float(a) for a, _ in pairs]).double(), torch.tensor([b for _, b in pairs])


def binormal(count, seed, gap=1.2, share=0.2):
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(count, generator=generator) < share
    return torch.randn(count, generator=generator).double() + gap * wrong, wrong


@given(RISKS)
@settings(max_examples=60, deadline=None)
def test_the_curve_is_scikit_learns_and_its_thresholds_do_what_they_say(pairs):
    risk, wrong = batch(pairs)
    if wrong.all() or not wrong.any():
        with pytest.raises(FanalError, match=r"no (right|wrong) sample among"):
            evaluate.roc(risk, wrong)
        return
    found = evaluate.roc(risk, wrong)
    fpr, tpr, _ = roc_curve(wrong.numpy(), risk.numpy())
    assert np.array_equal(found.fpr.numpy(), fpr)
    assert np.array_equal(found.tpr.numpy(), tpr)
    assert found.auc.value == pytest.approx(roc_auc_score(wrong.numpy(), risk.numpy()), abs=1e-12)
    assert found.auc == pytest.approx(metrics.auc(risk, wrong), nan_ok=True)
    for limit, false, true in zip(found.thresholds.tolist(), fpr, tpr, strict=True):
        seen = evaluate.confusion(risk > limit, wrong)
        assert (seen.fpr.value, seen.tpr.value) == (pytest.approx(false), pytest.approx(true))


@given(RISKS)
@settings(max_examples=60, deadline=None)
def test_confusion_counts_everyone_once(pairs):
    risk, wrong = batch(pairs)
    flagged = risk > 6
    seen = evaluate.confusion(flagged, wrong)
    table = confusion_matrix(wrong.numpy(), flagged.numpy(), labels=[False, True])
    assert [[seen.tn, seen.fp], [seen.fn, seen.tp]] == table.tolist()
    n = len(pairs)
    assert seen.flagged.value == pytest.approx(float(flagged.double().mean()))
    assert seen.accuracy.value * n == pytest.approx(seen.tp + seen.tn)
    if seen.tp + seen.fp and seen.tp + seen.fn:  # Bayes
        assert seen.precision.value * seen.flagged.value == pytest.approx(seen.tpr.value * seen.wrong.value)
    assert (seen.tpr.n, seen.fpr.n) == (int(wrong.sum()), n - int(wrong.sum()))
    whole = metrics.rate(flagged)
    assert (seen.flagged.value, seen.flagged.se, seen.flagged.n) == (whole.value, whole.se, n)


@given(RISKS, st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_a_sweep_flags_less_and_less(pairs, count):
    risk, wrong = batch(pairs)
    rows = evaluate.sweep(risk, wrong, count=count)
    assert len(rows) == count
    for row in rows:
        assert row == evaluate.confusion(risk > row.threshold, wrong, threshold=row.threshold)
    assert all(a.flagged.value >= b.flagged.value for a, b in zip(rows, rows[1:], strict=False))
    assert (rows[-1].tp, rows[-1].fp) == (0, 0)
    some = evaluate.sweep(risk, wrong, [3.0, -1.0])
    assert (some[0].threshold, some[1].flagged.value) == (3.0, 1.0)


def test_the_rate_at_a_false_positive_rate_is_read_from_the_curve():
    risk, wrong = binormal(3000, 0)
    found = evaluate.tpr_at(risk, wrong, 0.2)
    fpr, tpr, _ = roc_curve(wrong.numpy(), risk.numpy(), drop_intermediate=False)
    assert found.value == pytest.approx(np.interp(0.2, fpr, tpr), abs=0.01)
    true = stats.norm.sf(stats.norm.isf(0.2) - 1.2)
    assert abs(found.value - true) < 4 * found.se  # by chance once in 16,000 seeds
    assert evaluate.tpr_at(risk, wrong, 0.2) == found
    assert evaluate.tpr_at(risk.exp(), wrong, 0.2) == found  # ranks alone count
    perfect = evaluate.tpr_at(wrong.double(), wrong)
    assert (perfect.value, perfect.se) == (1.0, 0.0)


def test_its_standard_error_is_the_spread_over_repetitions():
    # 80 repetitions know the spread to 8 %; 32 % is four times that
    found = [evaluate.tpr_at(*binormal(200, seed)) for seed in range(80)]
    spread = np.std([f.value for f in found], ddof=1)
    assert np.mean([f.se for f in found]) == pytest.approx(spread, rel=0.32)


@given(CODES)
@settings(max_examples=60, deadline=None)
def test_a_comparison_adds_up(pairs):
    before, after = (torch.tensor(side) for side in zip(*pairs, strict=True))
    seen, n = evaluate.compare(before, after), len(pairs)
    bad = int((before != 0).sum())
    corrected = 0 if not bad else seen.corrected.value * bad
    assert seen.wrong.value * n == pytest.approx(bad - corrected + seen.new.value * n)
    assert seen.difference.value == pytest.approx(seen.wrong.value - seen.before.value)
    assert (seen.corrected.n, seen.new.n) == (bad, n)
    assert set(seen.by_class) == ({*before.tolist(), *after.tolist()} - {0})
    assert sum(c.before.value for c in seen.by_class.values()) == pytest.approx(seen.before.value)
    assert sum(c.after.value for c in seen.by_class.values()) == pytest.approx(seen.wrong.value)
    assert sum(c.difference.value for c in seen.by_class.values()) == pytest.approx(seen.difference.value)
    had = [c.corrected.value * c.corrected.n for c in seen.by_class.values() if c.corrected.n]
    assert sum(had) == pytest.approx(corrected)
    back = evaluate.compare(after, before)
    assert back.difference.value == pytest.approx(-seen.difference.value)
    assert back.p == pytest.approx(seen.p)


def test_nothing_changed_is_told_and_a_change_is_tested_exactly():
    codes = torch.tensor([0, 1, 2, 0])
    same = evaluate.compare(codes, codes)
    assert (same.difference.value, same.difference.se, same.new.value, same.p) == (0.0, 0.0, 0.0, 1.0)
    before, after = torch.tensor([1] * 9 + [0] * 91), torch.tensor([0] * 8 + [1] + [2] + [0] * 90)
    # 8 mended, 1 broken: twice the chance of at most one head in nine throws
    assert evaluate.compare(before, after).p == pytest.approx(2 * (1 + 9) / 2**9)


def test_the_paired_error_is_the_spread_over_repetitions():
    # 600 repetitions know the spread to 3 %; 12 % is four times that
    def once(seed):
        generator = torch.Generator().manual_seed(seed)
        before = (torch.rand(300, generator=generator) < 0.2).long()
        mended, broken = (torch.rand(300, generator=generator) < p for p in (0.5, 0.1))
        return evaluate.compare(before, torch.where(before == 1, (~mended).long(), broken.long()))

    found = [once(seed) for seed in range(600)]
    for figure in ("difference", "new", "corrected"):
        values, errors = zip(*((getattr(f, figure).value, getattr(f, figure).se) for f in found), strict=True)
        assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.12), figure


def test_auc_by_step_is_the_auc_of_each_step():
    risk, wrong = binormal(400, 1)
    noisy = risk + 3 * torch.randn(400, generator=torch.Generator().manual_seed(2)).double()
    per_step, sigmas = torch.stack([risk * 0, noisy, risk]), torch.tensor([3.0, 2.0, 1.0, 0.0])
    curve = evaluate.auc_by_step(per_step, wrong, sigmas)
    assert curve.sigmas.tolist() == [3.0, 2.0, 1.0]
    assert math.isnan(curve.auc[0])
    for i, values in ((1, noisy), (2, risk)):
        wanted = metrics.auc(values, wrong)
        assert (float(curve.auc[i]), float(curve.se[i])) == (wanted.value, wanted.se)
    assert curve.reaches(0.55) == 2.0
    assert curve.reaches(0.75) == 1.0
    assert curve.reaches(0.99) is None


def test_a_decision_is_made_where_the_verdict_stands():
    final = torch.tensor([0, 1, 2, 0])
    by_step = torch.tensor([[0, 2, 0, 1], [1, 2, 2, 1], [0, 1, 2, 1]])
    found = evaluate.decision(by_step, final, torch.tensor([4.0, 2.0, 1.0]))
    assert [e.value for e in found.same] == [0.25, 0.25, 0.75]
    assert [e.value for e in found.settled] == [0.0, 0.25, 0.75]
    assert found.sigma.tolist() == [1.0, 1.0, 2.0, 0.0]
    assert (found.reached(0.2), found.reached(0.75), found.reached(0.9)) == (2.0, 1.0, None)
    assert found.same[0].se == metrics.rate(by_step[0] == final).se


def test_what_does_not_fit_together_is_refused():
    risk, wrong = binormal(10, 3)
    with pytest.raises(FanalError, match=r"over the same samples, got \(10,\) and \(9,\)"):
        evaluate.roc(risk, wrong[:9])
    with pytest.raises(FanalError, match="1 of 10 risks are NaN"):
        evaluate.sweep(torch.where(torch.arange(10) == 3, math.nan, risk), wrong)
    with pytest.raises(FanalError, match="flags and labels must be"):
        evaluate.confusion(risk > 0, wrong[:9])
    with pytest.raises(FanalError, match="verdicts must be"):
        evaluate.compare(wrong.long(), wrong.long()[:9])
    with pytest.raises(FanalError, match="1 of 10 risks are infinite"):
        evaluate.roc(torch.where(torch.arange(10) == 3, math.inf, risk), wrong)
    with pytest.raises(FanalError, match="at least two thresholds, got 10 and 1"):
        evaluate.sweep(risk, wrong, count=1)
    with pytest.raises(FanalError, match="got 0 and 21"):
        evaluate.sweep(risk[:0], wrong[:0])
    with pytest.raises(FanalError, match="strictly between 0 and 1, got 1"):
        evaluate.tpr_at(risk, wrong, 1.0)
    with pytest.raises(FanalError, match="3 steps need a grid with as many nodes, got 2"):
        evaluate.auc_by_step(risk.expand(3, 10), wrong, torch.tensor([1.0, 0.0]))
    with pytest.raises(FanalError, match=r"need verdicts of shape \(N, B\)"):
        evaluate.decision(wrong.long()[None], wrong.long(), torch.tensor([2.0, 1.0]))
    with pytest.raises(FanalError, match="0 judged steps of 10 samples"):
        evaluate.decision(wrong.long()[None][:0], wrong.long(), torch.tensor([]))
    with pytest.raises(FanalError, match="must decrease"):
        evaluate.decision(wrong.long().expand(2, 10), wrong.long(), torch.tensor([1.0, 2.0]))
