"""Levenberg–Marquardt on the student's own sampler: where its end points miss the teacher's, move nodes and weights.

The nodes are `log sigma_k = log sigma_0 − L·(w_1 + … + w_k)` with `w = softmax(θ)` and L the grid's length in log
sigma, so that the ends stay and the order is kept. The residual of sample b is its end point minus the teacher's. Its
derivatives are finite differences of whole runs: node k changes the calls from k on only, and no gradient of the
network is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError, unknown_name
from fanal.sampling import Solver
from fanal.schedule_search.student import Student
from fanal.schedule_search.weights import Rows, Weighted
from fanal.schedules import check_sigmas

__all__ = ["OBJECTIVES", "Fit", "fit", "judge"]

OBJECTIVES = ("robust", "typical", "mean")
"""`robust`: about the mean norm of the misses, forgiving to the few samples that end elsewhere. `typical`: about their
geometric mean, which hardly sees these few. `mean`: their mean square, which they dominate."""

_RIDGE = 1e-3  # price of moving all weights by 1 in total, in units of the first loss
_FURTHEST = 0.7  # largest change of a parameter in one step
_TRIES = 4
_LEAST = 1e-30  # smallest miss that is told from none
_SMALL = 0.02  # share of the loss that an iteration must gain, or more than the gain's error, to have a successor
_FREE = 3  # weights of a row that are fitted; those of older slopes, where a solver has any, stay


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted grid.

    Attributes:
        sigmas: the grid.
        weights: its weights, where they were free; else None.
        start: what the start scored (see `judge`).
        score: what the fit scores.
    """

    sigmas: Float[Tensor, " n"]
    weights: Rows | None
    start: float
    score: float


def judge(residual: Float[Tensor, "b d"], objective: str) -> float:
    """Return one number to compare candidates by: the misses' mean norm, their geometric mean or their mean square.

    Raises:
        FanalError: the objective is unknown.
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    norms = torch.linalg.vector_norm(residual.double() if residual.device.type != "mps" else residual, dim=1)
    if objective == "typical":
        return float(norms.clamp_min(_LEAST).log().mean().exp())
    return float(norms.mean() if objective == "robust" else norms.square().mean())


@dataclass(frozen=True, eq=False)
class _Point:
    """Nodes and weights as one vector: θ of every interval, then the weights of the newest slopes row by row."""

    top: float
    length: float
    theta: Tensor
    weights: Tensor
    kept: Rows
    solver: Solver

    @classmethod
    def at(cls, sigmas: Tensor, solver: Solver, rows: Rows | None) -> _Point:
        logs = sigmas.log()
        share = -logs.diff() / (logs[0] - logs[-1])
        flat = torch.tensor([v for row in rows or () for v in row[:_FREE]], dtype=torch.float64)
        return cls(float(logs[0]), float(logs[0] - logs[-1]), share.log(), flat, rows or (), solver)

    def moved(self, step: Tensor) -> _Point:
        n = len(self.theta)
        parts = self.theta + step[:n], self.weights + step[n:]
        return _Point(self.top, self.length, *parts, self.kept, self.solver)

    def shares(self) -> Tensor:
        return torch.softmax(self.theta, 0)

    def logs(self) -> Tensor:
        """Return log sigma of the N + 1 nodes."""
        total = torch.cat([torch.zeros(1, dtype=torch.float64), self.shares().cumsum(0)])
        total[-1] = 1
        return self.top - self.length * total

    def rows(self) -> Rows | None:
        if not self.kept:
            return None
        parts = self.weights.split([min(len(row), _FREE) for row in self.kept])
        return tuple((*part.tolist(), *row[_FREE:]) for part, row in zip(parts, self.kept, strict=True))

    def run(self) -> Solver:
        rows = self.rows()
        return self.solver if rows is None else Weighted(rows)

    def chain(self) -> Tensor:
        """Return `d log sigma_k/d θ_j = −L·(1[j ≤ k]·w_j − w_j·Σ_{i≤k} w_i)` for the inner nodes, (N − 1, N)."""
        w, n = self.shares(), len(self.theta)
        until = torch.tril(torch.ones(n - 1, n, dtype=torch.float64))
        return -self.length * w * (until - w.cumsum(0)[:-1, None])


def _differences(student: Student, point: _Point, ends: Tensor, residual: Tensor, records: list) -> Tensor:
    """Derivatives of the residual by log sigma of the inner nodes, then by the free weights: (M, B, d)."""
    eps = 1e-4 if residual.dtype == torch.float64 else 5e-3
    logs, base, out = point.logs(), point.run(), []
    for k in range(1, len(logs) - 1):
        moved = logs.clone()
        moved[k] += min(eps, 0.3 * float(logs[k - 1] - logs[k]))  # never past its neighbor
        other, _ = student.residual(_grid(moved, ends), base, records)
        out.append((other - residual) / float(moved[k] - logs[k]))
    grid, still = _grid(logs, ends), torch.zeros(len(point.theta) + len(point.weights), dtype=torch.float64)
    for k in range(len(point.weights)):
        step = still.clone()
        step[len(point.theta) + k] = eps
        other, _ = student.residual(grid, point.moved(step).run(), records)
        out.append((other - residual) / eps)
    return torch.stack(out) if out else residual.new_zeros(0, *residual.shape)


def _grid(logs: Tensor, ends: Tensor) -> Tensor:
    grid = logs.exp()
    grid[0], grid[-1] = ends[0], ends[1]  # as they were given, not as logarithms round
    return grid


def _within(grid: Tensor) -> Tensor:
    """A finite stand-in for a first node at infinity, which the second may come near to: ten times above that one."""
    return torch.cat([10 * grid[1:2], grid[1:]]) if torch.isinf(grid[0]) and len(grid) > 2 else grid


def _losses(residual: Tensor, tau: float, objective: str) -> Tensor:
    """Loss of each sample: `2τ(sqrt(|r|² + τ²) − τ)`, `τ² log(1 + |r|²/τ²)`, or `|r|²`."""
    squares = residual.double().square().sum(1) if residual.device.type != "mps" else residual.square().sum(1)
    if objective == "typical":
        return tau**2 * (squares / tau**2).log1p()
    return squares if objective == "mean" else 2 * tau * ((squares + tau**2).sqrt() - tau)


def _weights(norms: Tensor, tau: float, objective: str) -> Tensor:
    """The loss's derivative by `|r|²`: what a sample counts in the next Gauss–Newton step."""
    share = tau**2 / (norms**2 + tau**2)
    return {"mean": torch.ones_like(norms), "typical": share, "robust": share.sqrt()}[objective]


def _normal(point: _Point, slopes: Tensor, residual: Tensor, tau: float, objective: str) -> tuple[Tensor, Tensor]:
    """Half the Gauss–Newton matrix and half the gradient of the mean loss, by θ and weights, float64 on the CPU."""
    norms = torch.linalg.vector_norm(residual, dim=1)
    v = _weights(norms, tau, objective)
    scaled = (slopes * v.sqrt()[:, None] / len(v) ** 0.5).flatten(1)
    target = (residual * v.sqrt()[:, None] / len(v) ** 0.5).flatten()
    square, slope = (scaled @ scaled.T).cpu().double(), (scaled @ target).cpu().double()
    inner, n = len(point.theta) - 1, len(point.weights)
    chain = torch.zeros(inner + n, inner + 1 + n, dtype=torch.float64)
    chain[:inner, : inner + 1] = point.chain()
    chain[inner:, inner + 1 :] = torch.eye(n, dtype=torch.float64)
    return chain.T @ square @ chain, chain.T @ slope


def _direction(square: Tensor, slope: Tensor, mu: float, nodes: int) -> Tensor:
    """Solve `(A + mu·diag A)·d = −g`; a common shift of all θ changes nothing and is taken out."""
    damped = square + mu * torch.diag(square.diagonal()) + 1e-12 * square.diagonal().max() * torch.eye(len(square))
    step = torch.linalg.solve(damped, -slope)
    step[:nodes] -= step[:nodes].mean()
    return step * min(1.0, _FURTHEST / max(float(step.abs().max()), 1e-300))


def _is_noise(gain: Tensor, before: Tensor) -> bool:
    """Whether an iteration gained little, and less than the standard error of the gain over the samples."""
    mean = float(gain.mean())
    return mean < _SMALL * float(before.mean()) and len(gain) > 1 and mean < float(gain.std()) / len(gain) ** 0.5


def fit(
    student: Student,
    sigmas: Tensor,
    solver: Solver,
    *,
    weights: Rows | None = None,
    objective: str = "robust",
    iterations: int = 3,
) -> Fit:
    """Move the inner nodes of a grid, and its weights if there are any, until the student ends where the teacher does.

    Each iteration costs about N(N − 1)/2 calls per sample for the nodes of N one-call steps, as much again for each
    slope with a free weight, and N for each trial. It stops early when nothing is gained, or little that is also less
    than the standard error of the gain over the samples.

    Args:
        student: samples, sampler and teacher's end points.
        sigmas: where to start; it must end above 0, and may begin at infinity.
        solver: the student's solver; with `weights` it is replaced by `Weighted`.
        weights: where they start; those of the newest three slopes are free. None: the solver's own stay.
        objective: one of `OBJECTIVES`.
        iterations: at most so many.

    Raises:
        FanalError: the grid ends at 0, or the objective is unknown.
    """
    grid = check_sigmas(sigmas)
    if not 0 < float(grid[-1]) < float(grid[0]):
        raise FanalError("a grid can be fitted between two positive sigmas only: let it end at sigma_min, not at 0")
    ends = grid[[0, -1]]
    point = _Point.at(_within(grid), solver, weights)
    residual, records = student.residual(_grid(point.logs(), ends), point.run())
    start = judge(residual, objective)
    norms = torch.linalg.vector_norm(residual, dim=1)
    ridge = _RIDGE * float(_losses(residual, float(norms.median()), objective).mean())
    home, mu, n = point.weights, 1e-2, len(point.theta)
    for _ in range(iterations if len(grid) > 2 or weights else 0):
        tau = max(float(torch.linalg.vector_norm(residual, dim=1).median()), _LEAST)
        slopes = _differences(student, point, ends, residual, records)
        square, slope = _normal(point, slopes, residual, tau, objective)
        del slopes
        square[n:, n:] += ridge * torch.eye(len(home))
        slope[n:] += ridge * (point.weights - home)
        before, gain = _losses(residual, tau, objective), None
        for _ in range(_TRIES):
            trial = point.moved(_direction(square, slope, mu, n))
            try:
                found, kept = student.residual(_grid(trial.logs(), ends), trial.run(), records)
            except FanalError:  # two nodes fell together, or the run left the range of numbers
                mu *= 10
                continue
            change = before - _losses(found, tau, objective)
            price = ridge * float((trial.weights - home).square().sum() - (point.weights - home).square().sum())
            if float(change.mean()) > price:
                point, residual, records, gain, mu = trial, found, kept, change, mu / 4
                break
            mu *= 10
        if gain is None or _is_noise(gain, before):
            break
    return Fit(_grid(point.logs(), ends), point.rows(), start, judge(residual, objective))
