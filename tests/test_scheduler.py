"""Any solver inside a diffusers pipeline: the pipelines' own results, those of fanal.sample, and clear refusals."""

import warnings

import pytest
import torch

import fanal
from fanal.adapters.replay import Replay, plan, plan_from
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.sampling import depart
from fanal.solvers import SOLVERS, Ancestral, Churn, Euler, Heun
from pipeline_runs import bound, near, network, own, pipelines_noise, run, tiny
from problems import mixture
from tricky import TRICKY, Adaptive, Analytic, AtZero, Corrected, Rows, Steep

diffusers = pytest.importorskip("diffusers")

from fanal.adapters.scheduler import FanalScheduler  # noqa: E402

F64 = torch.float64
SEEDS = range(5)


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
