"""The starts of a fit, the tournament among them, and the fit of the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanal.errors import FanalError
from fanal.sampling import Solver
from fanal.schedule_search.cost import cost_matrix
from fanal.schedule_search.fitting import Fit, fit, judge
from fanal.schedule_search.paths import grids
from fanal.schedule_search.student import Student
from fanal.schedule_search.weights import weights_of
from fanal.schedules import SCHEDULES
from fanal.trajectory import Trajectory

__all__ = ["Contest", "starts", "with_free_step"]

_FIXED = ("polynomial", "logsnr", "quadratic")


def starts(
    teacher: Trajectory, steps: Sequence[int], coeff: float = 1.15, afs: bool = False
) -> dict[int, dict[str, Tensor]]:
    """Return, for each number of steps, the grids that compete as starts of a fit, without a network call.

    Three fixed ones, GITS with `dev` and `l2`, with γ as given and with γ = 1, and `damped`: the shortest path for
    Euler's local errors, each carried to the end by the contraction of a Gaussian as wide as the data,
    `sqrt((v + sigma_T²)/(v + sigma_j²))`.

    Args:
        teacher: its run.
        steps: numbers of intervals that cost calls.
        coeff: γ of GITS; paths that are found twice compete once.
        afs: whether a further interval with the analytical slope comes first: its node lies in the first jump, at a
            quarter of its length in log sigma from the end.
    """
    sigmas, found = teacher.sigmas, {k: dict[str, Tensor]() for k in steps}
    far = bool(torch.isinf(sigmas[0]))
    for name in _FIXED:
        for k in steps:
            try:
                grid = SCHEDULES[name](k, float(sigmas[-1]), float(sigmas[int(far)]), zero=False)
                grid[0] = sigmas[0]
            except FanalError:  # this kind of grid does not exist between these ends
                continue
            found[k][name] = grid
    dev, plain = cost_matrix(teacher), cost_matrix(teacher, "l2")
    variance = float(teacher.x[-1].var())
    shrink = ((variance + sigmas[-1] ** 2) / (variance + sigmas**2)).sqrt()
    free = {
        "gits-dev": grids(dev, sigmas, steps, coeff),
        "gits-l2": grids(plain, sigmas, steps, coeff),
        "gits-dev-1": grids(dev, sigmas, steps, 1.0),
        "gits-l2-1": grids(plain, sigmas, steps, 1.0),
        "damped": grids(plain * shrink, sigmas, steps, 1.0),
    }
    for name, by_steps in free.items():
        for k in steps:
            if not any(torch.equal(by_steps[k], other) for other in found[k].values()):
                found[k][name] = by_steps[k]
    if afs:
        found = {k: {name: _inserted(grid) for name, grid in own.items()} for k, own in found.items()}
    return found


def _inserted(grid: Tensor) -> Tensor:
    return torch.cat([grid[:1], (grid[0].log() / 4 + 3 * grid[1].log() / 4).exp()[None], grid[1:]])


def with_free_step(student: Student, grid: Tensor, sigmas: Tensor, solver: Solver) -> Tensor:
    """Insert the node at which the analytical first step ends: of those of the teacher's grid inside the first jump,
    the one from which the student ends nearest to the teacher in the mean. A first jump without any is left whole.

    Every candidate costs its run.

    Args:
        student: samples and the teacher's end points, with `afs`.
        grid: the path that was found.
        sigmas: the teacher's grid.
        solver: the student's solver.
    """
    inside = [node for node in sigmas if float(grid[1]) < float(node) < float(grid[0])]
    candidates = [torch.cat([grid[:1], node[None], grid[1:]]) for node in inside]
    return min(candidates, key=lambda c: judge(student.residual(c, solver)[0], "robust"), default=grid)


@dataclass(frozen=True, eq=False)
class Contest:
    """Starts compete on the student's own sampler, and the winner is fitted.

    Attributes:
        student: samples and the teacher's end points.
        starts: grids by number of steps and name.
        objective: one of `OBJECTIVES`.
        iterations: of each stage, at most; nodes alone get twice as many of the mean objective.
        free: whether the solver's weights are fitted too.
    """

    student: Student
    starts: Mapping[int, Mapping[str, Tensor]]
    objective: str
    iterations: int
    free: bool

    def ranked(self, steps: int, solver: Solver) -> dict[str, float]:
        """Return scores by name of start, the one on which the solver ends nearest to the teacher first.

        Raises:
            FanalError: the solver ends in finite numbers on none of them.
        """
        scores: dict[str, float] = {}
        for name, grid in self.starts[steps].items():
            try:
                scores[name] = judge(self.student.residual(grid, solver)[0], self.objective)
            except FanalError:  # a grid on which the solver leaves the range of numbers is no candidate
                continue
        if not scores:
            raise FanalError(f"the solver reaches finite numbers on none of the grids of {steps} steps: try more steps")
        return dict(sorted(scores.items(), key=lambda item: item[1]))

    def winner(self, steps: int, solver: Solver, tries: int = 1) -> tuple[str, Fit]:
        """Return the best fit of the best starts, and the start's name.

        Args:
            steps: number of intervals.
            solver: the student's solver.
            tries: how many starts are fitted.

        Raises:
            FanalError: as `ranked` and `fit`.
        """
        fits = {name: self.fit(self.starts[steps][name], solver) for name in [*self.ranked(steps, solver)][:tries]}
        return min(fits.items(), key=lambda item: item[1].score)

    def fit(self, grid: Tensor, solver: Solver) -> Fit:
        """Fit a grid, then free the solver's weights if they are to be; the mean objective has the last word.

        A fit to the mean square of misses gets lost among the few large ones unless the typical ones are small already,
        so that objective begins with the robust one.

        Raises:
            FanalError: weights are wanted of a solver that has none.
        """
        first = max(1, self.iterations - 1) if self.free else self.iterations
        own = "robust" if self.objective == "mean" else self.objective
        begun = found = fit(self.student, grid, solver, objective=own, iterations=first)
        if self.free:
            rows = weights_of(solver, found.sigmas)
            if rows is None:
                raise FanalError(
                    f"{type(solver).__name__} has no multistep weights to fit: use method 'fit', or a linear multistep "
                    "solver with one call per step, such as ipndm"
                )
            found = fit(self.student, found.sigmas, solver, weights=rows, objective=own, iterations=self.iterations)
        if self.objective == "mean":
            found = fit(
                self.student,
                found.sigmas,
                solver,
                weights=found.weights,
                objective="mean",
                iterations=self.iterations if self.free else 2 * self.iterations,
            )
        return Fit(found.sigmas, found.weights, begun.start, found.score)
