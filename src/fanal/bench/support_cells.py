"""The cells of `fanal bench support`: one guided run each, on the same initial noise, with its distances."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fanal.bench.plans import Found
from fanal.denoiser import Counted, Denoiser, evaluations
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.supports import Target, target
from fanal.supports.forms import Scores, exact, guided
from fanal.supports.landing import figures, land
from fanal.supports.processes import process

__all__ = ["Cell", "Grid", "counted", "goal_of", "place_of", "run_cells", "start"]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        target: key of `fanal.supports.TARGETS`, or a data set's name and a class, `digits8:3`.
        form: key of `fanal.supports.forms.FORMS`.
        process: key of `fanal.supports.processes.PROCESSES`.
        score: "exact", "error:δ" or "network".
        scale: w.
        steps: of the polynomial grid from 80 to 0.002, and 0.
    """

    target: str
    form: str
    process: str
    score: str
    scale: float
    steps: int

    @property
    def name(self) -> str:
        """All of it."""
        return f"{self.target}|{self.form}|{self.process}|{self.score}|{self.scale:g}|{self.steps}"


@dataclass(frozen=True)
class Grid:
    """Cells as a product; see `Cell`."""

    targets: Sequence[str] = ("circle",)
    forms: Sequence[str] = ("classifier-free",)
    processes: Sequence[str] = ("ddim",)
    scores: Sequence[str] = ("exact",)
    scales: Sequence[float] = (30.0,)
    steps: Sequence[int] = (20,)

    def groups(self) -> Iterator[list[Cell]]:
        """Yield the cells that share target, form, process and score: what one block computes."""
        for names in itertools.product(self.targets, self.forms, self.processes, self.scores):
            yield [Cell(*names, scale, steps) for scale in self.scales for steps in self.steps]


def place_of(name: str) -> tuple[str, int | None]:
    """Return the support of a cell's target and its class: `digits8:3`, `folder:PATH:0`, or a named one without."""
    place, _, label = name.rpartition(":")
    return (place, int(label)) if place and label.isdecimal() else (name, None)


def goal_of(name: str) -> Target:
    """Return a cell's target.

    Raises:
        FanalError: nothing is called that.
    """
    return target(*place_of(name))


def start(goal: Target, count: int, first: int) -> tuple[Tensor, range]:
    """Return the states that every cell of a target starts from, at sigma = 80, and their seeds."""
    seeds = range(first, first + count)
    return noise(goal.shape, seeds, 80.0, dtype=torch.float64), seeds


def counted(scores: Scores) -> Scores:
    """Return the same scores, their predictions counted."""
    return Scores(Counted(scores.told), Counted(scores.free))


def scores_for(goal: Target, name: str, trained: Scores | None, seed: int) -> Scores:
    """Return the scores of a cell; the seed decides how wrong ones err."""
    if name == "network":
        assert trained is not None
        return trained
    return exact(goal, float(name.partition(":")[2] or 0), seed)


def run_cells(
    study: str, cells: Sequence[Cell], count: int, first: int, near: float, trained: Scores | None = None
) -> Found:
    """Run the cells of one group and measure each.

    Args:
        study: whose cells they are.
        cells: of one target, form, process and score.
        count: samples of each.
        first: their first seed, and that of the fields by which scores are wrong.
        near: distance that counts as on the support, in units of the target's size.
        trained: of the score "network".
    """
    goal = goal_of(cells[0].target)
    x, seeds = start(goal, count, first)
    scores = counted(scores_for(goal, cells[0].score, trained, first))
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for cell in cells:
        denoiser: Denoiser = guided(cell.form, goal, scores, cell.scale)
        before = evaluations(denoiser)
        landed = land(goal, denoiser, x, polynomial(cell.steps), process(cell.process), seeds)
        row: dict[str, Any] = {"target": cell.target, "form": cell.form, "process": cell.process, "score": cell.score}
        row |= {"scale": cell.scale, "steps": cell.steps, "calls": (evaluations(denoiser) - before) / count}
        row |= {name: figures(values, near * goal.size) for name, values in landed.tensors().items()}
        rows.append(row)
        tensors |= {f"{cell.name}|{name}": values.float() for name, values in landed.tensors().items()}
    return tensors, {"study": study, "cells": rows}
