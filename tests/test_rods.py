"""RODS: the index and the perturbation against independent computations, and the guard's identities."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fanal
from fanal import schedules
from fanal.denoiser import Counted, Labelled, Temperature
from fanal.errors import FanalError
from fanal.exact import Gaussian, Mixture
from fanal.guidance import ClassifierFree
from fanal.hallucination import rods
from fanal.hallucination.perturbation import differentiate
from fanal.sampling import Span, sample, trace
from fanal.seeding import noise
from fanal.solvers import SOLVERS, Ancestral, Churn, DPMpp, Euler, Heun, UniPC
from fanal.trajectory import Trajectory
from guards import GRID, INSIDE, level, plan
from problems import gaussian, mixture, observed_order, quiet, reference, run, start

F64 = torch.float64


# the others ask first elsewhere, or not at all, or draw noise: the next tests have them
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("ddpm", "churn", "afs")])
@pytest.mark.parametrize("method", ["cas", "sas", "reversed"])
def test_a_guarded_step_is_the_solvers_step_with_the_shifted_denoiser(name, method):
    D, solver, x = mixture(), quiet(name), start(mixture(), 4, 3.0)
    grid, memory, other = level([3.0, 2.0, 1.2, 0.0]), (), ()
    guard = rods.Guard(solver, method=method, rho=0.2, rho_units="sigma")
    for i in range(3):
        span = Span(i, 3, grid[i], grid[i + 1])
        delta = plan(D, x, span.sigma, method, 0.2 * span.sigma)

        def shifted(y, sigma, delta=delta):
            return D(y + delta, sigma) - delta

        step = guard.step(D, x, span, memory)
        expected = solver.step(shifted, x, span, other)
        torch.testing.assert_close(step.x_next, expected.x_next, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(step.info["rods_denoised"], expected.denoised, rtol=1e-10, atol=1e-10)
        assert torch.equal(step.denoised, D(x, span.sigma))
        assert bool(step.info["rods_corrected"].all())
        assert len(step.memory) == len(expected.memory)
        memory, other, x = step.memory, expected.memory, step.x_next


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_runs_guarded_and_the_raw_prediction_stays(name):
    D, seeds = mixture(), range(4)
    guard = rods.Guard(SOLVERS[name](), rho=0.05)
    for t in trace(D, start(D), GRID, guard, seeds):
        at, sigma = t.step.at or (t.x, t.span.sigma)
        if name == "afs" and t.span.i == 0:
            assert "rods_denoised" not in t.step.info  # answered without the network
            continue
        assert torch.equal(t.step.denoised, D(at, sigma))
        assert not torch.equal(t.step.denoised, t.step.info["rods_denoised"])
    assert not torch.equal(t.step.x_next, run(D, start(D), GRID, SOLVERS[name](), seeds))


def test_noise_stays_outside_the_guard_or_inside():
    D, x = mixture(), start(mixture(), 4, 3.0)
    span = Span(0, 4, level(3.0), level(2.0), (1, 2, 3, 4))
    # churn inside: δ is found at the churned point, where the step first asks
    churn = Churn(Euler(), s_churn=1.0)
    step = rods.Guard(churn, rho=0.2, rho_units="absolute").step(D, x, span)
    x_hat, sigma_hat = step.at
    delta = plan(D, x_hat, sigma_hat, "cas", 0.2)
    robust = D(x_hat + delta, sigma_hat) - delta
    torch.testing.assert_close(step.info["rods_denoised"], robust, rtol=1e-12, atol=1e-12)
    assert torch.equal(step.denoised, D(x_hat, sigma_hat))
    around = dataclasses.replace(churn, solver=rods.Guard(rho=0.2, rho_units="absolute"))
    assert torch.equal(around.step(D, x, span).x_next, step.x_next)


def test_the_last_interval_ends_at_the_robust_prediction():
    D, x = mixture(), start(mixture(), 4, 0.3)
    for solver in (Euler(), Heun(), DPMpp(), UniPC()):
        step = rods.Guard(solver, rho=0.1, rho_units="absolute").step(D, x, Span(3, 4, level(0.3), level(0.0)))
        delta = plan(D, x, level(0.3), "cas", 0.1)
        torch.testing.assert_close(step.x_next, D(x + delta, level(0.3)) - delta, rtol=1e-12, atol=1e-12)


class KnowsInfinity(Gaussian):
    """At infinite sigma the prediction is the mean."""

    def __call__(self, x, sigma):
        return torch.zeros_like(x) + self.mean if torch.isinf(sigma) else super().__call__(x, sigma)


def test_the_first_interval_from_infinity_is_left_alone():
    D = KnowsInfinity(torch.tensor([0.5, -0.2], dtype=F64), torch.tensor([0.3, 0.1], dtype=F64))
    z, grid = noise((2,), range(3), math.inf, dtype=F64), level([math.inf, 5.0, 1.0, 0.0])
    plain, guarded = (list(trace(D, z, grid, solver)) for solver in (Euler(), rods.Guard()))
    assert torch.equal(plain[0].step.x_next, guarded[0].step.x_next)
    assert not torch.equal(plain[1].step.x_next, guarded[1].step.x_next)
    kept = Trajectory.record(guarded)
    assert kept.info["rods_corrected"][1:].eq(1).all()
    assert kept.info["rods_corrected"][0].isnan().all()


# --- identities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_an_infinite_threshold_changes_no_bit_and_outside_the_window_no_call(name):
    D, seeds = Counted(mixture()), range(4)
    plain = sample(D, start(mixture()), GRID, SOLVERS[name](), seeds)
    calls = D.calls
    idle = rods.Guard(SOLVERS[name](), threshold=math.inf, window=(100, 200))
    assert torch.equal(sample(D, start(mixture()), GRID, idle, seeds), plain)
    assert D.calls == 2 * calls
    seeing = rods.Guard(SOLVERS[name](), threshold=math.inf, **INSIDE)
    assert torch.equal(sample(D, start(mixture()), GRID, seeing, seeds), plain)
    assert D.calls == 3 * calls + 3  # one more in each of three steps


@pytest.mark.parametrize("spec", ["grid2", "digits8", "hands32"])
def test_an_infinite_threshold_changes_no_bit_of_a_network(spec):
    D = fanal.load(spec)
    x, grid = fanal.noise(D.shape, range(3), 80.0), schedules.polynomial(6)
    plain = sample(D, x, grid, DPMpp())
    guard = rods.Guard(DPMpp(), threshold=math.inf)
    assert torch.equal(sample(D, x, grid, guard), plain)
    with torch.no_grad():
        kept = Trajectory.record(trace(D, x, grid, guard))
    assert bool((kept.info["rods_index"] > 0).all())
    assert not kept.info["rods_corrected"].any()
    assert torch.equal(sample(D, x, grid, rods.Guard(DPMpp(), rho=0.0)), plain)  # D(x + 0) − 0


@pytest.mark.parametrize("solver", [Euler(), Heun(), DPMpp(order=3), UniPC(), Churn(), Ancestral()])
@pytest.mark.parametrize("method", ["cas", "sas", "random", "reversed"])
def test_in_a_mixed_batch_only_flagged_samples_change(solver, method):
    D, x, seeds = fanal.load("grid2"), fanal.noise((2,), range(12), 80.0), range(12)
    grid = schedules.polynomial(8)
    guard = rods.Guard(solver, method=method, window=(4, 7), threshold=math.inf)
    plain = list(trace(D, x, grid, solver, seeds))
    with torch.no_grad():
        seen = Trajectory.record(trace(D, x, grid, guard, seeds)).info["rods_index"]
    limits = [float(row.quantile(0.85)) if not row.isnan().all() else math.inf for row in seen]
    with torch.no_grad():
        after = list(trace(D, x, grid, dataclasses.replace(guard, threshold=limits), seeds))
    flagged = torch.stack([t.step.info["rods_corrected"] for t in after]).bool()
    ever = flagged.any(0)
    assert 2 <= int(ever.sum()) <= 10
    assert not flagged[:4].any()
    assert not flagged[7:].any()
    for before, now in zip(plain, after, strict=True):
        assert torch.equal(now.step.x_next[~ever], before.step.x_next[~ever])
        assert torch.equal(now.step.denoised[~ever], before.step.denoised[~ever])
    assert bool((after[-1].step.x_next[ever] != plain[-1].step.x_next[ever]).any(1).all())


def test_signs_of_zero_survive_in_samples_that_are_not_corrected():
    sharp, asked = Mixture(torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=F64), std=0.05), []

    def D(points, sigma):
        asked.append(points.detach().clone())
        return sharp(points, sigma)

    x = torch.tensor([[0.2, 0.1], [-0.0, 1.5]], dtype=F64)
    H = rods.index(sharp, x, 0.5)[0]
    assert H[0] > H[1]
    guard = rods.Guard(Euler(), method="sas", threshold=float(H.mean()))
    step = guard.step(D, x, Span(0, 1, level(0.5), level(0.2)))
    assert step.info["rods_corrected"].tolist() == [1, 0]
    assert bool(torch.signbit(asked[-1][1, 0]))  # −0 + 0 would be +0


def test_guards_are_pure():
    D, x, guard = mixture(), start(mixture()), rods.Guard(Heun(), rho=0.1, threshold=0.05)
    alone = [t.step.x_next for t in trace(D, x, GRID, guard)]
    first, second = trace(D, x, GRID, guard), trace(D, 2 * x, GRID, guard)
    for t, _, expected in zip(first, second, alone, strict=True):
        assert torch.equal(t.step.x_next, expected)
    parts = [run(D, x[rows], GRID, guard) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), alone[-1], rtol=1e-10, atol=1e-10)


# --- controls, windows, convergence -------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "factor"), [("absolute", 1.0), ("sigma", 3.0), ("shell", 3.0 * math.sqrt(2))])
@pytest.mark.parametrize("steps", [1, 5])
def test_all_methods_move_by_the_same_norm(units, factor, steps):
    D, x = mixture(), start(mixture(), 5, 3.0)
    span = Span(0, 2, level(3.0), level(1.0), tuple(range(5)))
    moves = {}
    for method in rods.METHODS:
        asked = []

        def watched(y, sigma, asked=asked):
            asked.append(y.detach().clone())
            return D(y, sigma)

        rods.Guard(Euler(), method=method, rho=0.1, rho_units=units, steps=steps).step(watched, x, span)
        moves[method] = asked[-1] - x
        torch.testing.assert_close(moves[method].norm(dim=1), torch.full((5,), 0.1 * factor, dtype=F64))
    torch.testing.assert_close(moves["reversed"], -moves["cas"])
    assert not torch.allclose(moves["random"], moves["cas"], atol=1e-3)


def test_the_random_control_draws_from_the_samples_seeds_and_says_when_it_has_none():
    D, x, guard = mixture(), start(mixture()), rods.Guard(method="random")
    assert torch.equal(run(D, x, GRID, guard, [5, 6, 7, 8])[:2], run(D, x[:2], GRID, guard, [5, 6]))
    assert not torch.equal(run(D, x, GRID, guard, [1, 2, 3, 4]), run(D, x, GRID, guard, [5, 6, 7, 8]))
    with pytest.raises(FanalError, match="needs seeds"):
        run(D, x, GRID, guard)


@pytest.mark.parametrize(
    ("window", "units", "inside"),
    [
        (None, "step", range(8)),
        ((2, 5), "step", [2, 3, 4]),
        ((0.25, 0.625), "fraction", [2, 3, 4]),
        ((0.1, 0.5), "fraction", [1, 2, 3]),
        ((0.0, 1.0), "fraction", range(8)),
        ((float(GRID[4]), float(GRID[2])), "sigma", [2, 3, 4]),
        ((0.0, math.inf), "sigma", range(8)),
        ((20.0, 30.0), "sigma", []),
        ((3, 3), "step", []),
    ],
)
def test_a_window_is_counted_in_steps_fractions_or_sigma(window, units, inside):
    D, guard = mixture(), rods.Guard(window=window, window_units=units)
    done = [t.step.info["rods_corrected"].bool().all().item() for t in trace(D, start(D), GRID, guard)]
    assert [i for i, hit in enumerate(done) if hit] == list(inside)


def test_the_papers_window_is_sixteen_of_forty_steps():
    window = rods.PRESETS["hands11k"]
    spans = [Span(i, 40, level(1.0), level(0.5)) for i in range(40)]
    assert [s.i for s in spans if window.inside(s)] == list(range(4, 20))
    assert rods.PRESETS["hands11k"] == rods.Guard(
        rho=30, rho_units="absolute", threshold=0.005, window=(0.1, 0.5), window_units="fraction", v="score"
    )
    assert {name: (g.rho, g.threshold) for name, g in rods.PRESETS.items()} == {
        "afhqv2": (1, 0.1),
        "ffhq": (8, 0.09),
        "ffhq-figure4": (1, 0.09),
        "hands11k": (30, 0.005),
    }


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Heun(), 2), (UniPC(lower_final="never"), 3)])
def test_a_perturbation_that_shrinks_fast_enough_keeps_the_order_of_convergence(solver, order):
    D, steps = gaussian(), [24, 48, 96]
    x = start(D, 4, 3.0)
    truth = reference(D, x, 3.0, 0.3)

    def error(n, rho):
        grid = torch.linspace(3.0, 0.3, n + 1, dtype=F64)
        guard = rods.Guard(solver, rho=rho, rho_units="absolute")
        return float((run(D, x, grid, guard) - truth).norm())

    shrinking = observed_order(steps, [error(n, 0.5 / n**order) for n in steps])
    assert shrinking == pytest.approx(order, abs=0.35)
    assert abs(observed_order(steps, [error(n, 0.5) for n in steps])) < 0.2  # a fixed one leads elsewhere


def test_it_composes_with_guidance_and_with_other_wrappers():
    net = fanal.load("digits8")
    x, grid = fanal.noise(net.shape, range(4), 80.0), schedules.polynomial(6)
    labels = torch.tensor([0, 1, 2, 3])
    guided = ClassifierFree(Labelled(net, labels), Labelled(net, 10), 2.0)
    with torch.no_grad():
        kept = Trajectory.record(trace(guided, x, grid, rods.Guard(Heun(), rho=0.05)))
        i = 3
        raw = guided(kept.x[i], grid[i])
    assert torch.equal(kept.denoised[i], raw)
    # the product goes through the guided prediction: against central differences of ‖x − D_w‖ along δ
    there = differentiate(guided, kept.x[i], grid[i])
    along, h = there.gradient / there.gradient.flatten(1).norm(dim=1)[:, None, None, None], 0.05

    def size(y):
        with torch.no_grad():
            return (y - guided(y, grid[i])).flatten(1).norm(dim=1).double()

    quotient = (size(kept.x[i] + (h * along).float()) - size(kept.x[i] - (h * along).float())) / (2 * h)
    torch.testing.assert_close(quotient, there.gradient.flatten(1).norm(dim=1).double(), rtol=5e-3, atol=5e-3)
    cold = Temperature(guided, 0.1)
    assert not torch.equal(sample(cold, x, grid, rods.Guard()), sample(guided, x, grid, rods.Guard()))
