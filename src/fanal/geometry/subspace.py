"""A trajectory in few dimensions: its chord, and principal components of what is left of it ([REG] sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.geometry.paths import Path, gram, split

__all__ = ["Projection", "direct", "project", "reconstruct"]


@dataclass(frozen=True, eq=False)
class Projection:
    """What `project` found; K components, of which the first are drawn.

    Attributes:
        coordinates: (B, N+1, 1 + K): position along the chord, from the first state, then along each component, from
            the mean. The sign of a component is arbitrary, see `fanal.geometry.alignment`.
        explained: (B, K), shares of the variance off the chord; 0 where there is none.
        error: (1 + K, N+1, B), distance of each state from its reconstruction in 1, 2, … dimensions ([REG] fig. 4).
    """

    coordinates: Float[Tensor, "b n k1"]
    explained: Float[Tensor, "b k"]
    error: Float[Tensor, "k1 n b"]


def _directions(inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors (B, N, N) and eigenvalues (B, N) of centered inner products, decreasing, and their diagonal."""
    inner = inner - inner.mean(1, keepdim=True)
    inner = inner - inner.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh((inner + inner.transpose(1, 2)) / 2)
    return vectors.flip(2), values.flip(1).clamp_min(0), inner.diagonal(dim1=1, dim2=2)


def _components(inner: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal coordinates (B, N, k), all eigenvalues (B, N), decreasing, and squared distances to the mean."""
    vectors, values, squares = _directions(inner)
    return vectors[:, :, :k] * values[:, None, :k].sqrt(), values, squares


def _shares(values: Tensor, k: int) -> Tensor:
    total = values.sum(1, keepdim=True)
    return torch.where(total > 0, values[:, :k] / total.where(total > 0, torch.ones_like(total)), 0.0)


def _check(k: int, states: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= states - 1:
        raise FanalError(f"the number of components is a whole number in [1, {states - 1}], got {k!r}")


def project(path: Path, k: int = 4) -> Projection:
    """Return each path along its chord and the first k principal components of its orthogonal complement.

    d enters by one matrix product; the components come from inner products ([REG] sec. 3.2, figs. 4 and 5).

    Args:
        path: (N+1, B, *shape).
        k: number of components.

    Raises:
        FanalError: k is not in [1, N], or as `fanal.geometry.paths.split`.
    """
    along, rest = split(path)
    _check(k, len(path))
    coordinates, values, squares = _components(rest @ rest.transpose(1, 2), k)
    left = squares[None] - (coordinates**2).cumsum(2).permute(2, 0, 1)
    error = torch.cat([rest.norm(dim=2)[None], left.clamp_min(0).sqrt()]).transpose(1, 2)
    return Projection(torch.cat([along[:, :, None], coordinates], 2), _shares(values, k), error)


def reconstruct(path: Path, k: int = 3) -> Float[Tensor, "k n b *d"]:
    """Return each path rebuilt in 1, 2, … k dimensions: its chord, then principal components of what is off it.

    In one dimension the states on the chord; in more, their position along it, the mean of what is off it, and its
    first k − 1 components: what `Projection.error` is the distance from ([REG] fig. 4).

    Args:
        path: (N+1, B, *shape).
        k: largest number of dimensions.

    Returns:
        (k, N+1, B, *shape), in the dtype of the path.

    Raises:
        FanalError: k is not in [1, N + 1], or as `fanal.geometry.paths.split`.
    """
    along, rest = split(path)
    _check(k, len(path) + 1)
    vectors = _directions(rest @ rest.transpose(1, 2))[0]
    first = path[0].flatten(1).to(rest.dtype)
    on_chord = (path[-1] - path[0]).flatten(1).to(rest.dtype)
    on_chord = first[:, None] + along[:, :, None] * (on_chord / on_chord.norm(dim=1, keepdim=True))[:, None]
    mean = rest.mean(1, keepdim=True)
    out = [on_chord]
    for m in range(1, k):
        own = vectors[:, :, :m]
        out.append(on_chord + mean + own @ (own.transpose(1, 2) @ (rest - mean)))
    return torch.stack(out).transpose(1, 2).reshape(k, *path.shape).to(path.dtype)


def direct(path: Path, k: int = 4) -> Float[Tensor, "b k"]:
    """Return the shares of variance of the first k principal components of the path itself, its chord not taken out.

    [REG] table 7.

    Raises:
        FanalError: k is not in [1, N], or as `fanal.geometry.paths.gram`.
    """
    inner = gram(path)
    _check(k, len(path))
    return _shares(_components(inner, k)[1], k)
