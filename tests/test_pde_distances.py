"""Wasserstein distances: densities that underflow, normal laws of the plane, and sets of points."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.linalg import sqrtm

from fanal import pde
from fanal.errors import FanalError


@pytest.mark.parametrize("narrow", [1, 20, 60])
def test_densities_that_underflow_have_a_distance(narrow):
    """Cells far out hold 1e-300, less and nothing: width over mass is infinite there, the distance is not."""
    grid = pde.Grid.even(-9, 9, 4000)
    p, q = (stats.norm.pdf((grid.centers[0] - m) * narrow) for m in (0.0, 0.5))
    if narrow > 1:
        with np.errstate(under="ignore"):
            masses = p * grid.widths[0]
        assert (masses == 0).any()
        assert ((masses > 0) & (masses < 1e-300)).any()
    assert pde.w2(grid, p, q) == pytest.approx(0.5, rel=1e-7)


def turned(angle, long=2.0, short=0.3):
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[c, -s], [s, c]])
    return turn @ np.diag([long, short]) @ turn.T


@pytest.mark.parametrize(
    ("mean", "cov", "within"),
    [
        ((0.7, 0.2), turned(0.4), 1e-4),
        ((0.01, 0.0), turned(0.4), 2e-3),  # a sixteenth of a cell
        ((0.0, 0.0), turned(1.2), 5e-3),
        ((-0.5, 0.1), 1.3 * turned(0.9), 1e-2),
    ],
)
def test_distances_of_normal_laws_of_the_plane(mean, cov, within):
    """Against `|m|² + tr(A + B − 2(A^½BA^½)^½)` (Dowson & Landau 1982); parts and cells leave up to 1 %."""
    grid, one = pde.Grid.even([-7, -7], [7, 7], [90, 80]), turned(0.4)
    p, q = (
        stats.multivariate_normal(m, c).pdf(grid.points).reshape(grid.shape) for m, c in (((0, 0), one), (mean, cov))
    )
    root = np.real(sqrtm(one))
    want = math.sqrt(np.sum(np.square(mean)) + np.trace(one + cov - 2 * np.real(sqrtm(root @ cov @ root))))
    assert pde.w2(grid, p, q) == pytest.approx(want, rel=within)
    assert pde.w2(grid, q, q) == 0


def test_what_rounding_leaves_below_0_counts_as_0():
    """The trapezoidal rule may leave -1e-10 of the largest density, on a plane and on a line."""
    for grid in (pde.Grid.even([-3, -3], [3, 3], [20, 20]), pde.Grid.even(-3, 3, 20)):
        p = np.exp(-(grid.points**2).sum(1) * 4).reshape(grid.shape)
        p /= grid.mass(p)
        q = p.copy()
        q.flat[0] = -1e-10
        assert pde.w2(grid, p, q) < 1e-6


def test_equal_parts_are_quantiles():
    """Each column and each half of a density holds as many parts as its mass says, but for one or two."""
    grid = pde.Grid.even([-2, -2], [2, 2], [40, 40])
    p = pde.law("box", 2).cells(grid) * (1 + 0.8 * np.sign(grid.points[:, 0]).reshape(grid.shape))
    p[:, :13] = 0
    p /= grid.mass(p)
    parts = pde.equal_parts(grid, p, 500)
    assert abs((parts[:, 0] > 0).mean() - (p * grid.volumes)[20:].sum()) < 2 / 500
    above = grid.centers[1] > 0.5
    assert abs((parts[:, 1] > 0.5).mean() - (p * grid.volumes)[:, above].sum()) < 0.02
    assert np.abs(parts).max() <= 1


def test_sets_of_points():
    """A moved and shuffled set is as far as it was moved; on a line the order statistics are the best permutation."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3))
    moved = rng.permutation(x + [0.3, -0.4, 0.0])
    assert pde.wasserstein(x, moved) == pytest.approx(0.5, rel=1e-12)
    a, b = rng.standard_normal((2, 300, 1)) * [[[1.0]], [[2.0]]]
    for order in (1, 2):
        want = np.mean(np.abs(np.sort(a, 0) - np.sort(b, 0)) ** order) ** (1 / order)
        assert pde.wasserstein(a, b, order) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: pde.wasserstein(np.ones((3, 2)), np.ones((4, 2))), "draw as many"),
        (lambda: pde.wasserstein(np.ones((5001, 1)), np.ones((5001, 1))), "up to 5,000"),
        (lambda: pde.wasserstein(np.ones((3, 2)), np.full((3, 2), np.nan)), "finite"),
        (lambda: pde.wasserstein(np.ones((3, 2)), np.ones((3, 2)), 0), "at least 1"),
        (lambda: pde.equal_parts(pde.Grid.even(0, 1, 5), np.ones(5)), "two axes"),
    ],
)
def test_what_has_no_distance_is_told(ask, said):
    with pytest.raises(FanalError, match=said):
        ask()
