"""Geometric augmentation that does not leak: the network is told what was done to an image, and at sampling "nothing".

Each image undergoes, in this order, a combination of (Karras et al. 2022, arXiv:2206.00364, appendix F.2 and table 6)

    mirror              a0 in {0, 1}, always drawn
    upside down         a1 in {0, 1}
    scaling             by (2^0.2)^a2, a2 ~ N(0, 1)
    rotation            by a3 ~ U(-π, π)
    anisotropy          along the direction a4 ~ U(-π, π) by (2^0.2)^a5, across it by the inverse, a5 ~ |N(0, 1)|
    translation         by (a6, a7)/8 of the image's side, a6, a7 ~ N(0, 1)

where all but the mirror are drawn with a probability and are otherwise none at all. The label of an image is

    (a0, a1, a2, cos a3 − 1, sin a3, a5 cos a4, a5 sin a4, a6, a7)

which is zero for an image as it is. The published a5 ~ N(0, 1) gives the same images, since a negative a5 is a positive
one in the direction across; but then the label of a5 and a4 is also that of -a5 and a4 + π, which is another image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LABEL", "augment", "draw_augmentation", "label", "transform", "warp"]

LABEL = 9
"""Length of an augmentation label."""

_STRETCH = 2**0.2
_SHIFT = 1 / 8  # of the image's side


def draw_augmentation(random: np.random.Generator, count: int, probability: float) -> Float[Tensor, "b 8"]:
    """Draw the parameters a0 to a7 of each image; all zero is an image as it is.

    Args:
        random: where the numbers come from; how many are drawn depends on `count` alone.
        count: number of images.
        probability: of each of the five transformations other than the mirror.
    """
    chosen = random.random((count, 5)) < probability  # upside down, scaling, rotation, anisotropy, translation
    sides = random.integers(2, size=(count, 2))
    angles = random.uniform(-math.pi, math.pi, size=(count, 2))
    normal = random.standard_normal((count, 4))
    always = np.ones(count, dtype=bool)
    masks = [always, *(chosen[:, k] for k in (0, 1, 2, 3, 3, 4, 4))]
    stretch = np.abs(normal[:, 1])
    values = [*sides.T, normal[:, 0], angles[:, 0], angles[:, 1], stretch, normal[:, 2], normal[:, 3]]
    drawn = [np.where(mask, value, 0.0) for mask, value in zip(masks, values, strict=True)]
    return torch.from_numpy(np.stack(drawn, axis=1).astype(np.float32))


def label(parameters: Float[Tensor, "b 8"]) -> Float[Tensor, "b 9"]:
    """Return the labels of parameters: `(a0, a1, a2, cos a3 − 1, sin a3, a5 cos a4, a5 sin a4, a6, a7)`."""
    a0, a1, a2, a3, a4, a5, a6, a7 = parameters.unbind(1)
    return torch.stack([a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7], dim=1)


def _rotation(angle: Tensor) -> Tensor:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, one], dim=1).reshape(-1, 3, 3)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))


def transform(parameters: Float[Tensor, "b 8"]) -> Float[Tensor, "b 3 3"]:
    """Return where parameters take a point `(x, y, 1)` of an image, in float64; the two flips are not included.

    x and y go from -1 to 1, x to the right and y down; a positive rotation takes x to y.
    """
    _, _, a2, a3, a4, a5, a6, a7 = parameters.double().unbind(1)
    size, stretch = _STRETCH**a2, _STRETCH**a5
    moved = torch.eye(3, dtype=torch.float64).repeat(len(parameters), 1, 1)
    moved[:, 0, 2], moved[:, 1, 2] = 2 * _SHIFT * a6, 2 * _SHIFT * a7  # the side has length 2
    stretched = _rotation(a4) @ _scaling(stretch, 1 / stretch) @ _rotation(-a4)
    return moved @ stretched @ _rotation(a3) @ _scaling(size, size)


def warp(x: Float[Tensor, "b c h w"], matrix: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b c h w"]:
    """Move the content of square images as `matrix` moves points; what comes in at the borders is mirrored there."""
    back = torch.linalg.inv(matrix.double().cpu())[:, :2].to(x.dtype).to(x.device)
    places = F.affine_grid(back, list(x.shape), align_corners=False)
    return F.grid_sample(x, places, mode="bicubic", padding_mode="reflection", align_corners=False)


def augment(x: Float[Tensor, "b c h w"], parameters: Float[Tensor, "b 8"]) -> Float[Tensor, "b c h w"]:
    """Return the transformed images; flips are exact, and an image whose other parameters are 0 is only flipped.

    Args:
        x: square images.
        parameters: from `draw_augmentation`, on the CPU.
    """
    mirrored, turned = (parameters[:, k].bool().to(x.device)[:, None, None, None] for k in (0, 1))
    x = torch.where(mirrored, x.flip(3), x)
    x = torch.where(turned, x.flip(2), x)
    matrix = transform(parameters)
    moved = (matrix != torch.eye(3, dtype=matrix.dtype)).flatten(1).any(1).nonzero()[:, 0]
    if len(moved) == 0:
        return x
    return x.index_copy(0, moved.to(x.device), warp(x[moved.to(x.device)], matrix[moved]))
