"""[PDE] sec. 4.5 and 5: the kernel formulation, Voronoi cells, where exact runs end, and particles beside densities."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fanal import particles
from fanal.exact import Dataset
from fanal.metrics import mean, rate
from fanal.particles.theory.problem import EARLY, SCHEMES, START, density, float64, grid, humps, normal, points
from fanal.pde.equations import reverse, score_of_denoiser
from fanal.pde.fokker_planck import evolve
from fanal.pde.grid import Array, Grid
from fanal.pde.theory.findings import Finding, settled
from fanal.pde.theory.panels import Curve, Panel, decay, deviations, local, sides
from fanal.sampling import sample, trace
from fanal.schedules import polynomial
from fanal.solvers import DDPM, Euler
from fanal.trajectory import Trajectory

__all__ = ["bounded", "densities", "endings", "kernel", "last_level", "left_noise", "one_hot", "trapped", "uniform"]


def kernel() -> Finding:
    """Prop. 4.4, (4.35) – (4.39): the foot is a softmax over the points, of variance `1 − e^{−2t}`, not its square."""
    data, z, exact = points(), normal(30, 2), Dataset(points())
    left, right, apart = [], [], 0.0
    for time in (0.02, 0.5, 3.0):
        squares = (z[:, None] - math.exp(-time) * data).square().sum(2)
        weights = torch.softmax(squares / (2 * math.expm1(-2 * time)), 1)
        left.append(particles.foot(exact, z, time).flatten().numpy())
        right.append((weights @ data).flatten().numpy())
        own = exact.weights(math.exp(time) * z, float64(particles.sigma_of(time)))
        apart = max(apart, float((own - weights).abs().max()))
    one, other = np.concatenate(left), np.concatenate(right)
    error = max(float(np.abs(one - other).max() / np.abs(other).max()), apart)
    says = "the foot is Σ w_i·y_i, w the softmax of −|z − e^(−t)·y_i|²/(2(1 − e^(−2t)))"
    measured = "largest difference of feet and of weights, t = 0.02, 0.5, 3"
    return Finding("4.35–4.39", says, measured, error, 1e-10, {"weights": apart}, sides(one, other, 1e-10))


def uniform() -> Finding:
    """(4.40): far from the data all points weigh the same: weights tend to 1/N as `e^{−t}`."""
    exact, z, times = Dataset(points()), normal(200, 2), np.arange(2.0, 8.01, 1.0)
    weights = [exact.weights(math.exp(t) * z, float64(particles.sigma_of(t))) for t in times.tolist()]
    sizes = np.array([float((own - 1 / len(exact)).norm()) for own in weights])
    found, error, left = settled(local(times, sizes, power=False)[1], 1.0, math.e)
    drawn = decay(times, {"‖w − 1/N‖": sizes}, {"‖w − 1/N‖": 1.0}, "t", "difference")
    says = "far from the data all points weigh the same, up to e^(−t)"
    return Finding("4.40", says, "rate between t = 7 and 8, against 1", error, left, {"rate": found}, drawn)


def _places(reach: float) -> tuple[Array, Tensor]:
    """Edges of small squares that fill a large one, and their centers in rows."""
    side = np.linspace(-reach, reach, 61)
    middle = (side[1:] + side[:-1]) / 2
    return side, torch.from_numpy(np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2))


def _shades(index: Tensor) -> Array:
    """Shades of cells, mixed so that cells beside each other differ."""
    return (7 * index % 24).reshape(60, 60).numpy().astype(np.float64)


def one_hot() -> Finding:
    """(4.41), (4.43): near the data the weights are one-hot: the foot is the point whose Voronoi cell z is in."""
    data, sigmas = points(), np.geomspace(10, 1e-3, 17)
    side, z = _places(2.2)
    exact = Dataset(data)
    every = torch.stack([exact.weights(z, float64(sigma)).amax(1) for sigma in sigmas.tolist()])
    near = exact.weights(z, float64(sigmas[-1]))
    heaviest, nearest = near.argmax(1), exact.nearest(z)[1][:, 0]
    mixed = float((near.amax(1) < 1 - 1e-9).double().mean())
    error = mixed if torch.equal(heaviest, nearest) else math.inf
    curves = [
        Curve(f"{name} of {len(z):,} places", sigmas, every.quantile(q, dim=1).numpy(), "joined")
        for name, q in (("median", 0.5), ("lowest 2 %", 0.02))
    ]
    drawn = (
        Panel("largest weight", "sigma", "weight", curves, "x", {"1/N": 1 / 24}, falling=True),
        Panel(
            "heaviest point at sigma = 0.001, and the points",
            "x",
            "y",
            [Curve("", data[:, 0].numpy(), data[:, 1].numpy(), "points", 1)],
            square=True,
            image=(side, side, _shades(heaviest)),
        ),
    )
    says = "near the data the weights are one-hot: the foot is constant on each Voronoi cell"
    measured = "share of places in the square whose weights are not one-hot at sigma = 0.001"
    return Finding("4.41, 4.43", says, measured, error, 0.02, {}, drawn)


def trapped(count: int = 1000) -> Finding:
    """(4.42), (4.44), (4.45): a run is outside of the cell it ends in as often as the forward process, by theorem 1.

    Within 4 standard errors of the difference, and 0.02 for 200 steps.

    Args:
        count: runs.
    """
    data, sigmas = points(), torch.cat([grid(200, 1e-6), float64([0.0])])
    exact = Dataset(data)
    start = normal(count, 2) * sigmas[0]
    run = Trajectory.record(trace(exact, start, sigmas, particles.Driven(DDPM(), particles.bulk(0))))
    ends, every = particles.Endings.of(data, run.x[-1]), range(10, 111, 10)
    own = [rate(exact.nearest(run.x[k])[1][:, 0] != ends.index) for k in every]
    forward = [rate(particles.chance_outside(data, float(run.sigmas[k]))) for k in every]
    off = np.array([a.value - b.value for a, b in zip(own, forward, strict=True)])
    allowed = np.array([4 * math.hypot(a.se, b.se) + 0.02 for a, b in zip(own, forward, strict=True)])
    at, shown = run.sigmas[list(every)].numpy(), run.x[:, :40]
    paths = [Curve("", shown[40:, b, 0].numpy(), shown[40:, b, 1].numpy(), "line", b) for b in range(12)]
    side, z = _places(2.8)
    drawn = (
        Panel(
            "outside of the cell that they end in",
            "sigma",
            "share",
            [
                Curve("forward process", at, np.array([b.value for b in forward]), "wide", 0),
                Curve("reverse run", at, np.array([a.value for a in own]), "points", 0, np.array([a.se for a in own])),
            ],
            "x",
            falling=True,
        ),
        _within("reverse − forward", at, off, allowed, "sigma"),
        Panel(
            f"runs from sigma = {float(sigmas[40]):.2g} on",
            "x",
            "y",
            [*paths, Curve("", data[:, 0].numpy(), data[:, 1].numpy(), "points", -1)],
            square=True,
            image=(side, side, _shades(exact.nearest(z)[1][:, 0])),
        ),
    )
    on = float(ends.on.double().mean())
    error = float((np.abs(off) / allowed).max()) if on > 0.99 else math.inf
    says = "particles are trapped in Voronoi cells, and when is told by the forward process"
    measured = "largest difference of shares over 4 standard errors and 0.02"
    return Finding("4.42, 4.44, 4.45", says, measured, error, 1.0, {"on a point": on}, drawn)


def bounded(count: int = 4000) -> Finding:
    """Sec. 5: few runs end off the points: no more than `off_bound` says, and none as the last level goes to 0.

    Args:
        count: runs.
    """
    data, levels, start = points(8), np.array([0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3]), normal(count, 2) * 20
    shares, limits = [], []
    for last in levels.tolist():
        sigmas = float64([20.0, 3.0, last, 0.0])
        x = sample(Dataset(data), start, sigmas, particles.Driven(DDPM(), particles.bulk(0)))
        shares.append(rate(particles.Endings.of(data, x).distance > 1e-3))
        limits.append(particles.off_bound(data, last, last * math.sqrt(1 - (last / 3) ** 2), 1e-3))
    values, spread = np.array([own.value for own in shares]), np.array([own.se for own in shares])
    over = float((values - limits).max())
    seen = np.where(values > 0, values, np.nan)
    drawn = (
        Panel(
            "ends farther than 0.001 from each point",
            "last level",
            "share of runs",
            [
                Curve("bound", levels, np.array(limits), "dashed", 1),
                Curve(f"{count:,} runs", levels, seen, "points", 0, spread),
            ],
            "xy",
            falling=True,
        ),
        Panel(
            "the same",
            "last level",
            "share of runs",
            [
                Curve("bound", levels, np.array(limits), "dashed", 1),
                Curve(f"{count:,} runs", levels, values, "joined", 0),
            ],
            "x",
            falling=True,
        ),
    )
    says = "the share of runs that end off the points is below a bound that vanishes with the last level"
    told = {"bound at 0.001": limits[-1], "share at 0.1": float(values[1]), "share at 0.001": float(values[-1])}
    error = max(over, float(values[-1]) - 0.01, limits[-1] - 0.2)
    return Finding(
        "sec. 5", says, "largest share − bound, and share − 1 %, bound − 20 % at 0.001", error, 0.0, told, drawn
    )


def last_level(count: int = 2000) -> Finding:
    """Sec. 5: runs of many levels end on points as often as the last level allows, which the forward process tells.

    Within 4 standard errors of the difference, and 0.03 for 60 levels.

    Args:
        count: runs.
    """
    data, shares = points(), np.array([1.0, 0.5, 0.3, 0.2, 0.1, 0.05])
    gap, start = float(particles.gaps(data).median()), normal(count, 2) * 20
    own, forward, limits = [], [], []
    for last in (shares * gap).tolist():
        sigmas = torch.cat([polynomial(60, last, 20.0, zero=False), float64([0.0])])
        x = sample(Dataset(data), start, sigmas, particles.Driven(DDPM(), particles.bulk(0)))
        own.append(rate(particles.Endings.of(data, x).on))
        forward.append(rate(~particles.chance_off(data, last, 10_000)))
        limits.append(1 - particles.off_bound(data, last, last, particles.ON * gap))
    found, spread = np.array([a.value for a in own]), np.array([a.se for a in own])
    wanted = np.array([b.value for b in forward])
    off, allowed = found - wanted, 4 * np.hypot(spread, [b.se for b in forward]) + 0.03
    drawn = (
        Panel(
            "ends on a point",
            "last level over the gap",
            "share of runs",
            [
                Curve("forward process", shares, wanted, "wide", 0),
                Curve("60 levels", shares, found, "points", 0, spread),
                Curve("proved for any run", shares, np.array(limits), "dashed", 1),
            ],
            "x",
            falling=True,
        ),
        _within("runs − forward process", shares, off, allowed, "last level over the gap"),
    )
    says, measured = (
        "a run ends on a point as often as its last level allows",
        "largest difference over what is allowed",
    )
    return Finding("sec. 5", says, measured, float((np.abs(off) / allowed).max()), 1.0, {}, drawn)


def _within(title: str, x: Array, off: Array, allowed: Array, axis: str) -> Panel:
    """Differences of shares between what is allowed."""
    bounds = [Curve(name, x, side, "dashed", -1) for name, side in (("allowed", allowed), ("", -allowed))]
    return Panel(title, axis, "share", [Curve("", x, off, "joined", 0), *bounds], "x", falling=True)


_ENDS = {"exact step": DDPM(), "ODE (Euler)": Euler(), "Euler–Maruyama": particles.EulerMaruyama()}
_NOISY = "Euler–Maruyama to the end"


def endings(count: int = 500) -> Finding:
    """Sec. 5: with the exact denoiser of 24 points all schemes end on them; Euler–Maruyama's own last step does not.

    But for those whom the last level lets off, as it does the forward process, and 4 standard errors.

    Args:
        count: runs.
    """
    data, sigmas = points(), torch.cat([grid(60, 5e-5), float64([0.0])])
    start, shares, curves, met = normal(count, 2) * sigmas[0], {}, [], 0
    for name, solver in {**_ENDS, _NOISY: particles.EulerMaruyama(denoise=False)}.items():
        x = sample(Dataset(data), start, sigmas, particles.Driven(solver, particles.bulk(3)))
        found = particles.Endings.of(data, x)
        shares[name] = float((~found.on).double().mean())
        met = len(found.index.unique()) if name == "exact step" else met
        below = np.arange(1, count + 1) / count
        curves.append(Curve(name, np.sort(np.maximum(found.ratio.numpy(), 1e-18)), below))
    on = Curve("on: 0.01", np.array([particles.ON, particles.ON]), np.array([0.0, 1.0]), "dashed", -1)
    near = [Curve(c.name, c.x[-count // 20 :], c.y[-count // 20 :]) for c in curves]
    drawn = (
        Panel("distance to the nearest point over its gap", "distance", "share of runs below", [*curves, on], "x"),
        Panel(
            "the farthest 5 %",
            "distance",
            "share of runs below",
            [*near, Curve("", on.x, np.array([0.95, 1.0]), "dashed", -1)],
            "x",
        ),
    )
    off = float(particles.chance_off(data, float(sigmas[-2]), 20_000).double().mean())
    allowed = off + 4 * math.sqrt(off * (1 - off) / count)
    says = "exact runs end on training points, by the exact step, the ODE and Euler–Maruyama"
    error = max(shares[name] for name in _ENDS) if met == len(data) and shares[_NOISY] > 0.5 else math.inf
    values = {f"off a point, {name}": value for name, value in shares.items()} | {"points met, exact step": float(met)}
    return Finding("sec. 5", says, "largest share of 500 runs off a point", error, allowed, values, drawn)


def left_noise(count: int = 500) -> Finding:
    """Sec. 5: Euler–Maruyama's own last step leaves noise: a mean square of `2·d·t`, t being the last time.

    Args:
        count: runs.
    """
    data, lasts, found = points(), np.array([1e-3, 2e-4, 5e-5]), []
    solver = particles.Driven(particles.EulerMaruyama(denoise=False), particles.bulk(3))
    for last in lasts.tolist():
        sigmas = torch.cat([grid(60, last), float64([0.0])])
        x = sample(Dataset(data), normal(count, 2) * sigmas[0], sigmas, solver)
        found.append(mean(particles.Endings.of(data, x).distance.square()))
    values, errors, wanted = np.array([a.value for a in found]), np.array([a.se for a in found]), 4 * lasts
    curves = [Curve("2·d·t", lasts, wanted, "wide", 0), Curve("runs", lasts, values, "points", 0, errors)]
    drawn = (
        Panel("mean square distance to the nearest point", "last time", "mean square", curves, "xy", falling=True),
        deviations(lasts, values, wanted, errors, "last time", 4, "x", falling=True),
    )
    says, worst = (
        "Euler–Maruyama's own last step leaves noise of mean square 2·d·t",
        np.abs((values - wanted) / errors).max(),
    )
    return Finding("sec. 5", says, "largest deviation in standard errors", float(worst), 4.0, {}, drawn)


def densities(count: int = 10_000) -> Finding:
    """(2.7), (4.1): particles of both schemes have the density of the reverse equation, from the same normal start.

    Kolmogorov–Smirnov at level 0.1 % each, both schemes biased by less than a fifth of what it can tell.

    Args:
        count: particles.
    """
    cells, steps = Grid.even(-5.0, 5.0, 500), 300
    z, times = cells.centers[0], START - np.exp(np.linspace(math.log(START), math.log(EARLY), 401))
    drift = reverse(score_of_denoiser(humps()), START)
    solved = evolve(cells, stats.norm.pdf(z), drift, times - times[0], scheme="trapezoid")[-1]
    total, own = (np.concatenate([[0], np.cumsum(p * cells.volumes)]) for p in (solved, density(z, EARLY)))
    bias, worst, off = float(np.abs(total - own).max()), 0.0, []
    curves = [Curve("density", z, solved, "wide", -1)]
    for k, (name, (solver, _)) in enumerate(SCHEMES.items()):
        start = normal(count, 1, seed=11) * math.exp(START)
        x = sample(humps(), start, grid(steps), particles.Driven(solver, particles.bulk(7)))[:, 0]
        ends = np.sort(x.numpy() * math.exp(-EARLY))
        worst = max(worst, float(stats.kstest(ends, lambda v: np.interp(v, cells.edges[0], total)).statistic))
        below = np.searchsorted(ends, cells.edges[0], "right") / count
        off.append(Curve(name, cells.edges[0], below - total, "line", k))
        heights, edges = np.histogram(ends, 50, (-3, 3), density=True)
        curves.append(Curve(name, (edges[1:] + edges[:-1]) / 2, heights, "points", k))
    allowed = float(stats.kstwo.ppf(0.999, count))
    drawn = (
        Panel(f"at t = 0.05, {count:,} particles each", "z", "density", curves),
        Panel(
            "share below z, particles − density",
            "z",
            "difference",
            off,
            levels={"±, level 0.1 %": allowed, "": -allowed},
        ),
    )
    error = worst if bias < 0.2 * allowed else math.inf
    says = "particles of both schemes have the density that solves the reverse equation"
    return Finding(
        "2.7, 4.1", says, "Kolmogorov's distance, two schemes", error, allowed, {"of the closed form": bias}, drawn
    )
