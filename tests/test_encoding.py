"""Encoding against closed forms: exact codes, orders of the round trip, two models of one law."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

import fanal as package
from fanal import encoding
from fanal.datasets import get
from fanal.encoding import EncodeConfig, encode, encode_run
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.preparation import prepare
from toys import fanal, record, refused


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def law():
    return Gaussian(normal(5, seed=1), torch.tensor([4.0, 1.0, 0.5, 0.1, 0.02], dtype=torch.float64))


@pytest.mark.parametrize(("solver", "order"), [(package.solvers.Euler(), 1), (package.solvers.Heun(), 2)])
def test_codes_converge_to_the_exact_ones(law, solver, order):
    x, errors = law.mean + normal(6, 5, seed=2), []
    for steps in (60, 120):
        sigmas = package.schedules.polynomial(steps, zero=False)
        exact = law.solution(x, sigmas[-1], sigmas[0])
        errors.append(float((encode(law, x, sigmas, solver) - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


def test_the_round_trip_closes(law):
    sigmas = package.schedules.polynomial(200, zero=False)
    x = law.mean + normal(6, 5, seed=3)
    code = encode(law, x, sigmas, package.solvers.Heun())
    assert torch.allclose(package.sample(law, code, sigmas, package.solvers.Heun()), x, atol=2e-3)
    whole = encode(law, x, package.schedules.polynomial(200), package.solvers.Heun())
    assert torch.allclose(whole, encode(law, x, package.schedules.polynomial(200)[:-1], package.solvers.Heun()))


def test_grids_that_do_not_rise_are_refused(law):
    for grid in ([80.0, 0.0], [math.inf, 1.0, 0.1]):
        with pytest.raises(FanalError, match="finite positive"):
            encode(law, normal(2, 5), torch.tensor(grid, dtype=torch.float64), package.solvers.Euler())


def test_a_run_tells_errors_and_leaves_noise(tmp_path):
    config = EncodeConfig("gaussian:digits8", "digits8", steps=(8, 16), count=6, block=4)
    out = encode_run(config, tmp_path / "run")
    rows = record(out)["results"]["table"]
    assert rows[0]["round trip"]["value"] > rows[1]["round trip"]["value"] > 0
    kept = load_file(out / "noise.safetensors")
    assert kept["noise"].shape == (6, 1, 8, 8)
    model = package.load("gaussian:digits8")
    sigmas = package.schedules.polynomial(16, zero=False)
    again = encode(model, kept["x"], sigmas, package.solvers.Heun()) / 80
    assert torch.allclose(kept["noise"], again, atol=1e-5)
    back = package.sample(model, 80 * kept["noise"], sigmas, package.solvers.Heun())
    error = float((back - kept["x"]).flatten(1).square().mean(1).sqrt().mean())
    assert error == pytest.approx(rows[1]["round trip"]["value"], rel=1e-3)
    assert record(out)["network"]["evaluations"] == 6 * 2 * (2 * 8 + 2 * 16)
    assert (out / "samples.png").is_file()


def test_one_law_has_one_code(tmp_path):
    """Two models of the same data agree on codes, far better than on those of other images."""
    config = EncodeConfig("gaussian:digits8", "digits8", steps=(12,), count=8, other="gaussian:digits8,rank=63")
    (row,) = record(encode_run(config, tmp_path / "run"))["results"]["table"]
    assert row["codes apart"]["value"] < 0.1 * row["codes of other images apart"]["value"]


def test_one_image_has_no_other_to_compare_with(tmp_path):
    config = EncodeConfig("gaussian:digits8", "digits8", steps=(4,), count=1, other="gaussian:digits8,rank=32")
    (row,) = record(encode_run(config, tmp_path / "run"))["results"]["table"]
    assert row["codes of other images apart"]["n"] == 0
    assert row["codes apart"]["n"] == 1


def test_a_pipeline_keeps_its_own_grid():
    """Its schedule has its own ends, and refuses to be asked for others."""
    own, other = EncodeConfig("diffusers:x", "digits8").sampling(8), EncodeConfig("digits8", "digits8").sampling(8)
    assert (own.schedule, own.zero) == ("native", True)
    assert (other.schedule, other.zero) == ("polynomial", False)
    assert not EncodeConfig("diffusers:x", "digits8", schedule="polynomial").sampling(8).zero


def test_a_final_zero_changes_nothing():
    config = EncodeConfig("gaussian:digits8", "digits8", steps=(5,), count=2)
    setup, _ = prepare(config.sampling(5))
    data = get("digits8").data("held out", 2)
    plain, _ = encoding._work(config, [setup], [], data, range(2))
    zero = dataclasses.replace(setup, sigmas=torch.cat([setup.sigmas, torch.zeros(1, dtype=torch.float64)]))
    ended, _ = encoding._work(config, [zero], [], data, range(2))
    assert torch.equal(plain["back.5"], ended["back.5"])


def test_the_command_encodes_each_class_and_refuses(tmp_path):
    words = ("encode", "digits8", "--data", "digits8", "--steps", "4,8", "--count", 3)
    result = fanal(*words, "--label", "data", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "round trip" in result.output
    assert refused(fanal(*words[:-4], "--steps", "4,x", "--out", tmp_path / "b"), "whole numbers")
    assert refused(fanal(*words[:-4], "--steps", "1", "--out", tmp_path / "b"), ">= 2")
    wrong = fanal("encode", "digits8", "--data", "hands32", "--out", tmp_path / "c")
    assert refused(wrong, "hands32", "shape")
    wrong = fanal("encode", "hands32", "--data", "hands32", "--label", "data", "--out", tmp_path / "d")
    assert refused(wrong, "no classes")
