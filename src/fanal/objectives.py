"""What a denoiser can be trained on, and at which noise levels.

Every objective maps `(denoiser, batch)` to one loss per sample. With `x = clean + sigma·n` and the model's score
`s(x, sigma) = (D(x, sigma) − x) / sigma²` ([GEO] lemma 3), at each sigma the expectations of

    dae    |D − clean|²                       [GEO] eq. 10
    dsm    |s + n/sigma|² = dae / sigma⁴      [GEO] eq. 12 and proposition 6
    esm    |s − ∇ log p|² = dsm − constant    [GEO] eq. 13 and lemma 2
    ism    |s|² + 2 div s = esm − constant    Hyvärinen 2005; [REG] appendix A.2
    ssm    ism with vᵀ(∂s/∂x)v for div s      Song et al. 2019, arXiv:1905.07088

have the same minimizer, the posterior mean `D = E[clean | x]` ([GEO] lemma 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser, expand, score
from fanal.errors import FanalError

__all__ = [
    "NOISE_LEVELS",
    "OBJECTIVES",
    "Batch",
    "LogNormal",
    "Middle",
    "NoiseLevels",
    "Objective",
    "dae",
    "dsm",
    "edm",
    "edm_weight",
    "esm",
    "ism",
    "ssm",
]

_LARGEST_EXACT = 4096  # values per sample up to which the exact divergence, one backward pass each, is sensible


@dataclass(frozen=True, eq=False)
class Batch:
    """Clean samples and how they are made noisy.

    Attributes:
        clean: clean samples, (B, *shape).
        noise: standard normal noise n, (B, *shape).
        sigma: noise levels, (B,), positive.
        sigma_data: standard deviation of the data, for `edm`.
        score: the true score ∇ log p(x; sigma), for `esm`.
        probe: random directions with identity covariance, (B, *shape) or (K, B, *shape), for `ssm`.
    """

    clean: Float[Tensor, "b *d"]
    noise: Float[Tensor, "b *d"]
    sigma: Float[Tensor, " b"]
    sigma_data: float | None = None
    score: Callable[[Tensor, Tensor], Tensor] | None = None
    probe: Tensor | None = None

    @property
    def noisy(self) -> Float[Tensor, "b *d"]:
        """`x = clean + sigma·n`."""
        return self.clean + expand(self.sigma, self.clean) * self.noise


Objective = Callable[[Denoiser, Batch], Tensor]


def _squared(difference: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    return difference.flatten(1).square().sum(1)


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return `1 / c_out² = (sigma² + sd²) / (sigma·sd)²`, which gives the loss the same size at every noise level
    before training (Karras et al. 2022, arXiv:2206.00364, table 1).
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def edm(denoiser: Denoiser, batch: Batch) -> Float[Tensor, " b"]:
    """Return `|D(x, sigma) − clean|² / c_out²`, a mean over the values of a sample, not a sum.

    (Karras et al. 2022, eq. 2 and table 1.)

    Raises:
        FanalError: the batch has no `sigma_data`.
    """
    if batch.sigma_data is None:
        raise FanalError("the objective 'edm' weighs by the standard deviation of the data: set Batch.sigma_data")
    return edm_weight(batch.sigma, batch.sigma_data) * dae(denoiser, batch) / batch.clean[0].numel()


def dae(denoiser: Denoiser, batch: Batch) -> Float[Tensor, " b"]:
    """Return the denoising autoencoder's loss `|D(x, sigma) − clean|²` ([GEO] eq. 10)."""
    return _squared(denoiser(batch.noisy, batch.sigma) - batch.clean)


def dsm(denoiser: Denoiser, batch: Batch) -> Float[Tensor, " b"]:
    """Return the denoising score matching loss `|s(x, sigma) + n/sigma|²` ([GEO] eq. 12; [REG] eq. 27)."""
    x = batch.noisy
    own = score(x, denoiser(x, batch.sigma), batch.sigma)
    return _squared(own + batch.noise / expand(batch.sigma, x))


def esm(denoiser: Denoiser, batch: Batch) -> Float[Tensor, " b"]:
    """Return the explicit score matching loss `|s(x, sigma) − ∇ log p(x; sigma)|²` ([GEO] eq. 13).

    Raises:
        FanalError: the batch has no true `score`.
    """
    if batch.score is None:
        raise FanalError("the objective 'esm' needs the true score, known for closed forms only: set Batch.score")
    x = batch.noisy
    return _squared(score(x, denoiser(x, batch.sigma), batch.sigma) - batch.score(x, batch.sigma))


def ism(denoiser: Denoiser, batch: Batch) -> Float[Tensor, " b"]:
    """Return the implicit score matching loss `|s(x, sigma)|² + 2 div s(x, sigma)`, the divergence exact.

    One backward pass per value of a sample (Hyvärinen 2005, eq. 4, times 2); for data of a few dimensions.

    Raises:
        FanalError: a sample has more than 4096 values.
    """
    size = batch.clean[0].numel()
    if size > _LARGEST_EXACT:
        raise FanalError(f"the objective 'ism' takes one pass per value, {size} here: use 'ssm'")
    # The score's divergence is needed even where the caller wants no gradient of the loss.
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = batch.noisy.detach().requires_grad_()
        own = score(x, denoiser(x, batch.sigma), batch.sigma).flatten(1)
        rows = (
            torch.autograd.grad(own[:, i].sum(), x, create_graph=keep, retain_graph=True)[0].flatten(1)[:, i]
            for i in range(size)
        )
        loss = _squared(own) + 2 * torch.stack(list(rows)).sum(0)
    return loss if keep else loss.detach()


def ssm(denoiser: Denoiser, batch: Batch) -> Float[Tensor, " b"]:
    """Return the sliced score matching loss `|s|² + 2 vᵀ(∂s/∂x)v`, a mean over the probes v.

    Unbiased for `ism` as E[v vᵀ] = I (Hutchinson's estimator; Song et al. 2019, arXiv:1905.07088, eq. 8).

    Raises:
        FanalError: the batch has no `probe` of a fitting shape.
    """
    probe = batch.probe
    if probe is None or probe.shape[-batch.clean.ndim :] != batch.clean.shape:
        given = "none" if probe is None else tuple(probe.shape)
        raise FanalError(f"the objective 'ssm' needs probes of shape (K, *{tuple(batch.clean.shape)}), got {given}")
    probe = probe.reshape(-1, *batch.clean.shape)
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = batch.noisy.detach().requires_grad_()
        own = score(x, denoiser(x, batch.sigma), batch.sigma)
        slices = [
            (torch.autograd.grad((own * v).sum(), x, create_graph=keep, retain_graph=True)[0] * v).flatten(1).sum(1)
            for v in probe
        ]
        loss = _squared(own) + 2 * torch.stack(slices).mean(0)
    return loss if keep else loss.detach()


OBJECTIVES: dict[str, Objective] = {"edm": edm, "dae": dae, "dsm": dsm, "esm": esm, "ism": ism, "ssm": ssm}


@dataclass(frozen=True)
class LogNormal:
    """Noise levels with `ln sigma ~ N(mean, std²)`; the default is the wide one of Karras et al. 2022, table 1.

    Args:
        mean: of ln sigma.
        std: of ln sigma.

    Raises:
        FanalError: std is not positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.std < 100 or not abs(self.mean) < 100:
            raise FanalError(f"LogNormal needs |mean| < 100 and 0 < std < 100, got {self.mean} and {self.std}")

    def sample(self, u: Tensor) -> Tensor:
        """Map uniform numbers in (0, 1), any shape, to noise levels (the inverse distribution function)."""
        return (self.mean + self.std * torch.special.ndtri(u)).exp()

    def log_density(self, sigma: Tensor) -> Tensor:
        """Return ln p(sigma), with respect to sigma, not ln sigma."""
        z = (sigma.log() - self.mean) / self.std
        return -0.5 * z**2 - math.log(self.std * math.sqrt(2 * math.pi)) - sigma.log()


@dataclass(frozen=True)
class Middle:
    """Noise levels that favor the middle of the trajectory, where it bends and a sample's content is decided.

    A share of the levels is uniform in ln sigma over [low, high]; the rest is the wide log-normal, so that no level
    goes untrained. (Paths are linear, then non-linear, then linear, [REG] section 4.2.)

    Args:
        low: lower end of the favored band.
        high: upper end of the favored band.
        share: share of the levels in the band, in (0, 1).
        mean: of ln sigma for the rest.
        std: of ln sigma for the rest.

    Raises:
        FanalError: a value is out of range.
    """

    low: float = 0.5
    high: float = 5.0
    share: float = 0.5
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf or not 0 < self.share < 1:
            raise FanalError(
                f"Middle needs 0 < low < high and a share in (0, 1), got {self.low}, {self.high} and {self.share}"
            )
        LogNormal(self.mean, self.std)

    def sample(self, u: Tensor) -> Tensor:
        """Map uniform numbers in (0, 1), any shape, to noise levels: the first `share` of them to the band."""
        band = self.low * (self.high / self.low) ** (u / self.share)
        rest = LogNormal(self.mean, self.std).sample(((u - self.share) / (1 - self.share)).clamp(1e-12, 1))
        return torch.where(u < self.share, band, rest)

    def log_density(self, sigma: Tensor) -> Tensor:
        """Return ln p(sigma), with respect to sigma, not ln sigma."""
        inside = (sigma >= self.low) & (sigma <= self.high)
        band = self.share / (sigma * math.log(self.high / self.low))
        rest = math.log(1 - self.share) + LogNormal(self.mean, self.std).log_density(sigma)
        return torch.where(inside, torch.logaddexp(band.log(), rest), rest)


NoiseLevels = LogNormal | Middle

NOISE_LEVELS: dict[str, type[NoiseLevels]] = {"lognormal": LogNormal, "middle": Middle}
