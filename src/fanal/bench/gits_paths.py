"""The cheapest path by branch and bound: a check of GITS's dynamic programme that shares nothing with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["Proof", "branch_and_bound", "path_cost"]


@dataclass(frozen=True)
class Proof:
    """A cheapest path, and how it was found.

    Attributes:
        path: its nodes.
        value: its cost.
        visited: partial paths that were extended.
        paths: paths that there are.
    """

    path: tuple[int, ...]
    value: float
    visited: int
    paths: int


def path_cost(cost: Float[Tensor, "g g"], path: tuple[int, ...] | list[int], coeff: float) -> float:
    """Return `Σ_m coeff^m·C[i_m, i_{m+1}]`, what a path costs ([REG] alg. 1)."""
    jumps = zip(path, path[1:], strict=False)
    return sum(coeff**m * float(cost[i, j]) for m, (i, j) in enumerate(jumps))


class _Tree:
    """Depth-first search, the most promising child first, with a lower bound from the cheapest jumps that are left."""

    def __init__(self, cost: np.ndarray, steps: int, coeff: float) -> None:
        self.cost, self.steps, self.end = cost, steps, len(cost) - 1
        self.powers = coeff ** np.arange(steps)
        rows = np.where(np.triu(np.ones(cost.shape, bool), 1), cost, np.inf)
        self.least = np.minimum.accumulate(rows.min(1)[::-1])[::-1]  # cheapest jump from node i or a later one
        self.last = np.minimum.accumulate(rows[:, self.end][::-1])[::-1]  # the same among those into the last node
        self.best, self.path, self.visited = math.inf, (0,), 0

    def rest(self, done: int, nodes: np.ndarray) -> np.ndarray:
        """What the jumps after the first `done` cost at least, from each of some nodes."""
        return self.powers[done : self.steps - 1].sum() * self.least[nodes] + self.powers[-1] * self.last[nodes]

    def extend(self, path: tuple[int, ...], value: float) -> None:
        self.visited += 1
        done, node = len(path) - 1, path[-1]
        if done == self.steps - 1:
            total = value + self.powers[done] * self.cost[node, self.end]
            if total < self.best:
                self.best, self.path = total, (*path, self.end)
            return
        children = np.arange(node + 1, self.end - (self.steps - done - 2))
        values = value + self.powers[done] * self.cost[node, children]
        bounds = values + self.rest(done + 1, children)
        for k in np.argsort(bounds, kind="stable"):
            if bounds[k] >= self.best:
                return
            self.extend((*path, int(children[k])), float(values[k]))


def branch_and_bound(cost: Float[Tensor, "g g"], steps: int, coeff: float = 1.0) -> Proof:
    """Return the cheapest path of so many jumps from the first node to the last, by branch and bound.

    Every path is either visited or ruled out by a lower bound, so that the result is exact for costs of any sign
    ([REG] names the method in a footnote: Land & Doig 1960).

    Args:
        cost: (G, G); only entries with i < j are read.
        steps: number of jumps.
        coeff: γ; jump m is weighted with coeff^m, m from 0.

    Raises:
        FanalError: so many jumps do not fit.
    """
    nodes = len(cost)
    if not 1 <= steps < nodes:
        raise FanalError(f"a grid of {nodes} nodes has room for 1 to {nodes - 1} steps, got {steps}")
    tree = _Tree(cost.double().numpy(), steps, coeff)
    tree.extend((0,), 0.0)
    return Proof(tree.path, tree.best, tree.visited, math.comb(nodes - 2, steps - 1))
