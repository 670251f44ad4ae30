"""When a run settles on a training point: its Voronoi cell, its posterior, and where it leaves the exact flow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact import Dataset
from fanal.geometry.stages import stays
from fanal.memorization.copies import proportion
from fanal.trajectory import Trajectory

__all__ = ["COLLAPSED", "ENDS", "TOLERANCE", "Settling", "settling", "typical"]

COLLAPSED = 0.05
"""Share of log N below which the entropy of the posterior counts as collapsed."""

TOLERANCE = 0.1
"""Distance of a prediction from the exact one, per √d, that counts as having left: 5 % of the range of images."""

ENDS = ("cell", "collapse", "leave", "apart")
"""Fields of `Settling` that are noise levels, one per run."""


@dataclass(frozen=True, eq=False)
class Settling:
    """Noise levels at which runs settle; NaN where they never do.

    Attributes:
        cell: (B,), sigma from which on the state stays in the Voronoi cell of the training point that it ends in.
        collapse: (B,), sigma from which on the entropy of the posterior over the training set stays collapsed.
        leave: (B,), largest sigma at which the prediction is farther from the exact one than `tolerance`.
        apart: (B,), sigma from which on it stays so to the end: what the run makes is new. NaN for copies, whose
            predictions come back to the exact ones.
        gap: (N, B), distance of the prediction from the exact one, per √d, at each state.
        entropy: (N, B), of the posterior, in nats.
    """

    cell: Float[Tensor, " b"]
    collapse: Float[Tensor, " b"]
    leave: Float[Tensor, " b"]
    apart: Float[Tensor, " b"]
    gap: Float[Tensor, "n b"]
    entropy: Float[Tensor, "n b"]


def settling(
    exact: Dataset, run: Trajectory, tolerance: float = TOLERANCE, labels: Int[Tensor, " b"] | None = None
) -> Settling:
    """Return when each run of a model settles, judged by the exact denoiser of its training set.

    The cell is that of [PDE] sec. 4.5: which training point a state is nearest to. A model that never left the exact
    flow could only return training points. Networks leave it at the largest sigma, by an error that most of them
    correct later; from `apart` on the error decides the sample.

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
    own = None if labels is None or exact.counts is None else exact.counts[labels].cpu()
    alike = math.log(max(len(exact), 2)) if own is None else own.clamp_min(2).double().log()
    low = entropy < COLLAPSED * alike
    return Settling(stays(cell, levels), stays(low, levels), leave, stays(away, levels), gap, entropy)


def typical(levels: Float[Tensor, " b"]) -> dict[str, Any]:
    """Return how many of a random part of all runs settle, and where half of those have, each with its 95 % interval.

    The share's interval is that of Clopper & Pearson (1934), the median's lies between two order statistics (Conover
    1999, sec. 3.2); its ends are None where there are too few runs for one.

    Args:
        levels: of the runs, as in `Settling`; NaN: it does not settle.

    Returns:
        `median sigma`, `median low`, `median high`, `share`, `share low`, `share high`; plain JSON.
    """
    known = levels[~levels.isnan()].double()
    low, high = proportion(len(known), len(levels))
    middle = [None] * 3
    if len(known):
        interval = stats.quantile_test(known.numpy(), p=0.5).confidence_interval(0.95)
        found = (float(known.median()), float(interval.low), float(interval.high))
        middle = [value if math.isfinite(value) else None for value in found]
    names = ("median sigma", "median low", "median high")
    share = {"share": len(known) / len(levels), "share low": low, "share high": high}
    return dict(zip(names, middle, strict=True)) | share
