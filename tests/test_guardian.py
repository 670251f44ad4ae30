"""A guard inside diffusers pipelines: pictures that the pipeline draws again."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

import fanal
import pipelines
from fanal.calibration_files import read_calibration
from fanal.errors import FanalError
from fanal.guarding import guard
from fanal.hallucination import Renoise, Variance, watch
from fanal.hallucination.detectors import JacobianProbe, last_window
from fanal.preparation import SampleConfig
from fanal.solvers import Ancestral, Euler
from pipeline_runs import CALLS, bound, near, network, own, pack, packed, pipelines_noise, run, tiny
from toys import samples

diffusers = pytest.importorskip("diffusers")

from fanal.adapters.guardian import Guardian, _arguments_of  # noqa: E402
from fanal.adapters.scheduler import FanalScheduler  # noqa: E402

F64 = torch.float64
SEEDS = range(5)


class Packed(fanal.denoiser.Wrapper):
    """Flux's latents as its pipeline keeps them."""

    shape = (16, 16)

    def __call__(self, x, sigma):
        return packed(self.denoiser)(x, sigma)


def truth(name, repair, threshold, seeds, steps=8, solver=None):
    """What the repair makes of the pipeline as a denoiser, on the pipeline's own noise."""
    D, solver = bound(name), solver or Euler()
    grid = network(D).grid(steps)
    x = pipelines_noise(name)
    x = x if torch.isinf(grid[0]) else x * (1 + grid[0] ** 2).sqrt()
    if name == "flux":
        D, x = Packed(D), pack(x)
    eye = Variance(last_window(grid))
    first = watch(D, x, grid, solver, eye, seeds)
    return first, repair.repair(D, x, grid, solver, eye, seeds, first, threshold), network(bound(name))


def guarded(name, threshold, scheduler=None, steps=8, seed=3, **options):
    """Run a tiny pipeline under a Guardian; the calls are those of its network."""
    pipe, native = tiny(name)
    pipe.scheduler = scheduler or native
    net, calls = getattr(pipe, "unet", None) or pipe.transformer, []
    hook = net.register_forward_pre_hook(lambda *_: calls.append(1))
    given = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)} | CALLS[name]
    given |= options.pop("given", {})
    try:
        guardian = Guardian(pipe, threshold=threshold, **options)
        output = guardian.run(**given)
        assert guardian.open  # as it was made
        guardian.close()
        assert "step" not in vars(pipe.scheduler)
        return guardian, output.images, len(calls)
    finally:
        hook.remove()
        pipe.scheduler = native


REPAIR = Renoise(sigma=3.0, rounds=2)


@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl", "sd3", "flux", "dit", "ddim"])
def test_the_pipeline_draws_again_what_the_repair_draws(name):
    """By latents or, where the pipeline takes none, by the state in place of its first step: risk, rounds, pictures."""
    first, _, _ = truth(name, REPAIR, math.inf, [7, 8])
    limit = float(first.risk.mean())  # one of two is flagged
    first, want, D = truth(name, REPAIR, limit, [7, 8])
    guardian, images, calls = guarded(name, limit, repair=REPAIR, seeds=[7, 8])
    got = guardian.outcome
    torch.testing.assert_close(got.risk, want.risk, rtol=1e-3, atol=1e-9)
    assert torch.equal(got.rounds, want.rounds)
    assert int(got.rounds.sum()) >= 1
    assert torch.equal(guardian.flagged, first.risk > limit)
    assert near(got.x, want.x, 1e-4)
    wasted = got.rounds * (name in ("dit", "ddim"))
    assert torch.equal(got.evaluations, want.evaluations + wasted)
    assert calls == 8 + float((got.evaluations - 8).sum())  # one picture of two was flagged, and drawn alone
    shown = want.x if name == "flux" else D.state_of(want.x, 0.0)
    shown = D.decode(want.x) / 2 + 0.5 if name in ("dit", "ddim") else shown
    assert near(images, shown, 1e-3)
    plain, _ = run(name, own(name))
    kept = ~guardian.flagged
    assert torch.equal(images[kept], plain[kept])


def test_an_unreachable_threshold_leaves_the_pipelines_own_bits():
    plain, calls = run("sd", own("sd"))
    guardian, images, mine = guarded("sd", math.inf)
    assert torch.equal(images, plain)
    assert calls == mine
    assert not guardian.flagged.any()


@pytest.mark.parametrize(
    "kind",
    ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
def test_any_scheduler_can_be_entered_half_way(kind):
    """A pass from the entry down is that scheduler's own: a state that was not moved gives the run's own end."""
    scheduler = getattr(diffusers, kind).from_config(own("sd").config)
    guardian, images, _ = guarded("sd", -1.0, scheduler, repair=Renoise(3.0, 1), seeds=[7, 8])
    assert int(guardian.outcome.rounds.min()) == 1
    first = guardian.calls[0]
    entry = guardian.grid[int((guardian.grid <= 3.0).nonzero()[0])]
    assert float(first[1]) == float(entry)
    D = bound("sd")
    for x, sigma, denoised in guardian.calls[:3]:
        with torch.no_grad():
            assert near(denoised, D(x, sigma), 1e-3)
    assert bool((guardian.trajectory().sigmas.diff() < 0).all())
    assert float(guardian.trajectory().sigmas[-1]) == float(guardian.grid[-1])
    assert torch.isfinite(images).all()


def test_a_scheduler_that_draws_noise_is_entered_too():
    """DDPM, whose noise comes from the pipeline's generator: flagged pictures change, the others keep every bit."""
    plain, _ = run("ddpm", own("ddpm"))
    watched, _, _ = guarded("ddpm", math.inf)
    limit = float(watched.outcome.risk.mean())
    guardian, images, calls = guarded("ddpm", limit, repair=Renoise(3.0, 1), seeds=[7, 8])
    flagged = guardian.flagged
    assert int(flagged.sum()) == 1
    assert torch.equal(images[~flagged], plain[~flagged])
    better = guardian.outcome.risk < watched.outcome.risk
    assert torch.equal((images != plain).flatten(1).any(1), better)
    assert calls == 8 + int((guardian.outcome.evaluations - 8).sum())


def test_fanals_own_scheduler_draws_fresh_noise_in_each_round():
    solver = Ancestral(eta=0.5)
    first, _, _ = truth("sd", REPAIR, math.inf, [7, 8], solver=solver)
    limit = float(first.risk.min()) / 2  # both are flagged
    _, want, _ = truth("sd", REPAIR, limit, [7, 8], solver=solver)
    scheduler = FanalScheduler.from_scheduler(own("sd"), solver, seeds=[7, 8])
    guardian, _, _ = guarded("sd", limit, scheduler, repair=REPAIR, seeds=[7, 8])
    torch.testing.assert_close(guardian.outcome.risk, want.risk, rtol=1e-3, atol=1e-9)
    assert near(guardian.outcome.x, want.x, 1e-3)
    assert (scheduler.seeds, scheduler.round) == ([7, 8], 0)


def test_one_prompt_and_several_pictures():
    """One text for several pictures: a flagged one is drawn alone, as with a list of texts."""
    pipe, native = tiny("sd")
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 6, "output_type": "latent", "latents": latents}
    ends = []
    for given in ({"prompt": "a cat", "num_images_per_prompt": 3}, {"prompt": ["a cat"] * 3}):
        with Guardian(pipe, threshold=math.inf) as guardian:
            pipe(**call, **given)
        limit = float(guardian.risk().median())
        guardian = Guardian(pipe, threshold=limit, repair=REPAIR, seeds=[1, 2, 3])
        ends.append(guardian.run(**call, **given, callback_on_step_end=guardian).images)
        assert guardian.open
        guardian.close()
        assert int(guardian.flagged.sum()) == 1
    assert near(ends[0], ends[1], 1e-5)
    assert pipe.scheduler is native


def test_embeddings_and_their_masks_are_taken_row_by_row():
    """Of three prompts with two pictures each, those of the flagged pictures; what belongs to no prompt stays."""

    class Pipeline:
        def __call__(self, prompt_embeds=None, num_images_per_prompt=1):
            """Take what pipelines take."""

    rows = torch.arange(3)
    given = {
        "prompt_embeds": rows[:, None, None] * torch.ones(3, 4, 8),
        "prompt_attention_mask": rows[:, None] * torch.ones(3, 4),
        "negative_prompt_embeds_mask": rows[:, None] * torch.ones(3, 4),
        "prompt_embeds_2": rows[:, None, None] * torch.ones(3, 4, 8),
        "prompt_style": "plain",
        "sigmas": [3.0, 2.0, 1.0],
        "num_images_per_prompt": 2,
    }
    found = _arguments_of(Pipeline(), given, [1, 4, 5], 6)
    for name in ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds_mask", "prompt_embeds_2"):
        assert found[name].flatten(1)[:, 0].tolist() == [0, 2, 2]
    assert (found["sigmas"], found["prompt_style"], found["num_images_per_prompt"]) == ([3.0, 2.0, 1.0], "plain", 1)


def test_lists_of_pictures_are_replaced_in_place():
    first, _, _ = truth("ddim", REPAIR, math.inf, [7, 8])
    for kind in ("np", "pil"):
        guardian, images, _ = guarded(
            "ddim", float(first.risk.mean()), repair=REPAIR, seeds=[7, 8], given={"output_type": kind}
        )
        plain, _ = run("ddim", own("ddim"), output_type=kind)
        row = int(guardian.flagged.nonzero()[0])
        if guardian.outcome.risk[row] < guardian._first_risk[row]:
            assert bytes(images[row].tobytes()) != bytes(plain[row].tobytes())
        assert bytes(images[1 - row].tobytes()) == bytes(plain[1 - row].tobytes())


def test_a_pass_that_is_given_up_is_drawn_again():
    """Stopped half-way: fewer calls, then every picture starts from the last prediction."""
    guardian, images, calls = guarded("sd", 1e9, repair=REPAIR, seeds=[7, 8], stop=lambda r: len(r.transitions) == 5)
    assert bool((guardian.outcome.rounds == 1).all())
    assert torch.isfinite(guardian.outcome.risk).all()
    tail = int((guardian.grid <= REPAIR.sigma).sum()) - 1
    assert calls == 5 + tail
    assert torch.isfinite(images).all()


def test_as_a_callback_it_flags():
    pipe, _ = tiny("sd")
    guardian = Guardian(pipe, threshold=0.0)
    run("sd", own("sd"), steps=6, callback_on_step_end=guardian)
    assert not guardian.open
    assert torch.equal(guardian.flagged, guardian.risk() > 0)
    assert guardian.flagged.all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipe")
    pipelines.make_sd().save_pretrained(place / "sd")
    pipelines.make_ddim().save_pretrained(place / "ddim")
    return place


def test_a_pipeline_takes_the_calibration_of_fanal_guard(tmp_path, saved, monkeypatch):
    """Calibrated on the folder, used inside the pipeline: the same risks, flags and repaired latents."""
    monkeypatch.chdir(tmp_path)
    unit = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    grid = network(bound("sd")).grid(6)
    start = unit * (1 + grid[0] ** 2).sqrt() / grid[0]  # a pipeline starts from x = √(1 + sigma²)·n, fanal from sigma·n
    save_file({"noise": start.float()}, "n.safetensors")
    config = SampleConfig(
        f"diffusers:{saved / 'sd'}",
        steps=6,
        count=4,
        block=4,
        guard=("renoise:sigma=3.0,rounds=2",),
        calibrate=8,
        flag=0.5,
        prompt="a cat",
        guidance=7.5,
        noise="n.safetensors",
    )
    found = samples(guard(config, "run", save="c.json"))
    assert found["image"].dtype == torch.uint8
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(saved / "sd", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    guardian = Guardian(pipe, "c.json", repair=REPAIR, seeds=range(4))
    given = {"prompt": ["a cat"] * 4, "latents": unit, "output_type": "latent"}
    output = guardian.run(**given, num_inference_steps=6)
    torch.testing.assert_close(guardian._first_risk, found["risk"], rtol=1e-3, atol=1e-9)
    assert torch.equal(guardian.flagged, found["flagged"].bool())
    assert torch.equal(guardian.outcome.rounds, found["rounds.renoise"])
    torch.testing.assert_close(guardian.outcome.risk, found["risk.renoise"], rtol=1e-3, atol=1e-9)
    assert near(guardian.outcome.x, found["x"], 1e-3)
    assert output.images.shape == (4, 4, 8, 8)
    with pytest.raises(FanalError, match="calibrated on 6 steps .* takes 5 .*no other grid"):
        guardian.run(**given, num_inference_steps=5)
    assert "step" in vars(pipe.scheduler)
    guardian.close()
    assert read_calibration("c.json").conditions["prompt"] == "a cat"


def test_pixels_of_a_pipeline_are_guarded_from_the_command_line_too(tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SampleConfig(
        f"diffusers:{saved / 'ddim'}", steps=5, count=3, block=3, guard=("none",), calibrate=8, flag=0.5
    )
    found = samples(guard(config, "run"))
    assert found["risk"].shape == (3,)
    assert found["flagged"].dtype == torch.uint8


def test_what_cannot_be_guarded_is_told():
    pipe, _ = tiny("sd")
    with pytest.raises(FanalError, match="needs a calibration, as fanal guard --save"):
        Guardian(pipe)
    with pytest.raises(FanalError, match="asks the network itself"):
        Guardian(pipe, threshold=1.0, detector=JacobianProbe((0.0, 1.0)))
    with pytest.raises(FanalError, match="make the Guardian with the pipeline"):
        Guardian(diffusers.DDIMScheduler(), threshold=1.0).run()
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    guardian = Guardian(pipe, threshold=1.0)
    with pytest.raises(FanalError, match="take DDIM"):
        guardian.run(prompt="a cat")
    pipe.scheduler = own("sd")
    guardian = Guardian(pipe, threshold=-1.0)
    with pytest.raises(FanalError, match="leave return_dict out"):
        guardian.run(prompt="a cat", return_dict=False)
    guardian.close()
