"""Repairs: rerun flagged samples, by chaining segments of the one sampling loop.

first = watch(denoiser, x, sigmas, solver, detector, seeds)
flagged = first.risk > threshold
mended = Redo().repair(denoiser, x, sigmas, solver, detector, seeds, first, threshold)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fanal.denoiser import Counted, Denoiser, Model, Temperature, counters, evaluations, take
from fanal.errors import FanalError, is_number
from fanal.hallucination.detectors import Detector, begin
from fanal.sampling import Solver, trace
from fanal.schedules import check_sigmas
from fanal.seeding import noise
from fanal.trajectory import Trajectory

__all__ = [
    "Fresh",
    "Outcome",
    "Redo",
    "Renoise",
    "Repair",
    "merge",
    "rounds_of",
    "watch",
    "watch_seeds",
    "tail_of",
]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Where a batch ended, and what the detector made of it.

    Attributes:
        x: (B, *shape), the samples.
        risk: (B,) float64.
        evaluations: (B,) network evaluations spent on each sample so far, counted at the network.
        per_step: (N, B), the risk as it stood after each step of the first pass.
        rounds: (B,) how often a sample was redone.
        trajectory: the recorded first pass, where it was asked for.
    """

    x: Float[Tensor, "b *d"]
    risk: Float[Tensor, " b"]
    evaluations: Float[Tensor, " b"]
    per_step: Float[Tensor, "n b"]
    rounds: Int[Tensor, " b"]
    trajectory: Trajectory | None = None


def watch(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    detector: Detector,
    seeds: Sequence[int],
    *,
    round: int = 0,
    record: bool = False,
) -> Outcome:
    """Sample without gradients while a detector watches.

    Args:
        denoiser: D(x, sigma).
        x: the batch at `sigmas[0]`.
        sigmas: decreasing grid.
        solver: how an interval is crossed.
        detector: what gives the risk.
        seeds: one per sample.
        round: index of the repair round, which keys the solver's noise.
        record: keep the trajectory.

    Raises:
        FanalError: as `trace`.
    """
    net = denoiser if counters(denoiser) else Counted(denoiser)
    before, eye, kept, end = evaluations(net), begin(detector, net), [], x
    with torch.no_grad():
        for transition in trace(net, x, sigmas, solver, seeds, round=round):
            eye.see(transition)
            end = transition.step.x_next
            if record:
                kept.append(transition)
        risk, per_step = eye.risk().cpu(), eye.per_step().cpu()  # before the count: some detectors ask at the end
    spent = torch.full((len(x),), (evaluations(net) - before) / len(x), dtype=torch.float64)
    none = torch.zeros(len(x), dtype=torch.int64)
    return Outcome(end, risk, spent, per_step, none, Trajectory.record(kept) if record else None)


def watch_seeds(
    model: Model,
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    detector: Detector,
    seeds: range,
    *,
    block: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Iterator[Outcome]:
    """Watch samples from fresh noise, block by block, and yield what became of each block.

    Args:
        model: the denoiser, with its shape.
        sigmas: decreasing grid.
        solver: how an interval is crossed.
        detector: what gives the risk.
        seeds: one per sample.
        block: samples run at a time.
        device: where the model is.
        progress: wraps the loop over blocks.

    Raises:
        FanalError: as `trace`.
    """
    for start in progress(range(0, len(seeds), block)):
        some = seeds[start : start + block]
        x = noise(model.shape, some, float(sigmas[0]), device=device)
        own = take(model, torch.arange(start, start + len(some)))
        yield watch(own, x, sigmas, solver, detector, some)


@runtime_checkable
class Repair(Protocol):
    """What is done with the samples whose risk exceeds the threshold."""

    def repair(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        solver: Solver,
        detector: Detector,
        seeds: Sequence[int],
        first: Outcome,
        threshold: float,
    ) -> Outcome:
        """Return the batch with its flagged samples redone; all others keep every bit."""
        ...


def merge(base: Outcome, part: Outcome, rows: Tensor, take: Bool[Tensor, " r"]) -> Outcome:
    """Put the taken rows of `part`, a rerun of `base[rows]`, into a copy of `base`; every rerun is paid for."""
    x, risk, spent, rounds = base.x.clone(), base.risk.clone(), base.evaluations.clone(), base.rounds.clone()
    spent[rows] += part.evaluations
    rounds[rows] += 1
    x[rows[take].to(x.device)] = part.x[take.to(x.device)]
    risk[rows[take]] = part.risk[take]
    return Outcome(x, risk, spent, base.per_step, rounds, base.trajectory)


def rounds_of(
    first: Outcome,
    threshold: float,
    rounds: int,
    seeds: Sequence[int],
    again: Callable[[Tensor, Tensor, list[int], int], Outcome],
) -> Outcome:
    """Try flagged samples again, `again(x, rows, seeds, round)`, and keep the try with the lowest risk."""
    best = first
    for number in range(1, rounds + 1):
        rows = (best.risk > threshold).nonzero().flatten()
        if not len(rows):
            break
        part = again(best.x[rows.to(best.x.device)], rows, [seeds[b] for b in rows.tolist()], number)
        best = merge(best, part, rows, part.risk < best.risk[rows])
    return best


@dataclass(frozen=True)
class Redo:
    """Run the flagged samples again from the same noise at a lower temperature; the rest keeps every bit.

    The residual is scaled by `1 + kappa` inside the window (`fanal.Temperature`): the same picture, steered away
    from the blur between modes. It mends broken and half-made parts; a whole part that is one too many mostly stays.

    Attributes:
        kappa: strength.
        window: closed range of sigma in which it acts; the default suits data in [−1, 1].
    """

    kappa: float = 6 / 32
    window: tuple[float, float] = (0.8, 25.0)

    def __post_init__(self) -> None:
        pair = isinstance(self.window, tuple) and len(self.window) == 2 and all(map(is_number, self.window))
        if not is_number(self.kappa) or not pair or not 0 <= self.window[0] <= self.window[1]:
            raise FanalError(f"redo needs a number kappa and 0 <= low <= high, got {self.kappa!r} and {self.window!r}")

    def repair(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        solver: Solver,
        detector: Detector,
        seeds: Sequence[int],
        first: Outcome,
        threshold: float,
    ) -> Outcome:
        """Redo the samples whose risk exceeds the threshold, once.

        Raises:
            FanalError: as `trace`.
        """
        rows = (first.risk > threshold).nonzero().flatten()
        if not len(rows):
            return first
        cool = Temperature(take(denoiser, rows), self.kappa, self.window)
        keys = [seeds[b] for b in rows.tolist()]
        again = watch(cool, x[rows.to(x.device)], sigmas, solver, detector, keys)
        return merge(first, again, rows, torch.ones(len(rows), dtype=torch.bool))


def tail_of(sigmas: Float[Tensor, " n"], sigma: float, detector: Detector) -> Float[Tensor, " m"]:
    """Return the end of a grid that a rerun crosses: from `sigma` down, and all that the detector looks at.

    Args:
        sigmas: decreasing grid.
        sigma: where the rerun returns to: the first node at or below.
        detector: what judges the rerun.

    Raises:
        FanalError: the grid has fewer than two nodes there.
    """
    grid = check_sigmas(sigmas)
    tail = grid[grid <= max(sigma, detector.window[1])]
    if len(tail) < 2:
        raise FanalError(f"the grid has no two nodes at or below sigma = {sigma}, where re-noising returns to")
    return tail


@dataclass(frozen=True)
class Renoise:
    """Return flagged samples to a middle sigma with fresh noise and run down again, for a few rounds.

    A sample leaves the loop when its risk is under the threshold; one that never gets there keeps the try with the
    lowest risk. It mends counts as well as parts, and gives another picture than the one that was flagged.

    Attributes:
        sigma: where it returns to: the first grid node at or below; the default suits data in [−1, 1].
        rounds: how often at most.
    """

    sigma: float = 4.0
    rounds: int = 4

    def __post_init__(self) -> None:
        whole = isinstance(self.rounds, int) and 1 <= self.rounds < 4096
        if not whole or not is_number(self.sigma) or not self.sigma > 0:
            raise FanalError(f"re-noising needs rounds in [1, 4095] and sigma > 0, got {self.rounds!r}, {self.sigma!r}")

    def repair(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        solver: Solver,
        detector: Detector,
        seeds: Sequence[int],
        first: Outcome,
        threshold: float,
    ) -> Outcome:
        """Re-noise the samples whose risk exceeds the threshold until it does not, or the rounds are used up.

        Raises:
            FanalError: the grid has fewer than two nodes at or below `sigma`, or as `trace`.
        """
        tail = tail_of(sigmas, self.sigma, detector)

        def again(here: Tensor, rows: Tensor, keys: list[int], number: int) -> Outcome:
            fresh = noise(x.shape[1:], keys, float(tail[0]), round=number, stream="renoise", dtype=x.dtype)
            return watch(take(denoiser, rows), here + fresh.to(x.device), tail, solver, detector, keys, round=number)

        return rounds_of(first, threshold, self.rounds, seeds, again)


@dataclass(frozen=True)
class Fresh:
    """Throw flagged samples away and draw others from fresh noise at the largest sigma: reject and resample.

    A sample leaves the loop when its risk is under the threshold; one that never gets there keeps the try with the
    lowest risk. The plainest of all repairs, at the price of a whole run per round; what the risk dislikes and is
    right gets rarer.

    Attributes:
        rounds: how often at most.
    """

    rounds: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.rounds, int) or not 1 <= self.rounds < 4096:
            raise FanalError(f"resampling needs rounds in [1, 4095], got {self.rounds!r}")

    def repair(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        solver: Solver,
        detector: Detector,
        seeds: Sequence[int],
        first: Outcome,
        threshold: float,
    ) -> Outcome:
        """Resample the samples whose risk exceeds the threshold until it does not, or the rounds are used up.

        Raises:
            FanalError: as `trace`.
        """

        def again(_: Tensor, rows: Tensor, keys: list[int], number: int) -> Outcome:
            fresh = noise(x.shape[1:], keys, float(sigmas[0]), round=number, stream="fresh", dtype=x.dtype)
            return watch(take(denoiser, rows), fresh.to(x.device), sigmas, solver, detector, keys, round=number)

        return rounds_of(first, threshold, self.rounds, seeds, again)
