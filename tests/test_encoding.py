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
from fanal.report.encode import hint
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
    assert "--noisy" in hint({"table": [{"norm / sqrt d": {"value": 4.0, "se": 1.0}}]})
    assert hint({"table": [{"norm / sqrt d": {"value": 1.1, "se": 0.01}}]}) == ""


def test_one_law_has_one_code(tmp_path):
    """Two models of the same data agree on codes, far better than on those of other images."""
    config = EncodeConfig("gaussian:digits8", "digits8", steps=(12,), count=8, other=("gaussian:digits8,rank=63",))
    (row,) = record(encode_run(config, tmp_path / "run"))["results"]["table"]
    assert row["codes apart"]["value"] < 0.1 * row["codes of other images apart"]["value"]


def test_predictions_bound_how_far_codes_come_apart(law):
    """Exactly where a constant difference has nothing to pull it back; from above where the second law is exact."""
    x, sigmas = normal(7, 5, seed=4), package.schedules.polynomial(400, zero=False)
    point, step = Gaussian(torch.zeros(5), 0.0), torch.tensor([0.3, 0.0, -0.4, 0.0, 0.0], dtype=torch.float64)
    moved, heun = Gaussian(step, 0.0), package.solvers.Heun()
    apart = encoding.predictions_apart(moved, point, x, sigmas, heun)
    want = 0.5 / math.sqrt(5) * float(1 / sigmas[-1] - 1 / sigmas[0])
    assert torch.allclose(apart, torch.full((7,), want, dtype=torch.float64), rtol=1e-6)
    codes = [encode(D, x, sigmas, heun) / sigmas[0] for D in (moved, point)]
    assert torch.allclose((codes[0] - codes[1]).square().mean(1).sqrt(), apart, rtol=1e-4)
    other = Gaussian(law.mean + 0.1, torch.tensor([3.0, 1.2, 0.5, 0.2, 0.03], dtype=torch.float64))
    for first, second in ((law, other), (other, law)):
        bound = encoding.predictions_apart(first, second, x, sigmas, heun)
        codes = [encode(D, x, sigmas, heun) / sigmas[0] for D in (first, second)]
        distance = (codes[0] - codes[1]).square().mean(1).sqrt()
        assert bool((distance <= bound * 1.001).all())
        assert float(distance.min()) > 1e-3


def test_a_learned_code_is_the_exact_one(tmp_path):
    """The embedded network of grid2 and the law it learned from, from image to noise."""
    config = EncodeConfig("grid2", "grid2", steps=(40,), count=64, block=64, other=("mixture:grid2", "gaussian:grid2"))
    pairs = {tuple(p["models"]): p for p in record(encode_run(config, tmp_path / "run"))["results"]["pairs"]}
    learned, fitted = pairs["grid2", "mixture:grid2"], pairs["grid2", "gaussian:grid2"]
    assert learned["codes apart"]["value"] < 0.25 * learned["codes of other images apart"]["value"]
    assert learned["codes apart"]["value"] < learned["predictions apart"]["value"]
    assert learned["codes apart"]["value"] < 0.5 * fitted["codes apart"]["value"]  # a law of other data: another code
    assert "predictions apart" not in pairs["mixture:grid2", "gaussian:grid2"]


def test_round_trips_by_solver(tmp_path):
    """With the evaluations that each took; a solver is measured as if it were alone."""
    config = EncodeConfig("gaussian:digits8", "digits8", steps=(8, 16), count=6, block=4, also=("euler", "dpmpp"))
    rows = record(encode_run(config, tmp_path / "run"))["results"]["solvers"]
    found = {(row["solver"], row["steps"]): row for row in rows}
    assert len(found) == 6
    assert (found["heun", 8]["evaluations"], found["euler", 16]["evaluations"]) == (2 * 2 * 8, 2 * 16)
    for solver in ("heun", "euler", "dpmpp"):
        assert found[solver, 16]["round trip"]["value"] < found[solver, 8]["round trip"]["value"]
    alone = EncodeConfig("gaussian:digits8", "digits8", steps=(8,), count=6, block=6, solver="euler")
    (row,) = record(encode_run(alone, tmp_path / "alone"))["results"]["table"]
    assert row["round trip"]["value"] == pytest.approx(found["euler", 8]["round trip"]["value"], rel=1e-4)


def test_noise_makes_images_states_of_the_smallest_sigma(tmp_path):
    """Their codes then have the entries of unit noise, where those of clean images fall short."""
    spreads = {}
    for noisy in (True, False):
        config = EncodeConfig(
            "gaussian:digits8,rank=20", "digits8", steps=(24,), count=64, block=64, sigma_min=0.3, noisy=noisy, seed=3
        )
        out = encode_run(config, tmp_path / str(noisy))
        (row,) = record(out)["results"]["table"]
        spreads[noisy] = row["norm / sqrt d"]["value"]
    added = load_file(tmp_path / "True" / "noise.safetensors")["x"] - get("digits8").data("held out", 64).x
    assert torch.allclose(added, package.noise((1, 8, 8), range(3_000_000, 3_000_064), 0.3), atol=1e-6)
    assert abs(spreads[True] - 1) < 0.05
    assert spreads[False] < 0.9


def test_one_image_has_no_other_to_compare_with(tmp_path):
    config = EncodeConfig("gaussian:digits8", "digits8", steps=(4,), count=1, other=("gaussian:digits8,rank=32",))
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
    plan = encoding._Plan(config, get("digits8").data("held out", 2), [setup], [], [])
    plain, _ = encoding._work(plan, range(2))
    zero = dataclasses.replace(setup, sigmas=torch.cat([setup.sigmas, torch.zeros(1, dtype=torch.float64)]))
    ended, _ = encoding._work(dataclasses.replace(plan, setups=[zero]), range(2))
    assert torch.equal(plain["back.5"], ended["back.5"])


def test_the_command_encodes_each_class_and_refuses(tmp_path):
    words = ("encode", "digits8", "--data", "digits8", "--steps", "4,8", "--count", 3)
    result = fanal(*words, "--label", "data", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "round trip" in result.output
    assert refused(fanal(*words[:-4], "--steps", "4,x", "--out", tmp_path / "b"), "whole numbers")
    assert refused(fanal(*words[:-4], "--steps", "1", "--out", tmp_path / "b"), ">= 2, got 1")
    assert refused(fanal(*words, "--split", "test", "--out", tmp_path / "b"), "known: held_out, train")
    wrong = fanal("encode", "digits8", "--data", "hands32", "--out", tmp_path / "c")
    assert refused(wrong, "hands32", "shape")
    assert refused(fanal(*words[:-4], "--also", "heun", "--out", tmp_path / "b"), "solver", "once")
    assert refused(fanal(*words[:-4], "--other", "digits8", "--out", tmp_path / "b"), "model", "once")
    wrong = fanal("encode", "hands32", "--data", "hands32", "--label", "data", "--out", tmp_path / "d")
    assert refused(wrong, "no classes")


@pytest.mark.parametrize("label", ["data", None])
def test_a_stopped_run_notices_other_classes(tmp_path, monkeypatch, label):
    """The same images under other classes: other codes with each one's own class, the same codes without one."""
    config = EncodeConfig("digits8", "digits8", steps=(4,), count=4, block=2, label=label)

    def stops(loop, what):
        for i in loop:
            if i == 1:
                raise KeyboardInterrupt
            yield i

    with pytest.raises(KeyboardInterrupt):
        encode_run(config, tmp_path / "run", progress=stops)
    digits, real = type(get("digits8")), type(get("digits8")).data

    def moved(self, *wanted):
        found = real(self, *wanted)
        return dataclasses.replace(found, labels=(found.labels + 1) % 10)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "data", moved)
        if label is None:
            assert encode_run(config, tmp_path / "run").is_dir()
            return
        with pytest.raises(FanalError, match="unfinished run at"):
            encode_run(config, tmp_path / "run")
    assert encode_run(config, tmp_path / "run").is_dir()
