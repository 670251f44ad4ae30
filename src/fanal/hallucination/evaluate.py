"""How good a detector or a repair is, where it is known which samples are wrong; every figure with its standard error.

Risks are (B,), higher means more likely wrong; a sample is flagged when its risk exceeds the threshold. Labels are a
verifier's codes or a person's: 0 is right, everything else names what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from fanal import metrics
from fanal.errors import FanalError
from fanal.metrics import Estimate

__all__ = [
    "Change",
    "Comparison",
    "Confusion",
    "Curve",
    "Decision",
    "Roc",
    "auc_by_step",
    "compare",
    "confusion",
    "decision",
    "roc",
    "sweep",
    "tpr_at",
]

_RESAMPLES = 400


@dataclass(frozen=True, eq=False)
class Roc:
    """The operating points of a detector, from nothing flagged to everything flagged.

    Attributes:
        fpr: (T,) share of the right samples that are flagged.
        tpr: (T,) share of the wrong samples that are flagged.
        thresholds: (T,) a sample is flagged when its risk exceeds it; the first is infinite.
        auc: area under the curve, with DeLong's standard error.
    """

    fpr: Float[Tensor, " t"]
    tpr: Float[Tensor, " t"]
    thresholds: Float[Tensor, " t"]
    auc: Estimate


@dataclass(frozen=True)
class Confusion:
    """Counts of what was flagged against what is wrong, and the rates that follow.

    Attributes:
        tp: wrong and flagged.
        fp: right and flagged.
        fn: wrong and missed.
        tn: right and left alone.
        threshold: what the risk had to exceed; NaN where the flags came from elsewhere.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    threshold: float = math.nan

    @property
    def tpr(self) -> Estimate:
        """Share of the wrong samples that are flagged (sensitivity, recall)."""
        return _share(self.tp, self.tp + self.fn)

    @property
    def fpr(self) -> Estimate:
        """Share of the right samples that are flagged."""
        return _share(self.fp, self.fp + self.tn)

    @property
    def precision(self) -> Estimate:
        """Share of the flagged samples that are wrong."""
        return _share(self.tp, self.tp + self.fp)

    @property
    def flagged(self) -> Estimate:
        """Share of all samples that are flagged."""
        return _share(self.tp + self.fp, self.tp + self.fp + self.fn + self.tn)

    @property
    def wrong(self) -> Estimate:
        """Share of all samples that are wrong."""
        return _share(self.tp + self.fn, self.tp + self.fp + self.fn + self.tn)

    @property
    def accuracy(self) -> Estimate:
        """Share of all samples whose flag says the truth."""
        return _share(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)


@dataclass(frozen=True)
class Change:
    """What became of one kind of error.

    Attributes:
        before: its share of all samples before.
        after: its share of all samples after.
        difference: after less before, on the same samples.
        corrected: share of the samples that had it which are right after.
    """

    before: Estimate
    after: Estimate
    difference: Estimate
    corrected: Estimate


@dataclass(frozen=True)
class Comparison:
    """What a repair did to a batch, sample by sample.

    Attributes:
        before: share of all samples that were wrong.
        wrong: share of all samples that are wrong after.
        difference: `wrong` less `before`, paired by sample.
        corrected: share of the samples wrong before that are right after.
        new: share of ALL samples that were right and are wrong after.
        p: exact McNemar test that the repair changed the rate of errors (two-sided).
        by_class: code of the error → what became of it.
    """

    before: Estimate
    wrong: Estimate
    difference: Estimate
    corrected: Estimate
    new: Estimate
    p: float
    by_class: dict[int, Change]


@dataclass(frozen=True, eq=False)
class Curve:
    """A detector's AUC after each step of a run.

    Attributes:
        sigmas: (N,) noise level at which the step's prediction was made.
        auc: (N,) NaN while the detector has nothing to tell samples apart by.
        se: (N,) its standard error.
    """

    sigmas: Float[Tensor, " n"]
    auc: Float[Tensor, " n"]
    se: Float[Tensor, " n"]

    def reaches(self, level: float) -> float | None:
        """Return the highest sigma at which the AUC is at least `level`; None: it never is."""
        good = (self.auc >= level).nonzero().flatten()
        return float(self.sigmas[good[0]]) if len(good) else None


@dataclass(frozen=True, eq=False)
class Decision:
    """When a run's verdict is made.

    Attributes:
        sigmas: (N,) noise level of each judged prediction.
        same: share of samples whose prediction gets the final verdict, by step.
        settled: share whose verdict does not change any more, by step; never above `same`.
        sigma: (B,) noise level from which each sample's verdict stands; 0: only the sample itself has it.
    """

    sigmas: Float[Tensor, " n"]
    same: tuple[Estimate, ...]
    settled: tuple[Estimate, ...]
    sigma: Float[Tensor, " b"]

    def reached(self, share: float) -> float | None:
        """Return the highest sigma at which at least this share is settled; None: at no judged step."""
        return next((float(s) for s, e in zip(self.sigmas, self.settled, strict=True) if e.value >= share), None)


def _share(hits: int, n: int) -> Estimate:
    """The share `hits/n`, with the error that `metrics.rate` gives it."""
    return metrics.rate(torch.arange(n) < hits)


def _pair(risk: Tensor, wrong: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Risks and what is wrong as arrays, refused where they do not belong together."""
    if risk.ndim != 1 or risk.shape != wrong.shape:
        raise FanalError(
            f"risk and labels must be (B,) over the same samples, got {tuple(risk.shape)} and {tuple(wrong.shape)}"
        )
    values = risk.detach().cpu().double().numpy()
    if np.isnan(values).any():
        raise FanalError(f"{int(np.isnan(values).sum())} of {len(values)} risks are NaN: leave those samples out")
    return values, (wrong != 0).cpu().numpy()


def _both(risk: Tensor, wrong: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values, mask = _pair(risk, wrong)
    if mask.all() or not mask.any():
        kind = "right" if mask.all() else "wrong"
        raise FanalError(f"no {kind} sample among {len(mask)}: a ROC curve needs samples of both kinds")
    return values, mask


def roc(risk: Float[Tensor, " b"], wrong: Tensor) -> Roc:
    """Return the ROC curve of a risk against what is wrong, collinear points left out.

    Args:
        risk: higher means more likely wrong.
        wrong: (B,) labels; 0 or False is right.

    Raises:
        FanalError: shapes differ, a risk is not finite, or one kind of sample is missing.
    """
    from sklearn.metrics import roc_curve

    values, mask = _both(risk, wrong)
    if np.isinf(values).any():
        raise FanalError(f"{int(np.isinf(values).sum())} of {len(values)} risks are infinite: leave those samples out")
    fpr, tpr, limits = roc_curve(mask, values)
    # scikit-learn flags at ">=", fanal at ">"
    limits = np.where(np.isinf(limits), limits, np.nextafter(limits, -np.inf))
    points = [torch.from_numpy(part.astype(np.float64)) for part in (fpr, tpr, limits)]
    return Roc(points[0], points[1], points[2], metrics.auc(torch.from_numpy(values), torch.from_numpy(mask)))


def tpr_at(risk: Float[Tensor, " b"], wrong: Tensor, fpr: float = 0.2) -> Estimate:
    """Return the true-positive rate at a given false-positive rate.

    Read from the ROC curve, linearly between its points. The standard error is that of a stratified bootstrap (wrong
    and right samples resampled apart, fixed seed), so it holds the error of the threshold too.

    Raises:
        FanalError: as `roc`, or `fpr` is not strictly between 0 and 1.
    """
    if not 0 < fpr < 1:
        raise FanalError(f"the false-positive rate must be strictly between 0 and 1, got {fpr}")
    values, mask = _both(risk, wrong)
    ranks = stats.rankdata(values, method="dense").astype(int) - 1
    sides = [np.bincount(ranks[side], minlength=int(ranks.max()) + 1) for side in (mask, ~mask)]
    generator = np.random.default_rng(0)

    def read(high: np.ndarray, low: np.ndarray) -> float:
        true, false = (np.append(0.0, np.cumsum(counts[::-1]) / counts.sum()) for counts in (high, low))
        return float(np.interp(fpr, false, true))

    draws = [
        read(*(generator.multinomial(counts.sum(), counts / counts.sum()) for counts in sides))
        for _ in range(_RESAMPLES)
    ]
    return Estimate(read(*sides), float(np.std(draws, ddof=1)), len(values))


def confusion(flagged: Bool[Tensor, " b"], wrong: Tensor, *, threshold: float = math.nan) -> Confusion:
    """Count what was flagged against what is wrong.

    Args:
        flagged: (B,) which samples were flagged.
        wrong: (B,) labels; 0 or False is right.
        threshold: what the risk had to exceed, to be kept with the counts.

    Raises:
        FanalError: the two are not over the same samples.
    """
    if flagged.ndim != 1 or flagged.shape != wrong.shape:
        raise FanalError(
            f"flags and labels must be (B,) over the same samples, got {tuple(flagged.shape)}, {tuple(wrong.shape)}"
        )
    flag, bad = flagged.cpu().bool(), wrong.cpu() != 0
    tp, fp, fn = int((flag & bad).sum()), int((flag & ~bad).sum()), int((~flag & bad).sum())
    return Confusion(tp, fp, fn, len(flag) - tp - fp - fn, threshold)


def sweep(
    risk: Float[Tensor, " b"], wrong: Tensor, thresholds: Sequence[float] | Tensor | None = None, *, count: int = 21
) -> list[Confusion]:
    """Return the confusion at each threshold.

    Args:
        risk: higher means more likely wrong.
        wrong: (B,) labels; 0 or False is right.
        thresholds: what the risk must exceed; None: `count` quantiles of the risk, from the lowest to the highest.
        count: number of quantiles.

    Raises:
        FanalError: the two are not over the same samples, a risk is NaN, there are no samples, or fewer than two
            quantiles.
    """
    values = torch.from_numpy(_pair(risk, wrong)[0])
    if thresholds is None:
        if count < 2 or not len(values):
            raise FanalError(f"a sweep needs samples and at least two thresholds, got {len(values)} and {count}")
        thresholds = torch.quantile(values, torch.linspace(0, 1, count, dtype=torch.float64))
    limits = torch.as_tensor(thresholds, dtype=torch.float64).tolist()
    return [confusion(values > limit, wrong, threshold=limit) for limit in limits]


def compare(before: Int[Tensor, " b"], after: Int[Tensor, " b"]) -> Comparison:
    """Compare the verdicts of the same samples before and after a repair.

    Args:
        before: (B,) codes; 0 is right.
        after: (B,) codes of the same samples.

    Raises:
        FanalError: the two are not over the same samples.
    """
    if before.ndim != 1 or before.shape != after.shape:
        raise FanalError(
            f"verdicts must be (B,) over the same samples, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    old, new = before.cpu(), after.cpu()
    bad, worse = old != 0, new != 0
    mended, broken = int((bad & ~worse).sum()), int((~bad & worse).sum())
    p = float(stats.binomtest(broken, mended + broken).pvalue) if mended + broken else 1.0
    codes = sorted(set(old[bad].tolist()) | set(new[worse].tolist()))
    return Comparison(
        metrics.rate(bad),
        metrics.rate(worse),
        metrics.paired_rate(bad, worse),
        metrics.rate(~worse[bad]),
        metrics.rate(~bad & worse),
        p,
        {
            int(code): Change(
                metrics.rate(old == code),
                metrics.rate(new == code),
                metrics.paired_rate(old == code, new == code),
                metrics.rate(~worse[old == code]),
            )
            for code in codes
        },
    )


def auc_by_step(per_step: Float[Tensor, "n b"], wrong: Tensor, sigmas: Float[Tensor, " m"]) -> Curve:
    """Return a detector's AUC after each step: how early it tells wrong from right.

    Args:
        per_step: (N, B), the risk as it stood after each step.
        wrong: (B,) labels; 0 or False is right.
        sigmas: the grid, or its first N nodes.

    Raises:
        FanalError: the grid has fewer nodes than steps, or the labels are for other samples.
    """
    if len(sigmas) < len(per_step):
        raise FanalError(f"{len(per_step)} steps need a grid with as many nodes, got {len(sigmas)}")
    found = []
    for risk in per_step:
        values, mask = (torch.from_numpy(part) for part in _pair(risk, wrong))
        blind = bool((values == values[0]).all())
        found.append(Estimate(math.nan, math.nan, len(values)) if blind else metrics.auc(values, mask))
    parts = ([e.value for e in found], [e.se for e in found])
    return Curve(sigmas[: len(per_step)].double(), *(torch.tensor(part, dtype=torch.float64) for part in parts))


def decision(by_step: Int[Tensor, "n b"], final: Int[Tensor, " b"], sigmas: Float[Tensor, " n"]) -> Decision:
    """Return when the verdict is made: at which noise level D(x, sigma) is judged as the sample will be.

    Args:
        by_step: (N, B), codes of the denoised predictions at the judged steps.
        final: (B,), codes of the samples.
        sigmas: (N,), noise levels of the judged steps, decreasing.

    Raises:
        FanalError: shapes do not fit, no step was judged, or sigmas do not decrease.
    """
    if not len(sigmas) or by_step.shape != (len(sigmas), len(final)):
        raise FanalError(
            f"{len(sigmas)} judged steps of {len(final)} samples need verdicts of shape (N, B), got "
            f"{tuple(by_step.shape)}"
        )
    levels = sigmas.double()
    if bool((levels.diff() >= 0).any()):
        raise FanalError("the noise levels of the judged steps must decrease")
    same = (by_step == final).cpu()
    settled = same.flip(0).cumprod(0).flip(0).bool()
    first = torch.where(settled, levels[:, None], torch.zeros(()).double()).amax(0)
    return Decision(levels, tuple(map(metrics.rate, same)), tuple(map(metrics.rate, settled)), first)
