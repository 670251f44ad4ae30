"""How far reconstructions of a known truth are from honest noise around it: the hallucination index of Tivnan et al."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.metrics.estimates import Estimate, jackknife
from fanal.metrics.statistics import check_features

__all__ = ["hallucination_index", "hellinger"]

_GROUPS = 20  # of samples left out together, so that a standard error is known to a sixth


def _factor(cov: Tensor, name: str) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(cov)
    if int(failed):
        raise FanalError(
            f"the {name} covariance is not positive definite: a Hellinger distance to it is 1 whatever the means, so "
            "give more samples than entries, or use diagonal=True"
        )
    return lower


def hellinger(
    mean: Float[Tensor, " d"], cov: Float[Tensor, "d d"], mean_two: Float[Tensor, " d"], cov_two: Float[Tensor, "d d"]
) -> float:
    """Return the Hellinger distance of two Gaussians, between 0 (the same) and 1 (apart).

    `H² = 1 − |C₁|^¼·|C₂|^¼/|C̄|^½·exp(−(m₁ − m₂)ᵀC̄⁻¹(m₁ − m₂)/8)` with C̄ = (C₁ + C₂)/2, in logarithms.

    Args:
        mean: of the first.
        cov: of the first, positive definite.
        mean_two: of the second.
        cov_two: of the second, positive definite.

    Raises:
        FanalError: a covariance is not positive definite.
    """
    sides = [_factor(side.double(), name) for side, name in ((cov, "first"), (cov_two, "second"))]
    middle = _factor((cov.double() + cov_two.double()) / 2, "mean")
    logs = [2 * float(side.diagonal().log().sum()) for side in (*sides, middle)]
    away = torch.linalg.solve_triangular(middle, (mean.double() - mean_two.double())[:, None], upper=False)
    overlap = (logs[0] + logs[1]) / 4 - logs[2] / 2 - float(away.square().sum()) / 8
    return math.sqrt(max(-math.expm1(min(overlap, 0.0)), 0.0))


def _index(x: Tensor, truth: Tensor, sigma: float, diagonal: bool) -> float:
    mean, centered = x.mean(0), x - x.mean(0)
    reference = torch.full_like(truth, sigma**2)
    if not diagonal:
        cov = centered.T @ centered / (len(x) - 1)
        return hellinger(mean, cov, truth, reference.diag())
    var = centered.square().sum(0) / (len(x) - 1)
    if not bool((var > 0).all()):
        raise FanalError("an entry is the same in all reconstructions: the index is 1 whatever the others are")
    middle = (var + reference) / 2
    overlap = (
        (var.log() + reference.log()).sum() / 4 - middle.log().sum() / 2 - ((mean - truth) ** 2 / middle).sum() / 8
    )
    return math.sqrt(max(-math.expm1(min(float(overlap), 0.0)), 0.0))


def hallucination_index(
    x: Float[Tensor, "n *d"], truth: Float[Tensor, "*d"], sigma: float, *, diagonal: bool = False
) -> Estimate:
    """Return the hallucination index of repeated reconstructions: their Hellinger distance from noise on the truth.

    The reconstructions' law is taken as the Gaussian with their mean and covariance. The reference without
    hallucination is the forward process applied to the truth, N(truth, sigma²·I). 0: the reconstructions vary as the
    noise that they are allowed to have, around the truth; 1: they are sure of something else.

    The estimate is biased upwards, the more so the nearer the number of samples is to that of entries: compare figures
    of the same n. The standard error is the jackknife's over 20 groups of samples.

    Args:
        x: reconstructions of the one truth, each from a fresh measurement, or a fresh run.
        truth: what was measured.
        sigma: noise level of the reference, above 0: where the reverse process was stopped, or the measurement's.
        diagonal: take entries as uncorrelated, which needs far fewer samples.

    Raises:
        FanalError: shapes differ, sigma is not above 0, or there are too few samples for a covariance.

    Reference: Tivnan et al. 2024, arXiv:2407.12780.
    """
    if tuple(x.shape[1:]) != tuple(truth.shape):
        raise FanalError(f"reconstructions have the truth's shape, got {tuple(x.shape[1:])} and {tuple(truth.shape)}")
    if not (math.isfinite(sigma) and sigma > 0):
        raise FanalError(f"the reference needs a noise level sigma > 0, got {sigma}")
    entries = truth.numel()
    least = _GROUPS if diagonal else max(_GROUPS, math.ceil((entries + 2) / (1 - 1 / _GROUPS)))
    if len(x) < least:
        ways = "" if diagonal else ", or diagonal=True, which takes entries as uncorrelated"
        raise FanalError(f"the index of {entries} entries needs at least {least} reconstructions, got {len(x)}{ways}")
    flat = check_features(x.flatten(1), "reconstructions")
    center = check_features(truth.reshape(1, -1), "truth", 1)[0]
    value = _index(flat, center, sigma, diagonal)
    group = torch.arange(len(flat)) % _GROUPS
    without = [_index(flat[group != k], center, sigma, diagonal) for k in range(_GROUPS)]
    return Estimate(value, jackknife(torch.tensor(without, dtype=torch.float64)), len(flat))
