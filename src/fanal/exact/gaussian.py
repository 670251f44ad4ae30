"""The closed-form denoiser of Gaussian data, with its exact trajectories."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.exact.covariance import Covariance, LowRank
from fanal.exact.fitting import moments_of

__all__ = ["Gaussian", "accumulator", "flat", "level_of"]


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype closed forms compute in: float64 wherever the device has it (mps does not)."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def level_of(sigma: Tensor | float) -> Tensor:
    """Return a noise level as a tensor; a plain number keeps its digits, of which torch's default would drop half."""
    return sigma if isinstance(sigma, Tensor) else torch.as_tensor(sigma, dtype=torch.float64)


def flat(x: Tensor, sigma: Tensor | float, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return x as (B, d) and sigma as () or (B, 1), both in the accumulating dtype.

    Raises:
        FanalError: x is not a batch of `shape`, or sigma is neither 0-d nor (B,), or negative.
    """
    if tuple(x.shape[1:]) != shape:
        raise FanalError(f"expected a batch of shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    sigma = level_of(sigma)
    if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(x)):
        raise FanalError(f"sigma must be 0-d or have one entry per sample, got shape {tuple(sigma.shape)}")
    if not bool((sigma >= 0).all()):
        raise FanalError(f"a noise level must not be negative, got sigma = {str(sigma.tolist()):.60}")
    dtype = accumulator(x)
    level = sigma.to(x.device, dtype)
    return x.flatten(1).to(dtype), level[:, None] if level.ndim else level


class Gaussian(Denoiser):
    """`D(x, sigma) = μ + Σ(Σ + sigma²I)⁻¹(x − μ)` for data N(μ, Σ) ([REG] sec. 4.3).

    Everything is computed in float64 (float32 on mps) and returned in the dtype of x.

    Args:
        mean: μ; its shape is the shape of a sample.
        cov: a number, (d,) for a diagonal, (d, d), or `LowRank`.
        sigma_min: smallest noise level it is used at.
        sigma_max: largest noise level it is used at.

    Raises:
        FanalError: Σ is not a covariance of the mean's size.
    """

    def __init__(
        self, mean: Tensor, cov: Tensor | float | LowRank, sigma_min: float = 0.002, sigma_max: float = 80.0
    ) -> None:
        mean = torch.as_tensor(mean, dtype=torch.float64)
        if mean.ndim == 0 or not bool(torch.isfinite(mean).all()):
            raise FanalError("the mean must be a finite tensor of the shape of one sample")
        self.shape = tuple(mean.shape)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.mean = mean.flatten()
        self.cov = Covariance(cov, len(self.mean))

    @classmethod
    def fit(
        cls,
        points: Tensor,
        *,
        rank: int | None = None,
        seed: int = 0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> Gaussian:
        """Return the Gaussian with the mean and covariance of points (N, *shape), see `fanal.exact.fitting`.

        Raises:
            FanalError: the points are too few or not finite, or the rank does not fit.
        """
        mean, cov = moments_of(points, rank, seed)
        return cls(mean, cov, sigma_min, sigma_max)

    def _map(self, x: Tensor, sigma: Tensor, f: str) -> Tensor:
        points, level = flat(x, sigma, self.shape)
        centered = points - self.mean.to(points)
        values = self.cov.values.to(points)
        rest = None if self.cov.rest is None else self.cov.rest.to(points)
        total = values + level**2
        if f == "denoise":
            out = self.mean.to(points) + self.cov.apply(
                centered, values / total, None if rest is None else rest / (rest + level**2)
            )
        else:
            out = self.cov.apply(centered, -1 / total, None if rest is None else -1 / (rest + level**2))
        return out.reshape(x.shape).to(x.dtype)

    def __call__(self, x: Float[Tensor, "b *d"], sigma: Tensor, /) -> Float[Tensor, "b *d"]:
        """Return the posterior mean of the data given x."""
        return self._map(x, sigma, "denoise")

    def score(self, x: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, "b *d"]:
        """Return `∇ log p(x; sigma) = −(Σ + sigma²I)⁻¹(x − μ)`, without the cancellation of `(D − x)/sigma²`."""
        return self._map(x, sigma, "score")

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, " b"]:
        """Return `log N(x; μ, Σ + sigma²I)` in nats, float64 (float32 on mps)."""
        points, level = flat(x, sigma, self.shape)
        return self.cov.log_density(points - self.mean.to(points), level**2)

    def solution(self, x: Float[Tensor, "b *d"], sigma: Tensor, sigma_next: Tensor) -> Float[Tensor, "b *d"]:
        """Return the exact end of the trajectory `dx/dsigma = (x − D)/sigma` from (x, sigma) to sigma_next.

        `x_k' − μ_k = sqrt((λ_k + sigma'²)/(λ_k + sigma²))·(x_k − μ_k)` along the eigenvectors of Σ ([REG] eq. 55,
        whose matrix exponential is misprinted; the solution is right).
        """
        points, level = flat(x, sigma, self.shape)
        end = torch.as_tensor(sigma_next).to(points)
        values = self.cov.values.to(points)
        rest = None if self.cov.rest is None else self.cov.rest.to(points)
        shrink = ((values + end**2) / (values + level**2)).sqrt()
        off = None if rest is None else ((rest + end**2) / (rest + level**2)).sqrt()
        out = self.mean.to(points) + self.cov.apply(points - self.mean.to(points), shrink, off)
        return out.reshape(x.shape).to(x.dtype)
