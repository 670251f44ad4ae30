"""[PDE] sec. 2: the forward equations, their generators, and the equation that cannot be run backwards."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.polynomial import hermite_e
from scipy import integrate, sparse, stats
from scipy.sparse.linalg import expm_multiply, splu

from fanal.pde import equations
from fanal.pde.distances import kl
from fanal.pde.fokker_planck import evolve, generator
from fanal.pde.grid import Array, Grid
from fanal.pde.instability import blow_up, mode_rate
from fanal.pde.laws import averages, law
from fanal.pde.theory.findings import SAFETY, Finding, differences, point, refined, smooth
from fanal.pde.theory.generated import shifted_bumps

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
_INNER = np.array([-2.0, -1.0, 0.0, 0.5, 1.5])


def _grid(cells: int) -> Grid:
    return Grid.even(-REACH, REACH, cells)


def _cosine(x: Array, time: float) -> Array:
    """`E[cos X_t | X_0 = x]`."""
    return math.exp(-(1 - math.exp(-2 * time)) / 2) * np.cos(math.exp(-time) * x)


def forward_equation() -> Finding:
    """(2.1), (2.16): densities of a mixture under Ornstein–Uhlenbeck are those of its closed form."""
    own = law("two-bumps")

    def solve(cells: int) -> Array:
        grid = _grid(cells)
        times = np.linspace(0, END, cells // 4 + 1)
        return evolve(grid, own.cells(grid), _OU, times, scheme="trapezoid", steady=True)[-1]

    grid = _grid(CELLS // 2)
    error, tolerance = refined(solve, own.cells(grid, END), grid.widths[0][0], CELLS, 2)
    says = "the forward equation turns the data's density into that of e^(−t)·x0 + sqrt(1 − e^(−2t))·n"
    return Finding("2.1, 2.12", says, "total variation at t = 1", error, tolerance, {})


def transition() -> Finding:
    """(2.12): from a point the density is the normal one of mean `e^{−t}x0` and variance `1 − e^{−2t}`."""
    x0, time = 1.4, 0.5

    def solve(cells: int) -> Array:
        return smooth(_grid(cells), point(_grid(cells), x0), _OU, 0.0, time, cells // 4, steady=True)

    grid = _grid(CELLS // 2)
    std = math.sqrt(1 - math.exp(-2 * time))
    wanted = np.diff(stats.norm.cdf(grid.edges[0], x0 * math.exp(-time), std)) / grid.widths[0]
    error, tolerance = refined(solve, wanted, grid.widths[0][0], CELLS, 2)
    says = "from one point, X_t is normal with mean e^(−t)·x0 and variance 1 − e^(−2t)"
    return Finding("2.12", says, "total variation at t = 0.5", error, tolerance, {})


def equilibrium(offset: float = 0.5) -> Finding:
    """Sec. 2.1: the forward density approaches the normal one exponentially: KL at rate 2, or 4 for centered data.

    The relative correction falls as `e^{−t}`, so that the rates of two windows tell what is left of it.
    """
    own, grid = shifted_bumps(offset), _grid(CELLS)
    times = np.linspace(0, 4, 4 * CELLS + 1)
    found = evolve(grid, own.cells(grid), _OU, times, scheme="trapezoid", steady=True)
    # What the cells' own equilibrium is, which differs from the normal one by their order.
    still = evolve(grid, averages(grid, lambda x: stats.norm.pdf(x[:, 0])), _OU, [0, 1e3, 2e3], steady=True)[-1]
    sizes = [kl(grid, found[round(t * CELLS)], still) for t in (1.5, 2.0, 2.5, 3.0)]
    rates = [-math.log(b / a) / 0.5 for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    wanted = 2.0 if offset else 4.0
    left = abs(rates[-1] - rates[-2]) / math.expm1(0.5)
    says = "the forward density approaches the normal one exponentially"
    return Finding(
        "2.1", says, f"rate of KL against {wanted:g}", abs(rates[-1] - wanted), SAFETY * left, {"rate": rates[-1]}
    )


def backward_equation() -> Finding:
    """(2.13)–(2.15): `E[φ(X_t) | X_0 = x]` solves Kolmogorov's backward equation, with the transposed matrix."""

    def solve(cells: int) -> Array:
        grid = _grid(cells)
        matrix = generator(grid, _OU, 1.0)
        phi = averages(grid, lambda x: np.cos(x[:, 0]))
        u = np.asarray(expm_multiply(matrix.T * END, phi))
        return np.interp(_INNER, grid.centers[0], u)

    error, tolerance = differences(solve, _cosine(_INNER, END), CELLS, 2)
    says = "u(x, t) = E[φ(X_t) | X_0 = x] solves ∂u/∂t = −x·∇u + Δu"
    return Finding("2.13–2.15", says, "largest error of u for φ = cos, t = 1", error, tolerance, {})


def adjoint() -> Finding:
    """(2.16): the forward operator is the adjoint: `∫ φ ρ(·, t) = ∫ u(·, t) ρ0`, to rounding, on any grid."""
    own, grid = law("two-bumps"), _grid(CELLS)
    matrix, phi = generator(grid, _OU, 1.0), np.cos(grid.centers[0]) + grid.centers[0] ** 3
    rho = own.cells(grid)
    forward = float((phi * np.asarray(expm_multiply(matrix * END, rho)) * grid.volumes).sum())
    backward = float((np.asarray(expm_multiply(matrix.T * END, phi)) * rho * grid.volumes).sum())
    scale = float((np.abs(phi) * rho * grid.volumes).sum())
    says = "densities move with the adjoint of the generator: E φ(X_t) is the same from both sides"
    return Finding("2.16", says, "relative difference of the two sides", abs(forward - backward) / scale, 1e-12, {})


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
        return np.interp(_INNER, grid.centers[0], v)

    error, tolerance = differences(solve, _cosine(_INNER, END - t), CELLS, 2)
    says = "v(x, t) = E[φ(X_T*) | X_t = x] solves ∂v/∂t = −Lv with v = φ at T*"
    return Finding("2.17, 2.18", says, "largest error of v for φ = cos, t = 0.4", error, tolerance, {})


def growing_waves() -> Finding:
    """(2.3): run backwards, the Hermite wave of number n grows at rate n."""
    numbers, wall = (1, 2, 3, 4), 8.0

    def solve(cells: int) -> Array:
        return np.array([mode_rate(-wall, wall, n, _OU, "ou", cells) for n in numbers])

    error, tolerance = differences(solve, np.array(numbers, dtype=np.float64), 160, 2)
    # Waves of these cells have the same rates; what is left is the walls', which cut off so much of the fourth.
    beyond = 2 * integrate.quad(lambda x: hermite_e.hermeval(x, [0, 0, 0, 0, 1]) ** 2 * stats.norm.pdf(x), wall, 20)[0]
    tolerance += SAFETY * beyond / math.factorial(4) / (2 * wall / 160) ** 2
    found = dict(zip((f"rate {n}" for n in numbers), solve(160).tolist(), strict=True))
    says = "reversed without more, the equation makes each wave grow: He_n(x)·N(x) at rate n"
    return Finding("2.3", says, "largest error of four rates", error, tolerance, found)


def blown_up() -> Finding:
    """(2.3): the shortest wave of a grid grows at `4/h²`: rounding takes over, the sooner the finer the cells."""
    own, found = law("two-bumps"), {}
    errors, tolerances = [], []
    for cells in (100, 200):
        grid = own.grid(cells)
        out = blow_up(grid, _OU, own.cells(grid, END), lambda x, s: own.density(x, END - s), END)
        errors.append(abs(out.rate / out.theory - 1))
        # All waves start from rounding: at s, those that are slower by less than 1/s count too, which are slower by
        # 1/(2s) in the mean (Laplace's method: rates fall with the square of a wave's number).
        middle = ((out.lost or 0.0) + out.times[-1]) / 2
        tolerances.append(SAFETY / (2 * out.theory * middle))
        found |= {f"rate, {cells} cells": out.rate, f"4/h², {cells} cells": out.theory}
        found |= {f"lost at s, {cells} cells": out.lost if out.lost is not None else math.nan}
    says = "anti-diffusion is ill-posed: the shortest wave grows at 4/h² and destroys the density"
    return Finding("2.3", says, "relative error of the growth rate", max(errors), min(tolerances), found)


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
    return Finding(number, says, "relative difference at 64 points of the plane", error, 1e-12, {})


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
