"""The verdict on a picture of shapes: cut it into regions and hold each of them against the three real shapes.

Regions are the 8-connected components of gray > 0.35, each with the fringe of pixels that touch it; those with a gray
mass below 2 are ignored. Each region is compared with the three shapes as `polygons` draws them at its centroid:
fit = Σ min(region, shape) / Σ max(region, shape), and the best fit names it. The first rule that applies gives the
verdict:

    empty          no region, and nothing faint either
    malformed      a best fit below 0.84 or less than 0.09 above the next (a cross of two shapes), or a gray mass of 2
                   or more, brighter than 0.2, outside all regions
    duplicate      one shape twice
    wrong column   a shape's centroid is not in the shape's third
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from fanal.datasets.base import Array, Whole
from fanal.datasets.polygons import COLUMN, SHAPES, distance
from fanal.datasets.regions import chunks, label, per_region

__all__ = ["VERDICTS", "measure", "verify"]

VERDICTS = ("ok", "duplicate", "malformed", "wrong column", "empty")
SOLID, FAINT, MIN_MASS = 0.35, 0.2, 2.0
MIN_FIT, MIN_LEAD = 0.84, 0.09  # blurred by 0.5 pixels, real shapes keep 0.862 and 0.122
_REACH = 8  # half side of the window in which a region is compared; holds every shape


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """What is seen in N pictures; (N,), `counts` (N, 3)."""

    counts: Whole
    area: Array
    fit: Array
    lead: Array
    faint: Array
    misplaced: Whole


def verify(gray: Array) -> Tensor:
    """Return one index into `VERDICTS` per picture; `gray` is an image in [-1, 1] of shape (N, H, W)."""
    s = _look(gray)
    rules = {
        "malformed": (s.fit < MIN_FIT) | (s.lead < MIN_LEAD) | (s.faint >= MIN_MASS),
        "empty": s.counts.sum(axis=1) == 0,
        "duplicate": (s.counts > 1).any(axis=1),
        "wrong column": s.misplaced > 0,
    }
    codes = [VERDICTS.index(name) for name in rules]
    return torch.from_numpy(np.select(list(rules.values()), codes, 0).astype(np.int64))


def measure(gray: Array) -> dict[str, Tensor]:
    """Return what the verifier sees in images in [-1, 1] of shape (N, H, W).

    Whole numbers: `shapes` (regions), `triangles`, `squares`, `pentagons`, `misplaced` (regions outside their third).
    float32: `area` (gray mass of the regions, in pixels), `fit` (the worst best fit) and `lead` (the smallest lead over
    the next best), both 1 where there is no region, `faint` (gray mass outside the regions, where brighter than 0.2).
    """
    s = _look(gray)
    whole = {"shapes": s.counts.sum(axis=1), "misplaced": s.misplaced}
    whole |= {f"{shape}s": s.counts[:, k] for k, shape in enumerate(SHAPES)}
    real = {"area": s.area, "fit": s.fit, "lead": s.lead, "faint": s.faint}
    return {k: torch.from_numpy(v).long() for k, v in whole.items()} | {
        k: torch.from_numpy(v).float() for k, v in real.items()
    }


def _look(gray: Array) -> _Sight:
    seen = [_look_at(np.clip((chunk + 1.0) / 2.0, 0.0, 1.0)) for chunk in chunks(gray)]
    return _Sight(*(np.concatenate([getattr(s, f.name) for s in seen]) for f in fields(_Sight)))


def _look_at(gray: Array) -> _Sight:
    n, h, w = gray.shape
    regions = label(gray > SOLID)
    index = regions.index
    if n:
        index = np.where(index > 0, index, ndimage.maximum_filter(index, size=(1, 3, 3), mode="constant"))
    total = len(regions.area)
    flat = index.reshape(-1)
    row, column = (np.broadcast_to(c, gray.shape).reshape(-1) for c in (np.arange(h)[:, None], np.arange(w)))
    weight = gray.reshape(-1)
    mass = np.bincount(flat, weight, total).astype(np.float64)
    kept = np.flatnonzero((mass >= MIN_MASS) & (np.arange(total) > 0))
    y, x = (np.bincount(flat, weight * c, total)[kept] / mass[kept] for c in (row, column))
    owner, mass = regions.owner[kept], mass[kept]
    kind, fit, lead = _compare(gray, index, owner, kept, (y, x, mass))
    third = np.clip(np.floor((x + 0.5) / COLUMN), 0, len(SHAPES) - 1)
    some = np.bincount(owner, minlength=n) > 0
    outside = np.where((index == 0) & (gray > FAINT), gray, 0.0)
    return _Sight(
        counts=np.bincount(owner * len(SHAPES) + kind, minlength=n * len(SHAPES)).reshape(n, len(SHAPES)),
        area=np.bincount(owner, mass, minlength=n).astype(np.float64),
        fit=np.where(some, per_region(owner, fit, n, "min"), 1.0),
        lead=np.where(some, per_region(owner, lead, n, "min"), 1.0),
        faint=outside.sum(axis=(1, 2)),
        misplaced=np.bincount(owner, third != kind, minlength=n).astype(np.int64),
    )


def _compare(
    gray: Array, index: Whole, owner: Whole, kept: Whole, place: tuple[Array, ...]
) -> tuple[Whole, Array, Array]:
    """Return the best-fitting shape of each kept region, how well it fits, and how much better than the next."""
    y, x, mass = place
    margin = ((0, 0), (_REACH, _REACH), (_REACH, _REACH))
    steps = np.arange(-_REACH, _REACH + 1)
    top, left = np.rint(y).astype(np.int64)[:, None, None], np.rint(x).astype(np.int64)[:, None, None]
    picture, rows, columns = owner[:, None, None], top + _REACH + steps[:, None], left + _REACH + steps
    own = np.pad(index, margin)[picture, rows, columns] == kept[:, None, None]
    region = np.where(own, np.pad(gray, margin)[picture, rows, columns], 0.0)
    dy, dx = top + steps[:, None] - y[:, None, None], left + steps - x[:, None, None]
    fits = np.empty((len(kept), len(SHAPES)))
    for k in range(len(SHAPES)):
        shape = np.clip(0.5 - distance(k, dx, dy), 0.0, 1.0)
        shared = np.minimum(region, shape).sum(axis=(1, 2))
        fits[:, k] = shared / (mass + shape.sum(axis=(1, 2)) - shared)
    ordered = np.sort(fits, axis=1)
    return fits.argmax(axis=1), ordered[:, -1], ordered[:, -1] - ordered[:, -2]
