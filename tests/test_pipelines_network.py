"""What a pipeline's network is as a denoiser: prompts, classes, sizes, gradients, and how mistakes are told."""

import re
from pathlib import Path

import pytest
import torch

import pipelines
from fanal.adapters.pipelines import load_pipeline
from fanal.denoiser import Latent, Native, Prompted
from fanal.errors import FanalError

pytest.importorskip("diffusers")

F64 = torch.float64
PROMPTS, NEGATIVE = ["a red dog", "two small cats"], "bad"


@pytest.fixture(scope="module")
def made():
    """Networks of pipeline objects; nothing here changes them."""
    names = ("ddim", "dit", "sd", "sdxl", "sd3", "flux", "score_sde_ve")
    return {name: load_pipeline(pipelines.MAKERS[name](), size=(16, 16) if name == "flux" else None) for name in names}


def test_prompts_make_a_new_object_that_shares_the_network(made):
    net = made["sd"]
    told = net.with_prompts(PROMPTS, NEGATIVE)
    assert isinstance(net, Prompted)
    assert not isinstance(made["dit"], Prompted)  # its labels are classes
    assert all(isinstance(one, Native) and isinstance(one, Latent) for one in made.values())
    assert (net.classes, told.classes, told.prompts) == (0, 2, tuple(PROMPTS))
    assert told.network is net.network
    x, sigma = torch.randn(3, *net.shape, generator=torch.Generator().manual_seed(1)), torch.tensor(2.0, dtype=F64)
    with torch.no_grad():
        free, empty = told(x, sigma), told(x, sigma, torch.tensor([2, 2, 2]))
        torch.testing.assert_close(free, empty, rtol=0, atol=0)
        torch.testing.assert_close(net(x, sigma), net.with_prompts(["x"])(x, sigma), rtol=0, atol=0)
        mixed = told(x, sigma, torch.tensor([0, 2, 1]))
        torch.testing.assert_close(mixed[1:2], free[1:2])
        torch.testing.assert_close(mixed[0:1], told(x[:1], sigma, torch.tensor([0])))
        assert float((mixed[0] - free[0]).abs().max()) > 1e-3
        again = net.with_prompts([PROMPTS[0], "other"], NEGATIVE)
        torch.testing.assert_close(again(x[:1], sigma, torch.tensor([0])), mixed[0:1])


def test_per_sample_sigmas_are_those_of_single_samples(made):
    for net in made.values():
        x = torch.randn(3, *net.shape, generator=torch.Generator().manual_seed(1))
        sigma = torch.tensor([0.05, 1.0, 14.0], dtype=F64)
        with torch.no_grad():
            whole = net(x, sigma)
            single = torch.cat([net(x[i : i + 1], sigma[i]) for i in range(3)])
        torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-4)


def test_gradients_reach_x(made):
    net = made["sd3"]
    x = torch.randn(1, *net.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    net(x, torch.tensor(1.0, dtype=F64)).square().sum().backward()
    assert float(x.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in net.network.parameters())


def test_another_size(made):
    """Latents, time ids and the resolution's shift follow the size."""
    flux = made["flux"]
    wide = flux.with_size(32, 48)
    assert (wide.shape, flux.shape) == ((4, 16, 24), (4, 8, 8))
    assert float(wide.grid(4)[1]) > float(flux.grid(4)[1])  # more tokens, more noise
    assert load_pipeline(flux.pipeline).shape == (4, 128, 128)  # the pipeline's default
    large = made["sdxl"].with_size(24, 16)
    assert large.shape == (4, 12, 8)
    x = torch.randn(1, *large.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert large.decode(large(x, torch.tensor(1.0, dtype=F64))).shape == (1, 3, 24, 16)


MISTAKES = [
    ("sd", lambda net: net(torch.zeros(1, 3, 8, 8), torch.tensor(1.0)), "have shape"),
    ("sd", lambda net: net(torch.zeros(2, 4, 8, 8), torch.tensor([1.0, 2.0, 3.0])), "one entry per sample"),
    ("sd", lambda net: net(torch.zeros(2, 4, 8, 8), torch.tensor([1.0, float("inf")])), "infinite for some"),
    ("sd", lambda net: net.with_prompts("a dog"), "a list of texts"),
    ("sd", lambda net: net.with_prompts([3]), "a list of texts"),
    ("sd", lambda net: net.with_size(15, 16), "multiples of 2"),
    ("sd", lambda net: net.grid(0), "at least 1"),
    ("sd", lambda net: net.grid(5000), "cannot take 5000 steps"),
    ("sd3", lambda net: net.with_size(64, 16), "at most 32"),
    ("dit", lambda net: net.with_size(32, 32), "has one size"),
    ("dit", lambda net: net(torch.zeros(1, 4, 8, 8), torch.tensor(1.0), torch.tensor([1001])), r"in \[0, 1000\)"),
    ("dit", lambda net: net(torch.zeros(1, 4, 8, 8), torch.tensor(1.0), torch.tensor([-1])), r"in \[0, 1000\)"),
    ("dit", lambda net: net(torch.zeros(1, 4, 8, 8), torch.tensor(1.0), torch.tensor([1.0])), "whole numbers"),
    ("ddim", lambda net: net(torch.zeros(1, 3, 8, 8), torch.tensor(1.0), torch.tensor([1])), r"in \[0, 0\)"),
    ("ddim", lambda net: net.with_size(15, 16), "multiples of 2"),
]


@pytest.mark.parametrize(("name", "mistake", "said"), MISTAKES)
def test_mistakes_are_told(made, name, mistake, said):
    with pytest.raises(FanalError, match=said):
        mistake(made[name])


def test_class_conditional_pixels():
    """A UNet2DModel with a class embedding knows no unconditional sample."""
    net = load_pipeline(pipelines.make_ddim(unet={"num_class_embeds": 5}))
    assert net.classes == 5
    x, sigma = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(1)), torch.tensor(1.0, dtype=F64)
    with torch.no_grad():
        own = net(x, sigma, torch.tensor([4, 0]))
        raw = net.network(x / 2**0.5, net.process.time_of(sigma).float(), torch.tensor([4, 0])).sample
    torch.testing.assert_close(own, x - raw)
    with pytest.raises(FanalError, match="no unconditional sample"):
        net(x, sigma)


def test_networks_that_take_more_than_a_sample_are_refused():
    from diffusers import LCMScheduler

    with pytest.raises(FanalError, match="only plain denoisers"):
        load_pipeline(pipelines.make_ddim(unet={"in_channels": 9}))
    pipe = pipelines.make_sd()
    pipe.scheduler = LCMScheduler()
    with pytest.raises(FanalError, match="unknown scheduler 'LCMScheduler'"):
        load_pipeline(pipe)
    with pytest.raises(FanalError, match="unknown pipeline class 'dict'"):
        load_pipeline({})


def test_the_table_of_families_names_tests_that_exist():
    """Each cell of the documentation's table is a claim; the test it names must be there."""
    root = Path(__file__).parent
    text = (root.parent / "docs/pipelines.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    known = {name for file in root.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert len(named) > 15
    assert named <= known
