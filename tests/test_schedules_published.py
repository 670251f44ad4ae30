"""Published tables, resampling, timesteps both ways and grids from files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fanal import schedules
from fanal.config import build_schedule
from fanal.errors import FanalError
from fanal.schedules import (
    SOURCES,
    TIMESTEPS,
    check_sigmas,
    from_file,
    from_timesteps,
    resample,
    stable_diffusion_alphas,
    table,
    tables,
    to_timesteps,
)

F64 = torch.float64
EVERY = [(name, steps) for name, known in tables.items() for steps in known]


@pytest.mark.parametrize(("name", "steps"), EVERY)
def test_a_published_table_is_a_grid_of_its_steps(name, steps):
    grid = check_sigmas(tables[name][steps])
    assert len(grid) == steps + 1
    assert (grid.diff() < 0).all()
    assert torch.equal(table(name, steps), grid)
    assert "arXiv" in SOURCES[name] or "[REG]" in SOURCES[name]


def test_every_table_has_a_source_and_nothing_else_has_one():
    assert SOURCES.keys() == tables.keys()


def test_ays_is_what_diffusers_ships():
    schedulers = pytest.importorskip("diffusers.schedulers")
    theirs = schedulers.AysSchedules
    for name, key in (("ays-sd15", "StableDiffusion"), ("ays-sdxl", "StableDiffusionXL")):
        assert list(tables[name][10]) == theirs[f"{key}Sigmas"]
        assert list(TIMESTEPS[name]) == theirs[f"{key}Timesteps"]
    assert list(tables["ays-svd"][10]) == theirs["StableDiffusionVideoSigmas"]


def test_the_alphas_are_those_of_stable_diffusion():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(stable_diffusion_alphas(), theirs.double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["ays-sd15", "ays-sdxl"])
def test_the_two_forms_of_ays_agree_to_the_printed_digits(name):
    """Sigmas have three decimals, timesteps are whole: they differ by up to 1.5 %, where sigma is small."""
    printed = torch.tensor(tables[name][10], dtype=F64)
    exact = from_timesteps(TIMESTEPS[name], stable_diffusion_alphas())
    torch.testing.assert_close(printed, exact, rtol=0.015, atol=0)
    back = to_timesteps(printed, stable_diffusion_alphas())
    assert int((back - torch.tensor(TIMESTEPS[name])).abs().max()) <= 1


def test_printed_gits_grids_are_nodes_of_the_teachers_grid():
    """GITS chooses among the 61 nodes of a polynomial grid; one mistyped digit would leave it."""
    nodes = {round(value, 4) for value in schedules.polynomial(60, zero=False).tolist()}
    for steps, grid in tables["gits-cifar10"].items():
        assert set(grid) <= nodes, steps
        assert (grid[0], grid[-1]) == (80.0, 0.002)


def test_gits_of_stable_diffusion_is_its_timesteps():
    assert to_timesteps(table("gits-sd15", 10), stable_diffusion_alphas()).tolist() == list(TIMESTEPS["gits-sd15"])


# Resampling.


def test_resampling_ays_reproduces_the_interpolation_of_its_authors():
    """Their way, written out: log sigma linear in the node's index, the model's sigma_min in the place of 0."""
    nodes = [math.log(value) for value in (*tables["ays-sd15"][10][:-1], 0.02917)]
    got = table("ays-sd15", 25)
    want = []
    for k in range(25):
        place = k * 10 / 25
        i = min(int(place), 9)
        want.append(math.exp(nodes[i] + (place - i) * (nodes[i + 1] - nodes[i])))
    torch.testing.assert_close(got[:-1], torch.tensor(want, dtype=F64), rtol=1e-12, atol=0)
    assert got[-1] == 0
    assert got[0] == 14.615


def test_a_log_linear_grid_stays_one():
    torch.testing.assert_close(
        resample(schedules.logsnr(7, zero=False), 19), schedules.logsnr(19, zero=False), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(resample(schedules.logsnr(7), 19), schedules.logsnr(19), rtol=1e-12, atol=0)


@given(
    kind=st.sampled_from(sorted(schedules.SCHEDULES)),
    steps=st.integers(2, 30),
    wanted=st.integers(2, 60),
    zero=st.booleans(),
    end=st.booleans(),
)
def test_resampling_keeps_the_ends_and_gives_a_grid(kind, steps, wanted, zero, end):
    grid = schedules.SCHEDULES[kind](steps, 0.01, 50.0, zero=zero)
    got = resample(grid, wanted, 0.004 if zero and end else None)
    assert torch.equal(check_sigmas(got), got)
    assert len(got) == wanted + 1
    assert (got[0], got[-1]) == (grid[0], grid[-1])
    if not end:
        torch.testing.assert_close(resample(grid, steps), grid, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", tables)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 11, 40])
def test_a_table_has_any_number_of_steps(name, steps):
    grid = table(name, steps)
    known = next(iter(tables[name].values()))
    assert len(grid) == steps + 1
    assert (float(grid[0]), float(grid[-1])) == (known[0], known[-1])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: resample([3.0, 1.0], 0), "steps"),
        (lambda: resample([3.0, 1.0], 2.5), "steps"),
        (lambda: resample([3.0, 1.0], True), "steps"),
        (lambda: resample([3.0, 1.0, 0.0], 1), ">= 2"),
        (lambda: resample([1.0, 3.0], 4), "decreasing"),
        (lambda: resample([math.inf, 3.0, 1.0], 4), "finite"),
        (lambda: resample([3.0, 1.0], 4, end=0.1), "final 0"),
        (lambda: resample([3.0, 1.0, 0.0], 4, end=2.0), "below"),
        (lambda: table("ays-sd51", 10), "did you mean 'ays-sd15'"),
        (lambda: table("ays-sd15", 0), "steps"),
    ],
)
def test_resampling_refuses(make, match):
    with pytest.raises(FanalError, match=match):
        make()


# Timesteps.


@given(st.lists(st.integers(0, 999), min_size=2, max_size=40, unique=True), st.booleans())
def test_timesteps_come_back(steps, zero):
    steps, alphas = sorted(steps, reverse=True), stable_diffusion_alphas()
    assert to_timesteps(from_timesteps(steps, alphas, zero=zero), alphas).tolist() == steps


def test_fractional_timesteps_are_linear_in_log_sigma():
    alphas = stable_diffusion_alphas()
    a, b = from_timesteps([500, 400], alphas, zero=False).tolist()
    got = to_timesteps([a, a ** (1 / 4) * b ** (3 / 4), b], from_timesteps_range(alphas, 400, 500), whole=False)
    assert got.tolist() == pytest.approx([1.0, 0.25, 0.0])


def from_timesteps_range(alphas, low, high):
    """A table that has nothing between two timesteps."""
    return alphas[[low, high]]


def test_diffusers_has_the_same_timesteps():
    """Its Karras sigmas are turned into timesteps by the same interpolation."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    got = to_timesteps(scheduler.sigmas.double(), scheduler.alphas_cumprod, whole=False)
    torch.testing.assert_close(got, scheduler.timesteps.double(), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("sigmas", "match"),
    [
        ([20.0, 1.0], "20"),
        ([10.0, 0.01], "0.01"),
        ([1.0, 0.9999], "both nearest"),
        ([1.0, 1.0], "monotone"),
    ],
)
def test_to_timesteps_refuses(sigmas, match):
    with pytest.raises(FanalError, match=match):
        to_timesteps(sigmas, stable_diffusion_alphas())


# Files.


@pytest.mark.parametrize("value", [[80.0, 3, 0.5, 0], {"sigmas": [80.0, 3, 0.5, 0], "model": "any"}])
def test_a_list_or_an_object_with_sigmas_is_read(tmp_path, value):
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(value))
    assert from_file(path).tolist() == [80.0, 3.0, 0.5, 0.0]
    assert build_schedule(str(path), 99, 0.002, 80.0).tolist() == [80.0, 3.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot read"),
        ("[1, 2", "cannot read"),
        ("\xff", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("3", "list"),
        ('"80,1"', "list"),
        ("[80]", "list"),
        ('["80", "1"]', "list"),
        ("[true, false]", "list"),
        ("[80, NaN]", "finite"),
        ("[80, Infinity]", "finite"),
        ("[1, 2, 1]", "monotone"),
        ("[2, -1]", ">= 0"),
        (f"[1{'0' * 400}, 1]", "grid.json"),
        ('{"sigma": [2, 1]}', "sigmas"),
        ('{"schedules": []}', "several grids"),
        (f"[{'1, ' * 20_000}0]", "10001"),
        (" " * (2**20 + 1), "at most"),
    ],
)
def test_a_file_that_holds_no_grid_is_refused(tmp_path, text, match):
    path = tmp_path / "grid.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FanalError, match=match):
        from_file(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FanalError, match="nowhere"):
        from_file(tmp_path / "nowhere.json")
    with pytest.raises(FanalError, match="cannot read"):
        from_file(tmp_path)


# On the command line.


@pytest.mark.parametrize("name", tables)
def test_a_table_is_a_schedule_by_its_name_with_its_own_ends(name):
    assert torch.equal(build_schedule(name, 10, 0.01, 50.0), table(name, 10))


def test_a_table_has_no_fields_and_is_suggested():
    with pytest.raises(FanalError, match="no fields"):
        build_schedule("ays-sd15:rho=5", 10, 0.01, 50.0)
    with pytest.raises(FanalError, match="did you mean 'gits-cifar10'"):
        build_schedule("gits-cifar", 10, 0.01, 50.0)
