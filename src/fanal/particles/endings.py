"""Where runs with the exact denoiser of a finite set end: on its points, and how near ([PDE] sec. 4.5 and 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact import Dataset

__all__ = ["ON", "Endings", "chance_off", "chance_outside", "gaps", "off_bound"]

ON = 0.01
"""Share of the distance between neighboring points within which a sample counts as on a training point."""


@dataclass(frozen=True, eq=False)
class Endings:
    """Where samples are among the training points.

    Attributes:
        index: (B,), the nearest training point, whose Voronoi cell the sample is in.
        distance: (B,), to it.
        ratio: (B,), that distance over the point's own distance to its nearest other point.
    """

    index: Int[Tensor, " b"]
    distance: Float[Tensor, " b"]
    ratio: Float[Tensor, " b"]

    @classmethod
    def of(cls, points: Float[Tensor, "n *d"], x: Float[Tensor, "b *d"]) -> Endings:
        """Return where samples are among training points.

        Args:
            points: (N, *shape), no two equal.
            x: (B, *shape).

        Raises:
            FanalError: as `gaps`, or the shapes differ.
        """
        distance, index = (found[:, 0] for found in Dataset(points).nearest(x.double()))
        return cls(index, distance, distance / gaps(points)[index])

    @property
    def on(self) -> Tensor:
        """Whether each sample is on a training point: its ratio is below `ON`, (B,) bool."""
        return self.ratio < ON


def gaps(points: Float[Tensor, "n *d"]) -> Float[Tensor, " n"]:
    """Return each point's distance to its nearest other point.

    Raises:
        FanalError: there are fewer than two points, or two that are equal.
    """
    if len(points) < 2:
        raise FanalError("distances between training points need two of them")
    exact = Dataset(points)
    found = exact.nearest(points.double(), 2)[0][:, 1]
    if not bool((found > 0).all()):
        raise FanalError("two training points are equal: keep one of each")
    return found


def off_bound(points: Float[Tensor, "n *d"], sigma: float, std: float, distance: float) -> float:
    """Bound the chance that a run which ends with `D(x, sigma)` ends farther than `distance` from each training point.

    The last noisy step leaves `x = m + std·n` with m whatever it is. The difference of two points' logits,
    `⟨y_i − y_j, x − (y_i + y_j)/2⟩/sigma²`, is then normal with standard deviation `|y_i − y_j|·std/sigma²`: it lies in
    [−k, k] with a chance of at most `√(2/π)·k·sigma²/(std·|y_i − y_j|)`. Where no difference to the largest logit is
    that small, D is within `(N − 1)·e^{−k}·diam` of a training point. So

    ```text
    P(distance > δ) ≤ √(2/π)·k·(sigma²/std)·Σ_{i<j} 1/|y_i − y_j|,    k = log((N − 1)·diam/δ)
    ```

    which vanishes with sigma, for any number of steps before, any scheme and any start: the discrete scheme ends on
    training points as its last noise level goes to 0.

    It is a limit's proof and no estimate: m is the worst there is, and every pair counts as if its points were
    neighbors. It says nothing, and is 1, until `k·(sigma²/std)·Σ 1/|y_i − y_j|` falls below 5/4, a sum that grows with
    N². What a last level of ordinary size allows is told by `chance_off`.

    Args:
        points: (N, *shape), no two equal.
        sigma: the last positive noise level.
        std: of the noise that the step before added; for `DDPM` from sigma_b: `sigma·sqrt(1 − sigma²/sigma_b²)`.
        distance: δ.

    Raises:
        FanalError: as `gaps`, or a number is not positive.
    """
    if not (sigma > 0 and std > 0 and distance > 0):
        raise FanalError(f"sigma, std and distance must be positive, got {sigma}, {std} and {distance}")
    gaps(points)
    apart = torch.pdist(points.flatten(1).double())
    k = max(math.log((len(points) - 1) * float(apart.max()) / distance), 0.0)
    return min(1.0, math.sqrt(2 / math.pi) * k * sigma**2 / std * float((1 / apart).sum()))


def chance_outside(
    points: Float[Tensor, "n *d"], sigma: float, count: int = 4000, seed: int = 0
) -> Float[Tensor, " count"]:
    """Return whether draws of the forward process are outside of the Voronoi cell that they come from, (count,) bool.

    By theorem 1 of [PDE], the exact reverse process is outside of the cell that it will end in with the same chance.

    Args:
        points: (N, *shape).
        sigma: noise level.
        count: number of draws.
        seed: of the draws.
    """
    x, which = _forward(points, sigma, count, seed)
    return Dataset(points).nearest(x)[1][:, 0] != which


def chance_off(points: Float[Tensor, "n *d"], sigma: float, count: int = 4000, seed: int = 0) -> Bool[Tensor, " count"]:
    """Return whether a last step from draws of the forward process ends off every training point, (count,) bool.

    The exact reverse process, from a start at noise enough, has the forward process' law at each level (theorem 1 of
    [PDE]), so this is how often a run with many levels ends off the points whose last step leads from sigma to 0. A
    run with few levels has another law there, and may do better or worse.

    Args:
        points: (N, *shape), no two equal.
        sigma: the last positive noise level.
        count: number of draws.
        seed: of the draws.

    Raises:
        FanalError: as `gaps`, or sigma is not positive.
    """
    if not sigma > 0:
        raise FanalError(f"sigma must be positive, got {sigma}")
    x, _ = _forward(points, sigma, count, seed)
    end = Dataset(points)(x, torch.tensor(sigma, dtype=torch.float64))
    return ~Endings.of(points, end).on


def _forward(points: Tensor, sigma: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws of the forward process at a noise level, and the points that they come from."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(points), (count,), generator=generator)
    normal = torch.randn((count, *points.shape[1:]), generator=generator, dtype=torch.float64)
    return points.double()[which] + sigma * normal, which
