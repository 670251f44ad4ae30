"""A model under GITS's studies: its teacher, its test samples, and how a schedule is judged on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fanal import metrics
from fanal.bench.quality import Judge, dataset_of
from fanal.bench.schedules import Problem
from fanal.config import build_schedule, build_solver
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.gits import Search, search
from fanal.loading import card, load
from fanal.metrics.statistics import Statistics
from fanal.sampling import Solver, sample
from fanal.summary import as_json

__all__ = ["Sizes", "Subject"]

_BATCH = 64


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        solvers: students, as on the command line, on `polynomial` and on GITS's grids.
        thorough: those that the other fixed grids are tried with too, and that γ is varied for.
        fitted: those that grids, and grids with weights, are fitted to.
        student: the student of the other studies.
        calls: budgets of network calls.
        fewer: budgets of the fits, and of the study with many searches.
        nodes: of the teacher's grid.
        teachers: solvers of the teacher.
        warmups: numbers of warm-up samples.
        seeds: how many sets of warm-up samples there are of each number.
        coeffs: γ without the analytical first step.
        free: γ with it.
        proofs: numbers of jumps that are checked on every third node of the teacher's grid; on all nodes, up to 5.
        warmup: warm-up samples of the other searches.
        test: test samples of a model.
        light: test samples of a model with at most 64 entries, which costs little.
        alone: how many test samples get a schedule of their own.
        reference: steps of the fourth-order reference.
    """

    solvers: tuple[str, ...] = (
        "euler",
        "dpm2",
        "dpmpp:order=2",
        "dpmpp:order=3",
        "deis:order=4",
        "unipc:order=2",
        "ipndm:order=4",
    )
    thorough: tuple[str, ...] = ("euler", "ipndm:order=4")
    fitted: tuple[str, ...] = ("ipndm:order=4",)
    student: str = "ipndm:order=4"
    calls: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9, 10)
    fewer: tuple[int, ...] = (5, 6, 8, 10)
    nodes: tuple[int, ...] = (11, 21, 41, 61, 81, 101)
    teachers: tuple[str, ...] = ("euler", "heun", "dpm2", "dpmpp:order=3", "ipndm:order=4")
    warmups: tuple[int, ...] = (1, 4, 16, 64)
    seeds: int = 4
    coeffs: tuple[float, ...] = (1.0, 1.05, 1.1, 1.15, 1.2)
    free: tuple[float, ...] = (1.1, 1.15, 1.2)
    proofs: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9, 10)
    warmup: int = 32
    test: int = 64
    light: int = 128
    alone: int = 32
    reference: int = 80

    def __post_init__(self) -> None:
        for text in (*self.solvers, *self.thorough, *self.fitted, *self.teachers, self.student):
            build_solver(text)
        if min(self.test, self.light, self.alone) < 3 or self.alone > self.test:
            raise FanalError(f"take at least 3 test samples, and no more alone ({self.alone}) than there are")
        if min(self.warmup, *self.warmups, self.seeds) < 1:
            raise FanalError("a search needs at least 1 warm-up sample, and a study at least 1 set of them")
        if not self.calls or min(self.calls) < 2 or not set(self.fewer) <= set(self.calls):
            raise FanalError(f"budgets are 2 calls or more, got {self.calls}, and {self.fewer} among them")

    @classmethod
    def quick(cls) -> Sizes:
        """Return a size that takes seconds on a small model."""
        return cls(
            solvers=("euler", "dpm2", "ipndm:order=4"),
            calls=(4, 5),
            fewer=(4,),
            nodes=(11, 61),
            teachers=("euler", "ipndm:order=4"),
            warmups=(1, 4),
            seeds=2,
            coeffs=(1.0, 1.15),
            free=(1.15,),
            proofs=(3, 4),
            warmup=8,
            test=16,
            light=32,
            alone=4,
        )


class Subject:
    """A model under study: its searches, and the test samples that schedules are judged by.

    Args:
        name: of the model.
        sizes: of the studies.
        seed: run seed.

    Raises:
        FanalError: the model's card names no data.
    """

    def __init__(self, name: str, sizes: Sizes, seed: int) -> None:
        self.name, self.sizes, self.seed, self.model = name, sizes, seed, load(name)
        self.dataset = dataset_of(card(name), self.model)
        self.student = build_solver(sizes.student)
        self.ends: Tensor | None = None
        self.known: dict[tuple[str, tuple[float, ...]], tuple[Tensor, dict[str, Any]]] = {}

    @cached_property
    def count(self) -> int:
        """Test samples."""
        return self.sizes.light if torch.Size(self.model.shape).numel() <= 64 else self.sizes.test

    @cached_property
    def problem(self) -> Problem:
        """Warm-up and test samples, and the true ends of the test samples: those of an earlier block, or new ones."""
        sizes = self.sizes.warmup, self.count, self.sizes.reference
        return Problem.make(self.name, self.model, sizes, self.seed, torch.float32, self.ends)

    @cached_property
    def judge(self) -> Judge:
        """Held-out data, four times as many as test samples."""
        return Judge.of(self.dataset, 4 * self.count)

    @cached_property
    def real(self) -> Statistics:
        """Moments of the held-out data."""
        return Statistics.of(self.judge.real, self.judge.extract.name, self.judge.extract.sha256)

    @cached_property
    def base(self) -> Search:
        """GITS with the authors' defaults, for every number of steps."""
        return self.search(steps=range(2, max(self.sizes.calls) + 1))

    def search(self, x: Tensor | int | None = None, steps: Sequence[int] = (), **options: Any) -> Search:
        """Run a search, on the warm-up samples and for all budgets unless told otherwise."""
        warm = self.problem.warm if x is None else x
        return search(self.model, warm, list(steps or self.sizes.calls), batch=_BATCH, **options)

    def fixed(self, name: str, steps: int) -> Tensor:
        """Return a named grid between the model's ends."""
        return build_schedule(name, steps, self.model.sigma_min, self.model.sigma_max, zero=False)

    def errors(self, x: Tensor) -> Tensor:
        """Return the root mean square distance per entry of the first samples from their true ends."""
        return (x - self.problem.ends[: len(x)]).flatten(1).double().square().mean(1).sqrt().float()

    def figures(self, x: Tensor) -> dict[str, Any]:
        """Return Fréchet and kernel distance to held-out data, and the share of right samples where there is a rule."""
        features, right = self.judge.look(x)
        own = Statistics.of(features, self.judge.extract.name, self.judge.extract.sha256)
        out = {"fid": as_json(metrics.fid(own, self.real)), "kid": as_json(metrics.kid(features, self.judge.real))}
        if self.judge.rule:
            out["right"] = as_json(metrics.rate(right))
        return out

    def measure(self, sigmas: Tensor, solver: Solver) -> tuple[Tensor, dict[str, Any]]:
        """Return each test sample's error and the figures of the samples; a grid is run once with each solver."""
        key = repr(solver), tuple(sigmas.tolist())
        if key not in self.known:
            counted, x = Counted(self.model), self.problem.test
            ends = torch.cat([sample(counted, part, sigmas, solver) for part in x.split(_BATCH)])
            spent = counted.evaluations / len(x)
            self.known[key] = self.errors(ends), {"sigmas": sigmas.tolist(), "calls": spent, **self.figures(ends)}
        return self.known[key]
