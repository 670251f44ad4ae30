"""Solvers that ask, draw or differentiate in unusual ways."""

import dataclasses
from dataclasses import dataclass, field

import torch

import fanal
from fanal.sampling import Step
from fanal.solvers import Ancestral, Churn, Euler, Heun


@dataclass(frozen=True)
class Corrected:
    """A Langevin step after each step of the inner solver: one call more, and noise."""

    solver: fanal.Solver = field(default_factory=Heun)

    def step(self, denoiser, x, span, memory=()):
        step = self.solver.step(denoiser, x, span, memory)
        if span.sigma_next == 0:
            return step
        pull = denoiser(step.x_next, span.sigma_next) - step.x_next
        kick = span.sigma_next * 0.2**0.5 * span.noise(x, "corrector")
        return dataclasses.replace(step, x_next=step.x_next + 0.1 * pull + kick)


@dataclass(frozen=True)
class Analytic:
    """Crosses the first interval without a call, as at large sigma D is the mean of the data, near 0."""

    def step(self, denoiser, x, span, memory=()):
        if span.i:
            return Heun().step(denoiser, x, span, memory)
        return Step(x * span.sigma_next / span.sigma, torch.zeros_like(x))


@dataclass(frozen=True)
class Steep:
    """Wants the gradient of ‖D‖² through the network."""

    def step(self, denoiser, x, span, memory=()):
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((denoiser(at, span.sigma) ** 2).sum(), at)
        return Euler().step(denoiser, x - 0 * slope, span, memory)


@dataclass(frozen=True)
class Adaptive:
    """Asks a second time where the state is large."""

    def step(self, denoiser, x, span, memory=()):
        step = Euler().step(denoiser, x, span, memory)
        return Heun().step(denoiser, x, span, memory) if step.denoised.abs().max() > 30 else step


@dataclass(frozen=True)
class Rows:
    """Asks about half of the batch."""

    def step(self, denoiser, x, span, memory=()):
        denoiser(x[: len(x) // 2], span.sigma)
        return Euler().step(denoiser, x, span, memory)


@dataclass(frozen=True)
class AtZero:
    """Asks at the end of the interval, also where that is 0."""

    def step(self, denoiser, x, span, memory=()):
        step = Euler().step(denoiser, x, span, memory)
        denoiser(step.x_next, span.sigma_next)
        return step


TRICKY = [
    Churn(Ancestral(Heun(), eta=0.3)),
    Corrected(),
    Ancestral(Corrected(Euler()), eta=0.5),
    Analytic(),
    Churn(Corrected()),
]
