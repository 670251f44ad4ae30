"""How far a trajectory strays from its chord, how long it is and how it turns, state by state.

A path is (N+1, B, *shape): the states of B samples in the order they were visited, as `Trajectory.x` and
`Trajectory.denoised` hold them. Everything is computed in float64 (float32 on mps), since deviations are a thousandth
of the distances they are found in.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.exact.gaussian import accumulator

__all__ = ["angle", "deviation", "distance", "gram", "length", "magnitude", "pendulum", "rotation", "split"]

Path = Float[Tensor, "n b *d"]


def _rows(path: Path, least: int = 2) -> Tensor:
    """The path as (B, N+1, d) in the accumulating dtype.

    Raises:
        FanalError: it has too few states, or is not finite.
    """
    if path.ndim < 3 or len(path) < least:
        raise FanalError(f"a path has shape (N, B, *shape) with N >= {least} states, got {tuple(path.shape)}")
    if not bool(torch.isfinite(path).all()):
        raise FanalError("a path must be finite: a run from infinite sigma starts with a state that is not")
    return path.flatten(2).transpose(0, 1).to(accumulator(path))


def gram(path: Path) -> Float[Tensor, "b n n"]:
    """Return the inner products `⟨x_m − x_0, x_n − x_0⟩` of a path's states, counted from its first one.

    All of a path's shape is in them: distances, angles, principal components; nothing else needs d numbers per state.

    Raises:
        FanalError: it is no path of at least two states, or not finite.
    """
    rows = _rows(path)
    rows = rows - rows[:, :1]
    return rows @ rows.transpose(1, 2)


def magnitude(path: Path) -> Float[Tensor, "n b"]:
    """Return `‖x_n‖`; for forward noise it concentrates at `sqrt(‖y‖² + sigma²·d)` ([GEO] prop. 2).

    Raises:
        FanalError: as `gram`.
    """
    return _rows(path, 1).norm(dim=2).T


def split(path: Path) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n d"]]:
    """Return the position of each state along the chord, from the first state, and what is off it.

    Raises:
        FanalError: as `gram`, or a path ends where it began, so that it has no chord.
    """
    rows = _rows(path)
    rows = rows - rows[:, :1]
    chord = rows[:, -1:]
    size = chord.norm(dim=2, keepdim=True)
    if not bool((size > 0).all()):
        raise FanalError("a path ends where it began: it has no chord")
    unit = chord / size
    along = (rows * unit).sum(2, keepdim=True)
    return along[:, :, 0], rows - along * unit


def deviation(path: Path) -> Float[Tensor, "n b"]:
    """Return each state's distance from the straight line through both ends ([REG] sec. 3.1, the red curves of fig. 3).

    From the component off the chord itself: the printed difference of squares, `‖a‖² − (a·v)²/‖v‖²`, cancels.

    Raises:
        FanalError: as `split`.
    """
    return split(path)[1].norm(dim=2).T


def distance(path: Path) -> Float[Tensor, "n b"]:
    """Return each state's distance from the last one ([REG] sec. 3.1, the blue curves of fig. 3).

    Raises:
        FanalError: as `gram`.
    """
    rows = _rows(path)
    return (rows - rows[:, -1:]).norm(dim=2).T


def length(path: Path) -> Float[Tensor, "n b"]:
    """Return the length of the path up to each state; that of a run is about `sigma_max·√d` ([REG] prop. 2).

    Raises:
        FanalError: as `gram`.
    """
    steps = _rows(path).diff(dim=1).norm(dim=2)
    return torch.cat([steps.new_zeros(len(steps), 1), steps.cumsum(1)], 1).T


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of rows; 1 where one of them is 0, since nothing turns there."""
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(size > 0, (a * b).sum(-1) / size.where(size > 0, torch.ones_like(size)), 1.0).clamp(-1, 1)


def angle(path: Path, denoised: Float[Tensor, "m b *d"]) -> Float[Tensor, "m b"]:
    """Return the cosine between the direction of the run, `D − x`, and the way to its end, at all states but the last.

    `cos(−dx/dsigma, x_end − x_n)` ([GEO] app. F.2, fig. 14).

    Args:
        path: the sampling trajectory.
        denoised: the denoising trajectory, one state shorter.

    Raises:
        FanalError: as `gram`, or the denoising trajectory is not one state shorter.
    """
    if len(denoised) != len(path) - 1 or denoised.shape[1:] != path.shape[1:]:
        raise FanalError(f"expected {len(path) - 1} predictions for {len(path)} states, got {tuple(denoised.shape)}")
    rows, ends = _rows(path), _rows(denoised, 1)
    return _cosine(ends - rows[:, :-1], rows[:, -1:] - rows[:, :-1]).T


def rotation(path: Path) -> Float[Tensor, "m b"]:
    """Return the angle in radians between successive steps, at all states but both ends ([REG] sec. 4.2.1).

    Raises:
        FanalError: the path has fewer than three states, or as `gram`.
    """
    steps = _rows(path, 3).diff(dim=1)
    # atan2 of the parts: arccos of a cosine near 1 has lost half of its digits
    size = steps.norm(dim=2, keepdim=True)
    unit = steps / size.where(size > 0, torch.ones_like(size))
    apart, along = (unit[:, 1:] - unit[:, :-1]).norm(dim=2), (unit[:, 1:] + unit[:, :-1]).norm(dim=2)
    still = (size[:, 1:, 0] == 0) | (size[:, :-1, 0] == 0)
    return torch.where(still, 0.0, 2 * torch.atan2(apart, along)).T


def pendulum(path: Path, denoised: Float[Tensor, "m b *d"]) -> Float[Tensor, "m b"]:
    """Return `‖D_n − x_n‖`, the length of the pendulum that the prediction swings on ([REG] sec. 4.2.1).

    Each Euler step shortens it by `sigma'/sigma`, and the next prediction changes that by its swing.

    Raises:
        FanalError: as `angle`.
    """
    if len(denoised) != len(path) - 1 or denoised.shape[1:] != path.shape[1:]:
        raise FanalError(f"expected {len(path) - 1} predictions for {len(path)} states, got {tuple(denoised.shape)}")
    return (_rows(denoised, 1) - _rows(path)[:, :-1]).norm(dim=2).T
