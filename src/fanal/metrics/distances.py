"""Distances between two sets of feature vectors that look at whole distributions: Fréchet, sliced Wasserstein."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.metrics.estimates import Estimate
from fanal.metrics.statistics import Statistics, check_features
from fanal.seeding import noise

__all__ = ["Distance", "check_pair", "fid", "sliced_wasserstein"]


@dataclass(frozen=True)
class Distance(Estimate):
    """A figure that compares `n` samples with `n_real` real ones.

    Attributes:
        n_real: number of real samples; None where a file of statistics does not say.
        warning: what a reader of the figure must know; empty if nothing.
    """

    n_real: int | None = None
    warning: str = ""


def check_pair(x: Tensor, real: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return two sets of features as float64.

    Raises:
        FanalError: they differ in length, have fewer than `least` samples, or are not finite.
    """
    sides = check_features(x, "features", least), check_features(real, "real features", least)
    if x.shape[1] != real.shape[1]:
        raise FanalError(f"both sets need features of one length, got {x.shape[1]} and {real.shape[1]}")
    return sides


def _factor(cov: Tensor) -> Tensor:
    """Return A of shape (D, rank) with A Aᵀ = cov; directions of rounding are left out, and so is negative noise."""
    from scipy.linalg import eigh

    values, vectors = (torch.from_numpy(part) for part in eigh(cov.numpy(), driver="evd"))
    floor = max(float(values.max()), 0.0) * len(values) * torch.finfo(torch.float64).eps
    keep = values > floor
    return vectors[:, keep] * values[keep].sqrt()


def _coupling(x: Statistics, real: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return factors A and B of the covariances and the decomposition U, S, Vᵀ of AᵀB; Σ S = tr (C₁C₂)^½."""
    from scipy.linalg import svd

    a, b = _factor(x.cov), _factor(real.cov)
    if not a.numel() or not b.numel():  # one of the sets is a single point, many times
        empty = torch.zeros(0, dtype=torch.float64)
        return a, b, a.new_zeros(a.shape[1], 0), empty, b.new_zeros(0, b.shape[1])
    u, s, vt = (torch.from_numpy(part) for part in svd((a.T @ b).numpy(), full_matrices=False))
    keep = s > s.max() * 1e-12
    return a, b, u[:, keep], s[keep], vt[keep]


def _moved(features: Tensor, away: Tensor, other: Tensor, s: Tensor, v: Tensor) -> float:
    """Variance, over the samples of one side, of each one's first-order effect on the distance."""
    centered = features.double() - features.double().mean(0)
    optimal = ((centered @ other) @ v) ** 2 / s
    effect = centered.square().sum(1) - optimal.sum(1) + 2 * centered @ away
    return float(effect.var())


def fid(x: Tensor | Statistics, real: Tensor | Statistics) -> Distance:
    """Return the Fréchet distance between the Gaussians fitted to two sets of features (FID with Inception's).

    `|m₁ − m₂|² + tr C₁ + tr C₂ − 2 tr (C₁C₂)^½`. The last trace is the sum of the singular values of AᵀB, where
    C₁ = AAᵀ and C₂ = BBᵀ: never complex or negative, whatever the ranks, as a square root of the product C₁C₂ may be.

    The standard error is that of the delta method (the infinitesimal jackknife). A sample z of the first set moves the
    distance by `(2(m₁ − m₂)ᵀ(z − m₁) + (z − m₁)ᵀ(I − T)(z − m₁))/n` with T the optimal linear map between the two
    Gaussians; the second set likewise. A side whose features were not kept counts as exact. With no more samples than
    features the covariance is singular: there is no standard error, and the result says so.

    The figure is biased upwards, the more so the fewer the samples: compare figures of the same n only.

    Args:
        x: features (N, D) or statistics of the generated samples.
        real: of the real ones.

    Raises:
        FanalError: different extractors, different lengths, fewer than two samples, or values that are not finite.

    Reference: Heusel et al. 2017, arXiv:1706.08500; the distance: Dowson & Landau 1982, The Fréchet distance between
        multivariate normal distributions; its limit law: Rippl, Munk & Sturm 2016, arXiv:1507.04090.
    """
    one, two = (side if isinstance(side, Statistics) else Statistics.of(side) for side in (x, real))
    one.check_same(two)
    a, b, u, s, vt = _coupling(one, two)
    away = one.mean - two.mean
    total = away.square().sum() + one.cov.trace() + two.cov.trace() - 2 * s.sum()
    value = max(float(total), 0.0)  # rounding can leave -1e-15 where the sets agree
    few = [side.n for side in (one, two) if side.n is not None and side.n <= len(one.mean)]
    if few:
        warning = (
            f"{min(few)} samples are not more than the {len(one.mean)} features: the covariance is singular and the "
            "figure mostly bias"
        )
        return Distance(value, math.nan, one.n or 0, two.n, warning)
    parts = []
    if one.features is not None:
        parts.append(_moved(one.features, away, b, s, vt.T) / len(one.features))
    if two.features is not None:
        parts.append(_moved(two.features, -away, a, s, u) / len(two.features))
    warning = "" if len(parts) == 2 else "the standard error leaves out a side whose features were not kept"
    return Distance(value, math.sqrt(sum(parts)) if parts else math.nan, one.n or 0, two.n, warning)


def _merge(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pieces on which two empirical quantile functions are both constant: their widths and indices."""
    cuts = torch.cat([m * torch.arange(1, n + 1), n * torch.arange(1, m + 1)]).unique()  # in units of 1/(n·m)
    start = torch.cat([cuts.new_zeros(1), cuts[:-1]])
    return (cuts - start).double() / (n * m), start // m, start // n


def _potential(at: Tensor, slope: Tensor, order: Tensor) -> Tensor:
    """Integrate the slope of a potential along the sorted points, and return it in the points' own order."""
    steps = (at[1:] - at[:-1]) * (slope[1:] + slope[:-1]) / 2
    along = torch.cat([at.new_zeros(1, at.shape[1]), steps.cumsum(0)])
    return torch.empty_like(along).scatter_(0, order, along)


def _slices(x: Tensor, y: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return W_p^p per column, and the sum over columns of each point's Kantorovich potential, for both sets."""
    (xs, by_x), (ys, by_y) = x.sort(0), y.sort(0)
    width, i, j = _merge(len(x), len(y))
    gap = xs[i] - ys[j]
    cost = (width[:, None] * gap.abs() ** power).sum(0)
    push = width[:, None] * power * gap.abs() ** (power - 1) * gap.sign()
    at_x = torch.zeros_like(xs).index_add_(0, i, push) * len(x)
    at_y = torch.zeros_like(ys).index_add_(0, j, -push) * len(y)
    return cost, _potential(xs, at_x, by_x).sum(1), _potential(ys, at_y, by_y).sum(1)


def sliced_wasserstein(
    x: Float[Tensor, "n d"], real: Float[Tensor, "m d"], *, order: int = 2, directions: int = 512, seed: int = 0
) -> Distance:
    """Return the sliced p-Wasserstein distance `(mean_θ W_p^p(θᵀx, θᵀreal))^(1/p)` over random directions θ.

    Along each direction the distance is exact: the quantile functions are compared piece by piece, whatever the sizes
    of the sets. The standard error has three parts: each set's, from the mean Kantorovich potential of its points (a
    first-order effect, as in the delta method), and that of the finite number of directions.

    Args:
        x: features of the generated samples.
        real: of the real ones.
        order: p, 1 or 2.
        directions: how many, uniform on the sphere.
        seed: of the directions.

    Raises:
        FanalError: another order, fewer than two directions or samples, different lengths, or non-finite values.

    Reference: Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters of measures; limit law along a direction:
        del Barrio & Loubes 2019, arXiv:1705.01299.
    """
    if order not in (1, 2):
        raise FanalError(f"the order of a sliced Wasserstein distance is 1 or 2, got {order!r}")
    if directions < 2:
        raise FanalError(f"at least 2 directions are needed, got {directions}")
    one, two = check_pair(x.cpu(), real.cpu(), 2)
    lines = noise((one.shape[1],), range(directions), stream=f"sliced {seed}", dtype=torch.float64)
    lines = lines / lines.norm(dim=1, keepdim=True)
    costs, f, g = [], torch.zeros(len(one), dtype=torch.float64), torch.zeros(len(two), dtype=torch.float64)
    for part in lines.split(64):
        cost, at_x, at_y = _slices(one @ part.T, two @ part.T, order)
        costs.append(cost)
        f += at_x / directions
        g += at_y / directions
    cost = torch.cat(costs)
    mean = float(cost.mean())
    variance = float(f.var() / len(one) + g.var() / len(two) + cost.var() / directions)
    value = mean ** (1 / order)
    se = math.sqrt(variance) / (order * value ** (order - 1)) if value > 0 else math.nan
    return Distance(value, se, len(one), len(two))
