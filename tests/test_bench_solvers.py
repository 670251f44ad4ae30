"""The comparisons of solvers and of jumps: figures are recomputed from the parts, slopes and ends are known."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import fanal as package
from fanal.bench import jumps, solvers
from fanal.bench.jumps import JumpsConfig, pick
from fanal.bench.plans import compare
from fanal.bench.quality import calls_on, draws, short
from fanal.bench.schedules import mixture
from fanal.bench.solver_tables import slopes
from fanal.bench.solvers import SolversConfig
from fanal.cli.bench import _listed
from fanal.config import build_solver
from fanal.errors import FanalError
from fanal.files import read_tensors
from fanal.metrics import Estimate, kid
from fanal.preparation import SampleConfig, prepare
from fanal.schedules import jump, logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import RK4, SOLVERS, Ancestral, Euler
from toys import fanal

TINY = SolversConfig(
    mixtures=1,
    models=(),
    solvers=("euler", "heun", "afs", "rk4", "ancestral"),
    schedules=("logsnr", "polynomial"),
    calls=(6, 64, 128),
    test=16,
    reference=150,
)
JUMPS = JumpsConfig("grid2", steps=6, count=24, block=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compare(TINY, tmp_path_factory.mktemp("bench") / "run")


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "run.json").read_text())["results"]


@pytest.fixture(scope="module")
def jumped(tmp_path_factory):
    return compare(JUMPS, tmp_path_factory.mktemp("jumps") / "run")


def start(count, stream):
    return noise((48,), range(count), 80.0, stream=stream, dtype=torch.float64)


def test_every_solver_is_compared():
    assert {text.partition(":")[0] for text in SolversConfig().solvers} == set(SOLVERS)


def test_an_error_is_the_distance_to_the_true_end(folder):
    errors, _ = read_tensors(folder / "errors.safetensors")
    model, x = mixture(0), start(16, "bench test")
    ends = package.sample(model, x, logsnr(150, zero=False), RK4())
    off = package.sample(model, x, polynomial(6, zero=False), Euler()) - ends
    expected = off.square().mean(1).sqrt().float()
    torch.testing.assert_close(errors["mixture 0|euler|polynomial|6"], expected, rtol=1e-6, atol=1e-9)


def test_errors_fall_with_the_order_of_the_solver(results):
    """Euler halves its error with twice the calls, Heun divides it by four."""
    found = results["groups"]["1 mixtures"]["slopes"]
    assert found["euler|logsnr"] == pytest.approx(1, abs=0.15)
    assert found["heun|logsnr"] == pytest.approx(2, abs=0.3)
    made = {f"a|b|{n}": {"calls": n, "median": {"value": n**-3.0}} for n in (5, 10, 20)}
    assert slopes(made)["a|b"] == pytest.approx(3)


def test_calls_are_counted_and_never_above_the_budget(results):
    cells = results["problems"]["mixture 0"]["cells"]
    assert [(cells[f"{name}|logsnr|6"]["steps"], cells[f"{name}|logsnr|6"]["calls"]) for name in TINY.solvers[:4]] == [
        (6, 6),
        (3, 6),
        (7, 6),  # its first step takes no call
        (1, 4),
    ]
    assert calls_on(build_solver("heun"), jump(logsnr(6), 1.0)) == 2 * 3 + 1


def test_solvers_that_draw_noise_are_judged_by_their_samples(results):
    own = results["problems"]["mixture 0"]
    assert not any(cell.startswith("ancestral") for cell in own["cells"])
    model, x = mixture(0), start(16, solvers.STREAM)
    ends = package.sample(model, x, logsnr(6, zero=False), Ancestral(), range(16))
    expected = kid(ends.float(), model.draw(64).float()).value
    assert own["quality"]["ancestral|logsnr|6"]["kid"]["value"] == pytest.approx(expected, rel=1e-4)
    assert {cell.partition("|")[0] for cell in own["quality"]} == {"euler", "heun", "ancestral"}


def test_who_draws_noise_is_found_out():
    stochastic = {name for name, kind in SOLVERS.items() if draws(kind())}
    assert stochastic == {"ddpm", "ancestral", "churn", "sde", "dpmpp_sde"}


def test_the_folder_has_tables_and_plots(folder):
    text = (folder / "tables.md").read_text()
    assert "1 mixtures, logsnr: median error" in text
    assert "| rk4 | " in text
    assert "[4] |" in text
    page = (folder / "plots.html").read_text()
    assert page.count('id="plot-') == 3
    assert 'src="http' not in page


def test_a_network_has_errors_and_right_samples(tmp_path):
    config = SolversConfig(
        mixtures=0,
        models=("grid2",),
        solvers=("euler", "ancestral"),
        model_schedules=("logsnr",),
        model_calls=(6, 24),
        model_test=8,
        quality=32,
        reference=200,
    )
    own = json.loads((compare(config, tmp_path / "run") / "run.json").read_text())["results"]["problems"]["grid2"]
    small, large = (own["cells"][f"euler|logsnr|{n}"]["median"]["value"] for n in (24, 6))
    assert small < large
    assert own["quality"]["ancestral|logsnr|24"]["right"]["value"] > 0.5  # measured 0.8 to 1 with other seeds


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, mixtures=2, solvers=("euler",), calls=(6,))
    work, done = solvers._work, []

    def stops(make, config):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return work(make, config)

    monkeypatch.setattr(solvers, "_work", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "run")
    monkeypatch.setattr(solvers, "_work", work)
    said = []
    compare(config, tmp_path / "run", say=said.append)
    assert said == ["resuming: 1 problems are there already"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(FanalError, match="at least one solver"):
        SolversConfig(solvers=())
    with pytest.raises(FanalError, match="compare grids with these ends"):
        compare(dataclasses.replace(TINY, schedules=("ays-sd15",)), tmp_path / "run")
    with pytest.raises(FanalError, match="names no data set"):
        compare(JumpsConfig("gaussian:tilted2", steps=3, count=4), tmp_path / "run")
    told = fanal("bench", "solvers", "--calls", "six", "--out", tmp_path / "run")
    assert (told.exit_code, "whole numbers" in told.output) == (2, True)


def test_lists_of_solvers_keep_their_fields():
    given = "heun,sde:order=2,eta=0.5,euler,ancestral:solver=heun"
    assert _listed(given) == ("heun", "sde:order=2,eta=0.5", "euler", "ancestral:solver=heun")


def test_figures_have_the_digits_of_their_errors():
    assert short(Estimate(0.12345, 0.0123, 9)) == "0.123 ± 0.012"
    assert short(Estimate(153.2, 21.0, 9)) == "153 ± 21"
    assert short(Estimate(0.0005031, 2e-8, 9)) == "0.000503 ± 0.000001"  # not "± 0"
    assert short(Estimate(float("nan"), 1.0, 9)) == "–"
    assert short(Estimate(0.104149, 0.0, 4)) == "0.104 ± 0"


@pytest.mark.parametrize("text", ["euler", "heun", "ipndm", "dpmpp", "unipc", "lms"])
def test_a_jump_is_the_denoised_prediction_of_the_full_run(text):
    """What is read off one run is what each cut grid gives, with as many calls as are counted."""
    model, solver, grid = mixture(0), build_solver(text), polynomial(6)
    x = start(4, "bench test")
    run = list(package.trace(model, x, grid, solver))
    for node in range(6):
        counted = package.Counted(model)
        cut = jump(grid, float(grid[node]))
        ends = package.sample(counted, x, cut, solver)
        torch.testing.assert_close(ends, run[node].step.denoised, rtol=1e-10, atol=1e-10)
        assert counted.calls == calls_on(solver, cut)


def test_the_first_jump_is_one_call_and_the_last_is_the_full_run(jumped):
    found = json.loads((jumped / "run.json").read_text())["results"]
    assert found["calls"]["denoised"] == [1, 3, 5, 7, 9, 11]
    assert found["calls"]["x"] == [0, 2, 4, 6, 8, 10, 11]
    for part in ("chosen on", "reported"):
        assert found[part]["denoised"][-1] == found[part]["x"][-1]
        assert found[part]["x"][0]["fid"]["value"] > 100 * found[part]["denoised"][0]["fid"]["value"]


def test_figures_of_a_jump_are_those_of_its_samples(jumped):
    """Node 4 again from the parts, on the samples that nothing was chosen on."""
    found = json.loads((jumped / "run.json").read_text())["results"]["reported"]["denoised"][4]
    setup, _ = prepare(SampleConfig("grid2", "heun", steps=6, count=48))
    x = noise((2,), range(24, 48), 80.0)
    ends = package.sample(setup.network, x, jump(setup.sigmas, float(setup.sigmas[4])), setup.solver)
    real = setup.dataset.data("held out", 24).x
    assert found["fid"]["value"] == pytest.approx(package.metrics.fid(ends, real).value, rel=1e-4)
    assert found["right"]["value"] == float((setup.dataset.verify(ends) == 0).double().mean())


def test_picks_wait_until_nothing_later_is_worse():
    full = {"value": 1.0, "se": 0.1}
    values = [{"value": v} for v in (5.0, 1.05, 1.2, 1.09, 0.9, 1.0)]
    assert pick(values, full, -1) == 3
    assert pick([{"value": v} for v in (0.1, 0.5, 0.95, 1.0)], full, 1) == 2
    assert pick([{"value": 1.0}], {"value": 1.0, "se": None}, -1) == 0


def test_the_jump_that_satisfies_all_is_the_last_of_them(jumped):
    picks = json.loads((jumped / "run.json").read_text())["results"]["picks"]
    assert set(picks) == {*jumps.MEASURES, "all"}
    assert picks["all"]["node"] == max(picks[name]["node"] for name in jumps.MEASURES)
    assert picks["all"]["full_calls"] == 11


def test_the_commands_say_their_tables(tmp_path):
    told = fanal("bench", "jumps", "grid2", "--steps", 3, "--count", 8, "--out", tmp_path / "jumps")
    assert told.exit_code == 0, told.output
    assert (tmp_path / "jumps" / "tables.md").read_text() in told.stdout
    given = ("--quick", "--mixtures", 1, "--solvers", "euler,heun", "--schedules", "logsnr", "--calls", "4")
    told = fanal("bench", "solvers", *given, "--out", tmp_path / "solvers")
    assert told.exit_code == 0, told.output
    assert "| heun | " in told.stdout
