"""Brownian motion between walls in closed form: what a wall sends back is what a mirror image would send through it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.fft import dctn
from scipy.special import logsumexp

from fanal.errors import FanalError
from fanal.pde.equations import score_of_denoiser
from fanal.pde.grid import Array, Grid
from fanal.pde.laws import Law, averages, noise_of

__all__ = ["Walled"]

_FAR = 8.0  # standard deviations beyond which an image is not seen
_FINE = 256  # cosines per axis
_ROUNDING, _FAINT = 1e-18, 1e-9  # what counts as no cosine, and as a density that they do not know


@dataclass(frozen=True, eq=False)
class Walled:
    """Brownian motion from a law between walls that let nothing through ([PDE] eq. 2.9).

    The density is `Σ ρ(image of x, t)` of the motion without walls, over the mirror images of x in all walls: along an
    axis from a to a + W those are `x + 2kW` and `2a − x + 2kW`. What the law has beyond the walls is mirrored too.
    After a while few cosines `cos(kπ(x − a)/W)` are left of it, each shrinking by `e^{−(kπ/W)²t}`: they are summed
    instead, which takes less, but where the density is so small that only images know it.

    Attributes:
        law: to start from, not a radial one.
        grid: whose box the walls are.

    Raises:
        FanalError: the law is radial, for which a wall is no mirror, or has other axes than the grid.
    """

    law: Law
    grid: Grid

    def __post_init__(self) -> None:
        if self.law.radial or len(self.grid.edges) != self.law.axes:
            raise FanalError(
                f"between walls {self.law.name} has no closed form: walls are mirrors where they are flat, along each "
                "axis of the law"
            )

    def _images(self, points: Array, time: float) -> Iterator[tuple[Array, Array]]:
        """Images of points, and the sign along each axis with which they move when the points do."""
        sigma, along = noise_of(time, "brownian")[1], []
        for axis in self.grid.edges:
            low, width = float(axis[0]), float(axis[-1] - axis[0])
            most = max(1, math.ceil(_FAR * sigma / width))
            # Boxes beside the box, every other one mirrored.
            along.append(
                [(1.0, k * width) if k % 2 == 0 else (-1.0, 2 * low + (k + 1) * width) for k in range(-most, most + 1)]
            )
        for image in itertools.product(*along):
            sign, shift = np.array(image).T
            yield points * sign + shift, sign

    def _by_images(self, points: Array, time: float, slopes: bool) -> tuple[Array, Array]:
        """Log densities, (n,), and scores, (n, axes), as they are known wherever the density is."""
        level = torch.tensor(noise_of(time, "brownian")[1], dtype=torch.float64)
        images = list(self._images(points, time))
        there = (torch.from_numpy(image).reshape(-1, *self.law.denoiser.shape) for image, _ in images)
        logs = np.stack([self.law.denoiser.log_density(x, level).numpy() for x in there])
        total, score = np.asarray(logsumexp(logs, axis=0)), np.zeros_like(points)
        free = score_of_denoiser(self.law.denoiser, "brownian")
        for log, (image, sign) in zip(logs, images if slopes else (), strict=slopes):
            score += np.exp(log - total)[:, None] * sign * free(image, time)
        return total, score

    @cached_property
    def _waves(self) -> tuple[float, Array, float]:
        """A time from which on the density is a sum of cosines that are known; their amplitudes, and its top, then."""
        low, high = ([float(axis[end]) for axis in self.grid.edges] for end in (0, -1))
        fine = Grid.even(low, high, [_FINE] * self.law.axes)
        # Noise as wide as three points: e^{−(3π)²/2} = 5e-20 is left of the shortest wave, so none is mistaken.
        time = 4.5 * max(float(widths[0]) for widths in fine.widths) ** 2
        found = np.exp(self._by_images(fine.points, time, False)[0]).reshape(fine.shape)
        waves = np.asarray(dctn(found, norm="forward"))
        for axis in range(waves.ndim):
            np.moveaxis(waves, axis, 0)[1:] *= 2
        return time, waves, float(found.max())

    def _by_waves(self, points: Array, time: float, slopes: bool) -> tuple[Array, Array]:
        """Densities and their gradients, right but for rounding of the largest density."""
        since, waves, _ = self._waves
        parts = []
        for axis, x in zip(self.grid.edges, points.T, strict=True):
            k = np.arange(_FINE) * math.pi / (axis[-1] - axis[0])
            fading = np.exp(-(k**2) * (time - since))
            k, fading = k[fading > _ROUNDING], fading[fading > _ROUNDING]
            turn = np.outer(x - axis[0], k)
            parts.append((np.cos(turn) * fading, -k * fading * np.sin(turn) if slopes else None))
        waves = waves[tuple(slice(own.shape[1]) for own, _ in parts)]
        sums = [[part[0] for part in parts]]
        if slopes:
            sums += [[part[axis == own] for own, part in enumerate(parts)] for axis in range(len(parts))]
        found = [_summed(waves, factors) for factors in sums]
        return found[0], np.stack(found[1:], 1) if slopes else np.zeros_like(points)

    def _both(self, points: Array, time: float, slopes: bool) -> tuple[Array, Array]:
        """Densities and scores: by waves where these suffice, else by images."""
        density, score, faint = np.zeros(len(points)), np.zeros_like(points), np.ones(len(points), dtype=bool)
        since, _, top = self._waves
        if time >= since:
            density, slope = self._by_waves(points, time, slopes)
            faint = density < _FAINT * top
            score[~faint] = slope[~faint] / density[~faint, None]
        if faint.any():
            logs, score[faint] = self._by_images(points[faint], time, slopes)
            density[faint] = np.exp(logs)
        return density, score

    def density(self, points: Array, time: float) -> Array:
        """Return the density.

        Args:
            points: (n, axes), between the walls.
            time: t; above 0 where the law is a box.
        """
        return self._both(points, time, False)[0]

    def score(self, points: Array, time: float) -> Array:
        """Return `∇ log ρ(x, t)`, (n, axes); 0 across a wall.

        Args:
            points: (n, axes), between the walls.
            time: t > 0.
        """
        return self._both(points, time, True)[1]

    def cells(self, grid: Grid, time: float = 0.0) -> Array:
        """Return the averages of `density` over cells, (*shape).

        Args:
            grid: the cells.
            time: t.
        """
        if self.law.box and time == 0:
            return self.law.cells(grid)
        return averages(grid, lambda points: self.density(points, time))

    def part(self, index: int, count: int, time: float = 0.0, seed: int = 0) -> Array:
        """Draw exact samples of the process at a time, as `Law.part` does.

        Args:
            index: of the part.
            count: of samples in it.
            time: t.
            seed: of all parts.
        """
        x = self.law.part(index, count, 0.0, seed)
        x += noise_of(time, "brownian")[1] * np.random.default_rng([seed, index, 1]).standard_normal(x.shape)
        for axis, edges in enumerate(self.grid.edges):  # walls mirror what goes beyond them, as often as it does
            width = edges[-1] - edges[0]
            x[:, axis] = edges[0] + width - np.abs(np.mod(x[:, axis] - edges[0], 2 * width) - width)
        return x


def _summed(waves: Array, factors: list[Array]) -> Array:
    """`Σ waves[k, l]·a[n, k]·b[n, l]`, (n,), on any number of axes."""
    out = factors[0] @ waves.reshape(len(waves), -1)
    for factor in factors[1:]:
        out = np.einsum("nk,nkr->nr", factor, out.reshape(*factor.shape, -1))
    return out[:, 0]
