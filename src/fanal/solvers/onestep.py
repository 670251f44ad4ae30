"""Solvers that use nothing but the current interval."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.sampling import Span, Step, finish, toward

__all__ = ["Euler", "Heun"]


@dataclass(frozen=True)
class Euler:
    """First order, one call: `x' = (sigma'/sigma)·x + (1 − sigma'/sigma)·D(x, sigma)`.

    The same as deterministic DDIM (Song et al. 2021) and DPM-Solver-1 in x-space; [REG] eq. 17.
    """

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call."""
        denoised = denoiser(x, span.sigma)
        return Step(toward(x, denoised, span.sigma, span.sigma_next), denoised)


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
        denoised = denoiser(x, span.sigma)
        y = toward(x, denoised, span.sigma, span.sigma_next)
        again = denoiser(y, span.sigma_next)
        weight = span.sigma / (2 * span.sigma_next)
        blend = denoised + weight * (again - denoised)
        return Step(toward(x, blend, span.sigma, span.sigma_next), denoised, info={"denoised_next": again})
