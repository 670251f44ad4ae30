"""[PDE] sec. 4.4: which losses are the same, and the floor that none of them goes below."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fanal import particles
from fanal.denoiser import Denoiser
from fanal.exact import Mixture
from fanal.metrics import mean
from fanal.particles.theory.problem import START, float64, humps, normal
from fanal.pde.grid import Array
from fanal.pde.theory.findings import Finding, settled
from fanal.pde.theory.panels import Curve, Panel, deviations, overlaid

__all__ = ["fisher", "growing", "infinite", "judged", "normal_data", "same", "split", "unweighted", "wrong"]

_FROM = 0.1


def wrong(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser of the humps that errs, so that its score loss is above 0."""
    return 0.9 * humps()(x, sigma) + 0.2


def judged(denoiser: Denoiser, count: int = 20_000, early: bool = False) -> tuple[particles.Losses, Tensor]:
    """Return a denoiser's squared errors on draws of the humps at times in (0.1, 3), and the times.

    Args:
        denoiser: what is judged.
        count: of draws.
        early: draw times with density proportional to `1/(1 − e^{−2t})`, else uniform ones.
    """
    data, random = humps(), torch.Generator().manual_seed(44 if early else 4)
    share = torch.rand(count, dtype=torch.float64, generator=random)
    times = _FROM + (START - _FROM) * share
    if early:
        times = torch.log1p(math.expm1(2 * _FROM) * torch.exp(2 * _weight() * share)) / 2
    return particles.Losses.of(denoiser, data, data.draw(count, seed=3), times, normal(count, 1, seed=5)), times


def _weight() -> float:
    """`∫ dt/(1 − e^{−2t})` over the times."""
    return math.log(math.expm1(2 * START) / math.expm1(2 * _FROM)) / 2


def same() -> Finding:
    """(4.26) – (4.28), (4.30) – (4.33): sample by sample two pairs of losses are one."""
    found, times = judged(wrong)
    pairs = {
        "score, foot": (found.score, found.foot),
        "total, noise": (found.total, found.noise),
    }
    off = {name: ((a - b).abs() / (b.abs() + 1e-2)).numpy() for name, (a, b) in pairs.items()}
    some = slice(0, 150)
    curves = [
        Curve(name, np.maximum(b[some].numpy(), 1e-6), np.maximum(a[some].numpy(), 1e-6), "points")
        for name, (a, b) in pairs.items()
    ]
    reach = np.array([1e-6, float(found.total.max())])
    drawn = (
        Panel("150 samples", "second loss", "first loss", [*curves, Curve("equal", reach, reach, "wide", -1)], "xy"),
        Panel(
            "difference",
            "t",
            "relative",
            [Curve(n, times[some].numpy(), np.maximum(own[some], 1e-18), "points") for n, own in off.items()],
            "y",
            {"tolerance": 1e-8},
        ),
    )
    says = "losses of score and of foot are one, those of x0 and of noise too"
    error = float(max(own.max() for own in off.values()))
    measured = "largest relative difference of 20,000 samples"
    return Finding("4.26–4.28, 4.30–4.33", says, measured, error, 1e-8, {}, drawn)


def unweighted() -> Finding:
    """(4.34): without its weight the loss of noise is the total one, if early times are drawn as much more often.

    With density `1/(1 − e^{−2t})/Z` its mean is `(T − t0)/Z` times the mean of (4.33) over uniform times; over uniform
    times it is another loss, which prefers another denoiser where both cannot be had.
    """
    names, rows = ("wrong denoiser", "exact denoiser"), []
    scale, edges = _weight() / (START - _FROM), np.linspace(_FROM, START, 21)
    for denoiser in (wrong, humps()):
        (uniform, _), (drawn, times) = judged(denoiser), judged(denoiser, early=True)
        rows.append((mean(uniform.total), mean(drawn.plain * scale), mean(uniform.plain)))
    left, right = (np.array([own[k].value for own in rows]) for k in (0, 1))
    errors = np.hypot(*(np.array([own[k].se for own in rows]) for k in (0, 1)))
    middle = (edges[1:] + edges[:-1]) / 2
    counts = np.histogram(times.numpy(), edges)[0] / len(times) / np.diff(edges)
    place = np.arange(2.0)
    panels = (
        Panel(
            "times that are drawn",
            "t",
            "density",
            overlaid(middle, -1 / np.expm1(-2 * middle) / _weight(), counts, ["drawn"], "1/(1 − e^(−2t))/Z", "points"),
        ),
        Panel(
            "loss; 0: wrong, 1: exact denoiser",
            "denoiser",
            "loss",
            [
                Curve("total, uniform times", place, left, "wide", 0),
                Curve("plain, drawn times, scaled", place, right, "points", 1, errors),
                Curve("plain, uniform times", place, np.array([own[2].value for own in rows]), "dashed", -1),
            ],
        ),
    )
    says = "the loss of noise without weight is the total loss, if times are drawn with the weight"
    values = {
        f"plain over total at uniform times, {n}": own[2].value / own[0].value
        for n, own in zip(names, rows, strict=True)
    }
    measured = "largest deviation in standard errors, two denoisers"
    return Finding("4.34", says, measured, float((np.abs(left - right) / errors).max()), 4.0, values, panels)


def split() -> Finding:
    """(4.29): total loss − score loss is the floor, for a wrong denoiser and for the exact one, at all times."""
    edges, curves, worst = np.linspace(_FROM, START, 11), [], 0.0
    middle = (edges[1:] + edges[:-1]) / 2
    nodes, shares = np.polynomial.legendre.leggauss(6)  # in each bin: the floor is smooth there
    half = (edges[1] - edges[0]) / 2
    limits = np.array([[particles.floor(humps(), t) for t in (c + half * nodes).tolist()] for c in middle]) @ shares / 2
    curves.append(Curve("floor in closed form", middle, limits, "wide", -1))
    whole, panels = particles.mean_floor(humps(), _FROM, START), []
    for k, (name, denoiser) in enumerate({"wrong denoiser": wrong, "exact denoiser": humps()}.items()):
        found, times = judged(denoiser)
        rest, place = found.total - found.score, np.digitize(times.numpy(), edges) - 1
        bins = [mean(rest[torch.from_numpy(place == b)]) for b in range(10)]
        values, errors = np.array([own.value for own in bins]), np.array([own.se for own in bins])
        total = mean(rest)
        worst = max(worst, np.abs((values - limits) / errors).max(), abs(total.value - whole) / total.se)
        curves.append(Curve(name, middle, values, "points", k, errors))
        off = deviations(middle, values, limits, errors, "t", 4)
        panels.append(Curve(name, middle, off.curves[0].y, "joined", k))
    drawn = (
        Panel("total loss − score loss", "t, in ten bins", "loss", curves, "y"),
        Panel("measured − floor", "t", "standard errors", panels, levels={"±4": 4.0, "": -4.0, "floor": 0.0}),
    )
    says = "total loss = score loss + floor, whatever the denoiser"
    measured = "largest deviation in standard errors, ten bins of time and all"
    return Finding("4.29", says, measured, float(worst), 4.0, {}, drawn)


def fisher() -> Finding:
    """(4.29): the floor is `1/(1 − e^{−2t}) − J`, J Fisher's information of X_t: integrals of different functions."""
    times, x = np.geomspace(0.02, 2.5, 7), torch.linspace(-160, 160, 16001, dtype=torch.float64)[:, None]
    wanted = []
    for t in times.tolist():
        sigma = float64(particles.sigma_of(t))
        score = math.exp(t) * humps().score(x, sigma)[:, 0]
        information = float((humps().log_density(x, sigma).exp() * score**2).sum()) / 50
        wanted.append(-1 / math.expm1(-2 * t) - information)
    found = np.array([particles.floor(humps(), t) for t in times.tolist()])
    says = "the floor is what Fisher's information leaves: 1/(1 − e^(−2t)) − J"
    measured = "largest relative difference, t from 0.02 to 2.5"
    return _floors("4.29", says, measured, times, found, np.array(wanted), "1/(1 − e^(−2t)) − J", ())


def normal_data() -> Finding:
    """(4.29) for data N(0, 1): the floor is `e^{−2t}/(1 − e^{−2t})`; the printed variance of x̄ gives another."""
    times = np.geomspace(0.05, 2.5, 9)
    found = np.array([particles.floor(Mixture(float64([[0.0]]), std=1.0), t) for t in times.tolist()])
    wanted = np.exp(-2 * times) / -np.expm1(-2 * times)
    c = np.exp(-times) / -np.expm1(-2 * times)
    printed = c**2 * np.exp(-2 * times)  # x̄ = e^{−t} z has variance e^{−2t}
    says = "the floor holds E Var(x0|z); the printed Var E(x0|z) is something else"
    more = (Curve("as printed", times, printed, "dashed", 1),)
    return _floors(
        "4.29", says, "largest relative difference, N(0, 1)", times, found, wanted, "e^(−2t)/(1 − e^(−2t))", more
    )


def _floors(
    number: str, says: str, measured: str, times: Array, found: Array, wanted: Array, name: str, more: tuple[Curve, ...]
) -> Finding:
    """The floor at several times against a closed form, to rounding."""
    off, level = np.abs(found / wanted - 1), {"tolerance": 1e-9}
    drawn = (
        Panel(
            "floor of the total loss",
            "t",
            "floor",
            [*overlaid(times, wanted, found, ["floor"], name, "points"), *more],
            "xy",
        ),
        Panel("difference", "t", "relative", [Curve("", times, np.maximum(off, 1e-18), "joined", 0)], "xy", level),
    )
    return Finding(number, says, measured, float(off.max()), 1e-9, {}, drawn)


def growing(times: Array, floors: Array, starts: Array, means: Array) -> tuple[Panel, Panel]:
    """Return the floor at times, and its mean from early times on, beside what both grow as.

    Args:
        times: falling.
        floors: at them.
        starts: early times, falling.
        means: from them to 3.
    """
    guide = means[-1] + np.log(starts[-1] / starts) / (2 * START)
    return (
        Panel(
            "floor at a time",
            "t",
            "floor",
            [Curve("1/(2t)", times, 1 / (2 * times), "wide", 0), Curve("floor", times, floors, "joined", 0)],
            "xy",
            falling=True,
        ),
        Panel(
            "its mean from an early time to 3",
            "early time",
            "mean floor",
            [Curve("log(10)/6 each decade", starts, guide, "wide", 1), Curve("mean", starts, means, "joined", 1)],
            "x",
            falling=True,
        ),
    )


def infinite() -> Finding:
    """(4.30) down to time 0 is infinite: the floor grows as `1/(2t)`, its mean by `log(10)/(2T)` with each decade."""
    times, starts = np.geomspace(2.0, 1e-4, 12), np.array([1e-1, 1e-2, 1e-3, 1e-4])
    floors = np.array([particles.floor(humps(), t) for t in times.tolist()])
    means = np.array([particles.mean_floor(humps(), early, START) for early in starts.tolist()])
    slope = math.log(10) / (2 * START)
    step, error, left = settled(np.diff(means), slope, 10.0)
    drawn = growing(times, floors, starts, means)
    says = "the total loss over (0, T) is infinite: its floor grows as 1/(2t)"
    values = {"step": step, "log(10)/6": slope, "2t·floor at 1e-4": 2 * float(times[-1] * floors[-1])}
    return Finding(
        "4.30", says, "growth of its mean over the last decade, against log(10)/6", error, left, values, drawn
    )
