"""[PDE] sec. 2: the forward equations, their generators, and the equation that cannot be run backwards."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.polynomial import hermite_e
from scipy import integrate, sparse, stats
from scipy.interpolate import CubicSpline
from scipy.sparse.linalg import expm_multiply, splu

from fanal.pde import equations
from fanal.pde.distances import kl
from fanal.pde.fokker_planck import evolve, generator
from fanal.pde.grid import Array, Grid
from fanal.pde.instability import blow_up, mode_rate
from fanal.pde.laws import averages, law
from fanal.pde.theory.findings import SAFETY, Finding, differences, point, refined, settled, smooth
from fanal.pde.theory.generated import shifted_bumps
from fanal.pde.theory.panels import Curve, Panel, decay, overlaid, sides

__all__ = [
    "adjoint",
    "backward_equation",
    "blown_up",
    "equilibrium",
    "forward_equation",
    "growing_waves",
    "product_rule",
    "terminal",
    "transition",
    "transport",
]

CELLS, REACH, END = 400, 7.0, 1.0
_OU = equations.ornstein_uhlenbeck
_INNER = np.linspace(-2, 2, 17)


def _grid(cells: int) -> Grid:
    return Grid.even(-REACH, REACH, cells)


def _cosine(x: Array, time: float) -> Array:
    """`E[cos X_t | X_0 = x]`."""
    return math.exp(-(1 - math.exp(-2 * time)) / 2) * np.cos(math.exp(-time) * x)


def forward_equation() -> Finding:
    """(2.1), (2.16): densities of a mixture under Ornstein–Uhlenbeck are those of its closed form."""
    own, moments = law("two-bumps"), (0.1, 0.3, END)

    def solve(cells: int) -> Array:
        grid, steps = _grid(cells), cells // 4
        times = np.linspace(0, END, steps + 1)
        found = evolve(grid, own.cells(grid), _OU, times, scheme="trapezoid", steady=True)
        return np.stack([found[round(t * steps)] for t in moments])

    grid = _grid(CELLS // 2)
    wanted = np.stack([own.cells(grid, t) for t in moments])
    found = refined(solve, wanted, grid.widths[0][0], CELLS, 2)
    says = "the forward equation turns the data's density into that of e^(−t)·x0 + sqrt(1 − e^(−2t))·n"
    measured, names = "largest total variation at t = 0.1, 0.3, 1", [f"t = {t:g}" for t in moments]
    return Finding("2.1, 2.12", says, measured, found.error, found.tolerance, {}, found.panels(grid.centers[0], names))


def transition() -> Finding:
    """(2.12): from a point the density is the normal one of mean `e^{−t}x0` and variance `1 − e^{−2t}`."""
    x0, time = 1.4, 0.5

    def solve(cells: int) -> Array:
        return smooth(_grid(cells), point(_grid(cells), x0), _OU, 0.0, time, cells // 4, steady=True)

    grid = _grid(CELLS // 2)
    std = math.sqrt(1 - math.exp(-2 * time))
    wanted = np.diff(stats.norm.cdf(grid.edges[0], x0 * math.exp(-time), std)) / grid.widths[0]
    found = refined(solve, wanted, grid.widths[0][0], CELLS, 2)
    says = "from one point, X_t is normal with mean e^(−t)·x0 and variance 1 − e^(−2t)"
    drawn = found.panels(grid.centers[0], [f"from x0 = {x0:g}, t = {time:g}"])
    return Finding("2.12", says, "total variation at t = 0.5", found.error, found.tolerance, {}, drawn)


def equilibrium(offset: float = 0.5) -> Finding:
    """Sec. 2.1: the forward density approaches the normal one exponentially: KL at rate 2, or 4 for centered data.

    The relative correction falls as `e^{−t}`, so that the rates of two windows tell what is left of it.
    """
    own, grid = shifted_bumps(offset), _grid(CELLS)
    times, moments = np.linspace(0, 4, 4 * CELLS + 1), np.arange(0.5, 3.01, 0.25)
    found = evolve(grid, own.cells(grid), _OU, times, scheme="trapezoid", steady=True)
    # What the cells' own equilibrium is, which differs from the normal one by their order.
    still = evolve(grid, averages(grid, lambda x: stats.norm.pdf(x[:, 0])), _OU, [0, 1e3, 2e3], steady=True)[-1]
    sizes = np.array([kl(grid, found[round(t * CELLS)], still) for t in moments])
    rates = np.log(sizes[-7:-2:2] / sizes[-5::2]) / 0.5  # over windows of 0.5 that end at 2, 2.5 and 3
    wanted = 2.0 if offset else 4.0
    rate, error, left = settled(rates, wanted, math.exp(0.5))
    says = f"the forward density approaches the normal one exponentially; data of mean {offset:g}"
    drawn = decay(moments, {"KL to the normal law": sizes}, {"KL to the normal law": wanted}, "t", "KL")
    measured = f"rate of KL against {wanted:g}"
    return Finding("2.1", says, measured, error, left, {"rate": rate}, drawn)


def backward_equation() -> Finding:
    """(2.13)–(2.15): `E[φ(X_t) | X_0 = x]` solves Kolmogorov's backward equation, with the transposed matrix."""

    def solve(cells: int) -> Array:
        grid = _grid(cells)
        matrix = generator(grid, _OU, 1.0)
        phi = averages(grid, lambda x: np.cos(x[:, 0]))
        u = np.asarray(expm_multiply(matrix.T * END, phi))
        return CubicSpline(grid.centers[0], u)(_INNER)

    found = differences(solve, _cosine(_INNER, END), CELLS, 2)
    says = "u(x, t) = E[φ(X_t) | X_0 = x] solves ∂u/∂t = −x·∇u + Δu"
    measured, drawn = "largest error of u for φ = cos, t = 1", found.panels(_INNER, ["u(x, 1)"], "x", "u", True)
    return Finding("2.13–2.15", says, measured, found.error, found.tolerance, {}, drawn)


def _change(means: Array, stds: Array, shares: Array, time: float) -> float:
    """`d/dt E φ(X_t)` for `φ = cos x + x³` and a mixture of Gaussians, whose mean and variance m, v are known."""
    m, v = math.exp(-time) * means, 1 + math.exp(-2 * time) * (stds**2 - 1)
    slope, growth = -m, 2 - 2 * v
    cosine = -np.exp(-v / 2) * (growth / 2 * np.cos(m) + slope * np.sin(m))
    return float((shares * (cosine + 3 * m**2 * slope + 3 * (m * growth + v * slope))).sum())


def adjoint() -> Finding:
    """(2.16): `L*p = ∇·(xp) + Δp` is the adjoint of `Lφ = −x·∇φ + Δφ`, and both give how expectations change.

    `∫ ρ(·, t) Lφ = ∫ φ L*ρ(·, t) = d/dt E φ(X_t)`, with derivatives by automatic differentiation; integrals by the
    trapezoidal rule, whose error is far below rounding for such densities, and the right side in closed form.
    """
    means, stds, shares = np.array([-1.5, 1.0]), np.array([0.4, 0.6]), np.array([0.4, 0.6])
    x, times = torch.linspace(-14, 14, 2801, dtype=torch.float64)[:, None].requires_grad_(), np.linspace(0, END, 11)

    def integral(values: torch.Tensor) -> float:
        return float(values.detach().sum()) * 0.01

    def slope(values: torch.Tensor) -> torch.Tensor:
        return _gradient(values, x)[:, 0]

    phi = torch.cos(x[:, 0]) + x[:, 0] ** 3
    pushed = slope(slope(phi)) - x[:, 0] * slope(phi)
    rows = []
    for t in times:
        m, v = math.exp(-t) * means, 1 + math.exp(-2 * t) * (stds**2 - 1)
        parts = zip(shares, m, v, strict=True)
        p = torch.stack(
            [w / math.sqrt(2 * math.pi * b) * torch.exp(-((x[:, 0] - a) ** 2) / 2 / b) for w, a, b in parts]
        )
        p = p.sum(0)
        moved = slope(x[:, 0] * p) + slope(slope(p))
        rows.append([integral(p * pushed), integral(phi * moved), _change(means, stds, shares, t)])
    left, right, change = np.transpose(rows)
    size = np.abs(change).max()
    off = np.maximum(np.abs(left - change), np.abs(right - change)) / size
    says = "densities move with the adjoint of the generator: expectations change alike from both sides"
    both = [
        Curve("d/dt E φ(X_t)", times, change, "wide", 0),
        Curve("∫ ρ Lφ", times, left, "joined", 1),
        Curve("∫ φ L*ρ", times, right, "points", 0),
    ]
    drawn = (
        Panel("change of E φ(X_t), φ = cos x + x³", "t", "per time", both),
        Panel("difference", "t", "relative", [Curve("", times, off, "joined", 0)], "y", {"tolerance": 1e-12}),
    )
    return Finding("2.16", says, "largest relative difference of three expressions", float(off.max()), 1e-12, {}, drawn)


def terminal() -> Finding:
    """(2.17), (2.18): `v(x, t) = E[φ(X_T*) | X_t = x]` solves `∂v/∂t = −Lv` from its end, back to t."""
    t = 0.4

    def solve(cells: int) -> Array:
        grid = _grid(cells)
        matrix, steps = generator(grid, _OU, 1.0).T, cells // 4
        half = (END - t) / steps / 2
        eye = sparse.identity(cells, format="csc")
        solver = splu(sparse.csc_matrix(eye - half * matrix))
        v = averages(grid, lambda x: np.cos(x[:, 0]))
        for _ in range(steps):
            v = solver.solve(v + half * (matrix @ v))
        return CubicSpline(grid.centers[0], v)(_INNER)

    found = differences(solve, _cosine(_INNER, END - t), CELLS, 2)
    says = "v(x, t) = E[φ(X_T*) | X_t = x] solves ∂v/∂t = −Lv with v = φ at T*"
    measured, drawn = "largest error of v for φ = cos, t = 0.4", found.panels(_INNER, ["v(x, 0.4)"], "x", "v", True)
    return Finding("2.17, 2.18", says, measured, found.error, found.tolerance, {}, drawn)


def growing_waves() -> Finding:
    """(2.3): run backwards, the Hermite wave of number n grows at rate n."""
    numbers, wall = (1, 2, 3, 4), 8.0

    def solve(cells: int) -> Array:
        return np.array([mode_rate(-wall, wall, n, _OU, "ou", cells) for n in numbers])

    found = differences(solve, np.array(numbers, dtype=np.float64), 160, 2)
    # Waves of these cells have the same rates; what is left is the walls', which cut off so much of the fourth.
    beyond = 2 * integrate.quad(lambda x: hermite_e.hermeval(x, [0, 0, 0, 0, 1]) ** 2 * stats.norm.pdf(x), wall, 20)[0]
    tolerance = found.tolerance + SAFETY * beyond / math.factorial(4) / (2 * wall / 160) ** 2
    n, rates = np.array(numbers), found.found[0]
    says = "reversed without more, the equation makes each wave grow: He_n(x)·N(x) at rate n"
    drawn = (
        Panel("growth rate of a wave", "number n of the wave", "rate", overlaid(n, n, rates, ["grown"], "n", "points")),
        Panel(
            "relative difference",
            "number n of the wave",
            "|rate − n|/n",
            [Curve("", n, np.abs(rates / n - 1), "joined", 0)],
            "y",
            {"tolerance": tolerance},
        ),
    )
    values = dict(zip((f"rate {k}" for k in numbers), rates.tolist(), strict=True))
    return Finding("2.3", says, "largest error of four rates", found.error, tolerance, values, drawn)


def blown_up() -> Finding:
    """(2.3): the shortest wave of a grid grows at `4/h²`: rounding takes over, the sooner the finer the cells."""
    own, found = law("two-bumps"), {}
    errors, tolerances, curves, shown = [], [], [], []
    for k, cells in enumerate((100, 200)):
        grid = own.grid(cells)
        out = blow_up(grid, _OU, own.cells(grid, END), lambda x, s: own.density(x, END - s), END)
        errors.append(abs(out.rate / out.theory - 1))
        # All waves start from rounding: at s, those that are slower by less than 1/s count too, which are slower by
        # 1/(2s) in the mean (Laplace's method: rates fall with the square of a wave's number).
        middle = ((out.lost or 0.0) + out.times[-1]) / 2
        tolerances.append(SAFETY / (2 * out.theory * middle))
        found |= {f"rate, {cells} cells": out.rate, f"4/h², {cells} cells": out.theory}
        found |= {f"lost at s, {cells} cells": out.lost if out.lost is not None else math.nan}
        over = out.growth > 1e-2
        guide = out.growth[-1] * np.exp(out.theory * (out.times - out.times[-1]))
        name = "slope 4/h²" if k == 0 else ""
        curves += [Curve(name, out.times[over], guide[over], "wide", k)]
        curves += [Curve(f"{cells} cells", out.times, np.maximum(out.growth, 1e-17), "joined", k)]
        at = int(np.argmax(out.growth > 1))
        if cells == 100:
            truth = own.cells(grid, END - float(out.times[at]))
            shown = overlaid(
                grid.centers[0], truth, out.densities[at], [f"s = {out.times[at]:.3f}"], "what it should be"
            )
    says = "anti-diffusion is ill-posed: the shortest wave grows at 4/h² and destroys the density"
    drawn = (
        Panel("the density when it is lost, 100 cells", "x", "density", shown),
        Panel("its difference from the closed form", "s", "size", curves, "y", {"size of the density": 1.0}),
    )
    return Finding("2.3", says, "relative error of the growth rate", max(errors), min(tolerances), found, drawn)


def _points() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 2, dtype=torch.float64, generator=generator).requires_grad_()


def _density(x: torch.Tensor) -> torch.Tensor:
    """A smooth, positive function of points (n, 2), with no symmetry."""
    one, two = ((x - 0.8) ** 2).sum(1) / 0.9, (x[:, 0] + 0.7) ** 2 + x[:, 1] ** 2 / 3
    return torch.exp(-one) + torch.exp(-two) / 2 + torch.exp(-(x**2).sum(1) / 4) / 10


def _gradient(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(values.sum(), x, create_graph=True)[0]


def _divergence(field: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _gradient(field[:, 0], x)[:, 0] + _gradient(field[:, 1], x)[:, 1]


def _adjoint(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`L*p = ∇·(x p) + Δp`."""
    return _divergence(x * values[:, None], x) + _divergence(_gradient(values, x), x)


def _identity(number: str, says: str, left: torch.Tensor, right: torch.Tensor) -> Finding:
    """Two expressions at random points of the plane."""
    error = ((left - right).abs().max() / right.abs().max()).item()
    drawn = sides(left.detach().numpy(), right.detach().numpy(), 1e-12)
    return Finding(number, says, "relative difference at 64 points of the plane", error, 1e-12, {}, drawn)


def transport() -> Finding:
    """(2.4)–(2.6): diffusion is transport along the score, `Δφ = ∇·(φ ∇log φ)`."""
    x = _points()
    p = _density(x)
    moved = _divergence(p[:, None] * _gradient(p.log(), x), x)
    says = "diffusion is transport along the score: Δφ = ∇·(φ ∇log φ)"
    return _identity("2.4–2.6", says, moved, _divergence(_gradient(p, x), x))


def product_rule() -> Finding:
    """(2.32): `L*[pφ] = L*[p]φ + (xp + 2∇p)·∇φ + pΔφ`."""
    x = _points()
    p, wave = _density(x), torch.cos(x[:, 0]) * x[:, 1] + x[:, 0] ** 2
    slope = _gradient(wave, x)
    middle = ((x * p[:, None] + 2 * _gradient(p, x)) * slope).sum(1)
    right = _adjoint(p, x) * wave + middle + p * _divergence(slope, x)
    says = "the product rule of the adjoint, by which the reverse generator is found"
    return _identity("2.32–2.34", says, _adjoint(p * wave, x), right)
