"""The law of a discrete scheme in one dimension, step by step on a grid: no particles, no chance."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.particles.schemes import Driven
from fanal.pde.grid import Array, Grid
from fanal.sampling import Solver, sample
from fanal.schedules import check_sigmas

__all__ = ["law"]

_CELLS = 1.5  # fewest cells that a step's noise must cover


def law(solver: Solver, denoiser: Denoiser, sigmas: Tensor, grid: Grid, density: Array) -> Array:
    """Return the density of `x/sqrt(1 + sigma²)` at the end of a run, from that at its start.

    Each step is `z' = mean(z) + std·n` with std that does not depend on z; the densities follow from the integral
    `p'(z') = ∫ N(z'; mean(z), std²) p(z) dz`, by a sum over cells whose error is below rounding once std covers two.

    Args:
        solver: draws noise once per step, by an amount that does not depend on the state.
        denoiser: of samples of shape (1,).
        sigmas: (N+1,), all positive.
        grid: one axis of even cells that hold the law.
        density: at the start, one value per cell.

    Raises:
        FanalError: the grid has several axes, or a step's noise covers fewer than 1.5 cells.
    """
    check_sigmas(sigmas)
    if len(grid.shape) != 1 or density.shape != grid.shape:
        raise FanalError(f"the law of a scheme needs a grid of one axis and its density, got {density.shape}")
    z, width = grid.centers[0], float(grid.widths[0][0])
    for i in range(len(sigmas) - 1):
        part = sigmas[i : i + 2]
        before, after = (math.sqrt(1 + float(sigma) ** 2) for sigma in part)
        x = torch.from_numpy(z * before)[:, None]
        mean, kicked = (
            sample(denoiser, x, part, Driven(solver, lambda span, x, c=c: torch.full_like(x, c)))[:, 0].numpy() / after
            for c in (0.0, 1.0)
        )
        std = float(np.abs(kicked - mean).mean())
        if std < _CELLS * width:
            raise FanalError(
                f"the noise of step {i} has standard deviation {std:.3g}, less than {_CELLS} cells of {width:.3g}: "
                "give the law a finer grid, or end the run earlier"
            )
        kernel = np.exp(-(((z[:, None] - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
        density = kernel @ density * width
    return density
