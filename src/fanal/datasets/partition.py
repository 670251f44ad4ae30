"""What finite data sets share: a fixed partition into training and held-out samples, and having no verifier."""

from __future__ import annotations

import numpy as np

from fanal.datasets.base import Whole, blocks
from fanal.errors import FanalError

__all__ = ["HELD_OUT", "no_verifier", "partition"]

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


def no_verifier(name: str) -> FanalError:
    """Build the error for asking a data set without rules for a verdict."""
    return FanalError(f"{name} has no verifier: use one of grid2, shapes32, hands32, or label the samples by hand")
