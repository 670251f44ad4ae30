"""The loop: pure steps, independent samples, every interval through the solver, errors that say where."""

import dataclasses
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fanal.errors import FanalError, NonFiniteError
from fanal.sampling import Solver, Span, Step, finish, sample, toward, trace
from fanal.schedules import polynomial
from fanal.solvers import SOLVERS, Ancestral, Churn, Euler, Heun
from problems import mixture, observed_order, quiet, start

F64 = torch.float64
GRID = polynomial(9, 0.01, 10.0)
every_solver = pytest.mark.parametrize("name", SOLVERS)


def tensors_of(step):
    return [step.x_next, step.denoised, *step.memory, *step.info.values()]


@every_solver
def test_a_step_taken_twice_is_the_same_step(name):
    """Replayed from the recorded state and memory, after the run has finished."""
    D, solver = mixture(), SOLVERS[name]()
    memory = ()
    for t in list(trace(D, start(D), GRID, solver, range(4))):
        before = t.x.clone(), [m.clone() for m in memory]
        again = solver.step(D, t.x, t.span, memory)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(t.step), tensors_of(again), strict=True))
        assert torch.equal(t.x, before[0])
        assert all(torch.equal(a, b) for a, b in zip(memory, before[1], strict=True))
        memory = t.step.memory


@every_solver
def test_interleaved_traces_equal_separate_ones(name):
    """One solver object, two runs at once."""
    D, solver = mixture(), SOLVERS[name]()
    starts = start(D), start(D, sigma=9.0).flip(0)
    seeds = range(4), range(10, 14)
    alone = [[t.step.x_next for t in trace(D, x, GRID, solver, s)] for x, s in zip(starts, seeds, strict=True)]
    runs = [trace(D, x, GRID, solver, s) for x, s in zip(starts, seeds, strict=True)]
    for i, (a, b) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(a.step.x_next, alone[0][i])
        assert torch.equal(b.step.x_next, alone[1][i])


@every_solver
def test_splitting_the_batch_changes_rounding_only(name):
    D, solver = mixture(), SOLVERS[name]()
    x, seeds = start(D, count=7), range(20, 27)
    whole = sample(D, x, GRID, solver, seeds)
    parts = [sample(D, x[a:b], GRID, solver, seeds[a:b]) for a, b in ((0, 1), (1, 5), (5, 7))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@every_solver
def test_permuting_the_batch_permutes_the_result(name):
    D, solver = mixture(), SOLVERS[name]()
    x, order = start(D, count=6), torch.tensor([3, 0, 5, 1, 4, 2])
    whole = sample(D, x, GRID, solver, range(6))
    torch.testing.assert_close(sample(D, x[order], GRID, solver, order), whole[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in SOLVERS if n in ("ddpm", "ancestral", "churn")])
def test_noise_follows_seeds_and_round(name):
    D, solver = mixture(), SOLVERS[name]()
    x = start(D)
    plain = sample(D, x, GRID, solver, range(4))
    assert torch.equal(sample(D, x, GRID, solver, range(4)), plain)
    other = sample(D, x, GRID, solver, [0, 1, 2, 9])
    assert torch.equal(other[:3], plain[:3])
    assert not torch.allclose(other[3], plain[3])
    again = list(trace(D, x, GRID, solver, range(4), round=1))[-1].step.x_next
    assert not torch.allclose(again, plain)


@every_solver
def test_the_global_random_state_is_left_alone(name):
    D = mixture()
    before = torch.get_rng_state()
    sample(D, start(D), GRID, SOLVERS[name](), range(4))
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class Recording:
    """Passes every step through and writes it down."""

    solver: Solver
    log: list = field(default_factory=list)

    def step(self, denoiser, x, span, memory=()):
        step = self.solver.step(denoiser, x, span, memory)
        self.log.append((span, memory, step))
        return step


@every_solver
def test_a_wrapper_sees_every_interval_and_changes_nothing(name):
    D, recording = mixture(), Recording(SOLVERS[name]())
    plain = list(trace(D, start(D), GRID, SOLVERS[name](), range(4)))
    wrapped = list(trace(D, start(D), GRID, recording, range(4)))
    assert len(recording.log) == len(wrapped) == len(GRID) - 1
    for i, (a, b) in enumerate(zip(plain, wrapped, strict=True)):
        assert torch.equal(a.step.x_next, b.step.x_next)
        span, memory, step = recording.log[i]
        assert (span.i, span.n, span.seeds) == (i, 9, (0, 1, 2, 3))
        assert (float(span.sigma), float(span.sigma_next)) == (float(GRID[i]), float(GRID[i + 1]))
        assert span.sigma.dtype == F64
        assert memory == (recording.log[i - 1][2].memory if i else ())


@dataclass(frozen=True)
class TwoStep:
    """Adams–Bashforth of second order: the smallest solver that needs its memory."""

    def step(self, denoiser, x, span, memory=()):
        denoised = denoiser(x, span.sigma)
        now, h = (x - denoised) / span.sigma, span.sigma_next - span.sigma
        if not memory:
            return Step(x + h * now, denoised, (now, h.expand(len(x))))
        before, h_before = memory
        tilt = (h / (2 * h_before))[:, None]
        return Step(x + h * (now + tilt * (now - before)), denoised, (now, h.expand(len(x))))


def test_memory_comes_back_to_the_solver_that_wrote_it():
    """() at the first step of every run, then what the last step returned; with it the order is 2, without it 1."""
    D, recording = mixture(), Recording(TwoStep())
    for _ in range(2):
        recording.log.clear()
        list(trace(D, start(D), GRID[:-1], recording))
        assert recording.log[0][1] == ()
        for a, b in zip(recording.log, recording.log[1:], strict=False):
            assert b[1] is a[2].memory
    fine = sample(D, start(D), polynomial(800, 0.1, 10.0, zero=False), Heun())
    steps = [50, 100, 200]
    ends = [sample(D, start(D), polynomial(n, 0.1, 10.0, zero=False), TwoStep()) for n in steps]
    assert observed_order(steps, [float((end - fine).norm()) for end in ends]) > 1.8


def test_transitions_join():
    D = mixture()
    run = list(trace(D, start(D), GRID, Heun()))
    assert torch.equal(run[0].x, start(D))
    for a, b in zip(run, run[1:], strict=False):
        assert b.x is a.step.x_next
        assert b.span.sigma == a.span.sigma_next


def test_stopping_early_asks_for_nothing_more():
    calls = []
    D = mixture()
    for t in trace(lambda x, s: (calls.append(float(s)), D(x, s))[1], start(D), GRID, Euler()):
        if t.span.i == 2:
            break
    assert calls == GRID[:3].tolist()


def test_sample_is_the_end_of_the_trace_without_gradients():
    D = mixture()
    x = start(D).requires_grad_()
    end = sample(D, x, GRID, Heun())
    assert torch.equal(end, list(trace(D, x, GRID, Heun()))[-1].step.x_next)
    assert not end.requires_grad
    assert torch.is_grad_enabled()
    assert next(trace(D, x, GRID, Euler())).step.x_next.requires_grad
    with torch.no_grad():
        for t in trace(D, x, GRID, Euler()):
            assert not t.step.x_next.requires_grad


@given(sigma=st.floats(1e-3, 100.0), ratio=st.floats(0.0, 3.0), x=st.floats(-100, 100), d=st.floats(-5, 5))
def test_toward_is_the_euler_step(sigma, ratio, x, d):
    x, d, a, b = (torch.tensor(v, dtype=F64) for v in (x, d, sigma, sigma * ratio))
    torch.testing.assert_close(toward(x, d, a, b), x + (b - a) * (x - d) / a, rtol=1e-12, atol=1e-11)
    assert torch.equal(toward(x, d, a, torch.zeros((), dtype=F64)), d)


def test_finish_is_the_denoised_prediction():
    D = mixture()
    sigma = torch.tensor(0.3, dtype=F64)
    step = finish(D, start(D), Span(0, 1, sigma, torch.zeros((), dtype=F64)))
    assert torch.equal(step.x_next, D(start(D), sigma))
    assert torch.equal(step.denoised, step.x_next)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_solver
def test_dtype_is_that_of_x(name, dtype):
    D = mixture()
    for t in trace(D, start(D, dtype=dtype), GRID, SOLVERS[name](), range(4)):
        assert all(v.dtype == dtype for v in (t.step.x_next, t.step.denoised))


@every_solver
def test_image_shapes_run_as_flat_ones(name):
    """The same numbers whatever the shape of a sample."""
    D = mixture()
    flat = sample(D, start(D), GRID, SOLVERS[name](), range(4))
    shaped = sample(
        lambda x, s: D(x.flatten(1), s).reshape(x.shape), start(D).reshape(4, 1, 2, 1), GRID, SOLVERS[name](), range(4)
    )
    assert torch.equal(shaped.flatten(1), flat)


@every_solver
def test_nan_is_named_by_step_sigma_and_seed(name):
    """Sample 2 breaks once sigma is 1 or below."""

    D, solver, seen = mixture(), quiet(name), []

    def broken(x, sigma):
        seen.append(float(sigma))
        out = D(x, sigma)
        out[2] = math.nan if sigma <= 1.0 else out[2]
        return out

    def healthy(x, sigma):
        seen.append(float(sigma))
        return D(x, sigma)

    grid = torch.tensor([10.0, 5.0, 1.0, 0.5, 0.1], dtype=F64)
    at = next(t.span.i for t in trace(healthy, start(D), grid, solver, range(7, 11)) if seen and seen[-1] <= 1.0)
    with pytest.raises(NonFiniteError) as caught:
        sample(broken, start(D), grid, solver, range(7, 11))
    message = str(caught.value)
    assert f"step {at} of 4" in message
    assert f"sigma {grid[at]:g} to {grid[at + 1]:g}" in message
    assert "1 of 4 samples" in message
    assert "seeds [9]" in message


def test_infinity_without_seeds_is_named_by_sample():
    x = start(mixture())
    x[1, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"step 0 of 9.*samples \[1\]"):
        sample(mixture(), x, GRID, Euler())


@pytest.mark.parametrize("wrong", [lambda x: x[:1], lambda x: x[..., None], lambda x: x.mean(1), lambda x: (x, x)])
@every_solver
def test_a_wrong_shape_is_refused(name, wrong):
    """Broadcasting would hide it."""
    with pytest.raises(FanalError, match="shape of x"):
        sample(lambda x, s: wrong(x), start(mixture()), GRID, SOLVERS[name](), range(4))


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4), torch.tensor(1.0), [[1.0, 2.0]], torch.zeros(4, 2) > 0]
)
def test_x_must_be_a_floating_batch(x):
    with pytest.raises(FanalError, match="floating-point batch"):
        sample(mixture(), x, GRID, Euler())


@pytest.mark.parametrize("sigmas", [[3.0, 1.0, 2.0], [1.0], [0.0, 1.0], [2.0, math.nan], [2.0, -1.0]])
def test_sigmas_must_be_a_schedule(sigmas):
    with pytest.raises(FanalError, match="sigmas|grid"):
        sample(mixture(), start(mixture()), sigmas, Euler())


def test_seeds_must_match_the_batch():
    with pytest.raises(FanalError, match="one seed per sample"):
        sample(mixture(), start(mixture()), GRID, Euler(), range(3))
    with pytest.raises(FanalError, match="whole numbers"):
        sample(mixture(), start(mixture()), GRID, Euler(), [0, 1, 2, -1])


@every_solver
def test_solvers_are_frozen(name):
    solver = SOLVERS[name]()
    assert dataclasses.is_dataclass(solver)
    for f in dataclasses.fields(solver):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(solver, f.name, None)
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        solver.state = 1


def test_another_dtype_is_refused():
    with pytest.raises(FanalError, match="dtype of x"):
        sample(lambda x, sigma: x.double(), torch.ones(2, 3), polynomial(3), Euler())


def test_solvers_that_draw_nothing_also_encode():
    up = polynomial(5, zero=False).flip(0)
    x = torch.ones(2, 2, dtype=torch.float64)
    for silent, inner in ((Ancestral(Heun(), eta=0.0), Heun()), (Churn(Heun(), s_churn=0.0), Heun())):
        assert torch.equal(sample(mixture(), x, up, silent), sample(mixture(), x, up, inner))
    with pytest.raises(FanalError, match="runs down"):
        sample(mixture(), x, up, Ancestral(eta=1.0), seeds=range(2))


@pytest.mark.parametrize(
    ("solver", "told"), [("euler", "'euler'"), (Euler, "the class Euler: call it"), (None, "None")]
)
def test_what_is_no_solver_is_refused(solver, told):
    with pytest.raises(FanalError, match=told):
        sample(mixture(), torch.ones(2, 2), polynomial(3), solver)


def test_samples_of_another_shape_than_the_models_are_refused():
    with pytest.raises(FanalError, match=r"shape \(2,\), x has \(3,\)"):
        sample(mixture(), torch.ones(2, 3), polynomial(3), Euler())
