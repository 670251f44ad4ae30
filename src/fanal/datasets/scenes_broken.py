"""Scenes with one known fault, drawn by the code that draws the real ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from fanal.datasets.base import BLOCK, Array, Whole
from fanal.datasets.scenes_drawing import (
    CELL,
    COLORS,
    KINDS,
    PAINTS,
    PETALS,
    Butterflies,
    Cups,
    Flowers,
    Pixels,
    Sprite,
    compose,
    draw,
    draw_butterflies,
    draw_cups,
    draw_flowers,
)

__all__ = ["BROKEN", "render"]

BROKEN: Mapping[str, tuple[str, ...]] = {
    "fewer petals": ("missing petal",),
    "more petals": ("extra petal",),
    "other flower's petals": ("missing petal", "extra petal"),
    "patchwork petals": ("mixed color",),
    "loose petal": ("loose part",),
    "short petals": ("malformed",),
    "no disc": ("loose part",),
    "large disc": ("malformed",),
    "one wing": ("uneven wings",),
    "small wing": ("uneven wings",),
    "no wings": ("uneven wings",),
    "two-colored wings": ("mixed color",),
    "loose wing": ("loose part",),
    "no handle": ("broken handle",),
    "open handle": ("broken handle",),
    "two handles": ("broken handle",),
    "loose handle": ("loose part",),
    "low cup": ("malformed",),
    "duplicate": ("duplicate",),
    "spot": ("loose part",),
    "overlap": ("malformed",),
    "blend": ("malformed",),
    "ghost": ("malformed",),
    "blank": ("empty",),
}
_Rng = np.random.Generator
_ROWS = np.arange(BLOCK)


def _paint(rng: _Rng) -> Whole:
    return rng.integers(0, len(PAINTS), BLOCK)


def _other(rng: _Rng, paint: Whole) -> Whole:
    return (paint + rng.integers(1, len(PAINTS), BLOCK)) % len(PAINTS)


def _flowers(rng: _Rng, kind: str) -> Flowers:
    paint = _paint(rng)
    if kind in ("fewer petals", "more petals"):
        parts = draw_flowers(rng, paint, -1 if kind == "fewer petals" else 1)
        return dataclasses.replace(parts, width=np.minimum(parts.width, 3.6))  # seven wide ones would touch
    parts, one = draw_flowers(rng, paint), rng.integers(0, min(PETALS), BLOCK)
    if kind == "other flower's petals":
        return dataclasses.replace(parts, paint=np.tile(_other(rng, paint)[:, None], (1, parts.paint.shape[1])))
    if kind == "patchwork petals":
        parts.paint[_ROWS, one] = _other(rng, paint)
    elif kind == "loose petal":
        parts.root[_ROWS, one] = parts.disc + rng.uniform(1.6, 2.0, BLOCK) + parts.width[_ROWS, one] / 2
    elif kind == "short petals":
        parts.tip[:] = np.where(np.isfinite(parts.tip), rng.uniform(7.9, 8.6, parts.tip.shape), np.nan)
    elif kind == "no disc":
        parts.disc[:] = -1.0
    else:
        parts.disc[:] = rng.uniform(5.9, 6.4, BLOCK)
    return parts


def _butterflies(rng: _Rng, kind: str) -> Butterflies:
    parts, side = draw_butterflies(rng, _paint(rng)), rng.integers(0, 2, BLOCK)
    if kind == "two-colored wings":
        parts.paint[_ROWS, side] = _other(rng, parts.paint[:, 0])
    elif kind == "loose wing":
        parts.center[:] = CELL / 2
        np.minimum(parts.upper, 4.6, out=parts.upper)
        parts.gap[_ROWS, side] = rng.uniform(3.2, 3.6, BLOCK)
    else:
        share = rng.uniform(0.6, 0.7, BLOCK) if kind == "small wing" else np.zeros(BLOCK)
        for radius in (parts.upper, parts.lower):
            radius[_ROWS, side] *= share
            if kind == "no wings":
                radius[:] = 0.0
    return parts


def _cups(rng: _Rng, kind: str) -> Cups:
    parts = draw_cups(rng, _paint(rng))
    side = (parts.ring[:, 1] > 0).astype(np.int64)
    if kind == "no handle":
        parts.ring[:] = 0.0
    elif kind == "open handle":
        parts.open[_ROWS, side] = rng.uniform(2.8, 3.6, BLOCK)
    elif kind == "two handles":
        parts.center[:] = CELL / 2
        parts.ring[:] = parts.ring.max(axis=1, keepdims=True)
    elif kind == "loose handle":
        parts.center[:] = np.stack([CELL / 2 + np.where(side, -7.0, 7.0), np.full(BLOCK, CELL / 2)], axis=1)
        parts.width[:] = 10.0
        parts.ring[_ROWS, side] = 4.2
        parts.gap[_ROWS, side] = 4.2 + rng.uniform(1.0, 1.4, BLOCK)
    else:
        parts.width[:] = 10.0
        parts.height[:] = rng.uniform(7.6, 8.2, BLOCK)
    return parts


_OF_KIND: tuple[tuple[Callable[[_Rng, str], Flowers | Butterflies | Cups], frozenset[str]], ...] = (
    (
        _flowers,
        frozenset(
            "fewer petals,more petals,other flower's petals,patchwork petals,loose petal,short petals,no disc,"
            "large disc".split(",")
        ),
    ),
    (_butterflies, frozenset(("one wing", "small wing", "no wings", "two-colored wings", "loose wing"))),
    (_cups, frozenset(("no handle", "open handle", "two handles", "loose handle", "low cup"))),
)


def _others(rng: _Rng, one: Whole) -> tuple[list[Sprite], Whole, Whole]:
    """Draw scenes that hold object `one` (N,) and perhaps others; also where it lies, and a quarter that is free."""
    factors = draw(rng, rng.integers(1, 8, BLOCK) | 1 << one)
    taken = (factors.cell[:, :, None] == np.arange(4)).any(axis=1)
    free = (rng.random((BLOCK, 4)) + taken).argmin(axis=1)
    return factors.sprites(), factors.cell[_ROWS, one], free


def _copies(rng: _Rng, one: Whole) -> Array:
    """Draw single objects of the given kinds (N,)."""
    images = np.stack([draw_k(rng, _paint(rng)).render() for draw_k in (draw_flowers, draw_butterflies, draw_cups)])
    return images[one, _ROWS]


def _spots(rng: _Rng) -> Array:
    axis = np.arange(CELL) + 0.5
    x, y, radius = (rng.uniform(*limits, (BLOCK, 1, 1)) for limits in ((8, 24), (8, 24), (1.6, 4.0)))
    distance = np.hypot(axis[None, None, :] - x, axis[None, :, None] - y) - radius
    return np.clip(0.5 - distance, 0, 1)[..., None] * COLORS[_paint(rng)][:, None, None, :]


def _overlap(rng: _Rng) -> Array:
    """A flower on top of a butterfly."""
    below, above = (_copies(rng, np.full(BLOCK, k)) for k in (1, 0))
    return np.where(above.max(axis=3, keepdims=True) > 0.5, above, below)


def _scenes(rng: _Rng, kind: str) -> Pixels:
    one = rng.integers(0, len(KINDS), BLOCK)
    sprites, _, free = _others(rng, one)
    if kind == "overlap":
        return compose(BLOCK, [*sprites, Sprite(_overlap(rng), _ROWS, free)])
    if kind == "duplicate":
        return compose(BLOCK, [*sprites, Sprite(_copies(rng, one), _ROWS, free)])
    if kind == "spot":
        return compose(BLOCK, [*sprites, Sprite(_spots(rng), _ROWS, free)])
    second = (one + rng.integers(1, len(KINDS), BLOCK)) % len(KINDS)
    if kind == "ghost":
        return compose(BLOCK, [*sprites, Sprite(0.35 * _copies(rng, second), _ROWS, free)])
    image = (_copies(rng, one) + _copies(rng, second)) / 2
    return compose(BLOCK, [*sprites, Sprite(image, _ROWS, free)])


def render(rng: _Rng, kind: str) -> Pixels:
    """Return a block of scenes with a fault of this kind, uint8 of shape (BLOCK, 3, SIZE, SIZE)."""
    if kind == "blank":
        return compose(BLOCK, [])
    for k, (draw_faulty, kinds) in enumerate(_OF_KIND):
        if kind in kinds:
            sprites, cell, _ = _others(rng, np.full(BLOCK, k))
            sprites[k] = Sprite(draw_faulty(rng, kind).render(), _ROWS, cell)
            return compose(BLOCK, sprites)
    return _scenes(rng, kind)
