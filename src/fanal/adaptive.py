"""A second loop: the steps are chosen so that each one's error stays below a tolerance.

for transition in trace_adaptive(denoiser, x, [80.0, 0.002], rtol=1e-5):   # the same Transition as `trace` yields
    ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError, is_number, unknown_name
from fanal.sampling import Span, Step, Transition, Watched, check_finite, depart, finish
from fanal.schedules import check_sigmas
from fanal.solvers.coefficients import tensor_of

__all__ = ["PAIRS", "Pair", "sample_adaptive", "trace_adaptive"]

_MOST = 20_000  # attempts per interval before a run is given up


@dataclass(frozen=True)
class Pair:
    """An embedded Runge–Kutta pair whose last stage is the first one of the next step.

    Attributes:
        nodes: where the stages are, as shares of the step.
        stages: the weights of earlier slopes that lead to each stage; the last row leads to the end of the step.
        error: the weights of the slopes in the difference between the two methods.
        order: of the method that goes on; the error is that of the other, one lower.
    """

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    order: int


PAIRS: dict[str, Pair] = {
    "bs32": Pair(
        nodes=(1 / 2, 3 / 4, 1.0),
        stages=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
        order=3,
    ),
    "dopri5": Pair(
        nodes=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        stages=(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        error=(
            35 / 384 - 5179 / 57600,
            0.0,
            500 / 1113 - 7571 / 16695,
            125 / 192 - 393 / 640,
            -2187 / 6784 + 92097 / 339200,
            11 / 84 - 187 / 2100,
            -1 / 40,
        ),
        order=5,
    ),
}
"""Name → pair: Bogacki & Shampine 1989 (three calls a step) and Dormand & Prince 1980 (six)."""


@dataclass(frozen=True, eq=False)
class _Problem:
    """The equation in the time that is stepped through, and what a step's error is measured by."""

    denoiser: Denoiser
    log: bool
    rtol: float
    atol: float

    def time(self, sigma: float) -> float:
        return math.log(sigma) if self.log else sigma

    def sigma(self, time: float) -> float:
        return math.exp(time) if self.log else time

    def slope(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        return x - denoised if self.log else (x - denoised) / sigma

    def size(self, error: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        """Root mean square of each sample's error in units of the tolerance, (B,)."""
        scale = self.atol + self.rtol * torch.maximum(x.abs(), x_next.abs())
        return (error / scale).flatten(1).square().mean(1).sqrt()


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A step that was tried: where it led, D and the slope there, and its error by sample."""

    x: Tensor
    denoised: Tensor
    slope: Tensor
    error: Tensor


def _total(slopes: Sequence[Tensor], weights: Sequence[float], length: float) -> Tensor:
    terms = [(k, w * length) for k, w in zip(slopes, weights, strict=True) if w]
    total = terms[0][0] * terms[0][1]
    for slope, weight in terms[1:]:
        total = torch.add(total, slope, alpha=weight)
    return total


def _attempt(problem: _Problem, pair: Pair, x: Tensor, first: Tensor, start: float, end: float) -> _Attempt:
    """Step from one time to another, the slope at the start given."""
    here, there = problem.time(start), problem.time(end)
    slopes, y, denoised = [first], x, first
    for node, row in zip(pair.nodes, pair.stages, strict=True):
        sigma = end if node == 1 else problem.sigma(here + node * (there - here))
        y = x + _total(slopes, row, there - here)
        denoised = problem.denoiser(y, tensor_of(sigma))
        slopes.append(problem.slope(y, denoised, sigma))
    error = problem.size(_total(slopes, pair.error, there - here), x, y)
    return _Attempt(y, denoised, slopes[-1], error)


def _first_length(problem: _Problem, x: Tensor, slope: Tensor) -> float:
    """A hundredth of the time in which x changes by itself (Hairer, Nørsett & Wanner 1993, sec. II.4)."""
    if not len(x):
        return math.inf
    size, rate = float(problem.size(x, x, x).max()), float(problem.size(slope, x, x).max())
    return 0.01 * size / rate if rate > 0 else math.inf


def _between(
    problem: _Problem, pair: Pair, x: Tensor, denoised: Tensor | None, ends: tuple[float, float], length: float
) -> Iterator[tuple[float, float, Tensor, Tensor, _Attempt, float]]:
    """Cross one interval in steps: each with its ends, x and D at its start, what was found, and the next length."""
    start, end = ends
    if denoised is None:
        denoised = problem.denoiser(x, tensor_of(start))
    slope = problem.slope(x, denoised, start)
    length = length or _first_length(problem, x, slope)
    direction, failed = math.copysign(1.0, end - start), False
    found: _Attempt | None = None
    for _ in range(_MOST):
        left = abs(problem.time(end) - problem.time(start))
        whole = length >= left * (1 - 1e-9)
        target = end if whole else problem.sigma(problem.time(start) + direction * length)
        if target == start:
            break
        found = _attempt(problem, pair, x, slope, start, target)
        worst = float(found.error.max()) if len(x) else 0.0
        factor = 0.2 if not math.isfinite(worst) else min(5.0, max(0.2, 0.9 * max(worst, 1e-12) ** (-1 / pair.order)))
        taken = min(length, left)
        if worst <= 1:
            # A step cut short by the end of the interval says little about a longer one.
            grown = taken * (min(factor, 1.0) if failed else factor)
            length, failed = (max(length, grown) if whole else grown), False
            yield start, target, x, denoised, found, length
            if whole:
                return
            start, x, denoised, slope = target, found.x, found.denoised, found.slope
        else:
            length, failed = taken * min(factor, 0.9), True
    if found is not None:
        check_finite(found.x, Span(0, 1, tensor_of(start), tensor_of(end)), None)
    raise FanalError(
        f"gave up at sigma {start:.6g} after {_MOST} steps with rtol={problem.rtol:g}, atol={problem.atol:g}: the "
        "network's rounding or its kinks are larger than that; give a larger tolerance"
    )


def trace_adaptive(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Float[Tensor, " n"] | Sequence[float],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    pair: str = "dopri5",
    log: bool = True,
) -> Iterator[Transition]:
    """Solve `dx/dsigma = (x − D)/sigma` with error control, and yield every step that was accepted.

    A step is accepted when the error estimate of each sample, the root mean square of `e/(atol + rtol·|x|)` over its
    entries, is at most 1. All samples of a batch take the same steps, those of the hardest one, so a sample's last
    digits depend on its company. `Span.n` is the number of steps so far: how many there will be is not known.
    `Step.info["error"]` has the estimates (B,).

    Args:
        denoiser: D(x, sigma).
        x: the batch at `sigmas[0]`; unit noise where that is infinite.
        sigmas: the noise levels that are reached exactly, at least the two ends; strictly monotone. An interval into
            0 is one step, to the denoised prediction, and so is one from infinity (`fanal.sampling.depart`).
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in the data's units.
        pair: "dopri5" (order 5, six calls a step) or "bs32" (order 3, three).
        log: step through log sigma; False: through sigma.

    Raises:
        FanalError: sigmas is no schedule, goes into 0 at once, a tolerance is none, or cannot be met.
        NonFiniteError: x becomes NaN or infinite.
    """
    if pair not in PAIRS:
        raise unknown_name("pair", pair, PAIRS)
    if not (is_number(rtol) and is_number(atol) and rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise FanalError(f"tolerances must be numbers >= 0, not both 0, got rtol={rtol!r} and atol={atol!r}")
    grid = check_sigmas(sigmas).detach()
    if len(grid) == 2 and (float(grid[1]) == 0 or math.isinf(float(grid[0]))):
        raise FanalError("give a noise level between the ends, where the last step begins, such as [80, 0.002, 0]")
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        raise FanalError("x must be a floating-point batch of shape (B, *shape)")
    least = 10 * torch.finfo(x.dtype).eps
    if rtol < least and atol < least:
        raise FanalError(
            f"rtol={rtol:g} and atol={atol:g} are below the rounding of {x.dtype}: use float64, or a larger tolerance"
        )
    problem = _Problem(Watched(denoiser), log, rtol, atol)
    i, length = 0, 0.0
    denoised: Tensor | None = None
    for ends in pairwise(grid.tolist()):
        if ends[1] == 0 or math.isinf(ends[0]):
            span = Span(i, i + 1, tensor_of(ends[0]), tensor_of(ends[1]))
            if ends[1] == 0 and denoised is not None:
                step = Step(denoised, denoised)  # it was asked there already
            else:
                step = (depart if math.isinf(ends[0]) else finish)(problem.denoiser, x, span)
            check_finite(step.x_next, span, None)
            yield Transition(span, x, step)
            x, i, denoised = step.x_next, i + 1, None
            continue
        for start, end, before, answer, found, grown in _between(problem, PAIRS[pair], x, denoised, ends, length):
            span = Span(i, i + 1, tensor_of(start), tensor_of(end))
            check_finite(found.x, span, None)
            yield Transition(span, before, Step(found.x, answer, info={"error": found.error}))
            x, i, denoised, length = found.x, i + 1, found.denoised, grown


def sample_adaptive(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Float[Tensor, " n"] | Sequence[float],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    pair: str = "dopri5",
    log: bool = True,
) -> Float[Tensor, "b *d"]:
    """Run `trace_adaptive` to its end without gradients and return the last x.

    Raises:
        FanalError: as `trace_adaptive`.
    """
    with torch.no_grad():
        for transition in trace_adaptive(denoiser, x, sigmas, rtol=rtol, atol=atol, pair=pair, log=log):
            x = transition.step.x_next
    return x
