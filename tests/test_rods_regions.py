"""What a perturbation is searched for, and where: any objective, in spheres, balls, boxes and masks of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import fanal
from fanal.config import build_solver
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.hallucination import rods
from fanal.hallucination.perturbation import Search, differentiate, slope_of
from fanal.hallucination.regions import REGIONS, Region
from fanal.sampling import Span, sample
from problems import mixture, start

F64 = torch.float64
GRID = fanal.schedules.polynomial(6, sigma_min=0.05, sigma_max=10.0)
SIGMA, RADIUS = torch.tensor(0.6, dtype=F64), 0.5
UPPER = torch.tensor([False, True])


def points(count=6):
    D = mixture()
    return D, D.draw(count, seed=3) + fanal.noise(D.shape, range(count), 0.6, dtype=F64)


def steepness(D, x, sigma, delta):
    """The objective of CAS."""
    y = x + delta
    return (y - D(y, sigma)).flatten(1).norm(dim=1)


def surprise(D, x, sigma, delta):
    """The objective of SAS, −log p."""
    return -D.log_density(x + delta, sigma)


def hill(D, x, sigma, delta):
    """Its maximum is inside balls and boxes."""
    return -(delta - 0.2 * torch.tensor([1.0, -0.5], dtype=x.dtype)).square().sum(1)


def candidates(region):
    """A dense set of the perturbations that a region allows."""
    if region.mask is not None:
        line = torch.linspace(-RADIUS, RADIUS, 2001, dtype=F64)
        ends = line[[0, -1]] if region.kind == "sphere" else line
        return torch.stack([torch.zeros_like(ends), ends], 1)
    if region.kind == "box":
        line = torch.linspace(-RADIUS, RADIUS, 201, dtype=F64)
        return torch.cartesian_prod(line, line)
    angle = torch.linspace(0, 2 * math.pi, 1801, dtype=F64)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    sizes = [1.0] if region.kind == "sphere" else np.linspace(0, 1, 41)
    return torch.cat([RADIUS * size * circle for size in sizes])


@pytest.mark.parametrize("objective", [steepness, surprise, hill])
@pytest.mark.parametrize("mask", [None, UPPER])
@pytest.mark.parametrize("kind", REGIONS)
def test_many_steps_find_the_maximum_of_a_dense_search(kind, mask, objective):
    D, x = points()
    region = Region(kind, mask)
    search = Search(RADIUS, "absolute", 200, "backward", region)
    delta, spent = search.best(objective, D, x, SIGMA)
    assert spent == 200
    torch.testing.assert_close(region.project(delta, search.size(x, SIGMA)), delta)  # it is in the set
    found, dense, gains = objective(D, x, SIGMA, delta), candidates(region), []
    for b, point in enumerate(x):
        values = objective(D, point.expand(len(dense), 2), SIGMA, dense)
        assert float(found[b] - values.max()) < 2e-3 * float(values.max() - values.min())  # the grid is that fine
        gains.append(float((values.max() - found[b]) / (values.max() - values.min())))
    # a gradient climbs to the top of its own hill: nearly always the highest
    assert sorted(gains)[len(gains) // 2] < 2e-3
    assert sum(gain < 0.02 for gain in gains) >= len(gains) - 1


@pytest.mark.parametrize("kind", REGIONS)
@pytest.mark.parametrize("objective", [steepness, surprise])
def test_for_a_small_radius_one_step_is_the_maximum(kind, objective):
    D, x = points()
    tiny = 1e-4
    delta, _ = Search(tiny, "absolute", 1, "backward", kind).best(objective, D, x, SIGMA)
    dense = candidates(Region(kind)) * (tiny / RADIUS)
    for b, point in enumerate(x):
        values = objective(D, point.expand(len(dense), 2), SIGMA, dense)
        rise = float(values.max() - objective(D, x, SIGMA, 0 * x)[b])
        assert float(objective(D, x, SIGMA, delta)[b] - values.max()) > -1e-3 * rise


def test_the_named_methods_are_their_objectives():
    D, x = points()
    for steps, kind in ((1, "sphere"), (4, "sphere"), (3, "ball"), (3, "box")):
        search = Search(0.4, "sigma", steps, "backward", kind)
        here = differentiate(D, x, SIGMA)
        cas, _ = search.cas(D, x, SIGMA, here)
        torch.testing.assert_close(search.best(steepness, D, x, SIGMA)[0], cas)
        sas = search.sas(D, x, SIGMA, x - D(x, SIGMA))
        torch.testing.assert_close(search.best(surprise, D, x, SIGMA)[0], sas)


@pytest.mark.parametrize(
    ("kind", "units", "r"),
    [
        ("sphere", "absolute", 0.3),
        ("sphere", "sigma", 0.3 * 0.6),
        ("ball", "shell", 0.3 * 0.6 * math.sqrt(12)),
        ("box", "absolute", 0.3),
        ("box", "sigma", 0.3 * 0.6),
        ("box", "shell", 0.3 * 0.6),
    ],
)
def test_radii_count_in_the_sets_own_norm_and_shell_in_the_norm_of_the_noise(kind, units, r):
    x, region = torch.zeros(2, 3, 2, 2, dtype=F64), Region(kind)
    size = region.radius(0.3, units, SIGMA, x)
    assert float(size) == pytest.approx(r)
    way = torch.ones_like(x)
    delta = region.ascend(size, way)
    if units == "shell":  # every set reaches as far, and no farther
        assert delta.flatten(1).norm(dim=1).tolist() == pytest.approx([0.3 * 0.6 * math.sqrt(12)] * 2)
    masked = Region(kind, torch.tensor([True, False]))
    assert float(masked.radius(0.3, "shell", SIGMA, x)) == pytest.approx(0.18 * (1 if kind == "box" else math.sqrt(6)))


def test_projections_are_the_nearest_points():
    generator = torch.Generator().manual_seed(0)
    far = 2 * torch.randn(40, 2, dtype=F64, generator=generator)
    size = torch.tensor(RADIUS, dtype=F64)
    for kind in REGIONS:
        region = Region(kind)
        dense = candidates(region)
        nearest = dense[torch.cdist(far, dense).argmin(1)]
        got = region.project(far, size)
        assert float((far - got).norm(dim=1).sub((far - nearest).norm(dim=1)).max()) < 1e-9  # none is nearer
        assert float((got - nearest).norm(dim=1).max()) < 0.02
        torch.testing.assert_close(region.project(got, size), got)


def test_a_masked_guard_moves_nothing_outside_its_mask_before_the_network_answers():
    net = fanal.load("hands32")
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 8:20, 4:12] = True
    asked = []

    def watched(x, sigma):
        asked.append(x.detach().clone())
        return net(x, sigma)

    x = fanal.noise(net.shape, range(2), 5.0)
    guard = rods.Guard(rho=0.2, region=Region("sphere", mask))
    with torch.no_grad():
        guard.step(watched, x, Span(0, 2, torch.tensor(5.0, dtype=F64), torch.tensor(2.0, dtype=F64)))
    moved = asked[-1] - x
    assert bool((moved[:, :, ~mask[0]] == 0).all())
    norm = 0.2 * 5.0 * math.sqrt(int(mask.sum()))
    assert moved.flatten(1).norm(dim=1).tolist() == pytest.approx([norm, norm], rel=1e-4)


def test_a_guard_takes_any_objective_and_counts_its_products():
    D = Counted(mixture())
    x = start(mixture(), 4, 3.0)
    span = Span(0, 2, torch.tensor(3.0, dtype=F64), torch.tensor(1.0, dtype=F64))
    with torch.no_grad():
        own = rods.Guard(method=steepness, steps=3).step(D, x, span)
        calls = D.calls
        named = rods.Guard(method="cas", steps=3).step(D, x, span)
    torch.testing.assert_close(own.x_next, named.x_next)
    assert own.info["rods_products"].tolist() == [3] * 4
    assert own.info["rods_calls"].tolist() == [calls] * 4 == [5] * 4  # x, three gradients, x + δ
    # with a threshold, the index is still measured along the direction of CAS
    with torch.no_grad():
        seen = rods.Guard(method=hill, threshold=0.0).step(D, x, span)
    torch.testing.assert_close(seen.info["rods_index"], rods.index(mixture(), x, 3.0)[0])


def test_the_index_knows_regions():
    D, x = points()
    for kind in REGIONS:
        H, delta = rods.index(D, x, 0.6, v="residual", rho=RADIUS, rho_units="absolute", region=kind)
        turned = differentiate(D, x + delta, SIGMA).gradient - differentiate(D, x, SIGMA).gradient
        torch.testing.assert_close(H, turned.norm(dim=1))
    assert (delta.abs() == RADIUS).all()  # the corners of the box


def test_regions_and_objectives_by_name_and_their_mistakes():
    assert build_solver("rods:region=box,rho=0.2") == rods.Guard(region="box", rho=0.2)
    D, x = points()
    guard = rods.Guard(region=Region("ball", UPPER), rho_units="absolute")
    assert dataclasses.replace(guard) == guard
    assert sample(D, x, GRID, guard).isfinite().all()
    for bad, words in (
        ({"region": "cube"}, "region of rods"),
        ({"region": 3}, "region of rods"),
        ({"method": 3}, "method of rods"),
    ):
        with pytest.raises(FanalError, match=words):
            rods.Guard(**bad)
    for mask in (torch.ones(2), torch.zeros(2, dtype=torch.bool), "left"):
        with pytest.raises(FanalError, match="a mask is a boolean tensor"):
            Region(mask=mask)
    with pytest.raises(FanalError, match=r"mask has shape \(3,\) for samples of shape \(2,\)"):
        sample(D, x, GRID, rods.Guard(region=Region(mask=torch.ones(3, dtype=torch.bool))))
    with pytest.raises(FanalError, match="one number per sample"):
        slope_of(lambda D, x, sigma, delta: delta, D, x, SIGMA, x)
    with pytest.raises(FanalError, match="no gradient"):
        slope_of(lambda D, x, sigma, delta: x.sum(1), D, x, SIGMA, x)
