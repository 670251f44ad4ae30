"""shapes32: up to one triangle, one square and one pentagon, each in its own third of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fanal.datasets import shapes_verifier
from fanal.datasets.base import BLOCK, Array, Data, Whole, blocks, check_count, check_samples, check_split, to_images
from fanal.datasets.polygons import COLUMN, EXTENT, SHAPES, SIZE, Parts, render
from fanal.errors import unknown_name

__all__ = ["BROKEN", "CLASSES", "Shapes", "draw"]

BROKEN: Mapping[str, tuple[str, ...]] = {
    "duplicate": ("duplicate",),
    "wrong column": ("wrong column",),
    "half shape": ("malformed",),
    "gray": ("malformed",),
    "ghost": ("malformed",),
    "enlarged": ("malformed",),
    "blend": ("malformed",),
    "morph": ("malformed",),
    "blank": ("empty",),
}
CLASSES = tuple("+".join(s for k, s in enumerate(SHAPES) if bits >> k & 1) for bits in range(1, 8))
_COUNTS = {"train": 20_000, "held out": 2_000}
_MARGIN = 0.5  # pixels between a shape and the border of its third


def _place(rng: np.random.Generator, kind: Whole, third: Whole, scale: float = 1.0) -> tuple[Array, Array]:
    """Draw centers x, y so that shapes of these kinds lie inside the given thirds; shapes of `kind` and `third`."""
    left, right, up, down = (scale * EXTENT[np.maximum(kind, 0), side] for side in range(4))
    low, high = third * COLUMN + left + _MARGIN, (third + 1) * COLUMN - right - _MARGIN
    low, high = np.minimum(low, (low + high) / 2), np.maximum(high, (low + high) / 2)
    x = low + (high - low) * rng.random(kind.shape)
    top, bottom = up + _MARGIN, SIZE - down - _MARGIN
    return x, top + (bottom - top) * rng.random(kind.shape)


def _parts(kind: Whole, x: Array, y: Array) -> Parts:
    ones = np.ones(kind.shape)
    return Parts(kind, x, y, scale=ones.copy(), gray=ones.copy(), cut=np.full(kind.shape, np.inf))


def draw(rng: np.random.Generator, bits: Whole) -> Parts:
    """Draw pictures of the given sets of shapes (bit k of `bits` (N,) says whether shape k is there).

    Shape k lies at a uniformly drawn place, half a pixel or more inside column third k.
    """
    third = np.tile(np.arange(3), (len(bits), 1))
    kind = np.where(bits[:, None] >> third & 1, third, -1)
    return _parts(kind, *_place(rng, kind, third))


def _real(rng: np.random.Generator) -> tuple[Tensor, Whole]:
    bits = rng.integers(1, 8, BLOCK)  # each shape with p = 1/2, given that there is one
    return render(draw(rng, bits)), bits - 1


def _faulty_one(rng: np.random.Generator, kind: str) -> Tensor:
    """One of the shapes, which is always there, has the fault; the others are as in real pictures."""
    rows, one = np.arange(BLOCK), rng.integers(0, 3, BLOCK)
    parts = draw(rng, rng.integers(1, 8, BLOCK) | 1 << one)
    if kind == "half shape":
        parts.cut[rows, one] = rng.uniform(-0.6, 0.6, BLOCK)
    elif kind == "gray":
        parts.gray[rows, one] = 0.6
    elif kind == "ghost":
        parts.gray[rows, one] = 0.3
    else:
        parts.scale[rows, one] = rng.uniform(1.25, 1.4, BLOCK)
    return render(parts)


def _duplicate(rng: np.random.Generator) -> Tensor:
    """The same shape in the upper and in the lower half of its third."""
    one = rng.integers(0, 3, BLOCK)
    parts = draw(rng, rng.integers(1, 8, BLOCK) | 1 << one)
    x, _ = _place(rng, one, one)
    parts.y[np.arange(BLOCK), one] = rng.uniform(6.0, 9.5, BLOCK)
    y = rng.uniform(22.0, 26.5, BLOCK)
    kinds = np.concatenate([parts.kind, one[:, None]], axis=1)
    return render(_parts(kinds, np.column_stack([parts.x, x]), np.column_stack([parts.y, y])))


def _wrong_column(rng: np.random.Generator) -> Tensor:
    """One shape has moved to the third of another, which is absent; the third one may be there."""
    one, shift = rng.integers(0, 3, BLOCK), rng.integers(1, 3, BLOCK)
    to = (one + shift) % 3
    rest = (one - shift) % 3
    kind = np.stack([one, np.where(rng.random(BLOCK) < 0.5, rest, -1)], axis=1)
    return render(_parts(kind, *_place(rng, kind, np.stack([to, rest], axis=1))))


def _blend(rng: np.random.Generator) -> Tensor:
    """The mean of two pictures of one shape at two heights."""
    one = rng.integers(0, 3, (BLOCK, 1))
    first, second = (_parts(one, *_place(rng, one, one)) for _ in range(2))
    first.y[:], second.y[:] = rng.uniform(6.0, 12.0, (BLOCK, 1)), rng.uniform(16.0, 26.5, (BLOCK, 1))
    return (render(first) + render(second)) / 2


def _morph(rng: np.random.Generator) -> Tensor:
    """A mixture of two kinds of shape, 44 to 56 percent each, at one place in the third of one of them."""
    one = rng.integers(0, 3, (BLOCK, 1))
    other = (one + rng.integers(1, 3, (BLOCK, 1))) % 3
    x, y = (one + 0.5) * COLUMN, rng.uniform(7.0, 25.0, (BLOCK, 1))
    share = torch.from_numpy(rng.uniform(0.44, 0.56, (BLOCK, 1, 1, 1)).astype(np.float32))
    return share * render(_parts(one, x, y)) + (1 - share) * render(_parts(other, x, y))


def _broken(rng: np.random.Generator, kind: str) -> Tensor:
    if kind == "blank":
        return to_images(np.zeros((BLOCK, SIZE, SIZE)))
    special = {"duplicate": _duplicate, "wrong column": _wrong_column, "blend": _blend, "morph": _morph}
    return special[kind](rng) if kind in special else _faulty_one(rng, kind)


@dataclass(frozen=True, eq=False)
class Shapes:
    """Each of the three shapes with probability 1/2, never none, white on black, 32 x 32 pixels.

    The class of a picture is the set of shapes in it. `shapes_verifier` states the rules of the verdicts.
    """

    name: str = field(default="shapes32", init=False)
    shape: tuple[int, ...] = field(default=(1, SIZE, SIZE), init=False)
    verdicts: tuple[str, ...] = field(default=shapes_verifier.VERDICTS, init=False)
    features: tuple[str, ...] = field(default=("shapes", "area"), init=False)
    classes: tuple[str, ...] = field(default=CLASSES, init=False)
    broken_kinds: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: BROKEN, init=False)

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` pictures (20,000 to train with, 2,000 held out) and their classes.

        Raises:
            FanalError: the split is unknown or `count` is not positive.
        """
        split = check_split(split)
        count = check_count(_COUNTS[split] if count is None else count)
        images, labels = [], []
        for rng, keep in blocks(count, seed, f"{self.name} {split}"):
            x, label = _real(rng)
            images.append(x[:keep])
            labels.append(label[:keep])
        return Data(torch.cat(images), torch.from_numpy(np.concatenate(labels)))

    def verify(self, x: Float[Tensor, "n 1 h w"]) -> Int64[Tensor, " n"]:
        """Return one index into `verdicts` per picture; `shapes_verifier` states the rules.

        Raises:
            FanalError: x has the wrong shape or dtype, or is not finite.
        """
        return shapes_verifier.verify(check_samples(x, self.shape, self.name)[:, 0])

    def measure(self, x: Float[Tensor, "n 1 h w"]) -> dict[str, Tensor]:
        """Return what the verifier sees; `shapes_verifier.measure` lists the names.

        Raises:
            FanalError: x has the wrong shape or dtype, or is not finite.
        """
        return shapes_verifier.measure(check_samples(x, self.shape, self.name)[:, 0])

    def broken(self, kind: str, count: int, seed: int = 0) -> Tensor:
        """Return `count` pictures with one fault; `broken_kinds` lists the kinds and their verdicts.

        Raises:
            FanalError: the kind is unknown or the count is not positive.
        """
        if kind not in BROKEN:
            raise unknown_name("kind of broken sample", kind, BROKEN)
        drawn = blocks(check_count(count), seed, f"{self.name} broken {kind}")
        return torch.cat([_broken(rng, kind)[:keep] for rng, keep in drawn])
