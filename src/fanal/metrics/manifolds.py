"""How far two sets cover each other: precision and recall, density and coverage, by nearest neighbors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.metrics.distances import Distance, check_pair
from fanal.metrics.estimates import Estimate, mean, rate

__all__ = ["density_coverage", "precision_recall"]

_ROWS = 1024  # rows of a distance matrix held at once
_HALVES = 20  # so that a standard error is known to a sixth

Figures = Callable[[Tensor, Tensor, float], tuple[Estimate, Estimate]]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Return squared distances; both sets are centered, so that little cancels."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def _radii(x: Tensor, k: int, rounding: float) -> Tensor:
    """Return each sample's squared distance to the k-th nearest other sample of its set, plus rounding."""
    found = []
    for start in range(0, len(x), _ROWS):
        square = _squares(x[start : start + _ROWS], x)
        rows = torch.arange(len(square), device=x.device)
        square[rows, start + rows] = torch.inf
        found.append(square.kthvalue(k, dim=1).values)
    return torch.cat(found) + rounding


def _inside(x: Tensor, centers: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Return in how many balls each point lies, and whether each ball holds a point."""
    counts, held = [], torch.zeros(len(centers), dtype=torch.bool, device=x.device)
    for part in x.split(_ROWS):
        within = _squares(part, centers) <= radii
        counts.append(within.sum(1))
        held |= within.any(0)
    return torch.cat(counts), held


def _told(found: Estimate, halves: list[float], x: Tensor, real: Tensor) -> Distance:
    return Distance(found.value, max(found.se, float(np.std(halves, ddof=1))), len(x), len(real))


def _estimate(figures: Figures, x: Tensor, real: Tensor, k: int, seed: int) -> tuple[Distance, Distance]:
    """Return two figures of two sets; their errors are the spread of the same figures of random halves of both.

    Halves drawn without replacement spread as much around the whole sets' figure as that one does around the truth
    (the delete-half jackknife). Nearest neighbors are not smooth enough for leaving out one sample at a time.
    """
    if k < 1:
        raise FanalError(f"k must be at least 1, got {k}")
    one, two = check_pair(x, real, 2 * (k + 1))
    center = two.mean(0)
    one, two = one - center, two - center
    longest = max(float(one.square().sum(1).max()), float(two.square().sum(1).max()))
    rounding = 64 * torch.finfo(torch.float64).eps * longest  # so that a copy lies in a ball of radius zero
    random, halves = np.random.default_rng(seed), ([], [])
    for _ in range(_HALVES):
        half = [side[torch.from_numpy(random.permutation(len(side))[: len(side) // 2])] for side in (one, two)]
        for values, found in zip(halves, figures(half[0], half[1], rounding), strict=True):
            values.append(found.value)
    first, second = figures(one, two, rounding)
    return _told(first, halves[0], one, two), _told(second, halves[1], one, two)


def precision_recall(
    x: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, k: int = 3, seed: int = 0
) -> tuple[Distance, Distance]:
    """Return improved precision and recall.

    Precision is the share of generated samples that lie in the ball of a real sample, whose radius is the distance to
    its k-th nearest real neighbor; recall is the share of real samples in the balls of generated ones. Borders belong
    to the balls. Both depend on the sizes of the sets. The standard error is the spread of 20 random halves of both
    sets, and at least that of a rate.

    Args:
        x: features of the generated samples.
        real: of the real ones.
        k: which neighbor sets the radius.
        seed: of the halves.

    Raises:
        FanalError: fewer than 2(k + 1) samples, different lengths, or values that are not finite.

    Reference: Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2. Standard error: Shao & Wu 1989, A general
        theory for jackknife variance estimation.
    """

    def figures(a: Tensor, b: Tensor, rounding: float) -> tuple[Estimate, Estimate]:
        precise, _ = _inside(a, b, _radii(b, k, rounding))
        recalled, _ = _inside(b, a, _radii(a, k, rounding))
        return rate(precise > 0), rate(recalled > 0)

    return _estimate(figures, x, real, k, seed)


def density_coverage(
    x: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, k: int = 5, seed: int = 0
) -> tuple[Distance, Distance]:
    """Return density and coverage.

    Density is the mean number of real samples' balls that a generated sample lies in, divided by k; 1 on average where
    the distributions agree. Coverage is the share of real samples whose ball holds a generated sample;
    `1 − (m − 1)⋯(m − k)/((n + m − 1)⋯(n + m − k))` on average where they agree. Balls and standard errors are those of
    `precision_recall`.

    Args:
        x: features of the generated samples.
        real: of the real ones.
        k: which neighbor sets the radius.
        seed: of the halves.

    Raises:
        FanalError: fewer than 2(k + 1) samples, different lengths, or values that are not finite.

    Reference: Naeem et al. 2020, arXiv:2002.09797, section 3.
    """

    def figures(a: Tensor, b: Tensor, rounding: float) -> tuple[Estimate, Estimate]:
        inside, held = _inside(a, b, _radii(b, k, rounding))
        return mean(inside.double() / k), rate(held)

    return _estimate(figures, x, real, k, seed)
