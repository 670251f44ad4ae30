"""Schedule search: GITS as published, and fits of grid and weights to the student's own sampler.

`gits` ([REG] sec. 5.1, alg. 1) looks for the shortest path through the teacher's states, where every jump is one Euler
step; the student's solver never enters. `fit` starts from the best of several grids, GITS's among them, and moves the
nodes until the student's own sampler ends where the teacher does; `fit-weights` frees the solver's multistep weights
too. A fit's reference is its teacher, so it cannot become better than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Counted, Denoiser, Model, counters
from fanal.errors import FanalError, unknown_name
from fanal.runs import Progress, quiet
from fanal.sampling import Solver
from fanal.schedule_search.cost import Metric, cost_matrix
from fanal.schedule_search.errors import Error, error_of
from fanal.schedule_search.fitting import OBJECTIVES, judge
from fanal.schedule_search.laps import Laps
from fanal.schedule_search.paths import grids
from fanal.schedule_search.student import Student, teach
from fanal.schedule_search.tournament import Contest, starts, with_free_step
from fanal.schedule_search.weights import Rows, Weighted, calls_of, weights_of
from fanal.schedules import check_sigmas, polynomial
from fanal.seeding import noise, run_seeds
from fanal.solvers import AFS, IPNDM
from fanal.trajectory import Trajectory

__all__ = ["METHODS", "Choice", "Search", "choose", "default_solver", "search", "teacher_grid"]

METHODS = ("gits", "fit", "fit-weights")
"""`gits`: as published. `fit`: nodes fitted to the student. `fit-weights`: nodes and multistep weights."""

_INTERVALS = 60  # of the teacher's grid in [REG]
_FAR = 1000.0  # where noise hides data of unit size to a thousandth; t = 0.999 of flow matching


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found.

    Attributes:
        schedules: the grids, by number of steps; with `afs` each has one more interval, which costs no call.
        weights: by number of steps, where they were searched too; see `fanal.schedule_search.Weighted`.
        error: by number of steps, on held-out samples; empty where there were none.
        picks: by number of steps, the start that won the tournament; empty for `gits`.
        cost: (G, G), the cost of each jump on the teacher's grid; infinite where there is no jump.
        seconds: by stage: teacher, cost, dp, fit, holdout.
        calls: network calls per warm-up sample, counted; those for held-out samples are not among them.
        breakdown: the same by stage: `teacher`, `5`, `6`, … for each number of steps; `holdout` per held-out sample.
        teacher: its run over the warm-up samples.
        pilot: the teacher's solver.
        judged: its run over the held-out samples; None where there were none.
        solver: the student's solver.
        method: how it was searched.
        afs: whether the first interval uses the analytical slope.
    """

    schedules: dict[int, Float[Tensor, " n"]]
    weights: dict[int, Rows]
    error: dict[int, Error]
    picks: dict[int, str]
    cost: Float[Tensor, "g g"]
    seconds: dict[str, float]
    calls: float
    breakdown: dict[str, float]
    teacher: Trajectory
    pilot: Solver
    judged: Trajectory | None
    solver: Solver
    method: str
    afs: bool

    def solver_for(self, steps: int) -> Solver:
        """Return the solver for a schedule: the student's, with the searched weights and the analytical first step."""
        solver = Weighted(self.weights[steps]) if steps in self.weights else self.solver
        return AFS(solver) if self.afs else solver


def default_solver() -> Solver:
    """Return the teacher and student of [REG]: iPNDM of order 4."""
    return IPNDM(order=4)


def _drawn(denoiser: Denoiser, x: Tensor | int, sigma: float, seed: int, device: torch.device | str) -> Tensor:
    """The given warm-up samples, or so many drawn on a stream of their own: never the noise of a run that samples."""
    if isinstance(x, Tensor):
        return x
    if not isinstance(denoiser, Model) or x < 1:
        raise FanalError("pass x as noise at the first sigma, or a positive number of samples of a model with a shape")
    return noise(denoiser.shape, run_seeds(seed, x), sigma, stream="warm-up", device=device)


def teacher_grid(denoiser: Denoiser, intervals: int = _INTERVALS) -> Float[Tensor, " n"]:
    """Return the polynomial grid over a model's range, which ends above 0.

    Flow matching and its like begin at infinity: then the first interval leads from there to sigma = 1000, and the
    others on from it. Searched grids keep the infinite node, and have their first finite one where it is best.

    Args:
        denoiser: the model.
        intervals: how many.

    Raises:
        FanalError: the denoiser does not say its range.
    """
    if not isinstance(denoiser, Model):
        raise FanalError("this denoiser does not say its range of sigma: pass the teacher's grid as sigmas=")
    if denoiser.sigma_max == math.inf:
        finite = polynomial(intervals - 1, denoiser.sigma_min, _FAR, zero=False)
        return torch.cat([finite.new_full((1,), math.inf), finite])
    return polynomial(intervals, denoiser.sigma_min, denoiser.sigma_max, zero=False)


def _check(method: str, objective: str, afs: bool, grid: Tensor, *solvers: object) -> None:
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    if not float(grid[-1]) < float(grid[0]) or (math.isinf(grid[0]) and len(grid) < 3):
        raise FanalError(
            f"the teacher's grid must fall, got {float(grid[0])} to {float(grid[-1])} in {len(grid)} nodes"
        )
    if afs and math.isinf(grid[0]):
        raise FanalError("this grid begins at infinity, and the step from there is the model's: leave afs out")
    if method != "gits" and float(grid[-1]) == 0:
        raise FanalError("a fit needs a teacher's grid that ends above 0: make it with zero=False")
    for solver in solvers:
        if isinstance(solver, type) or not isinstance(solver, Solver):
            raise FanalError(f"solvers must be objects such as fanal.solvers.Euler(), got {solver!r:.60}")


def _teacher(
    network: Denoiser,
    x: Tensor | int,
    sigmas: Tensor | None,
    teacher: Solver | Search | None,
    seed: int,
    batch: int | None,
    progress: Progress,
    device: torch.device | str,
) -> tuple[Trajectory, Solver]:
    """The teacher's run over the warm-up samples, new or an earlier search's, and its solver."""
    if isinstance(teacher, Search):
        if sigmas is not None:
            raise FanalError("a teacher from an earlier search brings its own grid: leave sigmas out")
        return teacher.teacher, teacher.pilot
    grid = teacher_grid(network) if sigmas is None else check_sigmas(sigmas)
    pilot = default_solver() if teacher is None else teacher
    _check("gits", "robust", False, grid, pilot)
    warm = _drawn(network, x, float(grid[0]), seed, device)
    return teach(network, warm, grid, pilot, batch, progress), pilot


def search(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"] | int,
    steps: int | Sequence[int],
    *,
    solver: Solver | None = None,
    method: str = "gits",
    sigmas: Tensor | None = None,
    coeff: float = 1.15,
    teacher: Solver | Search | None = None,
    metric: str | Metric = "dev",
    afs: bool = False,
    objective: str = "robust",
    seed: int = 0,
    holdout: Float[Tensor, "h *d"] | int | None = None,
    iterations: int = 3,
    tries: int = 1,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
) -> Search:
    """Search the grids on which a solver with few steps ends nearest to a teacher with many.

    Args:
        denoiser: the model.
        x: warm-up noise at the first sigma, or how many samples of it to draw.
        steps: numbers of intervals; one search yields them all.
        solver: the student's; None: iPNDM of order 4. `gits` does not look at it.
        method: `gits`, `fit` or `fit-weights`; see `METHODS`.
        sigmas: the teacher's grid; None: 61 nodes of the polynomial grid over the model's range (`teacher_grid`).
        coeff: γ of GITS; above 1 it moves nodes to smaller sigma.
        teacher: the teacher's solver (None: iPNDM of order 4), or an earlier search whose teacher, warm-up and
            held-out samples are used again; x is then not looked at.
        metric: cost of a jump: `dev`, `l1`, `l2`, or a function of predicted and teacher states.
        afs: put a free interval with the analytical slope `x/sqrt(1 + sigma²)` before the others. `gits` inserts its
            node into the first jump where the student ends nearest to the teacher, which costs calls.
        objective: what a fit makes small: `robust`, the mean miss; `typical`, about the geometric mean, which hardly
            sees the few that end elsewhere; or, after the first, `mean`, the mean square (take 256 samples; it costs
            two to three times the calls).
        seed: run seed of what is drawn here.
        holdout: noise for the error estimate, or how many samples of it to draw; None: as many as x for a fit, none for
            `gits`, which without `afs` makes no call beyond the teacher's.
        iterations: of each stage of a fit, at most; nodes alone get twice as many of the mean objective.
        tries: how many of the best starts are fitted; the fit that ends nearest to the teacher is kept. Each costs its
            own calls, and two or three find better ones where starts are close.
        batch: samples computed together; None: all.
        device: where samples that are drawn here go; that of the model.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: an argument does not fit; the message says which.
    """
    network = denoiser if counters(denoiser) else Counted(denoiser)
    student = default_solver() if solver is None else solver
    wanted = [steps] if isinstance(steps, int) else list(dict.fromkeys(steps))
    if tries < 1:
        raise FanalError(f"tries must be at least 1, got {tries}")
    laps = Laps(network)
    run, pilot = _teacher(network, x, sigmas, teacher, seed, batch, progress, device)
    _check(method, objective, afs, run.sigmas, student)
    warm = run.x[0]
    laps("teacher", "teacher", len(warm))
    cost = cost_matrix(run, metric)
    laps("cost")
    schedules = grids(cost, run.sigmas, wanted, coeff)
    laps("dp")
    found = Search(schedules, {}, {}, {}, cost, laps.seconds, 0.0, laps.calls, run, pilot, None, student, method, afs)
    here = Student(network, warm, run.x[-1], batch, afs)
    if method == "gits" and afs:
        for k in progress(wanted, "first steps"):
            schedules[k] = with_free_step(here, schedules[k], run.sigmas, student)
            laps("afs", str(k), len(warm))
    if method != "gits":
        contest = Contest(
            here,
            starts(run, wanted, coeff, afs),
            objective,
            iterations,
            method == "fit-weights",
        )
        for k in progress(wanted, "fitting"):
            found.picks[k], best = contest.winner(k, student, tries)
            found.schedules[k] = best.sigmas
            if best.weights is not None:
                found.weights[k] = best.weights
            laps("fit", str(k), len(warm))
    found = replace(found, calls=sum(laps.calls.values()))
    return _judge(found, network, teacher, holdout, seed, batch, progress, laps)


def _judge(
    found: Search,
    network: Denoiser,
    teacher: Solver | Search | None,
    holdout: Tensor | int | None,
    seed: int,
    batch: int | None,
    progress: Progress,
    laps: Laps,
) -> Search:
    """Add the errors on held-out samples."""
    warm = found.teacher.x[0]
    run = teacher.judged if isinstance(teacher, Search) and holdout is None else None
    if run is None:
        wanted = (0 if found.method == "gits" else len(warm)) if holdout is None else holdout
        if not isinstance(wanted, Tensor) and wanted <= 0:
            return found
        top = float(found.teacher.sigmas[0])
        fresh = wanted
        if not isinstance(fresh, Tensor):
            seeds = run_seeds(seed, fresh)
            fresh = noise(warm.shape[1:], seeds, top, stream="holdout", dtype=warm.dtype, device=warm.device)
        run = teach(network, fresh, found.teacher.sigmas, found.pilot, batch, progress, "held-out teacher")
    student = Student(network, run.x[0], run.x[-1], batch)
    for k, grid in found.schedules.items():
        found.error[k] = error_of(student.errors(grid, found.solver_for(k)))
    laps("holdout", "holdout", len(run.x[0]))
    return replace(found, judged=run)


@dataclass(frozen=True, eq=False)
class Choice:
    """The best of several solvers for a budget of calls.

    Attributes:
        name: of the solver.
        steps: number of intervals that its calls allow.
        search: its search.
        scores: of every solver's best start, and of every finalist's fit under `NAME, fitted`; smaller is better.
    """

    name: str
    steps: int
    search: Search
    scores: dict[str, float]


def choose(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"] | int,
    calls: int | Sequence[int],
    solvers: Mapping[str, Solver],
    *,
    method: str = "fit-weights",
    teacher: Solver | Search | None = None,
    objective: str = "robust",
    finalists: int = 3,
    seed: int = 0,
    holdout: Float[Tensor, "h *d"] | int | None = None,
    iterations: int = 3,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
) -> dict[int, Choice]:
    """Search solver and grid together, for each budget of network calls, with one teacher for all.

    Every solver takes as many steps as the budget allows, on every start; the best few are fitted, with their weights
    where the method frees them and the solver has some, and the one that ends nearest to the teacher is chosen.

    Args:
        denoiser: the model.
        x: warm-up noise at the model's first sigma, or how many samples of it to draw.
        calls: budgets of calls per sample.
        solvers: the candidates, by name.
        method: `fit` or `fit-weights`.
        teacher: as in `search`.
        objective: as in `search`.
        finalists: how many solvers are fitted for each budget.
        seed: as in `search`.
        holdout: as in `search`.
        iterations: as in `search`.
        batch: as in `search`.
        device: as in `search`.
        progress: as in `search`.

    Raises:
        FanalError: an argument does not fit, or no solver can work with a budget.
    """
    if method == "gits" or not solvers:
        raise FanalError("choosing needs solvers and a method that runs them: fit or fit-weights")
    network = denoiser if counters(denoiser) else Counted(denoiser)
    budgets = [calls] if isinstance(calls, int) else list(dict.fromkeys(calls))
    base = teacher if isinstance(teacher, Search) else None
    if base is None:
        kept = (len(x) if isinstance(x, Tensor) else x) if holdout is None else holdout
        drawn = {"seed": seed, "holdout": kept, "batch": batch, "device": device}
        base = search(network, x, 2, teacher=teacher, progress=progress, **drawn)
    far = math.isinf(base.teacher.sigmas[0])
    again = isinstance(teacher, Search) or (isinstance(holdout, int) and holdout == 0)
    found: dict[int, Choice] = {}
    for budget in progress(budgets, "choosing"):
        steps = {name: k for name, solver in solvers.items() if (k := _steps_for(solver, budget, far))}
        if not steps:
            raise FanalError(f"no solver takes a step with {budget} calls: give more calls")
        grids_ = starts(base.teacher, sorted(set(steps.values())))
        student = Student(network, base.teacher.x[0], base.teacher.x[-1], batch)
        contest = Contest(student, grids_, objective, iterations, False)
        scores = {name: min(contest.ranked(k, solvers[name]).values()) for name, k in steps.items()}
        fitted: dict[str, Search] = {}
        for name in sorted(scores, key=scores.__getitem__)[:finalists]:
            k, weighted = steps[name], method == "fit-weights"
            weighted = weighted and weights_of(solvers[name], next(iter(grids_[k].values()))) is not None
            fitted[name] = search(
                network,
                x,
                k,
                solver=solvers[name],
                method="fit-weights" if weighted else "fit",
                teacher=base,
                objective=objective,
                seed=seed,
                holdout=holdout if again else None,
                iterations=iterations,
                batch=batch,
            )
            missed, _ = student.residual(fitted[name].schedules[k], fitted[name].solver_for(k))
            scores[f"{name}, fitted"] = judge(missed, objective)
        best = min(fitted, key=lambda name: scores[f"{name}, fitted"])
        found[budget] = Choice(best, steps[best], fitted[best], scores)
    return found


def _steps_for(solver: Solver, budget: int, far: bool) -> int:
    """The most steps that a solver can take with a budget of calls, by counting them; 0 where not even one."""
    return max((k for k in range(1 + far, budget + 1) if calls_of(solver, k, far) <= budget), default=0)
