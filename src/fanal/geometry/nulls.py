"""What regularity would be by chance: noise paths, whose components have a closed form, and random smooth curves."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.schedules import check_sigmas
from fanal.seeding import noise

__all__ = ["bridge_shares", "brownian_shares", "forward_paths", "smooth_curves"]


def forward_paths(x: Float[Tensor, "b *d"], sigmas: Float[Tensor, " n"], seeds: range) -> Float[Tensor, "n b *d"]:
    """Return forward paths: Brownian motion in `sigma²` from x, at the levels of a grid, in the grid's order.

    Increments between levels are independent with variance `sigma'² − sigma²` ([GEO] sec. 2): what a trajectory would
    look like without a model ([REG] sec. 7 compares with them).

    Args:
        x: clean samples.
        sigmas: decreasing or increasing levels, finite.
        seeds: one per sample.

    Raises:
        FanalError: the grid is none, or the seeds do not match.
    """
    grid = check_sigmas(sigmas)
    if not bool(torch.isfinite(grid).all()):
        raise FanalError("a forward path has finite levels")
    rising = grid.sort().values
    state = x.double() + float(rising[0]) * noise(x.shape[1:], seeds, round=0, stream="forward", dtype=torch.float64)
    path = [state]
    for i, (low, high) in enumerate(zip(rising[:-1], rising[1:], strict=True)):
        size = math.sqrt(float(high) ** 2 - float(low) ** 2)
        state = state + size * noise(x.shape[1:], seeds, round=i + 1, stream="forward", dtype=torch.float64)
        path.append(state)
    out = torch.stack(path)
    return out.flip(0) if float(grid[0]) > float(grid[-1]) else out


def brownian_shares(count: int, k: int) -> Float[Tensor, " k"]:
    """Return the shares of variance of the first principal components of a long high-dimensional random walk.

    `6/(π² j²)` as the number of steps grows: the components are cosines (Antognini & Sohl-Dickstein 2018), which two by
    two draw Lissajous curves. For `count` equal steps, the eigenvalues of the centered walk are
    `1/(4 sin²(π j/(2(count + 1))))`, j = 1 … count, and the shares are theirs.

    Args:
        count: steps of the walk.
        k: components.

    Raises:
        FanalError: k is not in [1, count].
    """
    if not 1 <= k <= count:
        raise FanalError(f"k must be in [1, {count}], got {k}")
    values = 1 / torch.sin(math.pi * torch.arange(1, count + 1, dtype=torch.float64) / (2 * (count + 1))) ** 2
    return values[:k] / values.sum()


def bridge_shares(sigmas: Float[Tensor, " n"], k: int) -> Float[Tensor, " k"]:
    """Return what principal components explain off the chord of a forward path over a grid, in many dimensions.

    There inner products are their expectations, and off its chord the path is a Brownian bridge in `sigma²`: the shares
    are those of the eigenvalues of `min(s, t)·(1 − max(s, t)/T)`, centered over the grid, with s and t the noise added
    since the first level and T all of it.

    Args:
        sigmas: levels, in either order.
        k: components.

    Raises:
        FanalError: the grid is none or not finite, or k is not in [1, N − 1] for N intervals.
    """
    grid = check_sigmas(sigmas).sort().values
    if not bool(torch.isfinite(grid).all()) or not 1 <= k <= len(grid) - 2:
        raise FanalError(f"a forward path has finite levels and 1 to {len(grid) - 2} components, got k = {k}")
    time = grid**2 - grid[0] ** 2
    inner = torch.minimum(time[:, None], time) * (1 - torch.maximum(time[:, None], time) / time[-1])
    inner = inner - inner.mean(0)
    values = torch.linalg.eigvalsh(inner - inner.mean(1, keepdim=True)).flip(0).clamp_min(0)
    return values[:k] / values.sum()


def smooth_curves(count: int, points: int, smoothness: float = 0.2, seed: int = 0) -> Float[Tensor, "b n 3"]:
    """Return random smooth curves: three Gaussian processes on [0, 1] with the kernel `exp(−(s − t)²/2l²)`.

    The null model of "alike": curves as smooth as trajectories, of unrelated shapes.

    Args:
        count: curves.
        points: points of each.
        smoothness: l, the length over which a curve keeps its way.
        seed: of the curves.

    Raises:
        FanalError: a number is not positive.
    """
    if count < 1 or points < 2 or not smoothness > 0:
        raise FanalError(f"need count >= 1, points >= 2, smoothness > 0, got {count}, {points}, {smoothness}")
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.exp(-((t[:, None] - t) ** 2) / (2 * smoothness**2)))
    root = vectors * values.clamp_min(0).sqrt()
    white = torch.randn(count, points, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ white
