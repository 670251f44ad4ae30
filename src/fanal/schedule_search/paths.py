"""Shortest paths with a given number of jumps, for every number at once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["shortest"]


def shortest(
    cost: Float[Tensor, "g g"],
    steps: Iterable[int],
    coeff: float = 1.0,
) -> dict[int, list[int]]:
    """Return, for each number of jumps, the nodes of the cheapest path from the first node to the last.

    `V_1(i) = C[i, T]`, `V_k(i) = min_{i<j<T} C[i, j] + coeff·V_{k−1}(j)`: the m-th jump is weighted with
    `coeff^(m−1)`, so that coeff > 1 makes later jumps dearer and moves nodes to smaller sigma ([REG] alg. 1). Of equal
    paths the one with the smallest next node is taken.

    Args:
        cost: (G, G); only entries with i < j are read.
        steps: numbers of jumps.
        coeff: γ of the paper, > 0.

    Raises:
        FanalError: a number of jumps does not fit between the ends, or coeff is not positive.
    """
    table = np.where(np.triu(np.ones(cost.shape, bool), 1), cost.double().numpy(), np.inf)
    wanted, end = sorted(set(steps)), len(table) - 1
    if not wanted or wanted[0] < 1 or wanted[-1] > end:
        raise FanalError(f"a grid of {end + 1} nodes has room for 1 to {end} steps, got {wanted}: make it finer")
    if not 0 < coeff < np.inf:
        raise FanalError(f"coeff must be positive, got {coeff}")
    value, choices, found = table[:, end].copy(), [np.full(end + 1, end)], {}
    value[end] = np.inf
    inner = table.copy()
    inner[:, end] = np.inf  # the last node ends a path; it is never passed through
    for k in range(1, wanted[-1] + 1):
        if k > 1:
            total = inner + coeff * value
            choices.append(total.argmin(1))
            value = total.min(1)
        if k in wanted:
            start, path = 0, [0]
            for choice in reversed(choices):
                start = int(choice[start])
                path.append(start)
            found[k] = path
    return found


def grids(cost: Tensor, sigmas: Tensor, steps: Iterable[int], coeff: float) -> dict[int, Tensor]:
    """Return the sigmas of the cheapest paths, by number of jumps."""
    return {k: sigmas[torch.tensor(path)] for k, path in shortest(cost, steps, coeff).items()}
