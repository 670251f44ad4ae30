"""RODS: the index and the perturbation against independent computations, and the guard's identities."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import fanal
from fanal import schedules
from fanal.config import build_solver
from fanal.denoiser import Counted, Labelled, Temperature
from fanal.errors import FanalError
from fanal.exact import Gaussian, Mixture
from fanal.guidance import ClassifierFree
from fanal.hallucination import repair, rods
from fanal.hallucination.perturbation import differentiate
from fanal.metrics import auc
from fanal.sampling import Span, sample, trace
from fanal.seeding import noise
from fanal.solvers import SOLVERS, Ancestral, Churn, DPMpp, Euler, Heun, UniPC
from fanal.trajectory import Trajectory
from problems import gaussian, mixture, observed_order, quiet, reference, run, start
from toys import fanal as command
from toys import record, refused, samples

F64 = torch.float64
GRID = schedules.polynomial(8, sigma_min=0.05, sigma_max=10.0)
INSIDE = {"window": (2, 5)}


def level(sigma):
    return torch.tensor(sigma, dtype=F64)


def high():
    """A mixture in 48 dimensions, its means about as far apart as the noise levels below."""
    means = noise((48,), range(3), 0.1, dtype=F64)
    return Mixture(means, [0.5, 0.3, 0.2], std=torch.tensor([0.2, 0.3, 0.25]))


MIXTURES = {2: mixture, 48: high}


def points(D, sigma, count=5):
    return D.draw(count, seed=3) + noise(D.shape, range(count), sigma, dtype=F64)


# --- the index, computed a second time ---------------------------------------------------------------------------


class ByHand:
    """[RODS] eq. 8 for one point of a mixture in numpy: its own posterior means, and central differences only."""

    POWER = {"residual": 0, "direction": 1, "score": 2}

    def __init__(self, D, sigma, v):
        self.means, self.prior, self.std = D.means.numpy(), D.prior.numpy(), D.std.double().numpy()
        self.sigma, self.v = sigma, v

    def norm(self, x):
        total = self.std**2 + self.sigma**2
        log = np.log(self.prior) - ((x - self.means) ** 2).sum(1) / (2 * total) - len(x) / 2 * np.log(total)
        w = np.exp(log - log.max())
        w /= w.sum()
        means = self.means + (self.std**2 / total)[:, None] * (x - self.means)
        return float(np.linalg.norm(x - w @ means)) / self.sigma ** self.POWER[self.v]

    def gradient(self, x, h=1e-3):
        """Central differences of fourth order."""
        out = np.zeros_like(x)
        for j in range(len(x)):
            e = np.zeros_like(x)
            e[j] = h
            f = [self.norm(x + k * e) for k in (-2, -1, 1, 2)]
            out[j] = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
        return out

    def index(self, x, r, steps):
        delta = np.zeros_like(x)
        for _ in range(steps):
            g = self.gradient(x + delta)
            delta = delta + r * g / np.linalg.norm(g)
            delta *= r / np.linalg.norm(delta)
        return float(np.linalg.norm(self.gradient(x + delta) - self.gradient(x))), delta


@pytest.mark.parametrize("d", MIXTURES)
@pytest.mark.parametrize("v", ["score", "direction", "residual"])
@pytest.mark.parametrize(("units", "rho"), [("absolute", 0.3), ("sigma", 0.4), ("shell", 0.1)])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_index_is_that_of_finite_differences(d, v, units, rho, steps):
    D, sigma = MIXTURES[d](), 0.6
    x = points(D, sigma, 2)
    H, delta = rods.index(D, x, sigma, v=v, rho=rho, rho_units=units, steps=steps)
    r = rho * {"absolute": 1.0, "sigma": sigma, "shell": sigma * math.sqrt(d)}[units]
    for b, point in enumerate(x.numpy()):
        expected, move = ByHand(D, sigma, v).index(point, r, steps)
        assert float(H[b]) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(delta[b].numpy(), move, atol=1e-6 * r)


@pytest.mark.parametrize("d", MIXTURES)
@pytest.mark.parametrize("sigma", [0.1, 0.6, 3.0])
@pytest.mark.parametrize(("product", "tolerance"), [("forward", 1e-10), ("difference", 1e-4)])
def test_all_products_agree_where_the_jacobian_is_symmetric(d, sigma, product, tolerance):
    D = MIXTURES[d]()
    x = points(D, sigma)
    exact, other = (differentiate(D, x, level(sigma), p) for p in ("backward", product))
    torch.testing.assert_close(other.gradient, exact.gradient, rtol=0, atol=tolerance)
    assert torch.equal(other.denoised, exact.denoised)
    for a, b in zip(*(rods.index(D, x, sigma, product=p) for p in ("backward", product)), strict=True):
        torch.testing.assert_close(a, b, rtol=30 * tolerance, atol=30 * tolerance / sigma**2)


def test_readings_differ_by_powers_of_sigma_and_each_sample_may_have_its_own():
    D, sigma = mixture(), torch.tensor([0.3, 1.0, 4.0], dtype=F64)
    x = start(D, 3, 1.0)
    H = {v: rods.index(D, x, sigma, v=v)[0] for v in ("residual", "direction", "score")}
    torch.testing.assert_close(H["direction"], H["residual"] / sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(H["score"], H["residual"] / sigma**2, rtol=1e-12, atol=0)
    for b in range(3):
        alone = rods.index(D, x[b : b + 1], float(sigma[b]))[0]
        torch.testing.assert_close(alone, H["score"][b : b + 1], rtol=1e-9, atol=1e-12)


def test_on_a_gaussian_with_one_variance_the_gradient_is_radial():
    # D = s²x/(s² + sigma²): ‖e‖ = c‖x‖ with c = sigma²/(s² + sigma²), so ∇‖e‖ = c·x/‖x‖, δ ∥ x, and H = 0
    D = Gaussian(torch.zeros(5, dtype=F64), 0.49)
    x = start(D, 4, 2.0)
    H, delta = rods.index(D, x, 2.0, v="residual", rho=0.3, rho_units="absolute")
    c = 4 / 4.49
    torch.testing.assert_close(differentiate(D, x, level(2.0)).gradient, c * x / x.norm(dim=1, keepdim=True))
    torch.testing.assert_close(delta, 0.3 * x / x.norm(dim=1, keepdim=True))
    assert float(H.max()) < 1e-14


# --- the index against the exact maximization, and the Hessian ----------------------------------------------------


def hessian(D, point, sigma):
    """The Hessian of ‖x − D‖ at one point."""
    return torch.autograd.functional.hessian(lambda y: (y - D(y[None], level(sigma))[0]).norm(), point)


@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_more_gradient_steps_come_near_the_exact_maximum_and_one_step_does_for_small_radii(sigma):
    D = mixture()
    angle = torch.linspace(0, 2 * math.pi, 7201, dtype=F64)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], 1)

    def of_the_best(point, r):
        y = point + r * circle
        norms = (y - D(y, level(sigma))).norm(dim=1)
        best = r * circle[norms.argmax()]
        return best, float(norms.max())

    gaps = {1: [], 10: []}
    for point in points(D, sigma, 6):
        best, top = of_the_best(point, 0.3)
        base = float((point[None] - D(point[None], level(sigma))).norm())
        for steps, gap in gaps.items():
            _, delta = rods.index(D, point[None], sigma, rho=0.3, rho_units="absolute", steps=steps)
            y = point[None] + delta
            gap.append((top - float((y - D(y, level(sigma))).norm())) / (top - base))
        best, _ = of_the_best(point, 1e-4)
        H, delta = rods.index(D, point[None], sigma, v="residual", rho=1e-4, rho_units="absolute")
        assert float((delta[0] - best).norm()) < 0.02 * 1e-4
        ahead, here = (differentiate(D, p[None], level(sigma)).gradient for p in (point + best, point))
        largest = float(torch.linalg.eigvalsh(hessian(D, point, sigma)).abs().max())
        assert float(H) == pytest.approx(float((ahead - here).norm()), abs=0.01 * 1e-4 * largest)
    assert min(gaps[1] + gaps[10]) > -1e-6  # nothing beats the dense search
    assert max(gaps[10]) < 0.01  # of what there is to gain
    assert sum(gaps[10]) < sum(gaps[1]) / 10


@pytest.mark.parametrize("d", MIXTURES)
def test_to_first_order_the_index_is_the_hessian_along_the_gradient_and_at_most_its_largest_eigenvalue(d):
    D, sigma, r = MIXTURES[d](), 0.5, 1e-4
    x = points(D, sigma, 4)
    H, delta = rods.index(D, x, sigma, v="residual", rho=r, rho_units="absolute")
    ratios = []
    for b, point in enumerate(x):
        curved = hessian(D, point, sigma)
        largest = float(torch.linalg.eigvalsh(curved).abs().max())
        assert float(H[b]) == pytest.approx(float((curved @ delta[b]).norm()), rel=2e-3)
        assert float(H[b]) <= r * largest * (1 + 2e-3)
        ratios.append(float(H[b]) / (r * largest))
        # along the eigenvector instead of the gradient the bound is met: it is the maximum over δ of A.2
        values, vectors = torch.linalg.eigh(curved)
        top = r * vectors[:, values.abs().argmax()]
        ahead, here = (differentiate(D, p[None], level(sigma)).gradient for p in (point + top, point))
        assert float((ahead - here).norm()) == pytest.approx(r * largest, rel=2e-3)
    assert max(ratios) > 0.1


# --- the guard is the formula -------------------------------------------------------------------------------------


def plan(D, x, sigma, method, r):
    """δ by its definition."""
    gradient = differentiate(D, x, sigma).gradient
    away = {"cas": gradient, "reversed": -gradient, "sas": x - D(x, sigma)}[method]
    return r * away / away.norm(dim=1, keepdim=True)


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


# --- cost, gradients, records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "calls", "products"),
    [
        ({}, 2, 1),
        ({"method": "sas"}, 2, 0),
        ({"method": "random"}, 2, 0),
        ({"method": "reversed"}, 2, 1),
        ({"threshold": math.inf}, 2, 2),
        ({"threshold": 0.0}, 2, 2),
        ({"threshold": 0.0, "method": "sas"}, 3, 2),
        ({"steps": 5}, 6, 5),
        ({"steps": 5, "method": "sas"}, 6, 0),
        ({"product": "difference"}, 3, 0),
        ({"product": "forward"}, 3, 1),
        ({"window": (5, 6)}, 1, 0),
        ({"solver": Heun()}, 3, 1),
        ({"solver": Heun(), "threshold": 0.0}, 3, 2),
    ],
)
def test_calls_and_products_are_counted_as_they_are_made(options, calls, products):
    backward = []

    class Passes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.view_as(y)

        @staticmethod
        def backward(ctx, grad):
            backward.append(len(grad))
            return grad

    D = mixture()
    forward = options.get("product") == "forward"
    counted = Counted(D if forward else lambda y, sigma: D(Passes.apply(y), sigma))
    x = start(D)
    with torch.no_grad():
        step = rods.Guard(**options).step(counted, x, Span(0, 2, level(3.0), level(1.0), (1, 2, 3, 4)))
    assert counted.calls == calls
    assert forward or len(backward) == products
    assert step.info["rods_calls"].tolist() == [calls] * 4
    assert step.info["rods_products"].tolist() == [products] * 4


def test_gradients_reach_the_start_with_the_perturbation_held_fixed():
    D, x = mixture(), start(mixture(), 3, 2.0)
    span, guard = Span(0, 2, level(2.0), level(1.0)), rods.Guard(Heun(), rho=0.1, threshold=0.0)
    delta = plan(D, x, span.sigma, "cas", 0.1 * 2.0 * math.sqrt(2))
    inputs = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(guard.step(D, inputs, span).x_next.sum(), inputs)
    again = x.clone().requires_grad_()
    fixed = Heun().step(lambda y, s: D(y + delta, s) - delta, again, span).x_next
    (expected,) = torch.autograd.grad(fixed.sum(), again)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not guard.step(D, x, span).x_next.requires_grad  # nothing that needs no gradient gets one
    with torch.no_grad():
        step = guard.step(D, inputs, span)
    assert not step.x_next.requires_grad
    torch.testing.assert_close(step.x_next, fixed.detach(), rtol=1e-12, atol=1e-12)


def test_it_runs_in_inference_mode():
    D, guard = fanal.load("grid2"), rods.Guard(Heun(), rho=0.1, threshold=0.0)
    with torch.inference_mode():
        x = fanal.noise((2,), range(4), 80.0) * 1
        found = sample(D, x, GRID, guard)
    assert torch.equal(found, sample(D, fanal.noise((2,), range(4), 80.0), GRID, guard))


def test_what_it_found_is_recorded_and_saved(tmp_path):
    D, guard = mixture(), rods.Guard(Heun(), rho=0.1, threshold=1e-3, **INSIDE)
    kept = Trajectory.record(trace(D, start(D), GRID, guard))
    kept.save(tmp_path / "run.safetensors")
    back = Trajectory.load(tmp_path / "run.safetensors")
    inside = torch.zeros(8, dtype=torch.bool)
    inside[2:5] = True
    assert torch.equal(back.info["rods_index"].isnan().all(1), ~inside)
    sigma = back.sigmas[:-1][inside]
    H = torch.stack([rods.index(D, back.x[i], float(s), rho=0.1)[0] for i, s in zip((2, 3, 4), sigma, strict=True)])
    torch.testing.assert_close(back.info["rods_index"][inside], H, rtol=1e-10, atol=1e-15)
    assert torch.equal(back.info["rods_corrected"][inside].bool(), H >= 1e-3)
    assert torch.equal(back.denoised[2], D(back.x[2], back.sigmas[2]))
    assert "denoised_next" in back.info


def test_the_index_is_a_detector_of_guarded_runs():
    D = fanal.load("grid2")
    seeds, grid = range(7000, 7600), schedules.polynomial(40)
    guard = rods.Guard(rho=0.1, threshold=math.inf, v="residual", window=(0.05, 2.0), window_units="sigma")
    found = repair.watch(D, fanal.noise(D.shape, seeds, 80.0), grid, guard, rods.Curvature((0.05, 2.0)), seeds)
    wrong = fanal.datasets.get("grid2").verify(found.x) != 0
    area = auc(found.risk, wrong)
    # far from chance: a useless detector has 0.5, and this one 0.9 with an error near 0.03
    assert int(wrong.sum()) >= 4
    assert area.value > 0.8
    assert found.per_step.shape == (40, 600)
    assert bool((found.per_step.diff(dim=0) >= 0).all())
    assert torch.equal(found.per_step[-1], found.risk)
    with pytest.raises(FanalError, match="run a rods.Guard with a threshold"):
        repair.watch(D, fanal.noise(D.shape, seeds, 80.0), grid, Euler(), rods.Curvature(), seeds)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "cass"}, "did you mean 'cas'"),
        ({"rho": -1.0}, "rho >= 0, got -1.0"),
        ({"rho": math.nan}, "rho >= 0"),
        ({"rho_units": "pixels"}, "shell"),
        ({"window": (5, 2)}, "low <= high"),
        ({"window": (2, 3), "window_units": "fraction"}, "between 0 and 1"),
        ({"window": (-1, 3)}, "low <= high"),
        ({"window": 4}, "low <= high"),
        ({"window_units": "percent"}, "fraction"),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": [[1.0]]}, "threshold"),
        ({"threshold": "much"}, "threshold"),
        ({"v": "noise"}, "score"),
        ({"steps": 0}, "gradient steps >= 1, got 0"),
        ({"steps": 1.5}, "gradient steps"),
        ({"product": "sideways"}, "backward"),
        ({"solver": Euler}, "step method"),
        ({"solver": "euler"}, "step method"),
    ],
)
def test_a_wrong_guard_is_refused(options, words):
    with pytest.raises(FanalError, match=words):
        rods.Guard(**options)


def test_mistakes_that_show_in_a_run_are_told():
    D, x = mixture(), start(mixture())
    with pytest.raises(FanalError, match="3 thresholds, one per step, for a grid of 8"):
        run(D, x, GRID, rods.Guard(threshold=(0.1, 0.2, 0.3)))
    with pytest.raises(FanalError, match='no gradient.*product="difference"'):
        run(lambda y, sigma: D(y.detach(), sigma).detach(), x, GRID, rods.Guard())
    assert (
        run(lambda y, sigma: D(y.detach(), sigma).detach(), x, GRID, rods.Guard(product="difference")).isfinite().all()
    )
    with pytest.raises(FanalError, match="sigma > 0"):
        rods.index(D, x, 0.0)
    assert rods.Guard(threshold=torch.tensor([0.25, 0.5])).threshold == (0.25, 0.5)


def test_a_point_that_is_its_own_prediction_is_not_moved():
    D = Gaussian(torch.zeros(3, dtype=F64), 1.0)
    x = torch.zeros(2, 3, dtype=F64)
    for product in ("backward", "forward", "difference"):
        H, delta = rods.index(D, x, 1.0, product=product)
        assert H.tolist() == [0.0, 0.0]
        assert not delta.any()


# --- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "guard"),
    [
        ("rods", rods.Guard()),
        ("rods:rho=0.3,rho_units=sigma", rods.Guard(rho=0.3, rho_units="sigma")),
        ("rods:solver=heun,window=4..20", rods.Guard(Heun(), window=(4.0, 20.0))),
        ("rods:threshold=inf,v=residual,steps=5", rods.Guard(threshold=math.inf, v="residual", steps=5)),
        ("rods:window=0.1..0.5,window_units=fraction", rods.Guard(window=(0.1, 0.5), window_units="fraction")),
        ("rods:solver=churn:s_churn=3", rods.Guard(Churn(s_churn=3.0))),
        ("rods:solver=(dpmpp:order=3,predict=noise),method=sas", rods.Guard(DPMpp(3, predict="noise"), "sas")),
        ("rods:solver=(ancestral:solver=(churn:s_churn=3,s_min=1),eta=0.5)", None),
        ("ancestral:solver=rods:rho=0.2", Ancestral(rods.Guard(rho=0.2))),
    ],
)
def test_a_guard_has_a_name_on_the_command_line(text, guard):
    expected = guard or rods.Guard(Ancestral(Churn(s_churn=3.0, s_min=1.0), eta=0.5))
    assert build_solver(text) == expected


def test_a_run_folder_of_a_guarded_model(tmp_path):
    out = tmp_path / "out"
    spec = "rods:solver=euler,method=cas,rho=0.1,window=16..32"
    assert command("sample", "grid2", "--solver", spec, "--count", 8, "--out", out).exit_code == 0
    D = fanal.load("grid2")
    x = fanal.noise(D.shape, range(8), 80.0)
    direct = sample(D, x, schedules.polynomial(40), rods.Guard(rho=0.1, window=(16, 32)))
    assert torch.equal(samples(out)["x"], direct)
    assert record(out)["network"]["calls"] == 40 + 16
    refused(command("sample", "grid2", "--solver", "rods:rho=x", "--out", tmp_path / "no"), "rods:rho", "'x'")
    refused(
        command("sample", "grid2", "--solver", "rods:windw=1..2", "--out", tmp_path / "no"), "did you mean 'window'"
    )
