"""Means and spreads of per-sample curves, gathered batch by batch, so that no trajectory has to be kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["Band"]


@dataclass(eq=False)
class Band:
    """Mean, standard deviation and range over samples of a curve, one value per state.

    Batches are merged by Chan's formula (Chan, Golub & LeVeque 1983): the result does not depend on how samples were
    split, but for rounding.

    Attributes:
        count: samples so far.
        mean: (N,).
        squares: (N,), sum of squared distances from the mean.
        low: (N,), smallest value.
        high: (N,), largest value.
    """

    count: int
    mean: Float[Tensor, " n"]
    squares: Float[Tensor, " n"]
    low: Float[Tensor, " n"]
    high: Float[Tensor, " n"]

    @classmethod
    def of(cls, values: Float[Tensor, "n b"]) -> Band:
        """Return the band of one batch, values (N, B).

        Raises:
            FanalError: there is no sample.
        """
        if values.ndim != 2 or not values.shape[1]:
            raise FanalError(f"a curve has values (N, B) of at least one sample, got {tuple(values.shape)}")
        wide = values.detach().cpu().double()
        mean = wide.mean(1)
        return cls(wide.shape[1], mean, ((wide - mean[:, None]) ** 2).sum(1), wide.amin(1), wide.amax(1))

    def merge(self, other: Band) -> Band:
        """Return the band of both.

        Raises:
            FanalError: their curves have another number of states.
        """
        if self.mean.shape != other.mean.shape:
            raise FanalError(f"curves of {len(self.mean)} and {len(other.mean)} states cannot be gathered together")
        count, off = self.count + other.count, other.mean - self.mean
        return Band(
            count,
            self.mean + off * (other.count / count),
            self.squares + other.squares + off**2 * (self.count * other.count / count),
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    @property
    def std(self) -> Float[Tensor, " n"]:
        """Standard deviation over samples; 0 for a single one."""
        return (self.squares / max(self.count - 1, 1)).sqrt()

    @property
    def se(self) -> Float[Tensor, " n"]:
        """Standard error of the mean."""
        return self.std / math.sqrt(self.count)
