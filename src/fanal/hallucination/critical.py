"""Critical steps: when, along a run, the index of [RODS] is large (fig. 7), under each of its readings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fanal import metrics
from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.hallucination.perturbation import READINGS
from fanal.hallucination.rods import Guard
from fanal.metrics import Estimate
from fanal.sampling import Solver, trace
from fanal.schedules import check_sigmas
from fanal.solvers.arithmetic import check_choice
from fanal.solvers.onestep import Euler

__all__ = ["CriticalSteps", "critical_steps", "index_path", "read_as"]


def index_path(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Float[Tensor, " m"],
    *,
    rho: float = 0.1,
    rho_units: str = "shell",
    solver: Solver | None = None,
    seeds: Sequence[int] | None = None,
) -> Float[Tensor, "n b"]:
    """Return the index of each sample at each step of a plain run, v being the residual; float64.

    Args:
        denoiser: D(x, sigma).
        x: the batch at `sigmas[0]`.
        sigmas: decreasing grid.
        rho: radius, in `rho_units`.
        rho_units: "absolute", "sigma" or "shell".
        solver: what takes the steps; None: Euler.
        seeds: one per sample, for solvers that draw noise.

    Raises:
        FanalError: as `Guard` and `trace`.
    """
    guard = Guard(solver or Euler(), rho=rho, rho_units=rho_units, v="residual", threshold=math.inf)
    with torch.no_grad():
        found = [t.step.info.get("rods_index") for t in trace(denoiser, x, sigmas, guard, seeds)]
    nothing = torch.full((len(x),), math.nan, dtype=torch.float64)
    return torch.stack([nothing if row is None else row.cpu().double() for row in found])


def read_as(index: Float[Tensor, "n b"], sigmas: Float[Tensor, " m"], v: str) -> Float[Tensor, "n b"]:
    """Return the index under another reading of v: that of the residual over a power of sigma.

    Args:
        index: as `index_path` gives it.
        sigmas: the grid of the run.
        v: "residual", "direction" or "score".

    Raises:
        FanalError: the reading is none of these.
    """
    check_choice("v of rods", v, tuple(READINGS))
    return index / sigmas[: len(index)].double().cpu()[:, None] ** READINGS[v]


@dataclass(frozen=True, eq=False)
class CriticalSteps:
    """When the index is large.

    Attributes:
        sigmas: (N,), the noise level of each step.
        threshold: what the index had to reach.
        share: share of the samples that reach it, by step.
        batches: (N, M), fig. 7's marks: whether one sample of a batch reaches it; M batches.
        largest: (N,), how many samples have their largest index at each step.
        ever: share of the samples that reach it at some step.
    """

    sigmas: Float[Tensor, " n"]
    threshold: float
    share: tuple[Estimate, ...]
    batches: Bool[Tensor, "n m"]
    largest: Int[Tensor, " n"]
    ever: Estimate

    def between(self, low: float, high: float) -> Estimate:
        """Return the share of samples whose index is largest at a step i with `low <= i/n < high`."""
        steps = torch.arange(len(self.largest)).repeat_interleave(self.largest) / len(self.largest)
        return metrics.rate((steps >= low) & (steps < high))

    def middle(self) -> tuple[int, int, int]:
        """Return the steps between which the middle half of the largest indices lies, and their median: low, mid, high.

        Raises:
            FanalError: no sample has an index.
        """
        total = int(self.largest.sum())
        if not total:
            raise FanalError("no step has an index: run with sigmas above 0")
        summed = self.largest.cumsum(0)
        low, mid, high = (int((summed >= math.ceil(share * total)).nonzero()[0]) for share in (0.25, 0.5, 0.75))
        return low, mid, high


def critical_steps(
    index: Float[Tensor, "n b"],
    sigmas: Float[Tensor, " m"],
    *,
    threshold: float | None = None,
    flag: float = 0.2,
    batch: int = 9,
) -> CriticalSteps:
    """Return which steps are critical: those at which the index reaches a threshold ([RODS] B.3).

    Args:
        index: (N, B), the index by step and sample; NaN counts as below every threshold.
        sigmas: the grid of the run.
        threshold: one for all steps, as in the paper; None: what a share `flag` of the samples reaches at some step.
        flag: that share, above 0 and below 1.
        batch: samples in a batch of fig. 7; what is left of the samples is not used there.

    Raises:
        FanalError: the grid is shorter than the run, the flagged share is out of range, a batch is empty, or there is
            neither an index nor a threshold.
    """
    grid = check_sigmas(sigmas)
    if len(grid) < len(index) or not 0 < flag < 1 or batch < 1:
        raise FanalError(
            f"critical steps need a grid as long as the run, 0 < flag < 1 and a batch of at least one, got {len(grid)} "
            f"nodes for {len(index)} steps, flag {flag} and batch {batch}"
        )
    values = torch.nan_to_num(index.double(), nan=-math.inf)
    known = ~index.isnan().all(0)
    if threshold is None and not bool(known.any()):
        raise FanalError("no step has an index, so no share of the samples reaches one: give a threshold")
    limit = float(torch.quantile(values.amax(0)[known], 1 - flag)) if threshold is None else float(threshold)
    hits = values >= limit
    used = hits[:, : len(hits[0]) // batch * batch]
    largest = torch.bincount(values.argmax(0)[known], minlength=len(index))
    return CriticalSteps(
        grid[: len(index)],
        limit,
        tuple(map(metrics.rate, hits)),
        used.reshape(len(index), -1, batch).any(2),
        largest,
        metrics.rate(hits.any(0)),
    )
