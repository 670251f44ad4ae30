"""Solvers with history: their formulas' order, how they begin and end, and what wrappers may do to them."""

import dataclasses
import math

import pytest
import torch

from fanal.denoiser import Counted, slope
from fanal.errors import FanalError
from fanal.sampling import Span, sample, trace
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import (
    AFS,
    DEIS,
    DPM2,
    DPMS,
    IPNDM,
    LMS,
    PNDM,
    RES,
    SDE,
    SPNDM,
    Ancestral,
    Churn,
    DPMpp,
    DPMpp2S,
    Euler,
    Heun,
    UniPC,
)
from problems import gaussian, mixture, observed_order, run, start

F64 = torch.float64
HIGH, LOW = 10.0, 0.1


def even(steps, low, high, zero):
    """Equal steps in sigma."""
    return torch.linspace(high, low, steps + 1, dtype=F64)


def errors_with_exact_start(solver, grid, refined, low=LOW, exact_steps=4):
    """Errors on the Gaussian, the first states taken from its closed form, so that the history is exact."""
    D = gaussian()
    x0 = start(D, sigma=HIGH)
    found = []
    for steps in refined:
        sigmas = grid(steps, low, HIGH, zero=False)
        x, memory = x0, ()
        for i in range(steps):
            if 0 < i <= exact_steps:
                x = D.solution(x0, sigmas[0], sigmas[i])
            step = solver.step(D, x, Span(i, steps, sigmas[i], sigmas[i + 1]), memory)
            x, memory = step.x_next, step.memory
        found.append(float((x - D.solution(x0, sigmas[0], sigmas[-1])).norm()))
    return found


FORMULAS = {
    "ipndm 2": (IPNDM(2), 2),
    "ipndm 3": (IPNDM(3), 2),
    "ipndm 4": (IPNDM(4), 2),
    "lms 2": (LMS(2), 2),
    "lms 3": (LMS(3), 3),
    "lms 4": (LMS(4), 4),
    "deis tab 2": (DEIS(2), 2),
    "deis tab 3": (DEIS(3), 3),
    "deis tab 4": (DEIS(4), 4),
    "deis logrho 2": (DEIS(2, "logrho"), 2),
    "deis logrho 3": (DEIS(3, "logrho"), 3),
    "deis logrho 4": (DEIS(4, "logrho"), 4),
    "2M midpoint": (DPMpp(2, "midpoint", "never"), 2),
    "2M taylor": (DPMpp(2, "taylor", "never"), 2),
    "2M noise": (DPMpp(2, "taylor", "never", "noise"), 2),
    "3M as published": (DPMpp(3, "taylor", "never"), 2),
    "res 2": (RES(2, lower_final="never"), 2),
    "res 3": (RES(3, lower_final="never"), 3),
    "res 4": (RES(4, lower_final="never"), 4),
    "unipc 1": (UniPC(1, lower_final="never"), 2),
    "unipc 2 bh1": (UniPC(2, "bh1", "never"), 3),
    "unipc 2 bh2": (UniPC(2, "bh2", "never"), 3),
    "unipc 2 vary": (UniPC(2, "vary", "never"), 3),
    "unipc 3": (UniPC(3, "bh2", "never"), 4),
    "unipc 3 noise": (UniPC(3, "bh2", "never", "noise"), 4),
    "singlestep 2": (DPMS(2), 2),
    "singlestep 2 taylor": (DPMS(2, "taylor"), 2),
    "singlestep 3": (DPMS(3), 3),
    "singlestep 3 taylor": (DPMS(3, "taylor"), 3),
    "singlestep 3 data": (DPMS(3, predict="data"), 3),
    "singlestep 3 on the grid": (DPMS(3, nodes="grid"), 3),
    "singlestep 2 on the grid": (DPMS(2, nodes="grid"), 2),
    "res singlestep 2": (RES(2, "singlestep"), 2),
    "res singlestep 3": (RES(3, "singlestep"), 3),
    "pndm": (PNDM(), 2),
    "plms": (PNDM(warmup="heun"), 2),
    "dpm2 r 0.7": (DPM2(0.7), 2),
    "2S r 0.3": (DPMpp2S(0.3), 2),
    "sde without noise": (SDE(3, 0.0, "exact", "never"), 3),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_order_of_the_formula(name):
    """With exact history; what the start by lower orders costs is no part of it."""
    solver, order = FORMULAS[name]
    refined = [96, 192, 384]
    errors = errors_with_exact_start(solver, polynomial, refined)
    assert observed_order(refined, errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_its_order_on_equal_steps_only(order):
    refined = [96, 192, 384]
    assert observed_order(refined, errors_with_exact_start(IPNDM(order), even, refined, low=2.0)) == pytest.approx(
        order, abs=0.2
    )
    if order > 2:
        assert observed_order(refined, errors_with_exact_start(IPNDM(order), logsnr, refined)) < 2.2


def test_published_third_order_weights_have_half_the_second_derivative():
    """3M of DPM-Solver++: doubling the term that multiplies φ_3 makes it RES, which has order 3."""
    refined = [96, 192, 384]
    published = errors_with_exact_start(DPMpp(3, "taylor", "never"), logsnr, refined)
    exact = errors_with_exact_start(RES(3, lower_final="never"), logsnr, refined)
    assert observed_order(refined, published) < 2.2
    assert observed_order(refined, exact) > 2.8
    assert exact[-1] < published[-1] / 5


def last_states(solver, sigmas, D=None):
    D = D or mixture()
    return [t.step.x_next for t in trace(D, start(D, sigma=float(sigmas[0])), sigmas, solver)]


@pytest.mark.parametrize("solver", [DPMpp(3), UniPC(3), RES(4), DEIS(3, "logrho", "always"), SDE(3, 0.0)])
def test_lowering_at_the_end(solver):
    """One order less for each interval that is missing: the last step is of first order, the one before of second."""
    sigmas = polynomial(8, LOW, HIGH, zero=False)
    always = last_states(solver, sigmas)
    for count in (1, 2):
        never = dataclasses.replace(solver, lower_final="never", order=count)
        D = mixture()
        lowered = list(trace(D, start(D, sigma=HIGH), sigmas, solver))
        i = 8 - count
        step = never.step(D, lowered[i].x, lowered[i].span, lowered[i - 1].step.memory)
        if not isinstance(solver, UniPC):  # its step also corrects the one before, with that one's order
            torch.testing.assert_close(step.x_next, always[i], rtol=1e-12, atol=1e-12)
    free = last_states(dataclasses.replace(solver, lower_final="never"), sigmas)
    same = [torch.equal(a, b) for a, b in zip(always, free, strict=True)]
    first = 8 - solver.order + 1
    assert same == [i < first for i in range(8)]


@pytest.mark.parametrize("solver", [DPMpp(3), UniPC(3), RES(3), DEIS(3, "logrho")])
@pytest.mark.parametrize("zero", [True, False])
def test_a_number_lowers_on_shorter_grids_only(solver, zero):
    """The intervals of the grid are counted, one into 0 too."""
    sigmas = polynomial(9, LOW, HIGH, zero=zero)
    ends = {
        rule: last_states(dataclasses.replace(solver, lower_final=rule), sigmas)[-1]
        for rule in ("always", "never", 9, 10)
    }
    assert torch.equal(ends["never"], ends[9])
    assert torch.equal(ends["always"], ends[10])
    assert not torch.equal(ends["never"], ends["always"])


@pytest.mark.parametrize("solver", [LMS(4), IPNDM(4), PNDM(warmup="heun"), SPNDM()])
def test_into_zero_by_prediction_or_by_formula(solver):
    """`finish` ends at the denoised prediction; the formula extrapolates the slopes instead."""
    D, sigmas = mixture(), polynomial(9, 0.05, HIGH)
    kept = list(trace(D, start(D, sigma=HIGH), sigmas, solver))
    assert torch.equal(kept[-1].step.x_next, kept[-1].step.denoised)
    formula = dataclasses.replace(solver, finish=False)
    other = list(trace(D, start(D, sigma=HIGH), sigmas, formula))
    assert torch.equal(other[-2].step.x_next, kept[-2].step.x_next)
    slopes = [(t.x - t.step.denoised) / t.span.sigma for t in other[::-1]]
    if isinstance(solver, SPNDM):
        want = other[-1].x - other[-1].span.sigma * (3 * slopes[0] - slopes[1]) / 2
        torch.testing.assert_close(other[-1].step.x_next, want, rtol=1e-12, atol=1e-12)
    assert not torch.equal(other[-1].step.x_next, kept[-1].step.x_next)


def test_history_begins_anew_after_the_step_from_infinity():
    """The step from infinite sigma leaves no memory, so the next one is of first order."""

    def flow(x, sigma):
        return torch.tanh(x / (1 + (0.0 if torch.isinf(sigma) else sigma)))

    z = noise((2,), range(3), dtype=F64)
    sigmas = torch.tensor([math.inf, 9.0, 3.0, 1.0], dtype=F64)
    whole = list(trace(flow, z, sigmas, LMS(4)))
    tail = list(trace(flow, whole[0].step.x_next, sigmas[1:], LMS(4)))
    assert whole[0].step.memory == ()
    for a, b in zip(whole[1:], tail, strict=True):
        assert torch.equal(a.step.x_next, b.step.x_next)


HISTORIES = [IPNDM(4), LMS(4), DEIS(4), DPMpp(3), UniPC(3), RES(4), PNDM(), SPNDM(), SDE(3, 0.0), DPMS(3, nodes="grid")]


@pytest.mark.parametrize("solver", HISTORIES, ids=lambda s: type(s).__name__)
def test_memory_is_per_sample_and_follows_its_rows(solver):
    """Axis 0 of every tensor is the batch, so rows of a run can be taken out and go on alone."""
    D, sigmas = mixture(), polynomial(9, LOW, HIGH, zero=False)
    x, memory = start(D, count=5, sigma=HIGH), ()
    rows = torch.tensor([3, 0])
    for i in range(9):
        span = Span(i, 9, sigmas[i], sigmas[i + 1])
        step = solver.step(D, x, span, memory)
        assert all(len(m) == 5 for m in step.memory)
        part = solver.step(D, x[rows], span, tuple(m[rows] for m in memory))
        torch.testing.assert_close(part.x_next, step.x_next[rows], rtol=1e-12, atol=1e-12)
        x, memory = step.x_next, step.memory


@pytest.mark.parametrize("solver", HISTORIES, ids=lambda s: type(s).__name__)
def test_an_empty_batch_is_no_mistake(solver):
    D = mixture()
    assert sample(D, start(D)[:0], polynomial(9), solver).shape == (0, 2)


@pytest.mark.parametrize("inner", HISTORIES, ids=lambda s: type(s).__name__)
def test_wrappers_pass_memory_through(inner):
    """Ancestral noise and churn around a multistep solver use its history: another order gives another sample."""
    D, sigmas, seeds = mixture(), polynomial(9, LOW, HIGH), range(4)
    for wrap in (lambda s: Ancestral(s, eta=0.3), lambda s: Churn(s, s_churn=2.0), AFS):
        run_ = list(trace(D, start(D, sigma=HIGH), sigmas, wrap(inner), seeds))
        assert any(t.step.memory for t in run_)
        assert all(torch.isfinite(t.step.x_next).all() for t in run_)
        euler = sample(D, start(D, sigma=HIGH), sigmas, wrap(Euler()), seeds)
        assert not torch.allclose(run_[-1].step.x_next, euler)


def test_ancestral_noise_with_a_multistep_solver_inside_keeps_the_law():
    """N(0, 0.5) in 20,000 coordinates: the variance comes out within 4 standard errors of 0.5 plus a step's error."""
    from fanal.exact import Gaussian

    n = 20_000
    D, sigmas = Gaussian(torch.zeros(n), 0.5), polynomial(60, 0.01, 20.0)
    x = noise((n,), [3], math.sqrt(400.5), dtype=F64)
    for inner in (DPMpp(2), UniPC(2), LMS(2)):
        got = float(sample(D, x, sigmas, Ancestral(inner, eta=0.5), [3]).var())
        assert abs(got - 0.5) < 4 * 0.5 * math.sqrt(2 / n) + 0.015


def test_unipc_corrects_what_it_predicted_and_nothing_else():
    """A change of the state between steps stays; a run that was led elsewhere is not corrected."""
    D, sigmas = mixture(), polynomial(9, LOW, HIGH, zero=False)
    solver = UniPC(2)
    run_ = list(trace(D, start(D, sigma=HIGH), sigmas, solver))
    memory, span = run_[3].step.memory, run_[4].span
    frozen = D(run_[4].x, span.sigma)
    plain = solver.step(lambda x, s: frozen, run_[4].x, span, memory)
    moved = solver.step(lambda x, s: frozen, run_[4].x + 0.25, span, memory)
    shift = 0.25 * span.sigma_next / span.sigma
    torch.testing.assert_close(moved.x_next, plain.x_next + shift, rtol=1e-12, atol=1e-12)
    up = dataclasses.replace(span, sigma=span.sigma * 1.1)
    elsewhere = solver.step(lambda x, s: frozen, run_[4].x, up, memory)
    alone = UniPC(2).step(lambda x, s: frozen, run_[4].x, up, (torch.full((4,), math.nan, dtype=F64), *memory[1:]))
    assert torch.equal(elsewhere.x_next, alone.x_next)


def test_unipc_is_corrected_but_for_the_last_step():
    """Without the correction it would be the exponential Adams–Bashforth method of the same order."""
    D, sigmas = mixture(), polynomial(9, LOW, HIGH, zero=False)
    corrected = last_states(UniPC(2, "vary"), sigmas)
    plain = last_states(RES(2), sigmas)
    assert torch.equal(corrected[0], plain[0])
    assert all(not torch.equal(a, b) for a, b in zip(corrected[1:], plain[1:], strict=True))
    exact = run(D, start(D, sigma=HIGH), polynomial(400, LOW, HIGH, zero=False), Heun())
    assert float((corrected[-1] - exact).norm()) < float((plain[-1] - exact).norm())


def test_variants_of_unipc_agree_where_their_weights_are_exact():
    """In the predictor from three values on; they start differently."""
    nodes = (0.0, -0.8, -2.0)
    bh1, bh2, vary = (UniPC(3, v)._weights(nodes, 0.7) for v in ("bh1", "bh2", "vary"))
    assert bh1 == pytest.approx(bh2)
    assert bh2 == pytest.approx(vary)


@pytest.mark.parametrize("order", [1, 2])
def test_dpms_on_its_own_nodes_is_the_named_solver(order):
    D, sigmas = mixture(), polynomial(9, LOW, HIGH)
    same = {1: Euler(), 2: DPM2()}[order]
    a, b = (sample(D, start(D, sigma=HIGH), sigmas, s) for s in (DPMS(order), same))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    data = sample(D, start(D, sigma=HIGH), sigmas, DPMS(2, predict="data"))
    torch.testing.assert_close(data, sample(D, start(D, sigma=HIGH), sigmas, DPMpp2S()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("calls", [6, 7, 8, 9, 10])
def test_dpm_solver_fast_makes_the_calls_it_was_given(calls):
    """As it is written (Lu et al. 2022, arXiv:2206.00927, alg. 3): blocks of the noise form, uniform in log sigma."""

    def phi(h):
        return (h.exp() - 1) / h - 1

    D = Counted(mixture())
    blocks = calls // 3 + 1
    orders = {0: [3] * (blocks - 2) + [2, 1], 1: [3] * (blocks - 1) + [1], 2: [3] * (blocks - 1) + [2]}[calls % 3]
    assert sum(orders) == calls
    grid = logsnr(blocks, LOW, HIGH, zero=False)
    want = start(D, sigma=HIGH)
    for a, b, order in zip(grid, grid[1:], orders, strict=False):
        h, x = (a / b).log(), want
        nodes = [a * (-h * k / order).exp() for k in range(1, order)]
        d = slope(x, D(x, a), a)
        want = x - b * h.expm1() * d
        if order == 2:
            u = x - nodes[0] * (h / 2).expm1() * d
            want = want - b * h.expm1() * (slope(u, D(u, nodes[0]), nodes[0]) - d)
        if order == 3:
            u = x - nodes[0] * (h / 3).expm1() * d
            first = slope(u, D(u, nodes[0]), nodes[0]) - d
            u = x - nodes[1] * ((2 * h / 3).expm1() * d + 2 * phi(2 * h / 3) * first)
            want = want - b * 1.5 * phi(h) * (slope(u, D(u, nodes[1]), nodes[1]) - d)
    before = D.calls
    found = sample(D, start(D, sigma=HIGH), grid, DPMS(3, calls=calls))
    assert (before, D.calls - before) == (calls, calls)
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


def test_calls_that_the_steps_cannot_make_are_told():
    D, grid = mixture(), logsnr(3, LOW, HIGH, zero=False)
    for calls in (2, 10):
        with pytest.raises(FanalError, match=f"make 3 to 9 calls, not {calls}"):
            sample(D, start(D, sigma=HIGH), grid, DPMS(3, calls=calls))
    with pytest.raises(FanalError, match="own nodes"):
        DPMS(3, nodes="grid", calls=5)


def test_karras_general_second_order_step_has_heun_and_midpoint_in_it():
    D, sigmas = mixture(), polynomial(9, LOW, HIGH)
    a, b = (sample(D, start(D, sigma=HIGH), sigmas, s) for s in (DPM2(1.0, "sigma"), Heun()))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_spndm_and_plms_are_pndm_with_a_first_step_by_heun():
    D, sigmas = mixture(), polynomial(9, LOW, HIGH, zero=False)
    a, b = (last_states(s, sigmas) for s in (SPNDM(), Heun()))
    torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-12)
    two = last_states(PNDM(2, "heun"), sigmas)
    assert all(torch.equal(x, y) for x, y in zip(a, two, strict=True))
    later = last_states(IPNDM(2), sigmas)
    assert not torch.allclose(a[-1], later[-1])
    counted = Counted(D)
    sample(counted, start(D, sigma=HIGH), sigmas, PNDM(warmup="heun"))
    assert counted.calls == 10


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: IPNDM(5), "ipndm has orders 1 to 4, got 5"),
        (lambda: LMS(0), "lms has orders 1 to 4"),
        (lambda: LMS(True), "orders"),
        (lambda: DEIS(2.5), "orders"),
        (lambda: DPMpp(4), "dpmpp has orders 1 to 3"),
        (lambda: RES(4, "singlestep"), "orders 1 to 3"),
        (lambda: DEIS(2, "taB"), "did you mean 'tab'"),
        (lambda: DPMpp(2, "mid"), "midpoint"),
        (lambda: UniPC(2, "bh3"), "bh1, bh2"),
        (lambda: UniPC(2, predict="eps"), "data, noise"),
        (lambda: DPMS(2, nodes="mine"), "grid, own"),
        (lambda: PNDM(warmup="euler"), "heun, rk4"),
        (lambda: PNDM(times=3), "Timesteps"),
        (lambda: DPMpp(2, lower_final="sometimes"), 'lower_final is "always", "never" or'),
        (lambda: DPMpp(2, lower_final=0), "lower_final"),
        (lambda: DPMpp(2, lower_final=True), "lower_final"),
        (lambda: DPM2(0.0), "r in"),
        (lambda: DPM2(1.5), "r in"),
        (lambda: DPM2(middle="half"), "log, sigma"),
        (lambda: DPMpp2S(math.nan), "r in"),
        (lambda: SDE(4), "orders"),
    ],
)
def test_bad_options_are_refused(make, match):
    with pytest.raises(FanalError, match=match):
        make()
