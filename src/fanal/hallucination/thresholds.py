"""Thresholds for a wanted share: of all samples flagged, of the wrong ones caught, or of the right ones disturbed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from fanal.errors import FanalError, is_number

__all__ = ["Interval", "Threshold", "interval", "threshold_at", "threshold_for"]


@dataclass(frozen=True)
class Interval:
    """A share with its confidence interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Threshold:
    """A risk to flag above, how well it is known, and what it does on the samples it was set by.

    Attributes:
        value: the threshold; a sample is flagged when its risk exceeds it.
        low: lower end of the confidence interval of the quantile that the threshold estimates (order statistics,
            no assumption on the risk); −inf where the samples are too few. Flag above this to catch at least the wanted
            share of wrong samples with near certainty.
        high: upper end; +inf where the samples are too few.
        flagged: share of all samples above it.
        caught: share of the wrong samples above it; None where none is known.
        alarms: share of the right samples above it; None where none is known.
    """

    value: float
    low: float
    high: float
    flagged: Interval
    caught: Interval | None
    alarms: Interval | None


def interval(hits: Tensor, confidence: float = 0.95) -> Interval | None:
    """Return the share of true entries with its Clopper–Pearson interval; None of nothing."""
    n, k = hits.numel(), int(hits.sum())
    if n == 0:
        return None
    found = stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    return Interval(k / n, float(found.low), float(found.high), n)


def _check_share(name: str, share: float) -> None:
    if not is_number(share) or not 0 < share < 1:
        raise FanalError(f"the {name} share must be strictly between 0 and 1, got {share}")


def threshold_at(risk: Float[Tensor, " b"], flag: float) -> float:
    """Return the risk that a share `flag` of the samples exceeds.

    Raises:
        FanalError: `flag` is not strictly between 0 and 1.
    """
    _check_share("flagged", flag)
    return float(torch.quantile(risk.double(), 1 - flag))


def _caught_at(high: Tensor, tpr: float) -> float:
    """The largest threshold that at least this share of the wrong samples exceeds."""
    least = high.sort(descending=True).values[math.ceil(tpr * len(high) - 1e-9) - 1]
    return float(torch.nextafter(least, least.new_tensor(-math.inf)))


def _alarms_at(low: Tensor, fpr: float) -> float:
    """The smallest threshold that at most this share of the right samples exceeds."""
    return float(low.sort().values[len(low) - 1 - math.floor(fpr * len(low) + 1e-9)])


def _ends(risk: Tensor, share: float, confidence: float) -> tuple[float, float]:
    """Confidence interval of the risk that a share of the population exceeds, by order statistics."""
    n, tail = len(risk), (1 - confidence) / 2
    ordered = risk.sort().values.tolist()
    # The number of samples below the true quantile is binomial.
    low, high = int(stats.binom.ppf(tail, n, 1 - share)), int(stats.binom.ppf(1 - tail, n, 1 - share)) + 1
    return (ordered[low - 1] if low > 0 else -math.inf), (ordered[high - 1] if high <= n else math.inf)


def threshold_for(
    risk: Float[Tensor, " b"],
    wrong: Tensor | None = None,
    *,
    tpr: float | None = None,
    fpr: float | None = None,
    flag: float | None = None,
    confidence: float = 0.95,
) -> Threshold:
    """Return the threshold for a wanted rate, from risks and, where there are any, labels.

    The rates are those of the samples that the threshold was set by, and so a little flattered; the interval of the
    threshold says by how much it could be off.

    Args:
        risk: (B,), higher means more likely wrong.
        wrong: (B,) labels, 0 or False for right; None: nobody knows.
        tpr: catch at least this share of the wrong samples.
        fpr: flag at most this share of the right samples.
        flag: flag this share of all samples.
        confidence: of the intervals.

    Raises:
        FanalError: not exactly one rate is asked for, it is not strictly between 0 and 1, a risk is NaN, the labels
            are for other samples, or there are no labels of the kind that the rate is of.
    """
    asked = {name: share for name, share in (("tpr", tpr), ("fpr", fpr), ("flag", flag)) if share is not None}
    if len(asked) != 1:
        raise FanalError(f"a threshold is set by one rate, tpr, fpr or flag, got {asked or 'none'}")
    ((name, share),) = asked.items()
    _check_share({"tpr": "caught", "fpr": "false-alarm", "flag": "flagged"}[name], share)
    values = risk.detach().cpu().double()
    if not len(values) or bool(values.isnan().any()):
        raise FanalError("a threshold needs risks, none of them NaN")
    if wrong is not None and wrong.shape != risk.shape:
        raise FanalError(f"risks and labels must be over the same samples, got {len(risk)} and {len(wrong)}")
    high, low = (values[:0], values[:0]) if wrong is None else (values[wrong.cpu() != 0], values[wrong.cpu() == 0])
    pool, kind = {"tpr": (high, "wrong"), "fpr": (low, "right"), "flag": (values, "")}[name]
    if not len(pool):
        raise FanalError(
            f"{name} is a share of the {kind} samples, and none of {len(values)} is labelled {kind}: "
            "label more samples, or set the share to flag instead"
        )
    value = {"tpr": _caught_at, "fpr": _alarms_at, "flag": threshold_at}[name](pool, share)
    flagged = interval(values > value, confidence)
    assert flagged is not None
    ends = _ends(pool, share, confidence)
    return Threshold(value, *ends, flagged, interval(high > value, confidence), interval(low > value, confidence))
