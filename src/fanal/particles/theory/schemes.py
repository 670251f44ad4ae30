"""[PDE] sec. 4.3: Euler–Maruyama and the exact step, and how both converge."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fanal import particles
from fanal.exact import Gaussian
from fanal.particles.schemes import WEIGHTS
from fanal.particles.theory.problem import (
    EARLY,
    SCHEMES,
    START,
    VARIANCE,
    density,
    float64,
    grid,
    humps,
    normal,
    variance,
)
from fanal.pde.grid import Array, Grid
from fanal.pde.theory.findings import SAFETY, Finding, settled
from fanal.pde.theory.panels import Curve, Panel, decay, local
from fanal.sampling import sample
from fanal.solvers import DDPM

__all__ = ["exact_step", "printed_noise", "reference", "strong", "weak_gaussian", "weak_mixture"]

_FIRST = dict.fromkeys(SCHEMES, -1.0)  # both are of order 1
_GROUPS = 10


def _gaussian() -> Gaussian:
    return Gaussian(float64([0.0]), VARIANCE)


def printed_noise() -> Finding:
    """(4.19): data of variance 1 come back with noise of sqrt(2Δs), and half of it with the printed sqrt(Δs)."""
    data, steps = Gaussian(float64([0.0]), 1.0), np.array([50, 100, 200, 400])
    right, printed = [], []
    for n in steps.tolist():
        sigmas = grid(n, 1e-3)
        end = math.exp(-particles.time_of(sigmas[-1]))
        run = particles.affine(particles.EulerMaruyama(), data, sigmas)
        right.append((run.std(math.exp(START)) * end) ** 2)
        printed.append((run.keep * math.exp(START) * end) ** 2 + float(run.gains.square().sum()) / 2 * end**2)
    half = (1 + math.exp(-2 * (START - 1e-3))) / 2  # of N(0, 1) at the start, e^{−T} is left, and of the noise a half
    both = {"sqrt(2Δs)": (np.array(right), 1.0), "sqrt(Δs), as printed": (np.array(printed), half)}
    off = {name: np.abs(own - limit) for name, (own, limit) in both.items()}
    curves = [Curve(name, steps, own, "joined") for name, (own, _) in both.items()]
    drawn = (
        Panel("final variance; the data's is 1", "steps", "variance", curves, "x", {"1": 1.0, "0.501": half}),
        *decay(steps, off, dict.fromkeys(off, -1.0), "steps", "distance to it", power=True),
    )
    error = float(max(own[-1] for own in off.values()))
    left = SAFETY * max(abs(float(own[-1] - own[-2])) for own, _ in both.values())  # of order 1
    says, measured = "Euler–Maruyama needs noise of sqrt(2Δs)", "error of two variances, 400 steps"
    return Finding("4.19", says, measured, error, left, {"printed": float(printed[-1])}, drawn)


def exact_step(count: int = 100) -> Finding:
    """(4.21) – (4.24), A.1, A.2: the exact step, Bayes' formula, precisions that add, and fanal's DDPM are one.

    Args:
        count: random pairs of times.
    """
    random = np.random.default_rng(0)
    times = np.exp(random.uniform(math.log(1e-3), math.log(5), count))
    ends = times * random.uniform(0.01, 0.99, count)
    rows = []
    for time, end in zip(times.tolist(), ends.tolist(), strict=True):
        one, two, h = particles.bridge(time, end), particles.posterior(time, end), time - end
        ahead, behind = math.expm1(2 * h), -math.expm1(-2 * end)  # variances of A.7 and A.8
        total = ahead * behind / (ahead + behind)
        added = (total / ahead * math.exp(h), total / behind * math.exp(-end), math.sqrt(total))
        sigmas = float64([particles.sigma_of(time), particles.sigma_of(end)])
        run, scale = particles.affine(DDPM(), Gaussian(float64([1.0]), 0.0), sigmas), math.exp(-end)
        solver = (run.keep * math.exp(time) * scale, run.offset * scale, run.std() * scale)
        rows.append([(own.keep, own.pull, own.std) for own in (one, two)] + [added, solver])
    found = np.array(rows)  # (count, way, coefficient)
    off = np.abs(found[:, 1:] / found[:, :1] - 1).max(2)
    names = ("Bayes", "precisions", "DDPM of fanal")
    ends_at = np.array([0.0, 1.0])
    drawn = (
        Panel(
            "coefficients",
            "exact step",
            "other forms",
            [Curve("equal", ends_at, ends_at, "wide", -1)]
            + [Curve(n, found[:, 0].ravel(), found[:, k + 1].ravel(), "points", k) for k, n in enumerate(names)],
        ),
        Panel(
            "difference from the exact step",
            "t",
            "relative",
            [Curve(n, times, np.maximum(off[:, k], 1e-18), "points", k) for k, n in enumerate(names)],
            "xy",
            {"tolerance": 1e-9},
        ),
    )
    says = "the exact step = the law of the past by Bayes' formula = DDPM, for any two times"
    measured = f"largest relative difference of coefficients, {count} pairs of times"
    return Finding("4.21–4.24, A.1, A.2", says, measured, float(off.max()), 1e-9, {}, drawn)


def weak_gaussian() -> Finding:
    """Both schemes are of weak order 1 on Gaussian data, from opposite sides: errors of variances, without chance."""
    steps, errors = np.array([8, 16, 32, 64, 128, 256]), {}
    for name, (solver, _) in SCHEMES.items():
        runs = [particles.affine(solver, _gaussian(), grid(n)) for n in steps.tolist()]
        stds = [run.std(math.sqrt(variance(START)) * math.exp(START)) * math.exp(-EARLY) for run in runs]
        errors[name] = np.square(stds) - variance(EARLY)
    sizes = {name: np.abs(own) for name, own in errors.items()}
    above, below = errors.values()
    opposite = bool((above > 0).all() and (below < 0).all())
    signed = [Curve(name, steps, own, "joined") for name, own in errors.items()]
    drawn = (
        Panel("error of the final variance", "steps", "error", signed, "x", {"0": 0.0}),
        *decay(steps, sizes, _FIRST, "steps", "|error|", power=True),
    )
    says = "on Gaussian data both schemes are of weak order 1, from opposite sides"
    found = _orders(steps, sizes, "128 and 256", says, drawn)
    return found if opposite else replace(found, error=math.inf)


def _orders(
    steps: Array, sizes: dict[str, Array], between: str, says: str, drawn: tuple[Panel, ...], more: float = 0.0
) -> Finding:
    """Orders between the last two numbers of steps; their corrections fall by half when steps double."""
    told = {name: settled(local(steps, own, power=True)[1], -1.0, 2.0) for name, own in sizes.items()}
    _, error, left = max(told.values(), key=lambda each: each[1] / (each[2] + more))
    values = {f"order, {name}": -each[0] for name, each in told.items()}
    return Finding("4.19, 4.22", says, f"order between {between} steps, against 1", error, left + more, values, drawn)


def weak_mixture() -> Finding:
    """Both schemes are of weak order 1 on two humps: total variation between their laws and the true one."""
    cells, steps, errors = Grid.even(-6.0, 6.0, 480), np.array([12, 24, 48]), {}
    z, width = cells.centers[0], float(cells.widths[0][0])
    truth, lost = density(z, EARLY), 0.0
    curves = [Curve("true law", z, truth, "wide", -1)]
    for name, (solver, _) in SCHEMES.items():
        laws = [particles.law(solver, humps(), grid(n), cells, density(z, START)) for n in steps.tolist()]
        lost = max(lost, *(abs(cells.mass(own) - 1) for own in laws))
        errors[name] = np.array([float(np.abs(own - truth).sum() * width / 2) for own in laws])
        curves.append(Curve(name, z, laws[0]))
    shown = [Curve(c.name, c.x[80:-80], c.y[80:-80], c.look, k - 1) for k, c in enumerate(curves)]
    drawn = (
        Panel("law at t = 0.05, 12 steps", "z", "density", shown),
        *decay(steps, errors, _FIRST, "steps", "TV", power=True),
    )
    found = _orders(steps, errors, "24 and 48", "on two humps both are of weak order 1", drawn)
    return found if lost < 2e-4 else replace(found, error=math.inf)


def reference(z0: Tensor, steps: int) -> tuple[particles.Path, Tensor]:
    """Return Brownian paths for grids of up to so many steps, and where they take z0 exactly on Gaussian data.

    Args:
        z0: (B, 1), at the start.
        steps: of the finest grid.
    """
    weights = {**WEIGHTS, "exact": lambda t: np.exp(-t) / (1 + np.exp(-2 * t) * (VARIANCE - 1))}
    path = particles.Path.draw([particles.time_of(s) for s in grid(steps)], len(z0), (1,), weights=weights)
    keep = math.exp(EARLY - START) * variance(EARLY) / variance(START)
    spread = math.sqrt(variance(EARLY) - keep**2 * variance(START))
    return path, keep * z0 + spread * path.normal("exact", START, EARLY)


def strong(count: int = 4000) -> Finding:
    """Both schemes are of strong order 1, against the exact solution of the same Brownian paths.

    Exact step and solution see other integrals of a path than Euler–Maruyama; all three are drawn jointly.

    Args:
        count: paths.
    """
    steps, errors, shown, parts = np.array([16, 32, 64, 128]), {}, [], []
    z0 = math.sqrt(variance(START)) * normal(count, 1)
    path, exact = reference(z0, int(steps[-1]))
    for name, (solver, weight) in SCHEMES.items():
        ends = [
            sample(_gaussian(), z0 * math.exp(START), grid(n), particles.Driven(solver, path.noise(weight)))
            for n in steps.tolist()
        ]
        off = [end * math.exp(-EARLY) - exact for end in ends]
        errors[name] = np.array([float(own.square().mean().sqrt()) for own in off])
        groups = [[float(part.square().mean()) for part in own.chunk(_GROUPS)] for own in off[-2:]]
        parts.append(np.log2(groups[0]) / 2 - np.log2(groups[1]) / 2)
        shown.append(
            Curve(f"{name}, 16 steps", exact[:200, 0].numpy(), (exact + off[0])[:200, 0].numpy(), "points", len(shown))
        )
    reach = torch.stack([exact.min(), exact.max()]).numpy()
    drawn = (
        Panel("ends of the same paths", "exact solution", "scheme", [Curve("equal", reach, reach, "wide", -1), *shown]),
        *decay(steps, errors, _FIRST, "steps", "strong error", power=True),
    )
    # Ten groups of paths tell how far the orders are from those of all paths.
    chance = max(float(np.std(own, ddof=1)) for own in parts) / math.sqrt(_GROUPS)
    return _orders(steps, errors, "64 and 128", "both are of strong order 1, path by path", drawn, 4 * chance)
