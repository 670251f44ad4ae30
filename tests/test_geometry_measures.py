"""What is measured of every trajectory, against laws whose trajectories are known."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal import geometry
from fanal.errors import FanalError
from fanal.exact import Dataset, Gaussian
from fanal.trajectory import Trajectory


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(D, x, sigmas, solver=None, **more):
    return Trajectory.record(fanal.trace(D, x, sigmas, solver or fanal.solvers.Euler(), **more))


GRID = fanal.schedules.polynomial(24)


@pytest.fixture(scope="module")
def unit():
    """Data N(0, I): in variance-preserving space nothing moves."""
    D = Gaussian(torch.zeros(9), 1.0)
    return D, 80 * normal(4, 9, seed=1)


@pytest.fixture(scope="module")
def data():
    return Dataset(normal(30, 5, seed=2))


def test_each_measure_is_that_of_its_own_function():
    D = Gaussian(normal(7, seed=3), torch.linspace(0.1, 3, 7, dtype=torch.float64))
    found = run(D, 80 * normal(3, 7, seed=4), GRID)
    got = geometry.measure(found)
    assert torch.allclose(got.curves["deviation"], geometry.deviation(found.x))
    chord = geometry.distance(found.x)[0]
    assert torch.allclose(got.numbers["length / chord"], geometry.length(found.x)[-1] / chord)
    assert torch.allclose(got.numbers["largest deviation / chord"], geometry.deviation(found.x).amax(0) / chord)
    assert torch.allclose(got.numbers["direct, top 2"], geometry.direct(found.x, 2).sum(1))
    bent = geometry.deviation(found.denoised).amax(0) / (found.denoised[-1] - found.denoised[0]).norm(dim=1)
    assert torch.allclose(got.numbers["denoised largest deviation / chord"], bent)
    assert torch.allclose(got.coordinates, geometry.project(found.x, 5).coordinates)


def test_variance_preserving_space_is_where_standard_data_stand_still(unit):
    """x = sqrt(1 + sigma²)·z exactly; so z has one magnitude at all levels, and no speed."""
    D, x = unit
    sigmas = fanal.schedules.polynomial(24)
    path = geometry.exact_path(D, x, sigmas)
    denoised = torch.stack([D(state, sigma) for state, sigma in zip(path[:-1], sigmas[:-1], strict=True)])
    found = geometry.measure(Trajectory(sigmas, path, denoised)).curves
    assert float(found["z slope"].max()) < 1e-12
    assert float(found["slope"].min()) > 1e-3  # while the states themselves move
    size = found["z magnitude"]
    assert torch.allclose(size, size[0].expand_as(size), rtol=1e-12)
    assert float(found["z distance"].max()) < 1e-12 * float(size.max())


def test_the_speed_in_variance_preserving_space_is_a_derivative():
    """`‖dz/dθ‖` by differences of the exact trajectory, tan θ = sigma."""
    D = Gaussian(normal(6, seed=5), torch.linspace(0.2, 5, 6, dtype=torch.float64))
    theta = torch.linspace(1.5, 0.05, 30, dtype=torch.float64)
    sigmas, x = theta.tan(), float(theta[0].tan()) * normal(2, 6, seed=6)
    path = geometry.exact_path(D, x, sigmas)
    denoised = torch.stack([D(state, sigma) for state, sigma in zip(path[:-1], sigmas[:-1], strict=True)])
    found = geometry.measure(Trajectory(sigmas, path, denoised)).curves
    step = 1e-5
    for i in (3, 15, 27):
        ends = [geometry.exact_path(D, x, torch.stack([sigmas[0], (theta[i] + h).tan()]))[1] for h in (step, -step)]
        z = [end / (1 + (theta[i] + h).tan() ** 2).sqrt() for end, h in zip(ends, (step, -step), strict=True)]
        speed = (z[0] - z[1]).norm(dim=1) / (2 * step) / math.sqrt(6)
        assert torch.allclose(found["z slope"][i], speed, rtol=1e-5)
    z = path / (1 + sigmas**2).sqrt()[:, None, None]
    for name in ("magnitude", "deviation", "distance"):
        assert torch.allclose(found[f"z {name}"], getattr(geometry, name)(z)), name


def test_steps_that_go_away_are_counted():
    """A path out and back: one of six steps goes away from the end; predictions are near it from the third."""
    x = torch.tensor([[0.0, 1], [1, 1], [-1, 1], [2, 1], [3, 1], [4, 1], [5, 1]], dtype=torch.float64)[:, None]
    goal = torch.tensor([[0.0, 0], [9, 1], [4.9, 1], [5.0, 1], [5.1, 1], [5, 1]], dtype=torch.float64)[:, None]
    sigmas = torch.tensor([6.0, 5, 4, 3, 2, 1, 0], dtype=torch.float64)
    found = geometry.measure(Trajectory(sigmas, x, goal)).numbers
    assert float(found["steps nearer to the end"]) == pytest.approx(5 / 6)
    assert float(found["predictions near the end from sigma"]) == 4
    assert float(found["predictions nearer to the end"]) == pytest.approx(4 / 5)
    assert bool(found["states near the end from sigma"].isnan())


def test_predictions_that_rest_at_the_end_do_not_go_away_from_it(data):
    """The exact denoiser's, which are one point from some level on, to rounding."""
    found = geometry.measure(run(data, 80 * normal(8, 5, seed=9).float(), fanal.schedules.polynomial(60)))
    late = found.curves["denoised distance"][45:]
    assert float(late.max()) < 1e-5
    rising = (found.curves["denoised distance"].diff(dim=0)[:40] > 1e-3).double().mean(0)
    assert torch.allclose(found.numbers["predictions nearer to the end"], 1 - rising * 40 / 59, atol=1 / 59)


def test_shares_sum_to_one_and_rebuild_the_run(data):
    found = run(data, 80 * normal(3, 5, seed=7), GRID)
    table = geometry.shares(GRID)
    assert torch.allclose(table.sum(1), torch.ones(len(GRID), dtype=torch.float64), atol=1e-14)
    assert bool((table >= 0).all())
    parts = torch.cat([found.x[:1], found.denoised])
    assert torch.allclose(torch.einsum("nm,mbd->nbd", table, parts), found.x, atol=1e-11)
    closed = GRID[-2] * (1 / GRID[1:-1] - 1 / GRID[:-2])
    assert torch.allclose(table[-2, 1:-1], closed, atol=1e-14)
    with pytest.raises(FanalError, match="decreasing"):
        geometry.shares(GRID[:-1].flip(0))


def test_the_exact_denoiser_beside_itself_deviates_nowhere(data):
    x = 80 * normal(6, 5, seed=8)
    found = run(data, x, GRID)
    told = geometry.diagnose(data, data, found, fanal.solvers.Euler())
    for name in ("score deviation", "score deviation on exact path", "apart"):
        assert float(told.curves[name].max()) < 1e-12, name
    assert torch.equal(told.exact.x, found.x)
    assert torch.allclose(told.curves["model x"], geometry.distance(found.x)[:-1] / math.sqrt(5))
    assert bool(told.numbers["both ends have one nearest point"].all())
    assert float(told.numbers["exact end to nearest point / sqrt d"].max()) < 1e-6  # it replays a point


def test_a_model_that_is_off_by_a_known_vector_is_found_off_by_it(data):
    """D + c·b: the score deviates by c everywhere, on either path; the exact path does not know of it."""
    off = torch.tensor([3.0, 0, 0, 0, 4], dtype=torch.float64)
    model = lambda x, sigma: data(x, sigma) + off  # noqa: E731
    x = 80 * normal(6, 5, seed=8)
    told = geometry.diagnose(model, data, run(model, x, GRID), fanal.solvers.Euler())
    want = torch.full((24, 6), 5 / math.sqrt(5), dtype=torch.float64)
    assert torch.allclose(told.curves["score deviation"], want)
    assert torch.allclose(told.curves["score deviation on exact path"], want)
    assert torch.equal(told.exact.x, run(data, x, GRID).x)
    end = told.exact.x[-1]
    assert torch.allclose(told.curves["D(exact x)"], (told.exact.denoised + off - end).norm(dim=2) / math.sqrt(5))
    assert torch.allclose(told.curves["exact x"][0], (x - end).norm(dim=1) / math.sqrt(5))
    distance = torch.cdist(run(model, x, GRID).x[-1], data.points.source)
    near = distance.argsort(1)[:, :5]
    assert torch.equal(told.index[:, 0].sort(1).values, near.sort(1).values)
    assert torch.allclose(told.numbers["end to nearest point / sqrt d"], distance.amin(1) / math.sqrt(5))


def test_a_level_that_was_not_learned_stands_out():
    sigmas = fanal.schedules.polynomial(40)[:-1]
    smooth = 0.3 * torch.exp(-((sigmas.log() - 1) ** 2) / 4) + 1e-3
    assert geometry.outliers(sigmas, smooth) == []
    spoiled = smooth.clone()
    spoiled[6] *= 4
    (found,) = geometry.outliers(sigmas, spoiled)
    assert found.sigma == pytest.approx(float(sigmas[6]))
    assert found.deviation == pytest.approx(float(spoiled[6]))
    assert found.usual == pytest.approx(float(smooth[6]), rel=0.05)
    assert found.z > 6
    assert geometry.outliers(sigmas, spoiled, floor=1.0) == []
    step = torch.where(sigmas > 1, 1e-3, 0.5)  # a rise alone is none
    assert geometry.outliers(sigmas, step) == []
    assert geometry.outliers(sigmas[:2], spoiled[:2]) == []
    with pytest.raises(FanalError, match="positive"):
        geometry.outliers(-sigmas, smooth)
    with pytest.raises(FanalError, match="one value"):
        geometry.outliers(sigmas, smooth[1:])


def test_noise_alone_stands_out_nowhere():
    """100 rough curves: entries vary by 20 % independently."""
    sigmas = fanal.schedules.polynomial(40)[:-1]
    rough = [0.3 * (0.2 * normal(40, seed=s)).exp() for s in range(100)]
    assert sum(len(geometry.outliers(sigmas, values)) for values in rough) <= 2
