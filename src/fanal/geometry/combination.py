"""Which predictions a state is made of: an Euler run's states are convex combinations of them ([REG] eq. 17)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fanal.denoiser import expand
from fanal.errors import FanalError
from fanal.sampling import Solver, trace
from fanal.schedules import check_sigmas

__all__ = ["Shares", "shares", "shares_of"]

_ROUNDING = 1e-9


def _falling(sigmas: Tensor) -> Tensor:
    grid = check_sigmas(sigmas)
    if not float(grid[0]) > float(grid[-1]) or not bool(torch.isfinite(grid).all()):
        raise FanalError("shares are those of a run down from a finite sigma: give a decreasing grid")
    return grid


def shares(sigmas: Float[Tensor, " n1"]) -> Float[Tensor, "n1 n1"]:
    """Return the share of the start and of each prediction in each state of an Euler run, rows that sum to 1.

    Unrolled, `x' = (sigma'/sigma)·x + (1 − sigma'/sigma)·D` gives the start the share `sigma_n/sigma_0` of state n, and
    the prediction at `sigma_m` the share `sigma_n·(1/sigma_{m+1} − 1/sigma_m)`: they depend on the grid alone. Half of
    a state comes from the predictions made since sigma was twice as large.

    Args:
        sigmas: a decreasing grid of N intervals, from a finite level.

    Returns:
        (N+1, N+1): row n is of state n, column 0 the start's share, column m + 1 that of the prediction at `sigmas[m]`.

    Raises:
        FanalError: the grid is none, does not fall, or begins at infinity.
    """
    grid = _falling(sigmas)
    table = grid.new_zeros(len(grid), len(grid))
    table[0, 0] = 1
    for n in range(len(grid) - 1):
        ratio = grid[n + 1] / grid[n]
        table[n + 1] = ratio * table[n]
        table[n + 1, n + 1] = 1 - ratio
    return table


@dataclass(frozen=True, eq=False)
class Shares:
    """Which predictions the states of a solver's run are made of.

    Attributes:
        table: (N+1, 1 + C) float64: row n is of state n, column 0 the share of the start, column c + 1 that of the
            answer to call c. Rows of a solver that keeps to the data sum to 1; a combination is convex where none of
            its shares is negative.
        sigmas: (C,) float64, the level of each call.
        steps: (C,), the step that made it; the first call of a step is at its start, others are on the way.
        noise: whether the solver adds noise of its own, which is no prediction's.
    """

    table: Float[Tensor, "n1 c1"]
    sigmas: Float[Tensor, " c"]
    steps: Int[Tensor, " c"]
    noise: bool

    def affine(self) -> bool:
        """Whether each state is an affine combination: its shares sum to 1, to rounding."""
        return float((self.table.sum(1) - 1).abs().max()) < _ROUNDING

    def convex(self) -> bool:
        """Whether each state is a convex combination: an affine one, and no share is negative, to rounding."""
        return self.affine() and float(self.table.min()) > -_ROUNDING


class _Heard:
    """A denoiser that keeps what it was asked and what it answered, of samples of any shape."""

    def __init__(self) -> None:
        self.sigmas: list[float] = []
        self.answers: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        if unpack_dual(x).tangent is not None or x.requires_grad:
            raise _NoSum
        level = expand(sigma, x).double()
        self.sigmas.append(float(sigma.flatten()[0]))
        # nothing special: bent in x and in sigma
        self.answers.append(torch.tanh(x / (1 + level)) + 0.3 * torch.sin(x + level.log1p()))
        return self.answers[-1]


class _NoSum(Exception):
    """A solver looks at more than the values of predictions."""


class _Units:
    """A denoiser whose answer to call c is the unit vector c + 1, times a size: what becomes of it is seen there."""

    def __init__(self, size: float) -> None:
        self.calls, self.size = 0, size

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        self.calls += 1
        answer = torch.zeros_like(x)
        answer[:, min(self.calls, x.shape[1] - 1)] = self.size
        return answer


def _states(denoiser: _Heard | _Units, x: Tensor, grid: Tensor, solver: Solver) -> tuple[Tensor, list[int]]:
    """States (N+1, B, D) of a run, and the step that made each call."""
    steps, path = [], [x]
    with torch.no_grad():
        for transition in trace(denoiser, x, grid, solver, range(len(x))):
            count = denoiser.calls if isinstance(denoiser, _Units) else len(denoiser.answers)
            steps += [transition.span.i] * (count - len(steps))
            path.append(transition.step.x_next)
    return torch.stack(path), steps


def _measured(solver: Solver, grid: Tensor) -> tuple[Shares, float]:
    """Shares, and how far the states of a run of a bent function are from what they make of its answers."""
    heard = _Heard()
    x = float(grid[0]) * torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5)
    told, steps = _states(heard, x, grid, solver)
    start = torch.zeros(1, 1 + len(steps), dtype=torch.float64)
    drift = _states(_Units(0.0), start, grid, solver)[0]
    start[0, 0] = 1
    table = (_states(_Units(1.0), start, grid, solver)[0] - drift)[:, 0]
    table[0], drift_x = start[0], _states(_Units(0.0), torch.zeros_like(x), grid, solver)[0]
    again = torch.einsum("nc,cbd->nbd", table, torch.stack([x, *heard.answers])) + drift_x
    found = Shares(table, torch.tensor(heard.sigmas, dtype=grid.dtype), torch.tensor(steps), bool(drift_x.any()))
    return found, float((again - told).abs().max() / (float(grid[0]) + told.abs().max()))


def shares_of(solver: Solver, sigmas: Float[Tensor, " n1"], name: str | None = None) -> Shares:
    """Return the share of the start and of the answer to each call in each state of a solver's run.

    Solvers that move by weighted means of predictions, whatever their order, are linear in them, with coefficients that
    the grid alone decides. So a run from the first unit vector whose c-th answer is the next one has the shares for its
    coordinates; what a run from 0 with answers of 0 shows is the solver's own noise, and is taken off. That a solver
    is of this kind is tried: the states of a run of a bent function must be what the shares make of its answers.

    Euler's shares are `shares`, and never negative. A solver that extrapolates has negative ones; they sum to 1. Those
    of AFS do not: its first step shrinks x, where others ask for a prediction.

    Args:
        solver: of `fanal.solvers`, or any other.
        sigmas: a decreasing grid of N intervals, from a finite level.
        name: what the solver is called where it is refused; None: as its class is.

    Raises:
        FanalError: as `shares`, or the solver takes derivatives of predictions, or decides by their values.
    """
    grid = _falling(sigmas)
    try:
        found, off = _measured(solver, grid)
    except _NoSum:
        found, off = None, math.inf
    if found is None or not off <= _ROUNDING:
        raise FanalError(
            f"the states of {name or type(solver).__name__} are no weighted sums of predictions: it takes derivatives "
            "of them, or decides by their values; shares are those of solvers that do neither, such as euler, heun or "
            "dpmpp"
        )
    return found
