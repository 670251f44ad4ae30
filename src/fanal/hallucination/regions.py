"""The sets that a perturbation may come from: sphere, ball or box, of the whole sample or of a masked part of it.

[RODS] section 4.2 leaves the set M open. With r the radius, u(g) = g/‖g‖ and m a mask, which zeroes everything outside
its region first:

    sphere   ‖δ‖ = r         projection r·u(δ)                     first step r·u(g)
    ball     ‖δ‖ ≤ r         δ where it is inside, else r·u(δ)     first step r·u(g)
    box      max|δ_j| ≤ r    each entry clipped to ±r              first step r·sign(g)

The first step from the center is the exact maximizer of g·δ over the set ([RODS] B.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal.denoiser import expand
from fanal.errors import FanalError
from fanal.exact.gaussian import accumulator
from fanal.solvers.arithmetic import check_choice

__all__ = ["REGIONS", "UNITS", "Region", "norms", "unit"]

REGIONS: tuple[str, ...] = ("sphere", "ball", "box")
"""‖δ‖ = r, ‖δ‖ ≤ r, or max|δ_j| ≤ r."""

UNITS: tuple[str, ...] = ("absolute", "sigma", "shell")
"""What a radius is counted in: as it is, in sigma, or as a share of the norm of the noise."""


def norms(v: Float[Tensor, "b *d"]) -> Float[Tensor, "b *ones"]:
    """Return the norm of each sample, with the axes of v kept at length 1."""
    return v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))


def unit(v: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
    """Return `v/‖v‖` of each sample; 0 stays 0."""
    size = norms(v)
    return v / torch.where(size > 0, size, torch.ones_like(size))


@dataclass(frozen=True, eq=False)
class Region:
    """A set of perturbations, up to its radius.

    Attributes:
        kind: one of `REGIONS`.
        mask: True where a sample may be perturbed; has the shape of a sample, or broadcasts to it, as (1, H, W) does
            for color images. None: everywhere.

    Raises:
        FanalError: the kind is none of these, or the mask is no boolean tensor or False everywhere.
    """

    kind: str = "sphere"
    mask: Bool[Tensor, "*d"] | None = None

    def __post_init__(self) -> None:
        check_choice("region of rods", self.kind, REGIONS)
        if self.mask is None:
            return
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool or not bool(self.mask.any()):
            raise FanalError(f"a mask is a boolean tensor that is True somewhere, got {self.mask!r:.60}")

    def _masked(self, v: Tensor) -> Tensor:
        if self.mask is None:
            return v
        return torch.where(self._fitting(v), v, torch.zeros_like(v))

    def _fitting(self, x: Tensor) -> Tensor:
        """The mask on the device and with the shape of one sample."""
        assert self.mask is not None
        try:
            return self.mask.to(x.device).expand(x.shape[1:])
        except RuntimeError as error:
            shapes = f"{tuple(self.mask.shape)} for samples of shape {tuple(x.shape[1:])}"
            raise FanalError(f"the mask has shape {shapes}: give one of that shape") from error

    def radius(self, rho: float, units: str, sigma: Tensor, x: Float[Tensor, "b *d"]) -> Tensor:
        """Return the radius r: rho, `rho·sigma` or, in shell units, what makes `‖δ‖` at most `rho·sigma·√d`.

        d counts the entries inside the mask. For sphere and ball r is `rho·sigma·√d`; a box with half side
        `rho·sigma` has its corners there.
        """
        level = expand(sigma.to(x.device, accumulator(x)), x)
        if units == "absolute":
            return rho * torch.ones_like(level)
        if units == "sigma" or self.kind == "box":
            return rho * level
        entries = x[0].numel() if self.mask is None else int(self._fitting(x).sum())
        return rho * math.sqrt(entries) * level

    def project(self, delta: Float[Tensor, "b *d"], size: Tensor) -> Float[Tensor, "b *d"]:
        """Return the nearest perturbation in the set of radius `size`; the sphere leaves 0 at 0."""
        inside = self._masked(delta)
        if self.kind == "box":
            limit = size.to(inside) * torch.ones_like(inside)
            return torch.clamp(inside, -limit, limit)
        outer = size * unit(inside)
        return outer if self.kind == "sphere" else torch.where(norms(inside) > size, outer, inside)

    def ascend(
        self, size: Tensor, gradient: Float[Tensor, "b *d"], start: Tensor | None = None, number: int = 0
    ) -> Float[Tensor, "b *d"]:
        """Return a step uphill, projected: `δ' = P(δ + h·w)`, w = u(g), or sign(g) in a box.

        From the center h = r. On the sphere it stays r while the gradient points outward; where it points inward, only
        its tangential part is followed. There, and in ball and box, where the maximum may be inside, the k-th step has
        h = r/(k + 1).

        Args:
            size: r, as `radius` gives it.
            gradient: g, at the perturbed point.
            start: δ, the perturbation before; None: 0, the center.
            number: k, how many steps were taken before.
        """
        inside = self._masked(gradient)
        way = inside.sign() if self.kind == "box" else unit(inside)
        if start is None:
            return size * way
        short = size / (number + 1)
        if self.kind != "sphere":
            return self.project(start + short * way, size)
        outer = unit(start)
        along = (way * outer).flatten(1).sum(1).reshape(norms(way).shape)
        move = torch.where(along < 0, short * (way - along * outer), size * way)
        return self.project(start + move, size)
