"""Covariances: full, diagonal, or low rank plus a residual variance, so that d = 12,288 fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["Covariance", "LowRank"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """`U diag(values) Uᵀ + rest·(I − U Uᵀ)`: a few known directions and one variance for all others.

    Attributes:
        basis: U, (d, k), orthonormal columns.
        values: (k,), variances along them.
        rest: variance in every other direction.
    """

    basis: Tensor
    values: Tensor
    rest: float = 0.0


class Covariance:
    """A covariance seen through its eigenvectors, so that any function of it is a product.

    Args:
        cov: a number (isotropic), (d,) (diagonal), (d, d) (full), or a `LowRank`.
        dim: d.

    Raises:
        FanalError: it is not symmetric, not positive semi-definite, or of another size.
    """

    def __init__(self, cov: Tensor | float | LowRank, dim: int) -> None:
        self.dim = dim
        self.basis: Tensor | None = None  # (d, k); None: the coordinate axes
        self.rest: Tensor | None = None  # (), variance off the basis; None: the basis spans everything
        if isinstance(cov, LowRank):
            self._low_rank(cov)
            return
        matrix = torch.as_tensor(cov, dtype=torch.float64)
        if not bool(torch.isfinite(matrix).all()):
            raise FanalError("a covariance must be finite")
        if matrix.ndim == 0:
            self.values = matrix.expand(dim).clone()
        elif matrix.shape == (dim,):
            self.values = matrix.clone()
        elif matrix.shape == (dim, dim):
            self._full(matrix)
        else:
            raise FanalError(
                f"a covariance for d = {dim} is a number, (d,), (d, d) or LowRank; got {tuple(matrix.shape)}"
            )
        if bool((self.values < 0).any()):
            raise FanalError(f"a covariance must not have negative variances, got {float(self.values.min()):.3g}")

    def _full(self, matrix: Tensor) -> None:
        if not torch.allclose(matrix, matrix.T, rtol=1e-8, atol=1e-12 * float(matrix.abs().max())):
            raise FanalError("a full covariance must be symmetric")
        values, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
        if float(values[0]) < -1e-9 * max(float(values[-1]), 1e-300):
            raise FanalError(f"a covariance must be positive semi-definite, smallest eigenvalue {float(values[0]):.3g}")
        self.values, self.basis = values.clamp_min(0), basis

    def _low_rank(self, cov: LowRank) -> None:
        basis, values = cov.basis.double(), cov.values.double()
        if basis.ndim != 2 or len(basis) != self.dim or values.shape != (basis.shape[1],):
            raise FanalError(
                f"a low-rank covariance for d = {self.dim} needs basis (d, k) and values (k,), got "
                f"{tuple(basis.shape)} and {tuple(values.shape)}"
            )
        if not torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-5):
            raise FanalError("the columns of a low-rank basis must be orthonormal")
        if not bool((values >= 0).all()) or not 0 <= cov.rest < math.inf:
            raise FanalError("variances must not be negative")
        self.values, self.basis = values, basis
        self.rest = torch.tensor(cov.rest, dtype=torch.float64)

    def coordinates(self, centered: Tensor) -> Tensor:
        """Coordinates (B, k) of centered points (B, d) along the eigenvectors."""
        return centered if self.basis is None else centered @ self.basis.to(centered)

    def apply(self, centered: Tensor, on_values: Tensor, on_rest: Tensor | None) -> Tensor:
        """Return `f(Σ)·centered`, (B, d), given f at the eigenvalues: (k,) or (B, k), and at `rest`: () or (B, 1)."""
        along = self.coordinates(centered)
        if self.basis is None:
            return on_values * along
        basis = self.basis.to(centered)
        out = (on_values * along) @ basis.T
        return out if on_rest is None else out + on_rest * (centered - along @ basis.T)

    def log_density(self, centered: Tensor, variance: Tensor) -> Tensor:
        """Log density (B,) of N(0, Σ + variance·I) at centered points; variance is () or (B, 1)."""
        along = self.coordinates(centered)
        total = self.values.to(centered) + variance
        result = (torch.log(2 * math.pi * total) + along**2 / total).sum(1)
        if self.rest is not None:
            off = (centered**2).sum(1) - (along**2).sum(1)
            rest = (self.rest.to(centered) + variance).reshape(-1)
            result = result + (self.dim - along.shape[1]) * torch.log(2 * math.pi * rest) + off.clamp_min(0) / rest
        return -result / 2
