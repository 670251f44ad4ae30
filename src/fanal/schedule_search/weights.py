"""Free multistep weights: every linear multistep solver is one table of weights on the slopes seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanal.denoiser import Counted, Denoiser, slope
from fanal.errors import FanalError, is_number
from fanal.sampling import Solver, Span, Step, finish, sample
from fanal.schedules import check_sigmas

__all__ = ["BySteps", "Rows", "Weighted", "calls_of", "rows_of", "weights_of"]

Rows = tuple[tuple[float, ...], ...]
"""One row per step: the weights of the slopes seen so far, the newest first, in units of the step's length."""


def rows_of(values: Sequence[Sequence[float]]) -> Rows:
    """Return weights as a table, after a check that row n has 1 to n + 1 finite numbers.

    Raises:
        FanalError: it has not.
    """
    rows = tuple(tuple(float(v) if is_number(v) else math.nan for v in row) for row in values)
    if not rows or not all(1 <= len(row) <= n + 1 and all(map(is_number, row)) for n, row in enumerate(rows)):
        raise FanalError("weights must be one row per step, row n with 1 to n + 1 finite numbers, newest slope first")
    return rows


@dataclass(frozen=True)
class Weighted:
    """A linear multistep solver with weights of its own: `x' = x + (sigma' − sigma)·Σ_k c[n][k]·d_{n−k}`.

    Euler is `c[n] = (1,)`, iPNDM of order 2 `(3/2, −1/2)` after the first step, DPM-Solver++ has weights that depend
    on the grid. One call per step.

    Attributes:
        weights: one row per step of the only grid it fits.
    """

    weights: Rows

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", rows_of(self.weights))

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call.

        Raises:
            FanalError: the grid has another number of steps than there are rows.
        """
        if span.n != len(self.weights):
            raise FanalError(
                f"these weights are for {len(self.weights)} steps, the grid has {span.n}: use the grid they belong to"
            )
        if span.sigma_next == 0:
            return finish(denoiser, x, span)
        denoised = denoiser(x, span.sigma)
        seen = (slope(x, denoised, span.sigma), *memory)
        length = span.sigma_next - span.sigma
        x_next = x
        for weight, d in zip(self.weights[span.i], seen, strict=False):
            x_next = x_next + (length * weight) * d
        return Step(x_next, denoised, memory=seen[: max(map(len, self.weights)) - 1])


@dataclass(frozen=True)
class BySteps:
    """A solver for each number of steps, such as those of a schedule file.

    Attributes:
        solvers: pairs of a number of intervals and the solver for such grids.
    """

    solvers: tuple[tuple[int, Solver], ...]

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with the solver for its grid.

        Raises:
            FanalError: there is none for a grid of so many intervals.
        """
        for steps, solver in self.solvers:
            if steps == span.n:
                return solver.step(denoiser, x, span, memory)
        known = ", ".join(str(steps) for steps, _ in self.solvers)
        raise FanalError(f"these solvers are for {known} steps, the grid has {span.n}: use the grids they belong to")


class _Probe:
    """A denoiser whose slope at call n is the n-th unit vector, so that a solver's output spells its weights."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.levels: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        unit = torch.zeros_like(x)
        unit[0, min(len(self.states), x.shape[1] - 1)] = 1
        self.states.append(x)
        self.levels.append(float(sigma))
        return x - sigma * unit


def weights_of(solver: Solver, sigmas: Tensor) -> Rows | None:
    """Return a solver's weights on a grid, or None where it is no linear multistep solver with one call per step.

    They are read off one run on a denoiser whose slopes are unit vectors: exact for iPNDM, Adams–Bashforth, DEIS,
    DPM-Solver++ and UniPC alike, because their states are sums of slopes. Trailing zeros are dropped.

    Args:
        solver: any solver.
        sigmas: a grid that ends above 0. The step from an infinite first node is not the solver's, and its row is 1.

    Raises:
        FanalError: sigmas is no schedule.
    """
    grid = check_sigmas(sigmas)
    if torch.isinf(grid[0]):
        rest = weights_of(solver, grid[1:])
        return None if rest is None else ((1.0,), *rest)
    n, probe = len(grid) - 1, _Probe()
    start = torch.zeros(1, n + 1, dtype=torch.float64)
    start[0, n] = 1.0
    try:
        end = sample(probe, start, grid, solver)
    except FanalError:  # e.g. it draws noise, or its seeds are missing
        return None
    if probe.levels != grid[:-1].tolist():
        return None
    states = torch.cat([*probe.states, end])  # (n + 1, n + 1); column n must stay 1: x is carried on as it is
    if not torch.allclose(states[:, n], torch.ones(n + 1, dtype=torch.float64), atol=1e-9):
        return None
    jumps = states.diff(dim=0)[:, :n] / grid.diff()[:, None]
    rows = []
    for i in range(n):
        row = jumps[i, : i + 1].flip(0)
        last = int((row.abs() > 1e-12 * row.abs().max()).nonzero().max()) if bool(row.any()) else 0
        rows.append(tuple(row[: last + 1].tolist()))
    return tuple(rows)


def calls_of(solver: Solver, steps: int, far: bool = False) -> int:
    """Return the network calls that a solver makes over a grid of `steps` intervals ending above 0, by counting them.

    Args:
        solver: any solver.
        steps: number of intervals.
        far: whether the first one comes from infinity.

    Raises:
        FanalError: the solver cannot run without seeds.
    """
    counted = Counted(lambda x, sigma: x / (1 + sigma**2))
    grid = torch.logspace(1, -2, steps + 1, dtype=torch.float64)
    if far:
        grid[0] = torch.inf
    sample(counted, torch.ones(1, 1, dtype=torch.float64), grid, solver)
    return counted.calls
