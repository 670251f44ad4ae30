"""`FanalScheduler` in live pipelines of diffusers: their own schedulers' results, and those of `fanal.sample`."""

import warnings

import pytest
import torch

import fanal
import pipelines
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.solvers import DDPM, Ancestral, Churn, Euler, Heun
from pipeline_runs import CALLS, PLAIN, bound, near, network, own, pack, packed, pipelines_noise, run, tiny
from tricky import Corrected

diffusers = pytest.importorskip("diffusers")

from fanal.adapters.scheduler import FanalScheduler  # noqa: E402

F64 = torch.float64


# In the pipelines.


@pytest.mark.parametrize("name", PLAIN)
def test_euler_is_the_pipelines_own(name):
    """DDIM, EulerDiscrete and FlowMatchEuler to float32 rounding, at the same number of calls."""
    want, calls = run(name, own(name))
    scheduler = FanalScheduler.from_scheduler(own(name))
    got, mine = run(name, scheduler)
    assert near(got, want)
    assert calls == mine == len(scheduler.timesteps) == 8
    assert scheduler.order == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd", "HeunDiscreteScheduler"), ("sd_v", "HeunDiscreteScheduler"), ("sd3", "FlowMatchHeunDiscreteScheduler")],
)
def test_heun_is_theirs(name, kind):
    """On each one's own grid; into 0, and out of infinity, ours makes one call where flow's makes two."""
    theirs = getattr(diffusers, kind).from_config(own(name).config)
    want, calls = run(name, theirs)
    scheduler = FanalScheduler.from_scheduler(theirs, Heun())
    got, mine = run(name, scheduler)
    if name == "sd3":  # their first interval is Heun's too, in z-space: the same where the flow is straight
        assert (calls, mine) == (15, 14)
        assert near(got, want, 0.1)
    else:
        assert calls == mine == 15
        assert scheduler.order == 2
        assert near(got, want)


def test_ddpm_is_theirs(monkeypatch):
    """The ancestral step of DDPMScheduler, with our noise handed to both."""
    from diffusers.schedulers import scheduling_ddpm as module

    drawn = iter(range(8))
    shape = (3, pipelines.SIDE, pipelines.SIDE)
    monkeypatch.setattr(
        module, "randn_tensor", lambda *a, **k: fanal.noise(shape, range(7, 9), step=next(drawn), stream="ancestral")
    )
    want, calls = run("ddpm", own("ddpm"))
    got, mine = run("ddpm", FanalScheduler.from_scheduler(own("ddpm"), DDPM(), seeds=7))
    assert near(got, want)
    assert calls == mine == 8


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "solver", [Heun(), Churn(s_max=1e9), Ancestral(Corrected(Euler()), eta=0.5)], ids=lambda s: type(s).__name__
)
def test_any_solver_gives_what_sample_gives(name, solver):
    """On the same noise, grid and seeds; a churned start costs the pipeline one call more, but not out of infinity."""
    D = bound(name)
    seeds, sigmas = range(40, 42), network(D).grid(5)
    counted = Counted(D)
    start = pipelines_noise(name)
    x = start if torch.isinf(sigmas[0]) else start * (1 + sigmas[0] ** 2).sqrt()
    if name == "sdxl":  # EulerDiscrete with leading times multiplies by the same root
        assert own(name).config.timestep_spacing == "leading"
    if name == "flux":  # the solver's noise is drawn in the form in which the pipeline keeps its samples
        want = fanal.sample(packed(counted), pack(x), sigmas, solver, seeds)
        decoded = want / (1 + sigmas[-1])
    else:
        want = fanal.sample(counted, x, sigmas, solver, seeds)
        decoded = network(D).state_of(want, sigmas[-1])
    got, calls = run(name, FanalScheduler.from_scheduler(own(name), solver, seeds=list(seeds)), steps=5)
    if CALLS[name]["output_type"] == "pt":
        decoded = network(D).decode(want) / 2 + 0.5
    assert near(got, decoded, 1e-4)  # Heun multiplies rounding by sigma/(2·sigma'), 56 on the last finite step of SD3
    opening = isinstance(solver, Churn) and not torch.isinf(sigmas[0])
    assert calls == counted.calls + opening


def test_seeds_come_from_the_generator():
    """A single generator gives sample b the seed of its start + b; a list gives each its own."""
    first, _ = run("sd", FanalScheduler.from_scheduler(own("sd"), Ancestral()), seed=11)
    again, _ = run("sd", FanalScheduler.from_scheduler(own("sd"), Ancestral(), seeds=11), seed=11)
    other, _ = run("sd", FanalScheduler.from_scheduler(own("sd"), Ancestral(), seeds=[12, 11]), seed=11)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    scheduler = FanalScheduler.from_scheduler(own("sd"), Ancestral())
    scheduler.set_timesteps(4)
    x = torch.ones(2, 4, 2, 2)
    pair = [torch.Generator().manual_seed(s) for s in (5, 9)]
    got = scheduler.step(x, scheduler.timesteps[0], x, generator=pair).prev_sample
    scheduler.set_timesteps(4)
    scheduler.seeds = [5, 9]
    assert torch.equal(got, scheduler.step(x, scheduler.timesteps[0], x).prev_sample)
    scheduler.set_timesteps(4)
    scheduler.seeds = None
    with pytest.raises(FanalError, match="needs seeds"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_the_schedulers_of_today_and_a_solver_around_a_solver():
    """A solver that draws nothing new changes nothing: churn 0 and eta 0, inside a pipeline."""
    want, _ = run("sd", FanalScheduler.from_scheduler(own("sd"), Heun()))
    got, _ = run("sd", FanalScheduler.from_scheduler(own("sd"), Churn(Ancestral(Heun(), eta=0.0), s_churn=0.0)))
    assert torch.equal(got, want)


def test_named_schedules_lie_between_the_ends_of_the_own_grid():
    scheduler = FanalScheduler.from_scheduler(diffusers.EulerDiscreteScheduler(), schedule="polynomial:rho=5")
    scheduler.set_timesteps(9)
    theirs = diffusers.EulerDiscreteScheduler()
    theirs.set_timesteps(9)
    want = fanal.schedules.polynomial(9, float(scheduler.grid[-2]), float(scheduler.grid[0]), rho=5)
    torch.testing.assert_close(scheduler.grid, want)
    torch.testing.assert_close(scheduler.grid[[0, -2]], theirs.sigmas[[0, -2]].double(), rtol=1e-5, atol=0)
    flow = FanalScheduler.from_scheduler(own("flux"), schedule=fanal.schedules.logsnr)
    flow.set_timesteps(sigmas=torch.linspace(1, 1 / 9, 9).tolist(), mu=0.9)
    plain = FanalScheduler.from_scheduler(own("flux"))
    plain.set_timesteps(sigmas=torch.linspace(1, 1 / 9, 9).tolist(), mu=0.9)
    assert torch.isinf(flow.grid[0])
    torch.testing.assert_close(flow.grid[1:], fanal.schedules.logsnr(8, float(plain.grid[-2]), float(plain.grid[1])))


def test_a_grid_of_ones_own():
    """In x-space; the pipeline must ask for as many steps, also where it sends a ramp of its own (Flux)."""
    sigmas = [14.0, 5.0, 1.2, 0.3, 0.05]
    scheduler = FanalScheduler.from_scheduler(own("sd"), Heun(), sigmas)
    got, calls = run("sd", scheduler, steps=4)
    assert calls == 8  # ends above 0: two calls in the last interval too
    D = bound("sd")
    x = pipelines_noise("sd") * (1 + sigmas[0] ** 2) ** 0.5
    want = fanal.sample(D, x, sigmas, Heun())
    assert near(got, network(D).state_of(want, torch.tensor(sigmas[-1], dtype=F64)), 2e-5)
    with pytest.raises(FanalError, match="num_inference_steps=4"):
        run("sd", scheduler, steps=5)
    flux = FanalScheduler.from_scheduler(own("flux"), sigmas=[torch.inf, 5.0, 1.0, 0.0])
    assert run("flux", flux, steps=3)[1] == 3
    with pytest.raises(FanalError, match="x-space cannot start"):
        FanalScheduler.from_scheduler(own("sdxl"), sigmas=[torch.inf, 1.0, 0.0])
    with pytest.raises(FanalError, match="must decrease"):
        FanalScheduler.from_scheduler(own("sd"), sigmas=[1.0, 2.0])


def test_sigmas_and_timesteps_of_the_pipelines_call():
    """SDXL passes both on; sigmas are the grid itself, so that no step disappears."""
    ays = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0]
    theirs, calls = run("sdxl", own("sdxl"), sigmas=ays)
    got, mine = run("sdxl", FanalScheduler.from_scheduler(own("sdxl")), sigmas=ays)
    assert calls == mine == 10
    assert near(got, theirs, 1e-5)
    times = [999, 700, 300, 50]
    theirs, calls = run("sdxl", own("sdxl"), timesteps=times)
    got, mine = run("sdxl", FanalScheduler.from_scheduler(own("sdxl")), timesteps=times)
    assert calls == mine == 4
    assert near(got, theirs, 1e-5)
    flow = FanalScheduler.from_scheduler(
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    )
    with pytest.raises(FanalError, match="UniPCMultistepScheduler.*timesteps"):
        flow.set_timesteps(timesteps=[900, 500])


def test_a_searched_schedule_with_its_solver(tmp_path):
    """A schedule file gives the grid and the solver with its weights, as fanal.sample takes them."""
    from fanal.config import build_solver
    from fanal.schedule_files import Entry, Schedules, write_schedules

    grid, path = fanal.schedules.polynomial(3, 0.05, 14.0, zero=False), tmp_path / "searched.json"
    entry = Entry(grid, "ipndm:order=2", 3, [[1.0], [1.4, -0.4], [1.5, -0.5]])
    write_schedules(path, Schedules("diffusers:tiny", {3: entry}))
    scheduler = FanalScheduler.from_scheduler(own("sd"), str(path), schedule=str(path))
    got, calls = run("sd", scheduler, steps=3)
    x = pipelines_noise("sd") * (1 + grid[0] ** 2).sqrt()
    want = fanal.sample(bound("sd"), x, grid, build_solver(str(path)))
    assert near(got, network(bound("sd")).state_of(want, grid[-1]), 2e-5)
    assert calls == 3
    with pytest.raises(FanalError, match="a grid of 3 steps"):
        run("sd", scheduler, steps=5)
    short = FanalScheduler.from_scheduler(own("ddpm"), schedule=str(path))
    short.set_timesteps(3)
    write_schedules(
        path, Schedules("diffusers:tiny", {3: Entry(fanal.schedules.polynomial(3, zero=False), "euler", 3)})
    )
    with pytest.raises(FanalError, match="outside"):
        short.set_timesteps(3)


def test_levels_that_the_network_does_not_know_are_told():
    scheduler = FanalScheduler.from_scheduler(own("sd"), sigmas=fanal.schedules.polynomial(5))
    with pytest.warns(UserWarning, match="nearest time.*to 80"):
        scheduler.set_timesteps(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FanalScheduler.from_scheduler(own("sd"), Heun()).set_timesteps(5)


def img2img(scheduler, strength=0.6):
    pipe, _ = tiny("sd")
    again = diffusers.StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    again.set_progress_bar_config(disable=True)
    image = torch.linspace(0, 1, 16 * 16 * 3).reshape(1, 3, 16, 16)
    generator = torch.Generator().manual_seed(5)
    return again("a cat", image, strength=strength, num_inference_steps=8, generator=generator, output_type="latent")[0]


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_a_run_that_begins_half_way_from_an_image(kind):
    theirs = getattr(diffusers, kind).from_config(own("sd").config)
    solver = Heun() if kind.startswith("Heun") else Euler()
    assert near(img2img(FanalScheduler.from_scheduler(theirs, solver)), img2img(theirs), 1e-5)


def test_a_churned_run_can_begin_half_way_where_a_call_is_to_spare():
    assert torch.isfinite(img2img(FanalScheduler.from_scheduler(own("sd"), Churn(s_max=1e9)))).all()
    with pytest.raises(FanalError, match="cannot begin here"):
        img2img(FanalScheduler.from_scheduler(own("sd"), Churn(Euler(), s_max=1e9)))


def test_latents_changed_by_a_callback_are_taken_over():
    def damp(pipe, i, t, given):
        return {"latents": 0.9 * given["latents"]} if i == 3 else given

    want, _ = run("sd", own("sd"), callback_on_step_end=damp)
    got, _ = run("sd", FanalScheduler.from_scheduler(own("sd")), callback_on_step_end=damp)
    assert near(got, want, 1e-5)

    def write(pipe, i, t, given):
        if i == 3:
            given["latents"].mul_(0.9)
        return given

    got, _ = run("sd", FanalScheduler.from_scheduler(own("sd")), callback_on_step_end=write)
    assert near(got, want, 1e-5)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_noise_is_added_as_by_the_replaced_scheduler(name):
    theirs, mine = own(name), FanalScheduler.from_scheduler(own(name))
    theirs.set_timesteps(8)
    mine.set_timesteps(8)
    clean, noise = torch.full((2, 4, 2, 2), 0.5), torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    times = theirs.timesteps[[0, 5]]
    if name == "sd3":
        want, got = theirs.scale_noise(clean, times, noise), mine.scale_noise(clean, times, noise)
    else:
        want, got = theirs.add_noise(clean, noise, times), mine.add_noise(clean, noise, times)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_half_precision_loses_nothing_between_the_calls():
    """The state is kept in float32 while the pipeline's latents are bfloat16: errors of rounding do not pile up."""
    scheduler = FanalScheduler.from_scheduler(own("sd3"))
    ends = {}
    for kind in (torch.float32, torch.bfloat16):
        scheduler.set_timesteps(100)
        z = pipelines_noise("sd3").to(kind)
        for t in scheduler.timesteps:
            z = scheduler.step(torch.ones_like(z), t, z, return_dict=False)[0]
            assert z.dtype == kind
        ends[kind] = z.double()
    exact = pipelines_noise("sd3").double() - 1
    assert float((ends[torch.float32] - exact).abs().max()) < 1e-5
    rounding = pipelines_noise("sd3").bfloat16().double() - 1
    assert float((ends[torch.bfloat16] - rounding).abs().max()) < 0.01  # 2^-8 of the largest entry, once
