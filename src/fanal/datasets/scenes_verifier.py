"""The verdict on a scene: cut it into regions, tell by its colors what each of them is, and check its parts.

A pixel's value is its largest channel, in [0, 1]. Regions are the 8-connected components of value > 0.5, of 3 pixels or
more. A pixel has the color of `COLORS` within 0.25 (Euclidean), or none. Ten pixels of yellow, white or violet make a
region a flower, a butterfly or a cup. The first rule that applies gives the verdict (lengths in pixels):

    malformed      a region of several kinds; a petal with its tip not in [9.5, 15] or a mean width not in [1.6, 5.6];
                   a disc, body, cup or hole of a size that no real one has; larger wings; a cup that is no rectangle; 5
                   pixels or more without a color, like all their neighbors; a mass of 3 or more outside the regions,
                   where value > 0.25
    mixed color    the parts of an object have two paints: the second has 5 pixels and a tenth of all paint, or more
    loose part     a region with less than 10 pixels of yellow, white and violet
    duplicate      two flowers, two butterflies or two cups
    extra petal    a flower has more petals than its paint asks for; a petal is a region of the flower farther than 7
                   from the disc's centroid, of 2.5 square pixels or more
    missing petal  fewer
    uneven wings   left and right of the body's axis agree by less than 0.72 (Σ min / Σ max of the values, one side
                   mirrored), or there is hardly anything
    broken handle  a cup encloses no hole of 4 pixels of value < 0.35 or more, or several
    empty          no region
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from fanal.datasets.base import Array, Whole
from fanal.datasets.regions import Mask, Regions, chunks, label, per_region
from fanal.datasets.scenes_drawing import COLORS, KINDS, PETALS

__all__ = ["VERDICTS", "measure", "verify"]

VERDICTS = (
    "ok",
    "malformed",
    "mixed color",
    "loose part",
    "duplicate",
    "extra petal",
    "missing petal",
    "uneven wings",
    "broken handle",
    "empty",
)
SOLID, FAINT, DARK, NEAR, KEY = 0.5, 0.25, 0.35, 0.25, 10
MIN_PART, MIN_PETAL, MIN_HOLE, RING = 3, 2.5, 4, 7.0
SECOND, SECOND_SHARE, MIRROR = 5, 0.1, 0.72
TIP, PETAL_WIDTH, MIN_WING = (9.5, 15.0), (1.6, 5.6), 40
DISC, BODY, WINGS, CUP, HOLE = (24, 80), (20, 75), (0, 290), (95, 230), (4, 45)
STRAIGHT, UNNAMED, MIN_FAINT = (0.9, 1.06), 5, 3.0
_REACH, _ALONG = np.arange(2.5, 15.0), np.arange(-12.0, 12.5)  # where wings are compared: off and along the axis


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """What is seen in N pictures; every field has shape (N,)."""

    flowers: Whole
    butterflies: Whole
    cups: Whole
    loose: Whole
    mixed: Whole
    malformed: Whole
    extra: Whole
    missing: Whole
    uneven: Whole
    broken: Whole
    petals: Whole
    red: Whole
    green: Whole
    blue: Whole
    mirror: Array
    faint: Array
    area: Array
    flower_radius: Array
    wing_area: Array
    cup_area: Array


def verify(x: Array) -> Tensor:
    """Return one index into `VERDICTS` per picture; `x` is an image in [-1, 1] of shape (N, 3, H, W)."""
    s = _look(x)
    wrong = [
        (s.malformed > 0) | (s.faint >= MIN_FAINT),
        s.mixed > 0,
        s.loose > 0,
        (s.flowers > 1) | (s.butterflies > 1) | (s.cups > 1),
        s.extra > 0,
        s.missing > 0,
        s.uneven > 0,
        s.broken > 0,
        s.flowers + s.butterflies + s.cups == 0,
    ]
    return torch.from_numpy(np.select(wrong, range(1, len(VERDICTS)), 0).astype(np.int64))


def measure(x: Array) -> dict[str, Tensor]:
    """Return what the verifier sees in images in [-1, 1] of shape (N, 3, H, W).

    Whole numbers: `objects`; `flowers`, `butterflies`, `cups`; `petals` of all flowers; objects painted
    `red`, `green` and `blue`, by the largest part of their paint; `loose` regions, and how many
    objects are `mixed` in color, `malformed`, have `extra` or `missing` petals, `uneven` wings or a `broken` handle.
    float32: `mirror` (the worst agreement of two wings, 1 without a butterfly), `faint` (mass outside the regions),
    `area` (pixels of all regions), and of the objects of a kind together: `flower_radius` (mean radius of the petals'
    tips), `wing_area`, `cup_area`; 0 where there is none.
    """
    s = _look(x)
    found = {"objects": s.flowers + s.butterflies + s.cups} | {f.name: getattr(s, f.name) for f in fields(s)}
    real = ("mirror", "faint", "area", "flower_radius", "wing_area", "cup_area")
    return {
        name: torch.from_numpy(np.asarray(value)).to(torch.float32 if name in real else torch.int64)
        for name, value in found.items()
    }


def _look(x: Array) -> _Sight:
    seen = [_look_at(np.clip((chunk + 1.0) / 2.0, 0.0, 1.0).astype(np.float32)) for chunk in chunks(x)]
    return _Sight(*(np.concatenate([getattr(s, f.name) for s in seen]) for f in fields(_Sight)))


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """N pictures cut up; P foreground pixels, R regions, entry 0 of which is the background.

    Attributes:
        value: largest channel, (N, H, W).
        regions: of value > 0.5.
        picture: of each foreground pixel, (P,).
        row: of each foreground pixel, (P,).
        column: of each foreground pixel, (P,).
        region: of each foreground pixel, (P,).
        color: index into `COLORS` of each foreground pixel, or -1, (P,).
        counts: pixels of each color in each region, (R, 6).
        kind: of each region: index into `KINDS`, 3 for several kinds, -1 for none, -2 for a speck, (R,).
    """

    value: Array
    regions: Regions
    picture: Whole
    row: Whole
    column: Whole
    region: Whole
    color: Whole
    counts: Whole
    kind: Whole


def _cut(rgb: Array) -> _Scene:
    value = rgb.max(axis=1)
    regions = label(value > SOLID)
    picture, row, column = np.nonzero(regions.index)
    pixels = rgb[picture, :, row, column]
    distance = np.stack([((pixels - color) ** 2).sum(axis=1) for color in COLORS], axis=1)
    color = np.where(distance.min(axis=1, initial=np.inf) < NEAR**2, distance.argmin(axis=1), -1)
    region = regions.index[picture, row, column]
    total, named = len(regions.area), color >= 0
    counts = np.bincount(region[named] * 6 + color[named], minlength=6 * total).reshape(total, 6)
    keys = counts[:, 3:] >= KEY
    kind = np.select([keys.sum(axis=1) > 1, keys.any(axis=1)], [3, keys.argmax(axis=1)], -1)
    kind[regions.area < MIN_PART] = -2
    return _Scene(value, regions, picture, row, column, region, color, counts, kind)


def _look_at(rgb: Array) -> _Sight:
    scene, n = _cut(rgb), len(rgb)
    owner, kind, counts = scene.regions.owner, scene.kind, scene.counts
    paint = np.sort(counts[:, :3], axis=1)
    thing = kind >= 0
    bad = (kind == 3) | ((kind > -2) & (_unnamed(scene) >= UNNAMED))
    petals, radius, stray = _flowers(scene)
    mirror, wings, odd = _butterflies(scene)
    holes, crooked = _cups(scene)
    main = np.where(thing & (paint[:, 2] > 0), counts[:, :3].argmax(axis=1), -1)
    due = np.array(PETALS)[main]
    flower, butterfly, cup = ((kind == k) & ~bad for k in range(len(KINDS)))

    def number(which: Mask) -> Whole:
        return np.bincount(owner[which], minlength=n).astype(np.int64)

    def total(which: Mask, amount: Array | Whole) -> Array:
        return np.bincount(owner[which], amount[which], minlength=n).astype(np.float64)

    here = np.flatnonzero(butterfly)
    agreement = np.ones(n)
    np.minimum.at(agreement, owner[here], mirror[here])
    bloom = number(flower & (petals > 0))
    return _Sight(
        flowers=number(kind == 0),
        butterflies=number(kind == 1),
        cups=number(kind == 2),
        loose=number(kind == -1),
        mixed=number(thing & (paint[:, 1] >= SECOND) & (paint[:, 1] >= SECOND_SHARE * paint.sum(axis=1))),
        malformed=number(bad | (flower & stray) | (butterfly & odd) | (cup & crooked)),
        extra=number(flower & (petals > due)),
        missing=number(flower & (petals < due)),
        uneven=number(butterfly & (mirror < MIRROR)),
        broken=number(cup & (holes != 1)),
        petals=total(flower, petals).astype(np.int64),
        red=number(main == 0),
        green=number(main == 1),
        blue=number(main == 2),
        mirror=agreement,
        faint=_faint(scene),
        area=total(kind > -2, scene.regions.area),
        flower_radius=total(flower, radius) / np.maximum(bloom, 1),
        wing_area=total(butterfly, wings),
        cup_area=total(cup, counts[:, 5]),
    )


def _near(index: Whole | Mask, reach: int) -> Whole:
    """Largest value among the pixels that are at most `reach` rows and columns away."""
    side = 2 * reach + 1
    return np.asarray(ndimage.maximum_filter(index, size=(1, side, side)), dtype=np.int32)


def _faint(scene: _Scene) -> Array:
    """Mass of each picture outside the regions and the pixels that touch them."""
    near = _near(scene.regions.index, 1)
    return np.where((near == 0) & (scene.value > FAINT), scene.value, 0.0).sum(axis=(1, 2))


def _unnamed(scene: _Scene) -> Whole:
    """Foreground pixels of each region that have no color, like all their neighbors: more than an edge."""
    none = np.zeros(scene.value.shape, dtype=bool)
    none[scene.picture, scene.row, scene.column] = scene.color < 0
    deep = _near(~none, 1)[scene.picture, scene.row, scene.column] == 0
    return np.bincount(scene.region[deep], minlength=len(scene.kind))


def _moments(scene: _Scene, color: int) -> tuple[Array, Array, Whole]:
    """Centroid (R, 2) of each region's pixels of a color, their covariance (R, 2, 2), in (row, column); and number."""
    some = scene.color == color
    region, total = scene.region[some], len(scene.kind)
    place = np.stack([scene.row[some], scene.column[some]], axis=1).astype(np.float64)
    number = np.bincount(region, minlength=total)
    safe = np.maximum(number, 1)
    center = np.stack([np.bincount(region, place[:, k], total) for k in range(2)], axis=1) / safe[:, None]
    away = place - center[region]
    spread = np.empty((total, 2, 2))
    for i in range(2):
        for j in range(2):
            spread[:, i, j] = np.bincount(region, away[:, i] * away[:, j], total) / safe
    return center, spread, number.astype(np.int64)


def _within(values: Array | Whole, limits: tuple[float, float]) -> Mask:
    return (values >= limits[0]) & (values <= limits[1])


def _flowers(scene: _Scene) -> tuple[Whole, Array, Mask]:
    """Petals of each region, the mean radius of their tips, and whether disc or petals have an impossible size."""
    total = len(scene.kind)
    center, _, disc = _moments(scene, 3)
    away = np.hypot(scene.row - center[scene.region, 0], scene.column - center[scene.region, 1])
    far = (scene.kind[scene.region] == 0) & (away > RING)
    beyond = np.zeros(scene.value.shape, dtype=bool)
    beyond[scene.picture[far], scene.row[far], scene.column[far]] = True
    parts = label(beyond)
    index = parts.index[scene.picture[far], scene.row[far], scene.column[far]]
    tip = per_region(index, away[far] + 0.5, len(parts.area), "max")
    flower = per_region(index, scene.region[far].astype(np.float64), len(parts.area), "max").astype(np.int64)
    real = parts.area >= MIN_PETAL
    flower, tip, width = flower[real], tip[real], parts.area[real] / np.maximum(tip[real] - RING, 0.5)
    petals = np.bincount(flower, minlength=total)
    radius = np.bincount(flower, tip, minlength=total) / np.maximum(petals, 1)
    odd = np.bincount(flower, ~(_within(tip, TIP) & _within(width, PETAL_WIDTH)), minlength=total) > 0
    return petals.astype(np.int64), radius, odd | ~_within(disc, DISC)


def _butterflies(scene: _Scene) -> tuple[Array, Whole, Mask]:
    """How well the sides of each region mirror each other, the wings' area, and whether a size is impossible."""
    center, spread, body = _moments(scene, 4)
    here = np.flatnonzero(scene.kind == 1)
    mirror = np.ones(len(scene.kind))
    axis = np.linalg.eigh(spread[here])[1][:, :, 1]
    fringe = _near(scene.regions.index, 1)
    sides = []
    for sign in (-1.0, 1.0):
        u, v = sign * _REACH[:, None], _ALONG[None, :]
        row = center[here, 0, None, None] + v * axis[:, 0, None, None] - u * axis[:, 1, None, None]
        column = center[here, 1, None, None] + v * axis[:, 1, None, None] + u * axis[:, 0, None, None]
        sides.append(_sample(scene.value, fringe, here, scene.regions.owner[here], row, column))
    shared, either = (f(*sides).sum(axis=(1, 2)) for f in (np.minimum, np.maximum))
    mirror[here] = np.where(either >= MIN_WING, shared / np.maximum(either, 1.0), 0.0)
    wings = scene.counts[:, :3].sum(axis=1)
    return mirror, wings, ~(_within(body, BODY) & _within(wings, WINGS))


def _sample(value: Array, fringe: Whole, own: Whole, picture: Whole, row: Array, column: Array) -> Array:
    """Interpolate each region's own values, with the pixels that touch it, at points (K, U, V); 0 elsewhere."""
    size = value.shape[1]
    top, left = np.floor(row).astype(np.int64), np.floor(column).astype(np.int64)
    result = np.zeros(row.shape)
    for dy in range(2):
        for dx in range(2):
            y, x = top + dy, left + dx
            inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
            y, x = np.clip(y, 0, size - 1), np.clip(x, 0, size - 1)
            at = picture[:, None, None], y, x
            weight = (1 - np.abs(row - y)) * (1 - np.abs(column - x))
            result += np.where(inside & (fringe[at] == own[:, None, None]), weight * value[at], 0.0)
    return result


def _cups(scene: _Scene) -> tuple[Whole, Mask]:
    """Holes that each region encloses, and whether the cup has an impossible size or is no rectangle."""
    total = len(scene.kind)
    _, spread, number = _moments(scene, 5)
    ground = label(scene.value < DARK)
    outer = np.zeros(len(ground.area), dtype=bool)
    for edge in (ground.index[:, 0], ground.index[:, -1], ground.index[:, :, 0], ground.index[:, :, -1]):
        outer[edge.ravel()] = True
    near = _near(scene.regions.index, 2)
    around = per_region(ground.index.ravel(), near.ravel().astype(np.float64), len(ground.area), "max").astype(np.int64)
    real = ~outer & (ground.area >= MIN_HOLE)
    holes = np.bincount(around[real], minlength=total)
    size = np.bincount(around[real], ground.area[real], minlength=total)
    # A rectangle of sides a, b has variances a²/12 and b²/12.
    straight = number / np.maximum(12.0 * np.sqrt(np.maximum(np.linalg.det(spread), 0.0)), 1.0)
    usual = (holes == 0) | _within(size / np.maximum(holes, 1), HOLE)
    return holes.astype(np.int64), ~(_within(number, CUP) & _within(straight, STRAIGHT) & usual)
