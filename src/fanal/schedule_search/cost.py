"""What each jump along a teacher's path would cost: the matrix on which GITS looks for a shortest path.

Every candidate jump from node i to node j is one Euler step from the teacher's own state,
`y_ij = x_i + (sigma_j − sigma_i)·d_i` with the raw slope `d_i = (x_i − D(x_i, sigma_i))/sigma_i`
([REG] sec. 5.1, where σ' is counted twice in print). No network call is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import slope
from fanal.errors import FanalError, unknown_name
from fanal.trajectory import Trajectory

__all__ = ["METRICS", "Metric", "cost_matrix", "slopes"]

Metric = Callable[[Tensor, Tensor], Tensor | float]
"""Maps predicted and teacher states, both (B, *shape), to one number."""

_ENTRIES = 2**18  # of the differences that l1 and l2 hold at a time: they should stay in the processor's cache


@runtime_checkable
class _Row(Protocol):
    def __call__(self, i: int, d: Tensor) -> Tensor:
        """Return the costs of the jumps from node i along slope d to the nodes i+1, i+2, …: (G − 1 − i,), float64."""
        ...


def slopes(teacher: Trajectory) -> Float[Tensor, "n b *d"]:
    """Return the raw slopes `(x − D)/sigma` of a trajectory, one per interval."""
    parts = zip(teacher.x[:-1], teacher.denoised, teacher.sigmas, strict=False)
    return torch.stack([slope(x, denoised, sigma) for x, denoised, sigma in parts])


class _Deviation:
    """`mean_b dev(y_ij) − mean_b dev(x_j)`: how far a jump lands from the straight line through both ends.

    With P the projection off the chord, `a_i = P(x_i − x_T)` and `e_i = P·d_i`, a jump of length h lands at the
    distance `sqrt(|a_i|² + 2h⟨a_i, e_i⟩ + h²|e_i|²)`: three inner products per node give every entry.
    """

    def __init__(self, teacher: Trajectory) -> None:
        self.sigmas = teacher.sigmas
        self.end = _wide(teacher.x[-1])
        chord = self.end - _wide(teacher.x[0])
        self.unit = chord / torch.linalg.vector_norm(chord, dim=1, keepdim=True).clamp_min(1e-300)
        self.off = [self._project(_wide(x) - self.end) for x in teacher.x]
        self.squares = [off.square().sum(1) for off in self.off]
        self.own = torch.stack([square.sqrt().mean() for square in self.squares])

    def _project(self, v: Tensor) -> Tensor:
        return torch.addcmul(v, (v * self.unit).sum(1, keepdim=True), self.unit, value=-1)

    def __call__(self, i: int, d: Tensor) -> Tensor:
        a, e = self.off[i], self._project(_wide(d))
        h = (self.sigmas[i + 1 :] - self.sigmas[i]).to(a)[:, None]
        lands = self.squares[i] + 2 * h * (a * e).sum(1) + h**2 * e.square().sum(1)
        return lands.clamp_min(0).sqrt().mean(1) - self.own[i + 1 :]


class _Distance:
    """`mean_b |y_ij − x_j|_p`, from the differences themselves: inner products would cancel."""

    def __init__(self, teacher: Trajectory, p: int) -> None:
        self.sigmas, self.p = teacher.sigmas, p
        self.x = teacher.x.flatten(2)

    def __call__(self, i: int, d: Tensor) -> Tensor:
        start, direction = self.x[i], d.flatten(1)
        out = torch.empty(len(self.sigmas) - 1 - i, dtype=torch.float64)
        size = max(1, _ENTRIES // start.numel())
        for at in range(i + 1, len(self.sigmas), size):
            some = slice(at, at + size)
            h = (self.sigmas[some] - self.sigmas[i]).to(start)[:, None, None]
            off = torch.addcmul(start - self.x[some], h, direction)
            norms = torch.linalg.vector_norm(off, ord=self.p, dim=2)
            out[at - i - 1 : at - i - 1 + size] = norms.mean(1, dtype=_double(norms)).cpu()
        return out


class _Custom:
    """A metric of the user's, one pair at a time."""

    def __init__(self, teacher: Trajectory, metric: Metric) -> None:
        self.teacher, self.metric = teacher, metric

    def __call__(self, i: int, d: Tensor) -> Tensor:
        sigmas, x = self.teacher.sigmas, self.teacher.x
        found = [float(self.metric(x[i] + (sigmas[j] - sigmas[i]) * d, x[j])) for j in range(i + 1, len(sigmas))]
        return torch.tensor(found, dtype=torch.float64)


METRICS: dict[str, Callable[[Trajectory], _Row]] = {
    "dev": _Deviation,
    "l1": lambda teacher: _Distance(teacher, 1),
    "l2": lambda teacher: _Distance(teacher, 2),
}
"""Name → how the cost of a jump is measured."""


def _double(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _wide(x: Tensor) -> Tensor:
    return x.flatten(1).to(_double(x))


def _rows(teacher: Trajectory, metric: str | Metric) -> _Row:
    if callable(metric):
        return _Custom(teacher, metric)
    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    return METRICS[metric](teacher)


def _checked(row: Tensor, i: int) -> np.ndarray:
    if not bool(torch.isfinite(row).all()):
        raise FanalError(f"the metric is not finite for jumps from node {i} of the teacher's grid")
    return row.cpu().double().numpy()


def cost_matrix(teacher: Trajectory, metric: str | Metric = "dev") -> Float[Tensor, "g g"]:
    """Return the cost of every jump between two nodes of the teacher's grid; infinite where i >= j.

    Args:
        teacher: a recorded run over the G nodes.
        metric: `dev`, `l1`, `l2`, or a function of predicted and teacher states, both (B, *shape).

    Raises:
        FanalError: the metric is unknown, or not finite.
    """
    row, nodes = _rows(teacher, metric), len(teacher.sigmas)
    cost = np.full((nodes, nodes), np.inf)
    for i, d in enumerate(slopes(teacher)):
        cost[i, i + 1 :] = _checked(row(i, d), i)
    return torch.from_numpy(cost)
