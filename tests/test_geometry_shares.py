"""Shares of predictions in the states of a run: exact for every solver that has them, refused for the others."""

from __future__ import annotations

import pytest
import torch

import fanal as package
from fanal import geometry
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.report.geometry import geometry_page
from fanal.sampling import Step
from fanal.solvers import SOLVERS, Euler, Heun
from fanal.trajectory import Trajectory
from toys import record

GRID = package.schedules.polynomial(12)
CONVEX = {"euler", "dpmpp2s", "ddpm", "ancestral", "dpmpp_sde"}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def law():
    return Gaussian(normal(9, seed=1), torch.linspace(0.1, 3, 9, dtype=torch.float64) ** 2)


class Calls:
    """A model that keeps its answers."""

    def __init__(self, model):
        self.model, self.answers = model, []

    def __call__(self, x, sigma):
        self.answers.append(self.model(x, sigma))
        return self.answers[-1]


def drawn(folder):
    page = geometry_page(folder, record(folder))
    return {figure.name: figure.drawings for figure in page.figures}, {table.name: table for table in page.tables}


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "taylor2"])
def test_shares_rebuild_the_states_of_every_solver(name, law):
    """Of a mixture's run, from its own answers; what noise a solver adds is the same where nothing else is."""
    model, solver = package.load("mixture:ring8"), SOLVERS[name]()
    found, calls = geometry.shares_of(solver, GRID), Calls(model)
    x = 80 * normal(3, 2, seed=5)
    run = Trajectory.record(package.trace(calls, x, GRID, solver, range(3)))
    still = Trajectory.record(package.trace(lambda x, s: torch.zeros_like(x), 0 * x, GRID, solver, range(3)))
    parts = torch.stack([x, *calls.answers])
    assert len(found.sigmas) == len(calls.answers) == len(found.steps)
    assert torch.allclose(torch.einsum("nc,cbd->nbd", found.table, parts) + still.x, run.x, atol=1e-8)
    assert found.noise == (float(still.x.abs().max()) > 0)
    assert found.convex() == (name in CONVEX)
    sums = found.table.sum(1)
    assert found.affine() == (name != "afs")
    if name == "afs":  # its first answer is no prediction, but x shrunk
        assert float(sums.max()) < 1 + 1e-12
    else:
        assert torch.allclose(sums, torch.ones(13, dtype=torch.float64), atol=1e-12)
    if name == "euler":
        assert torch.allclose(found.table, geometry.shares(GRID), atol=1e-15)


def test_the_shares_of_a_heun_step_are_those_on_paper():
    sigma, after = 3.0, 1.0
    found = geometry.shares_of(Heun(), torch.tensor([sigma, after], dtype=torch.float64))
    half, ratio = (after - sigma) / 2, after / sigma
    want = [ratio, -half / sigma + half * (1 - ratio) / after, -half / after]
    assert found.table[1].tolist() == pytest.approx(want, abs=1e-14)
    assert found.sigmas.tolist() == [sigma, after]
    assert found.steps.tolist() == [0, 0]


class Cut:
    """Euler's step, with predictions cut off: no sum of them."""

    def step(self, denoiser, x, span, memory=()):
        denoised = denoiser(x, span.sigma).clamp(-0.5, 0.5)
        ratio = span.sigma_next / span.sigma
        return Step(ratio * x + (1 - ratio) * denoised, denoised)


def test_what_is_no_sum_of_predictions_is_refused():
    for solver in (SOLVERS["taylor2"](), Cut()):
        with pytest.raises(FanalError, match=f"{type(solver).__name__} are no weighted sums"):
            geometry.shares_of(solver, GRID)
    with pytest.raises(FanalError, match="decreasing"):
        geometry.shares_of(Euler(), GRID[:-1].flip(0))


def test_the_page_tells_which_combination_the_states_are(tmp_path):
    """AFS shrinks x at first: no share is negative, and they do not sum to 1."""
    told = {"euler": "No share is negative", "heun": "Some shares are negative", "afs": "do not sum to 1"}
    for solver in told:
        folder = measure(GeometryConfig("mixture:ring8", solver, steps=6, count=2, drawn=2), tmp_path / solver)
        page = geometry_page(folder, record(folder))
        (caption,) = [figure.caption for figure in page.figures if figure.name == "weights"]
        assert [word for word in told.values() if word in caption] == [told[solver]]
        assert ("are convex combinations" in caption) == (solver == "euler")


def test_the_page_tells_shares_or_that_there_are_none(tmp_path):
    for solver in ("heun", "taylor2"):
        folder = measure(GeometryConfig("mixture:ring8", solver, steps=6, count=2, drawn=2), tmp_path / solver)
        figures, tables = drawn(folder)
        assert ("weights" in figures) == ("weights-sum" in tables) == (solver == "heun")
        if solver == "heun":
            found = record(folder)["results"]["weights"]
            assert found["sum"] == pytest.approx(1)
            assert found["start"] + sum(found["prediction"]) == pytest.approx(1)
            assert found["between"] == [False, True] * 5
            assert (found["convex"], found["noise"]) == (False, False)
            assert found["negative"] == pytest.approx(-sum(min(0, share) for share in found["prediction"]))
            own, inner, upto = figures["weights"][0].lines
            assert list(own.y) == pytest.approx(found["prediction"][::2], rel=1e-5)
            assert list(inner.y) == pytest.approx(found["prediction"][1::2], rel=1e-5)
            pairs = zip(found["prediction"][::2], found["prediction"][1::2], strict=True)
            assert upto.y[0] == pytest.approx(sum(next(pairs)), rel=1e-4)
            assert upto.y[-1] == pytest.approx(1 - found["start"], rel=1e-5)
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert ("no weighted sums of predictions" in text) == (solver == "taylor2")


def test_what_has_no_shares_is_called_as_it_was_given(tmp_path):
    folder = measure(GeometryConfig("gaussian:grid2", "rods", steps=6, count=2, drawn=2), tmp_path / "run")
    assert record(folder)["results"]["weights"]["refused"].startswith("the states of rods are no weighted sums")
