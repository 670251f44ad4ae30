"""Schedule files for other programs: each consumer's own loop, or its live code, gives fanal's numbers."""

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
import schedule_content
from fanal.config import build_solver
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.schedule_files import Entry, Schedules, export, read_schedules, write_schedules
from fanal.schedules import logsnr, polynomial
from fanal.solvers import Euler, Heun
from schedule_content import ROWS, content, denoiser, noisy
from toys import fanal, record

# Fixtures
here = schedule_content.here
path = schedule_content.path


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
