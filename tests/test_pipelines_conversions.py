"""Every conversion against the closed form of a Gaussian: the network is replaced by the exact answer it should give.

The answers are conditional means of x0 and of the noise given z, written out from the definition of each process; they
know nothing of fanal's formulas.
"""

import inspect
import math

import numpy as np
import pytest
import torch

import pipelines
from fanal.adapters.pipeline_schedulers import SCHEDULERS, native_sigmas, process_of
from fanal.adapters.pipelines import load_pipeline
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.sampling import sample
from fanal.solvers import Euler

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers

F64 = torch.float64
VARIANCE = 0.3


class Exact(torch.nn.Module):
    """Answers for data N(mean, VARIANCE): `answer(z, time)` where the network's output would be."""

    dtype, device = F64, torch.device("cpu")

    def __init__(self, config, answer, packed=False):
        super().__init__()
        self.config, self.answer, self.packed = config, answer, packed

    def forward(self, *args, **told):
        z = args[0] if args else told["hidden_states"]
        time = args[1] if len(args) > 1 else told["timestep"]
        assert z.dtype == F64
        assert time.dtype == F64
        assert time.shape == (len(z),)
        return (self.answer(z, time.reshape(-1, *[1] * (z.ndim - 1))),)


def level_at(alphas, time):
    """Sigma at a time: linear in log sigma between whole ones; in 1/sigma up to a last ᾱ of 0."""
    finite = alphas[alphas > 0]
    levels = np.sqrt((1 - finite) / finite)
    sigma = np.exp(np.interp(time, np.arange(len(levels)), np.log(levels)))
    with np.errstate(divide="ignore"):
        beyond = levels[-1] / np.maximum(len(levels) - time, 0)
    return np.where((time > len(levels) - 1) & (len(finite) < len(alphas)), beyond, sigma)


def vp_answer(alphas, prediction, mean, twice=False):
    """The exact output of a variance-preserving network, z = √ᾱ·x0 + √(1 − ᾱ)·noise."""

    def answer(z, time):
        alpha = 1 / (1 + torch.as_tensor(level_at(alphas, time.numpy())) ** 2)
        root, rest = alpha.sqrt(), (1 - alpha).sqrt()
        centered = (z - root * mean) / (alpha * VARIANCE + 1 - alpha)
        x0, epsilon = mean + root * VARIANCE * centered, rest * centered
        out = {"epsilon": epsilon, "sample": x0, "v_prediction": root * epsilon - rest * x0}[prediction]
        return torch.cat([out, 1e6 * torch.ones_like(out)], 1) if twice else out

    return answer


def flow_answer(mean, last=1000.0):
    """The exact velocity noise − x0 of flow matching, z = (1 − t)·x0 + t·noise, t = time/last."""

    def answer(z, time):
        t = time / last
        centered = (z - (1 - t) * mean) / ((1 - t) ** 2 * VARIANCE + t**2)
        return t * centered - (mean + (1 - t) * VARIANCE * centered)

    return answer


def mean_of(net):
    return torch.randn(net.shape, dtype=F64, generator=torch.Generator().manual_seed(5))


def check(net, levels, tolerance=1e-12):
    """D is the closed form at each level, the last of them all at once, relative to the largest term of the sums."""
    mean = mean_of(net)
    truth = Gaussian(mean, VARIANCE)
    unit = torch.randn(3, *net.shape, dtype=F64, generator=torch.Generator().manual_seed(6))
    levels = torch.tensor([[level] * 3 for level in levels] + [levels[:3]], dtype=F64)
    for i, level in enumerate(levels):
        sigma = level if i == len(levels) - 1 or i % 2 else level[0]  # 0-d and per sample
        wide = level.view(3, 1, 1, 1)
        x = unit if bool(torch.isinf(level).all()) else mean + unit * (VARIANCE + wide**2).sqrt()
        size = float(x.abs().max()) * (max(1.0, float(level.max())) if bool(torch.isfinite(level).all()) else 1)
        assert float((net(x, sigma) - truth(x, sigma)).abs().max()) <= tolerance * size, sigma


BETAS = (
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.02 + 0.01 * i for i in range(30)], "num_train_timesteps": 30},
)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("betas", BETAS, ids=["linear", "scaled_linear", "cosine", "trained"])
def test_variance_preserving_pixels(prediction, betas):
    """Epsilon, x0 and v over four tables of betas, at whole times and between them, one sigma and one per sample."""
    pipe = pipelines.make_ddim(prediction_type=prediction, **betas)
    net = load_pipeline(pipe)
    alphas = pipe.scheduler.alphas_cumprod.double().numpy()
    pipe.unet = Exact(pipe.unet.config, vp_answer(alphas, prediction, mean_of(net)))
    ends = [((1 - a) / a) ** 0.5 for a in (alphas[0], alphas[-1])]
    assert [net.sigma_min, net.sigma_max] == pytest.approx(ends, rel=1e-12)
    check(net, [ends[0], 0.3, 1.0, 2.5, 5.0, ends[1]])


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_zero_terminal_snr_up_to_infinity(prediction):
    """At infinite sigma the network sees pure noise and D is the mean."""
    pipe = pipelines.make_ddim(
        prediction_type=prediction, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    net = load_pipeline(pipe)
    alphas = pipe.scheduler.alphas_cumprod.double().numpy()
    assert (alphas[-1], net.sigma_max) == (0, math.inf)
    assert float(net.process.time_of(torch.tensor(math.inf))) == 999
    pipe.unet = Exact(pipe.unet.config, vp_answer(alphas, prediction, mean_of(net)))
    check(net, [0.3, 2.0, 30.0, 1e4, math.inf, math.inf])


def test_epsilon_says_nothing_at_infinity():
    net = load_pipeline(pipelines.make_ddim(rescale_betas_zero_snr=True))
    with pytest.raises(FanalError, match="says nothing about x0 at infinite sigma"):
        net(torch.zeros(1, *net.shape), torch.tensor(math.inf))


@pytest.mark.parametrize("learned", [True, False])
def test_learned_variance_is_left_out(learned):
    """A DiT with twice the channels: the first half is the prediction."""
    pipe = pipelines.make_dit(learned=learned)
    net = load_pipeline(pipe)
    alphas = pipe.scheduler.alphas_cumprod.double().numpy()
    pipe.transformer = Exact(pipe.transformer.config, vp_answer(alphas, "epsilon", mean_of(net), twice=learned))
    check(net, [0.02, 1.0, 40.0])


def test_score():
    """ScoreSdeVe: the network sees x and sigma and answers the score of x."""
    pipe = pipelines.make_score_sde_ve()
    net = load_pipeline(pipe)
    mean = mean_of(net)
    pipe.unet = Exact(pipe.unet.config, lambda x, sigma: -(x - mean) / (VARIANCE + sigma**2))
    assert (net.sigma_min, net.sigma_max) == (0.01, 1348.0)
    check(net, [0.01, 1.0, 40.0, 1348.0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_of_stable_diffusion_3(shift):
    """The shift moves the grid, never the relation between sigma and the network's time."""
    pipe = pipelines.make_sd3(shift=shift)
    net = load_pipeline(pipe)
    net = net.with_prompts([])
    pipe.transformer = Exact(pipe.transformer.config, flow_answer(mean_of(net)))
    assert net.sigma_min == pytest.approx(shift * 1e-3 / (1 - 1e-3), rel=1e-12)
    check(net, [1e-3, 0.3, 1.0, 25.0, 1e3, math.inf, math.inf])


def test_flow_of_flux():
    """Packed latents, and time in [0, 1]."""
    pipe = pipelines.make_flux()
    net = load_pipeline(pipe, size=(16, 16)).with_prompts([], max_sequence_length=8)
    mean = net.family.pack(mean_of(net)[None])
    pipe.transformer = Exact(pipe.transformer.config, flow_answer(mean, 1.0))
    check(net, [1e-3, 0.3, 1.0, 25.0, 1e3, math.inf, math.inf])


def test_a_run_from_infinity_ends_where_the_gaussian_does():
    """The mean of many Euler steps from pure noise approaches the exact map z → mean + √VARIANCE·z, at order 1."""
    pipe = pipelines.make_sd3()
    net = load_pipeline(pipe).with_prompts([])
    pipe.transformer = Exact(pipe.transformer.config, flow_answer(mean_of(net)))
    z = torch.randn(2, *net.shape, dtype=F64, generator=torch.Generator().manual_seed(6))
    errors = [
        float((sample(net, z, net.grid(n), Euler()) - (mean_of(net) + VARIANCE**0.5 * z)).norm()) for n in (40, 160)
    ]
    assert 3 < errors[0] / errors[1] < 5


# Grids, against levels read off the scheduler's own times.

SPACED = [name for name, space in SCHEDULERS.items() if space in ("vp", "ve")]


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_are_at_the_times_that_the_scheduler_asks_for(name, spacing):
    """Strictly decreasing, every level but the last one of a time it asks for, from its first to its last."""
    import diffusers

    kind = getattr(diffusers, name)
    spaced = {"timestep_spacing": spacing} if "timestep_spacing" in inspect.signature(kind.__init__).parameters else {}
    scheduler = kind(**spaced, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    process = process_of(scheduler)
    grid = native_sigmas(scheduler, process, 10, {})
    scheduler.set_timesteps(10)
    times = scheduler.timesteps.double().numpy()
    alphas = scheduler.alphas_cumprod.double().numpy()
    asked = np.unique(level_at(alphas, times))[::-1]
    assert len(grid) in (10, 11)
    assert bool((grid.diff() < 0).all())
    assert float(grid[0]) == pytest.approx(asked[0], rel=1e-5)
    inside = grid[:-1].numpy()
    assert all(np.abs(asked / level - 1).min() < 2e-4 for level in inside)
    if len(asked) == 10:  # no times between (KDPM2) and none twice
        assert len(inside) >= 9
    assert float(grid[-1]) in (0.0, process.sigma_min)


SHIFTS = [({"shift": 1.0}, lambda t: t), ({"shift": 3.0}, lambda t: 3 * t / (1 + 2 * t))]


@pytest.mark.parametrize(("options", "shifted"), SHIFTS)
def test_flow_grids(options, shifted):
    """Times from 1 to the smallest, shifted (the smallest twice, as diffusers does), as sigma = t/(1 − t)."""
    net = load_pipeline(pipelines.make_sd3(**options))
    t = shifted(np.linspace(1, shifted(1e-3), 8))
    want = np.append(t[1:] / (1 - t[1:]), 0)
    grid = net.grid(8)
    assert float(grid[0]) == math.inf
    np.testing.assert_allclose(grid[1:].numpy(), want, rtol=2e-6)


def test_flux_grids_shift_with_the_resolution():
    """mu is linear in the number of tokens: 0.5 at 256, 1.15 at 4,096; t = e^mu/(e^mu + 1/t − 1)."""
    net = load_pipeline(pipelines.make_flux())
    for size, tokens in ((64, 256), (256, 4096), (128, 1024)):
        mu = 0.5 + 0.65 * (tokens - 256) / (4096 - 256)
        grid = net.with_size(size, size).grid(5)
        want = [math.exp(mu) * t / (1 - t) for t in (0.8, 0.6, 0.4, 0.2)]  # of t/(1 − t) the shift is a factor
        assert float(grid[0]) == math.inf
        np.testing.assert_allclose(grid[1:].numpy(), [*want, 0], rtol=2e-6)


def test_ends_of_ddim_grids():
    """`set_alpha_to_one=False` ends at the level of time 0, or drops a last step that goes nowhere."""
    zero = load_pipeline(pipelines.make_ddim(set_alpha_to_one=True)).grid(10)
    first = load_pipeline(pipelines.make_ddim(set_alpha_to_one=False, steps_offset=1)).grid(10)
    same = load_pipeline(pipelines.make_ddim(set_alpha_to_one=False)).grid(10)
    assert (len(zero), float(zero[-1])) == (11, 0)
    assert (len(first), float(first[-1])) == (11, pytest.approx(0.01, rel=1e-3))
    assert (len(same), float(same[-1])) == (10, pytest.approx(0.01, rel=1e-3))


def test_schedulers_that_are_not_read():
    import diffusers

    refused = {
        "timestep_type='continuous'": diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction"
        ),
        "unknown scheduler 'EDMEulerScheduler'": diffusers.EDMEulerScheduler(),
        "do not increase": diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True),
        "invert_sigmas": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        "prediction_type='epsilon'": diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True),
    }
    for said, scheduler in refused.items():
        with pytest.raises(FanalError, match=said):
            process_of(scheduler)
