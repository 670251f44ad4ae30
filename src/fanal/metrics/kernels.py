"""Maximum mean discrepancies: KID (polynomial kernel) and MMD (Gaussian kernel), unbiased, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.metrics.distances import Distance, check_pair
from fanal.metrics.estimates import jackknife, mean

__all__ = ["kid", "median_distance", "mmd"]

_ROWS = 1024  # rows of a kernel matrix held at once
_POOL = 1000  # samples of each set that the median distance looks at

Kernel = Callable[[Tensor, Tensor], Tensor]


def _sums(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Return the row and column sums of a kernel matrix, of which only some rows exist at a time."""
    rows, columns = [], torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for part in x.split(_ROWS):
        block = kernel(part, y)
        rows.append(block.sum(1))
        columns += block.sum(0)
    return torch.cat(rows), columns


def _inner(x: Tensor, kernel: Kernel) -> Tensor:
    """Return each sample's sum of kernel values with the other samples of its own set."""
    own = torch.cat([kernel(part[:, None], part[:, None])[:, 0, 0] for part in x.split(_ROWS)])
    return _sums(x, x, kernel)[0] - own


def _without(own: Tensor, across: Tensor, other: int) -> Tensor:
    """Return the terms of the estimate that change with one sample left out, for each sample."""
    n = len(own)
    inner = (own.sum() - 2 * own) / ((n - 1) * (n - 2))
    return inner - 2 * (across.sum() - across) / ((n - 1) * other)


def _discrepancy(x: Tensor, y: Tensor, kernel: Kernel) -> Distance:
    """Return the unbiased estimate of MMD² over all pairs, with the jackknife's standard error over both sets."""
    n, m = len(x), len(y)
    own_x, own_y = _inner(x, kernel), _inner(y, kernel)
    across_x, across_y = _sums(x, y, kernel)
    value = own_x.sum() / (n * (n - 1)) + own_y.sum() / (m * (m - 1)) - 2 * across_x.sum() / (n * m)
    error = math.hypot(jackknife(_without(own_x, across_x, m)), jackknife(_without(own_y, across_y, n)))
    return Distance(float(value), error, n, m)


def kid(x: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, subsets: int | None = None, seed: int = 0) -> Distance:
    """Return the kernel distance (KID with Inception's features): unbiased MMD² with `k(a, b) = (aᵀb/d + 1)³`.

    It is zero on average where the distributions agree, so a figure below zero is as it should be. The standard error
    is the jackknife's over the samples of both sets; where the distributions agree it is about √2 too large.

    Args:
        x: features of the generated samples.
        real: of the real ones.
        subsets: None compares all pairs. A number cuts both sets, in random order, into that many disjoint subsets:
            the figure is their mean and the standard error is that of a mean. Faster, and less exact.
        seed: of that order.

    Raises:
        FanalError: fewer than three samples (per subset), different lengths, or values that are not finite.

    Reference: Bińkowski et al. 2018, arXiv:1801.01401; the estimate: Gretton et al. 2012, A kernel two-sample test,
        eq. 3.
    """
    one, two = check_pair(x, real, 3)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(-1, -2) / one.shape[1] + 1) ** 3

    if subsets is None:
        return _discrepancy(one, two, kernel)
    most = min(len(one), len(two)) // 3
    if not 2 <= subsets <= most:
        raise FanalError(f"for {len(one)} and {len(two)} samples subsets must be in [2, {most}], got {subsets}")
    random = np.random.default_rng(seed)
    parts = zip(
        *(side[torch.from_numpy(random.permutation(len(side)))].tensor_split(subsets) for side in (one, two)),
        strict=True,
    )
    found = mean(torch.tensor([_discrepancy(a, b, kernel).value for a, b in parts], dtype=torch.float64))
    return Distance(found.value, found.se, len(one), len(two))


def median_distance(x: Float[Tensor, "n d"], real: Float[Tensor, "m d"], seed: int = 0) -> float:
    """Return the median distance between two different samples of the pooled sets, at most 1,000 of each.

    Raises:
        FanalError: the median is zero: more than half of the pairs are copies of each other.
    """
    sides = check_pair(x, real, 2)
    random = np.random.default_rng(seed)
    pool = torch.cat([side[torch.from_numpy(random.permutation(len(side))[:_POOL]).to(side.device)] for side in sides])
    result = float(torch.pdist(pool).median())
    if not result > 0:
        raise FanalError("the median distance is 0, since most samples are copies of each other: give a bandwidth")
    return result


def mmd(
    x: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, bandwidth: float | None = None, seed: int = 0
) -> Distance:
    """Return the unbiased squared maximum mean discrepancy with `k(a, b) = exp(−|a − b|²/(2·bandwidth²))`.

    Zero on average where the distributions agree; the standard error is that of `kid`.

    Args:
        x: features of the generated samples.
        real: of the real ones.
        bandwidth: None takes `median_distance`, which depends on both sets; give a number to compare several sets.
        seed: of the samples that the median looks at.

    Raises:
        FanalError: a bandwidth that is not positive, fewer than three samples, different lengths, or values that are
            not finite.

    Reference: Gretton et al. 2012, A kernel two-sample test, eq. 3.
    """
    one, two = check_pair(x, real, 3)
    width = median_distance(one, two, seed) if bandwidth is None else bandwidth
    if not 0 < width < math.inf:
        raise FanalError(f"the bandwidth must be a positive number, got {width}")
    center = two.mean(0)  # smaller numbers cancel less in |a|² + |b|² − 2ab

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2 * a @ b.transpose(-1, -2)
        return torch.exp(square.clamp_min(0) / (-2 * width**2))

    return _discrepancy(one - center, two - center, kernel)
