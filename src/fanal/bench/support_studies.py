"""The studies of `fanal bench support` on supports with exact denoisers; each is a list of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fanal.bench.plans import Found
from fanal.bench.support_cells import Grid, counted, goal_of, run_cells, start
from fanal.bench.support_network import network_scores, train_network
from fanal.denoiser import Denoiser, evaluations
from fanal.errors import FanalError
from fanal.geometry import rotation
from fanal.guidance import ClassifierFree
from fanal.metrics.estimates import mean
from fanal.sampling import trace
from fanal.schedules import polynomial
from fanal.solvers import Euler
from fanal.summary import as_json
from fanal.supports.forms import FORMS, exact
from fanal.supports.landing import figures, land
from fanal.supports.processes import PROCESSES, process
from fanal.trajectory import Trajectory

__all__ = ["NONLINEAR", "Block", "Sizes", "blocks_of", "nonlinear"]

Block = Callable[[Sequence[Found]], Found]
"""What computes a block, given those before it."""

NONLINEAR = (0.05, 0.95)
"""Shares of a run's turning between which it is called nonlinear."""


@dataclass(frozen=True)
class Sizes:
    """How large the studies are.

    Attributes:
        count: samples of each cell.
        iterations: of the training of the network; 0: no network.
        grid: scales, steps and processes of the study "grid".
        forms: of the study "forms".
        targets: of the study "targets".
        errors: of the study "errors".
        limit: of the study "limit".
        noise: samples of the study "noise".
        intervals: targets of the study "interval".
        hunt: geometries that the hunt draws, and how many of them it climbs from.
        chases: processes and numbers of steps that it hunts with.
    """

    count: int = 128
    iterations: int = 2500
    grid: Grid = field(
        default_factory=lambda: Grid(
            processes=tuple(PROCESSES),
            scores=("exact", "error:0.01", "error:0.1", "network"),
            scales=(0.0, 1.0, 3.0, 10.0, 30.0, 100.0),
            steps=(2, 5, 10, 20, 50, 200),
        )
    )
    forms: Grid = field(
        default_factory=lambda: Grid(
            targets=("circle", "outlier"),
            forms=tuple(FORMS),
            processes=("ddim", "ddpm", "maruyama"),
            scales=(1.0, 10.0, 30.0, 100.0),
            steps=(5, 20, 50),
        )
    )
    targets: Grid = field(
        default_factory=lambda: Grid(
            targets=("circle", "square", "segments", "spheres", "outlier", "digits8:3"),
            processes=("ddim", "ddpm", "exponential3", "maruyama"),
            scales=(3.0, 30.0, 100.0),
            steps=(5, 20, 50),
        )
    )
    errors: Grid = field(
        default_factory=lambda: Grid(
            scores=("exact", *(f"error:{delta:g}" for delta in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3))),
            scales=(1.0, 3.0, 10.0, 30.0),
            steps=(10, 40, 160),
        )
    )
    limit: Grid = field(
        default_factory=lambda: Grid(
            targets=("circle", "outlier"),
            processes=("ddim", "ddpm", "eta2"),
            scales=(3.0, 10.0, 30.0, 100.0),
            steps=(5, 10, 20, 40, 80, 160, 320, 640),
        )
    )
    noise: int = 2048
    intervals: tuple[str, ...] = ("circle", "segments", "digits8:3")
    hunt: tuple[int, int] = (32, 2)
    chases: tuple[tuple[str, int], ...] = (
        *(("ddim", steps) for steps in (2, 3, 5, 10, 20, 50, 200)),
        *((name, steps) for name in ("exponential2", "exponential3") for steps in (3, 10, 50)),
    )

    @classmethod
    def quick(cls) -> Sizes:
        """Return sizes that take seconds."""
        few = {"scales": (1.0, 30.0), "steps": (2, 10)}
        two = ("ddim", "maruyama")
        return cls(
            count=16,
            iterations=20,
            grid=Grid(processes=two, scores=("exact", "error:0.1", "network"), **few),
            forms=Grid(forms=("classifier-free", "autoguidance"), processes=two, **few),
            targets=Grid(targets=("square", "outlier"), **few),
            errors=Grid(scores=("exact", "error:0.01", "error:0.1"), **few),
            limit=Grid(targets=("outlier",), scales=(3.0,), steps=(5, 20)),
            noise=64,
            intervals=("circle",),
            hunt=(2, 1),
            chases=(("ddim", 3), ("exponential3", 3)),
        )


def nonlinear(paths: Tensor, sigmas: Tensor) -> tuple[float, float]:
    """Return the range of sigma in which runs turn ([REG] sec. 6): from 5 % to 95 % of their mean turning.

    Args:
        paths: (N + 1, B, *shape).
        sigmas: (N + 1,).

    Raises:
        FanalError: the runs are straight.
    """
    turned = rotation(paths).mean(1).cumsum(0)
    if not float(turned[-1]) > 0:
        raise FanalError("these runs are straight: there is no nonlinear interval")
    share = turned / turned[-1]
    first, last = (int((share >= level).nonzero()[0]) for level in NONLINEAR)
    return float(sigmas[1 + last]), float(sigmas[1 + first])


def _cells(study: str, grid: Grid, sizes: Sizes, first: int, near: float) -> list[Block]:
    """One block per group of cells; the network is trained in a block before the first that needs it."""
    blocks: list[Block] = []
    if "network" in grid.scores:
        if sizes.iterations:
            goal = goal_of(grid.targets[0])
            blocks.append(lambda found: train_network(goal, sizes.iterations))

    def work(found: Sequence[Found], cells: list[Any]) -> Found:
        trained = None
        if cells[0].score == "network":
            weights = next(block for block in found if block[1]["study"] == "network")
            trained = network_scores(goal_of(cells[0].target), weights)
        return run_cells(study, cells, sizes.count, first, near, trained)

    for cells in grid.groups():
        if cells[0].score != "network" or sizes.iterations:
            blocks.append(lambda found, cells=cells: work(found, cells))
    return blocks


def _grid(sizes: Sizes, first: int, near: float) -> list[Block]:
    return _cells("grid", sizes.grid, sizes, first, near)


def _forms(sizes: Sizes, first: int, near: float) -> list[Block]:
    return _cells("forms", sizes.forms, sizes, first, near)


def _targets(sizes: Sizes, first: int, near: float) -> list[Block]:
    return _cells("targets", sizes.targets, sizes, first, near)


def _errors(sizes: Sizes, first: int, near: float) -> list[Block]:
    return _cells("errors", sizes.errors, sizes, first, near)


def _limit(sizes: Sizes, first: int, near: float) -> list[Block]:
    return _cells("limit", sizes.limit, sizes, first, near)


def _bad_noise(name: str, sizes: Sizes, first: int, near: float, steps: int) -> Found:
    """How much of the initial noise ends off S_c, and what happens near the line x = 0, the fork's symmetry."""
    goal = goal_of(name)
    denoiser, grid, where = ClassifierFree(goal.part, goal.whole, 10.0), polynomial(steps), near * goal.size
    x, seeds = start(goal, sizes.noise, first)
    landed = land(goal, denoiser, x, grid, Euler(), seeds)
    row: dict[str, Any] = {"target": name, "steps": steps, "random": figures(landed.part, where)}
    tensors = {"part": landed.part}
    if name == "fork":
        # On the line both points of S_c are equally near, and the prediction is halfway between.
        offsets = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-12, 1, 53, dtype=torch.float64)])
        there = torch.stack([offsets, -80 * torch.ones_like(offsets)], 1)
        close = land(goal, denoiser, there, grid, Euler(), range(len(offsets)))
        bad = close.part > where
        row |= {"on the line": float(close.part[0]), "bad up to": float(offsets[bad].max()) if bool(bad.any()) else 0.0}
        tensors |= {"offsets": offsets, "close": close.part}
    return tensors, {"study": "noise", "cells": [], "noise": row}


def _noise(sizes: Sizes, first: int, near: float) -> list[Block]:
    return [
        lambda found, name=name, steps=steps: _bad_noise(name, sizes, first, near, steps)
        for name in ("circle", "fork")
        for steps in (10, 40, 160)
    ]


def _interval_of(goal_name: str, scale: float, sizes: Sizes, first: int, near: float, steps: int = 40) -> Found:
    """Guidance everywhere, in the nonlinear interval, before it, after it, and nowhere."""
    goal, grid = goal_of(goal_name), polynomial(steps)
    x, seeds = start(goal, sizes.count, first)
    scores = counted(exact(goal))
    whole = ClassifierFree(scores.told, scores.free, scale)
    with torch.no_grad():
        run = Trajectory.record(trace(whole, x, grid, Euler(), seeds))
    low, high = nonlinear(run.x, run.sigmas)
    windows: dict[str, tuple[float, float] | None] = {
        "everywhere": None,
        "nonlinear interval": (low, high),
        "before it": (high, 1e9),
        "after it": (0.0, low),
    }
    denoisers: dict[str, Denoiser] = {
        name: ClassifierFree(scores.told, scores.free, scale, window) for name, window in windows.items()
    }
    denoisers["nowhere"] = scores.told
    rows, tensors = [], {}
    for name, denoiser in denoisers.items():
        before = evaluations(whole)
        landed = land(goal, denoiser, x, grid, process("ddim"), seeds)
        error = (landed.x - run.x[-1]).flatten(1).norm(dim=1)
        row = {"guided": name, "calls": (evaluations(whole) - before) / sizes.count, "error": as_json(mean(error))}
        rows.append(row | {key: figures(value, near * goal.size) for key, value in landed.tensors().items()})
        tensors[f"{goal_name}|{scale:g}|{name}"] = landed.part
    about = {"target": goal_name, "scale": scale, "steps": steps, "low": low, "high": high, "rows": rows}
    return tensors, {"study": "interval", "cells": [], "interval": about}


def _interval(sizes: Sizes, first: int, near: float) -> list[Block]:
    return [
        lambda found, name=name, scale=scale: _interval_of(name, scale, sizes, first, near)
        for name in sizes.intervals
        for scale in (3.0, 10.0)
    ]


_STUDIES: Mapping[str, Callable[[Sizes, int, float], list[Block]]] = {
    "grid": _grid,
    "forms": _forms,
    "targets": _targets,
    "errors": _errors,
    "limit": _limit,
    "noise": _noise,
    "interval": _interval,
}


def blocks_of(study: str, sizes: Sizes, first: int, near: float) -> list[Block]:
    """Return the blocks of a study.

    Args:
        study: grid, forms, targets, errors, limit, noise or interval.
        sizes: how large it is.
        first: seed of the first sample.
        near: distance that counts as on the support, in units of its size.
    """
    return _STUDIES[study](sizes, first, near)
