"""Supports of data laws: where samples can lie, how far a point is from there, and the exact denoisers ([SUP])."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.exact import Dataset, Gaussian, LowRank
from fanal.exact.gaussian import flat, level_of
from fanal.supports.noncentral import inner_share, log_chance
from fanal.supports.truncated import bessel_fall, log_mass, log_moment, truncated_mean

__all__ = ["Affine", "Ball", "Box", "FiniteSet", "Polyline", "Sphere", "Support", "Union"]


@runtime_checkable
class Support(Protocol):
    """A closed set that samples should lie in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        ...

    def project(self, x: Float[Tensor, "b *d"], /) -> Float[Tensor, "b *d"]:
        """Return the nearest point of the set."""
        ...

    def distance(self, x: Float[Tensor, "b *d"], /) -> Float[Tensor, " b"]:
        """Return the Euclidean distance from the set, float64: negative inside where the set has an inside."""
        ...


class _Law(Denoiser, ABC):
    """A law on a support: its exact denoiser and what goes with it."""

    shape: tuple[int, ...]
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def _level(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        points, level = flat(x, sigma, self.shape)
        if not bool((level > 0).all()):
            raise FanalError(f"an exact denoiser needs sigma > 0, got {sigma}")
        return points, level.expand(len(points), 1)

    def distance(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
        """Return the Euclidean distance from the set, float64."""
        return (x.double() - self.project(x).double()).flatten(1).norm(dim=1)

    @abstractmethod
    def project(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return the nearest point of the set."""


class Box(_Law):
    """The uniform law on a box `low <= x <= high`, coordinate by coordinate.

    Args:
        low: lower corner, (*shape).
        high: upper corner, above the lower in every coordinate.

    Raises:
        FanalError: the corners do not fit.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low.double(), high.double()
        if low.shape != high.shape or not bool((self.low < self.high).all()) or not bool(self.low.isfinite().all()):
            raise FanalError("a box needs two finite corners of one shape, the first below the second everywhere")
        self.shape = tuple(low.shape)

    def __call__(self, x: Float[Tensor, "b *d"], sigma: Tensor, /) -> Float[Tensor, "b *d"]:
        """Return the posterior mean: a truncated normal's, in each coordinate."""
        points, level = self._level(x, sigma)
        out = truncated_mean(points, level, self.low.flatten().to(points), self.high.flatten().to(points))
        return out.reshape(x.shape).to(x.dtype)

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor | float) -> Float[Tensor, " b"]:
        """Return the log density of the blurred law in nats."""
        points, level = self._level(x, sigma)
        low, high = self.low.flatten().to(points), self.high.flatten().to(points)
        return (log_mass(points, level, low, high) - (high - low).log()).sum(1)

    def project(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return the nearest point of the box."""
        return torch.minimum(torch.maximum(x, self.low.to(x)), self.high.to(x))

    def distance(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
        """Return the signed distance: negative inside, to the nearest face."""
        wide = x.double()
        outside = (wide - self.project(wide)).flatten(1).norm(dim=1)
        depth = torch.minimum(wide - self.low.to(wide), self.high.to(wide) - wide).flatten(1).amin(1)
        return torch.where(outside > 0, outside, -depth)

    def draw(self, count: int, seed: int = 0) -> Float[Tensor, "n *d"]:
        """Draw samples, seeded, float64."""
        unit = torch.rand(count, *self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return self.low + unit * (self.high - self.low)


class Sphere(_Law):
    """The uniform law on a sphere `‖x − center‖ = radius`; a circle in two dimensions.

    The posterior of a direction is von Mises–Fisher: `D = c + r·(I_{d/2}(κ)/I_{d/2−1}(κ))·u`, `κ = r‖x − c‖/sigma²`.

    Args:
        center: c, (*shape), of at least two coordinates.
        radius: r.

    Raises:
        FanalError: the radius is not positive, or there are too few coordinates.
    """

    def __init__(self, center: Tensor, radius: float) -> None:
        if not (math.isfinite(radius) and radius > 0) or center.numel() < 2 or not bool(center.isfinite().all()):
            raise FanalError(f"a sphere needs a finite center of two or more coordinates and radius > 0, got {radius}")
        self.center, self.radius, self.shape = center.double(), float(radius), tuple(center.shape)

    def __call__(self, x: Float[Tensor, "b *d"], sigma: Tensor, /) -> Float[Tensor, "b *d"]:
        """Return the posterior mean."""
        points, level = self._level(x, sigma)
        center = self.center.flatten().to(points)
        off, strength = points - center, (self.radius / level) ** 2
        # The ratio is divided by κ and not the direction by its length, which has no slope at the center.
        kappa2 = strength * (off / level).square().sum(1, keepdim=True)
        out = center + strength * bessel_fall(points.shape[1] / 2, kappa2) * off
        return out.reshape(x.shape).to(x.dtype)

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor | float) -> Float[Tensor, " b"]:
        """Return the log density of the blurred law in nats."""
        points, level = self._level(x, sigma)
        d, s = points.shape[1], level[:, 0]
        size2 = (points - self.center.flatten().to(points)).square().sum(1)
        spread = log_moment(d / 2 - 1, (self.radius / s) ** 2 * size2 / s**2)  # E exp(κ⟨u, v⟩) over the sphere
        volume = d / 2 * torch.log(2 * math.pi * s**2)
        return spread - (self.radius**2 + size2) / (2 * s**2) - volume

    def project(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return the nearest point of the sphere."""
        points = x.flatten(1).double()
        off = points - self.center.flatten().to(points)
        size = off.norm(dim=1, keepdim=True)
        first = torch.eye(1, points.shape[1]).to(off)  # at the center every direction is as good
        unit = torch.where(size > 0, off / size.where(size > 0, 1.0), first)
        return (self.center.flatten().to(points) + self.radius * unit).reshape(x.shape).to(x.dtype)

    def draw(self, count: int, seed: int = 0) -> Float[Tensor, "n *d"]:
        """Draw samples, seeded, float64."""
        generator = torch.Generator().manual_seed(seed)
        unit = _directions(count, self.center.numel(), generator)
        return (self.center.flatten() + self.radius * unit).reshape(count, *self.shape)


def _directions(count: int, d: int, generator: torch.Generator) -> Tensor:
    white = torch.randn(count, d, dtype=torch.float64, generator=generator)
    return white / white.norm(dim=1, keepdim=True)


class Ball(_Law):
    """The uniform law on a ball `‖x − center‖ <= radius`.

    With F_k the noncentral chi-squared distribution function at `radius²/sigma²` for `λ = ‖x − c‖²/sigma²`, the blurred
    density is `F_d/volume`, and `D = c + (x − c)·F_{d+2}/F_d`.

    Args:
        center: c, (*shape).
        radius: above 0.

    Raises:
        FanalError: the radius is not positive, or the center not finite.
    """

    def __init__(self, center: Tensor, radius: float) -> None:
        if not (math.isfinite(radius) and radius > 0) or not bool(center.isfinite().all()) or center.numel() == 0:
            raise FanalError(f"a ball needs a finite center, and its radius must be positive, got {radius}")
        self.center, self.radius, self.shape = center.double(), float(radius), tuple(center.shape)

    def _scaled(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """`x − c`, `radius²/sigma²` and λ."""
        points, level = self._level(x, sigma)
        off = points - self.center.flatten().to(points)
        return off, (self.radius / level[:, 0]) ** 2, (off / level).square().sum(1)

    def __call__(self, x: Float[Tensor, "b *d"], sigma: Tensor, /) -> Float[Tensor, "b *d"]:
        """Return the posterior mean."""
        off, bound, shift = self._scaled(x, sigma)
        out = self.center.flatten().to(off) + inner_share(off.shape[1], bound, shift)[:, None] * off
        return out.reshape(x.shape).to(x.dtype)

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor | float) -> Float[Tensor, " b"]:
        """Return the log density of the blurred law in nats."""
        off, bound, shift = self._scaled(x, sigma)
        half = off.shape[1] / 2
        volume = half * math.log(math.pi) + off.shape[1] * math.log(self.radius) - math.lgamma(half + 1)
        return log_chance(off.shape[1], bound, shift) - volume

    def distance(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
        """Return the signed distance, float64: negative inside."""
        wide = x.double()
        return (wide - self.center.to(wide)).flatten(1).norm(dim=1) - self.radius

    def project(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return the nearest point of the ball."""
        wide = x.double()
        center = self.center.to(wide)
        off = (wide - center).flatten(1)
        size = off.norm(dim=1, keepdim=True)
        shrink = torch.where(size > self.radius, self.radius / size.clamp_min(self.radius), 1.0)
        return (center + (off * shrink).reshape(x.shape)).to(x.dtype)

    def draw(self, count: int, seed: int = 0) -> Float[Tensor, "n *d"]:
        """Draw samples, seeded, float64."""
        generator, d = torch.Generator().manual_seed(seed), self.center.numel()
        unit = _directions(count, d, generator)
        far = torch.rand(count, 1, dtype=torch.float64, generator=generator) ** (1 / d)
        return (self.center.flatten() + self.radius * far * unit).reshape(count, *self.shape)


class Polyline(_Law):
    """The uniform law on a chain of segments, by length: a segment, a polygon, or a curve drawn finely.

    On each segment the posterior is a truncated normal along it; segments are weighted by their posterior mass.

    Args:
        corners: (K + 1, d), successive points; the first again at the end closes it.

    Raises:
        FanalError: there are fewer than two corners, or two successive ones are equal.
    """

    def __init__(self, corners: Float[Tensor, "k1 d"]) -> None:
        if corners.ndim != 2 or len(corners) < 2 or not bool(corners.isfinite().all()):
            raise FanalError(f"a chain of segments needs two or more finite corners (K + 1, d), got {corners.shape}")
        self.corners = corners.double()
        self.shape = (corners.shape[1],)
        self.ways = self.corners.diff(dim=0)
        self.lengths = self.ways.norm(dim=1)
        if not bool((self.lengths > 0).all()):
            raise FanalError("two successive corners are equal: leave one out")
        self.units = self.ways / self.lengths[:, None]

    def _along(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Position along each segment's line, (B, K), and squared distance from it."""
        off = points[:, None] - self.corners[:-1].to(points)
        along = (off * self.units.to(points)).sum(2)
        return along, (off - along[:, :, None] * self.units.to(points)).square().sum(2)

    def _log_parts(self, points: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        along, off = self._along(points)
        lengths = self.lengths.to(points).expand_as(along)
        # A segment's density: uniform along it, a point mass across.
        mass = log_mass(along, level, torch.zeros_like(along), lengths)
        across = -off / (2 * level**2) - (points.shape[1] - 1) / 2 * torch.log(2 * math.pi * level**2)
        return mass + across - self.lengths.sum().log().to(points), along

    def __call__(self, x: Float[Tensor, "b *d"], sigma: Tensor, /) -> Float[Tensor, "b *d"]:
        """Return the posterior mean."""
        points, level = self._level(x, sigma)
        parts, along = self._log_parts(points, level)
        lengths = self.lengths.to(points).expand_as(along)
        there = truncated_mean(along, level, torch.zeros_like(along), lengths)
        means = self.corners[:-1].to(points) + there[:, :, None] * self.units.to(points)
        return (torch.softmax(parts, 1)[:, :, None] * means).sum(1).to(x.dtype)

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor | float) -> Float[Tensor, " b"]:
        """Return the log density of the blurred law in nats."""
        return torch.logsumexp(self._log_parts(*self._level(x, sigma))[0], 1)

    def project(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return the nearest point of the chain."""
        points = x.double()
        along, _ = self._along(points)
        there = torch.minimum(along.clamp_min(0), self.lengths.to(points))
        near = self.corners[:-1].to(points) + there[:, :, None] * self.units.to(points)
        best = (points[:, None] - near).square().sum(2).argmin(1)
        return near[torch.arange(len(points), device=x.device), best].to(x.dtype)

    def draw(self, count: int, seed: int = 0) -> Float[Tensor, "n d"]:
        """Draw samples, seeded, float64."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.lengths, count, replacement=True, generator=generator)
        there = torch.rand(count, 1, dtype=torch.float64, generator=generator)
        return self.corners[which] + there * self.ways[which]


class FiniteSet(Dataset):
    """Points, or images: the law of a finite data set, with its distances; see `fanal.exact.Dataset`."""

    def project(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return the nearest point of the set."""
        return self._near(x).to(x.dtype)

    def distance(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
        """Return the distance from the nearest point, float64."""
        return (x.double() - self._near(x)).flatten(1).norm(dim=1)

    def _near(self, x: Tensor) -> Tensor:
        return self.points.rows(self.nearest(x)[1], x.device, torch.float64)[:, 0].reshape(x.shape)


class Affine(Gaussian):
    """A Gaussian on an affine subspace `center + span(basis)`: data on a flat manifold.

    Args:
        center: (*shape).
        basis: (d, k), orthonormal columns.
        values: (k,), variances along them, above 0: else the support were a smaller subspace.

    Raises:
        FanalError: the columns are not orthonormal, or a variance is not positive.
    """

    def __init__(self, center: Tensor, basis: Tensor, values: Tensor) -> None:
        if not bool((values > 0).all()):
            raise FanalError(
                f"the variances along a subspace must be positive, got {values.tolist()}: leave columns out"
            )
        super().__init__(center, LowRank(basis, values, 0.0))
        self.span = basis.double()

    def project(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return the nearest point of the subspace."""
        points = x.flatten(1).double()
        mean, span = self.mean.to(points), self.span.to(points)
        return (mean + ((points - mean) @ span) @ span.T).reshape(x.shape).to(x.dtype)

    def distance(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
        """Return the distance from the subspace, float64."""
        return (x.double() - self.project(x.double())).flatten(1).norm(dim=1)


class Union(_Law):
    """A mixture of laws on supports; its support is their union. `D = Σ_k w_k D_k`, `w_k ∝ π_k p_k(x; sigma)`.

    Args:
        parts: laws with `log_density`, `project` and `distance`, of one shape.
        weights: π, positive; None: equal. Normalized here.

    Raises:
        FanalError: there is no part, or shapes or weights do not fit.
    """

    def __init__(
        self,
        parts: Sequence[Ball | Box | Sphere | Polyline | FiniteSet | Affine],
        weights: Sequence[float] | None = None,
    ) -> None:
        share = torch.ones(len(parts)).double() if weights is None else torch.tensor(weights, dtype=torch.float64)
        if not parts or len({part.shape for part in parts}) != 1:
            raise FanalError("a union needs one or more parts of one shape")
        if share.shape != (len(parts),) or not bool(((share > 0) & share.isfinite()).all()):
            raise FanalError(f"weights must be {len(parts)} positive numbers, got {share.tolist()}")
        self.parts, self.prior, self.shape = tuple(parts), share / share.sum(), parts[0].shape

    def _logs(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        level = level_of(sigma)
        own = [part.log_density(x, level) for part in self.parts]
        return torch.stack(own, 1) + self.prior.to(own[0]).log()

    def __call__(self, x: Float[Tensor, "b *d"], sigma: Tensor, /) -> Float[Tensor, "b *d"]:
        """Return the posterior mean."""
        weights = torch.softmax(self._logs(x, sigma), 1)
        means = torch.stack([part(x, sigma).flatten(1).double() for part in self.parts], 1)
        return (weights[:, :, None].to(means) * means).sum(1).reshape(x.shape).to(x.dtype)

    def log_density(self, x: Float[Tensor, "b *d"], sigma: Tensor | float) -> Float[Tensor, " b"]:
        """Return the log density of the blurred law in nats."""
        return torch.logsumexp(self._logs(x, sigma), 1)

    def project(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return the nearest point of the union."""
        near = torch.stack([part.project(x) for part in self.parts])
        best = (near.double() - x.double()).flatten(2).norm(dim=2).argmin(0)
        return near[best, torch.arange(len(x), device=x.device)]

    def distance(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
        """Return the smallest of the parts' distances, float64.

        Outside it is exact. Inside parts that overlap it is a bound: the union's wall may be farther. Of the boxes
        [−1, 0.1] × [−1, 1] and [−0.1, 1] × [−1, 1] it is −0.1 at 0, which lies 1 from the wall of their union.
        """
        return torch.stack([part.distance(x).double() for part in self.parts]).amin(0)
