"""Solver→Solver: noise around a deterministic step, with the marginals of the forward process kept."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.sampling import Solver, Span, Step
from fanal.solvers.onestep import Euler, Heun

__all__ = ["DDPM", "Ancestral", "Churn"]


def check_decreasing(span: Span, name: str) -> None:
    """Refuse to add noise on the way up.

    Raises:
        FanalError: sigma rises over the interval.
    """
    if span.sigma_next > span.sigma:
        raise FanalError(f"{name} draws noise and only runs down in sigma; encode with a deterministic solver")


def split(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Return sigma_down and sigma_up of an ancestral step: where the deterministic part leads, and the noise.

    `sigma_up = eta·sigma'·sqrt(1 − sigma'²/sigma²)`, `sigma_down² + sigma_up² = sigma'²`.
    """
    up = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
    return (sigma_next**2 - up**2).sqrt(), up


@dataclass(frozen=True)
class Ancestral:
    """Step down past sigma' and add the difference back as fresh noise.

    `sigma_up = eta·sigma'·sqrt(1 − sigma'²/sigma²)`, `sigma_down = sqrt(sigma'² − sigma_up²)`: the inner solver goes
    to sigma_down, then `x' += sigma_up·n`. With Euler inside, eta = 0 is DDIM and eta = 1 is DDPM; x' then has the
    exact Gaussian posterior of the forward process given x0 = D ([PDE] eq. 4.21 = 4.22; [REG] eq. 5).

    Attributes:
        solver: what takes the deterministic part.
        eta: share of the noise, 0 to 1.
    """

    solver: Solver = field(default_factory=Euler)
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise FanalError(f"eta must be in [0, 1], got {self.eta}")

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span`: the inner step to sigma_down, then noise."""
        if self.eta == 0 or span.sigma_next == 0:
            return self.solver.step(denoiser, x, span, memory)
        check_decreasing(span, "ancestral sampling")
        sigma_down, sigma_up = split(span.sigma, span.sigma_next, self.eta)
        step = self.solver.step(denoiser, x, dataclasses.replace(span, sigma_next=sigma_down), memory)
        noisy = step.x_next + sigma_up * span.noise(x, "ancestral")
        return dataclasses.replace(step, x_next=noisy)


@dataclass(frozen=True)
class DDPM:
    """`x' = (sigma'²/sigma²)·x + (1 − sigma'²/sigma²)·D + sigma'·sqrt(1 − sigma'²/sigma²)·n`.

    The exponential-integrator form of the reverse SDE ([PDE] eq. 4.22), exact where D is constant over the step:
    `Ancestral(Euler(), eta=1)`.
    """

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call and fresh noise."""
        return Ancestral(Euler(), eta=1.0).step(denoiser, x, span, memory)


@dataclass(frozen=True)
class Churn:
    """Go up in sigma with fresh noise before each step (Karras et al. 2022, alg. 2).

    `gamma = min(s_churn/n, √2 − 1)` where `s_min <= sigma <= s_max`, else 0; `sigma_hat = sigma·(1 + gamma)`;
    `x_hat = x + sqrt(sigma_hat² − sigma²)·s_noise·n`; the inner solver goes from (x_hat, sigma_hat) to sigma'.
    `Step.denoised` is then `D(x_hat, sigma_hat)`, `Step.at` says so, and `info` keeps `x_hat`. With s_churn = 0 no
    noise is drawn.

    Attributes:
        solver: what takes the step; Heun as in the paper.
        s_churn: overall amount of noise.
        s_min: smallest sigma that is churned.
        s_max: largest sigma that is churned.
        s_noise: standard deviation of the fresh noise.
    """

    solver: Solver = field(default_factory=Heun)
    s_churn: float = 40.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003

    def __post_init__(self) -> None:
        if not (0 <= self.s_churn < math.inf and 0 <= self.s_noise < math.inf and self.s_min <= self.s_max):
            raise FanalError(
                f"churn needs s_churn >= 0, s_noise >= 0, s_min <= s_max; got {self.s_churn}, {self.s_noise}, "
                f"{self.s_min}, {self.s_max}"
            )

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span`: up to sigma_hat with noise, then the inner step."""
        inside = self.s_min <= float(span.sigma.detach()) <= self.s_max
        gamma = min(self.s_churn / span.n, math.sqrt(2) - 1) if inside else 0.0
        if gamma == 0:
            return self.solver.step(denoiser, x, span, memory)
        check_decreasing(span, "churn")
        sigma_hat = span.sigma * (1 + gamma)
        x_hat = x + (sigma_hat**2 - span.sigma**2).sqrt() * self.s_noise * span.noise(x, "churn")
        step = self.solver.step(denoiser, x_hat, dataclasses.replace(span, sigma=sigma_hat), memory)
        return dataclasses.replace(step, info={**step.info, "x_hat": x_hat}, at=(x_hat, sigma_hat))
