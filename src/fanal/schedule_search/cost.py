"""What each jump along a teacher's path would cost: the matrix on which GITS looks for a shortest path.

Every candidate jump from node i to node j is one Euler step from the teacher's own state,
`y_ij = x_i + (sigma_j − sigma_i)·d_i` with the raw slope `d_i = (x_i − D(x_i, sigma_i))/sigma_i`
([REG] sec. 5.1, where σ' is counted twice in print). No network call is made here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import slope
from fanal.errors import FanalError, unknown_name
from fanal.trajectory import Trajectory

__all__ = ["METRICS", "Metric", "cost_matrix"]

Metric = Callable[[Tensor, Tensor], Tensor | float]
"""Maps predicted and teacher states, both (B, *shape), to one number."""

_ENTRIES = 2**19  # of the states that l1 and l2 hold at a time: they should stay in the processor's cache


def _line(teacher: Trajectory, i: int) -> tuple[Tensor, Tensor]:
    """A state on the line along which the jumps from node i go, and its slope: that of the node itself, or, from
    infinite sigma, D at sigma = 0, with the noise as slope (`fanal.sampling.depart`).
    """
    x, denoised, sigma = teacher.x[i], teacher.denoised[i], teacher.sigmas[i]
    return (denoised, x) if torch.isinf(sigma) else (x, slope(x, denoised, sigma))


def _levels(teacher: Trajectory) -> Tensor:
    """Noise levels of these states."""
    return teacher.sigmas.where(teacher.sigmas.isfinite(), 0)


def _deviation(teacher: Trajectory) -> Tensor:
    """`mean_b dev(y_ij) − mean_b dev(x_j)`: how far a jump lands from the straight line through both ends.

    With P the projection off the chord, `a_i = P(x_i − x_T)` and `e_i = P·d_i`, a jump of length h lands at the
    distance `sqrt(|a_i|² + 2h⟨a_i, e_i⟩ + h²|e_i|²)`: three inner products per node give every entry.
    """
    end = _wide(teacher.x[-1])
    unit = _wide(teacher.x[0]) - (0 if torch.isinf(teacher.sigmas[0]) else end)
    unit /= torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min(1e-300)
    own, products = [], []
    for i in range(len(teacher.denoised)):
        x, d = _line(teacher, i)
        a = _off(_wide(x) - end, unit)
        squares = a.square().sum(1)
        own.append(squares.sqrt().mean())
        e = _off(_wide(d), unit)
        products.append(torch.stack([squares, a.mul_(e).sum(1), e.square_().sum(1)]))
    zero, first, second = torch.stack(products, 1)[:, :, None]  # each (G − 1, 1, B)
    h = _lengths(teacher).to(zero)[:, :, None]
    return (zero + 2 * h * first + h**2 * second).clamp_min(0).sqrt().mean(2) - torch.stack([*own, own[0] * 0])


def _off(v: Tensor, unit: Tensor) -> Tensor:
    """Project off a direction."""
    return torch.addcmul(v, (v * unit).sum(1, keepdim=True), unit, value=-1)


def _distance(teacher: Trajectory, p: int) -> Tensor:
    """`mean_b |y_ij − x_j|_p`, from the differences themselves: their squares by inner products would cancel.

    States lose digits at large sigma, where all are about `sigma·c` with `c = x_0/sigma_0` (from infinity: the noise).
    Without that part, `u_j = x_j − sigma_j·c`, they are of the data's size. An Euler step takes u_i to
    `(sigma_j/sigma_i)·u_i + (1 − sigma_j/sigma_i)·D_i`, and its distance from u_j is that of y_ij from x_j. Only u is
    formed in float64.
    """
    sigmas, (nodes, count) = teacher.sigmas, teacher.x.shape[:2]
    states, answers = (v.flatten(2).transpose(0, 1) for v in (teacher.x, teacher.denoised))
    levels = _levels(teacher).to(states.device, _double(states))[:, None]
    shares, entries = (sigmas / sigmas[:, None]).to(states)[:, :, None], states.shape[2]
    size = max(1, _ENTRIES // (nodes * entries))
    room, sums = states.new_empty(min(size, count) * nodes * entries), states.new_zeros(count, nodes - 1, nodes)
    for x, denoised, out in zip(states.split(size), answers.split(size), sums.split(size), strict=True):
        u = x.to(levels, copy=True)
        u = u.addcmul_(levels, u[:, :1] / (levels[0] if float(levels[0]) else 1), value=-1).to(x)
        for i in range(nodes - 1):
            later = u[:, i + 1 :]
            miss = room[: later.numel()].view(later.shape)
            torch.lerp(denoised[:, i, None], u[:, i, None], shares[i, i + 1 :], out=miss)
            miss.sub_(later)
            _add_up(miss, p, out[:, i, i + 1 :])
    return (sums if p == 1 else sums.sqrt_()).mean(0, dtype=levels.dtype)


def _add_up(miss: Tensor, p: int, out: Tensor) -> None:
    """Write the sums of `|v|^p` over the last axis into `out`; `miss` is used up."""
    if p == 1:
        torch.sum(miss.abs_(), 2, out=out)
    elif miss.device.type == "cpu" and miss.dtype in (torch.float32, torch.float64):
        np.vecdot(miss.numpy(), miss.numpy(), out=out.numpy())  # reads once where torch reads twice and writes
    else:
        torch.sum(miss.square_(), 2, out=out)


def _custom(teacher: Trajectory, metric: Metric) -> Tensor:
    """A metric of the user's, one pair at a time."""
    h = _lengths(teacher)
    out = torch.zeros(h.shape, dtype=torch.float64)
    for i in range(len(h)):
        x, d = _line(teacher, i)
        for j in range(i + 1, len(teacher.x)):
            out[i, j] = float(metric(x + h[i, j] * d, teacher.x[j]))
    return out


METRICS: dict[str, Callable[[Trajectory], Tensor]] = {
    "dev": _deviation,
    "l1": lambda teacher: _distance(teacher, 1),
    "l2": lambda teacher: _distance(teacher, 2),
}
"""Name → costs of all jumps, (G − 1, G), of which only those to later nodes count."""


def _double(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _wide(x: Tensor) -> Tensor:
    return x.flatten(1).to(_double(x))


def _lengths(teacher: Trajectory) -> Float[Tensor, "n g"]:
    """Return `sigma_j − sigma_i`; from infinity, as `_line` begins at 0, `sigma_j`."""
    return teacher.sigmas - _levels(teacher)[:-1, None]


def cost_matrix(teacher: Trajectory, metric: str | Metric = "dev") -> Float[Tensor, "g g"]:
    """Return the cost of every jump between two nodes of the teacher's grid; infinite where i >= j.

    Args:
        teacher: a recorded run over the G nodes.
        metric: `dev`, `l1`, `l2`, or a function of predicted and teacher states, both (B, *shape).

    Raises:
        FanalError: the metric is unknown, or not finite.
    """
    if not callable(metric) and metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    found = (_custom(teacher, metric) if callable(metric) else METRICS[metric](teacher)).cpu().double()
    later = torch.ones_like(found).triu(1).bool()
    bad = (later & ~torch.isfinite(found)).any(1).nonzero()
    if len(bad):
        raise FanalError(f"the metric is not finite for jumps from node {int(bad[0])} of the teacher's grid")
    cost = torch.full((len(teacher.sigmas),) * 2, torch.inf, dtype=torch.float64)
    cost[:-1] = found.where(later, cost[:-1])
    return cost
