"""The critical-step map of RODS: known paths of the index, and one of a mixture."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal.errors import FanalError
from fanal.hallucination import rods
from fanal.hallucination.critical import critical_steps, index_path, read_as
from fanal.schedules import polynomial
from fanal.solvers import Churn
from problems import mixture, start

F64 = torch.float64
GRID = polynomial(10)


def test_a_known_path_has_known_critical_steps():
    # sample b peaks at step b + 2 with height b + 1; the last two are never measured or flat
    index = torch.zeros(10, 6, dtype=F64)
    for b in range(5):
        index[b + 2, b] = b + 1.0
    index[:, 5] = math.nan
    found = critical_steps(index, GRID, threshold=3.0, batch=2)
    assert [share.value * 6 for share in found.share] == pytest.approx([0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    assert found.ever.value == pytest.approx(3 / 6)
    assert found.largest.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert found.batches.nonzero().tolist() == [[4, 1], [5, 1], [6, 2]]
    assert found.middle() == (3, 4, 5)
    assert found.between(0.2, 0.5).value == pytest.approx(3 / 5)
    assert torch.equal(found.sigmas, GRID[:10])
    assert critical_steps(index[:, :5], GRID, flag=0.2).threshold == pytest.approx(4.2)  # between the highest two
    assert critical_steps(index[:, :5], GRID, flag=0.2).ever.value == pytest.approx(1 / 5)


def test_the_path_is_the_index_at_each_state_of_a_plain_run():
    D, x = mixture(), start(mixture(), 3, 80.0)
    found = index_path(D, x, GRID, rho=0.2, rho_units="sigma")
    run = fanal.Trajectory.record(fanal.trace(D, x, GRID, fanal.solvers.Euler()))
    for v in ("residual", "direction", "score"):
        read = read_as(found, GRID, v)
        for i in range(10):
            H, _ = rods.index(D, run.x[i], float(GRID[i]), v=v, rho=0.2, rho_units="sigma")
            torch.testing.assert_close(read[i], H, rtol=1e-9, atol=1e-14)
    seeded = index_path(D, x, GRID, solver=Churn(), seeds=range(3))
    assert seeded.shape == (10, 3)
    assert not torch.allclose(seeded, index_path(D, x, GRID))


def test_the_score_reading_ends_late_where_the_residual_peaks_in_the_middle():
    # at small sigma the index of the score grows as 1/sigma² times that of the residual
    D = mixture()
    index = index_path(D, start(D, 60, 80.0), polynomial(40), rho=0.1, rho_units="sigma")
    residual, score = (critical_steps(read_as(index, polynomial(40), v), polynomial(40)) for v in ("residual", "score"))
    assert 12 <= residual.middle()[1] <= 30
    assert score.middle()[1] > residual.middle()[1]


def test_mistakes_are_told():
    index = torch.ones(10, 4)
    for bad, words in (({"flag": 0.0}, "flag 0.0"), ({"batch": 0}, "batch 0")):
        with pytest.raises(FanalError, match=words):
            critical_steps(index, GRID, **bad)
    with pytest.raises(FanalError, match="4 nodes for 10 steps"):
        critical_steps(index, GRID[:4])
    with pytest.raises(FanalError, match="v of rods"):
        read_as(index, GRID, "noise")
    with pytest.raises(FanalError, match="no step has an index"):
        critical_steps(index * math.nan, GRID, threshold=1.0).middle()
    with pytest.raises(FanalError, match="no step has an index, so no share"):
        critical_steps(index * math.nan, GRID)
