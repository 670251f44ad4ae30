"""How soon states and predictions come to look like the data: Fréchet distances along a run ([REG] fig. 8)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.denoiser import Latent, network_of
from fanal.exact import Dataset
from fanal.exact.reference import labels_of
from fanal.metrics.distances import fid
from fanal.metrics.features import Extractor, OwnFeatures, Pixels, is_image
from fanal.preparation import Setup
from fanal.runs import Block
from fanal.summary import as_json
from fanal.trajectory import Trajectory

__all__ = ["Arrival", "arrival_of"]

_LEVELS = 12
_MOST = 2000  # trajectories: twelve levels of two paths of them are 12 MB of features
_WIDEST = 64  # coordinates of points that are taken as their own features
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Arrival:
    """What a run's states and predictions are compared with.

    Attributes:
        extract: turns samples into features.
        exact: of the data.
        rows: which of its points: all, or those of the run's one class.
        count: trajectories that are compared, the first ones.
        steps: at which steps.
    """

    extract: Extractor
    exact: Dataset
    rows: Int[Tensor, " n"]
    count: int
    steps: Int[Tensor, " m"]

    def real(self, part: range) -> Float[Tensor, "n f"]:
        """Return the features of some of the rows' points."""
        few = self.rows[part.start : part.stop].split(_BATCH)
        points = (self.exact.points.block(some, torch.float32).reshape(-1, *self.exact.shape) for some in few)
        return torch.cat([self.extract(x) for x in points])

    def real_block(self, part: range) -> Block:
        """Return `real` as a block of a run, `features.data`; no call of the model is spent on it."""
        begin = time.perf_counter()
        notes = {"count": 0, "calls": 0, "evaluations": 0}
        return {"features.data": self.real(part)}, notes | {"seconds": time.perf_counter() - begin}

    def features(self, run: Trajectory, rows: range) -> dict[str, Tensor]:
        """Return the features of a block's trajectories by what they are of, (B, M, F); none of later ones."""
        own = max(0, min(len(rows), self.count - rows.start))
        if not own:
            return {}
        paths = {"x": run.x, "denoised": run.denoised}
        some = {name: path[self.steps, :own].cpu().transpose(0, 1) for name, path in paths.items()}
        return {f"features.{name}": self.extract(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for name, x in some.items()}

    def results(self, found: Mapping[str, Tensor], sigmas: Tensor) -> dict[str, Any]:
        """Return the distances of states and predictions from the data, level by level, as JSON.

        Args:
            found: features of all blocks by name: of trajectories (B, M, F), and of the data (n, F).
            sigmas: the run's grid.
        """
        out: dict[str, Any] = {
            "features": self.extract.name,
            "n": self.count,
            "n_real": len(self.rows),
            "sigmas": sigmas[self.steps].tolist(),
        }
        for name, key in (("states", "features.x"), ("predictions", "features.denoised")):
            out[name] = [as_json(fid(features, found["features.data"])) for features in found[key].unbind(1)]
        return out


def arrival_of(setup: Setup, exact: Dataset) -> Arrival | None:
    """Return what a run is compared with; None where no features fit, or too few samples for their covariance.

    Images become the features of `fanal.metrics.OwnFeatures`, points of up to 64 coordinates are their own.

    Args:
        setup: the run.
        exact: of the data.
    """
    shape, config = tuple(exact.shape), setup.config
    if isinstance(network_of(setup.network), Latent) or (not is_image(shape) and math.prod(shape) > _WIDEST):
        return None
    extract = OwnFeatures(config.device) if is_image(shape) else Pixels()
    rows, label = torch.arange(len(exact)), _label(setup, exact)
    if label is not None and exact.points.labels is not None:
        rows = rows[exact.points.labels == label]
    if not len(rows):  # the exact denoiser says so
        return None
    count = min(config.count, _MOST)
    intervals = len(setup.sigmas) - 1
    steps = torch.linspace(0, intervals - 1, min(intervals, _LEVELS)).round().long()
    found = Arrival(extract, exact, rows, count, steps)
    return None if min(count, len(rows)) <= found.real(range(1)).shape[1] else found


def _label(setup: Setup, exact: Dataset) -> int | None:
    """The one class that all trajectories belong to; None: they have several, or none."""
    if setup.config.label in (None, "each"):
        return None
    labels = labels_of(exact, setup.bound(range(1)), 1)
    return None if labels is None else int(labels[0])
