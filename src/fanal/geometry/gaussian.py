"""Trajectories of Gaussian data, which have a closed form: the truth for geometry ([REG] sec. 4.3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact import Gaussian

__all__ = ["exact_path", "expected_residual", "residual"]


def residual(values: Tensor, sigma: Tensor, sigma_max: float) -> Float[Tensor, "n k"]:
    """Return `φ_k(sigma)`, how far the exact trajectory is from its chord along each eigenvector, per unit of x_T − μ.

    `sqrt((λ + sigma²)/(λ + sigma_T²)) − sqrt(λ/(λ + sigma_T²)) − (sigma/sigma_T)·(1 − sqrt(λ/(λ + sigma_T²)))`
    ([REG] eq. 23). It is 0 at both ends, never positive, and its size has one maximum; the expected sum of squares over
    many eigenvalues can have two (proposition 4 is proved for each component only).

    Args:
        values: λ, (k,), eigenvalues of the covariance.
        sigma: noise levels, (N,).
        sigma_max: sigma_T, where trajectories start.

    Raises:
        FanalError: sigma_max is not positive, or a level is not in [0, sigma_max].
    """
    if not sigma_max > 0 or not bool(((sigma >= 0) & (sigma <= sigma_max)).all()):
        raise FanalError(f"levels lie in [0, sigma_max], got {sigma.min():.4g} to {sigma.max():.4g} and {sigma_max}")
    value, level = values.double()[None], sigma.double()[:, None]
    start = value + sigma_max**2
    end = (value / start).sqrt()
    return ((value + level**2) / start).sqrt() - end - level / sigma_max * (1 - end)


def expected_residual(
    gaussian: Gaussian, sigma: Float[Tensor, " n"], sigma_max: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return how far exact trajectories from pure noise are from their chords, and how far across them, (N,) each.

    The first is the root of `Σ_k φ_k²·E c_k²` with `E c_k² = sigma_T² + μ_k²`, c the start from the mean ([REG] prop.
    4): the distance from the point of the chord at the share sigma/sigma_T of it. Of the second what lies along the
    chord is taken off, `(Σ_k φ_k·w_k·E c_k²)²/Σ_k w_k²·E c_k²` with `w = sqrt(λ/(λ + sigma_T²)) − 1`; where many
    dimensions share in both sums, that is the distance from the chord.

    Args:
        gaussian: the data.
        sigma: noise levels, (N,).
        sigma_max: sigma_T, where trajectories start.

    Raises:
        FanalError: as `residual`.
    """
    values, mean = gaussian.cov.values, gaussian.cov.coordinates(gaussian.mean[None])[0]
    start = sigma_max**2 + mean.square()
    if gaussian.cov.rest is not None:  # all directions off the basis as one
        off = (gaussian.mean.square().sum() - mean.square().sum()).clamp_min(0)
        values = torch.cat([values, gaussian.cov.rest[None]])
        start = torch.cat([start, ((gaussian.cov.dim - len(mean)) * sigma_max**2 + off)[None]])
    left, way = residual(values, sigma, sigma_max), (values / (values + sigma_max**2)).sqrt() - 1
    square = left.square() @ start
    along = (left @ (way * start)).square() / (way.square() @ start)
    return square.sqrt(), (square - along).clamp_min(0).sqrt()


def exact_path(gaussian: Gaussian, x: Float[Tensor, "b *d"], sigmas: Float[Tensor, " n"]) -> Float[Tensor, "n b *d"]:
    """Return the exact trajectory through x at `sigmas[0]`, at each of the grid's levels.

    Args:
        gaussian: the data.
        x: where it starts.
        sigmas: the levels, the first that of x.
    """
    return torch.stack([gaussian.solution(x, sigmas[0], level) for level in sigmas])
