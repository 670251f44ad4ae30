"""[PDE] sec. 3: the past of the forward process is the future of the reverse one, and what that makes of q(·, T*)."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from fanal.pde import equations
from fanal.pde.distances import kl, tv, w2
from fanal.pde.fokker_planck import evolve
from fanal.pde.grid import Array, Grid
from fanal.pde.laws import Law, averages, law
from fanal.pde.theory.findings import SAFETY, Finding, differences, point, refined, score_of_law, settled, smooth
from fanal.pde.theory.panels import Curve, Panel, decay, overlaid

__all__ = [
    "any_start",
    "convergence",
    "explicit_kernel",
    "factors",
    "generated",
    "homogeneity",
    "past_is_future",
    "shifted_bumps",
    "support",
    "vanishing",
]

CELLS, REACH, END = 200, 6.0, 1.0


def shifted_bumps(offset: float) -> Law:
    """Return the two bumps, moved: centered data (0) and others approach the normal law at different rates."""
    import torch

    from fanal.exact import Mixture

    means = torch.tensor([[-1.5 + offset], [1.0 + offset]], dtype=torch.float64)
    std = torch.tensor([0.4, 0.6], dtype=torch.float64)
    return Law("two-bumps, moved", Mixture(means, [0.4, 0.6], std=std), 5.0)


def _grid(cells: int) -> Grid:
    return Grid.even(-REACH, REACH, cells)


def _kernel(x: Array, y: Array, time: float) -> Array:
    """`ρ(x, t | y, 0)` for all pairs, (len(x), len(y)) ([PDE] eq. 2.12)."""
    return stats.norm.pdf(x[:, None], math.exp(-time) * y[None], math.sqrt(-math.expm1(-2 * time)))


def past_is_future(factor: float = 1.0) -> Finding:
    """Theorem 1, (3.4): `ρ(x, t1 | y, t2) = q(x, T* − t1 | y, T* − t2)`, for three y.

    The left side is Bayes' rule with the forward kernel; the right one the reverse equation, started at the point y.

    Args:
        factor: of the score; 1 but for tests that must fail.
    """
    own, t1, t2, starts = law("two-bumps"), 0.2, 0.8, (-1.32, 0.0, 1.08)
    drift = equations.reverse(score_of_law(own, factor), END)

    def solve(cells: int) -> Array:
        grid = _grid(cells)
        return np.stack([smooth(grid, point(grid, y), drift, END - t2, END - t1, cells // 2) for y in starts])

    def past(y: float, points: Array) -> Array:
        ahead = _kernel(np.array([y]), points[:, 0], t2 - t1)[0]
        return ahead * own.density(points, t1) / own.density(np.array([[y]]), t2)

    grid = _grid(CELLS // 2)
    wanted = np.stack([averages(grid, lambda x, y=y: past(y, x)) for y in starts])
    found = refined(solve, wanted, grid.widths[0][0], CELLS, 2)
    says = "where X was at t1, given that it is at y at t2, is where the reverse process from y will be"
    measured, drawn = (
        "largest total variation for three y",
        found.panels(grid.centers[0], [f"q from y = {y:g}" for y in starts]),
    )
    return Finding("3.4, theorem 1", says, measured, found.error, found.tolerance, {}, drawn)


def homogeneity() -> Finding:
    """(3.3): the forward transition depends on the time between alone; the reverse transition does not."""
    own, x0, ago = law("two-bumps"), 1.08, 0.4
    drift = equations.reverse(score_of_law(own), END)

    def solve(cells: int) -> Array:
        grid = _grid(cells)
        starts = ((equations.ornstein_uhlenbeck, a) for a in (0.0, 0.5))
        return np.stack([smooth(grid, point(grid, x0), b, a, a + ago, cells // 4) for b, a in starts])

    fine, grid = _grid(CELLS), _grid(CELLS // 2)
    mean, std = x0 * math.exp(-ago), math.sqrt(-math.expm1(-2 * ago))
    wanted = np.diff(stats.norm.cdf(grid.edges[0], mean, std)) / grid.widths[0]
    found = refined(solve, np.stack([wanted, wanted]), grid.widths[0][0], CELLS, 2)
    early, late = (smooth(fine, point(fine, x0), drift, a, a + ago, CELLS // 4) for a in (0.0, 0.5))
    says = "forward transitions depend on the time between alone; those of the reverse do not"
    values, x = {"reverse, total variation": tv(fine, early, late)}, fine.centers[0]
    error = found.error if values["reverse, total variation"] > 0.1 else math.inf
    names = ["from t = 0", "from t = 0.5"]
    forward = overlaid(grid.centers[0], found.wanted, found.found, names, "N(e^(−0.4)·x0, 1 − e^(−0.8))")
    drawn = (
        Panel("forward, 0.4 later", "x", "density", forward),
        Panel("reverse, 0.4 later", "x", "density", overlaid(x, early, late, ["from s = 0.5"], "from s = 0")),
    )
    measured = "forward, total variation from the kernel of 0.4, from two starts"
    return Finding("3.3", says, measured, error, found.tolerance, values, drawn)


def explicit_kernel(factor: float = 1.0) -> Finding:
    """Cor. 3.1, (3.13), (3.18): from a point x the reverse ends in `ρ0(y)·N(x; e^{−T*}y, …)`, normalized.

    Args:
        factor: of the score; 1 but for tests that must fail.
    """
    own, starts = law("two-bumps"), (-1.32, 0.72)
    drift = equations.reverse(score_of_law(own, factor), END)

    def solve(cells: int) -> Array:
        grid = _grid(cells)
        return np.stack([smooth(grid, point(grid, x), drift, 0.0, END, cells) for x in starts])

    def ends(x: float, points: Array) -> Array:
        return _kernel(np.array([x]), points[:, 0], END)[0] * own.density(points, 0.0)

    grid = _grid(CELLS // 2)
    wanted = np.stack([averages(grid, lambda y, x=x: ends(x, y)) for x in starts])
    wanted /= wanted.sum(1, keepdims=True) * grid.widths[0][0]
    found = refined(solve, wanted, grid.widths[0][0], CELLS, 2)
    says = "from one point x, the reverse ends in the data's density times a normal factor, normalized"
    measured, drawn = (
        "largest total variation for two x",
        found.panels(grid.centers[0], [f"from x = {x:g}" for x in starts]),
    )
    return Finding("3.13, 3.18, cor. 3.1", says, measured, found.error, found.tolerance, {}, drawn)


def factors(own: Law, start: Array, x: Array, y: Array, end: float, early: float = 0.0) -> Array:
    """Return the factor of (3.19), `∫ ρ(x, T*|y, t) q0(x)/ρ(x, T*) dx`, at points y.

    Args:
        own: the data's law.
        start: q0 at points x.
        x: evenly spaced points that hold q0 and ρ(·, T*).
        y: where.
        end: T*.
        early: t at which the way back stops, 0 in the paper: the past of ρ(·, t) is as good a start as that of ρ0.
    """
    there = own.density(x[:, None], end)
    ratio = np.divide(start, there, out=np.zeros_like(there), where=there > np.finfo(np.float64).tiny)
    return (x[1] - x[0]) * ratio @ _kernel(x, y, end - early)


def generated(own: Law, start: Array, x: Array, grid: Grid, end: float, early: float = 0.0) -> Array:
    """Return `q(·, T* − t)` of (3.19) in cells: the data's density at t times `factors`."""
    return averages(grid, lambda y: own.density(y, early) * factors(own, start, x, y[:, 0], end, early))


def any_start(factor: float = 1.0) -> Finding:
    """Cor. 3.2, (3.19): from any q0 the reverse ends in the data's density times a factor.

    Args:
        factor: of the score; 1 but for tests that must fail.
    """
    own = law("two-bumps")
    starts = {"normal": (0, 1), "far": (1.5, 0.5), "wide": (0, 1.5)}
    drift = equations.reverse(score_of_law(own, factor), END)

    def solve(cells: int) -> Array:
        grid, times = _grid(cells), np.linspace(0, END, cells + 1)
        begin = [averages(grid, lambda x, q=q: stats.norm.pdf(x[:, 0], *q)) for q in starts.values()]
        return np.stack([evolve(grid, q, drift, times, scheme="trapezoid")[-1] for q in begin])

    grid, x = _grid(CELLS // 2), np.linspace(-REACH, REACH, 2001)
    wanted = np.stack([generated(own, stats.norm.pdf(x, *q), x, grid, END) for q in starts.values()])
    found = refined(solve, wanted, grid.widths[0][0], CELLS, 2)
    far = {f"TV from the data, {n}": tv(grid, q, own.cells(grid)) for n, q in zip(starts, wanted, strict=True)}
    says = "from any q0, the reverse ends in the data's density times ∫ ρ(x, T*|y, 0)·q0(x)/ρ(x, T*) dx"
    measured, drawn = (
        "largest total variation for three q0",
        found.panels(grid.centers[0], [f"from q0 {n}" for n in starts]),
    )
    return Finding("3.19, cor. 3.2", says, measured, found.error, found.tolerance, far, drawn)


_EDGE_CELLS = 240
_EDGE_TIMES = (4.0**-2, 4.0**-3, 4.0**-4)


def _edge_grid(cells: int) -> Grid:
    """Cells that are fine at the edges of the box [−1, 1], and nested: those of half as many are pairs of them."""
    inner, outer = cells // 8, 3 * cells // 8
    near = np.sinh(4 * np.linspace(0, 1, inner + 1)) / math.sinh(4)
    far = 5 * np.sinh(4 * np.linspace(0, 1, outer + 1)) / math.sinh(4)
    right = np.concatenate([1 - near[::-1], 1 + far[1:]])
    return Grid((np.concatenate([-right[:0:-1], right]),))


def _outside(cells: int, factor: float = 1.0) -> tuple[Grid, Array, Array, Array]:
    """The reverse from N(0, 1) at T* = 1 to data uniform on [−1, 1]: cells, forward times, densities, mass outside."""
    own, grid, steps = law("box"), _edge_grid(cells), cells // 4 * 4
    score = equations.score_of_denoiser(own.denoiser)
    drift = equations.reverse(lambda x, t: factor * score(x, t), END)
    times = 4.0 ** -np.linspace(0, 4, steps + 1)
    begin = averages(grid, lambda x: stats.norm.pdf(x[:, 0]))
    found = evolve(grid, begin, drift, END - times, scheme="trapezoid")
    return grid, times, found, (found * grid.widths[0])[:, np.abs(grid.centers[0]) > 1].sum(1)


def _at_edge_times(kept: Array) -> Array:
    """What was kept of all steps, at `_EDGE_TIMES`."""
    steps = len(kept) - 1
    return kept[[steps // 2, 3 * steps // 4, steps]]


def _outside_wanted() -> Array:
    """The same of (3.19)."""
    own, x, out = law("box"), np.linspace(-9, 9, 1801), []
    for t in _EDGE_TIMES:
        grid = Grid.even(1.0, 1.0 + 12 * math.sqrt(t), 600)
        out.append(2 * grid.mass(generated(own, stats.norm.pdf(x), x, grid, END, t)))
    return np.array(out)


def support(factor: float = 1.0) -> Finding:
    """Cor. 3.3: what is generated lies where the data lie; at t > 0, what is outside is the blur of (3.19) alone.

    The data are uniform on [−1, 1], q0 is normal and T* = 1.

    Args:
        factor: of the score; 1 but for tests that must fail.
    """
    solved = {cells: _outside(cells, factor) for cells in (_EDGE_CELLS // 2, _EDGE_CELLS)}
    wanted = _outside_wanted()
    found = differences(lambda cells: _at_edge_times(solved[cells][3]), wanted, _EDGE_CELLS, 2)
    grid, times, densities, masses = solved[_EDGE_CELLS]
    says = "the generated law has no mass outside of the data's support: before the end, only the blur"
    values = {f"outside at t = {t:.4f}": float(v) for t, v in zip(_EDGE_TIMES, found.found[0], strict=True)}
    x, near = grid.centers[0], np.abs(grid.centers[0]) < 2.4
    curves = [Curve("data", np.array([-2.4, -1, -1, 1, 1, 2.4]), np.array([0, 0, 0.5, 0.5, 0, 0]), "dashed", -1)]
    for t, q in zip(_EDGE_TIMES, _at_edge_times(densities), strict=True):
        curves.append(Curve(f"t = {t:.4f}", x[near], q[near]))
    at = np.array(_EDGE_TIMES)
    later = times <= _EDGE_TIMES[0]
    outside = [Curve("by (3.19)", at, wanted, "points", 1), Curve("solved", times[later], masses[later], "line", 0)]
    measured, drawn = (
        "largest error of the mass outside, at three t",
        (
            Panel("generated law", "x", "density", curves),
            Panel("mass outside of [−1, 1]", "t", "mass", outside, "xy", falling=True),
        ),
    )
    return Finding("cor. 3.3", says, measured, found.error, found.tolerance, values, drawn)


def vanishing() -> Finding:
    """Cor. 3.3: the mass outside a box falls to 0 as `√t`; corrections to the power fall by half from t to t/4."""
    _, times, _, outside = _outside(_EDGE_CELLS)
    masses = _at_edge_times(outside)
    powers = np.log(masses[:-1] / masses[1:]) / math.log(4)
    power, error, left = settled(powers, 0.5, 2.0)
    says = "the mass outside of a box falls to 0 as √t"
    every = slice(0, None, 4)
    drawn = decay(times[every], {"solved": outside[every]}, {"solved": 0.5}, "t", "mass outside", power=True)
    return Finding("cor. 3.3", says, "error of the power", error, left, {"power": power}, drawn)


def convergence(offset: float) -> Finding:
    """Remark after cor. 3.2: from N(0, 1), `q(·, T*)` approaches the data exponentially, at twice the forward rate.

    With `η = e^{−T*}`, `q0/ρ(·, T*) = 1 − mηx + O(η²)`, and (3.19) takes the mean of x, which is ηy: the first order is
    gone. So TV and W2 fall as `η²` and KL as `η⁴`; for centered data, m = 0, as `η⁴` and `η⁸`.

    Args:
        offset: m, the data's mean.
    """
    own, grid, x = shifted_bumps(offset), _grid(1600), np.linspace(-9, 9, 601)
    data, ends, begin = own.cells(grid), np.array([0.5, 1.0, 1.5, 2.0, 2.5]), stats.norm.pdf(x)
    rows = []
    for end in ends:
        q = generated(own, begin, x, grid, end)
        rows.append([tv(grid, data, q), kl(grid, data, q / grid.mass(q)), w2(grid, data, q)])
    rates = -np.diff(np.log(rows), axis=0) / 0.5
    wanted = np.array([2.0, 4.0, 2.0]) * (1 if offset else 2)
    errors = np.abs(rates[-1] / wanted - 1)
    left = np.abs((rates[-1] - rates[-2]) / wanted) / math.expm1(0.5)  # corrections fall by e^{−1/2} per window
    worst = int((errors / left).argmax())
    names = ("TV", "KL", "W2")
    values = {f"rate of {name}": float(rate) for name, rate in zip(names, rates[-1], strict=True)}
    for end, row in zip(ends[2:], rows[2:], strict=True):
        values |= {f"{name} at T* = {end:g}": value for name, value in zip(names, row, strict=True)}
    says = f"q(·, T*) from N(0, 1) approaches the data as e^(−{wanted[0]:g}T*), KL as e^(−{wanted[1]:g}T*)"
    sizes: dict[str, Array] = dict(zip(names, np.transpose(rows), strict=True))
    return Finding(
        f"3.19, remark, mean {offset:g}",
        says,
        f"relative error of the rate of {names[worst]}",
        float(errors[worst]),
        SAFETY * float(left[worst]),
        values,
        decay(ends, sizes, dict(zip(names, wanted.tolist(), strict=True)), "T*", "distance"),
    )
