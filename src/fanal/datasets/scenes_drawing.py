"""Flowers, butterflies and cups, anti-aliased and in color: the drawing code of scenes64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fanal.datasets.base import Array, Whole

__all__ = [
    "CELL",
    "COLORS",
    "KINDS",
    "PAINTS",
    "PETALS",
    "Pixels",
    "SIZE",
    "Butterflies",
    "Cups",
    "Factors",
    "Flowers",
    "Sprite",
    "compose",
    "draw",
    "draw_butterflies",
    "draw_cups",
    "draw_flowers",
]

Pixels = NDArray[np.uint8]
SIZE, CELL = 64, 32
KINDS = ("flower", "butterfly", "cup")
PAINTS = ("red", "green", "blue")
PETALS = (4, 5, 6)
"""How many petals a flower of each paint has."""

COLORS = np.array(
    [
        (1.0, 0.2, 0.25),
        (0.25, 0.85, 0.35),
        (0.25, 0.5, 1.0),
        (1.0, 0.85, 0.2),
        (1.0, 1.0, 1.0),
        (0.85, 0.4, 0.9),
    ],
    dtype=np.float32,
)
"""Red, green, blue, in [0, 1]; then the colors that mark a kind: a flower's disc, a butterfly's body, a cup."""

_DISC, _BODY, _CUP = 3, 4, 5
_AXIS = np.arange(CELL, dtype=np.float32) + np.float32(0.5)


def _frame(center: Array, turn: Array) -> tuple[Array, Array]:
    """Coordinates of a cell's pixels around the centers (N, 2), turned clockwise; two arrays (N, CELL, CELL)."""
    dx = (_AXIS[None, None, :] - center[:, 0, None, None]).astype(np.float32)
    dy = (_AXIS[None, :, None] - center[:, 1, None, None]).astype(np.float32)
    c, s = (f(turn).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    return c * dx + s * dy, c * dy - s * dx


def _wide(values: Array) -> Array:
    return np.asarray(values, dtype=np.float32)[:, None, None]


def _over(image: Array, distance: Array, color: Array) -> Array:
    """Lay a color (N, 3) over images (N, CELL, CELL, 3) where the signed distance is negative."""
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    return image * (1 - cover) + cover * color[:, None, None, :]


def _blank(count: int) -> Array:
    return np.zeros((count, CELL, CELL, 3), dtype=np.float32)


def _place(rng: np.random.Generator, count: int, jitter: float) -> Array:
    return CELL / 2 + rng.uniform(-jitter, jitter, (count, 2))


@dataclass(frozen=True, slots=True, eq=False)
class Flowers:
    """What N flowers are made of; lengths in pixels, angles in radians clockwise from "up".

    A petal is the set of points within `width / 2` of the segment from radius `root` to `tip - width / 2`; one whose
    tip is NaN is absent.

    Attributes:
        center: x and y of the disc's center in the cell, (N, 2).
        paint: index into `PAINTS` of each petal, (N, P).
        disc: radius of the disc, (N,).
        angle: direction of each petal, (N, P).
        root: radius at which each petal starts, (N, P).
        tip: radius of its outermost point, (N, P).
        width: width of each petal, (N, P).
    """

    center: Array
    paint: Whole
    disc: Array
    angle: Array
    root: Array
    tip: Array
    width: Array

    def render(self) -> Array:
        """Return images in [0, 1] of shape (N, CELL, CELL, 3)."""
        image = _blank(len(self.disc))
        x, y = _frame(self.center, np.zeros(len(self.disc)))
        for p in range(self.angle.shape[1]):
            ux, uy = np.sin(self.angle[:, p]), -np.cos(self.angle[:, p])
            half = self.width[:, p] / 2
            along = np.clip(x * _wide(ux) + y * _wide(uy), _wide(self.root[:, p]), _wide(self.tip[:, p] - half))
            distance = np.sqrt((x - along * _wide(ux)) ** 2 + (y - along * _wide(uy)) ** 2) - _wide(half)
            distance = np.nan_to_num(distance, nan=CELL)
            image = _over(image, distance, COLORS[self.paint[:, p]])
        disc = np.sqrt(x**2 + y**2) - _wide(self.disc)
        return _over(image, disc, np.tile(COLORS[_DISC], (len(self.disc), 1)))


def draw_flowers(rng: np.random.Generator, paint: Whole, extra: int = 0) -> Flowers:
    """Draw flowers of the given paints (N,), each with the petals that `PETALS` gives it.

    Disc radius U(3.6, 4.2); tips at U(11.2, 12.8) ± 0.5; widths U(3.6, 4.2); petals turned together at random, and each
    by ± 4 degrees; the center within 1.2 of the cell's.

    Args:
        rng: random stream.
        paint: index into `PAINTS` of each flower.
        extra: petals more than there should be; negative for fewer, which leaves a gap.
    """
    count, most = len(paint), max(PETALS) + max(extra, 0)
    due = np.array(PETALS)[paint]
    slots = due + max(extra, 0)
    number = np.arange(most)[None, :]
    angle = 2 * np.pi * (number / slots[:, None] + rng.random((count, 1))) + np.deg2rad(
        rng.uniform(-4, 4, (count, most))
    )
    tip = rng.uniform(11.2, 12.8, (count, 1)) + rng.uniform(-0.5, 0.5, (count, most))
    return Flowers(
        center=_place(rng, count, 1.2),
        paint=np.tile(paint[:, None], (1, most)),
        disc=rng.uniform(3.6, 4.2, count),
        angle=angle,
        root=np.zeros((count, most)),
        tip=np.where(number < (due + extra)[:, None], tip, np.nan),
        width=np.tile(rng.uniform(3.6, 4.2, (count, 1)), (1, most)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Butterflies:
    """What N butterflies are made of; lengths in pixels, angles in radians. Side 0 is left, side 1 right.

    A wing is an upper and a lower circle that reach under the body.

    Attributes:
        center: x and y of the body's center in the cell, (N, 2).
        turn: clockwise turn of the whole, (N,).
        length: length of the body, (N,).
        width: width of the body, (N,).
        paint: index into `PAINTS` of each wing, (N, 2).
        upper: radius of the upper circle of each wing, (N, 2); 0 for none.
        lower: radius of the lower circle of each wing, (N, 2); 0 for none.
        gap: what each wing is moved away from the body, (N, 2).
    """

    center: Array
    turn: Array
    length: Array
    width: Array
    paint: Whole
    upper: Array
    lower: Array
    gap: Array

    def render(self) -> Array:
        """Return images in [0, 1] of shape (N, CELL, CELL, 3)."""
        image = _blank(len(self.turn))
        u, v = _frame(self.center, self.turn)
        for side in range(2):
            out = u if side else -u
            wing = np.full(u.shape, np.float32(CELL))
            for radius, height in ((self.upper[:, side], -3.4), (self.lower[:, side], 3.9)):
                away = np.sqrt((out - _wide(radius + 0.6 + self.gap[:, side])) ** 2 + (v - np.float32(height)) ** 2)
                wing = np.minimum(wing, np.where(_wide(radius) > 0, away - _wide(radius), np.float32(CELL)))
            image = _over(image, wing, COLORS[self.paint[:, side]])
        half = (self.length - self.width) / 2
        along = np.clip(v, _wide(-half), _wide(half))
        body = np.sqrt(u**2 + (v - along) ** 2) - _wide(self.width / 2)
        return _over(image, body, np.tile(COLORS[_BODY], (len(self.turn), 1)))


def draw_butterflies(rng: np.random.Generator, paint: Whole) -> Butterflies:
    """Draw butterflies whose wings have the given paints (N,) and mirror each other.

    Body U(15, 17.5) by U(3.2, 3.8); radii of the upper circles U(4.2, 5.6), of the lower ones U(2.8, 4.1); turned by
    ± 20 degrees; the center within 1.4 of the cell's.
    """
    count = len(paint)
    return Butterflies(
        center=_place(rng, count, 1.4),
        turn=np.deg2rad(rng.uniform(-20, 20, count)),
        length=rng.uniform(15.0, 17.5, count),
        width=rng.uniform(3.2, 3.8, count),
        paint=np.tile(paint[:, None], (1, 2)),
        upper=np.tile(rng.uniform(4.2, 5.6, (count, 1)), (1, 2)),
        lower=np.tile(rng.uniform(2.8, 4.1, (count, 1)), (1, 2)),
        gap=np.zeros((count, 2)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Cups:
    """What N cups are made of; lengths in pixels, angles in radians. Side 0 is left, side 1 right.

    A handle is a ring around a point on the level of the body's middle, outside its wall.

    Attributes:
        center: x and y of the body's center in the cell, (N, 2).
        turn: clockwise turn of the whole, (N,).
        width: width of the body, (N,).
        height: height of the body, (N,).
        paint: index into `PAINTS` of each handle, (N, 2).
        ring: outer radius of each handle, (N, 2); 0 for none.
        thick: thickness of the handles, (N,).
        gap: what each handle is moved away from the body, (N, 2).
        open: width of the opening in each handle, (N, 2); 0 in real cups.
    """

    center: Array
    turn: Array
    width: Array
    height: Array
    paint: Whole
    ring: Array
    thick: Array
    gap: Array
    open: Array

    def render(self) -> Array:
        """Return images in [0, 1] of shape (N, CELL, CELL, 3)."""
        image = _blank(len(self.turn))
        u, v = _frame(self.center, self.turn)
        for side in range(2):
            out = u if side else -u
            radius, middle = self.ring[:, side], self.width / 2 + 1.0 + self.gap[:, side]
            away = np.sqrt((out - _wide(middle)) ** 2 + v**2)
            ring = np.abs(away - _wide(radius - self.thick / 2)) - _wide(self.thick / 2)
            cut = np.where(out > _wide(middle), _wide(self.open[:, side] / 2) - np.abs(v), -np.float32(CELL))
            ring = np.where(_wide(radius) > 0, np.maximum(ring, cut), np.float32(CELL))
            image = _over(image, ring, COLORS[self.paint[:, side]])
        x, y = np.abs(u) - _wide(self.width / 2), np.abs(v) - _wide(self.height / 2)
        corner = np.sqrt(np.maximum(x, 0) ** 2 + np.maximum(y, 0) ** 2) + np.minimum(np.maximum(x, y), 0)
        return _over(image, corner, np.tile(COLORS[_CUP], (len(self.turn), 1)))


def draw_cups(rng: np.random.Generator, paint: Whole) -> Cups:
    """Draw cups with a handle of the given paints (N,) on a random side.

    Body U(10, 12.5) by U(13, 16); handle of outer radius U(5.2, 6), U(2.4, 2.8) thick; turned by ± 12 degrees; the
    center within 1.6 of a point 2.6 beside the cell's, so that the handle has room.
    """
    count = len(paint)
    left = rng.random(count) < 0.5
    ring = rng.uniform(5.2, 6.0, count)
    center = _place(rng, count, 1.6)
    center[:, 0] += np.where(left, 2.6, -2.6)
    return Cups(
        center=center,
        turn=np.deg2rad(rng.uniform(-12, 12, count)),
        width=rng.uniform(10.0, 12.5, count),
        height=rng.uniform(13.0, 16.0, count),
        paint=np.tile(paint[:, None], (1, 2)),
        ring=np.stack([np.where(left, ring, 0.0), np.where(left, 0.0, ring)], axis=1),
        thick=rng.uniform(2.4, 2.8, count),
        gap=np.zeros((count, 2)),
        open=np.zeros((count, 2)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Sprite:
    """Pictures of single objects and where they go.

    Attributes:
        image: in [0, 1], shape (K, CELL, CELL, 3).
        row: scene of each, (K,).
        cell: quarter of the scene, 0 to 3 by rows, (K,).
    """

    image: Array
    row: Whole
    cell: Whole


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What N scenes were drawn from: where which objects lie, and their parts.

    Attributes:
        cell: quarter of the picture that each kind's object lies in, 0 to 3 by rows, (N, 3); -1 where it is absent.
        rows: scenes that have an object of each kind, in order.
        parts: what the objects of each kind are made of, one per entry of `rows`.
    """

    cell: Whole
    rows: tuple[Whole, ...]
    parts: tuple[Flowers, Butterflies, Cups]

    def sprites(self) -> list[Sprite]:
        """Render the objects, one entry per kind."""
        pairs = zip(self.rows, self.parts, strict=True)
        return [Sprite(parts.render(), rows, self.cell[rows, k]) for k, (rows, parts) in enumerate(pairs)]


def draw(rng: np.random.Generator, bits: Whole) -> Factors:
    """Draw scenes with the given kinds of object (bit k of `bits` (N,) says whether kind k is there).

    Each object lies in a quarter of its own, drawn at random, and has a paint of its own.
    """
    count = len(bits)
    cell = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)[:, : len(KINDS)]
    paint = rng.integers(0, len(PAINTS), (count, len(KINDS)))
    rows = tuple(np.flatnonzero(bits >> k & 1) for k in range(len(KINDS)))
    flowers, butterflies, cups = (paint[rows[k], k] for k in range(len(KINDS)))
    parts = (draw_flowers(rng, flowers), draw_butterflies(rng, butterflies), draw_cups(rng, cups))
    there = (bits[:, None] >> np.arange(len(KINDS)) & 1) == 1
    return Factors(np.where(there, cell, -1), rows, parts)


def compose(count: int, sprites: Iterable[Sprite]) -> Pixels:
    """Put sprites into `count` black scenes; where two meet, the brighter one shows.

    Returns:
        uint8 images of shape (count, 3, SIZE, SIZE).
    """
    quarters = np.zeros((count, 4, CELL, CELL, 3), dtype=np.uint8)
    for sprite in sprites:
        levels = np.rint(255 * sprite.image).astype(np.uint8)
        quarters[sprite.row, sprite.cell] = np.maximum(quarters[sprite.row, sprite.cell], levels)
    grid = quarters.reshape(count, 2, 2, CELL, CELL, 3)
    return np.ascontiguousarray(grid.transpose(0, 5, 1, 3, 2, 4).reshape(count, 3, SIZE, SIZE))
