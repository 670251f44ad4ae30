"""Schedules against the printed ones, their closed forms and diffusers' tables."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fanal import schedules
from fanal.errors import FanalError
from fanal.schedules import SCHEDULES, check_sigmas, from_timesteps, jump

TABLE9 = json.loads((Path(__file__).parent / "figures" / "schedules_table9.json").read_text())
STEPS = range(3, 11)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["polynomial", "logsnr"])
def test_matches_printed_schedules(kind, steps):
    """[REG] table 9, to the last printed decimal."""
    got = SCHEDULES[kind](steps, zero=False)
    assert [round(value, 4) for value in got.tolist()] == TABLE9[kind][str(steps)]


@pytest.mark.parametrize("steps", STEPS)
def test_uniform_matches_printed_schedules(steps):
    """Table 9 was printed from float32 arithmetic, so its last digit is not reliable."""
    printed = torch.tensor(TABLE9["uniform"][str(steps)], dtype=torch.float64)
    assert (schedules.uniform(steps, zero=False) - printed).abs().max() <= 1.5e-4


def test_uniform_is_vp_uniform():
    """The integral of beta up to u, log(1 + sigma²), is a quadratic without constant in equally spaced u."""
    u = torch.linspace(1, 1e-3, 12, dtype=torch.float64)
    level = torch.log1p(schedules.uniform(11, zero=False) ** 2) / u  # β_d·u/2 + β_min
    slope = level.diff() / u.diff()
    torch.testing.assert_close(slope, slope[:1].expand(11), rtol=1e-9, atol=0)


def test_quadratic_is_uniform_with_power_two():
    assert torch.equal(schedules.quadratic(9), schedules.uniform(9, power=2.0))
    ramp = torch.linspace(1, math.sqrt(1e-3), 10, dtype=torch.float64) ** 2
    level = torch.log1p(schedules.quadratic(9, zero=False) ** 2) / ramp
    slope = level.diff() / ramp.diff()
    torch.testing.assert_close(slope, slope[:1].expand(9), rtol=1e-9, atol=0)


def test_cosine_is_uniform_in_its_own_time():
    """Invert `1/(1 + sigma²) = cos²φ(t)/cos²φ(0)` and look at the spacing of t."""
    offset = 0.008
    sigmas = schedules.cosine(20, 0.01, 50.0, offset, zero=False)
    base = math.cos(math.pi / 2 * offset / (1 + offset))
    t = torch.acos(base / (1 + sigmas**2).sqrt()) * 2 / math.pi * (1 + offset) - offset
    torch.testing.assert_close(t.diff(), t.diff().mean().expand(20), rtol=1e-9, atol=0)
    assert 0 < float(t[-1]) < float(t[0]) < 1


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_zero_form_is_the_shorter_grid_and_zero(kind, steps):
    with_zero = SCHEDULES[kind](steps, zero=True)
    assert len(with_zero) == steps + 1
    assert with_zero[0] == 80.0
    assert with_zero[-1] == 0
    if steps > 1:
        assert torch.equal(with_zero[:-1], SCHEDULES[kind](steps - 1, zero=False))


@given(
    kind=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 60),
    sigma_min=st.floats(1e-4, 0.02),
    sigma_max=st.floats(2.0, 500.0),
    zero=st.booleans(),
)
def test_every_maker_gives_a_schedule(kind, steps, sigma_min, sigma_max, zero):
    sigmas = SCHEDULES[kind](steps, sigma_min, sigma_max, zero=zero)
    assert torch.equal(check_sigmas(sigmas), sigmas)
    assert sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all()
    assert len(sigmas) == steps + 1
    assert sigmas[0] == sigma_max
    assert sigmas[-1] == (0 if zero else sigma_min)


@given(steps=st.integers(2, 40), low=st.floats(1e-3, 1.0), ratio=st.floats(1.5, 1e4), rho=st.floats(0.5, 30.0))
def test_polynomial_is_linear_in_its_root(steps, low, ratio, rho):
    roots = schedules.polynomial(steps, low, low * ratio, rho, zero=False) ** (1 / rho)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(steps), rtol=1e-6, atol=0)


@given(kind=st.sampled_from(sorted(SCHEDULES)), sigma_min=st.floats(1e-4, 10.0), ratio=st.floats(1.01, 1e4))
def test_a_maker_gives_a_schedule_or_an_error(kind, sigma_min, ratio):
    """VP time starts at 0.001, so a large sigma_min has no uniform grid; that must be said, not returned."""
    try:
        sigmas = SCHEDULES[kind](8, sigma_min, sigma_min * ratio)
    except FanalError:
        assume(kind in ("uniform", "quadratic"))
    else:
        check_sigmas(sigmas)


def test_uniform_refuses_a_sigma_min_that_vp_time_cannot_reach():
    with pytest.raises(FanalError, match="sigma_min"):
        schedules.uniform(10, sigma_min=0.5, sigma_max=10.0)


def test_from_timesteps_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps.long()
    got = from_timesteps(timesteps, scheduler.alphas_cumprod)
    torch.testing.assert_close(got, scheduler.sigmas.double(), rtol=1e-6, atol=0)
    assert len(from_timesteps(timesteps, scheduler.alphas_cumprod, zero=False)) == 20


@pytest.mark.parametrize(
    ("timesteps", "table", "match"),
    [
        ([5.5, 1.0], [0.5] * 10, "whole numbers"),
        ([], [0.5] * 10, "whole numbers"),
        ([12, 3], [0.5] * 10, r"\[0, 9\]"),
        ([3, -1], [0.5] * 10, r"\[0, 9\]"),
        ([3, 1], [1.0, 1.0, 0.5, 0.0], r"\(0, 1\)"),
        ([1, 2], [0.9, 0.5, 0.1], "monotone"),
    ],
)
def test_from_timesteps_refuses(timesteps, table, match):
    with pytest.raises(FanalError, match=match):
        from_timesteps(timesteps, table)


def test_jump_keeps_the_grid_up_to_the_first_node_at_or_below():
    grid = torch.tensor([80.0, 10.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    assert jump(grid, at=1.0).tolist() == [80.0, 10.0, 1.0, 0.0]
    assert jump(grid, at=0.99).tolist() == [80.0, 10.0, 1.0, 0.1, 0.0]
    assert jump(grid, at=1e9).tolist() == [80.0, 0.0]
    for bad in (0.01, 0.0, -1.0, math.nan):
        with pytest.raises(FanalError, match="jump"):
            jump(grid, at=bad)
    with pytest.raises(FanalError, match="decreasing"):
        jump(grid[:-1].flip(0), at=1.0)


@pytest.mark.parametrize(
    ("sigmas", "match"),
    [
        ([1.0], "at least two"),
        ([[2.0, 1.0]], "one-dimensional"),
        ([2.0, math.nan], r"sigmas\[1\] = nan"),
        ([2.0, math.inf], r"sigmas\[1\] = inf"),
        ([2.0, 1.0, -1.0], r"sigmas\[2\] = -1"),
        ([2.0, 1.0, 1.0], r"sigmas\[1\] = 1, sigmas\[2\] = 1"),
        ([3.0, 1.0, 2.0], r"sigmas\[1\] = 1, sigmas\[2\] = 2"),
        ([1.0, 2.0, 1.5], "strictly monotone"),
        ([0.0, 1.0], "above 0"),
    ],
)
def test_check_sigmas_names_the_entry(sigmas, match):
    with pytest.raises(FanalError, match=match):
        check_sigmas(sigmas)


def test_check_sigmas_keeps_gradients_and_widens():
    sigmas = torch.tensor([3.0, 1.0], requires_grad=True)
    grid = check_sigmas(sigmas)
    assert grid.dtype == torch.float64
    grid.sum().backward()
    assert sigmas.grad is not None
    assert check_sigmas([1, 2, 3]).tolist() == [1.0, 2.0, 3.0]


def test_lists_of_numbers_are_not_rounded_to_float32():
    assert check_sigmas([0.3, 0.1]).tolist() == [0.3, 0.1]
    assert from_timesteps([1, 0], [0.9, 0.1], zero=False).tolist() == [(0.9 / 0.1) ** 0.5, ((1 - 0.9) / 0.9) ** 0.5]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((0,), "steps"),
        ((2.5,), "steps"),
        ((-3,), "steps"),
        ((5, 0.0, 80.0), "sigma_min"),
        ((5, 2.0, 1.0), "sigma_min"),
        ((5, 1.0, 1.0), "sigma_min"),
        ((5, 0.002, math.inf), "sigma_max"),
        ((5, math.nan, 80.0), "sigma_min"),
    ],
)
def test_makers_refuse(kind, args, match):
    with pytest.raises(FanalError, match=match):
        SCHEDULES[kind](*args)


def test_makers_refuse_their_own_options():
    with pytest.raises(FanalError, match="rho"):
        schedules.polynomial(5, rho=0.0)
    with pytest.raises(FanalError, match="power"):
        schedules.uniform(5, power=-1.0)
    with pytest.raises(FanalError, match="offset"):
        schedules.cosine(5, offset=1.0)
