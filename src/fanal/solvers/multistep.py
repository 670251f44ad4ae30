"""Linear multistep solvers: one call per step, the order from the values of earlier steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.sampling import Span, Step, finish
from fanal.solvers.arithmetic import (
    PREDICT,
    allowed,
    check_choice,
    check_lower,
    check_order,
    linear_step,
)
from fanal.solvers.coefficients import (
    Real,
    exponential_moments,
    interpolation,
    log_ratio,
    phi,
    power_moments,
    quadrature_moments,
    units,
    vp_time,
)

__all__ = ["DEIS", "IPNDM", "LMS", "DPMpp"]

_CONSTANT: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""By order; newest value first."""


def constant_weights(sigmas: Sequence[Real], sigma_next: Real) -> Sequence[Real]:
    """Return the Adams–Bashforth weights for equal steps, whatever the steps are."""
    return _CONSTANT[len(sigmas) - 1]


def adams_weights(sigmas: Sequence[Real], sigma_next: Real) -> Sequence[Real]:
    """Return the Adams–Bashforth weights for the steps at hand: the polynomial in sigma, integrated."""
    return interpolation(units(sigmas, sigma_next), power_moments(len(sigmas)))


def exact_weights(nodes: Sequence[Real], z: Real) -> Sequence[Real]:
    """Return the weights that integrate the polynomial through any number of values with the weight `e^{z(1 − s)}`."""
    return interpolation(nodes, exponential_moments(len(nodes), z))


def log_units(sigmas: Sequence[Real], sigma_next: Real) -> tuple[list[Real], Real]:
    """Return nodes in units of the interval, in log sigma, and the interval's h = log(sigma/sigma')."""
    h = log_ratio(sigmas[0], sigma_next)
    return [log_ratio(sigmas[0], sigma) / h for sigma in sigmas], h


@dataclass(frozen=True)
class IPNDM:
    """Improved PNDM: Adams–Bashforth weights for equal steps, whatever the steps are (Zhang & Chen 2023).

    `x' = x + (sigma' − sigma)·Σ_k c_k·d_{n−k}` with c = (1), (3, −1)/2, (23, −16, 5)/12, (55, −59, 37, −9)/24. On a
    grid whose steps change the order is 2; the weights are shorter than the right ones, and so often better at few
    steps.

    Attributes:
        order: number of slopes, 1 to 4; the first steps use as many as there are.
        finish: cross into sigma = 0 with the denoised prediction; False: with the formula.
    """

    order: int = 4
    finish: bool = True

    def __post_init__(self) -> None:
        check_order("ipndm", self.order, 4)

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call."""
        if self.finish and span.sigma_next == 0:
            return finish(denoiser, x, span)
        return linear_step(
            denoiser, x, span, memory, constant_weights, order=self.order, keep=self.order - 1, predict="noise"
        )


@dataclass(frozen=True)
class LMS:
    """Adams–Bashforth with variable steps: the polynomial in sigma through the last slopes, integrated exactly.

    The same as the LMS solvers of k-diffusion and diffusers, and as DEIS-ρAB (Zhang & Chen 2023, arXiv:2204.13902).

    Attributes:
        order: number of slopes, 1 to 4; the first steps use as many as there are.
        finish: cross into sigma = 0 with the denoised prediction; False: with the formula, as k-diffusion and
            diffusers do.
    """

    order: int = 4
    finish: bool = True

    def __post_init__(self) -> None:
        check_order("lms", self.order, 4)

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call."""
        if self.finish and span.sigma_next == 0:
            return finish(denoiser, x, span)
        return linear_step(
            denoiser, x, span, memory, adams_weights, order=self.order, keep=self.order - 1, predict="noise"
        )


@dataclass(frozen=True)
class DEIS:
    """Diffusion exponential integrator: the polynomial through the last slopes in a time of your choice.

    `x' = x + Σ_k d_{n−k}·∫ l_k(τ(sigma)) dsigma`, l_k the Lagrange basis in the time τ (Zhang & Chen 2023,
    arXiv:2204.13902, where order counts the polynomial's degree: tAB3 is `order=4`).

    Attributes:
        order: number of slopes, 1 to 4; the first steps use as many as there are.
        basis: "tab": VP time (the papers' tAB). "logrho": log sigma, which diffusers calls DEIS. "rho": sigma itself,
            the same as `LMS`.
        lower_final: lower the order on the last steps: "always", "never", or N, on grids of fewer than N intervals.
        sigma_min: where the VP time of "tab" is 0.001.
        sigma_max: where it is 1.
        points: of the rule that integrates "tab"; 0: exact. diff-sampler has 10,000, one part in 10,000 too little.
    """

    order: int = 4
    basis: str = "tab"
    lower_final: str | int = "never"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    points: int = 0

    def __post_init__(self) -> None:
        check_order("deis", self.order, 4)
        check_choice("basis of deis", self.basis, ("tab", "logrho", "rho"))
        check_lower(self.lower_final)

    def _weights(self, sigmas: Sequence[Real], sigma_next: Real) -> Sequence[Real]:
        count = len(sigmas)
        if self.basis == "rho":
            return adams_weights(sigmas, sigma_next)
        if self.basis == "logrho":
            return exact_weights(*log_units(sigmas, sigma_next))
        low, high = self.sigma_min, self.sigma_max
        times = [vp_time(sigma, low, high) for sigma in sigmas]
        moments = quadrature_moments(count, sigmas[0], sigma_next, low, high, self.points)
        return interpolation(units(times, vp_time(sigma_next, low, high)), moments)

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        order = allowed(self.order, self.lower_final, span.n, span.n - span.i)
        return linear_step(denoiser, x, span, memory, self._weights, order=order, keep=self.order - 1, predict="noise")


@dataclass(frozen=True)
class DPMpp:
    """DPM-Solver++ multistep (2M, 3M), and DPM-Solver's with `predict="noise"` (Lu et al. 2022, arXiv:2211.01095).

    With h = log(sigma/sigma'), `r_k = log(sigma_{n−k}/sigma_n)/h` and z = −h (h for noise), Euler's step with

    - order 2, midpoint: `v_n + (v_n − v_{n−1})/(2·r_1)`;
    - order 2, taylor: `v_n + (φ_2/φ_1)(z)·(v_n − v_{n−1})/r_1`, the exact integral of the line through both;
    - order 3: the parabola's derivative at sigma_n times φ_2/φ_1, and half its second derivative times φ_3/φ_1. The
      integral of the parabola has twice that; as published and as all programs have it the order is 2. `RES` with
      `order=3` has the exact weights.

    Attributes:
        order: number of values, 1 to 3; the first steps use as many as there are.
        variant: how two values are used, also on the way to three: "midpoint" (k-diffusion's 2M) or "taylor"
            (diffusers calls it heun; k-diffusion's 3M).
        lower_final: lower the order on the last steps: "always", "never", or N, on grids of fewer than N intervals.
        predict: "data" (DPM-Solver++) or "noise" (DPM-Solver).
    """

    order: int = 2
    variant: str = "midpoint"
    lower_final: str | int = "always"
    predict: str = "data"

    def __post_init__(self) -> None:
        check_order("dpmpp", self.order, 3)
        check_choice("variant of dpmpp", self.variant, ("midpoint", "taylor"))
        check_choice("predict of dpmpp", self.predict, PREDICT)
        check_lower(self.lower_final)

    def _weights(self, sigmas: Sequence[Real], sigma_next: Real) -> Sequence[Real]:
        nodes, h = log_units(sigmas, sigma_next)
        return dpm_weights(nodes, -h if self.predict == "data" else h, self.variant)

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        order = allowed(self.order, self.lower_final, span.n, span.n - span.i)
        return linear_step(
            denoiser, x, span, memory, self._weights, order=order, keep=self.order - 1, predict=self.predict
        )


def dpm_weights(nodes: Sequence[Real], z: Real, variant: str) -> Sequence[Real]:
    """Return the weights of DPM-Solver's multistep forms for two or three values.

    Args:
        nodes: in log sigma, in units of the interval: 0, −r_1, −r_1 − r_2.
        z: of the φ-functions.
        variant: "midpoint" or "taylor", for two values.
    """
    if len(nodes) == 2:
        share = 0.5 if variant == "midpoint" else phi(2, z) / phi(1, z)
        old = share / nodes[1]
        return 1 - old, old
    r0, r1 = -nodes[1], nodes[1] - nodes[2]
    whole = phi(1, z)
    first, second = phi(2, z) / whole, phi(3, z) / whole / (r0 + r1)
    # The value is v_n + first·(E0 + r0/(r0 + r1)·(E0 − E1)) + second·(E0 − E1), E0 and E1 the difference quotients.
    bend = first * r0 / (r0 + r1) + second
    newer, older = (first + bend) / r0, bend / r1
    return 1 + newer, -newer - older, older
