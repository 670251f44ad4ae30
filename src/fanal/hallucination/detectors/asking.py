"""Detectors that ask the network beyond the run's own calls; every call passes the denoiser that they were given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fanal.denoiser import Denoiser, expand
from fanal.errors import FanalError, is_number
from fanal.hallucination import rods
from fanal.hallucination.detectors.watching import Running, Watch, check_window, size
from fanal.hallucination.perturbation import PRODUCTS, READINGS, Search, differentiate
from fanal.sampling import Transition
from fanal.seeding import noise
from fanal.solvers.arithmetic import check_choice

__all__ = ["OVER", "GradientNorm", "JacobianProbe", "RodsIndex"]

OVER: tuple[str, ...] = ("mean", "max")
"""How the figures of the steps in a window become one."""


class _AskingWatch(Running):
    """Asks once per step in the window, and keeps the mean or the largest of the answers."""

    def __init__(self, window: tuple[float, float], what: str, over: str, ask: Callable[[Transition], Tensor]) -> None:
        super().__init__(window, what)
        self.over, self.ask = over, ask

    def update(self, transition: Transition) -> Tensor:
        figure, before = self.ask(transition).detach(), self.steps[-1] if self.steps else None
        if before is None:
            return figure
        if self.over == "max":
            return torch.maximum(before.to(figure.dtype), figure)
        return before + (figure - before) / self.count


@dataclass(frozen=True)
class _Asking:
    """Base of the detectors that ask: a window, and how its steps become one figure."""

    window: tuple[float, float]
    over: str = "mean"
    free: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_window(self.window)
        check_choice(f"over of {type(self).__name__}", self.over, OVER)

    @abstractmethod
    def measure(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, transition: Transition) -> Tensor:
        """Return the figure (B,) at the point where the step asked."""

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run of this denoiser.

        Raises:
            FanalError: no denoiser was given.
        """
        if denoiser is None:
            raise FanalError(f"{type(self).__name__} asks the network itself: start it with the run's denoiser")

        def ask(transition: Transition) -> Tensor:
            x, sigma = transition.step.at or (transition.x, transition.span.sigma)
            return self.measure(denoiser, x.detach(), sigma.detach(), transition)

        return _AskingWatch(self.window, type(self).__name__, self.over, ask)


@dataclass(frozen=True)
class JacobianProbe(_Asking):
    """Size of the denoiser's Jacobian J, by finite differences along random probes; one call per probe and step.

    `sqrt(mean_k ‖D(x + h·u_k) − D(x)‖²)/(h·√dim)` with u_k standard normal and `h = radius·sigma`. For small h its
    square has the mean `‖J‖²_F/dim`. Where two futures are open the prediction is sensitive, so J is large.

    Attributes:
        window: closed range of sigma in which it asks.
        over: "mean" or "max" of the steps.
        radius: size of the probes in units of sigma.
        probes: probes per step.
    """

    radius: float = 0.1
    probes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.radius) or not self.radius > 0:
            raise FanalError(f"the probes' radius must be a number > 0, got {self.radius!r}")
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            raise FanalError(f"the number of probes must be a whole number >= 1, got {self.probes!r}")

    def measure(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, transition: Transition) -> Tensor:
        """Return the size of the Jacobian.

        Raises:
            FanalError: the run has no seeds for the probes.
        """
        span, h = transition.span, expand(self.radius * sigma.to(x.device, x.dtype), x)
        if span.seeds is None:
            raise FanalError("the probes are random: run trace with seeds=range(len(x))")
        squares = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        with torch.no_grad():
            for k in range(self.probes):
                u = noise(
                    x.shape[1:],
                    span.seeds,
                    step=span.i,
                    round=span.round,
                    stream=f"probe{k}",
                    dtype=x.dtype,
                    device=x.device,
                )
                squares = squares + size((denoiser(x + h * u, sigma) - transition.step.denoised) / h).square()
        return (squares / self.probes).sqrt()


@dataclass(frozen=True)
class GradientNorm(_Asking):
    """Norm of the gradient of the residual's norm, `‖∇‖x − D‖‖ = ‖ê − Jᵀê‖`; one call with one product per step.

    Near 1 while the residual is noise that the network cannot tell from any other, less where it knows it as content.

    Attributes:
        window: closed range of sigma in which it asks.
        over: "mean" or "max" of the steps.
        product: "backward", "forward" or "difference", as in `fanal.hallucination.perturbation.differentiate`.
    """

    product: str = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("product of GradientNorm", self.product, PRODUCTS)

    def measure(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, transition: Transition) -> Tensor:
        """Return the norm of the gradient."""
        return differentiate(denoiser, x, sigma, self.product).gradient.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class RodsIndex(_Asking):
    """The index of [RODS] eq. 8 at each step, by calls of its own: two, with two products, for one gradient step.

    `H = ‖∇‖v(x + δ)‖ − ∇‖v(x)‖‖`, see `fanal.hallucination.rods.index`. A run with a `rods.Guard` measures it anyway;
    `rods.Curvature` reads it from there at no further cost.

    Attributes:
        window: closed range of sigma in which it asks.
        over: "mean" or "max" of the steps.
        v: "score", "direction" or "residual".
        rho: the radius, in `rho_units`.
        rho_units: "absolute", "sigma" or "shell".
        steps: number of gradient steps for δ.
        product: "backward", "forward" or "difference".
    """

    v: str = "residual"
    rho: float = 0.1
    rho_units: str = "shell"
    steps: int = 1
    product: str = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("v of RodsIndex", self.v, tuple(READINGS))
        Search(self.rho, self.rho_units, self.steps, self.product)

    def measure(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, transition: Transition) -> Tensor:
        """Return the index."""
        found, _ = rods.index(
            denoiser,
            x,
            sigma,
            v=self.v,
            rho=self.rho,
            rho_units=self.rho_units,
            steps=self.steps,
            product=self.product,
        )
        return found
