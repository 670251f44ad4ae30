"""Laws to start from, by name: their exact denoisers, and their densities at every time of the forward process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Model
from fanal.errors import FanalError, unknown_name
from fanal.pde.grid import Array, Grid
from fanal.supports.perturbation import Blurred as Weaker

__all__ = ["LAWS", "RADIAL", "Blurred", "Closed", "Law", "averages", "law", "noise_of"]

_POINTS = {1: 4, 2: 2, 3: 2}  # Gauss–Legendre points per cell and axis
_ENTRIES = 2**20  # coordinates that are drawn together


@runtime_checkable
class Closed(Model, Protocol):
    """An exact denoiser whose law has a density in closed form."""

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, " b"]:
        """Return `log p(x; sigma)` in nats."""
        ...

    def draw(self, count: int, seed: int = 0) -> Float[Tensor, "n *d"]:
        """Draw clean samples."""
        ...


class Blurred(Weaker):
    """The law of `X + std·n`, by the exact denoiser of X, with its log density and its samples.

    Args:
        denoiser: of X, with its log density.
        std: of the blur, above 0.
    """

    def __init__(self, denoiser: Closed, std: float) -> None:
        super().__init__(denoiser, std)
        self.law, self.std = denoiser, std

    def _level(self, sigma: Tensor) -> Tensor:
        return (torch.as_tensor(sigma, dtype=torch.float64) ** 2 + self.std**2).sqrt()

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, " b"]:
        """Return the log density in nats."""
        return self.law.log_density(x, self._level(sigma))

    def draw(self, count: int, seed: int = 0) -> Float[Tensor, "n *d"]:
        """Draw samples, seeded, float64."""
        sharp = self.law.draw(count, seed)
        generator = torch.Generator().manual_seed(seed + 1_000_003)
        return sharp + self.std * torch.randn(sharp.shape, dtype=torch.float64, generator=generator)


def noise_of(time: float, process: str = "ou") -> tuple[float, float]:
    """Return scale and sigma with `x_t = scale·(x0 + sigma·n)`.

    For Ornstein–Uhlenbeck `e^{−t}` and `sqrt(e^{2t} − 1)` ([PDE] eq. 2.12), for Brownian motion 1 and `sqrt(2t)`.

    Args:
        time: t.
        process: "ou" or "brownian".

    Raises:
        FanalError: the process is neither.
    """
    if process not in ("ou", "brownian"):
        raise FanalError(f"process is ou or brownian, got {process!r}")
    if process == "ou":
        return math.exp(-time), math.sqrt(math.expm1(2 * time))
    return 1.0, math.sqrt(2 * time)


def averages(grid: Grid, density: Callable[[Array], Array]) -> Array:
    """Return a density's averages over cells, (*shape), by Gauss–Legendre rules in each.

    Args:
        grid: the cells.
        density: at points (n, axes).
    """
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS[len(grid.edges)])
    out = np.zeros(grid.shape)
    for index in np.ndindex(*[len(nodes)] * len(grid.edges)):
        moved = [c + w / 2 * nodes[i] for c, w, i in zip(grid.centers, grid.widths, index, strict=True)]
        points = np.stack(np.meshgrid(*moved, indexing="ij"), -1).reshape(-1, len(grid.edges))
        share = math.prod(float(weights[i]) / 2 for i in index)
        out += share * density(points).reshape(grid.shape)
    return out


@dataclass(frozen=True, eq=False)
class Law:
    """A law to start from.

    Attributes:
        name: of the law.
        denoiser: its exact denoiser.
        reach: half the width of a box that holds it; for a radial law, the largest distance.
        radial: whether its density is that of the distance from 0, which is all there is to a law that no rotation
            changes; a grid then has one axis, from 0.
        box: half the width of the box that it is uniform on; 0: it is smooth.
        hollow: of a radial law, the distance below which it never has mass that counts.
    """

    name: str
    denoiser: Closed
    reach: float
    radial: bool = False
    box: float = 0.0
    hollow: float = 0.0

    @property
    def dimension(self) -> int:
        """Coordinates of a sample."""
        return math.prod(self.denoiser.shape)

    @property
    def axes(self) -> int:
        """Axes of a grid for it."""
        return 1 if self.radial else self.dimension

    def density(self, points: Array, time: float) -> Array:
        """Return the density of the Ornstein–Uhlenbeck process that starts from the law.

        Args:
            points: (n, axes).
            time: t; above 0 where the law is a box.
        """
        scale, sigma = noise_of(time)
        level = torch.tensor(sigma, dtype=torch.float64)
        parts = [self.denoiser.log_density(self._place(part / scale), level) for part in pieces(points, self.dimension)]
        log = torch.cat(parts).numpy() - self.dimension * math.log(scale)
        if self.radial:
            d, r = self.dimension, points[:, 0]
            log = log + math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2) + (d - 1) * np.log(r)
        return np.exp(log)

    def cells(self, grid: Grid, time: float = 0.0) -> Array:
        """Return the averages of `density` over cells, (*shape).

        Args:
            grid: the cells.
            time: t.

        Raises:
            FanalError: the grid has other axes than the law.
        """
        if len(grid.edges) != self.axes:
            raise FanalError(f"{self.name} has {self.axes} axes, the grid has {len(grid.edges)}")
        if self.box and time == 0:
            out = np.ones(())
            for axis in grid.edges:
                inside = np.diff(np.clip(axis, -self.box, self.box)) / (2 * self.box * np.diff(axis))
                out = np.multiply.outer(out, inside)
            return out
        return averages(grid, lambda points: self.density(points, time))

    @property
    def rows(self) -> int:
        """Samples that are drawn together, as many as fit into some megabytes; it decides which numbers are drawn."""
        return max(1, _ENTRIES // self.dimension)

    def draw(self, count: int, time: float = 0.0, seed: int = 0) -> Array:
        """Draw exact samples of the process at a time, as points (count, axes) of the grid.

        Args:
            count: how many.
            time: t.
            seed: of the draws.
        """
        parts = [(k, min(self.rows, count - a)) for k, a in enumerate(range(0, count, self.rows))]
        return np.concatenate([np.empty((0, self.axes)), *(self.part(k, n, time, seed) for k, n in parts)])

    def part(self, index: int, count: int, time: float = 0.0, seed: int = 0) -> Array:
        """Draw one part of `draw`'s samples: each has a seed of its own, so that they need not be drawn in one go.

        Args:
            index: of the part.
            count: of samples in it, `rows` of them but for the last one.
            time: t.
            seed: of all parts.
        """
        own = seed if index == 0 else int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 2)
        scale, sigma = noise_of(time)
        x = scale * self.denoiser.draw(count, own).reshape(count, -1).numpy()
        if sigma:
            x += scale * sigma * np.random.default_rng(own).standard_normal(x.shape)
        return np.linalg.norm(x, axis=1, keepdims=True) if self.radial else x

    def grid(self, cells: int, reach: float | None = None) -> Grid:
        """Return even cells that hold the law and what Ornstein–Uhlenbeck makes of it.

        Args:
            cells: per axis.
            reach: half the width of the box, or the largest distance; None: 6 standard deviations of the normal law, or
                as far as the law itself goes.

        Raises:
            FanalError: the reach ends before the law begins.
        """
        rest = math.sqrt(self.dimension) if self.radial else 0.0
        far = max(self.reach, rest + 6) if reach is None else reach
        low = max(0.0, min(self.hollow, rest - 6)) if self.radial else -far
        if far <= low:
            raise FanalError(f"reach must be above {low:.4g}, where {self.name} begins to have mass, got {far:.4g}")
        return Grid.even([low] * self.axes, [far] * self.axes, [cells] * self.axes)

    def _place(self, points: Array) -> Tensor:
        """Points of the grid as a batch of samples; a distance lies on the first axis."""
        return place(points, self.denoiser.shape, self.radial)


def pieces(points: Array, dimension: int) -> Iterator[Array]:
    """Yield points (n, axes) so many at a time that as samples of so many coordinates they fit into some megabytes."""
    size = max(1, _ENTRIES // dimension)
    yield from (points[a : a + size] for a in range(0, max(len(points), 1), size))


def place(points: Array, shape: tuple[int, ...], radial: bool) -> Tensor:
    """Return points (n, axes) as samples (n, *shape); distances from 0 lie on the first axis."""
    x = np.zeros((len(points), math.prod(shape)))
    x[:, : points.shape[1]] = points
    if not radial and points.shape[1] != x.shape[1]:
        raise FanalError(f"points of {points.shape[1]} coordinates for samples of shape {shape}")
    return torch.from_numpy(x).reshape(len(points), *shape)


def _two_bumps(dimension: int) -> Law:
    from fanal.exact import Mixture

    means = torch.zeros(2, dimension, dtype=torch.float64)
    means[:, 0] = torch.tensor([-1.5, 1.0])
    std = torch.tensor([0.4, 0.6], dtype=torch.float64)
    return Law("two-bumps", Mixture(means, [0.4, 0.6], std=std), 4.0)


def _box(dimension: int) -> Law:
    from fanal.supports import Box

    side = torch.ones(dimension, dtype=torch.float64)
    return Law("box", Box(-side, side), 1.0, box=1.0)


def _ring(dimension: int) -> Law:
    from fanal.supports import Sphere

    return Law("ring", cast(Closed, Blurred(Sphere(torch.zeros(2), 1.5), 0.2)), 2.5)


def _shell(dimension: int) -> Law:
    from fanal.supports import Sphere

    radius = math.sqrt(dimension) / 2
    sharp = Sphere(torch.zeros(dimension), radius)
    return Law("shell", cast(Closed, Blurred(sharp, 0.2)), radius + 2, radial=True, hollow=radius - 2)


def _core_and_halo(dimension: int) -> Law:
    from fanal.exact import Mixture

    std = torch.tensor([0.3, 1.5], dtype=torch.float64)
    reach = 1.5 * (math.sqrt(dimension) + 5)
    return Law("core-and-halo", Mixture(torch.zeros(2, dimension), [0.5, 0.5], std=std), reach, radial=True)


LAWS: dict[str, tuple[Callable[[int], Law], tuple[int, int]]] = {
    "two-bumps": (_two_bumps, (1, 2)),
    "box": (_box, (1, 2)),
    "ring": (_ring, (2, 2)),
    "shell": (_shell, (2, 4096)),
    "core-and-halo": (_core_and_halo, (2, 4096)),
}
"""By name: what makes the law in so many dimensions, and the fewest and the most."""
RADIAL: tuple[str, ...] = ("shell", "core-and-halo")
"""Laws that are followed by their distance from 0."""


def _named(name: str) -> Law:
    """A mixture or a Gaussian of `fanal.exact`, of one or two coordinates."""
    from fanal.exact import Gaussian, Mixture
    from fanal.loading import open_network

    model: Any = open_network(name)
    if isinstance(model, Gaussian) and len(model.mean) <= 2:  # as a mixture of one, which draws
        cov = model.cov.apply(torch.eye(len(model.mean), dtype=torch.float64), model.cov.values, model.cov.rest)
        model = Mixture(model.mean[None], cov=[cov])
    if not isinstance(model, Closed) or math.prod(model.shape) > 2:
        raise FanalError(
            f"{name} has shape {tuple(model.shape)}: a law to start from has one or two coordinates and a density, as "
            f"mixture:grid2, gaussian:tilted2 and {', '.join(LAWS)} have"
        )
    drawn = model.draw(10_000)
    return Law(name, model, 1.1 * float(drawn.abs().max()))


def law(name: str, dimension: int | None = None) -> Law:
    """Return a law by name.

    Args:
        name: one of `LAWS`, `mixture:NAME` or `gaussian:NAME` of one or two coordinates.
        dimension: coordinates of a sample; None: the fewest, but three for radial laws.

    Raises:
        FanalError: there is none of that name, or not in so many dimensions.
    """
    if name.startswith(("mixture:", "gaussian:")):
        found = _named(name)
        if dimension not in (None, found.dimension):
            raise FanalError(f"{name} has {found.dimension} dimensions, not {dimension}: leave --dimension out")
        return found
    if name not in LAWS:
        raise unknown_name("law", name, [*LAWS, "mixture:NAME", "gaussian:NAME"])
    make, (fewest, most) = LAWS[name]
    wanted = dimension if dimension is not None else (3 if name in RADIAL else fewest)
    if not fewest <= wanted <= most:
        raise FanalError(f"{name} exists in {fewest} to {most} dimensions, got {wanted}")
    return make(wanted)
