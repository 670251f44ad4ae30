"""The hunt for a counter-example to [SUP]: an exponential integrator with exact scores that ends far from the support.

Supports are random chains of segments in the plane, conditions some successive segments of them. A random search over
geometry, initial noise and scale comes first; then the farthest ends are climbed from, by the gradient of the final
distance in the corners, the noise and the logarithm of the scale, through the whole run. What was found is run again
with more steps on the same grid of noise levels, and with small changes of its noise, to tell what made it fail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fanal.bench.plans import Found
from fanal.bench.support_studies import Block, Sizes
from fanal.guidance import ClassifierFree
from fanal.metrics.estimates import rate
from fanal.sampling import Solver, trace
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Euler
from fanal.summary import as_json
from fanal.supports.processes import process
from fanal.supports.targets import Target, chain

__all__ = ["Suspect", "climb", "final_distance", "hunt_blocks", "retried", "search"]

_SEGMENTS = 6
_MOST_SCALE = 100.0
_REFINED = (1, 2, 4, 8, 16, 32, 64)
_CLIMBED = 15


@dataclass(frozen=True, eq=False)
class Suspect:
    """A guided run that may end far from its support.

    Attributes:
        corners: (K + 1, 2), of the chain, in [−1, 1]².
        first: first segment of the condition.
        last: the segment after its last.
        unit: (2,), initial noise of variance 1.
        scale: w.
        distance: of its end from S, relative to the size of S.
    """

    corners: Tensor
    first: int
    last: int
    unit: Tensor
    scale: float
    distance: float

    def goal(self) -> Target:
        """Return its target."""
        return chain("chain", self.corners, self.first, self.last, "a random chain of segments; some of them")

    def facts(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "corners": self.corners.tolist(), "condition": [self.first, self.last], "noise": self.unit.tolist(),
            "scale": self.scale, "distance": self.distance,
        }  # fmt: skip


def final_distance(goal: Target, x: Tensor, scale: float | Tensor, steps: int, solver: Solver) -> Tensor:
    """Run guided sampling and return the distances of the ends from S, (B,); gradients flow to all of it.

    Args:
        goal: the target.
        x: (B, 2), states at sigma = 80.
        scale: w, one number or (B,).
        steps: of the polynomial grid to 0.
        solver: a process without noise.
    """
    denoiser = ClassifierFree(goal.part, goal.whole, scale)
    for transition in trace(denoiser, x, polynomial(steps), solver):
        x = transition.step.x_next
    return (x - goal.whole.project(x)).norm(dim=1)


def _chain(generator: torch.Generator) -> tuple[Tensor, int, int]:
    corners = 2 * torch.rand(_SEGMENTS + 1, 2, dtype=torch.float64, generator=generator) - 1
    length = int(torch.randint(1, _SEGMENTS // 2 + 1, (), generator=generator))
    first = int(torch.randint(0, _SEGMENTS - length + 1, (), generator=generator))
    return corners, first, first + length


def search(geometries: int, tries: int, steps: int, solver: Solver, seed: int) -> tuple[list[Suspect], Tensor, Tensor]:
    """Try random geometries, noises and scales.

    Args:
        geometries: chains to draw.
        tries: runs on each, with scales uniform in the logarithm from 1 to 100.
        steps: of the grid.
        solver: the process.
        seed: of everything.

    Returns:
        The farthest run of each chain, the farthest first; all distances, relative to the size of the support; and the
        scales of those runs.
    """
    generator = torch.Generator().manual_seed(seed)
    found, every, scales = [], [], []
    for k in range(geometries):
        corners, first, last = _chain(generator)
        goal = chain("chain", corners, first, last, "")
        unit = noise((2,), range(seed + k * tries, seed + (k + 1) * tries), dtype=torch.float64, stream="hunt")
        scale = _MOST_SCALE ** torch.rand(tries, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            distance = final_distance(goal, 80 * unit, scale, steps, solver) / goal.size
        b = int(distance.argmax())
        found.append(Suspect(corners, first, last, unit[b], float(scale[b]), float(distance[b])))
        every.append(distance)
        scales.append(scale)
    return sorted(found, key=lambda suspect: -suspect.distance), torch.cat(every), torch.cat(scales)


def climb(suspect: Suspect, steps: int, solver: Solver, iterations: int = _CLIMBED) -> Suspect:
    """Climb from a run to one that ends farther, by Adam on the logarithm of its distance; returns the farthest seen.

    Args:
        suspect: where to start.
        steps: of the grid.
        solver: the process.
        iterations: of Adam.
    """
    corners = suspect.corners.clone().requires_grad_()
    unit = suspect.unit.clone().requires_grad_()
    exponent = torch.tensor(math.log(suspect.scale), dtype=torch.float64, requires_grad=True)
    optimizer, best = torch.optim.Adam([corners, unit, exponent], lr=0.02), suspect
    for _ in range(iterations):
        goal = chain("chain", corners, suspect.first, suspect.last, "")
        distance = final_distance(goal, 80 * unit[None], exponent.exp().reshape(1), steps, solver)[0] / goal.size
        value = float(distance.detach())
        if value > best.distance:
            now = (each.detach().clone() for each in (corners, unit))
            own, where = now
            best = Suspect(own, suspect.first, suspect.last, where, float(exponent.detach().exp()), value)
        optimizer.zero_grad()
        (-(distance + 1e-12).log()).backward()
        parts = [part for part in (corners, unit, exponent) if part.grad is not None]
        if not all(bool(part.grad.isfinite().all()) for part in parts if part.grad is not None):
            break  # a kink where the derivative is none
        optimizer.step()
        with torch.no_grad():
            corners.clamp_(-1, 1)
            exponent.clamp_(0, math.log(_MOST_SCALE))
    return best


def retried(suspect: Suspect, steps: int, solver: Solver, near: float) -> dict[str, Any]:
    """Run a suspect again: with more steps, and with other noise close by and anywhere.

    Args:
        suspect: what was found.
        steps: it was found with.
        solver: the process.
        near: relative distance that counts as on the support.
    """
    goal, x = suspect.goal(), 80 * suspect.unit[None]
    with torch.no_grad():
        finer = {
            factor * steps: float(final_distance(goal, x, suspect.scale, factor * steps, solver)[0] / goal.size)
            for factor in _REFINED
            if factor * steps <= 1280
        }
        close = x + 0.01 * 80 * noise((2,), range(256), dtype=torch.float64, stream="close")
        other = 80 * noise((2,), range(256), dtype=torch.float64, stream="other")
        shares = [
            rate(final_distance(goal, start, suspect.scale, steps, solver) / goal.size > near)
            for start in (close, other)
        ]
    cured = [count for count, distance in finer.items() if distance <= near]
    return {
        **suspect.facts(),
        "steps": steps,
        "finer": finer,
        "cured from": min(cured) if cured else None,
        "off close by": as_json(shares[0]),
        "off anywhere": as_json(shares[1]),
    }


def _block(name: str, steps: int, size: tuple[int, int], first: int, near: float) -> Found:
    geometries, starts = size
    solver = Euler() if name == "ddim" else process(name)
    found, every, scales = search(geometries, 64, steps, solver, first)
    bad = every > near
    climbed = [climb(suspect, steps, solver) for suspect in found[:starts]]
    best = max(climbed, key=lambda suspect: suspect.distance)
    row = {
        "process": name,
        "steps": steps,
        "tried": len(every),
        "off": as_json(rate(bad)),
        "least scale": float(scales[bad].min()) if bool(bad.any()) else None,
        "random": found[0].distance,
        "climbed": best.distance,
        "gain": [after.distance - before.distance for before, after in zip(found, climbed, strict=False)],
        "worst": retried(best, steps, solver, near),
    }
    return {"distances": every.float()}, {"study": "hunt", "cells": [], "hunt": row}


def hunt_blocks(sizes: Sizes, first: int, near: float) -> list[Block]:
    """Return one block per process and number of steps.

    Args:
        sizes: how much is tried, and with what.
        first: seed.
        near: relative distance that counts as on the support.
    """
    return [
        lambda found, name=name, steps=steps: _block(name, steps, sizes.hunt, first, near)
        for name, steps in sizes.chases
    ]
