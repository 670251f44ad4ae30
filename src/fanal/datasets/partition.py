"""What finite data sets share: a fixed partition into training and held-out samples, and having no verifier."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from torch import Tensor

from fanal.datasets.base import Whole, blocks
from fanal.errors import FanalError

__all__ = ["HELD_OUT", "Unjudged", "partition"]

HELD_OUT = 0.2


def partition(labels: Whole, split: str, seed: int) -> Whole:
    """Return the indices of a split: a fifth of every class is held out, and at least one of two or more.

    Which samples are held out does not depend on the seed (two runs with two seeds must not train on each other's
    held-out samples); the order of the samples within the split does.
    """
    (fixed, _), (order, _) = next(blocks(1, 0, "partition")), next(blocks(1, seed, "order"))
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = fixed.permutation(np.flatnonzero(labels == label))
        share = max(round(HELD_OUT * len(members)), 1 if len(members) > 1 else 0)
        held[members[:share]] = True
    return order.permutation(np.flatnonzero(held == (split == "held out")))


class Unjudged:
    """What a data set without rules answers when it is asked for a verdict."""

    name: str
    verdicts: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    broken_kinds: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def _no_verifier(self) -> FanalError:
        judged = "grid2, shapes32, hands32 or scenes64"
        return FanalError(f"{self.name} has no verifier: use {judged}, or label the samples by hand (fanal label)")

    def verify(self, x: Tensor) -> Tensor:
        """Raise: no rule tells a good sample from a bad one.

        Raises:
            FanalError: always.
        """
        raise self._no_verifier()

    def measure(self, x: Tensor) -> dict[str, Tensor]:
        """Raise: there is no verifier that could say what it sees.

        Raises:
            FanalError: always.
        """
        raise self._no_verifier()

    def broken(self, kind: str, count: int, seed: int = 0) -> Tensor:
        """Raise: no fault is known.

        Raises:
            FanalError: always.
        """
        raise self._no_verifier()
