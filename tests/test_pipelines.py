"""Pipelines against diffusers, live: the same noise and the same grid give the pipeline's own states and pictures.

Each pair is one tiny random pipeline, saved and loaded through `load_pipeline`. The pipeline's states are taken from
its scheduler's `step`; network calls are counted by a hook on the network. Where diffusers casts to float32 (Euler and
flow matching), agreement is to float32 rounding; the rest runs in float64.
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch

import pipelines
from fanal.adapters.pipelines import PipelineNetwork, PromptedPipeline, load_pipeline
from fanal.denoiser import Counted, Labelled
from fanal.guidance import ClassifierFree
from fanal.sampling import sample, trace
from fanal.seeding import noise
from fanal.solvers import DDPM, Euler, Heun

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers

F64 = torch.float64
PROMPTS, NEGATIVE, SCALE = ["a red dog", "two small cats"], "bad", 3.0
SIZE = (16, 16)


@dataclass
class Pair:
    """A pipeline, and what `load_pipeline` made of its folder."""

    pipe: object
    net: PipelineNetwork
    calls: dict[str, int] = field(default_factory=lambda: {"theirs": 0, "ours": 0})

    def __post_init__(self):
        for who, owner in (("theirs", self.pipe), ("ours", self.net.pipeline)):
            getattr(owner, self.net.family.network).register_forward_hook(self.counter(who))

    def counter(self, who):
        def count(*_):
            self.calls[who] += 1

        return count


OF_NETWORKS = {"unet", "learned", "embedded", "force_zeros"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Pipelines loaded from folders; each network is saved and loaded once."""
    kept = {}

    def load(name, pipe, dtype, options):
        key = (name.removesuffix("_v"), dtype, repr(options))
        if key not in kept:
            folder = tmp_path_factory.mktemp(name)
            pipe.save_pretrained(folder)
            kept[key] = load_pipeline(folder, dtype=dtype).pipeline
        return kept[key]

    return load


@pytest.fixture
def pair(loaded):
    """Make a pair: the name of a maker, its options, and the dtype in which both run.

    The loaded network is shared by all schedulers; that a scheduler comes through its folder is a test of its own.
    """

    def make(name, dtype=torch.float32, **options):
        pipe = getattr(pipelines, f"make_{name}")(**options) if options else pipelines.MAKERS[name]()
        ours = loaded(name, pipe, dtype, {key: value for key, value in options.items() if key in OF_NETWORKS})
        ours.scheduler = copy.deepcopy(pipe.scheduler)
        net = load_pipeline(ours, size=SIZE if name == "flux" else None)
        if dtype == F64:
            table = pipe.to(dtype).scheduler.alphas_cumprod.double()
            last = getattr(pipe.scheduler, "final_alpha_cumprod", None)
            pipe.scheduler.alphas_cumprod = table
            if last is not None:
                pipe.scheduler.final_alpha_cumprod = table[0] if float(last) < 1 else torch.tensor(1.0, dtype=F64)
        return Pair(pipe, net)

    return make


def start(net, grid, dtype, batch=2):
    """Where a run begins: unit noise z as the pipeline draws it, and the x that it stands for."""
    z = torch.randn(batch, *net.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    if torch.isinf(grid[0]):
        return z
    return (z * (1 + grid[0] ** 2).sqrt()).to(dtype)


def call(pair, monkeypatch, latents, steps, scale=SCALE, negative=NEGATIVE, **options):
    """Call the pipeline from these latents; returns the states that its scheduler's steps left, and its result."""
    pipe, states = pair.pipe, []
    step = pipe.scheduler.step

    def record(output, t, state, *args, **kwargs):
        left = step(output, t, state, *args, **kwargs)
        states.append(left[0] if isinstance(left, tuple) else left.prev_sample)
        return left

    monkeypatch.setattr(pipe.scheduler, "step", record)
    kind, batch = type(pipe).__name__, len(latents)
    if isinstance(pair.net, PromptedPipeline):
        told = {"negative_prompt": [negative] * batch if negative is not None else None, "output_type": "latent"}
        told |= {"latents": latents, "prompt": PROMPTS, "height": 16, "width": 16}
        if kind == "FluxPipeline":
            told |= {"true_cfg_scale": scale, "guidance_scale": 2.0, "max_sequence_length": 40}
        else:
            told["guidance_scale"] = scale
    else:
        module = type(pipe).__module__
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: latents)
        told = {"class_labels": [3, 7], "guidance_scale": scale} if kind == "DiTPipeline" else {"batch_size": batch}
        told["output_type"] = "pt" if kind == "DiTPipeline" else "np"
    result = pipe(num_inference_steps=steps, **told | options).images
    return [state[:batch] for state in states], result


def guided(net, scale=SCALE, negative=NEGATIVE):
    """Our denoiser for the same prompts or labels."""
    if isinstance(net, PromptedPipeline):
        tokens = 40 if type(net.pipeline).__name__ == "FluxPipeline" else None
        options = {"guidance_input": 2.0, "max_sequence_length": tokens}
        told = Counted(net.with_prompts(PROMPTS, negative or "", **options))
        labels = [0, 1]
    elif net.classes:
        told, labels = Counted(net), [3, 7]
    else:
        return Counted(net)
    bound = Labelled(told, labels)
    return bound if scale == 1 else ClassifierFree(bound, Labelled(told, told.denoiser.classes), scale)


def compare(pair, monkeypatch, steps, solver, rtol, dtype=torch.float32, **told):
    """Run both on the pipeline's own grid from the same noise; every Euler state, the last Heun state, and the calls.

    Differences are relative to the largest entry of the pipeline's state.
    """
    net, grid = pair.net, pair.net.grid(steps)
    x = start(net, grid, dtype)
    states, result = call(pair, monkeypatch, net.latents_of(x, grid[0]), steps, **told)
    D = guided(net, **{key: told[key] for key in ("scale", "negative") if key in told})
    with torch.no_grad():
        ours = [net.state_of(t.step.x_next, t.span.sigma_next) for t in trace(D, x, grid, solver)]
    if isinstance(solver, Euler):
        assert len(states) == len(ours) == len(grid) - 1
    else:
        states, ours = states[-1:], ours[-1:]
    for mine, their in zip(ours, states, strict=True):
        assert float((mine - their).abs().max()) <= rtol * float(their.abs().max())
    return ours[-1], result


EULER = [
    ("ddim", {}),
    ("ddim", {"timestep_spacing": "trailing"}),
    ("ddim", {"beta_schedule": "squaredcos_cap_v2"}),
    ("ddim", {"beta_schedule": "scaled_linear"}),
    ("ddim", {"prediction_type": "sample"}),
    ("ddim", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("dit", {}),
    ("dit", {"learned": False, "timestep_spacing": "trailing"}),
    ("sd", {}),
    ("sd", {"set_alpha_to_one": True}),
    ("sd", {"timestep_spacing": "trailing"}),
    ("sd_v", {}),
    (
        "sd",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
]
CALLS_IN_TWO = {"flux"}  # asks for the two halves of guidance one after the other


@pytest.mark.parametrize(("name", "options"), EULER, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in EULER])
def test_ddim_is_euler_in_float64(pair, monkeypatch, name, options):
    """Every state to 1e-9, also from infinity (zero terminal SNR), with guidance, prompts and classes; 10 calls."""
    both = pair(name, F64, **options)
    compare(both, monkeypatch, 10, Euler(), 1e-9, F64)
    assert both.calls == {"theirs": 10, "ours": 10}


FLOAT32 = [
    ("sd", "EulerDiscreteScheduler", {}, Euler()),
    ("sd", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, Euler()),
    ("sd", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, Euler()),
    ("sd", "EulerDiscreteScheduler", {"use_karras_sigmas": True}, Euler()),
    ("sd", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}, Euler()),
    ("sd", "EulerDiscreteScheduler", {"use_beta_sigmas": True}, Euler()),
    ("sd", "EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, Euler()),
    ("sd", "EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, Euler()),
    ("sd", "HeunDiscreteScheduler", {}, Heun()),
    ("sd", "HeunDiscreteScheduler", {"use_karras_sigmas": True}, Heun()),
    ("sd", "HeunDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, Heun()),
    ("sdxl", "EulerDiscreteScheduler", {}, Euler()),
    ("sdxl", "HeunDiscreteScheduler", {}, Heun()),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {}, Euler()),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, Euler()),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, Euler()),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, Euler()),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, Euler()),
    ("flux", "FlowMatchEulerDiscreteScheduler", {}, Euler()),
    ("flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": False, "embedded": False}, Euler()),
    ("flux", "FlowMatchEulerDiscreteScheduler", {"time_shift_type": "linear"}, Euler()),
]


@pytest.mark.parametrize(
    ("name", "scheduler", "options", "solver"),
    FLOAT32,
    ids=[f"{n}-{s.removesuffix('Scheduler')}-{'-'.join(map(str, o.values()))}" for n, s, o, _ in FLOAT32],
)
def test_euler_and_heun_of_prompted_pipelines(pair, monkeypatch, name, scheduler, options, solver):
    """To 1e-4 of the largest entry, with guidance between prompts and a negative prompt; as many network calls."""
    both = pair(name, scheduler=scheduler, **options)
    compare(both, monkeypatch, 10, solver, 1e-4)
    calls = 10 if isinstance(solver, Euler) else 19
    assert both.calls == {"theirs": calls * (2 if name in CALLS_IN_TWO else 1), "ours": calls}


def test_zero_terminal_snr_with_euler_begins_at_4096(pair, monkeypatch):
    """diffusers' Euler replaces infinity by 4096; the grid and the network's time say the same."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    both = pair("sd", scheduler="EulerDiscreteScheduler", **options)
    assert float(both.net.grid(10)[0]) == pytest.approx(4096, rel=1e-6)
    assert float(both.net.process.time_of(both.net.grid(10)[0])) == 999
    compare(both, monkeypatch, 10, Euler(), 2e-4)  # one float32 rounding at 4096 is 2e-4


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_without_negative_prompt_and_without_guidance(pair, monkeypatch, name):
    """No negative prompt is the pipeline's own default, and scale 1 asks for the prompt alone."""
    both = pair(name)
    compare(both, monkeypatch, 4, Euler(), 1e-4, negative=None)
    monkeypatch.undo()
    compare(both, monkeypatch, 4, Euler(), 1e-4, scale=1)


def test_stable_diffusion_xl_may_encode_the_empty_prompt(pair, monkeypatch):
    """`force_zeros_for_empty_prompt` survives the folder: with it the negative encoding is zero, without it not."""
    for force in (True, False):
        both = pair("sdxl", force_zeros=force)
        table = both.net.with_prompts(PROMPTS).table
        assert (float(table["text"][-1].abs().max()) == 0) == force
        compare(both, monkeypatch, 4, Euler(), 1e-4, negative=None)
        monkeypatch.undo()


def test_a_distilled_network_is_told_the_guidance_scale(pair, monkeypatch):
    """A U-Net with `time_cond_proj_dim`, as latent consistency models have: one call for the prompt, and its scale."""
    both = pair("sd", unet={"time_cond_proj_dim": 8})
    net, grid = both.net, both.net.grid(3)
    x = start(net, grid, torch.float32)
    states, _ = call(both, monkeypatch, net.latents_of(x, grid[0]), 3, scale=4.0)
    ends = []
    for scale in (4.0, 2.0):
        told = Labelled(net.with_prompts(PROMPTS, guidance_input=scale), [0, 1])
        ends.append(net.state_of(sample(told, x, grid, Euler()), grid[-1]))
    torch.testing.assert_close(ends[0], states[-1], rtol=1e-4, atol=1e-4)
    assert float((ends[1] - ends[0]).abs().max()) > 1e-3


def test_flow_match_heun(pair, monkeypatch):
    """Its trapezoid is in flow time, ours in sigma: driven by our D it is reproduced, 2N − 1 calls; ours differs."""
    both = pair("sd3", scheduler="FlowMatchHeunDiscreteScheduler")
    net, steps = both.net, 6
    grid = net.grid(steps)
    z = start(net, grid, torch.float32)
    states, _ = call(both, monkeypatch, net.latents_of(z, grid[0]), steps)
    D, t = guided(net), torch.where(torch.isinf(grid), torch.ones(1, dtype=F64), grid / (1 + grid))

    @torch.no_grad()
    def velocity(z, i):
        x = z if torch.isinf(grid[i]) else z / (1 - t[i])
        return (z - D(x, grid[i])) / t[i]  # z = (1 − t)x0 + t·noise, u = noise − x0

    state = z
    for i in range(steps):
        first = velocity(state, i)
        ahead = state + (t[i + 1] - t[i]) * first
        if float(t[i + 1]) > 0:
            ahead = state + (t[i + 1] - t[i]) * (first + velocity(ahead, i + 1)) / 2
        state = ahead
    assert float((state - states[-1]).abs().max()) <= 1e-4 * float(states[-1].abs().max())
    assert both.calls == {"theirs": 2 * steps - 1, "ours": 2 * steps - 1}
    ours = net.state_of(sample(D, z, grid, Heun()), grid[-1])
    assert float((ours - states[-1]).abs().max()) > 1e-3 * float(states[-1].abs().max())


def test_ddpm_is_ancestral_euler(pair, monkeypatch):
    """DDPMPipeline with its noise handed to both: every state to 1e-9 in float64, 10 calls."""
    from diffusers.schedulers import scheduling_ddpm

    both = pair("ddpm", F64)
    both.pipe.scheduler.one = torch.tensor(1.0, dtype=F64)
    net, grid, seeds = both.net, both.net.grid(10), range(2)
    drawn = iter(range(10))
    fresh = lambda i: noise(net.shape, seeds, step=i, stream="ancestral", dtype=F64)  # noqa: E731
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: fresh(next(drawn)))
    x = start(net, grid, F64)
    states, pictures = call(both, monkeypatch, net.state_of(x, grid[0]), 10)
    D = guided(net)
    with torch.no_grad():
        ends = [t.step.x_next for t in trace(D, x, grid, DDPM(), seeds)]
    for end, sigma, their in zip(ends, grid[1:], states, strict=True):
        torch.testing.assert_close(net.state_of(end, sigma), their, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.decode(ends[-1]) / 2 + 0.5, torch.as_tensor(pictures).permute(0, 3, 1, 2).float())
    assert both.calls == {"theirs": 10, "ours": 10}


def test_score_sde(pair, monkeypatch):
    """The reverse diffusion of ScoreSdeVePipeline, driven by our D with its noise, to 1e-4; one call each step.

    It conditions the network on `sigmas[i]` and steps along `discrete_sigmas`; the last mean is D.
    """
    from diffusers.schedulers import scheduling_sde_ve

    both = pair("score_sde_ve", correct_steps=0)
    net, steps = both.net, 8
    grid = net.grid(steps)
    assert float(grid[0]) == pytest.approx(1348)
    assert float(grid[-2]) == pytest.approx(0.01, rel=1e-3)
    fresh = [torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(i)) for i in range(steps)]
    drawn = iter(fresh)
    monkeypatch.setattr(scheduling_sde_ve, "randn_tensor", lambda *a, **k: next(drawn))
    unit = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(99))
    monkeypatch.setattr(f"{type(both.pipe).__module__}.randn_tensor", lambda *a, **k: unit)
    means, step = [], both.pipe.scheduler.step_pred

    def record(*args, **kwargs):
        left = step(*args, **kwargs)
        means.append(left.prev_sample_mean)
        return left

    monkeypatch.setattr(both.pipe.scheduler, "step_pred", record)
    pictures = both.pipe(batch_size=2, num_inference_steps=steps, output_type="np").images
    levels = torch.cat([both.pipe.scheduler.discrete_sigmas.double().flip(0), torch.zeros(1, dtype=F64)])
    x, D = unit * float(grid[0]), Counted(net)
    for i in range(steps):
        index = int(both.pipe.scheduler.timesteps[i] * (steps - 1))
        level, below = levels[steps - 1 - index], levels[steps - index]
        with torch.no_grad():
            score = (D(x, grid[i]) - x) / grid[i] ** 2
        mean = x + (level**2 - below**2) * score
        assert float((mean - means[i]).abs().max()) <= 1e-4 * float(means[i].abs().max())
        x = (mean + (level**2 - below**2).sqrt() * fresh[i]).float()
    want = torch.as_tensor(pictures).permute(0, 3, 1, 2)
    torch.testing.assert_close(net.decode(mean) / 2 + 0.5, want, rtol=0, atol=1e-4)
    inside = torch.full((1, *net.shape), 0.25)  # the pipeline's pixels lie in [0, 1]
    torch.testing.assert_close(net.decode(inside), torch.full_like(inside, -0.5))
    assert both.calls == {"theirs": steps, "ours": steps}


@pytest.mark.parametrize("name", ["dit", "sd", "sdxl", "sd3", "flux"])
def test_pictures_are_those_of_the_pipeline(pair, monkeypatch, name):
    """`decode` scales latents as each pipeline does: its own pictures to 1e-4, whatever the batch."""
    both = pair(name)
    grid = both.net.grid(2)
    x = start(both.net, grid, torch.float32)
    options = {} if name == "dit" else {"output_type": "pt"}
    states, pictures = call(both, monkeypatch, both.net.latents_of(x, grid[0]), 2, **options)
    with torch.no_grad():
        end = sample(guided(both.net), x, grid, Euler())
        held = both.net.state_of(end, grid[-1]) if name != "flux" else end  # the pipeline decodes what its loop holds
        decoded = both.net.decode(held)
    assert decoded.shape == (2, 3, 16, 16)
    torch.testing.assert_close(decoded / 2 + 0.5, pictures, rtol=0, atol=1e-4)
    monkeypatch.setattr("fanal.adapters.pipelines._DECODED", 1)
    with torch.no_grad():
        torch.testing.assert_close(both.net.decode(held), decoded)


def test_a_network_time_between_two_whole_ones(pair, monkeypatch):
    """With linspace spacing and a fractional time, diffusers interpolates sigma and we its logarithm.

    The times differ by less than 0.005 of a training step, which the states do not show at 1e-4.
    """
    both = pair("sd", scheduler="EulerDiscreteScheduler", timestep_spacing="linspace")
    for steps in (7, 50):
        times = both.net.process.time_of(both.net.grid(steps)[:-1])
        both.pipe.scheduler.set_timesteps(steps)
        assert 1e-4 < float((times - both.pipe.scheduler.timesteps.double()).abs().max()) < 5e-3
    compare(both, monkeypatch, 7, Euler(), 1e-4)
