"""Copies: samples that are nearer to one training point than to its neighbors, by more than chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact import Dataset

__all__ = ["LEVEL", "Neighbors", "Share", "check_level", "copied", "neighbors", "proportion", "threshold"]

LEVEL = 0.01
"""Share of held-out points that are called copies by default: the false alarms that are accepted."""

_AROUND = 20  # training points that say how near is near


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The training points around some samples.

    Attributes:
        ratio: (B,), distance to the nearest over the mean distance to those after it; near 1 for a new sample, 0 for a
            copy.
        distance: (B,), root mean square distance per entry to the nearest.
        index: (B,), the nearest.
    """

    ratio: Float[Tensor, " b"]
    distance: Float[Tensor, " b"]
    index: Int[Tensor, " b"]


@dataclass(frozen=True)
class Share:
    """How many samples are copies.

    Attributes:
        count: samples below the threshold.
        total: samples.
        level: share of held-out points below it.
        held: held-out points that it was set on.
        share: `count/total`.
        low: lower end of its 95 % interval (Clopper & Pearson 1934).
        high: upper end.
        excess: share of copies beyond the false alarms, `(share − level)/(1 − level)`, at least 0.
        excess_low: the same of `low`.
        excess_high: the same of `high`.
        p: probability of so many copies or more if samples were held-out points; small: the model replays its data.
    """

    count: int
    total: int
    level: float
    held: int
    share: float
    low: float
    high: float
    excess: float
    excess_low: float
    excess_high: float
    p: float


def neighbors(exact: Dataset, x: Float[Tensor, "b *d"], around: int = _AROUND, block: int = 256) -> Neighbors:
    """Return the nearest training point of each sample, and how much nearer it is than the next ones.

    The ratio to other neighbors, unlike a distance, does not call a sample of a dense region a copy (Yoon et al. 2023
    take the second neighbor; the mean over several is calmer, and does not fail where training points are doubled).

    Args:
        exact: the training set.
        x: the samples.
        around: neighbors after the nearest that the mean is taken over, fewer where there are fewer.
        block: samples looked up together.

    Raises:
        FanalError: the training set has fewer than two points, or the shapes differ.
    """
    if len(exact) < 2:
        raise FanalError("copies are told from a training set of two points or more")
    found = [exact.nearest(part, min(around + 1, len(exact))) for part in x.split(block)]
    distance = torch.cat([distance for distance, _ in found]).cpu().double()
    rest = distance[:, 1:].mean(1)
    ratio = torch.where(rest > 0, distance[:, 0] / rest.where(rest > 0, torch.ones_like(rest)), 0.0)
    index = torch.cat([index for _, index in found])[:, 0].cpu()
    return Neighbors(ratio, distance[:, 0] / math.sqrt(x[0].numel()), index)


def check_level(held: int, level: float) -> int:
    """Return the rank of the held-out point that sets the threshold, `floor(level·(held + 1))`.

    Raises:
        FanalError: there are too few points for the level, or it is none.
    """
    if not 0 < level < 1:
        raise FanalError(f"the level must be strictly between 0 and 1, got {level}")
    rank = math.floor(level * (held + 1))
    if rank < 1:
        raise FanalError(
            f"{held} held-out points cannot set a threshold that {100 * level:g} % of them fall below: give "
            f"{math.ceil(1 / level) - 1} or more, or a higher level"
        )
    return rank


def threshold(held: Float[Tensor, " h"], level: float = LEVEL) -> float:
    """Return the ratio that a share `level` of new data falls below, from held-out points.

    The order statistic of rank `floor(level·(h + 1))`: a new point of the same law falls below it with probability
    `rank/(h + 1)`, whatever the law.

    Args:
        held: ratios of held-out points.
        level: share of false alarms.

    Raises:
        FanalError: there are too few points for the level.
    """
    return float(held.double().sort().values[check_level(len(held), level) - 1])


def proportion(count: int, total: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share (Clopper & Pearson 1934).

    Args:
        count: hits.
        total: tries, at least 1.
    """
    interval = stats.binomtest(count, total).proportion_ci(0.95, "exact")
    return float(interval.low), float(interval.high)


def copied(ratio: Float[Tensor, " b"], held: Float[Tensor, " h"], level: float = LEVEL) -> Share:
    """Return the share of samples whose ratio lies below the threshold of the held-out points, with its interval.

    If samples are drawn like held-out points, the number below an order statistic of rank r is beta-binomial with
    (r, h − r + 1), which holds the uncertainty of the threshold too; `p` is its tail.

    Args:
        ratio: of the samples.
        held: of held-out points, looked up in the same training set.
        level: share of false alarms.

    Raises:
        FanalError: there is no sample, or too few held-out points for the level.
    """
    if not len(ratio):
        raise FanalError("there is no sample to look at")
    rank, total = check_level(len(held), level), len(ratio)
    count = int((ratio.double() < threshold(held, level)).sum())
    low, high = proportion(count, total)
    p = float(stats.betabinom.sf(count - 1, total, rank, len(held) - rank + 1))
    real = rank / (len(held) + 1)
    share = count / total
    beyond, least, most = (max(0.0, (value - real) / (1 - real)) for value in (share, low, high))
    return Share(count, total, real, len(held), share, low, high, beyond, least, most, min(p, 1.0))
