"""Fokker–Planck equations `∂p/∂t = −∇·(b p) + a Δp` by finite volumes that keep mass and sign.

Fluxes through the box's walls are zero. On each inner face the flux is that of Scharfetter and Gummel (1969; Chang &
Cooper 1970): exact for a constant drift, upwind where drift wins, central where diffusion does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from fanal.errors import FanalError
from fanal.pde.grid import Array, Grid

__all__ = ["SCHEMES", "Drift", "evolve", "generator"]

Drift = Callable[[Array, float], Array]
"""The drift b at points (n, axes) and a time, of the points' shape."""

SCHEMES: tuple[str, ...] = ("implicit", "trapezoid")
"""In time: implicit Euler, order 1, positive for any step; the trapezoidal rule, order 2, whose sign is checked."""

_NEGATIVE = 1e-10  # of the largest density: what rounding may leave
_LOST = 1e-12  # of the mass, in a step that moves a density by one cell: what rounding may lose


def _bernoulli(z: Array) -> Array:
    """`z/(e^z − 1)`, 1 at 0."""
    small = np.abs(z) < 1e-8
    safe = np.where(small, 1.0, np.minimum(z, 700))  # e^z overflows above 709; below, the value is -z itself
    return np.where(small, 1 - z / 2, safe / np.expm1(safe))


def generator(grid: Grid, drift: Drift, diffusion: float, time: float = 0.0) -> sparse.csc_matrix:
    """Return the matrix A with `dp/dt = A p` for cell densities p, flat.

    Its columns, weighted with the cells' volumes, sum to 0: mass is kept to rounding. For `diffusion >= 0` its entries
    off the diagonal are not negative, so that implicit steps keep signs. A negative diffusion, of equations that run
    backwards, has central differences, and neither promise but the first.

    Args:
        grid: the cells.
        drift: b.
        diffusion: a.
        time: when the drift is asked.

    Raises:
        FanalError: the drift is not finite, or of another shape.
    """
    number = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    volumes = grid.volumes.ravel()
    rows, columns, values = [], [], []
    for axis, (centers, widths) in enumerate(zip(grid.centers, grid.widths, strict=True)):
        faces = grid.faces(axis)
        b = np.asarray(drift(faces, time), dtype=np.float64)
        if b.shape != faces.shape or not np.isfinite(b).all():
            raise FanalError(f"the drift must be finite and of shape {faces.shape} at time {time:.4g}, got {b.shape}")
        count = grid.shape[axis]
        left = np.take(number, range(count - 1), axis).ravel()
        right = np.take(number, range(1, count), axis).ravel()
        shape = tuple(n - (k == axis) for k, n in enumerate(grid.shape))
        along = [1] * len(shape)
        along[axis] = -1
        gap = np.broadcast_to(np.diff(centers).reshape(along), shape).ravel()
        area = volumes[left] / np.broadcast_to(widths[:-1].reshape(along), shape).ravel()
        out, back = _weights(b[:, axis], gap, diffusion)
        for cell, sign in ((left, -1.0), (right, 1.0)):
            rows += [cell, cell]
            columns += [left, right]
            values += [sign * area * out / volumes[cell], -sign * area * back / volumes[cell]]
    size = len(volumes)
    entries = np.concatenate(values)
    return sparse.csc_matrix((entries, (np.concatenate(rows), np.concatenate(columns))), shape=(size, size))


def _weights(b: Array, gap: Array, diffusion: float) -> tuple[Array, Array]:
    """The flux through a face is `out·p_left − back·p_right`."""
    if diffusion > 0:
        peclet = b * gap / diffusion
        return diffusion / gap * _bernoulli(-peclet), diffusion / gap * _bernoulli(peclet)
    if diffusion == 0:
        return np.maximum(b, 0), np.maximum(-b, 0)
    return b / 2 + diffusion / gap, diffusion / gap - b / 2


def evolve(
    grid: Grid,
    density: Array,
    drift: Drift,
    times: Sequence[float] | Array,
    *,
    diffusion: float = 1.0,
    scheme: str = "implicit",
    steady: bool = False,
) -> Array:
    """Return the densities at all times, (T, *shape), from that at the first.

    Args:
        grid: the cells.
        density: at `times[0]`, (*shape), not negative but for rounding.
        drift: b(points, time).
        times: increasing; each interval is one step.
        diffusion: a, at least 0.
        scheme: one of `SCHEMES`.
        steady: whether the drift does not depend on time; its matrix is then built once, and factored once per step
            size.

    Raises:
        FanalError: an argument is none of these, the trapezoidal rule made a density negative (take smaller steps), or
            a step lost more of its mass than rounding can: what that loses is given back, so that mass stays.
    """
    moments = np.asarray(times, dtype=np.float64)
    if scheme not in SCHEMES:
        raise FanalError(f"scheme is one of {', '.join(SCHEMES)}, got {scheme!r}")
    if moments.ndim != 1 or len(moments) < 2 or not (np.diff(moments) > 0).all():
        raise FanalError("times must be two or more increasing numbers")
    low = -_NEGATIVE * float(density.max(initial=0))
    if density.shape != grid.shape or not np.isfinite(density).all() or density.min() < low or not density.any():
        raise FanalError(
            f"a density on this grid is finite, not negative, not 0 everywhere, and has shape {grid.shape}, "
            f"got {density.shape}"
        )
    if diffusion < 0:
        raise FanalError("anti-diffusion cannot be solved for: its smallest waves grow fastest; see generator")
    share = 1.0 if scheme == "implicit" else 0.5
    state, out = density.astype(np.float64).ravel(), [density.astype(np.float64)]
    eye = sparse.identity(len(state), format="csc")
    here = generator(grid, drift, diffusion, float(moments[0]))
    solver, last = None, 0.0
    for start, stop in zip(moments[:-1], moments[1:], strict=True):
        there, step = here if steady else generator(grid, drift, diffusion, float(stop)), float(stop - start)
        goal = state + (1 - share) * step * (here @ state)
        if solver is None or not steady or not np.isclose(step, last, rtol=1e-12, atol=0.0):
            solver, last = splu(sparse.csc_matrix(eye - share * step * there)), step
        state = solver.solve(goal)
        kept = grid.mass(state) / grid.mass(goal)
        if abs(kept - 1) > _LOST * max(1.0, step * float(np.abs(there.diagonal()).max())):
            raise FanalError(f"a step to time {stop:.4g} kept {kept:.9g} of the mass: its matrix cannot be solved with")
        state /= kept  # what rounding in a long step's solution has lost
        if state.min() < -_NEGATIVE * state.max():
            raise FanalError(
                f"the trapezoidal rule made a density negative at time {stop:.4g}: take smaller steps, or implicit"
            )
        here = there
        out.append(state.reshape(grid.shape))
    return np.stack(out)
