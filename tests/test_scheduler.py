"""Any solver inside a diffusers pipeline: the pipelines' own results, those of fanal.sample, and clear refusals."""

import dataclasses
import warnings
from dataclasses import dataclass, field

import pytest
import torch

import fanal
import pipelines
from fanal.adapters.replay import Replay, plan, plan_from
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.sampling import Step, depart
from fanal.solvers import DDPM, SOLVERS, Ancestral, Churn, Euler, Heun
from pipeline_runs import CALLS, PLAIN, bound, near, network, own, pack, packed, pipelines_noise, run, tiny
from problems import mixture

diffusers = pytest.importorskip("diffusers")

from fanal.adapters.scheduler import FanalScheduler  # noqa: E402

F64 = torch.float64
SEEDS = range(5)


# Solvers that tests need.


@dataclass(frozen=True)
class Corrected:
    """A Langevin step after each step of the inner solver: one call more, and noise."""

    solver: fanal.Solver = field(default_factory=Heun)

    def step(self, denoiser, x, span, memory=()):
        step = self.solver.step(denoiser, x, span, memory)
        if span.sigma_next == 0:
            return step
        pull = denoiser(step.x_next, span.sigma_next) - step.x_next
        kick = span.sigma_next * 0.2**0.5 * span.noise(x, "corrector")
        return dataclasses.replace(step, x_next=step.x_next + 0.1 * pull + kick)


@dataclass(frozen=True)
class Analytic:
    """Crosses the first interval without a call, as at large sigma D is the mean of the data, near 0."""

    def step(self, denoiser, x, span, memory=()):
        if span.i:
            return Heun().step(denoiser, x, span, memory)
        return Step(x * span.sigma_next / span.sigma, torch.zeros_like(x))


@dataclass(frozen=True)
class Steep:
    """Wants the gradient of ‖D‖² through the network."""

    def step(self, denoiser, x, span, memory=()):
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((denoiser(at, span.sigma) ** 2).sum(), at)
        return Euler().step(denoiser, x - 0 * slope, span, memory)


@dataclass(frozen=True)
class Adaptive:
    """Asks a second time where the state is large."""

    def step(self, denoiser, x, span, memory=()):
        step = Euler().step(denoiser, x, span, memory)
        return Heun().step(denoiser, x, span, memory) if step.denoised.abs().max() > 30 else step


@dataclass(frozen=True)
class Rows:
    """Asks about half of the batch."""

    def step(self, denoiser, x, span, memory=()):
        denoiser(x[: len(x) // 2], span.sigma)
        return Euler().step(denoiser, x, span, memory)


@dataclass(frozen=True)
class AtZero:
    """Asks at the end of the interval, also where that is 0."""

    def step(self, denoiser, x, span, memory=()):
        step = Euler().step(denoiser, x, span, memory)
        denoiser(step.x_next, span.sigma_next)
        return step


TRICKY = [
    Churn(Ancestral(Heun(), eta=0.3)),
    Corrected(),
    Ancestral(Corrected(Euler()), eta=0.5),
    Analytic(),
    Churn(Corrected()),
]


DIFFERENTIATING = {"taylor2"}
PLAIN_SOLVERS = [kind() for name, kind in SOLVERS.items() if name not in DIFFERENTIATING]

# By question and answer.


def ask(D, solver, sigmas, x, seeds=SEEDS):
    run, calls = Replay(solver, sigmas, x, seeds), 0
    while run.point is not None:
        run.tell(D(*run.point))
        calls += 1
    return run.x, calls


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("solver", [*PLAIN_SOLVERS, *TRICKY], ids=lambda s: type(s).__name__)
def test_question_and_answer_are_the_loop(solver, zero):
    """Bit for bit and call for call, and the plan foresees each call."""
    grid, D = fanal.schedules.polynomial(7, zero=zero), Counted(mixture())
    x = fanal.noise((2,), SEEDS, 80.0, dtype=F64)
    want = fanal.sample(D, x, grid, solver, SEEDS)
    got, calls = ask(D.denoiser, solver, grid, x)
    assert torch.equal(got, want)
    ahead = plan(solver, grid)
    assert calls == D.calls == sum(map(len, ahead.calls))
    assert len(ahead.levels) == calls + (not ahead.straight)


class FromInfinity:
    """Standard normal data in two dimensions, where x stands for the unit noise at infinity."""

    truth = Gaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))

    def __call__(self, x, sigma):
        return torch.zeros_like(x) if torch.isinf(sigma) else self.truth(x, sigma)


@pytest.mark.parametrize("solver", [Euler(), Heun(), Churn(), Ancestral()], ids=lambda s: type(s).__name__)
def test_question_and_answer_from_infinite_sigma(solver):
    grid = torch.tensor([torch.inf, 80.0, 3.0, 0.5, 0.0], dtype=F64)
    x = fanal.noise((2,), SEEDS, torch.inf, dtype=F64)
    want = fanal.sample(FromInfinity(), x, grid, solver, SEEDS)
    assert torch.equal(ask(FromInfinity(), solver, grid, x)[0], want)
    assert plan(solver, grid).straight  # the first interval is crossed by depart, which asks at the start


def test_transitions_are_those_of_trace():
    grid, D, x = fanal.schedules.polynomial(5), mixture(), fanal.noise((2,), SEEDS, 80.0, dtype=F64)
    want = fanal.Trajectory.record(fanal.trace(D, x, grid, Analytic(), SEEDS))
    run = Replay(Analytic(), grid, x, SEEDS)
    seen = list(run.finished)  # the first interval needs no answer
    while run.point is not None:
        run.tell(D(*run.point))
        seen += run.finished
    got = fanal.Trajectory.record(seen)
    assert torch.equal(got.x, want.x)
    assert torch.equal(got.denoised, want.denoised)
    with pytest.raises(FanalError, match="has ended"):
        run.tell(x)


def test_a_change_of_the_state_is_taken_over():
    """A caller that moves x between two intervals gets what a run from there gives."""
    grid, D, x = fanal.schedules.polynomial(5), mixture(), fanal.noise((2,), SEEDS, 80.0, dtype=F64)
    for solver in (Heun(), Churn(s_max=100.0)):
        run = Replay(solver, grid, x, SEEDS)
        while run.interval < 2:
            run.tell(D(*run.point))
        before = run.point[0].clone()
        run.shift(torch.full_like(x, 0.25))
        torch.testing.assert_close(run.point[0], before + 0.25)
        state = run.x
        while run.point is not None:
            run.tell(D(*run.point))
        y = state
        for transition in fanal.trace(D, x, grid, solver, SEEDS):
            if transition.span.i >= 2:
                y = solver.step(D, y, transition.span, ()).x_next
        torch.testing.assert_close(run.x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (Steep(), "differentiates through the network"),
        *((SOLVERS[name](), "differentiates through the network") for name in DIFFERENTIATING & SOLVERS.keys()),
        (Rows(), "whole batch"),
        (AtZero(), "sigma = 0"),
    ],
)
def test_solvers_that_cannot_be_asked_from_outside_say_so(solver, words):
    D, grid, x = mixture(), fanal.schedules.polynomial(5), fanal.noise((2,), range(4), 80.0, dtype=F64)
    if not isinstance(solver, AtZero):  # a denoiser may know 0, a network does not
        with pytest.raises(FanalError, match=words):
            ask(D, solver, grid, x, range(4))
    with pytest.raises(FanalError, match=words):
        plan(solver, grid)


def test_a_solver_whose_calls_depend_on_the_answers_is_refused():
    D, grid = mixture(), fanal.schedules.polynomial(5)
    x = fanal.noise((2,), range(4), 80.0, dtype=F64)
    run = Replay(Adaptive(), grid, x, range(4), plan(Adaptive(), grid).calls)
    run.tell(D(*run.point))
    with pytest.raises(FanalError, match="depend on the answers.*foreseen"):
        run.tell(D(*run.point) + 100)


def test_a_run_may_begin_where_an_interval_does():
    grid = fanal.schedules.polynomial(6)
    for solver in (Euler(), Heun(), Ancestral(Corrected())):
        whole = plan(solver, grid)
        for first in range(1, 5):
            at = sum(map(len, whole.calls[:first]))
            found = plan_from(solver, grid, whole.levels[at:])
            assert (found.first, found.straight) == (first, True)
    far = torch.cat([grid.new_full((1,), torch.inf), grid])
    found = plan_from(Heun(), far, plan(Heun(), far).levels[4:])  # one call at infinity, then two for each interval
    assert (found.first, found.straight) == (3, False)
    assert float(found.levels[0]) == float(far[3])
    churned = plan_from(Churn(), grid, plan(Churn(), grid).levels[3:])  # Heun's second call lies where the next starts
    assert (churned.first, churned.straight) == (2, False)
    for solver, at in ((Corrected(), 1), (Churn(), 2), (Churn(s_churn=1.0), 3)):  # gamma depends on the intervals left
        levels = plan(solver, grid).levels[at:]
        with pytest.raises(FanalError, match="cannot begin here"):
            plan_from(solver, grid, levels)


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


# As diffusers' schedulers are used.


def test_a_pipeline_with_it_is_saved_and_loaded(tmp_path):
    pipe, scheduler = tiny("ddim")
    pipe.scheduler = FanalScheduler.from_scheduler(
        scheduler, "churn:s_churn=20.0,solver=euler", schedule="logsnr", seeds=4
    )
    pipe.save_pretrained(tmp_path)
    pipe.scheduler = scheduler
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, FanalScheduler)
    assert again.scheduler.solver == Churn(Euler(), s_churn=20.0)
    assert again.scheduler.config.clip_sample is False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, _ = run(
            "ddim", FanalScheduler.from_scheduler(scheduler, Churn(Euler(), s_churn=20.0), schedule="logsnr", seeds=4)
        )
        got = again(batch_size=2, num_inference_steps=8, output_type="pt", generator=torch.Generator().manual_seed(3))[
            0
        ]
    assert torch.equal(got, want)


def test_configurations_lead_there_and_back(tmp_path):
    config = own("sd").config
    mine = FanalScheduler.from_config(config, solver="heun", timestep_spacing="trailing")
    assert mine.solver == Heun()
    mine.set_timesteps(4)
    assert float(mine.timesteps[0]) == 999
    back = diffusers.DDIMScheduler.from_config(mine.config)
    assert back.config.beta_schedule == config.beta_schedule
    assert back.config.prediction_type == config.prediction_type
    given = FanalScheduler.from_scheduler(own("flux"), sigmas=[torch.inf, 3.0, 0.0], seeds=[1, 2])
    given.save_pretrained(tmp_path)
    loaded = FanalScheduler.from_pretrained(tmp_path)
    assert loaded.given.tolist() == [torch.inf, 3.0, 0.0]
    assert list(loaded.seeds) == [1, 2]
    assert loaded.config.use_dynamic_shifting
    assert FanalScheduler.from_scheduler(mine).base.config == mine.base.config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FanalScheduler("euler"), "pipe.scheduler"),
        (lambda: FanalScheduler("eulr", scheduler=own("sd")), "did you mean 'euler'"),
        (lambda: FanalScheduler(Heun, scheduler=own("sd")), "object such as"),
        (lambda: FanalScheduler(sigmas=[2.0, 0.0], schedule="logsnr", scheduler=own("sd")), "not both"),
        (lambda: FanalScheduler(scheduler=diffusers.EDMEulerScheduler()), "unknown scheduler"),
        (lambda: FanalScheduler(scheduler=diffusers.ScoreSdeVeScheduler()), "does not leave its steps"),
        (lambda: FanalScheduler(scheduler={"_class_name": "os.system"}), "no scheduler of diffusers"),
        (lambda: FanalScheduler(scheduler={"_class_name": "UNet2DModelScheduler"}), "no scheduler of diffusers"),
        (lambda: FanalScheduler.from_config("sd"), "takes a scheduler's config"),
        (lambda: FanalScheduler.from_config(own("sd").config, solvr="heun"), "solvr"),
    ],
)
def test_mistakes_are_told(make, words):
    with pytest.raises(FanalError, match=words):
        make()


def test_misuse_of_a_run_is_told(tmp_path):
    scheduler, x = FanalScheduler.from_scheduler(own("sd"), Corrected(Euler()), seeds=0), torch.ones(2, 4, 2, 2)
    with pytest.raises(FanalError, match="call set_timesteps"):
        scheduler.step(x, 5.0, x)
    with pytest.raises(FanalError, match="cannot be saved"):
        scheduler.save_pretrained(tmp_path)
    scheduler = FanalScheduler.from_scheduler(own("sd"))
    scheduler.set_timesteps(2)
    with pytest.raises(FanalError, match="Ancestral"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5)
    with pytest.raises(FanalError, match="none of scheduler.timesteps"):
        scheduler.step(x, 17.5, x)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(FanalError, match="has ended"):
        scheduler.step(x, t, x)
    with pytest.raises(FanalError, match="raise num_inference_steps"):
        FanalScheduler.from_scheduler(own("sdxl"), schedule="logsnr").set_timesteps(1)


def test_a_learned_variance_is_left_out():
    scheduler, x = FanalScheduler.from_scheduler(own("dit")), torch.ones(2, 4, 2, 2)
    both = torch.cat([x * 0.5, x * 9], 1)
    scheduler.set_timesteps(2)
    want = scheduler.step(x * 0.5, scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(2)
    assert torch.equal(scheduler.step(both, scheduler.timesteps[0], x).prev_sample, want)


def test_departing_is_what_the_flow_pipelines_do():
    """The first step of flow matching, from t = 1, is `depart`: one call, z at infinity."""
    D = bound("sd3")
    grid, z = network(D).grid(4), pipelines_noise("sd3")
    span = fanal.Span(0, 4, grid[0], grid[1])
    x = depart(D, z, span).x_next
    seen = []
    run("sd3", own("sd3"), steps=4, callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"]) or k)
    assert near(network(D).state_of(x, grid[1]), seen[0], 1e-5)
