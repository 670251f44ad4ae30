"""`fanal bench schedules`: fixed grids, GITS and fits against each other, on mixtures and on embedded models.

Every solver on every problem is one block of a run folder: its searches on warm-up samples, and each sample's error on
test samples that no search saw. Errors are distances to the end of the same trajectory by a reference of many small
steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fanal.bench.plans import Found, Outcome, Plan
from fanal.config import build_solver
from fanal.denoiser import Model
from fanal.errors import FanalError
from fanal.exact import Mixture
from fanal.gits import Search, search
from fanal.loading import fingerprint, load
from fanal.runs import Progress
from fanal.sampling import Solver, sample
from fanal.schedule_search import Student, calls_of, starts
from fanal.schedule_search.fitting import OBJECTIVES, judge
from fanal.schedules import logsnr
from fanal.seeding import noise, run_seeds
from fanal.solvers import RK4

__all__ = ["BASELINES", "Maker", "Problem", "SchedulesConfig", "mixture", "problems", "spendable", "whole"]

BASELINES = ("gits", "polynomial", "logsnr", "quadratic")
"""What a fit should beat: GITS as published, and three fixed grids."""

_METHODS = {
    "fit": ("fit", "robust"),
    "fit-mean": ("fit", "mean"),
    "weights": ("fit-weights", "robust"),
    "weights-mean": ("fit-weights", "mean"),
    "weights-typical": ("fit-weights", "typical"),
}

_SOLVERS = ("euler", "ipndm:order=3", "ipndm:order=4", "dpmpp:order=2", "unipc:order=2", "heun")


@dataclass(frozen=True)
class SchedulesConfig:
    """What the comparison depends on; written to `run.json`.

    Attributes:
        mixtures: how many; mixture m of them is `mixture(first + m)`.
        first: seed of the first mixture; those on which settings were chosen had other seeds.
        models: embedded models.
        solvers: as on the command line.
        model_solvers: those that networks are sampled with.
        methods: of fitting on mixtures.
        model_methods: the same on networks; a mean square needs more samples than a network is given here.
        calls: budgets of network calls; a solver takes the steps that they allow, if they divide.
        model_calls: the same on networks.
        warmup: samples of each search on a mixture; as many others choose among the fits.
        test: test samples of a mixture.
        model_warmup: samples of each search on a network.
        model_test: test samples of a network.
        seed: run seed of all samples.
        repeats: how often GITS's stages are timed on each network.
        reference: steps of the fourth-order reference on mixtures; networks get a fifth of them.
        threads: CPU threads.
    """

    command: ClassVar[str] = "bench schedules"

    mixtures: int = 10
    first: int = 0
    models: tuple[str, ...] = ("hands32", "shapes32")
    solvers: tuple[str, ...] = _SOLVERS
    model_solvers: tuple[str, ...] = _SOLVERS
    methods: tuple[str, ...] = ("fit", "fit-mean", "weights", "weights-mean")
    model_methods: tuple[str, ...] = ("fit", "weights", "weights-typical")
    calls: tuple[int, ...] = (5, 6, 8, 10)
    model_calls: tuple[int, ...] = (5, 6, 8, 10)
    warmup: int = 256
    test: int = 1024
    model_warmup: int = 32
    model_test: int = 96
    seed: int = 0
    repeats: int = 3
    reference: int = 400
    threads: int = 1

    @classmethod
    def quick(cls) -> SchedulesConfig:
        """Return a size that takes seconds, for tests and a first look."""
        return cls(
            mixtures=2, models=(), solvers=("euler", "ipndm:order=3"), calls=(5,), warmup=32, test=64, reference=200
        )

    def cells(self, network: bool = False) -> Iterator[tuple[str, int, int]]:
        """Yield solver, calls and steps of every cell that the budgets allow, on mixtures or on networks."""
        for text in self.model_solvers if network else self.solvers:
            for calls, steps in spendable(build_solver(text), self.model_calls if network else self.calls):
                yield text, calls, steps

    def plan(self) -> Plan:
        """Return one block for the teacher of each problem, and one for each of its solvers.

        Raises:
            FanalError: there is nothing to compare.
        """
        every = [_Bench(name, make, self, name in self.models) for name, make in problems(self)]
        solvers = [(bench, list(dict.fromkeys(text for text, _, _ in self.cells(bench.network)))) for bench in every]
        if not all(texts for _, texts in solvers) or not every:
            raise FanalError("nothing to compare: give mixtures or models, and calls that the solvers can spend")
        blocks = [
            lambda found, bench=bench, text=text: bench.work(text, found)
            for bench, texts in solvers
            for text in ("", *texts)
        ]
        return Plan(blocks, _close, "parts", {name: fingerprint(name) for name in self.models})


def spendable(solver: Solver, budgets: Sequence[int]) -> list[tuple[int, int]]:
    """Return the budgets of calls that a solver can spend exactly, each with its number of steps."""
    per = calls_of(solver, 1)
    return [(calls, calls // per) for calls in budgets if calls % per == 0 and calls_of(solver, calls // per) == calls]


def mixture(seed: int, components: int = 6, dimensions: int = 48, std: float = 0.3) -> Mixture:
    """Return a Gaussian mixture with random means, scaled to a root mean square entry of 0.5, and random weights.

    Args:
        seed: decides means and weights.
        components: how many.
        dimensions: of the space.
        std: of every component.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, dimensions, dtype=torch.float64, generator=generator)
    share = torch.rand(components, dtype=torch.float64, generator=generator) + 0.1
    return Mixture(means * (0.5 / means.square().mean().sqrt()), share, std=std)


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, and its samples: those of the searches and those of the test, with where they truly end.

    Attributes:
        name: of the model, or `mixture` and its number.
        model: the denoiser.
        warm: samples of the searches, at sigma_max.
        test: samples of the test, at sigma_max.
        ends: where the test samples end, by a reference of many small steps.
    """

    name: str
    model: Model
    warm: Tensor
    test: Tensor
    ends: Tensor

    @classmethod
    def make(
        cls,
        name: str,
        model: Model,
        sizes: tuple[int, int, int],
        seed: int,
        dtype: torch.dtype,
        ends: Tensor | None = None,
    ) -> Problem:
        """Draw the samples and solve for their ends.

        Args:
            name: of the model.
            model: the denoiser.
            sizes: warm-up samples, test samples, and steps of the reference (RK4 on a logSNR grid).
            seed: run seed.
            dtype: of the samples.
            ends: where the test samples end, if an earlier call found out.
        """
        warmup, test, steps = sizes

        def drawn(count: int, stream: str) -> Tensor:
            return noise(model.shape, run_seeds(seed, count), model.sigma_max, stream=stream, dtype=dtype)

        x = drawn(test, "bench test")
        fine = logsnr(steps, model.sigma_min, model.sigma_max, zero=False)
        if ends is None:
            ends = torch.cat([sample(model, part, fine, RK4()) for part in x.split(256)])
        return cls(name, model, drawn(warmup, "bench warm-up"), x, ends)


Maker = Callable[[Tensor | None], Problem]
"""Makes a problem, given where its test samples end if that is known."""


def problems(config: SchedulesConfig) -> list[tuple[str, Maker]]:
    """Return name and maker of every problem."""

    def closed(index: int, ends: Tensor | None) -> Problem:
        sizes = config.warmup, config.test, config.reference
        return Problem.make(f"mixture {index}", mixture(config.first + index), sizes, config.seed, torch.float64, ends)

    def network(name: str, ends: Tensor | None) -> Problem:
        sizes = config.model_warmup, config.model_test, max(1, config.reference // 5)
        return Problem.make(name, load(name), sizes, config.seed, torch.float32, ends)

    made: list[tuple[str, Maker]] = [
        (f"mixture {i}", lambda ends, i=i: closed(i, ends)) for i in range(config.mixtures)
    ]
    return made + [(name, lambda ends, name=name: network(name, ends)) for name in config.models]


class _Bench:
    """One problem: its teacher, and each solver's cells as one block of errors by name and notes about the searches."""

    def __init__(self, name: str, make: Maker, config: SchedulesConfig, network: bool) -> None:
        self.name, self.make, self.config, self.network = name, make, config, network
        self.ends: Tensor | None = None

    @cached_property
    def problem(self) -> Problem:
        return self.make(self.ends)

    @cached_property
    def base(self) -> Search:
        count = len(self.problem.warm)
        return search(self.problem.model, self.problem.warm, [2], holdout=count, batch=64 if self.network else None)

    @cached_property
    def judge(self) -> Student:
        return Student(self.problem.model, self.problem.test, self.problem.ends, 256)

    def work(self, text: str, found: Sequence[Found]) -> Found:
        """Do one block.

        Args:
            text: the solver, as on the command line; empty: the teacher's block, which comes first.
            found: the blocks before this one.
        """
        begin = time.perf_counter()
        known = [tensors["ends"] for tensors, notes in found if notes["problem"] == self.name and "ends" in tensors]
        self.ends = known[0] if known else None
        notes: dict[str, Any] = {"problem": self.name, "cells": {}}
        if text:
            measured = self.solver(text)
        else:
            measured = [("teacher", self.base.teacher.sigmas, self.base.pilot, {})]
        tensors = {}
        for name, sigmas, solver, about in measured:
            tensors[name] = self.judge.errors(sigmas, solver).float()
            notes["cells"][name] = {"sigmas": sigmas.tolist(), **about}
        if not text:
            tensors["ends"] = self.problem.ends
            if self.network:
                notes["seconds"] = self.laps()
        return tensors, {**notes, "wall": time.perf_counter() - begin}

    def solver(self, text: str) -> Iterator[tuple[str, Tensor, Solver, dict[str, Any]]]:
        """Yield the fixed grids, GITS and the fits of one solver: name, grid, the solver on it, and notes.

        Args:
            text: the solver, as on the command line.
        """
        cells = [(calls, k) for own, calls, k in self.config.cells(self.network) if own == text]
        solver, steps = build_solver(text), [k for _, k in cells]
        shared: dict[str, Any] = {"solver": solver, "teacher": self.base, "holdout": 0}
        fixed = starts(self.base.teacher, steps)
        found = {"gits": search(self.problem.model, 0, steps, **shared)}
        free = calls_of(solver, 1) == 1
        for name in self.config.model_methods if self.network else self.config.methods:
            method, objective = _METHODS[name]
            if method == "fit" or free:
                found[name] = search(self.problem.model, 0, steps, method=method, objective=objective, **shared)
        seen = {"warm-up": self.base.teacher, "held-out": self.base.judged}
        known = {name: Student(self.problem.model, run.x[0], run.x[-1]) for name, run in seen.items() if run}
        for calls, k in cells:
            for name in BASELINES[1:]:
                yield f"{text}|{calls}|{name}", fixed[k][name], solver, {}
            for name, run in found.items():
                sigmas, used = run.schedules[k], run.solver_for(k)
                missed = {own: student.residual(sigmas, used)[0] for own, student in known.items()}
                about: dict[str, Any] = {f"{o} {own}": judge(m, o) for own, m in missed.items() for o in OBJECTIVES}
                about |= {"calls": self.base.breakdown["teacher"] + run.breakdown.get(str(k), 0.0)}
                about |= {"start": run.picks.get(k, ""), "weights": run.weights.get(k)}
                yield f"{text}|{calls}|{name}", sigmas, used, about

    def laps(self) -> list[dict[str, Any]]:
        """Time GITS's stages on 64 samples again and again, each time with its own teacher's run."""
        warm = self.problem.warm.repeat(64 // len(self.problem.warm) + 1, *[1] * (self.problem.warm.ndim - 1))[:64]
        out = []
        for _ in range(self.config.repeats):
            for metric in ("dev", "l2"):
                run = search(self.problem.model, warm, list(self.config.model_calls), metric=metric)
                out.append({"metric": metric, **run.seconds})
        return out


def whole(found: Sequence[Found]) -> dict[str, Tensor]:
    """Return the errors of all problems, by `PROBLEM|CELL`."""
    return {
        f"{notes['problem']}|{cell}": errors
        for tensors, notes in found
        for cell, errors in tensors.items()
        if cell != "ends"
    }


def _close(found: Sequence[Found], progress: Progress) -> Outcome:
    from fanal.bench.schedule_tables import results_of, tables

    results = results_of(found)
    return Outcome(results, tables(results), tensors=whole(found))
