"""`fanal bench solvers`: error against calls of every solver on every named grid, on mixtures and on embedded models.

The problems are those of `fanal bench schedules`. A solver that draws noise has no path to be near to: it is judged by
the samples it makes, beside a few that draw none.
"""

from __future__ import annotations

import bisect
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fanal import metrics
from fanal.bench.plans import Found, Outcome, Plan
from fanal.bench.quality import Judge, calls_on, dataset_of, draws
from fanal.bench.schedules import Maker, Problem, SchedulesConfig, problems, whole
from fanal.config import build_schedule, build_solver
from fanal.denoiser import Counted
from fanal.errors import FanalError, NonFiniteError
from fanal.exact import Mixture
from fanal.loading import card, fingerprint
from fanal.runs import Progress
from fanal.sampling import sample
from fanal.schedule_search import Student
from fanal.seeding import noise, run_seeds
from fanal.summary import as_json

__all__ = ["STREAM", "SolversConfig"]

STREAM = "bench quality"
"""Stream of the samples that are judged by quality."""

_SOLVERS = (
    "euler",
    "heun",
    "dpm2",
    "rk4",
    "taylor2",
    "dpms:order=2",
    "dpms:order=3",
    "dpmpp2s",
    "dpmpp:order=2",
    "dpmpp:order=3",
    "unipc:order=2",
    "unipc:order=3",
    "res",
    "spndm",
    "pndm",
    "ipndm:order=3",
    "ipndm:order=4",
    "lms",
    "deis:order=3",
    "afs",
    "ddpm",
    "ancestral",
    "churn",
    "sde:order=2",
    "sde:order=3",
    "dpmpp_sde",
)
_BESIDE = ("euler", "heun", "dpmpp:order=2")  # judged by quality too, to compare the stochastic ones with
_BATCH = 256


@dataclass(frozen=True)
class SolversConfig:
    """What the comparison depends on; written to `run.json`.

    Attributes:
        mixtures: how many; mixture m of them is `fanal.bench.schedules.mixture(first + m)`.
        first: seed of the first mixture.
        models: embedded models.
        solvers: as on the command line.
        schedules: grids on the mixtures, as on the command line; each ends at sigma_min.
        model_schedules: grids on networks; the first one of each kind is used where quality is judged.
        calls: budgets of network calls; a solver takes the most steps that a budget allows.
        model_calls: the same on networks.
        test: test samples of a mixture; as many are judged by quality.
        model_test: test samples of a network.
        quality: samples of a network that are judged by quality, for each solver; 0: none.
        seed: run seed of all samples.
        reference: steps of the fourth-order reference on mixtures; networks get a fifth of them.
        threads: CPU threads.
    """

    command: ClassVar[str] = "bench solvers"

    mixtures: int = 10
    first: int = 0
    models: tuple[str, ...] = ("hands32", "shapes32")
    solvers: tuple[str, ...] = _SOLVERS
    schedules: tuple[str, ...] = ("polynomial", "logsnr", "uniform", "quadratic", "cosine")
    model_schedules: tuple[str, ...] = ("polynomial", "quadratic")
    calls: tuple[int, ...] = (6, 12, 24, 48)
    model_calls: tuple[int, ...] = (6, 12, 24)
    test: int = 256
    model_test: int = 64
    quality: int = 256
    seed: int = 0
    reference: int = 400
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.solvers or not self.schedules or not self.model_schedules:
            raise FanalError("nothing to compare: give at least one solver and one schedule")
        for text in self.solvers:
            build_solver(text)
        for text in (*self.schedules, *self.model_schedules):
            build_schedule(text, 10, 0.002, 80.0, zero=False)
        if min(*self.calls, *self.model_calls, self.threads) < 1 or min(self.test, self.model_test) < 3:
            raise FanalError("calls and threads must be at least 1, and test samples at least 3")

    @classmethod
    def quick(cls) -> SolversConfig:
        """Return a size that takes seconds, for tests and a first look."""
        return cls(mixtures=2, models=(), schedules=("polynomial", "quadratic"), calls=(6, 12), test=64, reference=200)

    def problems(self) -> list[tuple[str, Maker]]:
        """Return name and maker of every problem: those of `fanal bench schedules`, without warm-up samples to speak
        of."""
        same = SchedulesConfig(
            mixtures=self.mixtures,
            first=self.first,
            models=self.models,
            warmup=1,
            test=self.test,
            model_warmup=1,
            model_test=self.model_test,
            seed=self.seed,
            reference=self.reference,
        )
        return problems(same)

    def plan(self) -> Plan:
        """Return one block per problem.

        Raises:
            FanalError: there is nothing to compare.
        """
        every = self.problems()
        if not every:
            raise FanalError("nothing to compare: give mixtures or models")
        blocks = [lambda found, make=make: _work(make, self) for _, make in every]
        return Plan(blocks, _close, "problems", {name: fingerprint(name) for name in self.models})


@functools.cache
def _steps(text: str, budget: int) -> int:
    """The most steps whose counted calls a budget allows; 0 where it does not even allow one."""
    solver = build_solver(text)

    def spent(steps: int) -> int:
        return calls_on(solver, torch.logspace(1, -2, steps + 1, dtype=torch.float64))

    # an analytical first step makes one call fewer than steps
    return bisect.bisect_right(range(1, budget + 2), budget, key=spent)


class _Bench:
    """One problem's cells: errors by name, and notes."""

    def __init__(self, problem: Problem, config: SolversConfig) -> None:
        self.problem, self.config = problem, config
        self.network = not isinstance(problem.model, Mixture)
        self.tensors: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {"problem": problem.name, "cells": {}, "quality": {}}
        self.budgets = config.model_calls if self.network else config.calls
        self.schedules = config.model_schedules if self.network else config.schedules

    def grid(self, schedule: str, steps: int) -> Tensor:
        model = self.problem.model
        sigmas = build_schedule(schedule, steps, model.sigma_min, model.sigma_max, zero=False)
        ends = torch.tensor([model.sigma_max, model.sigma_min], dtype=torch.float64)
        if not torch.allclose(sigmas[[0, -1]], ends, rtol=1e-3):
            raise FanalError(
                f"schedule {schedule!r} runs from {float(sigmas[0]):.6g} to {float(sigmas[-1]):.6g}, and the reference "
                f"of {self.problem.name} from {model.sigma_max} to {model.sigma_min}: compare grids with these ends"
            )
        return sigmas

    def path(self, text: str, schedule: str, budget: int) -> None:
        """Measure how far a solver ends from the reference."""
        solver = build_solver(text)
        steps = _steps(text, budget)
        if not steps:
            return
        counted = Counted(self.problem.model)
        student = Student(counted, self.problem.test, self.problem.ends, _BATCH)
        name, about = f"{text}|{schedule}|{budget}", {"steps": steps}
        try:
            errors = student.errors(self.grid(schedule, steps), solver).float()
        except NonFiniteError as error:
            self.notes["cells"][name] = {**about, "failed": str(error)}
            return
        self.tensors[name] = errors
        self.notes["cells"][name] = {**about, "calls": counted.calls / len(student.parts)}

    def judge(self) -> Judge:
        """What samples of this problem are judged by."""
        model, config = self.problem.model, self.config
        if isinstance(model, Mixture):
            return Judge(metrics.Pixels(), model.draw(4 * config.test, seed=config.seed))
        return Judge.of(dataset_of(card(self.problem.name), model), 4 * config.quality)

    def quality(self, solvers: list[str]) -> None:
        """Judge the samples that each solver makes, the same seeds for all."""
        config, judge, model = self.config, self.judge(), self.problem.model
        count, dtype = (config.quality if self.network else config.test), self.problem.test.dtype
        seeds = run_seeds(config.seed, count)
        x = noise(model.shape, seeds, model.sigma_max, stream=STREAM, dtype=dtype)
        for text in solvers:
            solver, schedule = build_solver(text), self.schedules[0]
            for budget in self.budgets:
                steps = _steps(text, budget)
                if not steps:
                    continue
                counted, ends = Counted(model), []
                for rows in torch.arange(count).split(_BATCH):
                    own = [seeds[b] for b in rows.tolist()]
                    ends.append(sample(counted, x[rows], self.grid(schedule, steps), solver, own))
                features, right = judge.look(torch.cat(ends))
                figures = {"kid": as_json(metrics.kid(features, judge.real))}
                if judge.rule:
                    figures["right"] = as_json(metrics.rate(right))
                self.notes["quality"][f"{text}|{schedule}|{budget}"] = {
                    **figures,
                    "steps": steps,
                    "calls": counted.calls / len(ends),
                }


def _work(make: Maker, config: SolversConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    begin = time.perf_counter()
    bench = _Bench(make(None), config)
    noisy = [text for text in config.solvers if draws(build_solver(text))]
    for text in config.solvers:
        for schedule in bench.schedules if text not in noisy else ():
            for budget in bench.budgets:
                bench.path(text, schedule, budget)
    if noisy and (config.quality or not bench.network):
        bench.quality([*(text for text in _BESIDE if text in config.solvers), *noisy])
    bench.notes["wall"] = time.perf_counter() - begin
    return bench.tensors, bench.notes


def _close(found: Sequence[Found], progress: Progress) -> Outcome:
    from fanal.bench.solver_tables import panels, results_of, tables

    results = results_of(found)
    return Outcome(results, tables(results), panels(results), whole(found))
