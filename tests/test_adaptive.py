"""Error control against scipy's DOP853 and closed forms; counts, purity, and tolerances that cannot be met."""

import math

import numpy as np
import pytest
import torch

from fanal.adaptive import PAIRS, sample_adaptive, trace_adaptive
from fanal.denoiser import Counted
from fanal.errors import FanalError, NonFiniteError
from fanal.sampling import sample
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import RK4
from fanal.trajectory import Trajectory
from problems import gaussian, mixture, reference, scattered, start

F64 = torch.float64
HIGH, LOW = 80.0, 0.002
every_form = pytest.mark.parametrize("log", [True, False], ids=["log", "sigma"])
every_pair = pytest.mark.parametrize("pair", PAIRS)


@pytest.fixture(scope="module")
def problems():
    """Mixtures, starts and the ends of their trajectories."""
    found = {}
    for name, D in (("plane", mixture()), ("48", scattered())):
        x = noise(D.shape, range(8), HIGH, dtype=F64)
        found[name] = D, x, reference(D, x, HIGH, LOW)
    return found


@every_form
@every_pair
@pytest.mark.parametrize("name", ["plane", "48"])
def test_the_error_follows_the_tolerance(name, pair, log, problems):
    """Against DOP853 at 1e-12: within 20 tolerances at each, and a hundredth of the tolerance is well below a tenth."""
    D, x, exact = problems[name]
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7)[: 2 if pair == "bs32" else 3]:
        end = sample_adaptive(D, x, [HIGH, LOW], rtol=tolerance, atol=tolerance, pair=pair, log=log)
        errors.append(float((end - exact).abs().max()))
        assert errors[-1] < 20 * tolerance * float(exact.abs().max().clamp(min=1))
    assert all(b < a / 10 for a, b in zip(errors, errors[1:], strict=False))


@every_form
@every_pair
def test_every_accepted_step_is_within_the_tolerance(pair, log, problems):
    D, x, _ = problems["plane"]
    for t in trace_adaptive(D, x, [HIGH, LOW], rtol=1e-3, pair=pair, log=log):
        assert t.step.info["error"].shape == (8,)
        assert float(t.step.info["error"].max()) <= 1


def test_the_estimate_is_the_error_of_the_lower_order_method():
    """One step with a known difference: both methods written out by numpy from the tableau."""
    D, pair = gaussian(), PAIRS["dopri5"]
    x = start(D)
    run = list(trace_adaptive(D, x, [3.0, 2.99999], rtol=1e-3, atol=1e-3, log=False))
    assert len(run) == 1
    h = 2.99999 - 3.0
    slopes = []
    rows = [(0.0, ()), *zip(pair.nodes, pair.stages, strict=True)]
    for node, row in rows:
        y = x + h * sum((w * k for w, k in zip(row, slopes, strict=True)), torch.zeros_like(x))
        sigma = torch.tensor(3.0 + node * h, dtype=F64)
        slopes.append((y - D(y, sigma)) / sigma)
    torch.testing.assert_close(run[0].step.x_next, y, rtol=1e-14, atol=1e-14)
    low = [5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40]
    other = x + h * sum(w * k for w, k in zip(low, slopes, strict=True))
    want = ((y - other) / (1e-3 + 1e-3 * torch.maximum(x.abs(), y.abs()))).square().mean(1).sqrt()
    torch.testing.assert_close(run[0].step.info["error"], want, rtol=1e-3, atol=1e-12)


@every_pair
def test_the_tableaux_are_consistent_and_of_their_order(pair):
    """Rows sum to their node; the quadrature conditions hold to the order, for both methods of the pair."""
    table = PAIRS[pair]
    for node, row in zip(table.nodes, table.stages, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    nodes = np.array([0.0, *table.nodes])
    high = np.array([*table.stages[-1], 0.0])
    for q in range(1, table.order + 1):
        assert high @ nodes ** (q - 1) == pytest.approx(1 / q, abs=1e-13)
        if q < table.order:
            assert np.array(table.error) @ nodes ** (q - 1) == pytest.approx(0.0, abs=1e-13)


@pytest.mark.parametrize(("pair", "calls"), [("bs32", 3), ("dopri5", 6)])
def test_calls_are_counted(pair, calls):
    """One to begin with; the last stage of a step is the first of the next; a rejected step costs as much."""
    D = Counted(mixture())
    run = list(trace_adaptive(D, start(D), [10.0, 0.01], pair=pair))
    assert D.calls >= 1 + calls * len(run)
    assert (D.calls - 1) % calls == 0
    into_zero = Counted(mixture())
    more = list(trace_adaptive(into_zero, start(D), [10.0, 0.01, 0.0], pair=pair))
    assert len(more) == len(run) + 1
    assert into_zero.calls == D.calls


@every_form
def test_transitions_join_and_reach_every_node(log):
    D, nodes = mixture(), [10.0, 3.0, 0.5, 0.01, 0.0]
    run = list(trace_adaptive(D, start(D), nodes, log=log))
    ends = [float(t.span.sigma) for t in run] + [float(run[-1].span.sigma_next)]
    assert set(nodes) <= set(ends)
    assert all(a > b for a, b in zip(ends, ends[1:], strict=False))
    for i, (a, b) in enumerate(zip(run, run[1:], strict=False)):
        assert a.step.x_next is b.x
        assert float(a.span.sigma_next) == float(b.span.sigma)
        assert (a.span.i, a.span.n) == (i, i + 1)
    for t in run:
        torch.testing.assert_close(t.step.denoised, D(t.x, t.span.sigma), rtol=0, atol=0)
    assert torch.equal(run[-1].step.x_next, run[-1].step.denoised)


def test_a_run_can_be_recorded():
    D = mixture()
    kept = Trajectory.record(trace_adaptive(D, start(D), [10.0, 0.01, 0.0]))
    assert kept.x.shape[0] == len(kept.sigmas) == len(kept.denoised) + 1
    assert kept.info["error"].shape == (len(kept.denoised), 4)
    assert bool(torch.isnan(kept.info["error"][-1]).all())  # the step into 0 has no estimate


@every_form
def test_up_and_down_again(log):
    D = gaussian()
    clean = start(D, sigma=0.5)
    up = sample_adaptive(D, clean, [0.1, 10.0], rtol=1e-8, atol=1e-8, log=log)
    exact = D.solution(clean, torch.tensor(0.1, dtype=F64), torch.tensor(10.0, dtype=F64))
    torch.testing.assert_close(up, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        sample_adaptive(D, up, [10.0, 0.1], rtol=1e-8, atol=1e-8, log=log), clean, rtol=1e-6, atol=1e-6
    )


def test_from_infinity_the_first_step_is_eulers():
    class Flow:
        """One point of data, which knows infinity."""

        def __call__(self, x, sigma):
            return torch.full_like(x, 0.3)

    z = noise((2,), range(3), dtype=F64)
    run = list(trace_adaptive(Flow(), z, [math.inf, 50.0, 0.1, 0.0]))
    torch.testing.assert_close(run[0].step.x_next, 0.3 + 50.0 * z)
    torch.testing.assert_close(run[-1].step.x_next, torch.full_like(z, 0.3))


def test_it_needs_fewer_calls_than_a_fixed_method_of_high_order():
    """At an error of 1e-6 on the mixture: less than half of RK4's calls on the polynomial grid that gets there."""
    D, x = mixture(), noise((2,), range(8), HIGH, dtype=F64)
    exact = reference(D, x, HIGH, LOW)
    counted = Counted(D)
    end = sample_adaptive(counted, x, [HIGH, LOW], rtol=1e-6, atol=1e-7)
    assert float((end - exact).abs().max()) < 2e-6
    for steps in (50, 100, 200):
        fixed = sample(D, x, polynomial(steps, zero=False), RK4())
        if float((fixed - exact).abs().max()) < 2e-6:
            break
    assert counted.calls < 4 * steps / 2


def test_interleaved_runs_equal_separate_ones():
    D, nodes = mixture(), [10.0, 0.1]
    a, b = start(D), start(D, sigma=9.0).flip(0)
    alone = [[t.step.x_next for t in trace_adaptive(D, x, nodes)] for x in (a, b)]
    runs = [trace_adaptive(D, x, nodes) for x in (a, b)]
    for i in range(min(map(len, alone))):
        for k in range(2):
            assert torch.equal(next(runs[k]).step.x_next, alone[k][i])


def test_a_smaller_batch_meets_the_tolerance_too():
    """All samples take the steps of the hardest, so company changes digits below the tolerance only."""
    D, x = mixture(), start(mixture(), count=6)
    whole = sample_adaptive(D, x, [10.0, 0.01], rtol=1e-6, atol=1e-7)
    parts = torch.cat([sample_adaptive(D, x[k : k + 2], [10.0, 0.01], rtol=1e-6, atol=1e-7) for k in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_an_empty_batch_takes_the_steps_it_can():
    D = mixture()
    assert sample_adaptive(D, start(D)[:0], [10.0, 0.1, 0.0]).shape == (0, 2)


def test_a_tolerance_below_the_networks_rounding_is_refused():
    D = mixture()
    x = start(D, dtype=torch.float32)
    assert sample_adaptive(D, x, [10.0, 0.01], rtol=1e-4, atol=1e-4).dtype == torch.float32
    with pytest.raises(FanalError, match="larger tolerance"):
        sample_adaptive(D, x, [10.0, 0.01], rtol=1e-11, atol=1e-12)


def test_a_run_that_gets_nowhere_is_given_up(monkeypatch):
    """A denoiser that jumps everywhere lets no step grow."""
    monkeypatch.setattr("fanal.adaptive._MOST", 50)
    x = start(mixture())
    with pytest.raises(FanalError, match="gave up at sigma"):
        sample_adaptive(lambda x, sigma: (1e9 * x).sin(), x, [10.0, 0.01], rtol=1e-9, atol=1e-9)


def test_nan_is_named():
    def broken(x, sigma):
        return x * math.nan if float(sigma) < 1 else x / 2

    with pytest.raises(NonFiniteError, match="samples"):
        sample_adaptive(broken, start(mixture()), [10.0, 0.1])


@pytest.mark.parametrize(
    ("sigmas", "options", "match"),
    [
        ([10.0, 0.0], {}, "between the ends"),
        ([math.inf, 10.0], {}, "between the ends"),
        ([10.0, 20.0, 5.0], {}, "monotone"),
        ([10.0, 0.1], {"rtol": -1.0}, "tolerances"),
        ([10.0, 0.1], {"rtol": 0.0, "atol": 0.0}, "tolerances"),
        ([10.0, 0.1], {"rtol": math.nan}, "tolerances"),
        ([10.0, 0.1], {"pair": "dopri"}, "did you mean 'dopri5'"),
    ],
)
def test_refusals(sigmas, options, match):
    D = mixture()
    with pytest.raises(FanalError, match=match):
        sample_adaptive(D, start(D), sigmas, **options)
    with pytest.raises(FanalError, match="floating-point batch"):
        sample_adaptive(D, torch.zeros(3, dtype=torch.int64), [10.0, 0.1])
