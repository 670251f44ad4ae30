"""Curvature and torsion of curves in three dimensions, and the curve that they determine ([REG] sec. 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["Frenet", "frenet", "rebuild"]

_TERMS = 4  # of a Taylor expansion to third order
_ROUNDINGS = 16  # of the largest coordinate: a curve that bends by no more within its window is straight


@dataclass(frozen=True, eq=False)
class Frenet:
    """Shape of B curves at each of their N points.

    Attributes:
        length: (B, N), arc length from the first point, along the chords.
        curvature: (B, N), `‖r′ × r″‖/‖r′‖³`: 1/radius; 0 on a straight line.
        torsion: (B, N), `(r′ × r″)·r‴/‖r′ × r″‖²`; 0 in a plane, NaN where the curve is straight: where within the
            window it leaves its tangent by no more than 16 roundings of its largest coordinate.
        error: (B, N), root mean square distance of the points in the window from the fitted cubic.
    """

    length: Float[Tensor, "b n"]
    curvature: Float[Tensor, "b n"]
    torsion: Float[Tensor, "b n"]
    error: Float[Tensor, "b n"]


def frenet(curve: Float[Tensor, "b n 3"], window: int = 5) -> Frenet:
    """Return curvature and torsion by fitting a cubic in arc length to the points around each point.

    Least squares over the `window` points on each side, fewer beyond an end and as many more on the other side
    (Lewiner et al. 2005, as [REG] sec. 3.3 has it; eq. 15, whose curvature is a norm). A wide window is smooth and
    biased, a narrow one follows noise: `error` says what the fit leaves.

    Args:
        curve: points in order, no two successive ones equal.
        window: points on each side, at least 2.

    Raises:
        FanalError: the curve is not (B, N, 3) with N > 2·window, or successive points are equal.
    """
    if curve.ndim != 3 or curve.shape[2] != 3:
        raise FanalError(f"curves have shape (B, N, 3), got {tuple(curve.shape)}")
    count = curve.shape[1]
    if isinstance(window, bool) or not isinstance(window, int) or window < 2 or count < 2 * window + 1:
        largest = max(2, (count - 1) // 2)
        raise FanalError(f"window is a whole number in [2, {largest}] for {count} points, got {window!r}")
    points = curve.double()
    steps = points.diff(dim=1).norm(dim=2)
    if not bool((steps > 0).all()):
        raise FanalError("two successive points of a curve are equal: it has no direction there")
    s = torch.cat([steps.new_zeros(len(steps), 1), steps.cumsum(1)], 1)
    start = (torch.arange(count) - window).clamp(0, count - 2 * window - 1)
    near = start[:, None] + torch.arange(2 * window + 1)  # (N, W)
    h = s[:, near] - s[:, :, None]
    scale = h.abs().amax(2, keepdim=True)  # so that the four columns are alike
    powers = torch.stack([(h / scale) ** k for k in range(_TERMS)], 3)
    offsets = points[:, near] - points[:, :, None]
    fit = torch.linalg.lstsq(powers, offsets).solution  # (B, N, 4, 3)
    first, second, third = fit[:, :, 1] / scale, 2 * fit[:, :, 2] / scale**2, 6 * fit[:, :, 3] / scale**3
    cross = torch.linalg.cross(first, second)
    bend, speed = cross.norm(dim=2), first.norm(dim=2)
    curvature = bend / speed**3
    rounding = torch.finfo(curve.dtype).eps * points.abs().amax((1, 2))[:, None]
    straight = curvature * scale[:, :, 0] ** 2 / 2 <= _ROUNDINGS * rounding
    torsion = (cross * third).sum(2) / bend.where(~straight, torch.ones_like(bend)) ** 2
    left = (powers @ fit - offsets).square().sum(3).mean(2).sqrt()
    return Frenet(s, curvature, torsion.masked_fill(straight, torch.nan), left)


def rebuild(
    length: Float[Tensor, " n"], curvature: Float[Tensor, " n"], torsion: Float[Tensor, " n"]
) -> Float[Tensor, "n 3"]:
    """Return the curve with this curvature and torsion, from the origin along the first axis, bending to the second.

    The Frenet–Serret equations ([REG] eq. 14) are solved exactly on each interval with the means of its ends: the
    fundamental theorem of curves, up to a shift and a rotation; a mirror turns the torsion's sign. NaN torsion, of a
    straight piece, counts as 0.

    Args:
        length: arc length at each point, increasing.
        curvature: at each point.
        torsion: at each point.

    Raises:
        FanalError: the three differ in length, or the length does not increase.
    """
    if length.ndim != 1 or length.shape != curvature.shape or length.shape != torsion.shape:
        raise FanalError("length, curvature and torsion have one entry per point each")
    s = length.double()
    steps = s.diff()
    if not bool((steps > 0).all()):
        raise FanalError("arc length must increase from point to point")
    bend, twist = (v.double().nan_to_num() for v in (curvature, torsion))
    k, t = (bend[1:] + bend[:-1]) / 2, (twist[1:] + twist[:-1]) / 2
    # One generator moves the point and the frame (T, N, B) together.
    generator = s.new_zeros(len(steps), 4, 4)
    generator[:, 0, 1] = 1
    generator[:, 1, 2], generator[:, 2, 1] = k, -k
    generator[:, 2, 3], generator[:, 3, 2] = t, -t
    moves = torch.linalg.matrix_exp(generator * steps[:, None, None])
    state = torch.cat([s.new_zeros(1, 3), torch.eye(3, dtype=s.dtype)])  # rows: point, T, N, B
    points = [state[0]]
    for move in moves:
        state = move @ state
        points.append(state[0])
    return torch.stack(points)
