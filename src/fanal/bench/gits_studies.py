"""The studies of `fanal bench gits`, one function each: what is searched, and what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fanal.bench.gits_paths import branch_and_bound, path_cost
from fanal.bench.gits_subject import Subject
from fanal.bench.plans import Found
from fanal.bench.schedules import spendable
from fanal.config import build_solver
from fanal.sampling import Solver, sample
from fanal.schedule_search import cost_matrix
from fanal.schedule_search.paths import grids, shortest
from fanal.schedules import polynomial
from fanal.schedules.published import tables as published
from fanal.trajectory import Trajectory

__all__ = ["STUDIES", "TRUTH", "run"]

TRUTH = "truth"
"""The block that comes before a model's studies: the true ends of its test samples."""

_COEFF = 1.15  # the authors' default
_METRICS = ("dev", "l1", "l2")
_PRINTED = "gits-cifar10"
_FIXED = ("polynomial", "logsnr", "uniform", "quadratic")

Cell = tuple[str, Tensor, dict[str, Any]]
"""`ROW|CALLS`, the error of each test sample, and what else is known."""


def _each(subject: Subject, row: str, schedules: Mapping[int, Tensor], solver: Solver | None = None) -> Iterator[Cell]:
    """Measure one row: a schedule for every number of steps."""
    for steps, grid in schedules.items():
        yield f"{row}|{steps}", *subject.measure(grid, solver or subject.student)


def _solvers(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """Solver × grid × calls ([REG] tables 1, 2, 3 and 8)."""
    sizes, base = subject.sizes, subject.base
    for text in sizes.solvers:
        solver = build_solver(text)
        for calls, steps in spendable(solver, sizes.calls):
            if steps < 2:
                continue  # one step leaves nothing to search
            for name in _FIXED if text in sizes.thorough else _FIXED[:1]:
                yield f"{text}, {name}|{calls}", *subject.measure(subject.fixed(name, steps), solver)
            yield f"{text}, gits|{calls}", *subject.measure(base.schedules[steps], solver)
        for method in ("fit", "fit-weights") if text in sizes.fitted else ():
            cells = spendable(solver, sizes.fewer)
            run = subject.search(0, [k for _, k in cells], solver=solver, method=method, teacher=base, holdout=0)
            for calls, steps in cells:
                yield f"{text}, {method}|{calls}", *subject.measure(run.schedules[steps], run.solver_for(steps))


def _nodes(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """Nodes of the teacher's grid ([REG] table 5)."""
    for nodes in subject.sizes.nodes:
        grid = polynomial(nodes - 1, subject.model.sigma_min, subject.model.sigma_max, zero=False)
        steps = [k for k in subject.sizes.calls if k < nodes]
        yield from _each(subject, str(nodes), subject.search(steps=steps, sigmas=grid).schedules)


def _teachers(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """Solver of the teacher; its calls per sample stand beside its name."""
    for text in subject.sizes.teachers:
        run = subject.search(teacher=build_solver(text))
        yield from _each(subject, f"{text}, {run.calls:.0f} calls", run.schedules)


def _warmups(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """Number of warm-up samples, several sets of each ([REG] table 6)."""
    for count in subject.sizes.warmups:
        for i in range(subject.sizes.seeds):
            found = subject.search(count, subject.sizes.fewer, seed=subject.seed + 100 + i)
            yield from _each(subject, f"{count}, set {i}", found.schedules)


def _coeffs(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """γ, with and without the analytical first step ([REG] table 8)."""
    sizes, base = subject.sizes, subject.base
    for text in sizes.thorough:
        for coeff in sizes.coeffs:
            found = grids(base.cost, base.teacher.sigmas, sizes.calls, coeff)
            yield from _each(subject, f"{text}, {coeff:g}", found, build_solver(text))
    for coeff in sizes.free:
        run = subject.search(0, solver=subject.student, coeff=coeff, afs=True, teacher=base, holdout=0)
        for steps, grid in run.schedules.items():
            yield f"{sizes.student}, {coeff:g}, AFS|{steps}", *subject.measure(grid, run.solver_for(steps))


def _metrics(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """What a jump's cost is."""
    for metric in _METRICS:
        cost = cost_matrix(subject.base.teacher, metric)
        found = grids(cost, subject.base.teacher.sigmas, subject.sizes.calls, _COEFF)
        yield from _each(subject, metric, found)


def _alone(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """One schedule for each sample, from its own trajectory, against one for all, from the same trajectories."""
    calls, x = subject.sizes.calls, subject.problem.test[: subject.sizes.alone]
    shared = subject.search(x)
    teacher, sigmas = shared.teacher, shared.teacher.sigmas
    lone = [Trajectory(sigmas, teacher.x[:, b : b + 1], teacher.denoised[:, b : b + 1]) for b in range(len(x))]
    own = [grids(cost_matrix(one), sigmas, calls, _COEFF) for one in lone]
    rows = {
        "warm-up samples, one for all": [subject.base.schedules] * len(x),
        "these samples, one for all": [shared.schedules] * len(x),
        "these samples, one for each": own,
    }
    for row, schedules in rows.items():
        for steps in calls:
            grid = [found[steps] for found in schedules]
            ends = [sample(subject.model, x[b : b + 1], grid[b], subject.student) for b in range(len(x))]
            different = len({tuple(g.tolist()) for g in grid})
            yield f"{row}|{steps}", subject.errors(torch.cat(ends)), {"schedules": different}


def _transfer(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """Schedules that were searched on other models, and those printed for CIFAR-10 ([REG] tables 9 and 10)."""
    calls, ends = subject.sizes.calls, (subject.model.sigma_min, subject.model.sigma_max)
    for other in every:
        if (other.model.sigma_min, other.model.sigma_max) == ends:
            yield from _each(subject, f"searched on {other.name}", {k: other.base.schedules[k] for k in calls})
    if ends == (0.002, 80.0):
        printed = {k: torch.tensor(own, dtype=torch.float64) for k, own in published[_PRINTED].items() if k in calls}
        yield from _each(subject, "printed for CIFAR-10", printed)
    yield from _each(subject, "polynomial", {k: subject.fixed("polynomial", k) for k in calls})


def _proofs(subject: Subject, every: Sequence[Subject]) -> Iterator[Cell]:
    """The dynamic programme against branch and bound, on every third node and on all."""
    for metric in ("dev", "l2"):
        whole = cost_matrix(subject.base.teacher, metric)
        third = torch.arange(0, len(whole), 3)
        for cost in (whole[third][:, third], whole):
            for steps in subject.sizes.proofs:
                if len(cost) == len(whole) and steps > 5:
                    continue
                proof = branch_and_bound(cost, steps, _COEFF)
                path = shortest(cost, [steps], _COEFF)[steps]
                about = {"value": proof.value, "dp": path_cost(cost, path, _COEFF), "path": list(proof.path)}
                about |= {"dp_path": path, "visited": proof.visited, "paths": proof.paths}
                yield f"{metric}, {len(cost)} nodes|{steps}", torch.zeros(0), about


STUDIES: dict[str, Callable[[Subject, Sequence[Subject]], Iterator[Cell]]] = {
    "solvers": _solvers,
    "transfer": _transfer,
    "nodes": _nodes,
    "teachers": _teachers,
    "warmups": _warmups,
    "coeffs": _coeffs,
    "metrics": _metrics,
    "alone": _alone,
    "proofs": _proofs,
}
"""Name → study."""


def run(name: str, subject: Subject, found: Sequence[Found], every: Sequence[Subject]) -> Found:
    """Run one study of one model.

    Args:
        name: `TRUTH`, or a key of `STUDIES`.
        subject: the model.
        found: the blocks before this one.
        every: all models.
    """
    begin = time.perf_counter()
    for tensors, notes in found:
        if notes["study"] == TRUTH:
            next(s for s in every if s.name == notes["model"]).ends = tensors["ends"]
    notes: dict[str, Any] = {"model": subject.name, "study": name, "cells": {}}
    if name == TRUTH:
        base = subject.base
        errors, about = subject.measure(base.teacher.sigmas, base.pilot)
        schedules = {str(steps): grid.tolist() for steps, grid in base.schedules.items()}
        notes |= {"cells": {"teacher": about}, "figures": subject.figures(subject.problem.ends)}
        notes |= {"seconds": base.seconds, "schedules": schedules, "features": subject.judge.real.shape[1]}
        return {"teacher": errors, "ends": subject.problem.ends}, {**notes, "wall": time.perf_counter() - begin}
    tensors = {}
    for cell, errors, about in STUDIES[name](subject, every):
        notes["cells"][cell] = about
        if len(errors):
            tensors[cell] = errors
    return tensors, {**notes, "wall": time.perf_counter() - begin}
