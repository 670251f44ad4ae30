"""What a pipeline did, seen from outside: the trajectory and the risks that fanal itself would have recorded."""

import inspect

import pytest
import torch

import fanal
from fanal.errors import FanalError
from fanal.hallucination import LastSlope, Variance
from fanal.hallucination.detectors import last_window
from fanal.solvers import Ancestral, Churn, Euler, Heun
from pipeline_runs import CALLS, PLAIN, bound, network, own, pack, packed, pipelines_noise, run, tiny
from pipelines import SIDE

diffusers = pytest.importorskip("diffusers")

from fanal.adapters.recorder import Recorder  # noqa: E402
from fanal.adapters.scheduler import FanalScheduler  # noqa: E402


def watched(name, scheduler, steps=8, detector=None, **more):
    """Run a pipeline under a recorder."""
    pipe, _ = tiny(name)
    before, pipe.scheduler = pipe.scheduler, scheduler
    recorder = Recorder(pipe, detector, **{k: more.pop(k) for k in ("stop",) if k in more})
    pipe.scheduler = before
    with recorder:
        end, _ = run(name, scheduler, steps, **more)
    return recorder, end


def truth(name, solver, grid, seeds=None):
    """What fanal records on the pipeline's own noise."""
    D, x = bound(name), pipelines_noise(name)
    x = x if torch.isinf(grid[0]) else x * (1 + grid[0] ** 2).sqrt()
    if name == "flux":
        D, x = packed(D), pack(x)
    return list(fanal.trace(D, x, grid, solver, seeds))


def same(got, want, tolerance=1e-5):
    return float((got - want).norm() / want.norm()) <= tolerance


@pytest.mark.parametrize("name", PLAIN)
def test_the_trajectory_and_the_risk_are_those_of_trace(name):
    """Stock DDIM, EulerDiscrete and FlowMatchEuler, to float32 rounding."""
    recorder, end = watched(name, own(name))
    got, want = recorder.trajectory(), truth(name, Euler(), network(bound(name)).grid(8))
    run_ = fanal.Trajectory.record(want)
    assert torch.equal(got.sigmas, run_.sigmas)
    assert same(got.x, run_.x)
    assert same(got.denoised, run_.denoised)
    assert len(recorder.calls) == 8
    assert got.meta["scheduler"] == type(own(name)).__name__
    if CALLS[name]["output_type"] == "latent":
        kept = network(bound(name)).state_of(run_.x[-1], run_.sigmas[-1]) if name != "flux" else run_.x[-1]
        assert same(end, kept)
    eye = Variance(last_window(run_.sigmas)).start()
    for transition in want:
        eye.see(transition)
    torch.testing.assert_close(recorder.risk(), eye.risk(), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(recorder.per_step(), eye.per_step(), rtol=1e-3, atol=1e-9)
    assert recorder.risk().shape == (2,)


OTHERS = {
    "HeunDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "DEISMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DDPMScheduler": {"clip_sample": False},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_call_is_read_right(kind):
    """Of any scheduler: what is recorded as D is the pipeline's denoiser at what is recorded as (x, sigma)."""
    scheduler = getattr(diffusers, kind).from_config(own("sd").config, **OTHERS[kind])
    recorder, end = watched("sd", scheduler, steps=5)
    D, got = bound("sd"), recorder.trajectory()
    assert len(recorder.calls) == len(scheduler.timesteps)
    for x, sigma, denoised in recorder.calls:
        with torch.no_grad():
            assert same(denoised, D(x, sigma), 1e-4)
    assert len(got.denoised) == 5
    assert bool((got.sigmas.diff() < 0).all())
    for i in range(5):  # the intervals begin where calls were made
        assert any(torch.equal(got.x[i], x) and torch.equal(got.denoised[i], d) for x, _, d in recorder.calls)
    assert same(got.x[-1], end * (1 + got.sigmas[-1] ** 2).sqrt() if end.shape == got.x[-1].shape else got.x[-1])


def test_heun_is_recorded_as_heun():
    """Second calls are calls, not states."""
    scheduler = diffusers.HeunDiscreteScheduler.from_config(own("sd").config)
    recorder, _ = watched("sd", scheduler)
    got = recorder.trajectory()
    want = fanal.Trajectory.record(truth("sd", Heun(), got.sigmas))
    assert same(got.x, want.x)
    assert same(got.denoised, want.denoised)
    assert len(recorder.calls) == 15


@pytest.mark.parametrize("solver", [Heun(), Churn(s_max=1e9), Ancestral()], ids=lambda s: type(s).__name__)
def test_fanals_own_scheduler_is_recorded_too(solver):
    scheduler = FanalScheduler.from_scheduler(own("sd"), solver, seeds=[4, 5])
    recorder, _ = watched("sd", scheduler, detector=LastSlope())
    got = recorder.trajectory()
    want = fanal.Trajectory.record(truth("sd", solver, got.sigmas, [4, 5]))
    assert torch.equal(got.sigmas, scheduler.grid)
    assert same(got.x, want.x)
    assert same(got.denoised, want.denoised)
    assert len(recorder.calls) == len(scheduler.timesteps)


def test_guided_dit_batches_are_recorded_once():
    recorder, _ = watched("dit", own("dit"))
    assert recorder.trajectory().x.shape[1:] == (2, 4, SIDE, SIDE)
    assert recorder.risk().shape == (2,)


def test_as_a_callback_it_closes_itself():
    pipe, scheduler = tiny("sd")
    recorder = Recorder(pipe)
    assert "step" in vars(scheduler)
    assert {"timesteps", "sigmas", "eta"} & set(inspect.signature(scheduler.step).parameters) == {"eta"}
    run("sd", scheduler, steps=4, callback_on_step_end=recorder)
    assert "step" not in vars(scheduler)
    assert "set_timesteps" not in vars(scheduler)
    assert len(recorder.trajectory().denoised) == 4
    with pytest.raises(FanalError, match="another pipeline"):
        recorder(object(), 0, 0, {})


def test_the_pipeline_is_left_as_it_was():
    """Recording changes no bit, and a new run starts a new record."""
    plain, _ = run("sd", own("sd"))
    pipe, scheduler = tiny("sd")
    with Recorder(pipe) as recorder:
        with pytest.raises(FanalError, match="recorded already"):
            Recorder(pipe)
        run("sd", scheduler, steps=3)
        seen, _ = run("sd", scheduler)
        assert torch.equal(seen, plain)
        assert len(recorder.trajectory().denoised) == 8
    with pytest.raises(RuntimeError, match="halt"), Recorder(pipe):
        raise RuntimeError("halt")
    assert "step" not in vars(scheduler)
    with pytest.raises(FanalError, match="nothing was recorded"):
        Recorder(scheduler).__enter__().risk()
    del scheduler.step, scheduler.set_timesteps


def test_it_stops_the_pipeline_when_asked():
    """No network call after the answer is yes; the risk is that of the interval that made it so."""
    stop = lambda recorder: len(recorder.transitions) >= 6 and bool((recorder.per_step()[-1] > 0).all())  # noqa: E731
    recorder, _ = watched("sd", own("sd"), stop=stop)
    whole, _ = watched("sd", own("sd"))
    assert len(recorder.calls) == len(recorder.transitions) < 8
    count = len(recorder.transitions)
    torch.testing.assert_close(recorder.per_step(), whole.per_step()[:count])
    assert torch.equal(recorder.trajectory().x[-1], whole.trajectory().x[count])
    with pytest.raises(FanalError, match="has no interrupt"):
        Recorder(tiny("ddim")[0], stop=stop)
    with pytest.raises(FanalError, match="make the Recorder with the pipeline"):
        Recorder(diffusers.DDIMScheduler()).interrupt()


def test_a_loop_of_ones_own_is_recorded():
    """A scheduler without a pipeline, its times set before the recorder came."""
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(6)
    x = torch.ones(3, 2) * scheduler.init_noise_sigma
    with Recorder(scheduler) as recorder:
        for t in scheduler.timesteps:
            z = scheduler.scale_model_input(x, t)
            x = scheduler.step(z * 0.5, t, x).prev_sample
    got = recorder.trajectory()
    assert torch.equal(got.x[-1], x)
    z = got.x[:-1] / (1 + got.sigmas[:-1, None, None] ** 2).sqrt()
    torch.testing.assert_close(got.denoised, (got.x[:-1] - got.sigmas[:-1, None, None] * z * 0.5).float())


def test_it_can_be_saved(tmp_path):
    recorder, _ = watched("sd3", own("sd3"), steps=4)
    recorder.trajectory({"model": "tiny"}).save(tmp_path / "t.safetensors")
    again = fanal.Trajectory.load(tmp_path / "t.safetensors")
    assert torch.isinf(again.sigmas[0])
    assert again.meta == {"model": "tiny", "scheduler": "FlowMatchEulerDiscreteScheduler"}


def test_what_cannot_be_read_is_told():
    with pytest.raises(FanalError, match="skip_prk_steps=True"):
        Recorder(diffusers.PNDMScheduler())
    with pytest.raises(FanalError, match="unknown scheduler"):
        Recorder(diffusers.EDMEulerScheduler())
