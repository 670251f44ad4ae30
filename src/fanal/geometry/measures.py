"""Everything that is measured of a batch of trajectories, by name."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from fanal.denoiser import slope
from fanal.exact import Dataset
from fanal.geometry import paths, subspace
from fanal.trajectory import Trajectory

__all__ = ["COMPONENTS", "beside", "curves", "numbers"]

COMPONENTS = 5
"""Principal components that are reported; two of them are drawn."""


def curves(run: Trajectory) -> dict[str, Tensor]:
    """Return every curve of a batch by name, (states, B) each; one per state, per step or per turn.

    Names that begin with "denoised" are of the denoising trajectory.

    Args:
        run: from a finite sigma.

    Raises:
        FanalError: the run has fewer than three states, or one is not finite.
    """
    d = run.x[0, 0].numel()
    sigmas = run.sigmas[:-1].reshape(-1, *[1] * (run.x.ndim - 1)).to(run.x)
    found = {
        "magnitude": paths.magnitude(run.x),
        "deviation": paths.deviation(run.x),
        "distance": paths.distance(run.x),
        "angle": paths.angle(run.x, run.denoised),
        "rotation": paths.rotation(run.x),
        "pendulum": paths.pendulum(run.x, run.denoised),
        "slope": slope(run.x[:-1], run.denoised, sigmas).flatten(2).norm(dim=2) / math.sqrt(d),
        "denoised magnitude": paths.magnitude(run.denoised),
        "denoised distance": paths.distance(torch.cat([run.denoised, run.x[-1:]]))[:-1],
        "denoised rotation": paths.rotation(run.denoised),
    }
    moved = (run.denoised[-1] - run.denoised[0]).flatten(1).norm(dim=1) > 0
    if bool(moved.all()):
        found["denoised deviation"] = paths.deviation(run.denoised)
    return found


def numbers(run: Trajectory) -> dict[str, Tensor]:
    """Return what each trajectory is worth as numbers by name, (B,) each.

    Args:
        run: from a finite sigma.

    Raises:
        FanalError: as `curves`, or the run has no more than `COMPONENTS` states.
    """
    projection, d = subspace.project(run.x, COMPONENTS), run.x[0, 0].numel()
    length, chord = paths.length(run.x)[-1], paths.distance(run.x)[0]
    plain = subspace.direct(run.x, 3)
    found = {
        "length / (sigma_max sqrt d)": length / (float(run.sigmas[0]) * math.sqrt(d)),
        "length / chord": length / chord,
        "largest deviation / chord": paths.deviation(run.x).amax(0) / chord,
    }
    found |= {f"explained by {k + 1}": projection.explained[:, : k + 1].sum(1) for k in range(COMPONENTS)}
    found |= {f"direct, top {k + 1}": plain[:, : k + 1].sum(1) for k in range(3)}
    found |= {f"mean error in {k + 1}-D": projection.error[k].mean(0) for k in range(COMPONENTS + 1)}
    return {name: value.cpu().double() for name, value in found.items()}


def beside(exact: Dataset, run: Trajectory, labels: Int[Tensor, " b"] | None = None) -> dict[str, Tensor]:
    """Return what the exact denoiser of the data says at the states of a run, (N, B) each, float64.

    Distance of the model's prediction from the exact one, per √d ([GEO] sec. 6, [REG] app. C.2); entropy of the
    posterior over the data ([REG] fig. 9); log density per dimension, at the state's own sigma.

    Args:
        exact: the denoiser of the data.
        run: of the model.
        labels: class that each trajectory is conditioned on; what the denoiser says is then over its points.

    Raises:
        FanalError: the data have another shape, or a class has no points.
    """
    d, rows = run.x[0, 0].numel(), {"score deviation": [], "entropy": [], "log density": []}
    for x, denoised, sigma in zip(run.x[:-1], run.denoised, run.sigmas[:-1], strict=True):
        best = exact.posterior(x, sigma, labels)
        rows["score deviation"].append((denoised - best.denoised).flatten(1).norm(dim=1) / math.sqrt(d))
        rows["entropy"].append(best.entropy)
        rows["log density"].append(best.log_density / d)
    return {name: torch.stack([value.cpu().double() for value in values]) for name, values in rows.items()}
