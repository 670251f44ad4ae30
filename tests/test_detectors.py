"""Detectors: what they compute, what they look at, and that they find what is known to be wrong."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

import fanal
from fanal import metrics
from fanal.datasets import DATASETS as SETS
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.hallucination import DETECTORS, LastSlope, Variance, watch
from fanal.hallucination.detectors import (
    FREE,
    Detector,
    EarlyStop,
    Undecided,
    Watch,
    begin,
    build,
    describe,
    last_window,
)
from fanal.hallucination.observation import observe_block
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import SOLVERS, Churn, Euler, Heun
from fanal.trajectory import Trajectory
from toys import blurred, mixture

COUNT = 24


def start(dtype=torch.float64):
    return noise((2,), range(COUNT), 80.0, dtype=dtype)


def inside(run, window):
    """D and d at the steps of a recorded run with sigma in the window, entries flattened: (n, B, dim)."""
    rows = [i for i, sigma in enumerate(run.sigmas[:-1].tolist()) if window[0] <= sigma <= window[1]]
    denoised = run.denoised[rows].flatten(2)
    sigma = run.sigmas[rows].reshape(-1, 1, 1)
    return denoised, (run.x[rows].flatten(2) - denoised) / sigma


def by_hand(run, window):
    """Two passes over a recorded trajectory: mean over the window, then squares, then the mean over entries."""
    chosen, _ = inside(run, window)
    return ((chosen - chosen.mean(0)) ** 2).mean(0).mean(1)


def rms(v):
    return v.square().mean(-1).sqrt()


FORMULAS = {
    "variance": lambda D, d: D.var(0, correction=0).mean(1),
    "path_length": lambda D, d: rms(D[1:] - D[:-1]).sum(0),
    "second_difference": lambda D, d: rms(D[2:] - 2 * D[1:-1] + D[:-2]).amax(0),
    "slope_change": lambda D, d: rms(d[1:] - d[:-1]).amax(0),
    "early_stop": lambda D, d: rms(D[-1] - D[0]),
    "undecided": lambda D, d: (torch.where(D**2 < 1, 1 - D**2, 0.0).mean(2) / D.var(2, correction=0).sqrt()).mean(0),
}
LAST = {
    "last_slope": lambda D, d: rms(d[-1]),
    "gray": lambda D, d: torch.where(D[-1].abs() < 1, 1 - D[-1].abs(), 0.0).mean(1),
    "contrast": lambda D, d: (D[-1] ** 2).mean(1) - D[-1].mean(1) ** 2,
}


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


@pytest.mark.parametrize("window", [(0.0, 0.9), (0.5, 20.0)])
@pytest.mark.parametrize("solver", [Euler(), Heun()])
def test_each_free_detector_is_its_formula_on_the_recorded_trajectory(solver, window):
    assert set(FORMULAS) | set(LAST) == set(FREE)
    cov = torch.rand(12, generator=torch.Generator().manual_seed(0)).double()
    image, pictures = Gaussian(torch.linspace(-1, 1, 12).reshape(3, 2, 2), cov), noise((3, 2, 2), range(5), 80.0)
    for model, x in ((blurred(), start()), (image, pictures.double())):
        grid = polynomial(20)
        run = Trajectory.record(fanal.trace(model, x, grid, solver))
        detectors = {name: build(name, window) for name in FREE}
        seen = observe_block(model, x, grid, solver, detectors, range(len(x)))
        for name, risk in seen.risks.items():
            formula, where = (FORMULAS[name], window) if name in FORMULAS else (LAST[name], (0.0, 80.0))
            assert torch.allclose(risk, formula(*inside(run, where)), rtol=1e-8, atol=1e-14), name
            assert torch.equal(seen.per_step[name][-1], risk)


@pytest.mark.parametrize("name", DETECTORS)
def test_the_risk_after_each_step_is_the_risk_of_a_run_that_stops_there(name):
    grid = polynomial(20)
    detector = build(name, (0.1, 3.0))
    eye, risks = begin(detector, blurred()), []
    for transition in fanal.trace(blurred(), start(), grid, Euler(), range(COUNT)):
        eye.see(transition)
        with contextlib.suppress(FanalError):  # too few steps so far
            risks.append(eye.risk())
    assert isinstance(eye, Watch)
    assert isinstance(detector, Detector)
    seen = eye.per_step()
    assert seen.dtype == torch.float64
    assert torch.equal(seen[len(seen) - len(risks) :], torch.stack(risks))
    assert (seen[: len(seen) - len(risks)] == 0).all()
    inside_first = next(i for i, sigma in enumerate(grid.tolist()) if sigma <= 3.0)
    needs = {"variance": 2, "path_length": 2, "second_difference": 3, "slope_change": 2, "early_stop": 2}.get(name, 1)
    assert len(risks) == (20 if name in LAST else 20 - inside_first - needs + 1)


@pytest.mark.parametrize("name", FREE)
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


def test_watching_changes_no_sample_whatever_the_solver():
    grid, seeds = polynomial(8), range(COUNT)
    detectors = {name: build(name, (0.0, 3.0)) for name in DETECTORS}
    for kind in SOLVERS:
        solver = SOLVERS[kind]()
        plain = fanal.sample(blurred(), start(), grid, solver, seeds)
        seen = observe_block(blurred(), start(), grid, solver, detectors, seeds)
        assert torch.equal(seen.x, plain), kind
        for name, risk in seen.risks.items():
            assert torch.isfinite(risk).all(), (kind, name)


@pytest.mark.parametrize("name", DETECTORS)
def test_two_watches_do_not_disturb_each_other(name):
    grid, seeds = polynomial(10), range(COUNT)
    detector = build(name, last_window(grid))
    one, two = begin(detector, blurred()), begin(detector, blurred())
    pairs = zip(
        fanal.trace(blurred(), start(), grid, Euler(), seeds),
        fanal.trace(blurred(), -start(), grid, Euler(), seeds),
        strict=True,
    )
    for a, b in pairs:
        one.see(a)
        two.see(b)
    assert torch.equal(one.risk(), watch(blurred(), start(), grid, Euler(), detector, seeds).risk)
    assert torch.equal(two.risk(), watch(blurred(), -start(), grid, Euler(), detector, seeds).risk)


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "jacobian"])  # its probes are drawn anew
def test_a_run_that_starts_half_way_is_judged_like_a_whole_one(name):
    grid, seeds = polynomial(20), range(COUNT)
    detector = build(name, (0.0, 0.9))
    whole = watch(blurred(), start(), grid, Euler(), detector, seeds, record=True)
    first = int((grid > 0.9).sum())
    part = watch(blurred(), whole.trajectory.x[first], grid[first:], Euler(), detector, seeds)
    assert torch.equal(part.x, whole.x)
    assert torch.equal(part.risk, whole.risk)


def test_what_is_known_to_lie_between_modes_has_the_higher_risk():
    # exact denoiser of modes 2 apart; half the samples start almost midway between two of them, half within a mode
    grid = polynomial(40)
    grid = grid[grid <= 0.5]
    generator = torch.Generator().manual_seed(0)
    near = 0.02 * torch.randn(40, 2, generator=generator).double()
    x = torch.cat([near[:20] + torch.tensor([1.0, 0.0]), near[20:] + torch.tensor([2.0, 0.0])])
    names = [name for name in DETECTORS if name not in (*LAST, "undecided")]  # which is for pictures
    options = {"jacobian": {"probes": 8}}
    detectors = {name: build(name, (0.0, 0.5), **options.get(name, {})) for name in names}
    seen = observe_block(mixture(), x, grid, Euler(), detectors, range(40))
    for name, risk in seen.risks.items():
        assert risk[:20].min() > 1.5 * risk[20:].max(), name


def test_early_stopping_measures_what_stopping_would_have_changed():
    grid, x = polynomial(20), start()
    run = Trajectory.record(fanal.trace(blurred(), x, grid, Heun()))
    stop = 12
    risk = watch(blurred(), x, grid, Heun(), EarlyStop((0.0, float(grid[stop]))), range(COUNT)).risk
    assert torch.allclose(risk, rms(run.x[-1] - run.denoised[stop]), rtol=1e-12)


def test_undecided_is_the_posterior_variance_of_black_and_white_pictures():
    # pixels are −1 or 1, independently and by even chances: the posterior of each has the mean tanh(x/sigma²)
    def truth(x, sigma):
        return torch.tanh(x / sigma**2)

    sigma, generator = 0.8, torch.Generator().manual_seed(0)
    clean = torch.randint(0, 2, (400, 1, 16, 16), generator=generator).double() * 2 - 1
    x = clean + sigma * torch.randn(clean.shape, generator=generator).double()
    seen = observe_block(
        truth, x, torch.tensor([sigma, 0.0]), Euler(), {"u": Undecided((0.0, 1.0), power=0.0)}, range(400)
    )
    error = (truth(x, torch.tensor(sigma)) - clean).square().flatten(1).mean(1)
    difference = seen.risks["u"] - error  # the mean squared error of the posterior mean is the posterior variance
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 20  # by chance once in 16,000 seeds
    assert float(seen.risks["u"].mean()) > 40 * float(difference.std()) / 20


def test_an_empty_picture_has_a_finite_share_undecided():
    flat = torch.full((3, 1, 4, 4), -0.9)
    seen = observe_block(
        lambda x, sigma: flat, flat, torch.tensor([1.0, 0.0]), Euler(), {"u": Undecided((0, 2))}, [0, 1, 2]
    )
    assert torch.isfinite(seen.risks["u"]).all()
    assert (seen.risks["u"] > 100).all()
    with pytest.raises(FanalError, match="the power of the contrast must be a number"):
        Undecided((0.0, 1.0), power="half")


def test_contrast_takes_content_out_and_gray_counts_what_is_undecided():
    picture = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [-1.0, 0.0, 0.5, 1.5]]).double().reshape(2, 1, 2, 2)
    seen = observe_block(
        lambda x, sigma: picture,
        torch.zeros(2, 1, 2, 2).double(),
        torch.tensor([1.0, 0.5, 0.0]),
        Euler(),
        {name: build(name, (0.0, 1.0)) for name in ("gray", "contrast")},
        range(2),
    )
    assert seen.risks["gray"].tolist() == [0.0, (1.0 + 0.5) / 4]
    assert seen.risks["contrast"].tolist() == [1.0, pytest.approx(0.875 - 0.0625)]


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


@pytest.mark.parametrize(
    "window", [(1.0, 0.5), (-1.0, 2.0), (float("nan"), 1.0), (0.0, 1.0, 2.0), [0.0, 1.0], ("0", 1.0)]
)
@pytest.mark.parametrize("name", ["variance", "slope_change", "rods_index"])
def test_a_window_that_is_none_is_refused(name, window):
    with pytest.raises(FanalError, match=r"a detector's window is \(low, high\) in sigma"):
        build(name, window)


def test_too_few_steps_in_a_window_are_told():
    for name, words in (("path_length", "two steps"), ("second_difference", "three steps"), ("jacobian", "one step")):
        window = (30.0, 45.0) if name == "second_difference" else (0.0001, 0.001)
        with pytest.raises(FanalError, match=f"needs {words} with sigma in"):
            watch(blurred(), start(), polynomial(8), Euler(), build(name, window), range(COUNT))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_described_by_what_builds_it(name):
    detector = build(name, (0.1, 2.0))
    what = json.loads(json.dumps(describe(detector)))
    assert build(what["detector"], tuple(what["window"]), **what["options"]) == detector
    assert what["detector"] == name


def test_what_is_no_detector_of_ours_is_not_described():
    class Own:
        free, window = True, (0.0, 1.0)

        def start(self):
            raise NotImplementedError

    with pytest.raises(FanalError, match="Own is none of fanal's detectors"):
        describe(Own())


@pytest.mark.parametrize("name", ["variance", "last_slope"])
def test_an_option_that_a_detector_lacks_is_refused(name):
    with pytest.raises(FanalError, match=f"{name} has no option 'rho': it has none"):
        build(name, (0.0, 1.0), rho=1.0)
