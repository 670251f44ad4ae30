"""Stochastic exponential integrators: the reverse SDE with any amount of noise, its linear part solved exactly.

[REG] eq. 5 in x-space, with λ = −log sigma: every one of these processes has the forward process's marginals,

    dx = (1 + η²)·(D − x) dλ + η·√2·sigma dW

so over a step of h = log(sigma/sigma'), with `z = −(1 + η²)·h`,

    x' = e^z·x + (1 − e^z)·D̄ + sigma'·√(1 − e^{−2η²h})·n

where D̄ is the mean of D with the weight `e^{z(1 − s)}`. η = 0 is the ODE; with η = 1 and D̄ = D it is the DDPM step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError, is_number
from fanal.sampling import Span, Step, finish, toward
from fanal.solvers.arithmetic import Past, allowed, check_choice, check_lower, check_order, total
from fanal.solvers.coefficients import Real, call, number, plain
from fanal.solvers.multistep import dpm_weights, exact_weights, log_units
from fanal.solvers.singlestep import check_r
from fanal.solvers.stochastic import check_decreasing, split

__all__ = ["SDE", "DPMppSDE"]

ALWAYS = (0.0, math.inf)


def check_noise(name: str, eta: float, s_noise: float, window: tuple[float, float]) -> None:
    """Refuse amounts of noise that are none.

    Raises:
        FanalError: a number is negative or not finite, or the window is no range.
    """
    if not (is_number(eta) and eta >= 0 and is_number(s_noise) and s_noise >= 0):
        raise FanalError(f"{name} needs finite eta >= 0 and s_noise >= 0, got {eta!r} and {s_noise!r}")
    if not (isinstance(window, tuple) and len(window) == 2 and window[0] <= window[1]):
        raise FanalError(f"{name} needs a window (low, high) in sigma with low <= high, got {window!r}")


def amount(eta: float, window: tuple[float, float], sigma: Real) -> float:
    """Return η at a noise level: eta inside the closed window, 0 outside."""
    return eta if window[0] <= plain(sigma) <= window[1] else 0.0


def relax(x: Tensor, denoised: Tensor, sigma: Real, sigma_next: Real, rate: float) -> Tensor:
    """Return `r·x + (1 − r)·D` with `r = (sigma'/sigma)^rate`: Euler's step where rate is 1."""
    share = (sigma_next / sigma) ** rate
    return torch.lerp(denoised, x, share) if isinstance(share, float) else share * x + (1 - share) * denoised


def spread_of(sigma: Real, sigma_next: Real, eta: float) -> Real:
    """Return the standard deviation of a step's noise, `sigma'·√(1 − (sigma'/sigma)^{2η²})`."""
    return sigma_next * call("sqrt", 1 - (sigma_next / sigma) ** (2 * eta**2))


@dataclass(frozen=True)
class SDE:
    """DPM-Solver++ SDE multistep: 2M SDE, 3M SDE, and with order 1 the exponential Euler step (Lu et al. 2022).

    The weights are those of `DPMpp`, with `z = −(1 + η²)·h` in the φ-functions. η is that of [REG] eq. 5; the eta of
    k-diffusion's and diffusers' samplers is η², the same at 0 and 1.

    Attributes:
        order: number of predictions, 1 to 3; the first steps use as many as there are.
        eta: η, any number >= 0; 0 is `DPMpp`.
        variant: "midpoint", "taylor" (k-diffusion's 3M and diffusers' heun), or "exact", the integral of the polynomial
            through all values.
        lower_final: lower the order on the last steps: "always", "never", or N, on grids of fewer than N intervals.
        s_noise: factor of the noise.
        window: closed range of sigma in which noise is drawn; η is 0 outside.
        longest: largest `sigma/sigma'` of a noisy step of order 3; longer ones take order 2. Fresh noise makes D rough
            from step to step, and the second difference enlarges that. Infinite: never, as k-diffusion's 3M.
    """

    order: int = 2
    eta: float = 1.0
    variant: str = "midpoint"
    lower_final: str | int = "always"
    s_noise: float = 1.0
    window: tuple[float, float] = ALWAYS
    longest: float = 2.5

    def __post_init__(self) -> None:
        check_order("sde", self.order, 3)
        check_choice("variant of sde", self.variant, ("midpoint", "taylor", "exact"))
        check_lower(self.lower_final)
        check_noise("sde", self.eta, self.s_noise, self.window)
        if not self.longest > 1:
            raise FanalError(f"longest is a ratio of two noise levels, above 1, or inf; got {self.longest!r}")

    def _allowed(self, span: Span, eta: float) -> int:
        """The order of a step, as far as there are predictions."""
        order = allowed(self.order, self.lower_final, span.n, span.n - span.i)
        return min(order, 2) if eta > 0 and float(span.sigma) > self.longest * float(span.sigma_next) else order

    def _weights(self, sigmas: Sequence[Real], sigma_next: Real, rate: float) -> Sequence[Real]:
        nodes, h = log_units(sigmas, sigma_next)
        if self.variant == "exact":
            return exact_weights(nodes, -rate * h)
        return dpm_weights(nodes, -rate * h, self.variant)

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call and, where η > 0, fresh noise."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        sigma, sigma_next = number(span.sigma), number(span.sigma_next)
        eta = amount(self.eta, self.window, sigma)
        denoised = denoiser(x, span.sigma)
        past = Past.recall(memory).with_newest(denoised, sigma)
        order = min(self._allowed(span, eta), len(past.values))
        value = denoised
        if order > 1:
            value = total(past.values[:order], self._weights(past.sigmas[:order], sigma_next, 1 + eta**2))
        x_next = relax(x, value, sigma, sigma_next, 1 + eta**2)
        if eta > 0:
            check_decreasing(span, "the sde solver")
            x_next = x_next + (self.s_noise * spread_of(sigma, sigma_next, eta)) * span.noise(x, "sde")
        return Step(x_next, denoised, memory=past.memory(self.order - 1))


@dataclass(frozen=True)
class DPMppSDE:
    """DPM-Solver++ SDE singlestep: a noisy step to the middle, then one with the prediction there (k-diffusion).

    Both steps go down past their end and add the difference back as noise, as in `Ancestral`:
    `sigma_up = eta·sigma'·√(1 − sigma'²/sigma²)`. The noise of the whole step continues that of its first part: its
    correlation is what is left of the first part's noise at the end of the step. With eta = 0 it is `DPMpp2S`.

    Attributes:
        eta: share of the noise, 0 to 1.
        r: where the stage is, as a share of log sigma, in (0, 1].
        s_noise: factor of the noise.
    """

    eta: float = 1.0
    r: float = 0.5
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_noise("dpmpp_sde", self.eta, self.s_noise, ALWAYS)
        check_r("dpmpp_sde", self.r)
        if self.eta > 1:
            raise FanalError(f"dpmpp_sde needs eta in [0, 1], got {self.eta}")

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with two calls and two draws of noise, or one call into sigma = 0."""
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        denoised = denoiser(x, span.sigma)
        middle = span.sigma * (span.sigma_next / span.sigma) ** self.r
        noisy = self.eta > 0
        if noisy:
            check_decreasing(span, "dpmpp_sde")
        first = span.noise(x, "dpmpp_sde-middle") if noisy else None
        down, up = split(span.sigma, middle, self.eta)
        y = self._kicked(toward(x, denoised, number(span.sigma), number(down)), up, first)
        again = denoiser(y, middle)
        blend = total((denoised, again), (1 - 1 / (2 * self.r), 1 / (2 * self.r)))
        down, whole = split(span.sigma, span.sigma_next, self.eta)
        if first is not None:
            # What is left of the first part's noise at the end of the step, as a share of the whole step's.
            left = up * split(middle, span.sigma_next, self.eta)[0] / middle
            share = number((left / whole).clamp(max=1.0))
            fresh = span.noise(x, "dpmpp_sde")
            first = total((first, fresh), (share, call("sqrt", 1 - share**2)))
        x_next = self._kicked(toward(x, blend, number(span.sigma), number(down)), whole, first)
        return Step(x_next, denoised)

    def _kicked(self, x: Tensor, up: Tensor, noise: Tensor | None) -> Tensor:
        return x if noise is None else x + (self.s_noise * number(up)) * noise
