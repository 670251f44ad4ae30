"""The analytical first step: at the first node the answer is known well enough, and the network is not asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fanal.denoiser import Denoiser, Wrapper, expand
from fanal.sampling import Solver, Span, Step
from fanal.solvers.onestep import Euler

__all__ = ["AFS", "AnalyticAbove"]


class AnalyticAbove(Wrapper):
    """Answers as if the data were one point at 0 seen through unit-variance noise, at and above one noise level.

    There `x/√(1 + sigma²)` stands for the noise prediction, so `D = x·(1 − sigma/√(1 + sigma²))`: nearly 0 at large
    sigma (Dockhorn et al. 2022, arXiv:2210.05475, sec. 5; [REG] sec. 5). Below it the denoiser is asked.

    Args:
        denoiser: what to wrap.
        sigma: from where on the answer is analytic; a batch with several noise levels must lie on one side.
    """

    def __init__(self, denoiser: Denoiser, sigma: float) -> None:
        super().__init__(denoiser)
        self.sigma = sigma

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the analytic answer at and above the noise level, the denoiser's below."""
        if float(sigma.detach().min()) < self.sigma:
            return self.denoiser(x, sigma)
        level = expand(sigma if sigma.ndim == 0 else sigma.to(x.device, x.dtype), x)
        root = (1 + level**2).sqrt()
        return x / (root * (root + level))  # 1 − sigma/root, without its cancellation


@dataclass(frozen=True)
class AFS:
    """Analytical first step around any solver: its call at the first node is answered without the network.

    It saves one call where x is pure noise, so it acts on the first interval of a plain run down in sigma, and in no
    repair round. `Step.denoised` is then the analytic answer, not the network's. It belongs to unit-variance data at
    the top of the range; a run that starts half-way has no use for it.

    Attributes:
        solver: what takes the steps.
    """

    solver: Solver = field(default_factory=Euler)

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with the inner solver, on the first interval with one call less."""
        if span.i == 0 and span.round == 0 and 0 < span.sigma_next < span.sigma:
            denoiser = AnalyticAbove(denoiser, float(span.sigma.detach()))
        return self.solver.step(denoiser, x, span, memory)
