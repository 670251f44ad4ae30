"""The perturbation of [RODS]: where the residual grows fastest around a point, and how fast that direction turns.

With the residual `e = x − D(x, sigma)`, its unit vector ê and the Jacobian J of D, the three readings of v in
[RODS] eq. 8 are e itself, the direction e/sigma and the score −e/sigma². They differ by powers of sigma, so one
product serves all:

    ∇‖e‖ = ê − Jᵀê,    δ = r·∇‖e‖/‖∇‖e‖‖,    H = ‖∇‖e‖(x + δ) − ∇‖e‖(x)‖ / sigma^p

with p = 0, 1, 2 and r the radius. Perturbations are held fixed: no gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser, expand
from fanal.errors import FanalError, is_number
from fanal.exact.gaussian import accumulator
from fanal.hallucination.regions import REGIONS, UNITS, Region, norms, unit
from fanal.solvers.arithmetic import check_choice
from fanal.solvers.taylor import total_derivative

__all__ = [
    "PRODUCTS",
    "READINGS",
    "Objective",
    "Search",
    "Slope",
    "bend",
    "differentiate",
    "slope_of",
]

READINGS: dict[str, int] = {"residual": 0, "direction": 1, "score": 2}
"""Reading of v → the power of sigma that divides ‖x − D‖."""

PRODUCTS: tuple[str, ...] = ("backward", "forward", "difference")
"""How a product with the Jacobian is formed."""


@dataclass(frozen=True, slots=True, eq=False)
class Slope:
    """What one product says about a point.

    Attributes:
        denoised: D(x, sigma), without a graph.
        residual: x − D, in float64 (float32 on mps).
        gradient: ∇‖x − D‖, of the same kind.
        products: Jacobian products that it took.
    """

    denoised: Float[Tensor, "b *d"]
    residual: Float[Tensor, "b *d"]
    gradient: Float[Tensor, "b *d"]
    products: int


def _backward(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """D and Jᵀê, the exact gradient's part, by one vector–Jacobian product."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()  # copies, because tensors made in inference mode carry no graph
        denoised = denoiser(leaf, sigma.detach().clone())
        if not denoised.requires_grad:
            raise FanalError(
                "the denoiser's answer has no gradient with respect to x (it runs without gradients, or is constant): "
                'use product="difference"'
            )
        away = unit(x.detach().to(accumulator(x)) - denoised.detach())
        (pulled,) = torch.autograd.grad(denoised, leaf, away.to(denoised.dtype), materialize_grads=True)
    return denoised.detach(), pulled


def _forward(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """D and Jê, by one Jacobian–vector product along the slope, sigma held fixed."""
    with torch.no_grad():
        denoised, moved = total_derivative(lambda y, _: denoiser(y, sigma), x, sigma)
        level = expand(sigma.to(x.device, accumulator(x)), x)
        size = norms(x.to(accumulator(x)) - denoised)
        return denoised, moved * torch.where(size > 0, level / size, torch.zeros_like(size))


def _difference(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """D and Jê, by the difference quotient along the residual; one more call."""
    with torch.no_grad():
        denoised = denoiser(x, sigma)
        residual = x - denoised
        step = torch.finfo(x.dtype).eps ** (1 / 3)  # relative to ‖e‖; balances truncation and rounding
        size = step * norms(residual.to(accumulator(x)))
        moved = denoiser(x + step * residual, sigma).to(size.dtype) - denoised
        return denoised, torch.where(size > 0, moved / size, torch.zeros_like(moved))


def differentiate(denoiser: Denoiser, x: Float[Tensor, "b *d"], sigma: Tensor, product: str = "backward") -> Slope:
    """Return D and `∇‖x − D‖ = ê − Jᵀê`, whatever the caller's gradient mode; nothing returned has a graph.

    "backward" is exact: one call with a vector–Jacobian product. "forward" (a call, and one with a tangent) and
    "difference" (two calls) form Jê in place of Jᵀê: the same for the exact denoiser, whose Jacobian is a covariance
    over sigma². A network's is not symmetric, so there they are approximations; the difference of float32 predictions
    also has rounding in it, which drowns the index at small sigma.

    Args:
        denoiser: D(x, sigma).
        x: the points.
        sigma: their noise level, () or (B,), above 0.
        product: one of `PRODUCTS`.

    Raises:
        FanalError: the denoiser cannot be differentiated that way.
    """
    form = {"backward": _backward, "forward": _forward, "difference": _difference}[product]
    denoised, pulled = form(denoiser, x, sigma)
    residual = x.detach().to(accumulator(x)) - denoised
    return Slope(denoised, residual, unit(residual) - pulled, int(product != "difference"))


def bend(here: Slope, there: Slope, sigma: Tensor, v: str) -> Float[Tensor, " b"]:
    """Return the index `‖∇‖v(x + δ)‖ − ∇‖v(x)‖‖` ([RODS] eq. 8) from the slopes at both points."""
    turned = (there.gradient - here.gradient).flatten(1).norm(dim=1)
    return turned / sigma.to(turned.device, turned.dtype) ** READINGS[v]


@runtime_checkable
class Objective(Protocol):
    """What a perturbation makes large, sample by sample: g(x, δ) of [RODS] section 4.2, differentiable in δ."""

    def __call__(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, delta: Tensor, /) -> Tensor:
        """Return g, (B,); a sample's value depends on that sample alone."""
        ...


def slope_of(objective: Objective, denoiser: Denoiser, x: Tensor, sigma: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of an objective at δ, whatever the caller's gradient mode; it has no graph.

    Raises:
        FanalError: the objective does not give one number per sample, or does not depend on δ.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = delta.detach().clone().requires_grad_()
        values = objective(denoiser, x.detach().clone(), sigma.detach().clone(), leaf)
        if not isinstance(values, Tensor) or values.shape != (len(x),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise FanalError(f"an objective of rods gives one number per sample, ({len(x)},), got {got}")
        if not values.requires_grad:
            raise FanalError("the objective of rods has no gradient with respect to delta: build it of torch functions")
        (gradient,) = torch.autograd.grad(values.sum(), leaf, materialize_grads=True)
    return gradient.to(accumulator(x))


@dataclass(frozen=True)
class Search:
    """How a perturbation is found.

    Attributes:
        rho: radius, in `rho_units`.
        rho_units: one of `UNITS`.
        steps: number of gradient steps.
        product: one of `PRODUCTS`.
        region: the set it comes from, or the name of one.

    Raises:
        FanalError: a field is none of these.
    """

    rho: float
    rho_units: str
    steps: int
    product: str
    region: Region | str = "sphere"

    def __post_init__(self) -> None:
        if not (is_number(self.rho) and self.rho >= 0):
            raise FanalError(f"rods needs a finite radius rho >= 0, got {self.rho!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise FanalError(f"rods needs a whole number of gradient steps >= 1, got {self.steps!r}")
        check_choice("rho_units of rods", self.rho_units, UNITS)
        check_choice("product of rods", self.product, PRODUCTS)
        if not isinstance(self.region, Region):
            check_choice("region of rods", self.region, REGIONS)

    @property
    def allowed(self) -> Region:
        """The set of perturbations, up to its radius."""
        return self.region if isinstance(self.region, Region) else Region(self.region)

    def size(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the radius at this noise level."""
        return self.allowed.radius(self.rho, self.rho_units, sigma, x)

    def climb(self, x: Tensor, sigma: Tensor, first: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the perturbation that `steps` projected gradient steps lead to.

        Args:
            x: the points.
            sigma: their noise level.
            first: the gradient at the center.
            gradient: δ → the gradient there.
        """
        size = self.size(x, sigma)
        delta = self.allowed.ascend(size, first)
        for k in range(1, self.steps):
            delta = self.allowed.ascend(size, gradient(delta.to(x.dtype)), delta, k)
        return delta.to(x.dtype)

    def cas(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, here: Slope) -> tuple[Tensor, int]:
        """Return the perturbation that makes ‖v(x + δ)‖ largest, and the products spent beyond the one in `here`."""
        spent = 0

        def gradient(delta: Tensor) -> Tensor:
            nonlocal spent
            there = differentiate(denoiser, x + delta, sigma, self.product)
            spent += there.products
            return there.gradient

        return self.climb(x, sigma, here.gradient, gradient), spent

    def sas(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor:
        """Return the perturbation that makes −log p largest: uphill, along the residual `x − D`."""

        def gradient(delta: Tensor) -> Tensor:
            with torch.no_grad():
                return x + delta - denoiser(x + delta, sigma)

        return self.climb(x, sigma, residual, gradient)

    def best(self, objective: Objective, denoiser: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, int]:
        """Return the perturbation that makes an objective largest, and the products spent: one per step.

        A sample whose gradient at δ = 0 is 0 is not moved.
        """

        def gradient(delta: Tensor) -> Tensor:
            return slope_of(objective, denoiser, x, sigma, delta)

        return self.climb(x, sigma, gradient(torch.zeros_like(x)), gradient), self.steps
