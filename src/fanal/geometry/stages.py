"""Where a run stops being a straight line and where it becomes one again ([REG] sec. 4.2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["Stages", "by_curvature", "by_entropy", "stays"]


@dataclass(frozen=True, eq=False)
class Stages:
    """The two borders of the non-linear stage of each run.

    Attributes:
        first: (B,), sigma at which it begins; NaN where it never does.
        last: (B,), sigma at which it ends.
    """

    first: Float[Tensor, " b"]
    last: Float[Tensor, " b"]


def _borders(inside: Tensor, sigmas: Tensor) -> Stages:
    """The first and the last level inside, of masks (N, B)."""
    levels = sigmas.double().to(inside.device)[:, None]
    none = ~inside.any(0)
    first = torch.where(inside, levels, -torch.inf).amax(0).masked_fill(none, torch.nan)
    last = torch.where(inside, levels, torch.inf).amin(0).masked_fill(none, torch.nan)
    return Stages(first, last)


def by_curvature(curvature: Float[Tensor, "n b"], sigmas: Float[Tensor, " n"], share: float = 0.1) -> Stages:
    """Return the stretch in which a run bends by more than a share of its largest curvature.

    [REG] takes 1e-5 per unit of length, which depends on the size of the data; a share of the peak does not.

    Args:
        curvature: at each state.
        sigmas: their levels, decreasing.
        share: of the largest, in (0, 1).

    Raises:
        FanalError: the share is not in (0, 1), or the two differ in length.
    """
    if not 0 < share < 1:
        raise FanalError(f"share must be strictly between 0 and 1, got {share}")
    _same(curvature, sigmas)
    return _borders(curvature > share * curvature.amax(0, keepdim=True), sigmas)


def by_entropy(
    entropy: Float[Tensor, "n b"], sigmas: Float[Tensor, " n"], total: float | Tensor, share: float = 0.05
) -> Stages:
    """Return the stretch in which the posterior over the data is neither flat nor on a single point.

    Args:
        entropy: of the posterior at each state, in nats.
        sigmas: their levels, decreasing.
        total: `log N`, that of N points alike; one number, or (B,).
        share: how near to either end counts as there, in (0, 0.5).

    Raises:
        FanalError: the share is not in (0, 0.5), or the two differ in length.
    """
    if not 0 < share < 0.5:
        raise FanalError(f"share must be strictly between 0 and 0.5, got {share}")
    _same(entropy, sigmas)
    return _borders((entropy < (1 - share) * total) & (entropy > share * total), sigmas)


def stays(inside: Bool[Tensor, "n b"], sigmas: Float[Tensor, " n"]) -> Float[Tensor, " b"]:
    """Return the largest level from which on a mask holds to the end; NaN where it does not hold there.

    Args:
        inside: at each state.
        sigmas: their levels, decreasing.

    Raises:
        FanalError: the two differ in length.
    """
    _same(inside, sigmas)
    held = inside.flip(0).cumprod(0).flip(0).bool()
    first = torch.where(held, sigmas.double().to(held.device)[:, None], -torch.inf).amax(0)
    return first.masked_fill(~held[-1], torch.nan)


def _same(values: Tensor, sigmas: Tensor) -> None:
    if values.ndim != 2 or len(values) != len(sigmas):
        raise FanalError(f"expected one row for each of {len(sigmas)} levels, got shape {tuple(values.shape)}")
