"""The ladder: flagged samples go back up no farther than it takes, step by step, and come down by another way.

Malformed parts are decided late, at small sigma, and counts earlier. A sample that returns to just above where its
parts are decided keeps what is in the picture; only what is still wrong afterwards goes higher, where it also forgets
how much there is. So the repair selects little by content, and short runs from small sigma are cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

__all__ = ["Ladder"]


@dataclass(frozen=True)
class Ladder:
    """Re-noise flagged samples to one rung after the other, each from where the last one ended.

    A try is taken as it comes, and leaves the ladder when its risk is at most the threshold and the rung's slack. Tries
    are less often wrong than what was flagged at first, so that the same evidence leaves smaller odds, and a looser
    threshold selects less by content. The way down draws noise (`Ancestral` around the run's solver), which mends more
    than the deterministic one.

    Attributes:
        rungs: sigma and number of steps of each; 0 steps: the nodes of the run's own grid, as detectors want it that
            compare a run with others.
        slack: how much more risk a try may have, rung by rung; the last one holds for all further rungs, () is 0.
        eta: share of fresh noise on the way down, 0 to 1.
        low: smallest sigma of a rung with steps of its own; from there to 0 at once.
    """

    rungs: tuple[tuple[float, int], ...] = ((2.3, 12), (4.4, 14), (8.1, 16))
    slack: tuple[float, ...] = ()
    eta: float = 1.0
    low: float = 0.02

    def __post_init__(self) -> None:
        fits = all(
            is_number(sigma) and sigma > self.low and isinstance(steps, int) and (steps == 0 or steps > 1)
            for sigma, steps in self.rungs
        )
        if not fits or not all(map(is_number, self.slack)) or not 0 <= self.eta <= 1 or not self.low > 0:
            raise FanalError(
                f"a ladder needs rungs (sigma > low, steps > 1 or 0), numbers as slack, eta in [0, 1] and low > 0, got "
                f"{self.rungs!r:.80}, {self.slack!r}, {self.eta!r}, {self.low!r}"
            )

    def grid(self, rung: tuple[float, int], sigmas: Tensor, detector: Detector) -> Tensor:
        """Return the grid of a rung.

        Raises:
            FanalError: the run's own grid has fewer than two nodes there.
        """
        sigma, steps = rung
        if steps:
            return polynomial(steps, self.low, sigma)
        return tail_of(sigmas, sigma, detector)

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
            FanalError: as `trace`.
        """
        best, rows, down = first, (first.risk > threshold).nonzero().flatten(), Ancestral(solver, self.eta)
        for number, rung in enumerate(self.rungs, 1):
            if not len(rows):
                break
            grid = self.grid(rung, sigmas, detector)
            keys = [seeds[b] for b in rows.tolist()]
            fresh = noise(x.shape[1:], keys, float(grid[0]), round=number, stream="ladder", dtype=x.dtype)
            start = best.x[rows.to(x.device)] + fresh.to(x.device)
            again = watch(take(denoiser, rows), start, grid, down, detector, keys, round=number)
            best = merge(best, again, rows, torch.ones(len(rows), dtype=torch.bool))
            slack = self.slack[min(number, len(self.slack)) - 1] if self.slack else 0.0
            rows = rows[again.risk > threshold + slack]
        return best
