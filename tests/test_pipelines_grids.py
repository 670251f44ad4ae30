"""Grids of diffusers' own schedulers: kept through a folder, and one that cannot be told."""

import pytest
import torch

import pipelines
from fanal.adapters.pipelines import load_pipeline
from fanal.sampling import toward

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers


def test_a_scheduler_comes_through_its_folder(tmp_path):
    """Every setting of it, so that the grids are the same to the bit."""
    pipe = pipelines.make_ddpm("EulerDiscreteScheduler", use_karras_sigmas=True, steps_offset=3, beta_end=0.013)
    pipe.save_pretrained(tmp_path)
    net = load_pipeline(tmp_path)
    for name, value in pipe.scheduler.config.items():
        assert name.startswith("_") or net.pipeline.scheduler.config[name] == value
    assert net.grid(7).tolist() == load_pipeline(pipe).grid(7).tolist()


def test_ddim_with_linspace_steps_beside_its_own_grid():
    """It calls the network at times 999, 888, … but steps by 100: to the level of 899. No grid reproduces that.

    One step by hand agrees at the level it really steps to, and not at the one it calls next.
    """
    net = load_pipeline(pipelines.make_ddim(timestep_spacing="linspace"))
    pipe, grid = net.pipeline, net.grid(10)
    pipe.scheduler.set_timesteps(10)
    assert pipe.scheduler.timesteps[:2].tolist() == [999, 888]
    x = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(1)) * float(grid[0])
    with torch.no_grad():
        denoised = net(x, grid[0])
        z, t = net.state_of(x, grid[0]), pipe.scheduler.timesteps[0]
        theirs = pipe.scheduler.step(net.network(z, t).sample, t, z).prev_sample
    for level, close in ((net.process.times.sigma_of(torch.tensor(899.0)), True), (grid[1], False)):
        mine = net.state_of(toward(x, denoised, grid[0], level), level)
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5) == close
