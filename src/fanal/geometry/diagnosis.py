"""Where a model's score leaves that of its training data: four trajectories from one noise ([GEO] 6, [REG] C.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from fanal.denoiser import Denoiser, Labelled
from fanal.errors import FanalError
from fanal.exact import Dataset
from fanal.exact.dataset import Posterior
from fanal.geometry.measures import speed
from fanal.sampling import Solver, trace
from fanal.trajectory import Trajectory

__all__ = ["NEIGHBORS", "Diagnosis", "Outlier", "diagnose", "outliers"]

NEIGHBORS = 5
"""Training points that are told around each end."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What the exact denoiser of the data does beside a run, from the same noise.

    Attributes:
        exact: `{x*}`, its own trajectory, and `{D*(x*)}`.
        learned: (N, B, *shape), `{D(x*)}`, the model's predictions on it.
        optimal: what the data say at the run's states: `{D*(x)}`, log density and entropy.
        index: (B, 2, K), nearest training points of the run's end and of the exact one's.
        curves: by name, (N, B) each, float64 on the CPU, see `docs`.
        numbers: by name, (B,) each.
    """

    exact: Trajectory
    learned: Float[Tensor, "n b *d"]
    optimal: Sequence[Posterior]
    index: Int[Tensor, "b 2 k"]
    curves: dict[str, Tensor]
    numbers: dict[str, Tensor]


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Distance of states (N, B, *shape) from others, per √d, (N, B) float64 on the CPU."""
    off = (a - b).flatten(2).cpu().double()
    return off.norm(dim=2) / math.sqrt(off.shape[2])


def _ends(data: Dataset, end: Tensor, exact_end: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Nearest training points of both ends, and how near they are."""
    count, side = min(NEIGHBORS, len(data)), math.sqrt(end[0].numel())
    found = [data.nearest(x, count) for x in (end, exact_end)]
    index = torch.stack([near[1].cpu() for near in found], 1)
    numbers = {
        "end to nearest point / sqrt d": found[0][0][:, 0].cpu().double() / side,
        "exact end to nearest point / sqrt d": found[1][0][:, 0].cpu().double() / side,
        "ends apart / sqrt d": _apart(end[None], exact_end[None])[0],
        "both ends have one nearest point": (index[:, 0, 0] == index[:, 1, 0]).double(),
    }
    return index, numbers


def diagnose(
    model: Denoiser,
    data: Dataset,
    run: Trajectory,
    solver: Solver,
    seeds: Sequence[int] | None = None,
    labels: Int[Tensor, " b"] | None = None,
) -> Diagnosis:
    """Return what the exact denoiser does beside a run of the model.

    The exact trajectory starts at the run's own noise, on its grid. `score deviation` is the distance of the model's
    prediction from the exact one at the model's states, `score deviation on exact path` at the exact trajectory's;
    `model x`, `exact x`, `D(exact x)` and `D*(model x)` are distances of the four trajectories from the end of the
    exact one, `apart` is that of the two states at each level; all per √d. `exact slope` is the `speed` of the exact
    trajectory ([REG] fig. 12). `entropy` is that of the posterior over the data at the model's states in nats ([REG]
    fig. 9), `log density` is per dimension, at the state's own sigma.

    Args:
        model: whose run it is; it is asked again at every state of the exact trajectory.
        data: the exact denoiser of its training points.
        run: recorded.
        solver: that crossed the run's grid.
        seeds: of the run, for a solver that draws noise.
        labels: class that each trajectory is conditioned on; the exact denoiser is then of its points.

    Raises:
        FanalError: the data have another shape, or a class has no points.
    """
    d, levels = run.x[0, 0].numel(), run.sigmas[:-1]
    optimal = [data.posterior(x, sigma, labels) for x, sigma in zip(run.x[:-1], levels, strict=True)]
    bound = data if labels is None else Labelled(data, labels)
    exact = Trajectory.record(trace(bound, run.x[0], run.sigmas, solver, seeds))
    with torch.no_grad():
        learned = torch.stack([model(x, sigma) for x, sigma in zip(exact.x[:-1], levels, strict=True)])
    best, end = torch.stack([each.denoised for each in optimal]), exact.x[-1]
    curves = {
        "score deviation": _apart(run.denoised, best),
        "score deviation on exact path": _apart(learned, exact.denoised),
        "model x": _apart(run.x[:-1], end),
        "exact x": _apart(exact.x[:-1], end),
        "D(exact x)": _apart(learned, end),
        "D*(model x)": _apart(best, end),
        "apart": _apart(run.x[:-1], exact.x[:-1]),
        "exact slope": speed(exact),
        "entropy": torch.stack([each.entropy.cpu().double() for each in optimal]),
        "log density": torch.stack([each.log_density.cpu().double() / d for each in optimal]),
    }
    index, numbers = _ends(data, run.x[-1], end)
    return Diagnosis(exact, learned, optimal, index, curves, numbers)


@dataclass(frozen=True)
class Outlier:
    """A level whose value stands out of its neighbors'.

    Attributes:
        sigma: the level.
        deviation: its value.
        usual: what its neighbors lead to expect.
        z: log of their ratio, in robust standard deviations of all levels' ratios.
    """

    sigma: float
    deviation: float
    usual: float
    z: float


def outliers(
    sigmas: Float[Tensor, " n"],
    values: Float[Tensor, " n"],
    *,
    floor: float = 0.0,
    reach: int = 3,
    z: float = 6.0,
    ratio: float = 1.5,
) -> list[Outlier]:
    """Return the levels at which a curve jumps above what its neighbors lead to expect, largest sigma first.

    A model that failed to learn one noise level shows there, as one checkpoint of [GEO] app. F.3 does near sigma = 40.
    What is usual at a level is the median of `reach` straight lines in log value over log sigma, each through a
    neighbor on either side; and on both sides some neighbor is lower, so that a rise alone is none.

    Args:
        sigmas: levels, decreasing and positive.
        values: of the curve, not negative.
        floor: values up to here never stand out: they are rounding.
        reach: neighbors on each side.
        z: how many robust standard deviations (1.4826 times the median distance) stand out.
        ratio: and how many times the usual value, at least.

    Raises:
        FanalError: the two differ in length, a level or a value is not as told, or `reach` is not positive.
    """
    if sigmas.shape != values.shape or sigmas.ndim != 1 or reach < 1:
        raise FanalError(f"one value for each level and a reach >= 1, got {sigmas.shape}, {values.shape}, {reach}")
    if not bool((sigmas > 0).all()) or not bool((values >= 0).all()):
        raise FanalError("levels are positive, and values not negative")
    at, own = sigmas.double().log(), values.double().clamp_min(max(floor, 1e-300)).log()
    lines = []
    for k in range(1, min(reach, (len(own) - 1) // 2) + 1):
        share = (at[k:-k] - at[: -2 * k]) / (at[2 * k :] - at[: -2 * k])
        lines.append(pad(torch.lerp(own[: -2 * k], own[2 * k :], share), (k, k), value=torch.nan))
    if not lines:
        return []
    usual = torch.stack(lines).nanmedian(0).values
    spread = 1.4826 * float((own - usual).abs().nanmedian())
    found = []
    for i in range(1, len(own) - 1):
        sides = max(float(own[max(0, i - reach) : i].min()), float(own[i + 1 : i + 1 + reach].min()))
        off = float(own[i] - usual[i])
        if float(values[i]) > floor and min(off, float(own[i]) - sides) > max(z * spread, math.log(ratio)):
            found.append(Outlier(float(sigmas[i]), float(values[i]), float(usual[i].exp()), off / max(spread, 1e-12)))
    return found
