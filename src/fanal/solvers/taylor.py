"""The exact total derivative of the denoised prediction, by forward-mode differentiation, and what it is good for.

Along a trajectory `dx/dsigma = d = (x − D)/sigma`, so the denoising trajectory moves with

    dD/dsigma = ∂D/∂sigma + (∂D/∂x)·d = −sigma·d²x/dsigma²      [REG] eq. 16, [GEO] prop. 3

which is one Jacobian–vector product. GENIE (Dockhorn et al. 2022, arXiv:2210.05475) trains a network for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fanal.denoiser import Denoiser, slope
from fanal.errors import FanalError
from fanal.sampling import Span, Step, Transition, finish, toward
from fanal.solvers.coefficients import number

__all__ = ["Taylor2", "generalized", "implied", "total_derivative"]

Field = Callable[[Tensor, Tensor], Tensor]


class _Contiguous(TorchFunctionMode):
    """Group normalization has a forward mode for contiguous inputs only, and attention blocks give it others."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.group_norm, torch.nn.functional.group_norm):
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def _along(field: Field, x: Tensor, sigma: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The field, and its derivative as sigma grows and x moves by `direction`.

    Fused attention kernels have no forward mode, the mathematical one has.

    Raises:
        FanalError: an operation in the network has no forward mode.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH), _Contiguous():
            value, derivative, *_ = torch.func.jvp(field, (x, sigma), (direction, torch.ones_like(sigma)))
            return value, derivative
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise FanalError(
            f"the network cannot be differentiated in forward mode ({str(error).splitlines()[0][:200]}): use a solver "
            "that needs no derivative, such as heun"
        ) from error


def total_derivative(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], sigma: Tensor
) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
    """Return D and its total derivative along the trajectory, `dD/dsigma = ∂D/∂sigma + (∂D/∂x)·(x − D)/sigma`.

    Two calls: one gives the direction, one the derivative.

    Args:
        denoiser: D(x, sigma).
        x: the state.
        sigma: noise level, 0-d and above 0.

    Raises:
        FanalError: the network cannot be differentiated forward.
    """
    denoised = denoiser(x, sigma)
    _, derivative = _along(denoiser, x, sigma, slope(x, denoised, sigma))
    return denoised, derivative


def generalized(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], sigma: Tensor, sigma_next: Tensor, order: int
) -> Float[Tensor, "b *d"]:
    """Return the generalized denoised prediction of order k, with which Euler's step is Taylor's step of order k.

    `R = D − Σ_{i=2..k} 1/i!·(d^i x/dsigma^i)·sigma·(sigma' − sigma)^{i−1}` ([REG] prop. 1, eqs. 17 and 18). Order 1
    is D: it is where one Euler step over the whole of sigma leads (corollary 1). Order 2 has
    `½·(sigma' − sigma)·dD/dsigma`, which every second-order solver replaces by a difference (corollary 2).

    The derivatives are products of forward-mode differentiation, one inside the other: `2^{k} − 1` evaluations.

    Args:
        denoiser: D(x, sigma).
        x: the state.
        sigma: its noise level, 0-d and above 0.
        sigma_next: where the step leads.
        order: k, at least 1.

    Raises:
        FanalError: order is no whole number >= 1, or the network cannot be differentiated forward.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise FanalError(f"the order must be a whole number >= 1, got {order!r}")

    def d(y: Tensor, level: Tensor) -> Tensor:
        return slope(y, denoiser(y, level), level)

    def raised(field: Field) -> Field:
        return lambda y, level: _along(field, y, level, d(y, level))[1]

    result, field = denoiser(x, sigma), d
    for i in range(2, order + 1):
        field = raised(field)
        result = result - field(x, sigma) * (sigma * (sigma_next - sigma) ** (i - 1) / math.factorial(i))
    return result


def implied(transition: Transition) -> Float[Tensor, "b *d"]:
    """Return the denoised prediction that a step of any solver implies: Euler's step with it leads to the same x'.

    `R = (x' − (sigma'/sigma)·x)/(1 − sigma'/sigma)`, the inverse of [REG] eq. 17; for Euler it is D. Record it with
    `{"implied": implied(t)}` for each transition of a trace. From infinite sigma it is D.
    """
    span, step = transition.span, transition.step
    if torch.isinf(span.sigma):
        return step.denoised
    ratio = number(span.sigma_next / span.sigma)
    return (step.x_next - ratio * transition.x) / (1 - ratio)


@dataclass(frozen=True)
class Taylor2:
    """Taylor's method of second order: Euler's step with `D + ½·(sigma' − sigma)·dD/dsigma` ([REG] eqs. 16–18).

    The derivative is exact. It costs two calls, one of them with a tangent; the network must be differentiable in
    forward mode, its time embedding too.
    """

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with two calls, or one into sigma = 0."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        denoised, derivative = total_derivative(denoiser, x, span.sigma)
        sigma, sigma_next = number(span.sigma), number(span.sigma_next)
        better = denoised + ((sigma_next - sigma) / 2) * derivative
        return Step(toward(x, better, sigma, sigma_next), denoised, info={"derivative": derivative})
