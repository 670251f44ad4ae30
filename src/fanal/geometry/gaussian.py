"""Trajectories of Gaussian data, which have a closed form: the truth for geometry ([REG] sec. 4.3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact import Gaussian

__all__ = ["exact_path", "residual"]


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


def exact_path(gaussian: Gaussian, x: Float[Tensor, "b *d"], sigmas: Float[Tensor, " n"]) -> Float[Tensor, "n b *d"]:
    """Return the exact trajectory through x at `sigmas[0]`, at each of the grid's levels.

    Args:
        gaussian: the data.
        x: where it starts.
        sigmas: the levels, the first that of x.
    """
    return torch.stack([gaussian.solution(x, sigmas[0], level) for level in sigmas])
