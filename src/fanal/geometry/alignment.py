"""Alignment of curves by rotations and reflections, so that their shapes can be compared ([REG] eq. 13)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["align", "procrustes"]


def procrustes(
    curve: Float[Tensor, "b n k"], reference: Float[Tensor, "n k"], *, fixed: int = 1, mirrors: bool = True
) -> tuple[Float[Tensor, "b n k"], Float[Tensor, " b"]]:
    """Return the curves turned onto a reference, and `‖R̃ − R·O‖_F`, what the best orthogonal O leaves.

    `O = U Vᵀ` of the singular value decomposition of `Rᵀ R̃` ([REG] eq. 13). The first `fixed` axes stay: with 1, the
    way along the chord keeps its meaning, and only the plane across it is turned or mirrored. A mirror turns the sign
    of torsion: without mirrors O is the best rotation (Kabsch 1976).

    Args:
        curve: one row per point.
        reference: a curve with as many points and axes.
        fixed: number of axes that stay.
        mirrors: whether O may be a reflection.

    Raises:
        FanalError: the shapes differ, or `fixed` is not in [0, k − 1].
    """
    if curve.ndim != 3 or curve.shape[1:] != reference.shape:
        raise FanalError(f"curves (B, N, k) and a reference (N, k), got {tuple(curve.shape)}, {tuple(reference.shape)}")
    if not 0 <= fixed < curve.shape[2]:
        raise FanalError(f"fixed is a number of axes in [0, {curve.shape[2] - 1}], got {fixed!r}")
    own, target = curve.double(), reference.double()
    u, _, vh = torch.linalg.svd(own[:, :, fixed:].transpose(1, 2) @ target[:, fixed:])
    if not mirrors:
        last = vh[:, -1:] * torch.linalg.det(u @ vh).sign()[:, None, None]
        vh = torch.cat([vh[:, :-1], last], 1)
    turned = torch.cat([own[:, :, :fixed], own[:, :, fixed:] @ (u @ vh)], 2)
    return turned, (target - turned).flatten(1).norm(dim=1)


def align(
    curve: Float[Tensor, "b n k"], *, fixed: int = 1, rounds: int = 10
) -> tuple[Float[Tensor, "b n k"], Float[Tensor, "n k"], Float[Tensor, " b"]]:
    """Return the curves turned onto their common mean, that mean, and each one's distance from it.

    Generalized Procrustes analysis (Gower 1975): align to the mean, take the mean anew, until it stays. [REG] aligns to
    one of the trajectories, which makes the result depend on the choice.

    Args:
        curve: one row per point.
        fixed: number of axes that stay, see `procrustes`.
        rounds: how often at most.

    Raises:
        FanalError: as `procrustes`, or there is no curve.
    """
    if not len(curve):
        raise FanalError("there is no curve to align")
    mean = curve[0].double()
    for _ in range(rounds):
        turned, _ = procrustes(curve, mean, fixed=fixed)
        new = turned.mean(0)
        moved, mean = float((new - mean).norm()), new
        if moved <= 1e-12 * float(mean.norm()):
            break
    turned, left = procrustes(curve, mean, fixed=fixed)
    return turned, mean, left
