"""Gaussians fitted to data: a full covariance in few dimensions, the leading directions in many."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact.covariance import LowRank

__all__ = ["FULL", "RANK", "moments_of"]

FULL = 1024
"""Largest dimension whose covariance is kept in full by default."""

RANK = 256
"""Leading directions kept by default in more dimensions."""


def moments_of(points: Tensor | np.ndarray, rank: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor | LowRank]:
    """Return mean (*shape) and covariance of points, by maximum likelihood.

    With a rank, the covariance is that of the leading principal directions and one variance for all others, their
    mean ([REG] sec. 4.3 keeps the leading ones alone).

    Args:
        points: (N, *shape) floats.
        rank: directions to keep; None: all for d up to `FULL`, else `RANK`.
        seed: of the randomized SVD.

    Raises:
        FanalError: there are fewer than two points, one is not finite, or the rank is not in [1, min(N, d) − 1].
    """
    values = torch.as_tensor(points)
    if values.ndim < 2 or len(values) < 2 or not values.is_floating_point():
        raise FanalError(f"a Gaussian is fitted to two or more points (N, *shape), floats, got {tuple(values.shape)}")
    flat = values.flatten(1)
    if not bool(torch.isfinite(flat).all()):
        raise FanalError("a point is not finite: leave it out")
    count, dim = flat.shape
    mean = flat.mean(0, dtype=torch.float64)
    shape = values.shape[1:]
    if rank is None and dim <= FULL:
        return mean.reshape(shape), torch.cov(flat.double().T, correction=0).reshape(dim, dim)
    wanted = min(RANK, count - 1, dim - 1) if rank is None else rank
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= min(count, dim) - 1:
        raise FanalError(f"the rank must be a whole number in [1, {min(count, dim) - 1}], got {rank!r}")
    along, basis = _leading(flat, wanted, seed)
    total = sum(float(((part.double() - mean) ** 2).sum()) for part in flat.split(1024)) / count
    return mean.reshape(shape), LowRank(basis, along, max(total - float(along.sum()), 0.0) / (dim - wanted))


def _leading(flat: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The largest variances (k,) and their directions (d, k): exact in few dimensions, by randomized SVD in many."""
    count, dim = flat.shape
    if dim <= FULL:
        values, basis = torch.linalg.eigh(torch.cov(flat.double().T, correction=0).reshape(dim, dim))
        return values[-rank:].clamp_min(0), basis[:, -rank:]
    from sklearn.decomposition import PCA  # slow to import

    fit = PCA(rank, svd_solver="randomized", random_state=seed).fit(flat.numpy())
    basis = torch.linalg.qr(torch.from_numpy(fit.components_).double().T).Q
    return torch.from_numpy(fit.explained_variance_).double() * (count - 1) / count, basis
