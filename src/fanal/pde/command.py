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
from fanal.pde.walls import Walled
from fanal.runs import Block, Progress, Run, cpu_threads, quiet
from fanal.schedules import polynomial
from fanal.seeding import run_seeds

__all__ = ["BACK", "STARTS", "DensityConfig", "densities"]

BACK: tuple[str, ...] = ("stable", "ode", "unstable")
"""Ways back: [PDE] eq. 2.7 (2.10 for Brownian motion), 2.8 and 2.3."""
STARTS: tuple[str, ...] = ("forward", "normal", "uniform")
"""What the way back starts from."""
PROCESSES: tuple[str, ...] = ("ou", "brownian")
_STEPS_PER_BLOCK, _LEVEL = 20, 1e-3
_FIRST = 10  # steps up to `early`, at least
_MOST_CELLS, _MOST_NUMBERS, _MOST_PARTICLES = 100_000, 20_000_000, 10_000_000


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
        run_seeds(self.seed, 1)
        if self.threads < 1:
            raise FanalError(f"threads must be at least 1, got {self.threads}")
        if not 0 <= self.particles <= _MOST_PARTICLES:
            raise FanalError(f"particles must be from 0 to {_MOST_PARTICLES:,}, got {self.particles:,}")


@dataclass(frozen=True)
class _Problem:
    """A configuration with all that it names; `exact` is the process in closed form, where it has one."""

    config: DensityConfig
    law: Law
    grid: Grid
    times: Array
    forward: Drift
    back: tuple[str, ...]
    score: str
    exact: Law | Walled | None

    @property
    def first(self) -> int:
        """Steps up to `early`, of which the last state is kept: as short as the next step, where that takes no more."""
        wanted = math.ceil(self.times[1] / (self.times[2] - self.times[1]))
        return min(max(wanted, _FIRST), max(len(self.times) - 1, _FIRST))

    @property
    def backward_times(self) -> Array:
        """s = T* − t, from 0, without the last step into t = 0."""
        return (self.config.end - self.times[1:])[::-1]


def _problem(config: DensityConfig) -> _Problem:
    found = law(config.law, config.dimension)
    plane = found.axes > 1
    cells, steps = config.cells or (80 if plane else 400), config.steps or (80 if plane else 200)
    _check_size(cells, found.axes, steps)
    # Short steps near t = 0, where scores are large: a grid of Karras' form.
    times = np.concatenate([[0.0], polynomial(steps, config.early, config.end, 4.0, zero=False).numpy()[::-1]])
    forward = equations.ornstein_uhlenbeck if config.process == "ou" else equations.brownian
    if found.radial:
        forward = equations.radial(forward, found.dimension)
    grid = found.grid(cells, config.reach)
    held = grid.mass(found.cells(grid))
    if abs(held - 1) > 1e-3:
        cure = "" if held > 1 else f"a larger --reach than {grid.edges[0][-1]:.4g}, or "
        raise FanalError(f"the grid holds {held:.4f} of {found.name}: take {cure}more --cells than {cells}")
    exact = found if config.process == "ou" else None if found.radial else Walled(found, grid)
    score = config.score or ("forward" if exact is None else "exact")
    if score == "exact" and exact is None:
        raise FanalError(f"{found.name} has no closed form between walls: take --score forward, or a model")
    return _Problem(config, found, grid, times, forward, config.back or BACK, score, exact)


def _check_size(cells: int, axes: int, steps: int) -> None:
    """Refuse what would not fit into the memory of a common machine."""
    total = cells**axes
    if total > _MOST_CELLS:
        raise FanalError(f"{cells} cells per axis are {total:,} in all, more than {_MOST_CELLS:,}: take fewer")
    if total * (steps + 1) > _MOST_NUMBERS:
        raise FanalError(
            f"{total:,} cells at {steps:,} steps are {total * steps:,} numbers for each solution, more than "
            f"{_MOST_NUMBERS:,}: take fewer --cells, or at most {_MOST_NUMBERS // total - 1:,} --steps"
        )


def _model_score(problem: _Problem) -> equations.Score:
    """The score of a model that makes samples of the law's size."""
    from fanal.loading import CLOSED, load

    config, own = problem.config, problem.law
    model = load(problem.score, device=config.device)
    if math.prod(model.shape) != own.dimension:
        raise FanalError(
            f"{problem.score} makes samples of shape {tuple(model.shape)}, {own.name} has {own.dimension} "
            f"coordinate{'' if own.dimension == 1 else 's'}; give a model of that size, exact or forward"
        )
    # A network is asked in float32, as when it samples; closed forms in float64, where the device has it.
    exact = problem.score.split(":")[0] in CLOSED and torch.device(config.device).type != "mps"
    return equations.score_of_denoiser(
        model,
        config.process,
        own.dimension if own.radial else None,
        device=config.device,
        dtype=torch.float64 if exact else torch.float32,
    )


def _score(problem: _Problem, forward: Array) -> equations.Score:
    """The score for the way back, of the density on R^d."""
    own = problem.law
    if problem.score == "exact":
        if isinstance(problem.exact, Walled):
            return problem.exact.score
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


def _truth(problem: _Problem, exact: Law | Walled, run: Run, progress: Progress) -> Array:
    """The closed form in cells at all times."""

    def work(rows: range) -> Block:
        return {
            "density": torch.from_numpy(np.stack([exact.cells(problem.grid, float(problem.times[i])) for i in rows]))
        }, {}

    rows = range(len(problem.times))
    blocks = run.blocks(rows, _STEPS_PER_BLOCK, work, what="closed form", progress=progress, stage="truth")
    return torch.cat([tensors["density"] for tensors, _ in blocks]).numpy()


def _figures(problem: _Problem, found: Array, truth: Array) -> dict[str, Any]:
    """Mass, sign and distances of a solution."""
    grid = problem.grid
    errors = [tv(grid, p, q) for p, q in zip(found, truth, strict=True)]
    ends = {"tv": errors[-1], "kl": kl(grid, truth[-1], found[-1])}
    ends["w2"] = w2(grid, found[-1], truth[-1])
    return {
        "mass error": max(abs(grid.mass(p) - 1) for p in found),
        "least density": float(found.min()),
        "largest tv": max(errors),
        "end": {name: value if math.isfinite(value) else None for name, value in ends.items()},
        "tv": errors,
    }


def _tested(problem: _Problem, exact: Law | Walled, density: Array, run: Run, progress: Progress) -> dict[str, Any]:
    """Exact draws of the process at T* against the forward density, coordinate by coordinate."""
    config, grid, size = problem.config, problem.grid, problem.law.rows

    def work(rows: range) -> Block:
        return {"x": torch.from_numpy(exact.part(rows.start // size, len(rows), config.end, config.seed))}, {}

    rows = range(config.particles)
    blocks = run.blocks(rows, size, work, what="particles", progress=progress, stage="particles")
    drawn, least = torch.cat([tensors["x"] for tensors, _ in blocks]).numpy(), 1.0
    for axis, edges in enumerate(grid.edges):
        others = tuple(k for k in range(len(grid.edges)) if k != axis)
        total = np.concatenate([[0.0], np.cumsum((density * grid.volumes).sum(others))])
        found = stats.kstest(drawn[:, axis], lambda v, e=edges, t=total: np.interp(v, e, t))
        least = min(least, float(found.pvalue) * len(grid.edges))
    return {"count": config.particles, "p-value": min(1.0, least), "level": _LEVEL, "agree": bool(least > _LEVEL)}


def _unstable(problem: _Problem, forward: Array) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the equation that only runs backwards is lost, and how fast its waves grow."""
    config, exact, grid = problem.config, problem.exact, problem.grid

    def truth(points: Array, s: float) -> Array:
        t = config.end - s
        if exact is not None:
            return exact.density(points, t)
        i = int(np.searchsorted(problem.times, t).clip(1, len(problem.times) - 1))
        share = (t - problem.times[i - 1]) / (problem.times[i] - problem.times[i - 1])
        return (1 - share) * forward[i - 1] + share * forward[i]

    radius = problem.law.dimension if problem.law.radial else None
    begin = truth(grid.points, 0.0).reshape(grid.shape)
    found = instability.blow_up(grid, problem.forward, begin, truth, config.end - config.early)
    results = {
        "rate": found.rate if math.isfinite(found.rate) else None,
        "fastest": found.fastest if math.isfinite(found.fastest) else None,
        "theory": found.theory,
        "lost": found.lost,
        "least density": float(found.densities.min()),
        "mass error": max(abs(grid.mass(p) - 1) for p in found.densities),
        "waves": instability.waves(grid, problem.forward, config.process, radius),
    }
    kept = {"times": found.times, "density": found.densities, "growth": found.growth}
    return results, {f"unstable.{name}": torch.from_numpy(value) for name, value in kept.items()}


def _told(problem: _Problem, found: Array, truth: Array) -> dict[str, Any]:
    """How far from (3.19) a way back ends that did not start from the forward law, where that has a closed form."""
    config, own = problem.config, problem.law
    if config.start == "forward" or config.process != "ou" or own.radial or own.dimension > 1:
        return {}
    from fanal.pde.theory.generated import generated

    grid = problem.grid
    wanted = generated(own, found[0], grid.centers[0], grid, config.end, config.early)
    return {"told": {"tv": tv(grid, found[-1], wanted), "wanted tv": tv(grid, wanted, truth)}}


def _compute(problem: _Problem, run: Run, progress: Progress) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """Everything that a run holds: figures, tensors, seconds."""
    config, grid = problem.config, problem.grid
    exact = problem.exact
    begin = (exact or problem.law).cells(grid)
    begin /= grid.mass(begin)

    def ahead(state: Array, span: Array) -> Array:
        if span[0] > 0:
            return evolve(grid, state, problem.forward, span, scheme=config.scheme, steady=True)
        fine = np.concatenate([np.linspace(0, span[1], problem.first + 1), span[2:]])
        found = evolve(grid, state, problem.forward, fine, scheme=config.scheme, steady=True)
        return np.concatenate([found[:1], found[problem.first :]])

    forward, seconds = _solve(run, "forward", problem.times, begin, ahead, progress)
    truth = forward if exact is None else _truth(problem, exact, run, progress)
    results: dict[str, Any] = {"forward": _figures(problem, forward, truth), "cells": list(grid.shape)}
    results["closed form"] = exact is not None
    tensors = {"times": problem.times, "forward": forward, "truth": truth}
    tensors |= {f"centers.{k}": axis for k, axis in enumerate(grid.centers)}
    if config.particles and exact is not None:
        results["particles"] = _tested(problem, exact, forward[-1], run, progress)
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
        if way == "stable":
            results[way] |= _told(problem, found, truth[1])
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
    from fanal.loading import fingerprint

    decides = {"law": fingerprint(config.law)} if ":" in config.law else {}
    if problem.score not in ("exact", "forward"):
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
