"""The starts of a fit, the tournament among them, and the fit of the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fanal.errors import FanalError
from fanal.sampling import Solver
from fanal.schedule_search.cost import cost_matrix, first_row
from fanal.schedule_search.fitting import Fit, fit, judge
from fanal.schedule_search.paths import grids
from fanal.schedule_search.student import Student
from fanal.schedule_search.weights import weights_of
from fanal.schedules import SCHEDULES
from fanal.trajectory import Trajectory

__all__ = ["Contest", "starts"]

_FIXED = ("polynomial", "logsnr", "quadratic")


def starts(
    teacher: Trajectory, steps: Sequence[int], coeff: float = 1.15, afs: bool = False
) -> dict[int, dict[str, Tensor]]:
    """Return, for each number of steps, the grids that compete as starts of a fit, without a network call.

    Three fixed ones, GITS with `dev` and `l2`, and `damped`: the shortest path for Euler's local errors, each carried
    to the end by the contraction of a Gaussian as wide as the data, `sqrt((v + sigma_T²)/(v + sigma_j²))`.

    Args:
        teacher: its run.
        steps: numbers of intervals that cost calls.
        coeff: γ of GITS.
        afs: whether one further interval with the analytical slope comes first.
    """
    sigmas, found = teacher.sigmas, {k: dict[str, Tensor]() for k in steps}
    for name in _FIXED:
        for k in steps:
            try:
                grid = SCHEDULES[name](k + afs, float(sigmas[-1]), float(sigmas[0]), zero=False)
            except FanalError:  # this kind of grid does not exist between these ends
                continue
            found[k][name] = grid
    plain = cost_matrix(teacher, "l2")
    variance = float(teacher.x[-1].var())
    shrink = ((variance + sigmas[-1] ** 2) / (variance + sigmas**2)).sqrt()
    dev, l2 = (first_row(teacher, metric) if afs else None for metric in ("dev", "l2"))
    free = {
        "gits-dev": grids(cost_matrix(teacher), sigmas, steps, coeff, dev),
        "gits-l2": grids(plain, sigmas, steps, coeff, l2),
        "damped": grids(plain * shrink, sigmas, steps, 1.0, None if l2 is None else l2 * shrink),
    }
    for name, by_steps in free.items():
        for k in steps:
            found[k][name] = by_steps[k]
    return found


@dataclass(frozen=True, eq=False)
class Contest:
    """Starts compete on the student's own sampler, and the winner is fitted.

    Attributes:
        student: samples and the teacher's end points.
        starts: grids by number of steps and name.
        objective: `robust` or `mean`.
        iterations: of each fit, at most.
        free: whether the solver's weights are fitted too.
    """

    student: Student
    starts: Mapping[int, Mapping[str, Tensor]]
    objective: str
    iterations: int
    free: bool

    def best(self, steps: int, solver: Solver) -> tuple[str, Tensor, float]:
        """Return name, grid and score of the start on which the solver ends nearest to the teacher.

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
        pick = min(scores, key=scores.__getitem__)
        return pick, self.starts[steps][pick], scores[pick]

    def fit(self, grid: Tensor, solver: Solver) -> Fit:
        """Fit a grid, then free the solver's weights if they are to be.

        Raises:
            FanalError: weights are wanted of a solver that has none.
        """
        first = max(1, self.iterations - 1) if self.free else self.iterations
        nodes = fit(self.student, grid, solver, objective=self.objective, iterations=first)
        if not self.free:
            return nodes
        rows = weights_of(solver, nodes.sigmas)
        if rows is None:
            raise FanalError(
                f"{type(solver).__name__} has no multistep weights to fit: use method 'fit', or a linear multistep "
                "solver with one call per step, such as ipndm"
            )
        both = fit(
            self.student, nodes.sigmas, solver, weights=rows, objective=self.objective, iterations=self.iterations
        )
        return Fit(both.sigmas, both.weights, nodes.start, both.score)
