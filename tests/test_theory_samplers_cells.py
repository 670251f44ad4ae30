"""[PDE] sec. 4.5 and 5: the kernel formulation, Voronoi cells, and where exact runs end."""

from __future__ import annotations

import math

import pytest
import torch

from checks import holds
from fanal import particles
from fanal.errors import FanalError
from fanal.exact import Dataset
from fanal.memorization import settling
from fanal.metrics import rate
from fanal.particles.theory import cells
from fanal.particles.theory.problem import float64, grid, normal, points
from fanal.sampling import trace
from fanal.solvers import DDPM
from fanal.trajectory import Trajectory


def test_prop_4_4_the_foot_is_a_softmax_with_variance_beta():
    holds(cells.kernel())


def test_eq_4_40_weights_are_uniform_at_first():
    holds(cells.uniform())


def test_eq_4_41_and_4_43_weights_are_one_hot_at_last():
    holds(cells.one_hot())


def test_particles_are_trapped_in_their_cells_as_theorem_1_says():
    assert holds(cells.trapped()).values["on a point"] > 0.99


def test_the_level_of_the_last_change_of_cell_is_told():
    sigmas = torch.cat([grid(60, 1e-4), float64([0.0])])
    run = Trajectory.record(
        trace(Dataset(points()), normal(200, 2) * sigmas[0], sigmas, particles.Driven(DDPM(), particles.bulk(0)))
    )
    assert bool((settling(Dataset(points()), run).cell > 0).all())


def test_the_bound_on_ending_off_the_points_holds():
    shares = holds(cells.bounded()).values
    assert shares["share at 0.001"] < 0.01 < shares["share at 0.1"]


def test_what_the_last_level_allows_is_the_forward_process_share():
    """Of many points by draws; of two points in closed form, within 4 standard errors."""
    holds(cells.last_level())
    # two points: off where the logits' difference, mean g²/(2·sigma²), deviation g/sigma, is below log(1/ON − 1)
    pair, sigma = float64([[0.0, 0.0], [1.0, 0.0]]), 0.4
    off = rate(particles.chance_off(pair, sigma, 20_000))
    low, high = ((sign * math.log(99) * sigma - 1 / (2 * sigma)) for sign in (-1, 1))
    wanted = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    assert abs(off.value - wanted) < 4 * off.se
    with pytest.raises(FanalError, match="positive"):
        particles.chance_off(pair, 0.0)


def test_who_ends_on_the_points_and_who_does_not():
    holds(cells.endings())
    holds(cells.left_noise())
