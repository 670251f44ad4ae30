"""scenes64: a flower, a butterfly and a cup in color, up to one of each, with relations that can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fanal.datasets import scenes_broken, scenes_verifier
from fanal.datasets.base import BLOCK, Data, Whole, blocks, check_count, check_samples, check_split
from fanal.datasets.levels import Levels
from fanal.datasets.scenes_drawing import KINDS, SIZE, Pixels, compose, draw
from fanal.errors import unknown_name

__all__ = ["CLASSES", "Scenes"]

CLASSES = tuple("+".join(s for k, s in enumerate(KINDS) if bits >> k & 1) for bits in range(1, 8))
_COUNTS = {"train": 20_000, "held out": 2_000}


def _real(rng: np.random.Generator) -> tuple[Pixels, Whole]:
    bits = rng.integers(1, 8, BLOCK)
    return compose(BLOCK, draw(rng, bits).sprites()), bits - 1


@dataclass(frozen=True, eq=False)
class Scenes:
    """Each of flower, butterfly and cup with probability 1/2, never none, on black, 64 x 64 pixels in color.

    The class of a scene is the set of kinds in it. `draw` states how real scenes are distributed, `scenes_verifier` the
    rules of the verdicts.
    """

    name: str = field(default="scenes64", init=False)
    shape: tuple[int, ...] = field(default=(3, SIZE, SIZE), init=False)
    verdicts: tuple[str, ...] = field(default=scenes_verifier.VERDICTS, init=False)
    features: tuple[str, ...] = field(default=("objects", "petals", "area"), init=False)
    classes: tuple[str, ...] = field(default=CLASSES, init=False)
    broken_kinds: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: scenes_broken.BROKEN, init=False)

    def levels(self, split: str = "train", count: int | None = None, seed: int = 0) -> Levels:
        """Return what `data` returns, a byte per value.

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
        return Levels(np.concatenate(images), torch.from_numpy(np.concatenate(labels)))

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` scenes (20,000 to train with, 2,000 held out) and their classes.

        Raises:
            FanalError: the split is unknown or `count` is not positive.
        """
        return self.levels(split, count, seed).data()

    def verify(self, x: Float[Tensor, "n 3 h w"]) -> Int64[Tensor, " n"]:
        """Return one index into `verdicts` per scene; `scenes_verifier` states the rules.

        Raises:
            FanalError: x has the wrong shape or dtype, or is not finite.
        """
        return scenes_verifier.verify(check_samples(x, self.shape, self.name))

    def measure(self, x: Float[Tensor, "n 3 h w"]) -> dict[str, Tensor]:
        """Return what the verifier sees; `scenes_verifier.measure` lists the names.

        Raises:
            FanalError: x has the wrong shape or dtype, or is not finite.
        """
        return scenes_verifier.measure(check_samples(x, self.shape, self.name))

    def broken(self, kind: str, count: int, seed: int = 0) -> Tensor:
        """Return `count` scenes with one fault; `broken_kinds` lists the kinds and their verdicts.

        Raises:
            FanalError: the kind is unknown or the count is not positive.
        """
        if kind not in self.broken_kinds:
            raise unknown_name("kind of broken sample", kind, self.broken_kinds)
        drawn = blocks(check_count(count), seed, f"{self.name} broken {kind}")
        return Levels(np.concatenate([scenes_broken.render(rng, kind)[:keep] for rng, keep in drawn])).data().x
