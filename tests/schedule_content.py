"""A schedule file with two grids, and what they are for."""

from __future__ import annotations

import math

import pytest
import torch

from fanal.exact import Gaussian
from fanal.metrics.estimates import Estimate
from fanal.schedule_files import Entry, Schedules, write_schedules
from fanal.schedule_search import Error
from fanal.schedules import polynomial
from fanal.seeding import noise

ROWS = ((1.0,), (1.5, -0.5), (1.9, -1.3, 0.4))
ERROR = Error(Estimate(0.1, 0.01, 64), Estimate(0.2, math.nan, 64))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def denoiser():
    """A Gaussian with two scales, in float64."""
    return Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), torch.diag(torch.tensor([1.0, 0.04])).double())


def content(weights=None):
    grids = {k: polynomial(k, 0.01, 50.0, zero=False) for k in (3, 4)}
    tables = {3: weights, 4: None if weights is None else (*weights, weights[-1])}
    entries = {k: Entry(grid, "euler", k, tables[k], ERROR, "gits-dev") for k, grid in grids.items()}
    return Schedules("hands32", entries, {"method": "fit", "seed": 0})


@pytest.fixture
def path(tmp_path):
    write_schedules(tmp_path / "a.json", content())
    return tmp_path / "a.json"


def noisy(sigma=50.0):
    return noise((2,), range(16), sigma, dtype=torch.float64)
