"""Forms of guidance towards a target's condition, each from the same two scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError, unknown_name
from fanal.guidance import Classifier, ClassifierFree, Inverse, Reward, Window
from fanal.supports.perturbation import Blurred, Perturbed
from fanal.supports.targets import Target

__all__ = ["FORMS", "WINDOW", "Scores", "exact", "guided"]

WINDOW: Window = (0.1, 5.0)
"""The interval of sigma of the form "interval", in units of the target's size."""

_BLUR = 0.3  # of the weak model of autoguidance, in units of the target's size


@dataclass(frozen=True, eq=False)
class Scores:
    """The two denoisers that guidance is made of.

    Attributes:
        told: of p(·|c).
        free: of p.
    """

    told: Denoiser
    free: Denoiser


def exact(goal: Target, delta: float = 0.0, seed: int = 0) -> Scores:
    """Return a target's exact scores, or scores that are wrong by the share `delta`, independently of each other."""
    if delta == 0:
        return Scores(goal.part, goal.whole)
    return Scores(Perturbed(goal.part, delta, 2 * seed), Perturbed(goal.whole, delta, 2 * seed + 1))


def _free(goal: Target, scores: Scores, scale: float, window: Window | None) -> Denoiser:
    return ClassifierFree(scores.told, scores.free, scale, window)


def _interval(goal: Target, scores: Scores, scale: float, window: Window | None) -> Denoiser:
    if window is not None:
        raise FanalError("the form interval has a window of its own: give another one to classifier-free")
    low, high = (edge * goal.size for edge in WINDOW)
    return ClassifierFree(scores.told, scores.free, scale, (low, high))


def _classifier(goal: Target, scores: Scores, scale: float, window: Window | None) -> Denoiser:
    part, whole = goal.part, goal.whole

    def log_probability(x: Tensor, sigma: Tensor) -> Tensor:
        return part.log_density(x, sigma) - whole.log_density(x, sigma)  # log p(c | x), up to log p(c)

    return Classifier(scores.free, log_probability, scale, window)


def _auto(goal: Target, scores: Scores, scale: float, window: Window | None) -> Denoiser:
    return ClassifierFree(scores.told, Blurred(scores.told, _BLUR * goal.size), scale, window)


def _negative(goal: Target, scores: Scores, scale: float, window: Window | None) -> Denoiser:
    return ClassifierFree(scores.free, scores.told, 1 + scale, window)  # from D_c through D_u; D_u outside the window


def _reward(goal: Target, scores: Scores, scale: float, window: Window | None) -> Denoiser:
    return Reward(scores.free, lambda x: (x * goal.way.to(x)).flatten(1).sum(1), scale, window)


def _inverse(goal: Target, scores: Scores, scale: float, window: Window | None) -> Denoiser:
    if not scale > -1:
        raise FanalError(f"inverse guidance needs a scale above -1, it sets the measurement's noise, got {scale}")
    measured = goal.way.new_tensor([goal.level])
    operator: Callable[[Tensor], Tensor] = lambda x: (x * goal.way.to(x)).flatten(1).sum(1, keepdim=True)  # noqa: E731
    return Inverse(scores.free, operator, measured, goal.size / (1 + scale), iterations=2, window=window)


FORMS: Mapping[str, Callable[[Target, Scores, float, Window | None], Denoiser]] = {
    "classifier-free": _free,
    "interval": _interval,
    "classifier": _classifier,
    "autoguidance": _auto,
    "negative": _negative,
    "reward": _reward,
    "inverse": _inverse,
}
"""Name → what makes the guided denoiser of a target, its scores, a scale w and a window of sigma.

`classifier-free` `D_u + w·(D_c − D_u)`; `interval` the same in `WINDOW`, D_c outside; `classifier` adds
`w·sigma²·∇log p(c|x)` of the exact classifier to D_u; `autoguidance` leads from a blurred version of D_c; `negative`
leads away from the condition, `D_u − w·(D_c − D_u)`; `reward` adds the gradient of w times the coordinate along the
target's way; `inverse` is the posterior given that coordinate, measured with noise `size/(1 + w)`. Outside
a window D_c acts in the forms that lead to it, D_u in `negative` and in those that add to it."""


def guided(form: str, goal: Target, scores: Scores, scale: float, window: Window | None = None) -> Denoiser:
    """Return the guided denoiser.

    Args:
        form: a key of `FORMS`.
        goal: the target.
        scores: its two denoisers.
        scale: w.
        window: closed range of sigma in which it acts; None: everywhere, and in its own of the form "interval".

    Raises:
        FanalError: the form is unknown, or the scale or the window does not fit it.
    """
    if form not in FORMS:
        raise unknown_name("form of guidance", form, FORMS)
    return FORMS[form](goal, scores, scale, window)
