"""The unstable reverse: its waves grow at the rates of the theory, on a line, on a plane and by distance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fanal import pde
from fanal.errors import FanalError
from fanal.pde.instability import blow_up, mode, mode_rate, unstable


def test_waves_between_walls_and_blow_up_of_brownian_motion():
    grid = pde.Grid.even(0, 2, 100)
    for n in (1, 3):
        rate = mode_rate(0, 2, n, pde.brownian, "brownian")
        assert rate == pytest.approx(mode(grid, n, "brownian")[1], rel=4 * (n * math.pi / 60) ** 2 / 12)
    found = blow_up(grid, pde.brownian, np.ones(100) / 2, lambda x, s: np.full(len(x), 0.5), 1.0)
    assert found.rate == pytest.approx(4 / 0.02**2, rel=0.03)


@pytest.mark.parametrize("numbers", [(1, 0), (0, 2), (1, 1), (3, 2)])
def test_waves_of_a_plane_add_their_rates(numbers):
    """Hermite functions on the plane grow at n + m; cosines at the sum of theirs, less `(kh)²/12` of each."""
    assert mode_rate([-8, -8], [8, 8], numbers, pde.ornstein_uhlenbeck, "ou") == pytest.approx(sum(numbers), abs=1e-7)
    rates = [(n * math.pi / 6) ** 2 for n in numbers]
    seen = [rate * (1 - (n * math.pi / 60) ** 2 / 12) for n, rate in zip(numbers, rates, strict=True)]
    found = mode_rate([-3, -3], [3, 3], numbers, pde.brownian, "brownian")
    assert found == pytest.approx(sum(seen), rel=1e-4)
    assert mode(pde.Grid.even([-3, -3], [3, 3], 2 * [60]), numbers, "brownian")[1] == pytest.approx(sum(rates))


@pytest.mark.parametrize(("dimension", "within"), [(2, 5e-3), (3, 2.5e-2), (5, 5e-3), (784, 1e-8)])
def test_waves_of_a_distance_are_those_of_laguerre(dimension, within):
    """Rate 2n; near 0 the drift (d − 1)/r costs accuracy, most of it on the third dimension."""
    drift, middle = pde.radial(pde.ornstein_uhlenbeck, dimension), math.sqrt(dimension)
    for n in (1, 2, 3):
        found = mode_rate(max(0, middle - 7), middle + 7, n, drift, "ou", dimension=dimension)
        assert found == pytest.approx(2 * n, rel=within)


def test_waves_of_a_plane_are_eigenvectors():
    """The matrix itself maps a product of Hermite functions to its rate times it, order 2 in the cells."""
    errors = []
    for cells in (80, 160):
        grid = pde.Grid.even([-8, -8], [8, 8], [cells, cells])
        wave, rate = mode(grid, (2, 1), "ou")
        errors.append(np.abs(unstable(grid, pde.ornstein_uhlenbeck) @ wave.ravel() - rate * wave.ravel()).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("name", "dimension", "cells"), [("ring", 2, 60), ("two-bumps", 2, 60), ("shell", 3, 200)])
def test_the_fastest_wave_of_a_grid(name, dimension, cells):
    """`4/hx² + 4/hy²`, less 1 per axis for the drift, 2 for a distance: the matrix's, and nearly what is seen."""
    own = pde.law(name, dimension)
    grid = own.grid(cells)
    drift = pde.radial(pde.ornstein_uhlenbeck, dimension) if own.radial else pde.ornstein_uhlenbeck
    begin = own.density(grid.points, 1.0).reshape(grid.shape)
    found = blow_up(grid, drift, begin, lambda x, s: own.density(x, 1 - s), 0.99)
    assert found.theory == pytest.approx(sum(4 / widths[0] ** 2 for widths in grid.widths))
    assert found.fastest == pytest.approx(found.theory - 2, abs=0.02 + 1e-6 * found.theory)
    assert found.rate == pytest.approx(found.theory, rel=0.06)
    assert found.lost is not None
    assert found.densities.min() < 0
    assert [grid.mass(p) for p in found.densities[:20]] == pytest.approx([1] * 20, abs=1e-5)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: mode(pde.Grid.even([0, 0], [1, 1], [5, 5]), 1, "ou"), "one number per axis"),
        (lambda: mode(pde.Grid.even(0, 1, 5), 1, "brownian", 3), "Ornstein"),
    ],
)
def test_what_is_no_wave_is_told(ask, said):
    with pytest.raises(FanalError, match=said):
        ask()
