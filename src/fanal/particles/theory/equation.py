"""[PDE] sec. 4.1 and 4.2: the explicit reverse SDE, its limits, and the Dirac case."""

from __future__ import annotations

import math

import numpy as np
import torch

from fanal import particles
from fanal.exact import Gaussian, Mixture
from fanal.metrics import mean
from fanal.particles.theory.problem import START, float64, grid, normal, plane
from fanal.pde.grid import Array
from fanal.pde.theory.findings import Finding, settled
from fanal.pde.theory.panels import Curve, Panel, decay, deviations, local, overlaid, sides
from fanal.sampling import sample
from fanal.solvers import DDPM

__all__ = ["brownian", "dirac", "far", "forms", "near", "to_the_point", "vanishing_distance"]


def forms() -> Finding:
    """(4.6), (4.10), (4.11): three forms of the drift are one function, and `z + 2∇log ρ`.

    Differences are rounding, relative to the drift's largest term, `10/t`.
    """
    data, z, times = plane(), normal(64, 2), np.geomspace(1e-6, 6, 13)
    apart, allowed = [], []
    for t in times.tolist():
        drifts = [particles.drift(data, z, t, form) for form in particles.FORMS]
        sigma = float64(particles.sigma_of(t))
        drifts.append(z + 2 * math.exp(t) * data.score(math.exp(t) * z, sigma))
        apart.append(max(float((own - drifts[0]).abs().max()) for own in drifts[1:]))
        allowed.append(20 * 10 / t * torch.finfo(torch.float64).eps)
    t = 0.4
    score = z + 2 * math.exp(t) * data.score(math.exp(t) * z, float64(particles.sigma_of(t)))
    both = sides(particles.drift(data, z, t, "csch").numpy(), score.numpy(), 1e-12)[0]
    drawn = (
        Panel("(4.11) against z + 2∇log ρ, t = 0.4", both.x, both.y, both.curves),
        Panel(
            "largest difference of all four",
            "t",
            "difference",
            [Curve("allowed: rounding", times, np.array(allowed), "dashed", -1)]
            + [Curve("found", times, np.maximum(apart, 1e-18), "joined", 0)],
            "xy",
        ),
    )
    error = float(np.max(np.divide(apart, allowed)))
    says = "z + 2(e^(−t)·x̄ − z)/(1 − e^(−2t)) = (x̄/cosh t − z)/tanh t = −tanh(t/2)·z + (x̄ − z)/sinh t"
    measured = "largest difference over its rounding, t from 1e-6 to 6"
    return Finding("4.6, 4.10, 4.11", says, measured, error, 1.0, {}, drawn)


def far(offset: float = 0.7) -> Finding:
    """(4.7): far from the data the drift tends to −z, as e^{−t}; as e^{−2t} for centered data.

    Args:
        offset: the data's mean.
    """
    data, z = Mixture(float64([[offset - 1], [offset + 1]]), std=0.3), normal(50, 1)
    times = np.arange(3.0, 7.01, 0.5)
    sizes = np.array([float((particles.drift(data, z, t) + z).norm()) for t in times.tolist()])
    wanted = 1.0 if offset else 2.0
    found, error, left = settled(local(times, sizes, power=False)[1], wanted, math.exp(0.5))
    says = f"far from the data the reverse drift is the forward one, −z; data of mean {offset:g}"
    drawn = decay(times, {"‖drift + z‖": sizes}, {"‖drift + z‖": wanted}, "t", "difference")
    measured = f"rate between t = 6.5 and 7, against {wanted:g}"
    return Finding("4.7", says, measured, error, left, {"rate": found}, drawn)


def near() -> Finding:
    """(4.8): near the data the drift is `(x̄ − z)/t`; what is left is `−t·(z/2 + (x̄ − z)/6)`, and after that t³."""
    data, z = plane(), normal(40, 2)
    times, first, second = np.geomspace(0.32, 0.005, 7), [], []
    for t in times.tolist():
        away = particles.foot(data, z, t) - z
        rest = particles.drift(data, z, t, "csch") - away / t
        first.append(float(rest.norm()))
        second.append(float((rest + t * (z / 2 + away / 6)).norm()))
    power, error, left = settled(local(times, np.array(second), power=True)[1], 3.0, 2.0)
    one, two = "beside (x̄ − z)/t", "beside the term in t too"
    drawn = decay(times, {one: np.array(first), two: np.array(second)}, {one: 1.0, two: 3.0}, "t", "rest", power=True)
    says, measured = (
        "near the data the drift is (x̄ − z)/t, up to −t·(z/2 + (x̄ − z)/6) and t³",
        "power of the rest against 3",
    )
    return Finding("4.8", says, measured, error, left, {"power": power}, drawn)


def brownian() -> Finding:
    """(4.9): the coefficients of (4.12) and those of a Brownian bridge differ as T²."""
    ends, gaps = np.array([0.8, 0.4, 0.2, 0.1]), []
    for end in ends.tolist():
        exact, limit = particles.bridge(end, end / 3), particles.brownian_bridge(end, end / 3)
        pairs = ((exact.keep, limit.keep), (exact.pull, limit.pull), (exact.std, limit.std))
        gaps.append(max(abs(a / b - 1) for a, b in pairs))
    power, error, left = settled(local(ends, np.array(gaps), power=True)[1], 2.0, 4.0)
    whole = float(ends[0])
    shares = np.linspace(0.02, 1, 50)  # of the time that is over
    exact, limit = (
        [make(whole, whole * (1 - s)) for s in shares.tolist()]
        for make in (particles.bridge, particles.brownian_bridge)
    )
    names = ("keep", "pull", "std")
    one, other = (np.array([[getattr(step, name) for step in steps] for name in names]) for steps in (exact, limit))
    over = overlaid(shares, one, other, names, "exact, (4.12)")
    drawn = (
        Panel(f"coefficients, T = {whole:g}", "s/T", "coefficient", over),
        *decay(ends, {"largest": np.array(gaps)}, {"largest": 2.0}, "T", "relative difference", power=True),
    )
    says = "near the data the bridge is Brownian: z + s/T·(x̄ − z), variance 2·s·(T − s)/T"
    return Finding("4.9", says, "power of the difference against 2", error, left, {"power": power}, drawn)


def dirac() -> Finding:
    """(4.12): for data in one point the exact-step scheme is no approximation, on any grid, however long its steps."""
    point, names, out = 0.8, ("offset", "keep", "std"), []
    for times in ((START, 2.2, 1.7, 0.9, 0.3, 0.1, 0.03), (START, 1.2, 0.6), (START, 0.2)):
        sigmas = float64([particles.sigma_of(t) for t in times])
        for k in range(1, len(times)):
            run, scale = particles.affine(DDPM(), Gaussian(float64([point]), 0.0), sigmas[: k + 1]), math.exp(times[k])
            out.append((times[k], run.offset / scale, run.keep / scale * math.exp(START), run.std() / scale))
    found = np.array(sorted(out)).T

    def wanted(times: Array) -> Array:
        steps = [particles.bridge(START, t) for t in times.tolist()]
        return np.array([[point * step.pull, step.keep, step.std] for step in steps]).T

    off, dense = np.abs(found[1:] / wanted(found[0]) - 1).max(0), np.geomspace(0.03, 2.5, 60)
    curves = [Curve("" if k else "(4.12)", dense, y, "wide", k) for k, y in enumerate(wanted(dense))]
    curves += [Curve(n, found[0], y, "points", k) for k, (n, y) in enumerate(zip(names, found[1:], strict=True))]
    level = {"tolerance": 1e-9}
    drawn = (
        Panel("law at t, from T = 3, on three grids", "t", "coefficient", curves, "x", falling=True),
        Panel(
            "difference",
            "t",
            "relative",
            [Curve("", found[0], np.maximum(off, 1e-18), "points", 0)],
            "xy",
            level,
            falling=True,
        ),
    )
    says = "for data in one point, exact steps of any length have the law of the solution"
    return Finding("4.12", says, "largest relative difference of three coefficients", float(off.max()), 1e-9, {}, drawn)


_POINT = (0.8, -0.3)


def _mean_square(end: float) -> float:
    """Of the distance from the point, starting at N(0, 1) in the plane."""
    step = particles.bridge(START, end)
    return 2 * (step.keep**2 + step.std**2) + (1 - step.pull) ** 2 * sum(v**2 for v in _POINT)


def to_the_point() -> Finding:
    """(4.17): W2² to the point is a mean square: 4,000 particles have that of (4.12), at four ends of seven steps."""
    ends, point, z0 = np.array([0.3, 0.05, 2e-3, 2e-4]), float64(_POINT), normal(4000, 2)
    found = []
    for end in ends.tolist():
        driven = particles.Driven(DDPM(), particles.bulk(1))
        x = sample(Gaussian(point, 0.0), z0 * math.exp(START), grid(7, end), driven)
        found.append(mean((x * math.exp(-end) - point).square().sum(1)))
    wanted, dense = np.array([_mean_square(end) for end in ends.tolist()]), np.geomspace(2e-4, 0.3, 40)
    values, errors = np.array([own.value for own in found]), np.array([own.se for own in found])
    curves = [Curve("by (4.12)", dense, np.sqrt([_mean_square(t) for t in dense.tolist()]), "wide", 0)]
    curves += [Curve("4,000 particles", ends, np.sqrt(values), "points", 0)]
    drawn = (
        Panel("distance to the point", "t", "W2", curves, "xy", falling=True),
        deviations(ends, values, wanted, errors, "t", 4, "x", falling=True),
    )
    says, worst = (
        "the distance W2 of the particles to the point is that of (4.12)",
        np.abs((values - wanted) / errors).max(),
    )
    return Finding("4.17", says, "largest deviation in standard errors", float(worst), 4.0, {}, drawn)


def vanishing_distance() -> Finding:
    """(4.17): W2 to the point vanishes as `sqrt(2·d·t)`."""
    ends = np.geomspace(0.3, 2e-4, 9)
    sizes = np.sqrt([_mean_square(end) for end in ends.tolist()])
    power, error, left = settled(local(ends, sizes, power=True)[1], 0.5, float(ends[-2] / ends[-1]))
    drawn = decay(ends, {"W2": sizes}, {"W2": 0.5}, "t", "W2", power=True)
    values, says = (
        {"W2/sqrt(2dt)": float(sizes[-1] / math.sqrt(4 * ends[-1]))},
        "W2 to the point vanishes as sqrt(2·d·t)",
    )
    return Finding("4.17", says, "power against 0.5", error, left, values, drawn)
