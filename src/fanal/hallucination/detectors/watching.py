"""What a detector is, and the state that every watch keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.sampling import Transition
from fanal.schedules import check_sigmas

__all__ = ["Detector", "Running", "Watch", "begin", "check_window", "last_window", "size"]

_WORDS = {1: "one step", 2: "two steps", 3: "three steps"}


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
    """A risk for every sample of a run: higher means more likely wrong.

    One that is not free asks the network itself: its `start` takes the denoiser, as in `start(denoiser=None)`.
    """

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


def begin(detector: Detector, denoiser: Denoiser) -> Watch:
    """Begin to watch a run of this denoiser; a detector that is not free may ask it."""
    # The protocol leaves the argument out, so that a free detector's plain start() is one too.
    return detector.start() if detector.free else detector.start(denoiser)  # pyright: ignore[reportCallIssue]


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


def check_window(window: tuple[float, float]) -> None:
    """Refuse what is no closed range of sigma.

    Raises:
        FanalError: it is not (low, high) with 0 <= low <= high.
    """
    pair = isinstance(window, tuple) and len(window) == 2
    if not pair or not all(isinstance(v, int | float) for v in window) or not 0 <= window[0] <= window[1]:
        raise FanalError(f"a detector's window is (low, high) in sigma with 0 <= low <= high, got {window!r:.60}")


def size(v: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Return `‖v‖/√dim` of each sample, so that figures of different image sizes compare."""
    return v.flatten(1).norm(dim=1) / math.sqrt(v[0].numel())


class Running(ABC):
    """A watch that updates its risk at each step with sigma in a window, and keeps no trajectory.

    Args:
        window: closed range of sigma.
        what: name of the figure, for errors.
        needs: steps that it takes to have one.
    """

    stateless: ClassVar[bool] = False
    """Whether only the prediction counts, so that a step from infinite sigma, where x is no state, does too."""

    def __init__(self, window: tuple[float, float], what: str, needs: int = 1) -> None:
        self.window, self.what, self.needs = window, what, needs
        self.count = 0
        self.steps: list[Tensor] = []

    @abstractmethod
    def update(self, transition: Transition) -> Tensor | None:
        """Take in a step of the window and return the risk (B,) as it stands now; None: it stands as it stood."""

    def see(self, transition: Transition) -> None:
        """Take in one transition; an infinite sigma, where x is no state, is in no window but a stateless watch's."""
        sigma, now = float(transition.span.sigma), None
        if self.window[0] <= sigma <= self.window[1] and (self.stateless or not math.isinf(sigma)):
            self.count += 1
            now = self.update(transition)
        if now is None:
            now = self.steps[-1] if self.steps else transition.x.new_zeros(len(transition.x))
        self.steps.append(now.detach())

    def per_step(self) -> Tensor:
        """Return (N, B), the risk after each transition."""
        # on the CPU, because not every device has float64
        return torch.stack([step.cpu().double() for step in self.steps])

    def risk(self) -> Tensor:
        """Return (B,), the risk.

        Raises:
            FanalError: the window held too few steps.
        """
        if self.count < self.needs:
            raise FanalError(
                f"{self.what} needs {_WORDS[self.needs]} with sigma in {self.window}, saw {self.count}: "
                "widen the window, or take more steps"
            )
        return self.steps[-1].cpu().double()
