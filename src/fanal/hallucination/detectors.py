"""Detectors: consumers of finished transitions that give every sample a risk.

A detector is a frozen description; `start()` gives a watch that sees one run. Free ones need no call of the network
beyond the run's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import slope
from fanal.errors import FanalError, unknown_name
from fanal.sampling import Transition
from fanal.schedules import check_sigmas

__all__ = ["DETECTORS", "Detector", "LastSlope", "Variance", "Watch", "build", "last_window"]


@runtime_checkable
class Watch(Protocol):
    """Sees one run, transition by transition."""

    def see(self, transition: Transition) -> None:
        """Take in one transition."""
        ...

    def per_step(self) -> Float[Tensor, "n b"]:
        """Return the risk as it stood after each transition seen; 0 before there was anything to judge by."""
        ...

    def risk(self) -> Float[Tensor, " b"]:
        """Return the risk of each sample, from what was seen so far."""
        ...


@runtime_checkable
class Detector(Protocol):
    """A risk for every sample of a run: higher means more likely wrong."""

    @property
    def window(self) -> tuple[float, float]:
        """Closed range of sigma that it looks at; a rerun must cross all of it to be judged alike."""
        ...

    @property
    def free(self) -> bool:
        """Whether it needs no network call beyond the run's own."""
        ...

    def start(self) -> Watch:
        """Begin to watch a run."""
        ...


def last_window(sigmas: Tensor, share: float = 0.4) -> tuple[float, float]:
    """Return the sigma range `(0, high)` that holds the last `share` of a decreasing grid's intervals.

    Raises:
        FanalError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise FanalError(f"share must be in (0, 1], got {share}")
    grid = check_sigmas(sigmas)
    steps = len(grid) - 1
    first = max(0, min(steps - 2, round((1 - share) * steps)))  # at least two, so that there is a variance
    return 0.0, float(grid[first])


@dataclass
class _VarianceWatch:
    window: tuple[float, float]
    count: int = 0
    center: Tensor | None = None
    squares: Tensor | None = None
    steps: list[Tensor] = field(default_factory=list)

    def see(self, transition: Transition) -> None:
        denoised = transition.step.denoised
        if self.center is None or self.squares is None:
            self.center, self.squares = torch.zeros_like(denoised), torch.zeros_like(denoised)
        if self.window[0] <= float(transition.span.sigma) <= self.window[1]:
            self.count += 1  # Welford's update: no trajectory is kept
            off = denoised - self.center
            self.center = self.center + off / self.count
            self.squares = self.squares + off * (denoised - self.center)
        self.steps.append(self.squares.flatten(1).mean(1) / max(self.count, 1))

    def per_step(self) -> Tensor:
        return torch.stack(self.steps).cpu().double()  # on the CPU: not every device has float64

    def risk(self) -> Tensor:
        if self.count < 2:
            raise FanalError(
                f"trajectory variance needs two steps with sigma in {self.window}, saw {self.count}: widen the window"
            )
        return self.steps[-1].cpu().double()


@dataclass(frozen=True)
class Variance:
    """Variance of the denoised prediction over the last part of a run (Aithal et al. 2024), free.

    `mean_j Var_i(D_j(x_i, sigma_i))` over the steps i with sigma in `window` and the entries j of a sample: a
    prediction that keeps wavering after the others have settled has met a region between modes.

    Attributes:
        window: closed range of sigma that counts; in sigma, so that a run that starts half-way is judged alike.
    """

    window: tuple[float, float]
    free: bool = field(default=True, init=False)

    def start(self) -> Watch:
        """Begin to watch a run."""
        return _VarianceWatch(self.window)


@dataclass
class _SlopeWatch:
    steps: list[Tensor] = field(default_factory=list)

    def see(self, transition: Transition) -> None:
        x, sigma = transition.step.at or (transition.x, transition.span.sigma)
        d = slope(x, transition.step.denoised, sigma)
        self.steps.append(d.flatten(1).norm(dim=1) / d[0].numel() ** 0.5)

    def per_step(self) -> Tensor:
        return torch.stack(self.steps).cpu().double()

    def risk(self) -> Tensor:
        return self.steps[-1].cpu().double()


@dataclass(frozen=True)
class LastSlope:
    """Size of the noise prediction at the last step, `‖d‖/√dim` at the smallest sigma, free.

    `d = −sigma·score`: small inside a mode, whose score is small, and large off the support, where the score still
    pulls towards it. It shines in few dimensions and says little about images.
    """

    free: bool = field(default=True, init=False)
    window: tuple[float, float] = field(default=(0.0, 0.0), init=False)

    def start(self) -> Watch:
        """Begin to watch a run."""
        return _SlopeWatch()


DETECTORS: dict[str, type] = {"variance": Variance, "last_slope": LastSlope}
"""Name → class, for cards and the command line."""


def build(name: str, window: tuple[float, float]) -> Detector:
    """Build a detector from its name; those that need no window ignore it.

    Raises:
        FanalError: no detector has this name.
    """
    if name not in DETECTORS:
        raise unknown_name("detector", name, DETECTORS)
    return Variance(window) if name == "variance" else LastSlope()
