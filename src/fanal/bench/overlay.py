"""`fanal bench overlay`: one reverse diffusion solved three ways, as a density, as particles, and with a network.

All start from the standard normal law at T* and end at an early time of the Ornstein–Uhlenbeck process, in its own
variables `z = x/sqrt(1 + sigma²)`. The density solves the stable reverse equation ([PDE] eq. 2.7) on a grid; particles
follow the exact-step scheme (eq. 4.22), or the deterministic equation (eq. 2.8) by Heun's method; the network is small
and trained on draws of the same law. Particles of all runs begin at the same noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fanal import metrics, pde
from fanal.bench.overlay_network import recipe_of, restored, train_on
from fanal.bench.overlay_tables import tables
from fanal.bench.plans import opened
from fanal.denoiser import Counted, Denoiser
from fanal.errors import FanalError
from fanal.files import read_json, write_tensors
from fanal.metrics.kernels import median_distance
from fanal.particles import sigma_of
from fanal.pde.grid import Array, Grid
from fanal.pde.laws import law
from fanal.runs import Progress, Run, quiet
from fanal.sampling import Solver, trace
from fanal.schedules import polynomial
from fanal.seeding import noise, run_seeds
from fanal.solvers import DDPM, Heun
from fanal.summary import as_json

__all__ = ["LEVEL", "OverlayConfig", "overlay", "scatter"]

LEVEL = 1e-3
"""Level of the test of Kolmogorov and Smirnov between particles and density."""

_WAYS: Mapping[str, Solver] = {"sde": DDPM(), "ode": Heun()}
_FRAMES = 24
_DIRECTIONS = 128
_MORE = 4  # exact draws for each particle, to compare with
_FINER = 4  # steps of the reference for each step of the particles that are shown

_Runs = dict[tuple[str, str, str], tuple[Tensor, Mapping[str, Any]]]  # by kind, way and name: particles and notes


@dataclass(frozen=True)
class OverlayConfig:
    """What the comparison depends on; written to `run.json`.

    Attributes:
        law: of the data, as in `fanal pde`, in the plane.
        end: T*, the forward time at which all begin.
        early: the forward time at which all end.
        cells: of the density, per axis.
        steps: of the density, and of the particles that are shown.
        budgets: numbers of steps that particles are compared at.
        iterations: of training, at which the network is looked at.
        train: draws that it is trained on.
        width: of its layers.
        count: particles.
        seed: of the draws, the noise and the training.
        threads: CPU threads.
    """

    command: ClassVar[str] = "bench overlay"

    law: str = "ring"
    end: float = 3.0
    early: float = 0.01
    cells: int = 80
    steps: int = 80
    budgets: tuple[int, ...] = (5, 10, 20, 40, 80)
    iterations: tuple[int, ...] = (100, 400, 1600, 4000)
    train: int = 20_000
    width: int = 64
    count: int = 2000
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.early < self.end < 20:
            raise FanalError(f"times must be 0 < early < end < 20, got early {self.early:.4g} and end {self.end:.4g}")
        for name, low, high in (("cells", 16, 300), ("steps", 2, 10_000), ("count", 64, 20_000), ("train", 64, 10**6)):
            if not low <= getattr(self, name) <= high:
                raise FanalError(f"{name} must be from {low} to {high:,}, got {getattr(self, name)}")
        for name in ("budgets", "iterations"):
            given = getattr(self, name)
            if not given or min(given) < 1 or list(given) != sorted(set(given)):
                raise FanalError(f"{name} must be increasing whole numbers above 0, got {given}")

    @classmethod
    def quick(cls) -> OverlayConfig:
        """Return a comparison that takes seconds."""
        return cls(cells=40, steps=20, budgets=(5, 20), iterations=(50, 400), train=4000, count=500)

    def times(self, steps: int) -> Array:
        """Return forward times from T* down, closer near the end."""
        return polynomial(steps, self.early, self.end, 4.0, zero=False).numpy()


def scatter(grid: Grid, density: Array, count: int, seed: int) -> Tensor:
    """Draw points from a density on a grid: a cell by its mass, and a place in it at random.

    Args:
        grid: the cells.
        density: (*shape).
        count: how many.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    mass = (density * grid.volumes).ravel()
    cells = np.unravel_index(random.choice(len(mass), count, p=mass / mass.sum()), grid.shape)
    places = [
        edges[index] + width[index] * random.random(count)
        for edges, width, index in zip(grid.edges, grid.widths, cells, strict=True)
    ]
    return torch.from_numpy(np.stack(places, 1))


def _coupled(x: Tensor, y: Tensor) -> dict[str, Any]:
    """The root mean square distance of particles from their twins; no less than the Wasserstein distance W2."""
    found = metrics.mean((x - y).square().sum(1))
    value = math.sqrt(found.value)
    return {"value": value, "se": found.se / (2 * value) if value else 0.0, "n": found.n}


class _Ways:
    """The law, the grid and the particles' noise of one comparison."""

    def __init__(self, config: OverlayConfig, run: Run, progress: Progress) -> None:
        self.config, self.run, self.progress = config, run, progress
        self.law = law(config.law, 2)
        if self.law.axes != 2:
            raise FanalError(f"{config.law} is followed by its distance from 0: take a law on two axes")
        self.grid = self.law.grid(config.cells)
        self.times = config.times(config.steps)
        self.frames = sorted({int(i) for i in np.linspace(0, config.steps, min(config.steps + 1, _FRAMES)).round()})

    def density(self, denoiser: Denoiser) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The stable reverse from the normal law, at the times of the frames, and its distance from the closed form."""
        clock, (x, y) = time.perf_counter(), self.grid.centers
        normal = np.multiply.outer(stats.norm.pdf(x), stats.norm.pdf(y))
        drift = pde.reverse(pde.score_of_denoiser(denoiser), self.config.end)
        found = pde.evolve(self.grid, normal / self.grid.mass(normal), drift, self.config.end - self.times)
        truth = self.law.cells(self.grid, self.config.early)
        apart = float((np.abs(found[-1] - truth) * self.grid.volumes).sum()) / 2
        notes = {
            "tv": apart,
            "mass error": max(abs(self.grid.mass(p) - 1) for p in found),
            "least": float(found.min()),
            "seconds": time.perf_counter() - clock,
        }
        return {"density": torch.from_numpy(found[self.frames])}, notes

    def particles(self, denoiser: Denoiser, solver: Solver, steps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Particles in the paper's variables, at all frames where the steps are the shown ones, else at the end."""
        config, kept = self.config, self.frames if steps == self.config.steps else [steps]
        times = config.times(steps)
        sigmas = torch.tensor([sigma_of(t) for t in times], dtype=torch.float64)
        seeds = run_seeds(config.seed, config.count)
        x = noise((2,), seeds, math.exp(config.end), dtype=torch.float64)
        counted, found = Counted(denoiser), [x * math.exp(-config.end)] if 0 in kept else []
        with torch.no_grad():
            for step in trace(counted, x, sigmas, solver, seeds):
                if step.span.i + 1 in kept:
                    found.append(step.step.x_next * math.exp(-times[step.span.i + 1]))
        return {"particles": torch.stack(found)}, {"calls": counted.calls, "evaluations": counted.evaluations}

    def trained(self, index: int) -> tuple[dict[int, Denoiser], dict[str, Any]]:
        """The network after each wanted number of iterations."""
        config, looks = self.config, self.config.iterations
        recipe = recipe_of(self.law, looks[-1], config.train, config.width, config.seed, config.threads)
        tensors, notes = self.run.block(index, lambda: train_on(self.law, recipe, looks, self.progress))
        return restored(recipe, tensors, notes["sigma_data"], looks), notes

    def measured(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything: figures, and the tensors that the page draws."""
        config, exact = self.config, self.law.denoiser
        nets, notes = self.trained(0)
        last = nets[config.iterations[-1]]
        solved = {
            name: self.run.block(i, lambda d=d: self.density(d))
            for i, (name, d) in enumerate({"exact score": exact, "network's score": last}.items(), 1)
        }
        jobs: list[tuple[str, str, Denoiser, str, int]] = [
            *(
                ("steps", str(n), exact, way, n)
                for way in _WAYS
                for n in dict.fromkeys((*config.budgets, config.steps))
            ),
            *(("training", str(i), net, way, config.steps) for way in _WAYS for i, net in nets.items()),
            ("reference", "", exact, "ode", _FINER * config.steps),
        ]
        runs: _Runs = {}
        for k in self.progress(range(len(jobs)), "particles"):
            kind, name, denoiser, way, n = jobs[k]
            work: Callable[[], Any] = lambda d=denoiser, s=_WAYS[way], n=n: self.particles(d, s, n)  # noqa: E731
            tensors, own = self.run.block(k, work, stage="particles")
            runs[kind, way, name] = tensors["particles"], own
        return self.compared(solved, runs, notes)

    def compared(
        self, solved: Mapping[str, Any], runs: _Runs, notes: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Distances between all ways at the end."""
        config, seed = self.config, 10 * self.config.seed
        truth, again = (
            torch.from_numpy(self.law.draw(count, config.early, seed + offset))
            for count, offset in ((_MORE * config.count, 1), (config.count, 2))
        )
        width = median_distance(truth, again)

        def apart(x: Tensor, y: Tensor) -> dict[str, Any]:
            sliced = metrics.sliced_wasserstein(x, y, directions=_DIRECTIONS)
            discrepancy = metrics.mmd(x, y[: config.count], bandwidth=width)
            return {"sliced W2": as_json(sliced), "MMD²": as_json(discrepancy)}

        ends = {key: found[-1] for key, (found, _) in runs.items()}
        shown, trained = ("steps", "sde", str(config.steps)), ("training", "sde", str(config.iterations[-1]))
        drawn = {
            name: scatter(self.grid, tensors["density"][-1].numpy(), config.count, seed + 3)
            for name, (tensors, _) in solved.items()
        }
        ways = {"density": drawn["exact score"], "particles": ends[shown], "network": ends[trained]}
        ways["network's density"] = drawn["network's score"]
        names = list(ways)
        results = {
            "bandwidth": width,
            "floor": apart(again, truth),
            "truth": {name: apart(x, truth) for name, x in ways.items()},
            "pairs": {f"{a} – {b}": apart(ways[a], ways[b]) for i, a in enumerate(names) for b in names[i + 1 :]},
            "density": {name: own for name, (_, own) in solved.items()},
            "steps": self._rows("steps", runs, lambda x: apart(x, truth)),
            "training": self._rows("training", runs, lambda x: apart(x, truth)),
            "losses": notes["losses"],
            "ks": self._ks(solved["exact score"][0]["density"][-1].numpy(), ends[shown]),
        }
        tensors = {
            "times": torch.from_numpy(self.times[self.frames]),
            "edges": torch.from_numpy(self.grid.edges[0]),
            "density": solved["exact score"][0]["density"],
            "particles": runs[shown][0],
            "network": runs[trained][0],
        }
        return results, tensors

    def _rows(self, kind: str, runs: _Runs, apart: Callable[[Tensor], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Figures of runs of one kind, by way; beside the distances of laws, those of particles from their twins."""
        out: dict[str, dict[str, Any]] = {way: {} for way in _WAYS}
        for (own, way, name), (found, notes) in runs.items():
            if own != kind:
                continue
            twin = ("steps", way, str(self.config.steps)) if kind == "training" else ("reference", way, "")
            figures = {**apart(found[-1]), "calls": notes["calls"]}
            if twin in runs:
                figures["twins"] = _coupled(found[-1], runs[twin][0][-1])
            out[way][name] = figures
        return out

    def _ks(self, density: Array, particles: Tensor) -> dict[str, Any]:
        """Kolmogorov and Smirnov on each coordinate: particles against the density's distribution."""
        p_values = []
        for axis in range(2):
            mass = (density * self.grid.volumes).sum(1 - axis)
            total = np.concatenate([[0.0], np.cumsum(mass)]) / mass.sum()
            edges = self.grid.edges[axis]
            found = stats.kstest(particles[:, axis].numpy(), lambda v, e=edges, t=total: np.interp(v, e, t))
            p_values.append(float(found.pvalue))
        return {"p": p_values, "level": LEVEL, "agree": min(p_values) > LEVEL / 2, "count": len(particles)}


def overlay(
    config: OverlayConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Solve one reverse diffusion three ways, into a run folder with `tables.md` and an animated `report.html`.

    Args:
        config: what to solve.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.
        say: takes one line for the user.

    Raises:
        FanalError: the configuration or the place does not work.
    """
    from fanal.report.overlay import overlay_page

    clock = time.perf_counter()
    with opened(config, out, overwrite=overwrite, say=say) as run:
        ways = _Ways(config, run, progress)
        results, tensors = ways.measured()
        write_tensors(run.path("ways.safetensors"), tensors)
        run.path("tables.md").write_text(tables(results), encoding="utf-8")
        run.describe({"seconds": time.perf_counter() - clock, "results": results})
        overlay_page(run.part, read_json(run.path("run.json"))).write(run.path("report.html"))
        return run.finish()
