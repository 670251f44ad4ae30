"""The verdict on a hand: find the palm, draw a ring around it, and count what sticks out.

The picture is enlarged threefold (bilinear) and cut at gray 0.5; the hand is the largest 8-connected region.
The palm radius R is the radius of the largest disc that fits into the hand (on the pixel grid, so that it reads a real
palm about 0.27 too small), its center the centroid of the pixels that lie at least 0.85 R deep. Fingers are the regions
of the hand farther than R + 2.6 from the center, of 0.6 square pixels or more. The first rule that applies gives the
verdict (lengths in pixels of the original):

    bad palm         R is not in [4.3, 6.9]
    disconnected     there is a second region of 1 square pixel or more
    extra finger     more than five fingers
    missing finger   fewer than five fingers
    malformed        a finger's tip is not at a radius in [9.4, 15.8], or its mean width (area beyond the ring over
                     length beyond the ring) is not in [0.9, 3.2]
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fanal.datasets.base import Array, Whole
from fanal.datasets.regions import Mask, Regions, chunks, depth, label, per_region

__all__ = ["VERDICTS", "measure", "verify"]

VERDICTS = ("ok", "bad palm", "disconnected", "extra finger", "missing finger", "malformed")
FINGERS = 5
PALM_RADIUS, TIP_RADIUS, WIDTH = (4.3, 6.9), (9.4, 15.8), (0.9, 3.2)
RING, MIN_FINGER, MIN_PART = 2.6, 0.6, 1.0
_ZOOM = 3
_REACH = 9 * _ZOOM  # half side of the window in which the palm is measured; deeper palms are bad anyway


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """What is seen in N pictures; every field has shape (N,)."""

    fingers: Whole
    palm_radius: Array
    palm_x: Array
    palm_y: Array
    area: Array
    parts: Whole
    shortest_tip: Array
    longest_tip: Array
    finger_length: Array
    narrowest: Array
    widest: Array


def verify(gray: Array) -> Tensor:
    """Return one index into `VERDICTS` per picture; `gray` is an image in [-1, 1] of shape (N, H, W)."""
    s = _look(gray)
    wrong = [
        (s.palm_radius < PALM_RADIUS[0]) | (s.palm_radius > PALM_RADIUS[1]),
        s.parts > 1,
        s.fingers > FINGERS,
        s.fingers < FINGERS,
        (s.shortest_tip < TIP_RADIUS[0])
        | (s.longest_tip > TIP_RADIUS[1])
        | (s.narrowest < WIDTH[0])
        | (s.widest > WIDTH[1]),
    ]
    return torch.from_numpy(np.select(wrong, range(1, len(VERDICTS)), 0).astype(np.int64))


def measure(gray: Array) -> dict[str, Tensor]:
    """Return what the verifier sees in images in [-1, 1] of shape (N, H, W); lengths in pixels of the image.

    Whole numbers: `fingers`, `parts` (regions of 1 square pixel or more). float32: `palm_radius`, `palm_x`, `palm_y`,
    `area` (of the hand), `shortest_tip`, `longest_tip` (radii), `finger_length` (mean of tip radius minus palm radius),
    `narrowest`, `widest` (mean widths of single fingers); 0 where there is no finger.
    """
    s = _look(gray)
    whole = {"fingers", "parts"}
    return {
        f.name: torch.from_numpy(getattr(s, f.name)).to(torch.int64 if f.name in whole else torch.float32)
        for f in fields(s)
    }


def _look(gray: Array) -> _Sight:
    seen = [_look_at(np.clip((chunk + 1.0) / 2.0, 0.0, 1.0)) for chunk in chunks(gray)]
    return _Sight(*(np.concatenate([getattr(s, f.name) for s in seen]) for f in fields(_Sight)))


def _look_at(gray: Array) -> _Sight:
    n = len(gray)
    mask = _enlarge(gray) > 0.5
    regions = label(mask)
    hand, parts = _largest(regions, n)
    radius, y, x = _palm(hand)
    where = np.flatnonzero(hand)
    picture, row, column = np.unravel_index(where, hand.shape)
    away = np.sqrt((row - y[picture]) ** 2 + (column - x[picture]) ** 2)
    ring = radius + RING * _ZOOM
    beyond = np.zeros(hand.shape, dtype=bool)
    beyond.reshape(-1)[where] = away > ring[picture]
    fingers = label(beyond)
    index = fingers.index.reshape(n, -1)[picture, where % hand[0].size] if n else np.zeros(0, dtype=np.int32)
    tip = per_region(index, away + 0.5, len(fingers.area), "max")
    real = fingers.area >= MIN_FINGER * _ZOOM**2
    owner, tip, area = fingers.owner[real], tip[real], fingers.area[real]
    width = area / (tip - ring[owner])
    count = np.bincount(owner, minlength=n)
    length = np.bincount(owner, tip - radius[owner], minlength=n) / np.maximum(count, 1)
    return _Sight(
        fingers=count,
        palm_radius=radius / _ZOOM,
        palm_x=(x + 0.5) / _ZOOM,
        palm_y=(y + 0.5) / _ZOOM,
        area=hand.sum(axis=(1, 2)) / _ZOOM**2,
        parts=parts,
        shortest_tip=per_region(owner, tip, n, "min") / _ZOOM,
        longest_tip=per_region(owner, tip, n, "max") / _ZOOM,
        finger_length=length / _ZOOM,
        narrowest=per_region(owner, width, n, "min") / _ZOOM,
        widest=per_region(owner, width, n, "max") / _ZOOM,
    )


def _enlarge(gray: Array) -> Array:
    """Enlarge pictures threefold, bilinear: every pixel's center stays a pixel's center."""
    for axis in (1, 2):
        padded = np.concatenate([gray.take([0], axis), gray, gray.take([-1], axis)], axis)
        size = gray.shape[axis]
        before, after = (padded.take(np.arange(size) + shift, axis) for shift in (0, 2))
        fine = np.stack([(before + 2.0 * gray) / 3.0, gray, (2.0 * gray + after) / 3.0], axis=axis + 1)
        shape = list(gray.shape)
        shape[axis] = size * _ZOOM
        gray = fine.reshape(shape)
    return gray


def _largest(regions: Regions, n: int) -> tuple[Mask, Whole]:
    """Return the mask of each picture's largest region, and how many regions count."""
    order = np.lexsort((-np.arange(len(regions.area)), regions.area))  # the largest last, of equals the first
    order = order[order > 0]
    main = np.zeros(n, dtype=np.int64)
    main[regions.owner[order]] = order
    large = np.flatnonzero(regions.area >= MIN_PART * _ZOOM**2)
    hand = (regions.index == main[:, None, None]) & (regions.index > 0)
    return hand, np.bincount(regions.owner[large], minlength=n)


def _palm(hand: Mask) -> tuple[Array, Array, Array]:
    """Return the palm's radius and the row and column of its center, in pixels of the enlarged picture."""
    n, h, w = hand.shape
    # The distance transform costs most: it is taken at the original size first, and then only around its maximum.
    coarse = depth(hand[:, 1::_ZOOM, 1::_ZOOM])
    peak = coarse.reshape(n, (h // _ZOOM) * (w // _ZOOM)).argmax(axis=1)
    top, left = (_ZOOM * (peak // (w // _ZOOM)) + 1), (_ZOOM * (peak % (w // _ZOOM)) + 1)
    padded = np.pad(hand, ((0, 0), (_REACH, _REACH), (_REACH, _REACH)))
    steps = np.arange(2 * _REACH + 1)
    window = padded[np.arange(n)[:, None, None], top[:, None, None] + steps[:, None], left[:, None, None] + steps]
    fine = depth(window)
    deepest = fine.max(axis=(1, 2))
    core = (fine >= 0.85 * deepest[:, None, None]) & window
    size = np.maximum(core.sum(axis=(1, 2)), 1)
    y = (core.sum(axis=2) * (steps - _REACH)).sum(axis=1) / size + top
    x = (core.sum(axis=1) * (steps - _REACH)).sum(axis=1) / size + left
    return np.maximum(deepest - 0.5, 0.0), y, x  # a border lies half a pixel before the first pixel beyond it
