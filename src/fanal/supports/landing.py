"""Where a guided run ends: its samples, and how far they are from both supports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser, Wrapper
from fanal.metrics.estimates import rate
from fanal.sampling import Solver, sample
from fanal.summary import as_json
from fanal.supports.targets import Target

__all__ = ["FARTHEST", "QUANTILES", "Capped", "Landing", "figures", "land"]

FARTHEST = 1e6
"""Sizes of the support that a prediction may be away from 0; what is cut there has blown up."""

QUANTILES = (0.5, 0.9, 0.99)
"""Of the distances; the worst case is told beside them."""


class Capped(Wrapper):
    """Cuts predictions to a longest length, so that a run that blows up ends far away and not as NaN.

    Args:
        denoiser: D.
        longest: the length.
    """

    def __init__(self, denoiser: Denoiser, longest: float) -> None:
        super().__init__(denoiser)
        self.longest = longest

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return D, or its direction times the longest length."""
        denoised = self.denoiser(x, sigma)
        return torch.renorm(denoised.flatten(1), 2, 0, self.longest).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Landing:
    """The end of a run.

    Attributes:
        x: the samples.
        part: their distances from the support of p(·|c), 0 inside.
        whole: their distances from the support of p.
    """

    x: Float[Tensor, "b *d"]
    part: Float[Tensor, " b"]
    whole: Float[Tensor, " b"]

    def tensors(self) -> dict[str, Tensor]:
        """Return the distances by name."""
        return {"part": self.part, "whole": self.whole}


def land(goal: Target, denoiser: Denoiser, x: Tensor, sigmas: Tensor, solver: Solver, seeds: Iterable[int]) -> Landing:
    """Run to the end of the grid and measure; predictions are cut at `FARTHEST` sizes.

    Args:
        goal: whose supports count.
        denoiser: guided.
        x: the batch at the first sigma.
        sigmas: the grid.
        solver: the process.
        seeds: one per sample, for processes that draw noise.

    Raises:
        FanalError: as `fanal.sample`.
    """
    end = sample(Capped(denoiser, FARTHEST * goal.size), x, sigmas, solver, seeds)
    return Landing(end, *goal.distances(end))


def figures(distances: Float[Tensor, " b"], near: float) -> dict[str, object]:
    """Return quantiles, the worst case and the share farther than `near`, as plain JSON.

    Args:
        distances: of the samples.
        near: what still counts as on the support.
    """
    at = torch.quantile(distances.double(), torch.tensor(QUANTILES, dtype=torch.float64))
    found: dict[str, object] = {f"q{round(100 * q)}": float(v) for q, v in zip(QUANTILES, at, strict=True)}
    return found | {"worst": float(distances.max()), "off": as_json(rate(distances > near))}
