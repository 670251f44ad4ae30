"""Which predictions a state is made of: an Euler run's states are convex combinations of them ([REG] eq. 17)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.schedules import check_sigmas

__all__ = ["shares"]


def shares(sigmas: Float[Tensor, " n1"]) -> Float[Tensor, "n1 n1"]:
    """Return the share of the start and of each prediction in each state of an Euler run, rows that sum to 1.

    Unrolled, `x' = (sigma'/sigma)·x + (1 − sigma'/sigma)·D` gives the start the share `sigma_n/sigma_0` of state n, and
    the prediction at `sigma_m` the share `sigma_n·(1/sigma_{m+1} − 1/sigma_m)`: they depend on the grid alone. Half of
    a state comes from the predictions made since sigma was twice as large.

    Args:
        sigmas: a decreasing grid of N intervals, from a finite level.

    Returns:
        (N+1, N+1): row n is of state n, column 0 the start's share, column m + 1 that of the prediction at `sigmas[m]`.

    Raises:
        FanalError: the grid is none, does not fall, or begins at infinity.
    """
    grid = check_sigmas(sigmas)
    if not float(grid[0]) > float(grid[-1]) or not bool(torch.isfinite(grid).all()):
        raise FanalError("shares are those of a run down from a finite sigma: give a decreasing grid")
    table = grid.new_zeros(len(grid), len(grid))
    table[0, 0] = 1
    for n in range(len(grid) - 1):
        ratio = grid[n + 1] / grid[n]
        table[n + 1] = ratio * table[n]
        table[n + 1, n + 1] = 1 - ratio
    return table
