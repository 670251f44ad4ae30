"""hands32: white hands on black, a palm and five fingers, whose faults can be counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fanal.datasets import hands_verifier
from fanal.datasets.base import BLOCK, Array, Data, blocks, check_count, check_samples, check_split, to_images
from fanal.errors import unknown_name

__all__ = ["BROKEN", "SIZE", "Hands", "Parts", "draw", "render"]

SIZE = 32
BROKEN: Mapping[str, tuple[str, ...]] = {
    "3 fingers": ("missing finger",),
    "4 fingers": ("missing finger",),
    "6 fingers": ("extra finger",),
    "7 fingers": ("extra finger",),
    "cut finger": ("disconnected",),
    "blob": ("disconnected",),
    "stub fingers": ("malformed", "missing finger"),
    "long finger": ("malformed",),
    "fat finger": ("malformed",),
    "tiny palm": ("bad palm",),
    "huge palm": ("bad palm",),
    "blank": ("bad palm",),
}
_COUNTS = {"train": 20_000, "held out": 2_000}


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What N hands are made of; lengths in pixels, angles in radians clockwise from "up".

    A finger is the set of points within `width / 2` of the segment that starts at radius `root` and ends so that the
    finger's tip is at radius `tip`, both from the palm's center. A finger whose tip is NaN is absent.

    Attributes:
        center: x and y of the palm's center, (N, 2); pixel i has its center at i + 0.5.
        palm: radius of the palm, (N,); 0 is no palm.
        angle: direction of each finger, (N, F); finger 0 is the thumb.
        root: radius at which each finger starts, (N, F).
        tip: radius of the outermost point of each finger, (N, F).
        width: width of each finger, (N, F).
    """

    center: Array
    palm: Array
    angle: Array
    root: Array
    tip: Array
    width: Array


def draw(rng: np.random.Generator, count: int, fingers: int = 5) -> Parts:
    """Draw the parts of `count` hands with the given number of fingers, thumb included.

    Palm radius U(4.8, 5.4) around (16, 18) ± 1.2; tips at U(12, 14.6), the thumb's at U(10.6, 12); widths U(2, 2.3);
    gaps of U(25, 31) degrees, U(40, 52) after the thumb; turned by ± 35 degrees, mirrored half of the time.
    """
    gap = rng.uniform(25.0, 31.0, (count, fingers))
    gap[:, 0] = 0.0
    gap[:, 1] = rng.uniform(40.0, 52.0, count)
    angle = np.cumsum(gap, axis=1)
    angle -= angle[:, -1:] / 2
    mirror = np.where(rng.random((count, 1)) < 0.5, -1.0, 1.0)
    angle = np.deg2rad(mirror * angle + rng.uniform(-35.0, 35.0, (count, 1)))
    tip = rng.uniform(12.0, 14.6, (count, fingers))
    tip[:, 0] = rng.uniform(10.6, 12.0, count)
    return Parts(
        center=np.array([16.0, 18.0]) + rng.uniform(-1.2, 1.2, (count, 2)),
        palm=rng.uniform(4.8, 5.4, count),
        angle=angle,
        root=np.zeros((count, fingers)),
        tip=tip,
        width=rng.uniform(2.0, 2.3, (count, fingers)),
    )


def render(parts: Parts, size: int = SIZE) -> Tensor:
    """Render hands, anti-aliased: gray = clip(0.5 - signed distance, 0, 1), mapped to [-1, 1].

    Returns:
        images of shape (N, 1, size, size).
    """
    axis = np.arange(size, dtype=np.float32) + np.float32(0.5)
    dx = (axis[None, :] - parts.center[:, :1]).astype(np.float32)[:, None, :]
    dy = (axis[None, :] - parts.center[:, 1:]).astype(np.float32)[:, :, None]
    palm = np.where(parts.palm > 0, parts.palm, -np.inf).astype(np.float32)[:, None, None]
    distance = np.sqrt(dx**2 + dy**2) - palm
    ux, uy = np.sin(parts.angle).astype(np.float32), -np.cos(parts.angle).astype(np.float32)
    half = (parts.width / 2).astype(np.float32)
    end = (parts.tip - parts.width / 2).astype(np.float32)
    root = np.minimum(parts.root.astype(np.float32), np.nan_to_num(end))
    for f in range(parts.angle.shape[1]):
        x, y, low, high, r = (v[:, f, None, None] for v in (ux, uy, root, end, half))
        along = np.clip(dx * x + dy * y, low, high)
        finger = np.sqrt((dx - along * x) ** 2 + (dy - along * y) ** 2) - r
        distance = np.fmin(distance, finger)  # fmin: an absent finger is NaN
    return to_images(np.clip(0.5 - distance, 0.0, 1.0))


def _with(parts: Parts, extra: Parts) -> Parts:
    """Return hands that have the fingers of both, on the palms of the first."""
    pairs = ((getattr(parts, n), getattr(extra, n)) for n in ("angle", "root", "tip", "width"))
    return Parts(parts.center, parts.palm, *(np.concatenate(pair, axis=1) for pair in pairs))


def _one(parts: Parts, angle: Array, root: Array, tip: Array, width: Array) -> Parts:
    return Parts(parts.center, parts.palm, angle[:, None], root[:, None], tip[:, None], width[:, None])


def _fewer(rng: np.random.Generator, lost: int) -> Parts:
    parts = draw(rng, BLOCK)
    gone = rng.permuted(np.tile(np.arange(5), (BLOCK, 1)), axis=1)[:, :lost]
    np.put_along_axis(parts.tip, gone, np.nan, axis=1)
    return parts


def _cut(rng: np.random.Generator) -> Parts:
    """One finger, not the thumb, is severed: a gap of 1.4 to 2 pixels."""
    parts = draw(rng, BLOCK)
    rows, f = np.arange(BLOCK), rng.integers(1, 5, BLOCK)
    tip, width, angle = parts.tip[rows, f], parts.width[rows, f], parts.angle[rows, f]
    stump = rng.uniform(8.0, 8.4, BLOCK)
    parts.tip[rows, f] = stump
    return _with(parts, _one(parts, angle, stump + rng.uniform(1.4, 2.0, BLOCK) + width / 2, tip, width))


def _blob(rng: np.random.Generator) -> Parts:
    """A spot of 2 to 3 pixels that belongs to nothing, below the hand."""
    parts = draw(rng, BLOCK)
    width, radius = rng.uniform(2.0, 3.0, BLOCK), rng.uniform(9.5, 11.0, BLOCK)
    below = parts.angle[:, [0, -1]].mean(axis=1) + np.pi
    return _with(parts, _one(parts, below, radius, radius + width / 2, width))


def _resized(rng: np.random.Generator, kind: str) -> Parts:
    parts = draw(rng, BLOCK)
    if kind == "stub fingers":
        parts.tip[:] = rng.uniform(8.2, 8.9, parts.tip.shape)
    elif kind == "long finger":
        upright = np.abs(parts.angle).argmin(axis=1)  # the frame would cut a long finger that points sideways
        parts.tip[np.arange(BLOCK), upright] = rng.uniform(16.6, 18.0, BLOCK)
    elif kind == "fat finger":
        parts.width[:, 0] = rng.uniform(4.6, 5.2, BLOCK)
    else:
        parts.palm[:] = rng.uniform(3.0, 3.8, BLOCK) if kind == "tiny palm" else rng.uniform(7.4, 8.2, BLOCK)
    return parts


def _blank(rng: np.random.Generator) -> Parts:
    parts = draw(rng, BLOCK)
    parts.tip[:], parts.palm[:] = np.nan, 0.0
    return parts


_DRAW: Mapping[str, Callable[[np.random.Generator], Parts]] = {
    "3 fingers": lambda rng: _fewer(rng, 2),
    "4 fingers": lambda rng: _fewer(rng, 1),
    "6 fingers": lambda rng: draw(rng, BLOCK, 6),
    "7 fingers": lambda rng: draw(rng, BLOCK, 7),
    "cut finger": _cut,
    "blob": _blob,
    "stub fingers": lambda rng: _resized(rng, "stub fingers"),
    "long finger": lambda rng: _resized(rng, "long finger"),
    "fat finger": lambda rng: _resized(rng, "fat finger"),
    "tiny palm": lambda rng: _resized(rng, "tiny palm"),
    "huge palm": lambda rng: _resized(rng, "huge palm"),
    "blank": _blank,
}


@dataclass(frozen=True, eq=False)
class Hands:
    """Hands of five fingers on 32 x 32 pixels, in the spirit of the hand photographs of [RODS].

    `draw` states how real hands are distributed, `hands_verifier` the rules of the verdicts. The set has no classes.
    """

    name: str = field(default="hands32", init=False)
    shape: tuple[int, ...] = field(default=(1, SIZE, SIZE), init=False)
    verdicts: tuple[str, ...] = field(default=hands_verifier.VERDICTS, init=False)
    features: tuple[str, ...] = field(default=("palm_radius", "area", "finger_length"), init=False)
    classes: tuple[str, ...] = field(default=(), init=False)
    broken_kinds: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: BROKEN, init=False)

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` hands (20,000 to train with, 2,000 held out).

        Raises:
            FanalError: the split is unknown or `count` is not positive.
        """
        split = check_split(split)
        count = check_count(_COUNTS[split] if count is None else count)
        drawn = blocks(count, seed, f"{self.name} {split}")
        return Data(torch.cat([render(draw(rng, BLOCK))[:keep] for rng, keep in drawn]))

    def verify(self, x: Float[Tensor, "n 1 h w"]) -> Int64[Tensor, " n"]:
        """Return one index into `verdicts` per image; `hands_verifier` states the rules.

        Raises:
            FanalError: x has the wrong shape or dtype, or is not finite.
        """
        return hands_verifier.verify(check_samples(x, self.shape, self.name)[:, 0])

    def measure(self, x: Float[Tensor, "n 1 h w"]) -> dict[str, Tensor]:
        """Return what the verifier sees; `hands_verifier.measure` lists the names.

        Raises:
            FanalError: x has the wrong shape or dtype, or is not finite.
        """
        return hands_verifier.measure(check_samples(x, self.shape, self.name)[:, 0])

    def broken(self, kind: str, count: int, seed: int = 0) -> Tensor:
        """Return `count` hands with one fault; `broken_kinds` lists the kinds and their verdicts.

        Raises:
            FanalError: the kind is unknown or the count is not positive.
        """
        if kind not in BROKEN:
            raise unknown_name("kind of broken sample", kind, BROKEN)
        drawn = blocks(check_count(count), seed, f"{self.name} broken {kind}")
        return torch.cat([render(_DRAW[kind](rng))[:keep] for rng, keep in drawn])
