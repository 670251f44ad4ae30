"""Schedule files: what is written is read back, what is none is refused, and each consumer runs what was exported."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fanal as package
from fanal import gits
from fanal.config import build_schedule, build_solver
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.loading import load
from fanal.metrics.estimates import Estimate
from fanal.schedule_files import (
    Entry,
    Schedules,
    completed,
    entries_of,
    export,
    read_schedules,
    write_schedules,
)
from fanal.schedule_search import Error, Weighted
from fanal.schedule_search.command import draw
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import Euler, Heun
from toys import fanal, part_of, record, refused

ROWS = ((1.0,), (1.5, -0.5), (1.9, -1.3, 0.4))
ERROR = Error(Estimate(0.1, 0.01, 64), Estimate(0.2, math.nan, 64))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def denoiser():
    """A Gaussian with two scales, in float64."""
    return Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), torch.diag(torch.tensor([1.0, 0.04])).double())


def content(weights=None):
    grids = {k: polynomial(k, 0.01, 50.0, zero=False) for k in (3, 4)}
    tables = {3: weights, 4: None if weights is None else (*weights, weights[-1])}
    entries = {k: Entry(grid, "euler", k, tables[k], ERROR, "gits-dev") for k, grid in grids.items()}
    return Schedules("hands32", entries, {"method": "fit", "seed": 0})


@pytest.fixture
def path(tmp_path):
    write_schedules(tmp_path / "a.json", content())
    return tmp_path / "a.json"


def noisy(sigma=50.0):
    return noise((2,), range(16), sigma, dtype=torch.float64)


def test_what_is_written_is_read_back(tmp_path):
    kept = content(ROWS)
    write_schedules(tmp_path / "a.json", kept)
    found = read_schedules(tmp_path / "a.json")
    assert (found.model, found.search) == ("hands32", {"method": "fit", "seed": 0})
    for steps, entry in kept.entries.items():
        other = found.entries[steps]
        assert torch.equal(other.sigmas, entry.sigmas)  # every bit
        assert (other.solver, other.calls, other.weights, other.start) == ("euler", steps, entry.weights, "gits-dev")
        assert other.error.median == ERROR.median
        assert math.isnan(other.error.rms.se)


def test_a_search_becomes_a_file_with_counted_calls(tmp_path):
    found = gits.search(denoiser(), noisy(80.0), [2, 3], solver=Heun(), teacher=Heun(), method="fit", iterations=1)
    entries = entries_of(found, "heun")
    assert {k: entry.calls for k, entry in entries.items()} == {2: 4, 3: 6}
    assert entries[2].error == found.error[2]
    assert entries[3].start == found.picks[3]


@pytest.mark.parametrize("method", ["gits", "fit-weights"])
def test_an_analytical_first_step_goes_into_the_file(tmp_path, method):
    found = gits.search(denoiser(), noisy(80.0), 2, solver=Euler(), teacher=Euler(), afs=True, method=method)
    write_schedules(tmp_path / "a.json", Schedules("m", entries_of(found, "euler")))
    kept = read_schedules(tmp_path / "a.json")
    assert (kept.entries[3].calls, kept.entries[3].solver) == (2, "afs:solver=euler")
    assert build_solver(str(tmp_path / "a.json")) == found.solver_for(2)


def test_a_free_first_step_is_not_counted_when_a_grid_is_asked_for(tmp_path):
    found = gits.search(denoiser(), noisy(80.0), [2, 3], solver=Euler(), teacher=Euler(), afs=True)
    write_schedules(tmp_path / "a.json", Schedules("m", entries_of(found, "euler")))
    kept = read_schedules(tmp_path / "a.json")
    for steps in (2, 3):
        assert torch.equal(kept.entry(steps).sigmas, found.schedules[steps])
    assert torch.equal(kept.entry(4).sigmas, found.schedules[3])  # nothing was asked for with 4: its intervals count
    with pytest.raises(FanalError, match="grids of 2, 3 steps, not of 5"):
        kept.entry(5)


def test_a_run_takes_from_its_file_what_was_not_given(path, tmp_path):
    plain = tmp_path / "plain.json"
    plain.write_text("[3, 2, 1]", encoding="utf-8")
    assert completed(str(path), None, None) == (str(path), 4)  # the most steps of 3 and 4
    assert completed(str(path), "heun", 3) == ("heun", 3)
    for other in (None, "polynomial:rho=5", str(plain)):
        assert completed(other, None, None) == ("euler", 40)


def test_the_command_line_takes_a_file_as_schedule_and_as_solver(tmp_path, path):
    sigmas = build_schedule(str(path), 4, 0.002, 80.0)
    assert torch.equal(sigmas, polynomial(4, 0.01, 50.0, zero=False))
    assert build_solver(str(path)) == Euler()
    write_schedules(tmp_path / "w.json", content(ROWS))
    solver = build_solver(str(tmp_path / "w.json"))
    ran = package.sample(denoiser(), noisy(), polynomial(3, 0.01, 50.0, zero=False), solver)
    assert torch.equal(ran, package.sample(denoiser(), noisy(), polynomial(3, 0.01, 50.0, zero=False), Weighted(ROWS)))
    with pytest.raises(FanalError, match="these solvers are for 3, 4 steps, the grid has 5"):
        package.sample(denoiser(), noisy(), logsnr(5), solver)


def test_a_file_is_for_the_steps_and_the_range_it_has(path, tmp_path):
    with pytest.raises(FanalError, match="grids of 3, 4 steps, not of 40: pass --steps"):
        build_schedule(str(path), 40, 0.002, 80.0)
    with pytest.raises(FanalError, match="searched on hands32 and runs from sigma 50 to 0.01, outside 14.6"):
        build_schedule(str(path), 3, 0.002, 14.6)
    one = Schedules("m", {3: content().entries[3]})
    write_schedules(tmp_path / "one.json", one)
    assert len(build_schedule(str(tmp_path / "one.json"), 40, 0.002, 80.0)) == 4  # the steps come from the file


def wrong(**changes):
    """A file with one grid in which something is changed."""
    row = {"steps": 2, "solver": "euler", "calls": 2, "sigmas": [2.0, 1.0, 0.5], "weights": None, "error": None}
    return {"format": "fanal-schedules-1", "model": "m", "schedules": [{**row, **changes}]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"format": "other"}, "no schedule file"),
        ({**wrong(), "schedules": []}, "list of 1 to 64 grids"),
        ({**wrong(), "schedules": [3]}, "must be an object"),
        ({**wrong(), "schedules": wrong()["schedules"] * 65}, "list of 1 to 64 grids"),
        ({**wrong(), "schedules": wrong()["schedules"] * 2}, "two grids have the same number"),
        ({**wrong(), "model": 7}, "model must be a text"),
        (wrong(sigmas=[2.0]), "list of 2 to 1001"),
        (wrong(sigmas=[1.0] * 2000), "list of 2 to 1001"),
        (wrong(sigmas=[2.0, True, 0.5]), "finite numbers"),
        (wrong(sigmas=[2.0, 1e999, 0.5]), "finite numbers"),
        (wrong(sigmas=[2.0, 3.0, 0.5]), "strictly monotone"),
        (wrong(sigmas=[0.5, 1.0, 2.0]), "must decrease"),
        (wrong(sigmas=[2.0, 1.0, -0.5]), "must be finite and >= 0"),
        (wrong(steps=3), "3 sigmas make 2 steps"),
        (wrong(calls=0), "0 calls"),
        (wrong(calls=10**9), "calls"),
        (wrong(solver=""), "solver must name one"),
        (wrong(solver="b.json"), "no other schedule file"),
        (wrong(solver=["euler"]), "solver must be a text"),
        (wrong(weights=[[1.0]]), "one list for each of the 2 steps"),
        (wrong(weights=[[1.0], [1.0, 2.0, 3.0]]), "row n with 1 to n"),
        (wrong(weights=[[1.0], ["x"]]), "row n with 1 to n"),
        (wrong(error={"median": 1}), "error must hold value"),
        (wrong(error=[1]), "error must hold median and rms"),
    ],
)
def test_what_is_no_schedule_file_is_refused(tmp_path, value, message):
    (tmp_path / "bad.json").write_text(json.dumps(value))
    with pytest.raises(FanalError, match=message) as caught:
        read_schedules(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_an_unread_file_names_itself(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(FanalError, match=name):
            build_schedule(str(tmp_path / name), 4, 0.002, 80.0)


# Exports: each consumer's own loop, or its live code, must give fanal's numbers.


def own(steps):
    """What fanal ends with on the exported grid."""
    return package.sample(denoiser(), noisy(), polynomial(steps, 0.01, 50.0, zero=False), Euler())


def test_the_k_diffusion_tensor_runs_in_its_loop(path):
    """Their samplers take (model, x, sigmas) and run len(sigmas) − 1 steps; d = (x − D)/sigma, x + d·dt."""
    sigmas = load_file(export(path, read_schedules(path), "kdiffusion"))
    assert set(sigmas) == {"sigmas.3", "sigmas.4"}
    with safe_open(path.with_name("a.kdiffusion.safetensors"), "pt") as file:
        assert file.metadata()["solver.3"] == "euler"
        assert "Do not append 0" in file.metadata()["note"]
    for steps in (3, 4):
        x, model = noisy(), Counted(denoiser())
        grid = sigmas[f"sigmas.{steps}"]
        for i in range(len(grid) - 1):
            d = (x - model(x, grid[i])) / grid[i]
            x = x + d * (grid[i + 1] - grid[i])
        torch.testing.assert_close(x, own(steps), rtol=1e-12, atol=1e-12)
        assert model.calls == content().entries[steps].calls


def test_the_comfyui_text_is_read_by_both_ways_of_reading_numbers(path):
    """By splitting at commas, and by a pattern that knows no exponents; float32, as SIGMAS are."""
    entry = Entry(logsnr(6, 2e-5, 157.0, zero=False), "euler", 6)
    where = export(path, Schedules("m", {6: entry}), "comfyui")
    text = json.loads(where.read_text())["schedules"]["6"]
    assert "e" not in text
    for numbers in (text.split(","), re.findall(r"[-+]?(?:\d*\.*\d+)", text)):
        assert torch.equal(torch.tensor([float(n) for n in numbers], dtype=torch.float64), entry.sigmas)


def test_the_edm_list_takes_the_place_of_t_steps(path):
    """The deterministic sampler of Karras et al. 2022, alg. 1, over t_steps as they are."""
    grids = json.loads(export(path, read_schedules(path), "edm").read_text())
    assert "Do not append 0" in grids["note"]
    t_steps = torch.tensor(grids["schedules"]["4"], dtype=torch.float64)
    x, model = noisy(), denoiser()
    for t_cur, t_next in pairwise(t_steps):
        d_cur = (x - model(x, t_cur)) / t_cur
        x_next = x + (t_next - t_cur) * d_cur
        d_prime = (x_next - model(x_next, t_next)) / t_next
        x = x + (t_next - t_cur) * (0.5 * d_cur + 0.5 * d_prime)
    expected = package.sample(denoiser(), noisy(), polynomial(4, 0.01, 50.0, zero=False), Heun())
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


def vp_sigmas(train=1000):
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, train, dtype=torch.float64) ** 2, 0)
    return ((1 - alphas) / alphas).sqrt()


def test_the_diffusers_sigmas_run_in_its_euler_scheduler(path):
    """Live: N sigmas and the end give N steps, and its float32 arithmetic ends where fanal ends."""
    from diffusers import EulerDiscreteScheduler

    grids = json.loads(export(path, read_schedules(path), "diffusers").read_text())["schedules"]
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(sigmas=grids["4"]["sigmas"])
    assert len(scheduler.timesteps) == 4
    x, model = noisy().float(), denoiser()
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].double()
        fed = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(fed, x / (1 + sigma**2).sqrt().float(), rtol=1e-6, atol=1e-6)
        epsilon = (x - model(x.double(), sigma).float()) / sigma.float()
        x = scheduler.step(epsilon, t, x).prev_sample
    torch.testing.assert_close(x.double(), own(4), rtol=2e-5, atol=2e-5)


def test_the_diffusers_flow_sigmas_run_in_its_flow_scheduler(path):
    """Live, without shift: z = (1 − f)·x keeps fanal's states."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    grids = json.loads(export(path, read_schedules(path), "diffusers").read_text())["schedules"]
    flow = grids["4"]["flow_sigmas"]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=flow[:-1])
    assert len(scheduler.timesteps) == 4
    scheduler.sigmas[-1] = flow[-1]  # it appends 0; the searched grid ends above
    z, model = (noisy() * (1 - flow[0])).float(), denoiser()
    for i, t in enumerate(scheduler.timesteps):
        f = scheduler.sigmas[i].double()
        denoised = model(z.double() / (1 - f), f / (1 - f))
        z = scheduler.step(((z.double() - denoised) / f).float(), t, z).prev_sample
    torch.testing.assert_close(z.double() / (1 - flow[-1]), own(4), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize(("solver", "calls", "rows"), [("heun", 8, None), ("ipndm", 4, (*ROWS, (1.7, -1.0, 0.3)))])
def test_the_diffusers_scheduler_entry_runs_this_very_solver(here, solver, calls, rows):
    """Live: in the place of a DDIM scheduler, which takes no sigmas at all; searched weights are in the file."""
    from diffusers import DDIMScheduler

    from fanal.adapters.scheduler import FanalScheduler

    entry = Entry(logsnr(4, 0.05, 14.0, zero=False), solver, calls, rows)
    write_schedules("a.json", Schedules("m", {4: entry}))
    kept = json.loads(export("a.json", read_schedules("a.json"), "diffusers").read_text())["schedules"]["4"]
    assert ("sigmas" in kept) == (rows is None)  # no other scheduler has the weights
    kept = kept["scheduler"]
    base = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler = FanalScheduler(kept["solver"], kept["sigmas"], scheduler=base)
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) == entry.calls
    model, levels = denoiser(), vp_sigmas()
    x = noisy(14.0)
    z = x / math.sqrt(1 + 14.0**2)
    for t in scheduler.timesteps:
        sigma = torch.tensor(np.exp(np.interp(float(t), np.arange(1000), levels.log().numpy())))
        scale = (1 + sigma**2).sqrt()
        epsilon = (z * scale - model(z * scale, sigma)) / sigma
        z = scheduler.step(epsilon, t, z).prev_sample
    ran = build_solver("a.json") if rows else Heun()
    expected = package.sample(denoiser(), x, entry.sigmas, ran) / math.sqrt(1 + 0.05**2)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def test_weights_go_to_comfyui_as_the_inputs_of_fanals_nodes(tmp_path):
    """What the nodes read with these inputs is the grid and the solver of the file."""
    from fanal.adapters.comfyui import FanalSamplerFromFile, FanalSigmasFromFile, read_sigmas

    whole = content(ROWS)
    entries = {k: dataclasses.replace(entry, solver="afs:solver=euler") for k, entry in whole.entries.items()}
    write_schedules(tmp_path / "a.json", Schedules("m", entries))
    kept = json.loads(export(tmp_path / "a.json", read_schedules(tmp_path / "a.json"), "comfyui").read_text())
    for k, nodes in kept["schedules"].items():
        assert set(nodes["FanalSamplerFromFile"]) == set(FanalSamplerFromFile.INPUT_TYPES()["required"])
        sigmas = nodes["FanalSigmasFromFile"]
        assert set(sigmas) | {"kind"} == set(FanalSigmasFromFile.INPUT_TYPES()["required"])
        assert sigmas["steps"] == int(k) - 1  # the free step is not counted
        assert torch.equal(read_sigmas(tmp_path / sigmas["file"], sigmas["steps"]), whole.entries[int(k)].sigmas)


def test_a_grid_that_begins_at_infinity_goes_where_flow_models_run(tmp_path):
    """As times `t = sigma/(1 + sigma)` from 1 on; programs in x-space have no such state."""
    grid = torch.cat([torch.tensor([math.inf], dtype=torch.float64), logsnr(3, 0.01, 9.0, zero=False)])
    write_schedules(tmp_path / "a.json", Schedules("m", {4: Entry(grid, "euler", 4)}))
    kept = read_schedules(tmp_path / "a.json")
    assert torch.equal(kept.entry(4).sigmas, grid)
    times = [1.0, *(grid[1:] / (1 + grid[1:])).tolist()]
    told = json.loads(export(tmp_path / "a.json", kept, "diffusers").read_text())["schedules"]["4"]
    assert told["flow_sigmas"] == pytest.approx(times, rel=1e-14)
    assert "sigmas" not in told
    assert torch.equal(torch.tensor(told["scheduler"]["sigmas"], dtype=torch.float64), grid)
    text = json.loads(export(tmp_path / "a.json", kept, "comfyui").read_text())["schedules"]["4"]
    assert [float(number) for number in text.split(",")] == pytest.approx(times, rel=1e-14)
    for consumer in ("edm", "kdiffusion"):
        with pytest.raises(FanalError, match="begin at infinite sigma"):
            export(tmp_path / "a.json", kept, consumer)


FLOW = """
import math, torch
from fanal.denoiser import Wrapper
from fanal.exact import Gaussian

class Flow(Wrapper):
    sigma_max = math.inf

    def __call__(self, x, sigma):
        return self.denoiser.mean.to(x).expand_as(x) if torch.isinf(sigma) else self.denoiser(x, sigma)

def make():
    return Flow(Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([[1.0, 0.3], [0.3, 0.2]])))
"""


def test_the_command_searches_a_flow_model_and_samples_from_what_it_found(here, monkeypatch):
    (here / "toyflow.py").write_text(FLOW, encoding="utf-8")
    monkeypatch.syspath_prepend(str(here))
    words = ("--warmup", 8, "--holdout", 8, "--teacher-steps", 20, "--method", "fit", "--solver", "heun")
    told = fanal("schedule", "python:toyflow:make", "--steps", "3,4", *words, "--export", "comfyui", "--out", "s.json")
    assert told.exit_code == 0, told.output
    found = read_schedules("s.json")
    assert {k: entry.calls for k, entry in found.entries.items()} == {3: 5, 4: 7}  # one from infinity, two per step
    assert all(math.isinf(entry.sigmas[0]) for entry in found.entries.values())
    told = fanal("sample", "python:toyflow:make", "--schedule", "s.json", "--count", 4, "--out", "run")
    assert told.exit_code == 0, told.output
    assert record("run")["network"]["calls"] == 7
    assert record("run")["results"]["sigmas"][0] == "inf"


@pytest.mark.parametrize("consumer", ["edm", "kdiffusion"])
def test_grids_that_belong_to_weights_are_exported_where_they_have_a_place(path, consumer):
    with pytest.raises(FanalError, match=f"weights that {consumer} does not have.*--method fit"):
        export(path, content(ROWS), consumer)
    with pytest.raises(FanalError, match="did you mean 'comfyui'"):
        export(path, content(), "comfy")


# The command.


SEARCH = ("schedule", "gaussian:tilted2", "--warmup", 6, "--holdout", 5, "--teacher", "euler", "--teacher-steps", 12)


def test_the_command_searches_exports_and_the_sampler_takes_its_file(here):
    told = fanal(*SEARCH, "--steps", "3,4", "--solver", "heun", "--method", "fit", "--export", "edm", "--out", "s.json")
    assert told.exit_code == 0, told.output
    assert "calls per warm-up sample: teacher 12" in told.stdout
    found = read_schedules("s.json")
    assert {k: entry.calls for k, entry in found.entries.items()} == {3: 6, 4: 8}
    assert found.entries[3].error.rms.n == 5
    assert found.search["teacher_steps"] == 12
    assert (here / "s.png").is_file()
    assert json.loads((here / "s.edm.json").read_text())["schedules"]["3"] == found.entries[3].sigmas.tolist()
    run = fanal("sample", "gaussian:tilted2", "--schedule", "s.json", "--solver", "s.json", "--steps", 3, "--count", 4)
    assert run.exit_code == 0, run.output
    kept = record(here / "fanal-sample")
    assert kept["network"]["evaluations"] == 4 * 6
    assert kept["results"]["sigmas"] == found.entries[3].sigmas.tolist()


def test_the_command_equals_the_library(here):
    told = fanal(
        *SEARCH, "--steps", "3", "--method", "fit-weights", "--solver", "euler", "--seed", 3, "--out", "s.json"
    )
    assert told.exit_code == 0, told.output
    model, grid = package.load("gaussian:tilted2"), polynomial(12, zero=False)
    found = gits.search(
        model, 6, 3, solver=Euler(), method="fit-weights", sigmas=grid, teacher=Euler(), seed=3, holdout=5
    )
    entry = read_schedules("s.json").entries[3]
    assert torch.equal(entry.sigmas, found.schedules[3])
    assert entry.weights == found.weights[3]
    assert entry.error == found.error[3]


def test_several_solvers_compete_for_the_calls(here):
    told = fanal(*SEARCH, "--steps", "4", "--solver", "euler+heun", "--method", "fit", "--out", "s.json")
    assert told.exit_code == 0, told.output
    found = read_schedules("s.json")
    (entry,) = found.entries.values()
    assert entry.calls == 4
    assert entry.solver in ("euler", "heun")
    assert f"4 calls: {entry.solver}" in told.stdout
    assert set(found.search["scores"]["4"]) == {"euler", "heun", "euler, fitted", "heun, fitted"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--steps", "3,x"], ["whole numbers with commas"]),
        (["--steps", "0"], ["at least 1"]),
        (["--steps", "13"], ["room for 1 to 12"]),
        (["--solver", "hoin"], ["unknown solver"]),
        (["--method", "fit-weights", "--export", "edm"], ["--method fit"]),
        (["--method", "fit-weights", "--solver", "heun"], ["no multistep weights"]),
        (["--export", "edn"], ["did you mean 'edm'"]),
        (["--out", "s.txt"], ["ends in .json"]),
        (["--metric", "l3"], ["unknown metric"]),
    ],
)
def test_what_the_command_cannot_do_is_one_line(here, words, parts):
    assert refused(fanal(*SEARCH, "--steps", "3", *words), *parts)
    assert list(here.iterdir()) == []


def test_nothing_is_replaced_unasked(here):
    (here / "s.png").write_text("mine")
    assert refused(fanal(*SEARCH, "--steps", "3", "--out", "s.json"), "s.png exists", "--overwrite")
    assert (here / "s.png").read_text() == "mine"
    assert fanal(*SEARCH, "--steps", "3", "--out", "s.json", "--overwrite").exit_code == 0
    assert not part_of(here / "s.json").exists()


@pytest.mark.parametrize("afs", [(), ("--afs",)])
def test_a_run_needs_no_more_than_its_schedule_file(here, afs):
    """Its solver, and its grid with the most steps; the free step of an analytical start is not counted."""
    assert fanal(*SEARCH, "--steps", "3,4", "--solver", "heun", *afs, "--out", "s.json").exit_code == 0
    for words, steps in (((), 4), (("--steps", 3), 3)):
        told = fanal("sample", "gaussian:tilted2", "--schedule", "s.json", *words, "--count", 4, "--out", f"run{steps}")
        assert told.exit_code == 0, told.output
        assert "was searched" not in told.stdout
        kept, entry = record(f"run{steps}"), read_schedules("s.json").entry(steps)
        assert kept["network"]["calls"] == entry.calls
        assert kept["results"]["sigmas"] == entry.sigmas.tolist()
    assert read_schedules("s.json").entry(4).steps == (5 if afs else 4)


def test_the_picture_has_a_dot_for_each_node():
    from fanal.pictures import COLORS

    wanted = tuple(int(COLORS["flag"][i : i + 2], 16) for i in (1, 3, 5))
    image = np.array(draw({3: logsnr(3, zero=False), 5: logsnr(5, zero=False)}))
    for steps, y in ((3, 8 + 17), (5, 8 + 34 + 17)):
        dots = (image[y] == wanted).all(1)
        assert int((np.diff(dots.astype(int)) == 1).sum()) == steps + 1


def test_budgets_with_as_many_steps_are_told_apart(tmp_path, monkeypatch):
    """A file has one grid for each number of steps: the nearer one stays, and the other is named."""
    monkeypatch.chdir(tmp_path)
    words = ("--warmup", 4, "--holdout", 4, "--teacher-steps", 8, "--method", "fit", "--out", "two.json")
    told = fanal("schedule", "mixture:ring8", "--solver", "heun+dpm2", "--steps", "4,5", *words)
    assert told.exit_code == 0, told.output
    assert set(read_schedules(tmp_path / "two.json").entries) == {2}
    assert "calls: not in the file, which keeps one grid of 2 steps, the nearer one" in told.stdout
    assert refused(fanal("schedule", "mixture:ring8", "--solver", "heun+dpm2", "--coeff", 1.2), "leave them out")
    assert refused(fanal("schedule", "mixture:ring8", "--holdout", 2), "at least 3 held-out samples")


def test_warm_up_noise_goes_where_the_model_is():
    assert gits._drawn(load("mixture:ring8"), 3, 80.0, 0, "meta").device.type == "meta"


def test_a_file_names_no_other_file(tmp_path, path):
    value = json.loads(path.read_text(encoding="utf-8"))
    for entry in value["schedules"] if isinstance(value["schedules"], list) else value["schedules"].values():
        entry["solver"] = "afs:solver=(a.json)"
    other = tmp_path / "a.json"
    other.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(FanalError, match="no other schedule file"):
        read_schedules(other)


def test_a_schedule_of_another_model_or_solver_is_told(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = read_schedules(path)
    steps = min(found.entries)
    words = ("sample", "mixture:grid2", "--steps", steps, "--count", 2, "--schedule", path)
    told = fanal(*words, "--solver", "heun", "--out", "a")
    assert told.exit_code == 0, told.output
    assert f"was searched on {found.model}, not on mixture:grid2" in told.stdout
    assert f"was searched for {found.entries[steps].solver}, not for heun" in told.stdout
    assert "not for" not in fanal(*words, "--solver", path, "--out", "b").stdout
