"""How alike trajectories are, as numbers: within and between groups of them, and against chance ([REG] sec. 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.geometry import frames, nulls, subspace
from fanal.metrics.estimates import Estimate

__all__ = ["MEASURES", "Shapes", "apart", "kept_levels", "shapes", "smooth_null", "table"]

MEASURES = ("procrustes", "curvature", "torsion")
"""How two curves are compared."""


@dataclass(frozen=True, eq=False)
class Shapes:
    """Curves in the form in which they are compared.

    Attributes:
        across: (B, N+1, 2), the way across the chord, centered and of unit Frobenius norm.
        curvature: (B, M), times sigma √d, at the M positive levels.
        torsion: (B, M), times sigma √d.
        levels: (M,), log sigma, decreasing.
        kept: how many of the levels count for curvature and torsion, see `kept_levels`.
    """

    across: Float[Tensor, "b n 2"]
    curvature: Float[Tensor, "b m"]
    torsion: Float[Tensor, "b m"]
    levels: Float[Tensor, " m"]
    kept: int


def kept_levels(curve: Float[Tensor, "b n 3"], sigmas: Float[Tensor, " n"], d: int) -> int:
    """Return how many levels come before the way that is left, sigma √d, is half of the largest deviation.

    Below them a network's predictions still jitter while the curve has all but ended: there its direction turns, and
    nothing moves. Shapes are compared and stages are found above.

    Args:
        curve: position along the chord and two components.
        sigmas: their levels, decreasing.
        d: dimension of the samples.
    """
    off = (curve[:, :, 1:] - curve[:, :1, 1:]).double().norm(dim=2).amax(1).mean()  # the first state is on the chord
    return max(int((sigmas * math.sqrt(d) >= float(off) / 2).sum()), 3)


def shapes(curve: Float[Tensor, "b n 3"], sigmas: Float[Tensor, " n"], d: int, window: int) -> Shapes:
    """Return projected curves in the form in which they are compared.

    Args:
        curve: position along the chord and two components, as `fanal.geometry.project` gives them.
        sigmas: their levels, decreasing.
        d: dimension of the samples.
        window: as in `fanal.geometry.frenet`.

    Raises:
        FanalError: as `frenet`, or a curve does not leave its chord.
    """
    across = curve[:, :, 1:].double()
    across = across - across.mean(1, keepdim=True)
    size = torch.linalg.matrix_norm(across)
    if not bool((size > 0).all()):
        raise FanalError("a curve does not leave its chord: it has no shape to compare")
    found, inner = frames.frenet(curve, window), sigmas > 0
    unit = sigmas.double() * math.sqrt(d)
    curvature = (found.curvature * unit)[:, inner]
    torsion = (found.torsion.nan_to_num() * unit)[:, inner]
    levels = sigmas[inner].double().log()
    kept = min(kept_levels(curve, sigmas, d), len(levels))
    return Shapes(across / size[:, None, None], curvature, torsion, levels, kept)


def _procrustes(a: Tensor, b: Tensor) -> Tensor:
    """`min ‖A_i O − B_j‖_F` over orthogonal O for shapes of unit norm, (B, C): 0 for one shape, at most √2."""
    inner = torch.einsum("ink,jnl->ijkl", a, b)
    # sum of the two singular values of a 2 × 2 matrix
    nuclear = (inner.square().sum((2, 3)) + 2 * torch.linalg.det(inner).abs()).clamp_min(0).sqrt()
    return (2 - 2 * nuclear).clamp_min(0).sqrt()


def _distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """`‖a_i − b_j‖` over the root mean square of both norms, (B, C), with weights of levels: 0 for equal curves."""
    inner = (a * weight) @ b.T
    mean = ((a.square() @ weight)[:, None] + (b.square() @ weight)[None]) / 2
    off = (2 * mean - 2 * inner).clamp_min(0)
    return torch.where(mean > 0, (off / mean.where(mean > 0, torch.ones_like(mean))).sqrt(), 0.0)


def _bends(group: Shapes, kept: int) -> tuple[Tensor, Tensor]:
    """Curvature at the kept levels, and torsion times curvature over its largest: a straight piece has no twist."""
    curvature = group.curvature[:, :kept]
    return curvature, group.torsion[:, :kept] * curvature / curvature.amax(1, keepdim=True)


def _pairs(a: Shapes, b: Shapes) -> dict[str, Tensor]:
    """Distances of every curve of one group from every one of another, by measure, (B, C) each."""
    kept = min(a.kept, b.kept)
    weight = torch.gradient(-a.levels[:kept])[0]
    (bend, twist), (other, turned) = _bends(a, kept), _bends(b, kept)
    mirrored = [_distance(twist, sign * turned, weight) for sign in (1, -1)]  # a mirror changes its sign
    return {
        "procrustes": _procrustes(a.across, b.across),
        "curvature": _distance(bend, other, weight),
        "torsion": torch.minimum(*mirrored),
    }


def _mean(table: Tensor, same: bool) -> Estimate:
    """Mean over pairs of different curves; its error counts that a curve is in many pairs (Hoeffding 1948)."""
    rows, columns = table.shape
    if same:
        if rows < 2:
            return Estimate(math.nan, math.nan, 0)
        each = (table.sum(1) - table.diagonal()) / (rows - 1)
        error = 2 * float(each.std()) / math.sqrt(rows) if rows > 2 else math.nan  # two curves are one pair
        return Estimate(float(each.mean()), error, rows)
    parts = [(each, len(each)) for each in (table.mean(1), table.mean(0))]
    variance = sum(float(each.var()) / n if n > 1 else math.nan for each, n in parts)
    return Estimate(float(table.mean()), math.sqrt(variance), min(rows, columns))


def apart(a: Shapes, b: Shapes | None = None) -> dict[str, Estimate]:
    """Return how far curves are apart, by measure: mean over pairs, each with its standard error.

    `procrustes` is the residual of the best rotation or reflection across the chord, for shapes of unit size ([REG] eq.
    13): 0 for one shape, at most √2. `curvature` and `torsion` are distances of those functions of log
    sigma over the root mean square of their norms, at the levels that count (`kept_levels`); torsion counts by how much
    the curve bends.

    Args:
        a: a group.
        b: another one; None: pairs within the first.

    Raises:
        FanalError: the two have other levels.
    """
    other = a if b is None else b
    if a.across.shape[1:] != other.across.shape[1:] or not torch.allclose(a.levels, other.levels, atol=1e-5):
        raise FanalError("curves are compared level by level: both groups need the same grid of sigmas")
    return {name: _mean(table, b is None) for name, table in _pairs(a, other).items()}


def smooth_null(like: Float[Tensor, "b n 3"], sigmas: Float[Tensor, " n"], d: int, seed: int = 0) -> Tensor:
    """Return random smooth curves where trajectories could be, projected as they are, (B, N+1, 3).

    Along the chord they go as sigma √d does; across it are smooth functions of the grid (`nulls.smooth_curves`) in
    three dimensions, pinned to 0 at both ends and as large as the curves they stand in for.

    Args:
        like: projected trajectories.
        sigmas: their levels.
        d: dimension of the samples.
        seed: of the curves.
    """
    count, points = like.shape[:2]
    across = nulls.smooth_curves(count, points, seed=seed)
    t = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    across = across - torch.lerp(across[:, :1], across[:, -1:], t)
    size = torch.linalg.matrix_norm(like[:, :, 1:].double().cpu())
    across = across * (size / torch.linalg.matrix_norm(across))[:, None, None]
    along = ((sigmas[0] - sigmas) * math.sqrt(d)).double().expand(count, -1)
    path = torch.cat([along[:, :, None], across], 2)
    return subspace.project(path.transpose(0, 1), 2).coordinates


def table(groups: Mapping[str, Shapes]) -> dict[str, list[list[Estimate]]]:
    """Return how far all groups are apart, by measure: symmetric, within each group on the diagonal."""
    names = list(groups)
    cells = {
        (i, j): apart(groups[a], None if i == j else groups[b])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i <= j
    }
    size = range(len(names))
    return {key: [[cells[min(i, j), max(i, j)][key] for j in size] for i in size] for key in MEASURES}
