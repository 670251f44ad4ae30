"""The analytical first step: one call less at the first node of a plain run, and nothing else changed."""

import math

import pytest
import torch

from fanal.denoiser import Counted, Model
from fanal.exact import Gaussian
from fanal.sampling import Span, sample, trace
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import AFS, IPNDM, SOLVERS, AnalyticAbove, Euler, Heun
from problems import DETERMINISTIC, mixture, quiet, start

F64 = torch.float64
GRID = polynomial(9, 0.01, 80.0)


@pytest.mark.parametrize("sigma", [1.0, 80.0, 1e6])
def test_the_answer_is_x_minus_sigma_times_unit_noise(sigma):
    """`D = x − sigma·x/√(1 + sigma²)`, without its cancellation: against 40 digits."""
    import mpmath

    x = torch.tensor([[sigma]], dtype=F64)
    got = float(AnalyticAbove(mixture(), sigma)(x, torch.tensor(sigma, dtype=F64)))
    with mpmath.workdps(40):
        want = float(mpmath.mpf(sigma) * (1 - sigma / mpmath.sqrt(1 + mpmath.mpf(sigma) ** 2)))
    assert got == pytest.approx(want, rel=1e-14)


def test_below_its_sigma_the_denoiser_is_asked():
    D = Counted(mixture())
    wrapped, x = AnalyticAbove(D, 10.0), start(D)
    wrapped(x, torch.tensor(10.0, dtype=F64))
    assert D.calls == 0
    assert torch.equal(wrapped(x, torch.tensor(9.99, dtype=F64)), mixture()(x, torch.tensor(9.99, dtype=F64)))
    assert D.calls == 1
    assert isinstance(wrapped, Model)


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n != "afs"])
def test_it_saves_one_call_with_every_solver(name):
    """And the first step is the inner solver's with the analytic answer; the rest is the inner solver's own."""
    plain, saved = Counted(mixture()), Counted(mixture())
    sample(plain, start(plain, sigma=80.0), GRID, quiet(name))
    run = list(trace(saved, start(saved, sigma=80.0), GRID, AFS(quiet(name))))
    # Taylor's method asks twice at the first node
    assert saved.calls == plain.calls - (2 if name == "taylor2" else 1)
    span = Span(0, 9, GRID[0], GRID[1])
    x = start(saved, sigma=80.0)
    step = quiet(name).step(AnalyticAbove(mixture(), 80.0), x, span, ())
    assert torch.equal(run[0].step.x_next, step.x_next)
    assert not torch.allclose(run[0].step.denoised, mixture()(x, GRID[0]))
    for before, t in zip(run, run[1:], strict=False):
        again = quiet(name).step(mixture(), t.x, t.span, before.step.memory)
        assert torch.equal(t.step.x_next, again.x_next)


def test_it_costs_little_where_x_is_noise():
    """On data of unit variance at sigma = 80 the answer is nearly right: ends move by less than a thousandth."""
    D = Gaussian(torch.zeros(3), 1.0)
    x = noise((3,), range(6), 80.0, dtype=F64)
    sigmas = polynomial(30, zero=False)
    a, b = (sample(D, x, sigmas, s) for s in (Heun(), AFS(Heun())))
    assert float((a - b).abs().max()) < 1e-3
    assert not torch.equal(a, b)


def test_it_acts_on_the_first_interval_of_a_plain_run_down_only():
    D = Counted(mixture())
    x = start(D)
    down, up = (torch.tensor(v, dtype=F64) for v in (3.0, 12.0))
    here = torch.tensor(10.0, dtype=F64)
    for span in (
        Span(1, 9, here, down),
        Span(0, 9, here, down, round=1),
        Span(0, 9, here, up),
        Span(0, 1, here, torch.tensor(0.0, dtype=F64)),
    ):
        before = D.calls
        AFS().step(D, x, span)
        assert D.calls == before + 1
    AFS().step(D, x, Span(0, 9, here, down))
    assert D.calls == 4


def test_each_noise_level_of_a_batch_lies_on_one_side():
    x = start(mixture())
    levels = torch.full((4,), 20.0, dtype=F64)
    got = AnalyticAbove(mixture(), 10.0)(x, levels)
    torch.testing.assert_close(got, AnalyticAbove(mixture(), 10.0)(x, torch.tensor(20.0, dtype=F64)))


def test_it_is_named_on_the_command_line():
    from fanal.config import build_solver

    assert SOLVERS["afs"]() == AFS(Euler())
    assert build_solver("afs:solver=ipndm") == AFS(IPNDM())
    assert (
        math.isclose(float(AFS().step(mixture(), start(mixture()), Span(0, 2, *GRID[:2])).x_next.abs().max()), 0.0)
        is False
    )
