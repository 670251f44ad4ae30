"""The ladder: flagged samples go back up no farther than it takes, step by step, and come down by another way.

Malformed parts are decided late, at small sigma, and counts earlier. A sample that returns to just above where its
parts are decided keeps what is in the picture; only what is still wrong afterwards goes higher, where it also forgets
how much there is. So the repair selects little by content, and short runs from small sigma are cheap.

It works best with a judge of finished samples, such as the linear probe (`fanal.hallucination.probe`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fanal.denoiser import Denoiser, take
from fanal.errors import FanalError, is_number
from fanal.hallucination.detectors import Detector
from fanal.hallucination.repair import Outcome, merge, tail_of, watch
from fanal.sampling import Solver
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers.stochastic import Ancestral

__all__ = ["Judge", "Ladder"]


@runtime_checkable
class Judge(Detector, Protocol):
    """A detector of finished samples, whatever way they came, that knows the risks of its calibration samples."""

    def threshold(self, flag: float) -> float:
        """Return the risk that a share `flag` of the calibration samples exceeds."""
        ...


@dataclass(frozen=True)
class Ladder:
    """Re-noise flagged samples to one rung after the other, each from where the last one ended.

    A try is taken as it comes, and leaves the ladder when its risk is small enough. Tries are less often wrong than
    what was flagged at first, so that the same evidence leaves smaller odds, and a looser threshold selects less by
    content. The way down draws noise (`Ancestral` around the run's solver), which mends more than the deterministic
    one.

    Where the run's detector is no `Judge`, its risks depend on the way. Rungs then lead over the nodes of the run's own
    grid, whatever their steps, and the threshold holds for tries too.

    Attributes:
        rungs: sigma and number of steps of each.
        accept: rung by rung, share of first passes above the risk that a try may have; the last one holds for all
            further rungs, () is the threshold.
        eta: share of fresh noise on the way down, 0 to 1.
        low: smallest sigma of a rung; from there to 0 at once.
        flag: share of first passes that a judge flags, where nothing else is asked for.
    """

    rungs: tuple[tuple[float, int], ...] = ((2.3, 12), (4.4, 14), (8.1, 16))
    accept: tuple[float, ...] = (0.25, 0.15)
    eta: float = 0.5
    low: float = 0.02
    flag: float = 0.35

    def __post_init__(self) -> None:
        numbers = (self.eta, self.low, self.flag)
        fits = all(map(is_number, numbers)) and 0 <= self.eta <= 1 and self.low > 0 and 0 < self.flag < 1
        fits = fits and all(isinstance(value, tuple) for value in (self.rungs, self.accept))
        if not fits or not all(map(self._is_rung, self.rungs)) or not all(map(_is_share, self.accept)):
            raise FanalError(
                f"a ladder needs rungs (sigma > low, steps > 1), shares between 0 and 1 as accept and flag, eta in "
                f"[0, 1] and low > 0, got {self.rungs!r:.80}, {self.accept!r:.60}, {self.flag!r}, {self.eta!r}, "
                f"{self.low!r}"
            )

    def _is_rung(self, rung: Any) -> bool:
        if not isinstance(rung, tuple) or len(rung) != 2:
            return False
        sigma, steps = rung
        return is_number(sigma) and sigma > self.low and isinstance(steps, int) and steps > 1

    def within(self, rest: float, asks: int) -> Ladder:
        """Return the ladder with as many rungs as `rest` evaluations per sample pay for.

        Each rung is reckoned to leave half of what came to it; fewer were left in every measurement. Which samples
        share a batch plays no part.

        Args:
            rest: evaluations that a sample may cost on average.
            asks: how often the judge asks the network about each try.
        """
        taken, cost, share = [], 0.0, self.flag
        for sigma, steps in self.rungs:
            cost, share = cost + share * (steps + asks), share / 2
            if cost > rest:
                break
            taken.append((sigma, steps))
        return dataclasses.replace(self, rungs=tuple(taken))

    def _limit(self, number: int, detector: Detector, threshold: float) -> float:
        """The risk that a try of a rung may have: no less than what a first pass may."""
        if not self.accept or not isinstance(detector, Judge):
            return threshold
        return max(threshold, detector.threshold(self.accept[min(number, len(self.accept)) - 1]))

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
        """Send the samples whose risk exceeds the threshold up the ladder.

        Raises:
            FanalError: the run's own grid is to be taken and has fewer than two nodes at a rung, or as `trace`.
        """
        best, rows, down = first, (first.risk > threshold).nonzero().flatten(), Ancestral(solver, self.eta)
        for number, (sigma, steps) in enumerate(self.rungs, 1):
            if not len(rows):
                break
            own = isinstance(detector, Judge)
            grid = polynomial(steps, self.low, sigma) if own else tail_of(sigmas, sigma, detector)
            keys = [seeds[b] for b in rows.tolist()]
            fresh = noise(x.shape[1:], keys, float(grid[0]), round=number, stream="ladder", dtype=x.dtype)
            start = best.x[rows.to(x.device)] + fresh.to(x.device)
            again = watch(take(denoiser, rows), start, grid, down, detector, keys, round=number)
            best = merge(best, again, rows, torch.ones(len(rows), dtype=torch.bool))
            rows = rows[again.risk > self._limit(number, detector, threshold)]
        return best


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value < 1
