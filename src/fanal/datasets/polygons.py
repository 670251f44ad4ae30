"""Anti-aliased triangles, squares and pentagons: the drawing code that shapes32 and its verifier share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fanal.datasets.base import Array, Whole, to_images

__all__ = ["COLUMN", "EXTENT", "SHAPES", "SIZE", "Parts", "distance", "render"]

SIZE = 32
COLUMN = SIZE / 3
SHAPES = ("triangle", "square", "pentagon")
_SIDES, _CIRCUMRADIUS = (3, 4, 5), (5.4, 4.6, 4.6)


def _corners(k: int) -> Array:
    # The triangle and the pentagon point up, the square lies on a side; y grows downwards.
    turn = np.pi / 4 if _SIDES[k] == 4 else 0.0
    angle = turn + 2 * np.pi * np.arange(_SIDES[k]) / _SIDES[k]
    return _CIRCUMRADIUS[k] * np.stack([np.sin(angle), -np.cos(angle)], axis=1)


EXTENT = np.array([[-c[:, 0].min(), c[:, 0].max(), -c[:, 1].min(), c[:, 1].max()] for c in map(_corners, range(3))])
"""How far each shape reaches from its center: left, right, up, down; shape (3, 4), pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The shapes in N pictures, all of shape (N, K); lengths in pixels.

    Attributes:
        kind: index into `SHAPES`, or -1 for no shape.
        x: column of the center; pixel i has its center at i + 0.5.
        y: row of the center, downwards.
        scale: size relative to a real shape.
        gray: brightness, 1 in real pictures.
        cut: what lies farther right of the center than this is missing; infinity in real pictures.
    """

    kind: Whole
    x: Array
    y: Array
    scale: Array
    gray: Array
    cut: Array


def distance(k: int, dx: Array, dy: Array, scale: float | Array = 1.0) -> Array:
    """Distance to shape k around the origin, negative inside: the largest signed distance to its sides' lines."""
    corners = _corners(k)
    middle = (corners + np.roll(corners, -1, axis=0)) / 2
    apothem = np.hypot(middle[:, 0], middle[:, 1])
    sides = [(dx * (mx / a) + dy * (my / a)) for (mx, my), a in zip(middle.tolist(), apothem.tolist(), strict=True)]
    return np.maximum.reduce(sides) - scale * apothem[0]


def render(parts: Parts, size: int = SIZE) -> Tensor:
    """Render pictures, anti-aliased: gray = clip(0.5 - signed distance, 0, 1), the brightest shape on top.

    Returns:
        images in [-1, 1] of shape (N, 1, size, size).
    """
    axis = np.arange(size) + 0.5
    image = np.zeros((len(parts.kind), size, size))
    for slot in range(parts.kind.shape[1]):
        for k in range(len(SHAPES)):
            rows = np.flatnonzero(parts.kind[:, slot] == k)
            x, y, scale, gray, cut = (
                v[rows, slot, None, None] for v in (parts.x, parts.y, parts.scale, parts.gray, parts.cut)
            )
            dx, dy = axis[None, None, :] - x, axis[None, :, None] - y
            far = np.maximum(distance(k, dx, dy, scale), dx - cut)
            image[rows] = np.maximum(image[rows], gray * np.clip(0.5 - far, 0.0, 1.0))
    return to_images(image)
