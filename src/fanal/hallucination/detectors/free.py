"""Detectors that read what the run computes anyway."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fanal.denoiser import Denoiser, slope
from fanal.errors import FanalError, is_number
from fanal.hallucination.detectors.watching import Running, Watch, check_window, size
from fanal.sampling import Transition

__all__ = [
    "Contrast",
    "EarlyStop",
    "Gray",
    "LastSlope",
    "PathLength",
    "SecondDifference",
    "SlopeChange",
    "Undecided",
    "Variance",
]


def _slope(transition: Transition) -> Tensor:
    """The noise prediction d where the step asked for it."""
    x, sigma = transition.step.at or (transition.x, transition.span.sigma)
    return slope(x, transition.step.denoised, sigma)


@dataclass(frozen=True)
class _Windowed:
    """Base of the detectors that look at a range of sigma."""

    window: tuple[float, float]
    free: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_window(self.window)


@dataclass(frozen=True)
class _Final:
    """Base of the detectors that look at the last step, wherever it is."""

    free: bool = field(default=True, init=False)
    window: tuple[float, float] = field(default=(0.0, 0.0), init=False)


class _VarianceWatch(Running):
    center: Tensor | None = None
    squares: Tensor | None = None

    def update(self, transition: Transition) -> Tensor:
        denoised = transition.step.denoised
        if self.center is None or self.squares is None:
            self.center, self.squares = torch.zeros_like(denoised), torch.zeros_like(denoised)
        off = denoised - self.center  # Welford's update: no trajectory is kept
        self.center = self.center + off / self.count
        self.squares = self.squares + off * (denoised - self.center)
        return self.squares.flatten(1).mean(1) / self.count


@dataclass(frozen=True)
class Variance(_Windowed):
    """Variance of the denoised prediction over the last part of a run (Aithal et al. 2024), free.

    `mean_j Var_i(D_j(x_i, sigma_i))` over the steps i with sigma in `window` and the entries j of a sample: a
    prediction that keeps wavering after the others have settled has met a region between modes.

    Attributes:
        window: closed range of sigma that counts; in sigma, so that a run that starts half-way is judged alike.
    """

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _VarianceWatch(self.window, "trajectory variance", 2)


class _PathWatch(Running):
    last: Tensor | None = None

    def update(self, transition: Transition) -> Tensor | None:
        before, self.last = self.last, transition.step.denoised
        return None if before is None else self.steps[-1] + size(self.last - before)


@dataclass(frozen=True)
class PathLength(_Windowed):
    """Length of the denoising trajectory over the last part of a run, free.

    `Σ_i ‖D_{i+1} − D_i‖/√dim` over the neighboring steps with sigma in `window`.

    Attributes:
        window: closed range of sigma that both ends of a piece must lie in.
    """

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _PathWatch(self.window, "path length", 2)


class _BendWatch(Running):
    last: Tensor | None = None
    moved: Tensor | None = None

    def update(self, transition: Transition) -> Tensor | None:
        denoised, result = transition.step.denoised, None
        moved = None if self.last is None else denoised - self.last
        if moved is not None and self.moved is not None:
            result = torch.maximum(self.steps[-1], size(moved - self.moved))
        self.last, self.moved = denoised, moved
        return result


@dataclass(frozen=True)
class SecondDifference(_Windowed):
    """Largest second difference of the denoising trajectory, free.

    `max_i ‖D_{i+1} − 2·D_i + D_{i−1}‖/√dim` over the triples of steps with sigma in `window`: the sharpest turn.

    Attributes:
        window: closed range of sigma that all three steps must lie in.
    """

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _BendWatch(self.window, "the second difference", 3)


class _ChangeWatch(Running):
    last: Tensor | None = None

    def update(self, transition: Transition) -> Tensor | None:
        before, self.last = self.last, _slope(transition)
        return None if before is None else torch.maximum(self.steps[-1], size(self.last - before))


@dataclass(frozen=True)
class SlopeChange(_Windowed):
    """Largest disagreement of Euler's and Heun's step, free.

    `max_i ‖d_{i+1} − d_i‖/√dim`, d the noise prediction, over the neighboring steps with sigma in `window`. From
    the same point Heun's step differs from Euler's by `h/2·(d_{i+1} − d_i)`.

    Attributes:
        window: closed range of sigma that both steps must lie in.
    """

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _ChangeWatch(self.window, "the change of the slope", 2)


class _EarlyWatch(Running):
    first: Tensor | None = None

    def update(self, transition: Transition) -> Tensor | None:
        if self.first is None:
            self.first = transition.step.denoised
            return None
        return size(transition.step.denoised - self.first)


@dataclass(frozen=True)
class EarlyStop(_Windowed):
    """Distance of an early denoised prediction from the last one, free.

    `‖D_last − D_first‖/√dim`, first and last among the steps with sigma in `window`. On a grid that ends at 0 the last
    prediction is the sample, so with `window = (0, high)` this is what stopping at `high` would have changed.

    Attributes:
        window: closed range of sigma; its upper end says where the run would have stopped.
    """

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _EarlyWatch(self.window, "early stopping", 2)


class _UndecidedWatch(Running):
    def __init__(self, window: tuple[float, float], power: float) -> None:
        super().__init__(window, "the share undecided")
        self.power = power

    def update(self, transition: Transition) -> Tensor:
        denoised = transition.step.denoised.flatten(1)
        open_ = (1 - denoised.square()).clamp(min=0).mean(1)
        # an even picture holds nothing that could be decided: the smallest number keeps the quotient finite
        held = denoised.var(1, correction=0).clamp(min=torch.finfo(denoised.dtype).eps)
        figure = open_ / held**self.power
        return figure if self.count == 1 else self.steps[-1] + (figure - self.steps[-1]) / self.count


@dataclass(frozen=True)
class Undecided(_Windowed):
    """How much of the picture is still open, for what it holds; before the decision is made, free.

    The mean over the steps with sigma in `window` of `mean_j max(0, 1 − D_j²) / Var_j(D_j)^power`. Where values are −1
    or 1, `1 − D_j²` is their posterior variance given x. Beside it stands the contrast of the prediction: at power 0
    full pictures look wrong, at power 1 empty ones do. For pictures in [−1, 1] that are mostly black and white.

    Attributes:
        window: closed range of sigma that counts.
        power: of the contrast.
    """

    power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.power):
            raise FanalError(f"the power of the contrast must be a number, got {self.power!r}")

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _UndecidedWatch(self.window, self.power)


class _SlopeWatch(Running):
    def update(self, transition: Transition) -> Tensor:
        return size(_slope(transition))


@dataclass(frozen=True)
class LastSlope(_Final):
    """Size of the noise prediction at the last step, `‖d‖/√dim` at the smallest sigma, free.

    `d = −sigma·score`: small inside a mode, whose score is small, and large off the support, where the score still
    pulls towards it. It shines in few dimensions and says little about images.
    """

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _SlopeWatch((0.0, math.inf), "the last slope")


class _GrayWatch(Running):
    stateless = True

    def update(self, transition: Transition) -> Tensor:
        return (1 - transition.step.denoised.abs()).clamp(min=0).flatten(1).mean(1)


@dataclass(frozen=True)
class Gray(_Final):
    """How undecided the values of the last prediction are, `mean_j max(0, 1 − |D_j|)`, free.

    For pictures in [−1, 1] that are black and white but for their edges; elsewhere it means nothing.
    """

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _GrayWatch((0.0, math.inf), "the share of gray")


class _ContrastWatch(Running):
    stateless = True

    def update(self, transition: Transition) -> Tensor:
        return transition.step.denoised.flatten(1).var(1, correction=0)


@dataclass(frozen=True)
class Contrast(_Final):
    """How much the last prediction holds, `Var_j(D_j)` over the entries of a sample, free.

    Most risks grow with what a picture holds, so that full pictures look wrong. Beside them in a `Combined` this takes
    it out, unless wrong samples hold less than right ones: then it is a risk itself, upside down.
    """

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run."""
        return _ContrastWatch((0.0, math.inf), "contrast")
