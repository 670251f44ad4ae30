"""When a run settles on a training point: its Voronoi cell, its posterior, and where it leaves the exact flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact import Dataset
from fanal.trajectory import Trajectory

__all__ = ["COLLAPSED", "Settling", "settling"]

COLLAPSED = 0.05
"""Share of log N below which the entropy of the posterior counts as collapsed."""


@dataclass(frozen=True, eq=False)
class Settling:
    """Noise levels at which runs settle; NaN where they never do.

    Attributes:
        cell: (B,), sigma from which on the state stays in the Voronoi cell of the training point that it ends in.
        collapse: (B,), sigma from which on the entropy of the posterior over the training set stays collapsed.
        leave: (B,), largest sigma at which the prediction is farther from the exact one than `tolerance`.
        gap: (N, B), distance of the prediction from the exact one, per √d, at each state.
        entropy: (N, B), of the posterior, in nats.
    """

    cell: Float[Tensor, " b"]
    collapse: Float[Tensor, " b"]
    leave: Float[Tensor, " b"]
    gap: Float[Tensor, "n b"]
    entropy: Float[Tensor, "n b"]


def _stays(inside: Tensor, levels: Tensor) -> Tensor:
    """The largest level from which on a mask (N, B) holds to the end."""
    held = inside.flip(0).cumprod(0).flip(0).bool()
    first = torch.where(held, levels[:, None], -math.inf).amax(0)
    return first.masked_fill(~held[-1], math.nan)


def settling(
    exact: Dataset, run: Trajectory, tolerance: float = 0.05, labels: Int[Tensor, " b"] | None = None
) -> Settling:
    """Return when each run of a model settles, judged by the exact denoiser of its training set.

    The cell is that of [PDE] sec. 4.5: which training point a state is nearest to. `leave` is where the model begins
    to err from the exact flow, without which it could only return training points.

    Args:
        exact: of the training set.
        run: of the model.
        tolerance: distance of the prediction from the exact one, per √d, that counts as having left.
        labels: class that each run is conditioned on; the exact prediction and the posterior are over its points, the
            cells are those of all points.

    Raises:
        FanalError: the shapes differ, or the tolerance is not positive.
    """
    if not tolerance > 0:
        raise FanalError(f"tolerance must be positive, got {tolerance}")
    levels, d = run.sigmas[:-1].double(), run.x[0, 0].numel()
    final = exact.nearest(run.x[-1])[1][:, 0]
    rows: dict[str, list[Tensor]] = {"cell": [], "gap": [], "entropy": []}
    for x, denoised, sigma in zip(run.x[:-1], run.denoised, run.sigmas[:-1], strict=True):
        rows["cell"].append(exact.nearest(x)[1][:, 0] == final)
        best = exact.posterior(x, sigma, labels)
        rows["gap"].append((denoised - best.denoised).flatten(1).cpu().double().norm(dim=1) / math.sqrt(d))
        rows["entropy"].append(best.entropy.cpu().double())
    cell, gap, entropy = (torch.stack(values).cpu() for values in rows.values())
    away = gap > tolerance
    leave = torch.where(away, levels[:, None], -math.inf).amax(0).masked_fill(~away.any(0), math.nan)
    low = entropy < COLLAPSED * math.log(max(len(exact), 2))
    return Settling(_stays(cell, levels), _stays(low, levels), leave, gap, entropy)
