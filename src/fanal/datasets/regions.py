"""Connected regions and distances of many pictures at once: framed, stacked into one tall picture, and cut again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fanal.datasets.base import Array, Whole

__all__ = ["CHUNK", "Mask", "Regions", "chunks", "depth", "label", "per_region"]

CHUNK = 256  # pictures looked at together; bounds memory, changes no result
Mask = NDArray[np.bool_]
_EIGHT = np.ones((3, 3), dtype=np.int8)


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """The 8-connected regions of N masks.

    Attributes:
        index: region of each pixel, (N, H, W), counted from 1 through all pictures; 0 is background.
        owner: picture of each region, (R + 1,); entry 0 stands for the background and means nothing.
        area: pixels of each region, (R + 1,); 0 for the background.
    """

    index: Whole
    owner: Whole
    area: Whole


def chunks(pictures: Array) -> Iterator[Array]:
    """Yield the pictures in chunks of at most `CHUNK`; no pictures give one empty chunk."""
    for start in range(0, max(len(pictures), 1), CHUNK):
        yield pictures[start : start + CHUNK]


def _stack(mask: Mask) -> Mask:
    """Frame each picture with one pixel of background and stack them, so that no two pictures touch."""
    n, h, w = mask.shape
    tall = np.zeros((n, h + 2, w + 2), dtype=bool)
    tall[:, 1:-1, 1:-1] = mask
    return tall.reshape(n * (h + 2), w + 2)


def label(mask: Mask) -> Regions:
    """Find the 8-connected regions of each mask of shape (N, H, W)."""
    n, h, w = mask.shape
    tall = np.zeros((n * (h + 2), w + 2), dtype=np.int32)
    ndimage.label(_stack(mask), structure=_EIGHT, output=tall)
    index = tall.reshape(n, h + 2, w + 2)[:, 1:-1, 1:-1]
    where = np.flatnonzero(mask)
    regions = index.reshape(-1)[where] if mask.size else np.zeros(0, dtype=np.int32)
    area = np.bincount(regions, minlength=1)
    owner = np.zeros(len(area), dtype=np.int64)
    owner[regions] = where // (h * w)
    return Regions(index, owner, area)


def depth(mask: Mask) -> Array:
    """Return the distance of each pixel of (N, H, W) to the nearest background pixel of its own picture.

    What lies outside a picture is background. The nearest background pixel of the stack is never in another picture:
    the frame in between is nearer.
    """
    n, h, w = mask.shape
    if n == 0:
        return np.zeros(mask.shape)
    tall = ndimage.distance_transform_edt(_stack(mask))
    return np.asarray(tall).reshape(n, h + 2, w + 2)[:, 1:-1, 1:-1]


def per_region(which: Whole, values: Array, count: int, how: str) -> Array:
    """Reduce `values` over equal `which` in [0, count): how is "max" or "min", and 0 where there is nothing."""
    reduce, start = (np.maximum, -np.inf) if how == "max" else (np.minimum, np.inf)
    out = np.full(count, start)
    reduce.at(out, which, values)
    return np.where(np.isfinite(out), out, 0.0)
