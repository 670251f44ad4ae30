"""Likelihood along runs, mean shift, and null models, against what is known of them."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal import geometry
from fanal.errors import FanalError
from fanal.exact import Dataset, Mixture
from fanal.trajectory import Trajectory


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def data():
    return Dataset(normal(20, 2, seed=1))


def run(D, count, steps=40, solver=None):
    x = fanal.noise(D.shape, range(count), 80.0).double()
    return Trajectory.record(fanal.trace(D, x, fanal.schedules.polynomial(steps), solver or fanal.solvers.Euler()))


def test_likelihood_never_falls_along_an_exact_run(data):
    """[REG] prop. 3 at h = sigma: 12,000 steps without one that goes down."""
    found = geometry.ascent(data, run(data, 300))
    assert bool(found.state.all())
    assert bool(found.prediction.all())
    assert bool(found.assumed.all())
    assert float(found.ratio.max()) == 0


def test_at_a_fixed_bandwidth_it_does_fall(data):
    """Against the printed "any positive bandwidth": 6 to 14 % of steps go down, of 12,000."""
    path = run(data, 300)
    falls = []
    for h in (0.05, 0.2, 1.0, 2.0, 5.0, 20.0):
        level = torch.stack([data.log_density(x, h) for x in path.x])
        falls.append(float((level.diff(dim=0) < -1e-9).double().mean()))
    assert [min(falls), max(falls)] == pytest.approx([0.061, 0.141], abs=0.005)


def test_the_assumption_is_told_where_it_fails(data):
    """A denoiser that is far off the exact one."""
    wild = lambda x, sigma: data(x, sigma) + 1.5 * (x - data(x, sigma))  # noqa: E731
    found = geometry.ascent(data, run(wild_model(wild), 20, steps=10))
    assert not bool(found.assumed[:-1].any())
    assert torch.allclose(found.ratio[:-1], torch.full_like(found.ratio[:-1], 1.5))  # by construction
    assert not bool(found.state[:-1].all())


def wild_model(function):
    class Wild:
        shape, sigma_min, sigma_max = (2,), 0.002, 80.0

        def __call__(self, x, sigma):
            return function(x, sigma)

    return Wild()


def test_mean_shift_ends_at_modes(data):
    x = normal(30, 2, seed=4)
    h = 0.3
    end = geometry.mean_shift(data, x, h)
    step = 1e-5
    for axis in torch.eye(2, dtype=torch.float64):
        slope = (data.log_density(end + step * axis, h) - data.log_density(end - step * axis, h)) / (2 * step)
        assert float(slope.abs().max()) < 1e-4
    assert bool((data.log_density(end, h) >= data.log_density(x, h) - 1e-12).all())
    with pytest.raises(FanalError, match="still moves"):
        geometry.mean_shift(data, x, h, most=2)
    with pytest.raises(FanalError, match="positive"):
        geometry.mean_shift(data, x, 0.0)


def test_annealed_mean_shift_finds_the_heaviest_mode():
    """What one bandwidth misses: from anywhere, a falling one leads to the component with most weight."""
    M = Mixture(torch.tensor([[-3.0, 0.0], [3.0, 0.0]], dtype=torch.float64), [0.2, 0.8], std=0.3)
    x = torch.tensor([[-3.0, 0.2], [-2.0, 1.0], [3.0, 0.0]], dtype=torch.float64)
    sigmas = torch.logspace(math.log10(20), -1.5, 60, dtype=torch.float64)
    end = fanal.sample(M, x, sigmas, geometry.AnnealedMeanShift())
    assert float((end - torch.tensor([3.0, 0.0])).abs().max()) < 0.05
    near = geometry.mean_shift(M, x, 0.5, tolerance=1e-6)
    assert float(near[0, 0]) < -2.5


def test_a_random_walk_has_the_components_of_a_random_walk():
    """In many dimensions the shares of a forward path with equal steps are the known ones, to 4 standard errors."""
    steps = 50
    sigmas = torch.arange(1, steps + 2, dtype=torch.float64).sqrt()  # equal steps in sigma²
    path = geometry.forward_paths(torch.zeros(2, 20_000), sigmas, range(2))
    want = geometry.brownian_shares(steps, 3)
    assert torch.allclose(geometry.direct(path, 3), want.expand(2, -1), rtol=0.04)
    assert float(geometry.brownian_shares(100_000, 1)) == pytest.approx(6 / math.pi**2, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_shares_of_a_random_walk_are_exact(steps):
    """The eigenvalues of its covariance, min(i, j), about the mean over the path."""
    i = torch.arange(steps + 1, dtype=torch.float64)
    center = torch.eye(steps + 1, dtype=torch.float64) - 1 / (steps + 1)
    values = torch.linalg.eigvalsh(center @ torch.minimum(i[:, None], i) @ center).flip(0)[:steps]
    assert torch.allclose(geometry.brownian_shares(steps, steps), values / values.sum(), atol=1e-12)


def test_forward_paths_have_the_forward_law():
    sigmas = fanal.schedules.polynomial(6, zero=False)
    path = geometry.forward_paths(torch.full((40, 500), 3.0), sigmas, range(40))
    assert path.shape == (7, 40, 500)
    off = (path - 3).flatten(1)
    for state, sigma in zip(off, sigmas, strict=True):  # 20,000 entries: 4 standard errors of a variance are 4 %
        assert float(state.square().mean()) == pytest.approx(float(sigma) ** 2, rel=0.04)
    increments = path[:-1] - path[1:]
    across = (increments[0] * increments[1]).mean() / (increments[0].std() * increments[1].std())
    assert abs(float(across)) < 4 / math.sqrt(20_000)
    size = geometry.magnitude(path) ** 2
    assert torch.allclose(size.mean(1), 500 * (9 + sigmas**2), rtol=0.05)  # [GEO] prop. 2


def test_random_smooth_curves_are_less_alike_than_trajectories():
    D = fanal.load("gaussian:digits8")
    x = fanal.noise(D.shape, range(20), 80.0)
    path = Trajectory.record(fanal.trace(D, x, fanal.schedules.polynomial(30), fanal.solvers.Euler())).x
    own = geometry.project(path, 2).coordinates
    null = geometry.smooth_curves(20, 31, seed=3)
    size = lambda c: torch.linalg.matrix_norm(c - c.mean(1, keepdim=True)).mean()  # noqa: E731
    (_, _, left), (_, _, chance) = geometry.align(own, fixed=0), geometry.align(null, fixed=0)
    assert float(left.mean() / size(own)) < 0.5 * float(chance.mean() / size(null))


def test_smooth_curves_have_their_kernel():
    curves = geometry.smooth_curves(4000, 11, smoothness=0.3, seed=1)[:, :, 0]
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    kernel = torch.exp(-((t[:, None] - t) ** 2) / (2 * 0.3**2))
    assert float((torch.cov(curves.T) - kernel).abs().max()) < 0.1
    with pytest.raises(FanalError, match="smoothness"):
        geometry.smooth_curves(2, 5, 0.0)
    with pytest.raises(FanalError, match=r"\[1, 5\]"):
        geometry.brownian_shares(5, 6)
    with pytest.raises(FanalError, match="finite"):
        geometry.forward_paths(torch.zeros(1, 2), torch.tensor([math.inf, 1.0]), range(1))
