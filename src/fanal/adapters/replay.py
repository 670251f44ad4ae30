"""Solvers asked from outside: the caller owns the loop and the network, the solver says where it wants to be answered.

A diffusers pipeline calls its network itself and hands each output to a scheduler; a fanal solver calls the denoiser.
A solver's `step` is pure, so the two meet without threads. The interval is replayed with a denoiser that gives the
answers received so far and breaks off at the first one that is missing: there the network is wanted.

    run = Replay(solver, sigmas, x, seeds)
    while run.point is not None:
        run.tell(denoiser(*run.point))
    run.x                                  # what fanal.sample returns, bit for bit
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fanal.errors import FanalError
from fanal.sampling import Solver, Span, Step, Transition, depart
from fanal.schedules import check_sigmas
from fanal.seeding import check_seeds, noise

__all__ = ["Plan", "Replay", "plan", "plan_from"]

_ENDLESS = 64  # calls in one interval


class _Wanted(BaseException):
    """Breaks off a step at the first answer that is missing; no solver's `except Exception` holds it up."""

    def __init__(self, x: Tensor, sigma: Tensor) -> None:
        super().__init__()
        self.point = (x, sigma)


class _Answers:
    """A denoiser that knows the answers received so far."""

    def __init__(self, start: Tensor, known: list[tuple[Tensor, Tensor]]) -> None:
        self.start, self.known, self.asked = start, known, 0

    @property
    def differentiable(self) -> bool:
        """Whether the caller keeps a graph."""
        return any(one.requires_grad for one in (self.start, *(answer for _, answer in self.known)))

    def _traced(self, x: Tensor) -> bool:
        """Whether a gradient was asked for in x that does not come from the caller."""
        return x.requires_grad and not self.differentiable

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        if self._traced(x) or unpack_dual(x).tangent is not None or unpack_dual(sigma).tangent is not None:
            raise FanalError(
                "this solver differentiates through the network, but a program that calls the network itself hands on "
                "its outputs only: run it with fanal.sample, or take a solver without gradients (rods: "
                "product=difference, which calls instead, or method=sas)"
            )
        if x.shape != self.start.shape or sigma.ndim:
            raise FanalError(
                f"this solver asks for {tuple(x.shape)} at sigma of shape {tuple(sigma.shape)}, but a program that "
                f"calls the network itself answers for its whole batch {tuple(self.start.shape)} at one sigma: run "
                "this solver with fanal.sample"
            )
        if self.asked == len(self.known):
            raise _Wanted(x, sigma)
        at, answer = self.known[self.asked]
        if float(at) != float(sigma):
            _unsteady(f"asked again, it moves from sigma {float(at):.6g} to {float(sigma):.6g}")
        self.asked += 1
        return answer


def _unsteady(what: str) -> NoReturn:
    raise FanalError(
        f"the points at which this solver asks depend on the answers ({what}), but a program that calls the network "
        "itself needs them beforehand: run it with fanal.sample, or take a solver with fixed steps"
    )


def _probe(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of standard normal data, for runs that only count."""
    return x * 0 if torch.isinf(sigma) else x / (1 + sigma**2)


@dataclass(frozen=True, eq=False)
class Plan:
    """At which sigmas a solver asks.

    Attributes:
        first: index of the interval that it starts from.
        start: the sigma there.
        calls: for each interval from the first on, the sigmas of its calls (0-d float64).
        straight: whether the first call lies at the start itself; with churn it does not.
    """

    first: int
    start: Tensor
    calls: list[list[Tensor]]
    straight: bool

    @property
    def levels(self) -> Float[Tensor, " k"]:
        """The sigmas at which the network is called, in order; where no call lies at the start, one is put there."""
        flat = [sigma for call in self.calls for sigma in call]
        return torch.stack(flat if self.straight else [self.start, *flat])

    @property
    def order(self) -> int:
        """Calls in each interval but the last, where that is one number; else 1."""
        counts = {len(call) for call in self.calls[:-1]}
        return counts.pop() if len(counts) == 1 else 1


def plan(solver: Solver, sigmas: Float[Tensor, " n"], first: int = 0) -> Plan:
    """Find at which sigmas a solver asks, by a run on standard normal data of eight dimensions; no network is called.

    Args:
        solver: how an interval is crossed.
        sigmas: the grid.
        first: index of the interval to start from.

    Raises:
        FanalError: the grid is no schedule, or the solver asks at 0, for rows of the batch, or without end.
    """
    grid = check_sigmas(sigmas)[first:]
    x = noise((8,), [0], float(grid[0]), dtype=torch.float64)
    run = Replay(solver, grid, x, [0])
    calls: list[list[Tensor]] = [[] for _ in grid[1:]]
    straight = run.point is not None and float(run.point[1]) == float(grid[0]) and torch.equal(run.point[0], x)
    while run.point is not None:
        at, sigma = run.point
        if not sigma > 0:
            raise FanalError(f"this solver asks at sigma = {float(sigma):.6g}, where no network has an answer")
        calls[run.interval].append(sigma)
        if len(calls[run.interval]) > _ENDLESS:
            _unsteady(f"more than {_ENDLESS} calls in one interval")
        run.tell(_probe(at, sigma))
    return Plan(first, grid[0], calls, straight)


def plan_from(solver: Solver, sigmas: Float[Tensor, " n"], levels: Float[Tensor, " k"]) -> Plan:
    """Find the plan of a later start whose calls lie at these sigmas: a run of its own, over the rest of the grid.

    Raises:
        FanalError: no interval starts there.
    """
    for first in range(1, len(sigmas) - 1):
        found = plan(solver, sigmas, first)
        for one in (found, dataclasses.replace(found, straight=False)):  # a first call at the start may be left unused
            if len(one.levels) == len(levels) and torch.allclose(one.levels, levels.double(), rtol=1e-6, atol=0):
                return one
    raise FanalError(
        "the run cannot begin here: the solver starts no interval at this time, or makes other calls than in a run "
        "from the start of the grid; try another strength or solver"
    )


class Replay:
    """One run over a grid by question and answer; equal to `fanal.sample` bit for bit.

    Attributes:
        point: `(x, sigma)` where the denoiser is wanted next; None at the end.
        x: the state at the start of the present interval; at the end, the sample.
        interval: index of the present interval.
        finished: the intervals that the last answer completed.

    Args:
        solver: how an interval is crossed.
        sigmas: the grid.
        x: the batch at `sigmas[0]`; unit noise where that is infinite.
        seeds: one per sample, for solvers that draw noise.
        calls: what `plan` found; a solver that leaves it is refused.
        round: index of a repair round, which keys the solver's noise.

    Raises:
        FanalError: the grid is no schedule, seeds do not match the batch, or the solver cannot be run like this.
    """

    def __init__(
        self,
        solver: Solver,
        sigmas: Float[Tensor, " n"],
        x: Float[Tensor, "b *d"],
        seeds: Iterable[int] | None = None,
        calls: list[list[Tensor]] | None = None,
        round: int = 0,
    ) -> None:
        self.solver, self.x, self.interval, self.calls = solver, x, 0, calls
        grid = check_sigmas(sigmas)
        keys = None if seeds is None else check_seeds(seeds, len(x))
        ends = list(pairwise(grid.unbind()))
        self._spans = [Span(i, len(ends), sigma, sigma_next, keys, round) for i, (sigma, sigma_next) in enumerate(ends)]
        self._answers: list[tuple[Tensor, Tensor]] = []
        self._memory: tuple[Tensor, ...] = ()
        self.point: tuple[Tensor, Tensor] | None = None
        self.finished = self._advance()

    def shift(self, difference: Tensor) -> None:
        """Move the start of the present interval, before its first answer: the caller changed x in between."""
        if not self._answers:
            self.x = self.x + difference
            self._advance()

    def tell(self, denoised: Float[Tensor, "b *d"]) -> None:
        """Take the denoised prediction at `point`, and go on to the next question.

        Raises:
            FanalError: there was no question, or the solver asks at other points than planned.
        """
        if self.point is None:
            raise FanalError("this run has ended: there is nothing to answer")
        self._answers.append((self.point[1], denoised))
        self.finished = self._advance()

    def _advance(self) -> list[Transition]:
        """Replay up to the next question; intervals that need no further answer are done with."""
        done: list[Transition] = []
        while self.interval < len(self._spans):
            span = self._spans[self.interval]
            step = self._attempt(span)
            if step is None:
                return done
            done.append(Transition(span, self.x, step))
            self.x, self._memory, self._answers = step.x_next, step.memory, []
            self.interval += 1
        self.point = None
        return done

    def _attempt(self, span: Span) -> Step | None:
        denoiser = _Answers(self.x, self._answers)
        # Some solvers ask once more where a graph is kept: one that nobody began is not.
        graph = torch.is_grad_enabled() and denoiser.differentiable
        try:
            with torch.set_grad_enabled(graph):
                if torch.isinf(span.sigma):
                    step = depart(denoiser, self.x, span)
                else:
                    step = self.solver.step(denoiser, self.x, span, self._memory)
        except _Wanted as wanted:
            self.point = wanted.point
            self._check(len(self._answers), wanted.point[1])
            return None
        self._check(len(self._answers), None)
        return step

    def _check(self, count: int, sigma: Tensor | None) -> None:
        """Refuse a call that was not planned, and the lack of one that was."""
        if self.calls is None:
            return
        planned = self.calls[self.interval]
        if (sigma is None) != (count == len(planned)):
            _unsteady(f"{len(planned)} calls were foreseen in interval {self.interval}")
        if sigma is not None and abs(float(sigma) - float(planned[count])) > 1e-9 * float(sigma):
            _unsteady(f"sigma {float(planned[count]):.6g} was foreseen, it asks at {float(sigma):.6g}")
