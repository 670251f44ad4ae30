"""Slopes and integrals of functions of one variable, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["antiderivative", "slope_in_time"]

_POINTS = 16  # of a rule on one interval
_TOLERANCE = 1e-12
_NEGLIGIBLE = 1e-10  # of the whole integral: an error that is let pass on the smallest intervals
_DEPTH, _INTERVALS = 64, 2048


def slope_in_time(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Return the derivative of a function at each t, by automatic differentiation; 0 where it does not depend on t.

    Args:
        function: acts on each value of its argument alone.
        t: where; further derivatives can be taken if it requires a gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        at = t if t.requires_grad else t.detach().clone().requires_grad_()
        value = function(at)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=t.requires_grad, allow_unused=True)
    return torch.zeros_like(t) if slope is None else slope


def antiderivative(function: Callable[[Tensor], Tensor], start: float, end: float) -> Callable[[Tensor], Tensor]:
    """Return `t → ∫ function` from start to t, for t in [start, end], differentiable in t.

    Gauss–Legendre rules of 16 points on intervals that are halved until the halves agree with the whole to 1e-12 of the
    integral of the absolute value.

    Args:
        function: maps float64 to float64 of the same shape.
        start: lower end.
        end: upper end.

    Raises:
        FanalError: the function is not finite, or changes too fast somewhere.
    """
    nodes, weights = (torch.as_tensor(part) for part in np.polynomial.legendre.leggauss(_POINTS))

    def rule(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The integrals of the function and of its absolute value over intervals."""
        half = (high - low) / 2
        values = function(low[..., None] + half[..., None] * (1 + nodes))
        return half * (values * weights).sum(-1), half * (values.detach().abs() * weights).sum(-1)

    with torch.no_grad():
        edges, totals = _intervals(rule, start, end)
    low, before = (torch.tensor(part, dtype=torch.float64) for part in (edges[:-1], totals))

    def integral(t: Tensor) -> Tensor:
        flat = t.reshape(-1)
        i = torch.searchsorted(low, flat.detach().contiguous(), right=True).sub(1).clamp_min(0)
        return (before[i] + rule(low[i], flat)[0]).reshape(t.shape)

    return integral


def _intervals(
    rule: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], start: float, end: float
) -> tuple[list[float], list[float]]:
    """The ends of the intervals, and the integral up to the start of each."""
    edges, totals = [start], [0.0]
    scale = 0.0
    waiting = [(start, end, 0)]
    while waiting:
        low, high, depth = waiting.pop()
        middle = (low + high) / 2
        ends = torch.tensor([[low, low, middle], [high, middle, high]], dtype=torch.float64)
        (whole, left, right), sizes = (part.tolist() for part in rule(ends[0], ends[1]))
        scale = max(scale, sizes[0]) if sizes[0] < np.inf else scale
        if not all(np.isfinite([whole, left, right])):
            raise FanalError(f"a function of t is not finite between t = {low:.6g} and {high:.6g}")
        error, size = abs(whole - left - right), sizes[1] + sizes[2]
        if error <= _TOLERANCE * size or (depth == _DEPTH and error <= _NEGLIGIBLE * scale):
            edges.append(high)
            totals.append(totals[-1] + left + right)
        elif depth < _DEPTH and len(edges) < _INTERVALS:
            waiting += [(middle, high, depth + 1), (low, middle, depth + 1)]
        else:
            raise FanalError(f"a function of t changes too fast to be integrated near t = {low:.6g}")
    return edges, totals[:-1]
