"""Detectors: what they compute, what they look at, and that they find what is known to be wrong."""

from __future__ import annotations

import pytest
import torch

import fanal
from fanal import metrics
from fanal.datasets import DATASETS as SETS
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.hallucination import DETECTORS, LastSlope, Variance, watch
from fanal.hallucination.detectors import build, last_window
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import SOLVERS, Churn, Euler, Heun
from fanal.trajectory import Trajectory
from toys import blurred

COUNT = 24


def start(dtype=torch.float64):
    return noise((2,), range(COUNT), 80.0, dtype=dtype)


def by_hand(run, window):
    """Two passes over a recorded trajectory: mean over the window, then squares, then the mean over entries."""
    inside = [i for i, sigma in enumerate(run.sigmas[:-1].tolist()) if window[0] <= sigma <= window[1]]
    chosen = run.denoised[inside]
    return ((chosen - chosen.mean(0)) ** 2).mean(0).flatten(1).mean(1)


@pytest.mark.parametrize("window", [(0.0, 0.9), (0.5, 20.0), (0.0, 80.0), (0.002, 0.0021)])
@pytest.mark.parametrize("solver", [Euler(), Heun(), Churn()])
def test_variance_is_the_two_pass_formula(window, solver):
    grid, seeds = polynomial(20), range(COUNT)
    run = Trajectory.record(fanal.trace(blurred(), start(), grid, solver, seeds))
    if sum(window[0] <= sigma <= window[1] for sigma in grid[:-1].tolist()) < 2:
        with pytest.raises(FanalError, match="needs two steps with sigma in .* saw 1: widen the window"):
            watch(blurred(), start(), grid, solver, Variance(window), seeds)
        return
    outcome = watch(blurred(), start(), grid, solver, Variance(window), seeds)
    assert outcome.risk.dtype == torch.float64
    assert torch.allclose(outcome.risk, by_hand(run, window), rtol=1e-12, atol=0)
    assert torch.equal(outcome.x, run.x[-1])


def test_variance_averages_over_all_entries_of_an_image():
    cov = torch.rand(48, generator=torch.Generator().manual_seed(0)).double()
    truth, grid = Gaussian(torch.zeros(3, 4, 4), cov), polynomial(15)
    x = noise((3, 4, 4), range(5), 80.0, dtype=torch.float64)
    run = Trajectory.record(fanal.trace(truth, x, grid, Euler()))
    risk = watch(truth, x, grid, Euler(), Variance((0.0, 2.0)), range(5)).risk
    assert torch.allclose(risk, by_hand(run, (0.0, 2.0)), rtol=1e-12, atol=0)


def test_variance_in_single_precision_loses_nothing_but_rounding():
    # Welford's update: the naive E[D²] − E[D]² would be wrong here from the third digit on.
    far = Gaussian(torch.tensor([1000.0, -1000.0]), 0.01)
    grid, x = polynomial(40), noise((2,), range(COUNT), 80.0) + 1000 * torch.tensor([1.0, -1.0])
    exact = watch(far, x.double(), grid, Euler(), Variance((0.0, 0.8)), range(COUNT)).risk
    single = watch(far, x, grid, Euler(), Variance((0.0, 0.8)), range(COUNT)).risk
    assert torch.allclose(single, exact, rtol=0.05)


def test_a_window_is_closed_and_nothing_outside_it_counts():
    grid = polynomial(20)
    window = (float(grid[15]), float(grid[9]))
    run = Trajectory.record(fanal.trace(blurred(), start(), grid, Euler()))
    assert torch.allclose(
        watch(blurred(), start(), grid, Euler(), Variance(window), range(COUNT)).risk,
        run.denoised[9:16].var(0, correction=0).mean(1),
        rtol=1e-12,
    )

    def tampered(x, sigma):
        inside = window[0] <= float(sigma) <= window[1]
        return blurred()(x, sigma) + (0 if inside else 1e-9 * float(sigma < window[0]))

    outcome = watch(tampered, start(), grid, Euler(), Variance(window), range(COUNT))
    assert torch.equal(outcome.risk, watch(blurred(), start(), grid, Euler(), Variance(window), range(COUNT)).risk)


def test_the_last_slope_of_a_gaussian_is_known():
    # (x − D)/sigma = sigma·(Σ + sigma²)⁻¹(x − m) at the smallest sigma of the grid.
    mean, variance = torch.tensor([0.5, -1.0], dtype=torch.float64), 0.3
    truth, grid = Gaussian(mean, variance), polynomial(12)
    run = Trajectory.record(fanal.trace(truth, start(), grid, Heun()))
    low = float(grid[-2])
    wanted = low * (run.x[-2] - mean).norm(dim=1) / (variance + low**2) / 2**0.5
    outcome = watch(truth, start(), grid, Heun(), LastSlope(), range(COUNT))
    assert torch.allclose(outcome.risk, wanted, rtol=1e-9)


@pytest.mark.parametrize("name", DETECTORS)
def test_the_risk_after_each_step_ends_at_the_risk(name):
    grid = polynomial(20)
    detector = build(name, last_window(grid))
    outcome = watch(blurred(), start(), grid, Euler(), detector, range(COUNT))
    assert outcome.per_step.shape == (20, COUNT)
    assert torch.equal(outcome.per_step[-1], outcome.risk)
    if name == "variance":
        first = next(i for i, sigma in enumerate(grid.tolist()) if sigma <= detector.window[1])
        assert (outcome.per_step[: first + 1] == 0).all()
        assert (outcome.per_step[first + 1 :] > 0).all()
        run = Trajectory.record(fanal.trace(blurred(), start(), grid, Euler()))
        for end in range(first + 2, 21):
            wanted = run.denoised[first:end].var(0, correction=0).mean(1)
            assert torch.allclose(outcome.per_step[end - 1], wanted, rtol=1e-12)


@pytest.mark.parametrize("name", DETECTORS)
def test_free_detectors_cost_no_call_and_keep_no_trajectory(name):
    grid, model = polynomial(17), Counted(blurred())
    detector = build(name, last_window(grid))
    outcome = watch(model, start(), grid, Heun(), detector, range(COUNT))
    assert detector.free
    assert model.calls == 2 * 16 + 1
    assert outcome.trajectory is None
    eye, sizes = detector.start(), []
    for transition in fanal.trace(blurred(), start(), polynomial(40), Euler()):
        eye.see(transition)
        held = [v for v in vars(eye).values() if isinstance(v, torch.Tensor)]
        sizes.append(sum(v.numel() for v in held))
        assert all(step.shape == (COUNT,) for step in eye.steps)
    assert max(sizes) <= 2 * COUNT * 2


@pytest.mark.parametrize("name", DETECTORS)
def test_watching_changes_no_sample_and_two_watches_do_not_disturb_each_other(name):
    grid, seeds = polynomial(10), range(COUNT)
    detector = build(name, last_window(grid))
    for kind in SOLVERS:
        solver = SOLVERS[kind]()
        plain = fanal.sample(blurred(), start(), grid, solver, seeds)
        assert torch.equal(watch(blurred(), start(), grid, solver, detector, seeds).x, plain)
    one, two = detector.start(), detector.start()
    pairs = zip(
        fanal.trace(blurred(), start(), grid, Euler()),
        fanal.trace(blurred(), -start(), grid, Euler()),
        strict=True,
    )
    for a, b in pairs:
        one.see(a)
        two.see(b)
    assert torch.equal(one.risk(), watch(blurred(), start(), grid, Euler(), detector, seeds).risk)
    assert torch.equal(two.risk(), watch(blurred(), -start(), grid, Euler(), detector, seeds).risk)


def test_the_last_slope_finds_what_left_the_grid():
    seeds, grid = range(600), polynomial(40)

    def network(x, sigma):  # an over-smoothed one, with small errors of its own at every sigma
        return blurred()(x, sigma) + 0.04 * float(sigma) * torch.sin(40 * x)

    outcome = watch(network, noise((2,), seeds, 80.0), grid, Euler(), LastSlope(), seeds)
    wrong = SETS["grid2"].verify(outcome.x) != 0
    assert 60 < int(wrong.sum()) < 400
    found = metrics.auc(outcome.risk, wrong)
    assert 0.9 < found.value < 1
    assert found.value - 5 * found.se > 0.5


@pytest.mark.parametrize("maker", [polynomial, logsnr])
@pytest.mark.parametrize("steps", [2, 3, 10, 40])
def test_the_last_window_holds_the_last_share_of_the_intervals(maker, steps):
    grid = maker(steps)
    low, high = last_window(grid, 0.4)
    inside = [sigma for sigma in grid[:-1].tolist() if low <= sigma <= high]
    assert len(inside) == max(2, round(0.4 * steps))
    assert inside == grid[:-1].tolist()[-len(inside) :]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(FanalError, match="share must be in"):
        last_window(polynomial(10), share)


def test_an_unknown_detector_is_refused():
    with pytest.raises(FanalError, match="unknown detector 'varience': did you mean 'variance'"):
        build("varience", (0.0, 1.0))
