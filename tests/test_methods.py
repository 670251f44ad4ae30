"""Methods: one seam, exact prices, no dependence on the batch, and what each is the same as."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fanal
from fanal.denoiser import Counted, Temperature
from fanal.errors import FanalError
from fanal.hallucination.detectors import LastSlope, Variance
from fanal.hallucination.ladder import Ladder
from fanal.hallucination.methods import HINTS, METHODS, Best, Climbed, Fixed, Gated, Mending, Method, Restart, Settings
from fanal.hallucination.repair import Renoise, watch
from fanal.hallucination.rods import Guard
from fanal.schedules import jump, polynomial
from fanal.seeding import noise
from fanal.solvers import Churn, Euler, Heun
from toys import blurred

GRID, SEEDS, EYE = polynomial(12), range(40, 64), LastSlope()
STOCHASTIC = ("churn", "random", "restart", "best", "renoise", "fresh", "ladder", "localized")


def start(seeds=SEEDS):
    return noise((2,), seeds, 80.0, dtype=torch.float64)


def threshold():
    return float(watch(blurred(), start(), GRID, Euler(), EYE, SEEDS).risk.median())


def settings(**changed):
    given = {**HINTS["grid2"], "ladder": Ladder(((0.5, 6), (1.5, 8))), **changed}
    return Settings(GRID, EYE, threshold(), **given)


POINTS = sorted(set(METHODS) - {"localized"})  # which is for images


@pytest.mark.parametrize("name", POINTS)
def test_no_sample_depends_on_its_batch_and_the_same_call_gives_the_same_bits(name):
    method = METHODS[name](settings())
    whole = method(blurred(), start(), SEEDS, 30)
    assert isinstance(method, Method)
    assert torch.equal(whole, method(blurred(), start(), SEEDS, 30))
    parts = [method(blurred(), start(s), s, 30) for s in (SEEDS[:5], SEEDS[5:6], SEEDS[6:])]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", POINTS)
def test_noise_is_keyed_by_the_seeds(name):
    method, shifted = METHODS[name](settings()), range(140, 164)
    same = torch.equal(method(blurred(), start(), SEEDS, 30), method(blurred(), start(), shifted, 30))
    assert same is (name not in STOCHASTIC)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("euler", 12),
        ("heun", 23),
        ("euler200", 200),
        ("churn", 12),
        ("temperature", 12),
        ("early", len(jump(GRID, 0.05)) - 1),
        ("best", 30),
    ],
)
def test_prices_are_exact(name, calls):
    counted = Counted(blurred())
    METHODS[name](settings())(counted, start(), SEEDS, 30)
    assert counted.evaluations == calls * len(SEEDS)


@pytest.mark.parametrize(
    ("name", "asks", "products"), [("cas", 1, 1), ("sas", 1, 0), ("random", 1, 0), ("reversed", 1, 1)]
)
def test_guards_pay_in_their_window_only(name, asks, products):
    own, counted = settings(), Counted(blurred())
    inside = sum(own.window[0] <= float(sigma) <= own.window[1] for sigma in GRID[:-1])
    METHODS[name](own)(counted, start(), SEEDS, 30)
    assert counted.evaluations == (12 + asks * inside) * len(SEEDS)
    assert counted.products == products * inside
    assert inside > 2


@pytest.mark.parametrize(("data", "asks"), [("grid2", 5), ("shapes32", 3), ("hands32", 5)])
def test_held_guards_look_once_for_several_steps(data, asks):
    """43 to 45 calls and 3 to 5 products on the grid of 40 steps, as the page on corrections says."""
    counted, grid = Counted(blurred()), polynomial(40)
    METHODS["held"](Settings(grid, LastSlope(), 0.0, **HINTS[data]))(counted, start(), SEEDS, 60)
    assert (counted.evaluations, counted.products) == ((40 + asks) * len(SEEDS), asks)


def test_fixed_methods_are_plain_runs_with_what_their_names_say():
    own = settings()
    ends = polynomial(200)
    guard = Guard(Euler(), "cas", rho=own.rho, window=own.window, window_units="sigma")
    same = {
        "euler": (blurred(), GRID, Euler()),
        "heun": (blurred(), GRID, Heun()),
        "euler200": (blurred(), ends, Euler()),
        "early": (blurred(), jump(GRID, own.stop), Euler()),
        "churn": (blurred(), GRID, Churn(Euler(), s_churn=own.s_churn)),
        "temperature": (Temperature(blurred(), own.kappa, own.window), GRID, Euler()),
        "cas": (blurred(), GRID, guard),
        "held": (blurred(), GRID, dataclasses.replace(guard, hold=own.hold)),
    }
    for name, (model, grid, solver) in same.items():
        x = fanal.sample(model, start(), grid, solver, SEEDS)
        assert torch.allclose(METHODS[name](own)(blurred(), start(), SEEDS, 12), x, rtol=1e-12, atol=1e-14), name


def test_an_early_stop_ends_at_the_posterior_mean():
    # On one Gaussian the plain run is known in closed form, and so is the prediction at the node where it stops.
    law = fanal.exact.Gaussian(torch.zeros(2, dtype=torch.float64), torch.full((2,), 0.25, dtype=torch.float64))
    cut = jump(GRID, 1.0)
    x = fanal.sample(law, start(), cut[:-1], Euler())
    mean = x * 0.25 / (0.25 + float(cut[-2]) ** 2)
    made = METHODS["early"](dataclasses.replace(settings(), stop=1.0))(law, start(), SEEDS, 30)
    assert torch.allclose(made, mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["redo", "renoise", "fresh", "ladder"])
def test_a_stored_first_pass_gives_the_same_samples(name):
    method, counted = METHODS[name](settings()), Counted(blurred())
    assert isinstance(method, Mending)
    first = watch(blurred(), start(), GRID, Euler(), method.detector, SEEDS)
    after = method.mend(counted, start(), SEEDS, 30, first)
    assert torch.equal(after.x, method(blurred(), start(), SEEDS, 30))
    assert float(after.evaluations.sum()) == 12 * len(SEEDS) + counted.evaluations
    kept = after.rounds == 0
    assert 0 < int(kept.sum()) < len(SEEDS)
    assert torch.equal(after.x[kept], first.x[kept])


def test_restarts_keep_the_law_of_a_gaussian_and_cost_what_their_interval_does():
    # Up by sqrt(high² − low²) and down again: the exact flow of N(0, s²) scales by sqrt((s² + low²)/(s² + high²)).
    law = fanal.exact.Gaussian(torch.zeros(2, dtype=torch.float64), torch.full((2,), 0.25, dtype=torch.float64))

    class Exact:
        """The flow itself."""

        def step(self, denoiser, x, span, memory=()):
            scale = ((0.25 + span.sigma_next**2) / (0.25 + span.sigma**2)).sqrt()
            return fanal.Step(x * scale, denoiser(x, span.sigma))

    counted, seeds = Counted(law), range(20_000)
    method = Restart(GRID, (0.4, 3.0), Exact())
    high, low = method.nodes()
    x = 80.0 * torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * ((0.25 + 6400) / 6400) ** 0.5  # the law at sigma = 80
    end = method(counted, x, seeds, 12 + 3 * (low - high) + 1)
    assert counted.evaluations == (12 + 3 * (low - high)) * 20_000
    # variance 0.25 over 40,000 numbers: a standard error of 0.7 %; five of them
    assert float(end.var()) == pytest.approx(0.25, rel=0.035)
    plain = fanal.sample(law, x, GRID, Exact())
    correlation = float((end * plain).mean() / (end.std() * plain.std()))
    kept = (0.25 + GRID[low] ** 2) / (0.25 + GRID[high] ** 2)  # of the variance at the high end, and so of the slope
    assert correlation == pytest.approx(float(kept.sqrt()) ** 3, abs=0.03)


def test_restart_needs_an_interval_with_a_step_in_it():
    with pytest.raises(FanalError, match="spans a step"):
        Restart(GRID, (1.0, 1.001), Euler())(blurred(), start(), SEEDS, 30)


def test_the_best_of_one_is_a_plain_run_and_of_two_the_one_with_less_risk():
    share = polynomial(15)
    one = Best(GRID, EYE, Euler(), 1)(blurred(), start(), SEEDS, 15)
    assert torch.allclose(one, fanal.sample(blurred(), start(), share, Euler()))
    second = noise((2,), SEEDS, 80.0, round=1, stream="best", dtype=torch.float64)
    runs = [watch(blurred(), x, share, Euler(), EYE, SEEDS) for x in (start(), second)]
    wanted = torch.where((runs[1].risk < runs[0].risk)[:, None], runs[1].x, runs[0].x)
    assert torch.equal(Best(GRID, EYE, Euler(), 2)(blurred(), start(), SEEDS, 30), wanted)


def test_without_a_probe_the_ladder_is_judged_by_the_detector_on_the_grids_own_nodes():
    eye = Variance((0.0, 0.3))
    first = watch(blurred(), start(), GRID, Euler(), eye, SEEDS)
    limit = float(first.risk.median())
    method = Climbed(GRID, eye, limit, Ladder(((1.5, 5),), eta=0.0), None, Euler())
    after = method.mend(blurred(), start(), SEEDS, 30, first)
    once = Ladder(((1.5, 9),), eta=0.0).repair(blurred(), start(), GRID, Euler(), eye, SEEDS, first, limit)
    assert torch.equal(after.x, once.x)
    tail = int((GRID <= 1.5).sum()) - 1
    assert (once.evaluations[once.rounds == 1] == 12 + tail).all()


def test_the_budget_cuts_rungs_and_never_looks_at_the_batch():
    ladder = Ladder(((1.0, 10), (2.0, 20), (3.0, 30)), flag=0.5)
    assert ladder.within(0.0, 2).rungs == ()
    assert ladder.within(6.0, 2).rungs == ((1.0, 10),)  # 0.5·12
    assert ladder.within(11.4, 2).rungs == ((1.0, 10),)
    assert ladder.within(11.5, 2).rungs == ((1.0, 10), (2.0, 20))  # + 0.25·22
    assert ladder.within(15.5, 2) == ladder  # + 0.125·32


def test_settings_of_data_sets_are_fields():
    fields = {field.name for field in dataclasses.fields(Settings)}
    for name, hints in HINTS.items():
        assert set(hints) <= fields, name
        for method in METHODS.values():
            assert isinstance(method(Settings(GRID, EYE, 0.0, **hints)), Method)
    gated = METHODS["renoise"](settings())
    assert isinstance(gated, Gated)
    assert isinstance(gated.repair, Renoise)
    assert isinstance(METHODS["euler"](settings()), Fixed)
