"""What `fanal pde` calls: a law forward to noise and back, as densities, into a run folder."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fanal.errors import FanalError, unknown_name
from fanal.files import write_tensors
from fanal.pde import equations, instability
from fanal.pde.distances import kl, tv, w2
from fanal.pde.fokker_planck import SCHEMES, Drift, evolve
from fanal.pde.grid import Array, Grid
from fanal.pde.laws import Law, law
from fanal.runs import Progress, Run, cpu_threads, quiet
from fanal.schedules import polynomial

__all__ = ["BACK", "STARTS", "DensityConfig", "densities"]

BACK: tuple[str, ...] = ("stable", "ode", "unstable")
"""Ways back: [PDE] eq. 2.7 (2.10 for Brownian motion), 2.8 and 2.3."""
STARTS: tuple[str, ...] = ("forward", "normal", "uniform")
"""What the way back starts from."""
PROCESSES: tuple[str, ...] = ("ou", "brownian")
_STEPS_PER_BLOCK, _LEVEL = 20, 1e-3


@dataclass(frozen=True)
class DensityConfig:
    """What the densities depend on; written to `run.json`.

    Attributes:
        law: to start from, as in `fanal.pde.law`.
        dimension: coordinates of a sample; None: the law's fewest.
        process: "ou", [PDE] eq. 2.1, or "brownian" between walls, eq. 2.9.
        back: which of `BACK` are run.
        score: "exact", "forward", or a model spec as in `fanal.load`.
        start: one of `STARTS`.
        end: T*, the forward time at which the way back starts.
        early: the forward time at which it ends, where the score would become infinite.
        cells: per axis; None: 400 on one axis, 80 on two.
        steps: in time, shorter near 0; None: 200 on one axis, 80 on two.
        reach: half the width of the box, or the largest distance; None: the law's.
        scheme: one of `SCHEMES`.
        particles: exact draws that the forward density is tested with; 0: none.
        seed: of the particles.
        device, threads: where a model's score is computed, and with how many CPU threads.
    """

    law: str = "two-bumps"
    dimension: int | None = None
    process: str = "ou"
    back: tuple[str, ...] = ()
    score: str | None = None
    start: str = "forward"
    end: float = 2.0
    early: float = 0.01
    cells: int | None = None
    steps: int | None = None
    reach: float | None = None
    scheme: str = "implicit"
    particles: int = 20_000
    seed: int = 0
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("process", self.process, PROCESSES),
            ("start", self.start, STARTS),
            ("scheme", self.scheme, SCHEMES),
            *(("way back", way, BACK) for way in self.back),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        if not 0 < self.early < self.end < 20:
            raise FanalError(f"times must be 0 < early < end < 20, got early {self.early:.4g} and end {self.end:.4g}")
        for name, value, low, high in (("cells", self.cells, 8, 20_000), ("steps", self.steps, 2, 100_000)):
            if value is not None and not low <= value <= high:
                raise FanalError(f"{name} must be from {low} to {high:,}, got {value}")
        if self.reach is not None and not 0 < self.reach < 1e6:
            raise FanalError(f"reach must be above 0, got {self.reach:.4g}")
        if self.process == "brownian" and self.score == "exact":
            raise FanalError("between walls the score has no closed form here: take --score forward, or a model")


@dataclass(frozen=True)
class _Problem:
    """A configuration with all that it names."""

    config: DensityConfig
    law: Law
    grid: Grid
    times: Array
    forward: Drift
    back: tuple[str, ...]
    score: str

    @property
    def backward_times(self) -> Array:
        """s = T* − t, from 0, without the last step into t = 0."""
        return (self.config.end - self.times[1:])[::-1]


def _problem(config: DensityConfig) -> _Problem:
    found = law(config.law, config.dimension)
    plane = found.axes > 1
    cells = config.cells or (80 if plane else 400)
    if cells**found.axes > 100_000:
        raise FanalError(f"{cells} cells per axis are {cells**found.axes:,} in all, more than 100,000: take fewer")
    steps = config.steps or (80 if plane else 200)
    # Short steps near t = 0, where scores are large: a grid of Karras' form.
    times = np.concatenate([[0.0], polynomial(steps, config.early, config.end, 4.0, zero=False).numpy()[::-1]])
    forward = equations.ornstein_uhlenbeck if config.process == "ou" else equations.brownian
    if found.radial:
        forward = equations.radial(forward, found.dimension)
    curved = plane or found.radial
    back = config.back or (BACK[:2] if curved else BACK)
    if curved and "unstable" in back:
        raise FanalError("the unstable reverse is shown on a line: take a law in one dimension, or leave it out")
    grid = found.grid(cells, config.reach)
    start = found.cells(grid)
    if abs(grid.mass(start) - 1) > 1e-3:
        raise FanalError(
            f"the grid holds {grid.mass(start):.4f} of {found.name}: take a larger --reach than "
            f"{grid.edges[0][-1]:.4g}, or more --cells than {cells}"
        )
    score = config.score or ("exact" if config.process == "ou" else "forward")
    return _Problem(config, found, grid, times, forward, back, score)


def _model_score(problem: _Problem) -> equations.Score:
    """The score of a model that makes samples of the law's size."""
    from fanal.loading import load

    config, own = problem.config, problem.law
    model = load(config.score, device=config.device)
    if math.prod(model.shape) != own.dimension:
        raise FanalError(
            f"{config.score} makes samples of shape {tuple(model.shape)}, {own.name} has {own.dimension} coordinates"
        )
    return equations.score_of_denoiser(model, config.process, own.dimension if own.radial else None)


def _score(problem: _Problem, forward: Array) -> equations.Score:
    """The score for the way back, of the density on R^d."""
    own = problem.law
    if problem.score == "exact":
        return equations.score_of_denoiser(own.denoiser, "ou", own.dimension if own.radial else None)
    if problem.score != "forward":
        return _model_score(problem)
    found = equations.score_of_densities(problem.grid, problem.times, forward)
    return equations.radial_score(found, own.dimension) if own.radial else found


def _reverse(problem: _Problem, way: str, forward: Array) -> tuple[Drift, float]:
    """Drift and diffusion of a way back."""
    own, end = problem.law, problem.config.end
    flat = equations.ornstein_uhlenbeck if problem.config.process == "ou" else equations.brownian
    make, diffusion = (equations.reverse, 1.0) if way == "stable" else (equations.reverse_ode, 0.0)
    drift = make(_score(problem, forward), end, flat)
    return (equations.radial(drift, own.dimension, diffusion) if own.radial else drift), diffusion


def _start(problem: _Problem, forward: Array) -> Array:
    """What the way back starts from."""
    config, grid, own = problem.config, problem.grid, problem.law
    if config.start == "forward":
        return forward[-1]
    if config.start == "uniform":
        r = np.ones(grid.shape)
        if own.radial:  # r^(d-1), which overflows
            r = np.exp((own.dimension - 1) * np.log(grid.centers[0] / grid.centers[0].max()))
        return r / grid.mass(r)
    normal = (
        stats.chi.pdf(grid.centers[0], own.dimension)
        if own.radial
        else np.exp(-(grid.points**2).sum(1) / 2).reshape(grid.shape)
    )
    return normal / grid.mass(normal)


def _solve(
    run: Run, stage: str, times: Array, begin: Array, advance: Callable[[Array, Array], Array], progress: Progress
) -> tuple[Array, float]:
    """Densities at all times, in blocks that are stored as they are done, and the seconds that they took."""
    borders = [*range(0, len(times) - 1, _STEPS_PER_BLOCK), len(times) - 1]
    parts, seconds = [begin[None]], 0.0
    for i in progress(range(len(borders) - 1), stage):

        def work(state: Array = parts[-1][-1], span: Array = times[borders[i] : borders[i + 1] + 1]) -> tuple:
            clock = time.perf_counter()
            out = advance(state, span)[1:]
            return {"density": torch.from_numpy(out)}, {"seconds": time.perf_counter() - clock}

        tensors, notes = run.block(i, work, stage=stage)
        parts.append(tensors["density"].numpy())
        seconds += notes["seconds"]
    return np.concatenate(parts), seconds


def _figures(problem: _Problem, found: Array, truth: Array) -> dict[str, Any]:
    """Mass, sign and distances of a solution."""
    grid = problem.grid
    errors = [tv(grid, p, q) for p, q in zip(found, truth, strict=True)]
    ends = {"tv": errors[-1], "kl": kl(grid, truth[-1], found[-1])}
    ends |= {"w2": w2(grid, found[-1], truth[-1])} if len(grid.edges) == 1 else {}
    return {
        "mass error": max(abs(grid.mass(p) - 1) for p in found),
        "least density": float(found.min()),
        "largest tv": max(errors),
        "end": {name: value if math.isfinite(value) else None for name, value in ends.items()},
        "tv": errors,
    }


def _tested(problem: _Problem, density: Array) -> dict[str, Any]:
    """Exact draws of the process at T* against the forward density, coordinate by coordinate."""
    config, grid = problem.config, problem.grid
    drawn = (
        problem.law.draw(config.particles, config.end, config.seed)
        if config.process == "ou"
        else _between_walls(problem)
    )
    least = 1.0
    for axis, edges in enumerate(grid.edges):
        others = tuple(k for k in range(len(grid.edges)) if k != axis)
        total = np.concatenate([[0.0], np.cumsum((density * grid.volumes).sum(others))])
        found = stats.kstest(drawn[:, axis], lambda v, e=edges, t=total: np.interp(v, e, t))
        least = min(least, float(found.pvalue) * len(grid.edges))
    return {"count": config.particles, "p-value": min(1.0, least), "level": _LEVEL, "agree": bool(least > _LEVEL)}


def _between_walls(problem: _Problem) -> Array:
    """Brownian particles, exactly: walls mirror what goes beyond them, as often as it does."""
    config, own = problem.config, problem.law
    x = own.denoiser.draw(config.particles, config.seed).reshape(config.particles, -1).numpy()
    x = x + math.sqrt(2 * config.end) * np.random.default_rng(config.seed).standard_normal(x.shape)
    for axis, edges in enumerate(problem.grid.edges):
        width = edges[-1] - edges[0]
        x[:, axis] = edges[0] + width - np.abs(np.mod(x[:, axis] - edges[0], 2 * width) - width)
    return x


def _unstable(problem: _Problem, forward: Array) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the equation that only runs backwards is lost, and how fast its waves grow."""
    config, own, grid = problem.config, problem.law, problem.grid

    def truth(points: Array, s: float) -> Array:
        t = config.end - s
        if config.process == "ou":
            return own.density(points, t)
        i = int(np.searchsorted(problem.times, t).clip(1, len(problem.times) - 1))
        share = (t - problem.times[i - 1]) / (problem.times[i] - problem.times[i - 1])
        return (1 - share) * forward[i - 1] + share * forward[i]

    begin = truth(grid.points, 0.0).reshape(grid.shape)
    found = instability.blow_up(grid, problem.forward, begin, truth, config.end - config.early)
    edges = grid.edges[0] if config.process == "brownian" else np.array([-8.0, 8.0])  # where its waves have ended
    low, high = float(edges[0]), float(edges[-1])
    waves = []
    for n in range(1, 6):
        theory = instability.mode(grid, n, config.process)[1]
        measured = instability.mode_rate(low, high, n, problem.forward, config.process)
        waves.append({"wave": n, "theory": theory, "measured": measured})
    results = {
        "rate": found.rate if math.isfinite(found.rate) else None,
        "fastest": found.fastest,
        "theory": found.theory,
        "lost": found.lost,
        "least density": float(found.densities.min()),
        "mass error": max(abs(grid.mass(p) - 1) for p in found.densities),
        "waves": waves,
    }
    kept = {"times": found.times, "density": found.densities, "growth": found.growth}
    return results, {f"unstable.{name}": torch.from_numpy(value) for name, value in kept.items()}


def _compute(problem: _Problem, run: Run, progress: Progress) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """Everything that a run holds: figures, tensors, seconds."""
    config, grid = problem.config, problem.grid
    begin = problem.law.cells(grid)
    begin /= grid.mass(begin)

    def ahead(state: Array, span: Array) -> Array:
        return evolve(grid, state, problem.forward, span, scheme=config.scheme, steady=True)

    forward, seconds = _solve(run, "forward", problem.times, begin, ahead, progress)
    exact = config.process == "ou"
    truth = np.stack([problem.law.cells(grid, float(t)) for t in problem.times]) if exact else forward
    results: dict[str, Any] = {"forward": _figures(problem, forward, truth), "cells": list(grid.shape)}
    tensors = {"times": problem.times, "forward": forward, "truth": truth}
    tensors |= {f"centers.{k}": axis for k, axis in enumerate(grid.centers)}
    if config.particles and not (problem.law.radial and config.process == "brownian"):  # a ball's wall is no mirror
        results["particles"] = _tested(problem, forward[-1])
    for way in problem.back:
        if way == "unstable":
            continue
        drift, diffusion = _reverse(problem, way, forward)

        def back(state: Array, span: Array, drift: Drift = drift, diffusion: float = diffusion) -> Array:
            return evolve(grid, state, drift, span, diffusion=diffusion, scheme=config.scheme)

        found, spent = _solve(run, way, problem.backward_times, _start(problem, forward), back, progress)
        seconds += spent
        tensors[way] = found
        results[way] = _figures(problem, found, truth[:0:-1])
    kept = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    if "unstable" in problem.back:
        results["unstable"], own = _unstable(problem, forward)
        kept |= own
    return results, kept, seconds


def densities(config: DensityConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet) -> Path:
    """Solve into a run folder: `run.json`, `densities.safetensors` and `report.html`.

    Args:
        config: what to solve.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: the configuration or the place does not work.
    """
    problem = _problem(config)
    decides = {}
    if problem.score not in ("exact", "forward"):
        from fanal.loading import fingerprint

        _model_score(problem)  # whether it fits, before anything is solved
        decides["model"] = fingerprint(problem.score)
    head = dataclasses.asdict(config) | {"back": list(problem.back), "score": problem.score}
    with cpu_threads(config.threads), Run(out, "pde", head, identity=decides, overwrite=overwrite) as run:
        results, tensors, seconds = _compute(problem, run, progress)
        write_tensors(run.path("densities.safetensors"), tensors)
        run.describe({"seconds": seconds, "results": results})
        from fanal.report import write_report

        write_report(run.part)
        return run.finish()
