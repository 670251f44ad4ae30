"""How alike trajectories are: of curves that are alike, or not, by construction."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal import geometry
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.geometry import regularity

SIGMAS = fanal.schedules.polynomial(40)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def curves(count=6, seed=0, bend=3.0, center=1.0):
    """One curve, turned and mirrored across its chord: the same shape each time."""
    t = SIGMAS.clamp_min(1e-3).log()
    across = torch.stack([bend * torch.exp(-((t - center) ** 2)), torch.tanh(t - center)], 1)
    turns = torch.linalg.qr(normal(count, 2, 2, seed=seed)).Q
    return torch.cat([(80 - SIGMAS).expand(count, -1)[:, :, None] * 8, across @ turns], 2)


def shapes(curve, d=64, window=3):
    return geometry.shapes(curve, SIGMAS, d, window)


def test_turned_and_mirrored_curves_are_one_shape():
    found = geometry.apart(shapes(curves()))
    for name, value in found.items():
        assert value.value < 1e-6, name
        assert value.n == 6
    other = geometry.apart(shapes(curves()), shapes(curves(4, seed=5)))
    assert max(value.value for value in other.values()) < 1e-6


def test_the_residual_is_that_of_the_best_orthogonal_map():
    """Against `procrustes`, which finds the map."""
    rough = torch.cat([curves(3)[:, :, :1], normal(3, 41, 2, seed=1).cumsum(1)], 2)
    own = shapes(rough)
    want = [
        float(geometry.procrustes(own.across[i : i + 1], own.across[j], fixed=0)[1])
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    assert geometry.apart(own)["procrustes"].value == pytest.approx(sum(want) / len(want), rel=1e-9)


def test_other_shapes_are_apart_and_size_does_not_count():
    a, wide = shapes(curves()), shapes(curves(bend=30.0))
    far = geometry.apart(a, wide)
    assert far["procrustes"].value > 0.3
    assert far["curvature"].value > 0.3
    scaled = curves(seed=3) * torch.tensor([1.0, 2, 2])
    assert geometry.apart(a, shapes(scaled))["procrustes"].value < 1e-6


def test_errors_are_those_of_repeated_draws():
    """The standard error of the mean over pairs, against its spread over 60 independent groups."""
    t = SIGMAS.clamp_min(1e-3).log()
    basis = torch.stack([torch.exp(-((t - 1) ** 2)), torch.tanh(t - 1)], 1)

    def group(seed):
        across = basis * (1 + 0.4 * normal(12, 1, 2, seed=seed))
        return shapes(torch.cat([(80 - SIGMAS).expand(12, -1)[:, :, None] * 8, across], 2))

    found = [geometry.apart(group(seed))["procrustes"] for seed in range(60)]
    values = torch.tensor([each.value for each in found])
    claimed = sum(each.se for each in found) / 60
    assert claimed == pytest.approx(float(values.std()), rel=0.35)  # 60 draws know a spread to 9 %
    both = [geometry.apart(group(seed), group(1000 + seed))["procrustes"] for seed in range(60)]
    spread = float(torch.tensor([each.value for each in both]).std())
    assert sum(each.se for each in both) / 60 == pytest.approx(spread, rel=0.35)


def test_what_jitters_at_the_end_does_not_count():
    """Two shapes that differ only where less than half of their deviation is left to go."""
    base = curves(4, bend=3.0)
    kept = regularity.kept_levels(base, SIGMAS, 64)
    largest = (base[:, :, 1:] - base[:, :1, 1:]).norm(dim=2).amax(1).mean()
    assert 8 * float(SIGMAS[kept - 1]) >= float(largest) / 2 > 8 * float(SIGMAS[kept])
    spoiled = base.clone()
    spoiled[:, kept + 4 :, 1:] += 0.01 * normal(4, 41 - kept - 4, 2, seed=9)
    found = geometry.apart(shapes(base), shapes(spoiled))
    assert found["curvature"].value < 1e-6
    late = [float(geometry.frenet(curve, 3).curvature[:, kept + 4 :].max()) for curve in (base, spoiled)]
    assert late[1] > 3 * late[0]


def test_a_table_has_within_on_its_diagonal():
    groups = {"a": shapes(curves()), "b": shapes(curves(bend=30.0)), "one": shapes(curves(1))}
    found = regularity.table(groups)["procrustes"]
    assert found[0][0].value < 1e-6 < found[0][1].value == found[1][0].value
    assert math.isnan(found[2][2].value)
    assert found[0][2].value < 1e-6
    with pytest.raises(FanalError, match="same grid"):
        geometry.apart(groups["a"], geometry.shapes(curves()[:, ::2], SIGMAS[::2], 64, 3))
    with pytest.raises(FanalError, match="no shape"):
        shapes(torch.cat([curves()[:, :, :1], torch.zeros(6, 41, 2)], 2))


def test_trajectories_are_nearer_to_each_other_than_chance():
    D = fanal.load("gaussian:digits8")
    x = fanal.noise(D.shape, range(20), 80.0)
    path = fanal.Trajectory.record(fanal.trace(D, x, SIGMAS, fanal.solvers.Euler())).x
    curve = geometry.project(path, 2).coordinates
    own = geometry.apart(shapes(curve))["procrustes"]
    null = geometry.apart(shapes(geometry.smooth_null(curve, SIGMAS, 64)))["procrustes"]
    assert own.value + 4 * own.se < null.value - 4 * null.se


def test_the_null_is_pinned_and_as_large_as_what_it_stands_for():
    like = curves(30)
    null = geometry.smooth_null(like, SIGMAS, 64, seed=2)
    assert null.shape == like.shape
    assert torch.allclose(null[:, 0, 1:], null[:, -1, 1:], atol=1e-9)
    energy = null[:, :, 1:].square().sum((1, 2)) / like[:, :, 1:].square().sum((1, 2))
    assert float(energy.max()) < 1.001  # two components of three
    assert float(energy.min()) > 0.2


def test_off_their_chord_forward_paths_explain_what_a_bridge_does():
    """In 30,000 dimensions, to a few per cent; and directly, by the covariance of independent steps."""
    sigmas = fanal.schedules.polynomial(12)
    path = geometry.forward_paths(torch.zeros(3, 30_000), sigmas, range(3))
    want = geometry.bridge_shares(sigmas, 4)
    assert torch.allclose(geometry.project(path, 4).explained, want.expand(3, -1), rtol=0.05)
    steps = (sigmas**2).diff().abs().flip(0)
    walk = torch.cat([torch.zeros(1, 12, dtype=torch.float64), torch.tril(torch.ones(12, 12, dtype=torch.float64))])
    off = walk - (walk @ steps)[:, None] / steps.sum()
    inner = off @ torch.diag(steps) @ off.T
    center = torch.eye(13, dtype=torch.float64) - 1 / 13
    values = torch.linalg.eigvalsh(center @ inner @ center).flip(0)
    assert torch.allclose(want, values[:4] / values.sum(), atol=1e-10)
    with pytest.raises(FanalError, match="components"):
        geometry.bridge_shares(sigmas, 12)


def test_a_trajectory_has_as_many_dimensions_as_the_covariance_has_sizes():
    """Three eigenvalues, four times each: three curves of sigma, hence a chord and two components; of one, a line."""
    D = Gaussian(normal(12), torch.tensor([0.01, 1.0, 25.0]).repeat(4))
    path = geometry.exact_path(D, 80 * normal(3, 12, seed=1), SIGMAS)
    explained = geometry.project(path, 2).explained
    assert torch.allclose(explained.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-9)
    assert float(explained[:, 0].max()) < 0.9999
    straight = geometry.exact_path(Gaussian(normal(12), 1.0), 80 * normal(3, 12, seed=1), SIGMAS)
    assert float(geometry.deviation(straight).max()) < 1e-11
