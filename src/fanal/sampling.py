"""The one sampling loop: a Solver moves x along a grid of sigmas, and every transition is yielded.

for transition in trace(denoiser, x, sigmas, solver):   # pure steps: two traces never disturb each other
    ...                                                 # record, measure, show, stop early
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser, Model
from fanal.errors import FanalError, NonFiniteError
from fanal.schedules import check_sigmas
from fanal.seeding import check_seeds, noise

__all__ = [
    "Solver",
    "Span",
    "Step",
    "Transition",
    "Watched",
    "check_finite",
    "depart",
    "finish",
    "sample",
    "toward",
    "trace",
]


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """One interval of the grid, and the seeds of the samples that cross it.

    Attributes:
        i: index of the interval, from 0.
        n: number of intervals.
        sigma: noise level at its start; 0-d float64 on the CPU; infinite at the start of some grids.
        sigma_next: noise level at its end; 0-d float64 on the CPU; 0 at the end of most grids.
        seeds: one seed per sample, for solvers that draw noise; None otherwise.
        round: index of the repair round that this interval belongs to (0 for a plain run).
    """

    i: int
    n: int
    sigma: Tensor
    sigma_next: Tensor
    seeds: tuple[int, ...] | None = None
    round: int = 0

    def noise(self, x: Tensor, stream: str) -> Tensor:
        """Standard normal noise like `x`, a pure function of (sample seed, step, round, stream).

        Raises:
            FanalError: the run was started without seeds.
        """
        if self.seeds is None:
            raise FanalError("this solver draws noise and needs seeds: pass seeds=range(len(x)) to trace or sample")
        return noise(
            x.shape[1:],
            self.seeds,
            step=self.i,
            round=self.round,
            stream=stream,
            dtype=x.dtype,
            device=x.device,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a solver returns for one interval.

    Attributes:
        x_next: the state at `sigma_next`.
        denoised: the raw `D(x, sigma)` at the start of the interval; geometry and detectors read it.
        at: `(x, sigma)` where `denoised` was evaluated, by solvers that leave the start of the interval first
            (churn); None: the start.
        memory: what a multistep solver wants back at the next step; axis 0 of each tensor is the batch.
        info: further tensors worth recording, by name.
    """

    x_next: Tensor
    denoised: Tensor
    memory: tuple[Tensor, ...] = ()
    info: Mapping[str, Tensor] = field(default_factory=dict)
    at: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Transition:
    """A finished interval: where it was, what x was at its start, and the step that was taken."""

    span: Span
    x: Tensor
    step: Step


@runtime_checkable
class Solver(Protocol):
    """A frozen object with one pure method: the same arguments always give the same step."""

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...]) -> Step:
        """Cross `span` from `x`; `memory` is what this solver returned at the previous step, () at the first."""
        ...


def toward(x: Tensor, denoised: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """Return the Euler step `(sigma'/sigma)·x + (1 − sigma'/sigma)·denoised` ([REG] eq. 17).

    The convex combination is exact at sigma' = 0 and does not amplify rounding at small sigma. Of two Python floats it
    is one fused operation.
    """
    ratio = sigma_next / sigma
    return torch.lerp(denoised, x, ratio) if isinstance(ratio, float) else ratio * x + (1 - ratio) * denoised


def finish(denoiser: Denoiser, x: Tensor, span: Span) -> Step:
    """Cross the last interval into sigma = 0, where every method ends at the denoised prediction."""
    denoised = denoiser(x, span.sigma)
    return Step(denoised, denoised)


def depart(denoiser: Denoiser, z: Tensor, span: Span) -> Step:
    """Cross the first interval from infinite sigma, where flow matching and zero-terminal-SNR models start.

    x = z/s does not exist there, so the state is the unit noise z, and a denoiser that knows infinity takes z in place
    of x. As sigma → ∞ the Euler step `(sigma'/sigma)·x + (1 − sigma'/sigma)·D` with x = sigma·z tends to
    `x' = D(z, ∞) + sigma'·z`: exact for Euler, one call.
    """
    denoised = denoiser(z, span.sigma)
    return Step(denoised + span.sigma_next * z, denoised)


class Watched:
    """Checks shape and dtype of every answer of the denoiser, so that broadcasting cannot hide a mistake."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the denoiser's answer.

        Raises:
            FanalError: it has another shape or dtype than x.
        """
        denoised = self.denoiser(x, sigma)
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise FanalError(f"the denoiser must return the shape of x: got {got} for x of shape {tuple(x.shape)}")
        if denoised.dtype != x.dtype:
            raise FanalError(f"the denoiser must return the dtype of x: got {denoised.dtype} for {x.dtype}")
        return denoised


def check_finite(x: Tensor, span: Span, seeds: tuple[int, ...] | None) -> None:
    """Refuse states that are not finite.

    Raises:
        NonFiniteError: NaN or infinity; the message names step, sigma and samples.
    """
    finite = torch.isfinite(x).flatten(1).all(1)
    if finite.all():
        return
    bad = (~finite).nonzero().flatten().tolist()
    which = f"seeds {[seeds[b] for b in bad[:5]]}" if seeds else f"samples {bad[:5]}"
    raise NonFiniteError(
        f"not finite after step {span.i} of {span.n} (sigma {float(span.sigma):.6g} to {float(span.sigma_next):.6g}), "
        f"{len(bad)} of {len(x)} samples, {which}: check the network's output at this sigma, or try more steps"
    )


def _check_parts(denoiser: Denoiser, x: Tensor, solver: Solver) -> None:
    """Refuse what is easily mistaken: a solver's name or class for a solver, samples of another shape."""
    if isinstance(solver, type) or not isinstance(solver, Solver):
        got = f"the class {solver.__name__}: call it" if isinstance(solver, type) else repr(solver)[:60]
        raise FanalError(f"solver must be an object with a step method, such as fanal.solvers.Euler(), got {got}")
    if isinstance(denoiser, Model) and tuple(denoiser.shape) != tuple(x.shape[1:]):
        raise FanalError(f"the model's samples have shape {tuple(denoiser.shape)}, x has {tuple(x.shape[1:])}")


def trace(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    seeds: Iterable[int] | None = None,
    *,
    round: int = 0,
) -> Iterator[Transition]:
    """Cross the grid interval by interval and yield every transition: `dx/dsigma = (x − D(x, sigma))/sigma`.

    The gradient mode is the caller's; nothing is drawn from a global random state; the loop stops where the
    caller stops iterating.

    Args:
        denoiser: D(x, sigma).
        x: the batch at `sigmas[0]`, e.g. `noise(shape, seeds, sigma=80.0)`; unit noise where `sigmas[0]` is infinite.
        sigmas: strictly monotone grid; decreasing to sample, increasing (from a positive value) to encode.
        solver: how an interval is crossed.
        seeds: one per sample; needed by solvers that draw noise.
        round: index of a repair round, which keys the noise of its steps.

    Raises:
        FanalError: the grid is not a schedule, x is not a floating batch, seeds do not match it, or the denoiser
            returns another shape or dtype.
        NonFiniteError: x becomes NaN or infinite; the message names step, sigma and seeds.
    """
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FanalError(f"x must be a floating-point batch of shape (B, *shape), got {got}")
    _check_parts(denoiser, x, solver)
    keys = None if seeds is None else check_seeds(seeds, len(x))
    grid = check_sigmas(sigmas)
    watched = Watched(denoiser)
    memory: tuple[Tensor, ...] = ()
    for i, (sigma, sigma_next) in enumerate(pairwise(grid.unbind())):
        span = Span(i, len(grid) - 1, sigma, sigma_next, keys, round)
        # Here alone infinity is known: no solver has a formula for it.
        step = depart(watched, x, span) if torch.isinf(sigma) else solver.step(watched, x, span, memory)
        check_finite(step.x_next, span, keys)
        yield Transition(span, x, step)
        x, memory = step.x_next, step.memory


def sample(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    seeds: Iterable[int] | None = None,
) -> Float[Tensor, "b *d"]:
    """Run `trace` to its end without gradients and return the last x.

    Raises:
        FanalError: as `trace`.
    """
    with torch.no_grad():
        for transition in trace(denoiser, x, sigmas, solver, seeds):
            x = transition.step.x_next
    return x
