"""grid2: a 5 x 5 grid of narrow Gaussians in the plane, the smallest set on which samplers leave the support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fanal.datasets.base import BLOCK, Array, Data, Whole, blocks, check_count, check_samples, check_split
from fanal.errors import unknown_name

__all__ = ["BROKEN", "RADIUS", "SIDE", "SPACING", "STD", "Grid", "modes", "points"]

SIDE, SPACING, STD = 5, 2.0, 0.1
RADIUS = 5.0 * STD  # a real point is farther from its mode with probability exp(-12.5) = 4e-6
BROKEN: Mapping[str, tuple[str, ...]] = {
    "between two modes": ("off grid",),
    "between four modes": ("off grid",),
    "near miss": ("off grid",),
    "outside": ("off grid",),
}
_COUNTS = {"train": 100_000, "held out": 10_000}


def modes() -> Array:
    """Return the means of the Gaussians, shape (25, 2), row by row and centered at 0."""
    axis = SPACING * (np.arange(SIDE) - (SIDE - 1) / 2)
    return np.stack(np.meshgrid(axis, axis, indexing="xy"), axis=-1).reshape(-1, 2)


def points(mode: Whole, offset: Array) -> Array:
    """Return points at `offset` (N, 2) from the modes with index `mode` (N,)."""
    return modes()[mode] + offset


def _real(rng: np.random.Generator) -> Array:
    return points(rng.integers(0, SIDE**2, BLOCK), STD * rng.standard_normal((BLOCK, 2)))


def _broken(kind: str, rng: np.random.Generator) -> Array:
    angle = rng.uniform(0, 2 * np.pi, BLOCK)
    around = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if kind == "near miss":
        return points(rng.integers(0, SIDE**2, BLOCK), rng.uniform(0.75, 0.95, (BLOCK, 1)) * around)
    if kind == "outside":
        return rng.uniform(1.5, 3.0, (BLOCK, 1)) * SPACING * SIDE / 2 * around
    cell = rng.integers(0, SIDE - 1, BLOCK) + SIDE * rng.integers(0, SIDE - 1, BLOCK)
    shift = np.full((BLOCK, 2), SPACING / 2)
    if kind == "between two modes":
        shift[np.arange(BLOCK), rng.integers(0, 2, BLOCK)] = 0.0
    return points(cell, shift + rng.uniform(-0.15, 0.15, (BLOCK, 2)))


@dataclass(frozen=True, eq=False)
class Grid:
    """25 Gaussians of standard deviation 0.1 on a square grid of spacing 2, equally likely.

    A point is "off grid" when it is more than 5 standard deviations from every mode. The set has no classes;
    `measure` names the nearest mode.
    """

    name: str = field(default="grid2", init=False)
    shape: tuple[int, ...] = field(default=(2,), init=False)
    verdicts: tuple[str, ...] = field(default=("ok", "off grid"), init=False)
    features: tuple[str, ...] = field(default=("mode", "distance"), init=False)
    classes: tuple[str, ...] = field(default=(), init=False)
    broken_kinds: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: BROKEN, init=False)

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` points (100,000 to train with, 10,000 held out).

        Raises:
            FanalError: the split is unknown or `count` is not positive.
        """
        split = check_split(split)
        count = check_count(_COUNTS[split] if count is None else count)
        parts = [_real(rng)[:keep] for rng, keep in blocks(count, seed, f"{self.name} {split}")]
        return Data(_tensor(np.concatenate(parts)))

    def verify(self, x: Float[Tensor, "n 2"]) -> Int64[Tensor, " n"]:
        """Return 1 where a point is more than 0.5 from every mode, else 0.

        Raises:
            FanalError: x has the wrong shape or dtype, or is not finite.
        """
        return (self.measure(x)["distance"] > RADIUS).long()

    def measure(self, x: Float[Tensor, "n 2"]) -> dict[str, Tensor]:
        """Return the nearest `mode` (index into `modes()`) and the `distance` to it.

        Raises:
            FanalError: x has the wrong shape or dtype, or is not finite.
        """
        place = check_samples(x, self.shape, self.name)
        # The nearest mode of a square grid is found per axis.
        index = np.clip(np.rint(place / SPACING + (SIDE - 1) / 2), 0, SIDE - 1).astype(np.int64)
        nearest = index[:, 0] + SIDE * index[:, 1]
        distance = np.sqrt(((place - modes()[nearest]) ** 2).sum(axis=1))
        return {"mode": torch.from_numpy(nearest), "distance": _tensor(distance)}

    def broken(self, kind: str, count: int, seed: int = 0) -> Tensor:
        """Return `count` points off the grid; `broken_kinds` lists the kinds.

        Raises:
            FanalError: the kind is unknown or the count is not positive.
        """
        if kind not in BROKEN:
            raise unknown_name("kind of broken sample", kind, BROKEN)
        drawn = blocks(check_count(count), seed, f"{self.name} broken {kind}")
        return _tensor(np.concatenate([_broken(kind, rng)[:keep] for rng, keep in drawn]))


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
