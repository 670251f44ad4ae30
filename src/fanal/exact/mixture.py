"""The closed-form denoiser of a Gaussian mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.exact.covariance import Covariance, LowRank
from fanal.exact.fitting import moments_of
from fanal.exact.gaussian import flat, level_of

__all__ = ["Mixture"]

_CHUNK = 2**23  # entries of the (B, K, d) differences held at a time


class Mixture(Denoiser):
    """`D(x, sigma) = Σ_k w_k(x, sigma)·D_k(x, sigma)`: the components' denoisers, weighted by their posteriors.

    `w_k ∝ π_k·N(x; m_k, Σ_k + sigma²I)` and `D_k = m_k + Σ_k(Σ_k + sigma²I)⁻¹(x − m_k)` ([REG] eq. 9 generalized).
    Distances are direct differences in float64 (float32 on mps), so nothing cancels at sigma = 0.002; the result
    has the dtype of x.

    Args:
        means: (K, *shape).
        weights: (K,) positive; normalized here. None: equal.
        std: isotropic standard deviation, one for all or (K,). Give this or `cov`.
        cov: one covariance per component: numbers, (d,), (d, d) or `LowRank`.
        sigma_min: smallest noise level it is used at.
        sigma_max: largest noise level it is used at.

    Raises:
        FanalError: sizes do not match, a weight is not positive, or a covariance is none.
    """

    def __init__(
        self,
        means: Tensor,
        weights: Tensor | Sequence[float] | None = None,
        std: Tensor | float | None = None,
        *,
        cov: Sequence[Tensor | float | LowRank] | Tensor | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim < 2 or len(means) == 0 or not bool(torch.isfinite(means).all()):
            raise FanalError(f"means must be finite and have shape (K, *shape), got {tuple(means.shape)}")
        count = len(means)
        self.shape = tuple(means.shape[1:])
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.means = means.flatten(1)
        share = torch.ones(count) if weights is None else weights
        share = torch.as_tensor(share, dtype=None if isinstance(share, Tensor) else torch.float64)
        share = share.to("cpu", torch.float64)
        if share.shape != (count,) or not bool((share > 0).all()) or not bool(torch.isfinite(share).all()):
            raise FanalError(f"weights must be {count} positive numbers, got {share.tolist()}")
        self.prior = share / share.sum()
        if (std is None) == (cov is None):
            raise FanalError("give a mixture either std= or cov=")
        self.std: Tensor | None = None
        self.covs: list[Covariance] = []
        if std is not None:
            spread = torch.as_tensor(std, dtype=torch.float64)
            if spread.shape not in ((), (count,)) or not bool((spread >= 0).all()):
                raise FanalError(f"std must be one number or {count} numbers >= 0, got {spread.tolist()}")
            self.std = spread.expand(count).clone()
        else:
            assert cov is not None
            if len(cov) != count:
                raise FanalError(f"one covariance per component: got {len(cov)} for {count} means")
            self.covs = [Covariance(c, self.means.shape[1]) for c in cov]

    @classmethod
    def fit(
        cls,
        points: Tensor,
        labels: Tensor,
        *,
        rank: int | None = None,
        seed: int = 0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> Mixture:
        """Return the mixture of one Gaussian per class, weighted by the classes' shares ([REG] sec. 4.3).

        Args:
            points: (N, *shape).
            labels: class of each point, (N,).
            rank: directions kept in each covariance, see `fanal.exact.fitting`; at most a class's points − 1 are.
            seed: of the randomized SVD.
            sigma_min: as in the class.
            sigma_max: as in the class.

        Raises:
            FanalError: the labels do not fit, or a class has fewer than two points.
        """
        if labels.shape != (len(points),):
            raise FanalError(f"one label per point: got {tuple(labels.shape)} for {len(points)}")
        found, counts = labels.unique(return_counts=True)
        if int(counts.min()) < 2:
            raise FanalError(f"class {int(found[counts.argmin()])} has one point only: leave it out")
        own = [
            moments_of(points[labels == c], None if rank is None else min(rank, int(n) - 1), seed)
            for c, n in zip(found, counts, strict=True)
        ]
        means = torch.stack([mean for mean, _ in own])
        return cls(means, counts.double(), cov=[cov for _, cov in own], sigma_min=sigma_min, sigma_max=sigma_max)

    def _log_joint(self, points: Tensor, level: Tensor) -> Tensor:
        """`log π_k + log N(x; m_k, Σ_k + sigma²I)`, (B, K)."""
        prior = self.prior.to(points).log()
        means = self.means.to(points)
        if self.std is None:
            parts = [cov.log_density(points - mean, level**2) for cov, mean in zip(self.covs, means, strict=True)]
            return prior + torch.stack(parts, 1)
        dim = means.shape[1]
        size = max(1, _CHUNK // max(1, len(points) * dim))
        squares = torch.cat([((points[:, None] - part) ** 2).sum(2) for part in means.split(size)], 1)
        total = self.std.to(points) ** 2 + level**2
        return prior - (squares / total + dim * torch.log(2 * torch.pi * total)) / 2

    def __call__(self, x: Float[Tensor, "b *d"], sigma: Tensor, /) -> Float[Tensor, "b *d"]:
        """Return the posterior mean of the data given x."""
        points, level = flat(x, sigma, self.shape)
        weights = torch.softmax(self._log_joint(points, level), 1)
        means = self.means.to(points)
        if self.std is not None:
            variance = self.std.to(points) ** 2
            keep = variance / (variance + level**2)  # (K,) or (B, K): how much of x − m_k is data
            pulled = weights * (1 - keep)
            out = pulled @ means + (weights * keep).sum(1, keepdim=True) * points
        else:
            out = torch.zeros_like(points)
            for k, (cov, mean) in enumerate(zip(self.covs, means, strict=True)):
                values = cov.values.to(points)
                rest = None if cov.rest is None else cov.rest.to(points)
                part = cov.apply(
                    points - mean,
                    values / (values + level**2),
                    None if rest is None else rest / (rest + level**2),
                )
                out = out + weights[:, k : k + 1] * (mean + part)
        return out.reshape(x.shape).to(x.dtype)

    def score(self, x: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, "b *d"]:
        """Return `∇ log p(x; sigma) = (D − x)/sigma²`, formed in float64 before rounding to the dtype of x."""
        points, level = flat(x, sigma, self.shape)
        denoised = self(x.to(points.dtype), level_of(sigma)).flatten(1)
        return ((denoised - points) / level**2).reshape(x.shape).to(x.dtype)

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, " b"]:
        """Return `log p(x; sigma)` in nats, float64 (float32 on mps)."""
        return torch.logsumexp(self._log_joint(*flat(x, sigma, self.shape)), 1)

    def weights(self, x: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, "b k"]:
        """Return the posterior probabilities of the components given x."""
        return torch.softmax(self._log_joint(*flat(x, sigma, self.shape)), 1)

    def entropy(self, x: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, " b"]:
        """Return the entropy of `weights` in nats: how undecided x is between the components."""
        return torch.special.entr(self.weights(x, sigma)).sum(1)

    def nearest(self, x: Float[Tensor, "b *d"], k: int = 1) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
        """Return distances to the k nearest means and their indices, nearest first."""
        points, _ = flat(x, torch.zeros(()), self.shape)
        distance = torch.cdist(points, self.means.to(points), compute_mode="donot_use_mm_for_euclid_dist")
        return torch.topk(distance, min(k, len(self.means)), largest=False)

    def draw(self, count: int, seed: int = 0) -> Float[Tensor, "n *d"]:
        """Draw clean samples from the mixture, seeded, float64."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.prior, count, replacement=True, generator=generator)
        normal = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        if self.std is not None:
            out = self.means[which] + self.std[which, None] * normal
        else:
            out = self.means[which].clone()
            for k, cov in enumerate(self.covs):
                rows = which == k
                rest = None if cov.rest is None else cov.rest.sqrt()
                out[rows] += cov.apply(normal[rows], cov.values.sqrt(), rest)
        return out.reshape(count, *self.shape)
