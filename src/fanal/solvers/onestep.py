"""Solvers that use nothing but the current interval, as Runge–Kutta methods in sigma."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.sampling import Span, Step, finish, toward
from fanal.solvers.arithmetic import Row, staged
from fanal.solvers.coefficients import number

__all__ = ["RK4", "RK4_ROWS", "Euler", "Heun"]

RK4_ROWS: tuple[Row, ...] = (
    (0.5, (1.0,)),
    (0.5, (0.0, 1.0)),
    (1.0, (0.0, 0.0, 1.0)),
    (1.0, (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
)
"""The stages of the classical Runge–Kutta method of order 4."""


@dataclass(frozen=True)
class Euler:
    """First order, one call: `x' = (sigma'/sigma)·x + (1 − sigma'/sigma)·D(x, sigma)`.

    The same as deterministic DDIM (Song et al. 2021) and DPM-Solver-1 in x-space; [REG] eq. 17.
    """

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call."""
        denoised = denoiser(x, span.sigma)
        return Step(toward(x, denoised, number(span.sigma), number(span.sigma_next)), denoised)


@dataclass(frozen=True)
class Heun:
    """Second order, two calls, and one into sigma = 0 (Karras et al. 2022, alg. 1).

    `y = x + h·d(x, sigma)`, `x' = x + h·(d(x, sigma) + d(y, sigma'))/2` with `h = sigma' − sigma`. In terms of the
    denoised predictions this is Euler's step with their blend `(1 − w)·D(x, sigma) + w·D(y, sigma')`,
    `w = sigma/(2·sigma')`, which is how it is computed ([GEO] table 1).
    """

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with two calls, or one into sigma = 0."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        sigma, sigma_next = number(span.sigma), number(span.sigma_next)
        denoised = denoiser(x, span.sigma)
        again = denoiser(toward(x, denoised, sigma, sigma_next), span.sigma_next)
        # (1 − w)·D + w·D': Euler's formula between the two, with the ratio 1 − w
        blend = toward(denoised, again, 2 * sigma_next, 2 * sigma_next - sigma)
        return Step(toward(x, blend, sigma, sigma_next), denoised, info={"denoised_next": again})


@dataclass(frozen=True)
class RK4:
    """The classical Runge–Kutta method in sigma: fourth order, four calls, and one into sigma = 0."""

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with four calls, or one into sigma = 0."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        x_next, denoised, _ = staged(denoiser, x, span, RK4_ROWS, predict="noise", log=False)
        return Step(x_next, denoised)
