"""Everything that is measured of a batch of trajectories, by name, each thing once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import slope
from fanal.geometry import paths, stages, subspace
from fanal.geometry.subspace import Projection
from fanal.trajectory import Trajectory

__all__ = ["COMPONENTS", "Measured", "measure", "speed"]

COMPONENTS = 5
"""Principal components that are reported; two of them are drawn."""

_NEAR = 0.1  # of the first prediction's distance from the end: near it


_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Measured:
    """What `measure` found of B trajectories.

    Attributes:
        curves: by name, (states, B) each; one value per state, per step or per turn. Names that begin with "denoised"
            are of the denoising trajectory, with "z" of the states in variance-preserving space.
        numbers: by name, (B,) each, float64 on the CPU; NaN where a trajectory has no such number.
        coordinates: (B, N+1, 1 + COMPONENTS), see `fanal.geometry.subspace.Projection`.
    """

    curves: dict[str, Tensor]
    numbers: dict[str, Tensor]
    coordinates: Float[Tensor, "b n k"]


def _shape(path: Tensor, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor], Projection]:
    """Curves and numbers that any path has, and its projection."""
    projection = subspace.project(path, COMPONENTS)
    curves = {
        "magnitude": paths.magnitude(path),
        "deviation": projection.error[0],
        "distance": paths.distance(path),
    }
    chord = curves["distance"][0]
    numbers = {
        "length / chord": paths.length(path)[-1] / chord,
        "largest deviation / chord": curves["deviation"].amax(0) / chord,
        "steps nearer to the end": _falling(curves["distance"]),
    }
    numbers |= {f"explained by {k + 1}": projection.explained[:, : k + 1].sum(1) for k in range(COMPONENTS)}
    named = [{f"{prefix}{name}": value for name, value in part.items()} for part in (curves, numbers)]
    return named[0], named[1], projection


def _falling(distance: Tensor) -> Tensor:
    """Share of steps at which a distance (N, B) does not rise, but for float32's rounding."""
    return (distance.diff(dim=0) <= _ROUNDING * distance[0]).to(distance.dtype).mean(0)


def _preserving(run: Trajectory) -> tuple[Tensor, Tensor]:
    """The states `z = x/sqrt(1 + sigma²)`, and `‖dz/dθ‖/√d` with `tan θ = sigma`.

    With `z = cos θ·x0 + sin θ·noise` the derivative is `cos θ·noise − sin θ·x0`, what v-prediction predicts (Salimans
    & Ho 2022, arXiv 2202.00512).
    """
    level = run.sigmas.reshape(-1, *[1] * (run.x.ndim - 1)).to(run.x)
    scale = (1 + level**2).rsqrt()
    velocity = scale[:-1] * (slope(run.x[:-1], run.denoised, level[:-1]) - level[:-1] * run.denoised)
    return scale * run.x, velocity.flatten(2).norm(dim=2) / math.sqrt(run.x[0, 0].numel())


def _predictions(run: Trajectory, distance: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Curves and numbers of the denoising trajectory, and when both trajectories are near their common end."""
    own = paths.distance(torch.cat([run.denoised, run.x[-1:]]))[:-1]
    curves = {
        "denoised magnitude": paths.magnitude(run.denoised),
        "denoised distance": own,
        "denoised rotation": paths.rotation(run.denoised),
    }
    chord = (run.denoised[-1] - run.denoised[0]).flatten(1).to(own.dtype).norm(dim=1)
    moved = chord > 0
    bent = own.new_full(own.shape, torch.nan)
    if bool(moved.any()):
        bent[:, moved] = paths.deviation(run.denoised[:, moved])
    if bool(moved.all()):
        curves["denoised deviation"] = bent
    near, levels = _NEAR * own[0], run.sigmas[:-1]
    numbers = {
        "denoised largest deviation / chord": bent.amax(0) / chord,
        "predictions nearer to the end": _falling(own),
        "predictions near the end from sigma": stages.stays((own <= near).cpu(), levels),
        "states near the end from sigma": stages.stays((distance[:-1] <= near).cpu(), levels),
        "prediction nearer to the end than the state": (own < distance[:-1]).to(own.dtype).mean(0),
    }
    return curves, numbers


def speed(run: Trajectory) -> Float[Tensor, "n b"]:
    """Return `‖dx/dsigma‖/√d` at all states but the last: 1 where all noise is seen as noise ([REG] prop. 2, fig. 12).

    Args:
        run: from a finite sigma.
    """
    sigmas = run.sigmas[:-1].reshape(-1, *[1] * (run.x.ndim - 1)).to(run.x)
    found = slope(run.x[:-1], run.denoised, sigmas).flatten(2).norm(dim=2) / math.sqrt(run.x[0, 0].numel())
    return found.cpu().double()


def measure(run: Trajectory) -> Measured:
    """Return every curve and every number of a batch of trajectories.

    Args:
        run: from a finite sigma.

    Raises:
        FanalError: the run has no more than `COMPONENTS` states, or one is not finite.
    """
    d = run.x[0, 0].numel()
    curves, numbers, projection = _shape(run.x)
    chord, plain = curves["distance"][0], subspace.direct(run.x, 3)
    curves |= {f"error in {k + 1}-D": projection.error[k] for k in range(COMPONENTS + 1)}
    curves |= {
        "angle": paths.angle(run.x, run.denoised),
        "rotation": paths.rotation(run.x),
        "pendulum": paths.pendulum(run.x, run.denoised),
        "slope": speed(run),
    }
    length = numbers["length / chord"] * chord
    numbers = {"length / (sigma_max sqrt d)": length / (float(run.sigmas[0]) * math.sqrt(d)), **numbers}
    numbers |= {f"direct, top {k + 1}": plain[:, : k + 1].sum(1) for k in range(3)}
    numbers |= {f"mean error in {k + 1}-D": projection.error[k].mean(0) for k in range(COMPONENTS + 1)}
    numbers["least cosine"] = curves["angle"].amin(0)
    z, velocity = _preserving(run)
    for more in (_predictions(run, curves["distance"]), _shape(z, "z ")[:2]):
        curves, numbers = curves | more[0], numbers | more[1]
    curves["z slope"] = velocity
    return Measured(curves, {name: value.cpu().double() for name, value in numbers.items()}, projection.coordinates)
