"""Jumps from solvers that draw noise, of latent models, against any real images and in a user's own features."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from PIL import Image

import fanal as package
from fanal.bench.jumps import JumpsConfig
from fanal.bench.plans import compare
from fanal.bench.schedules import mixture
from fanal.config import build_solver
from fanal.denoiser import network_of
from fanal.errors import FanalError
from fanal.metrics import fid
from fanal.metrics.samples import open_samples
from fanal.pictures import to_bytes
from fanal.preparation import prepare
from fanal.schedules import jump, polynomial
from fanal.seeding import noise
from toys import fanal

NOISY = (
    "ancestral",
    "ancestral:eta=0.5",
    "ddpm",
    "sde:order=2",
    "sde:order=3,lower_final=never",
    "dpmpp_sde",
    "churn:s_churn=100",
)


class Stand(torch.nn.Module):
    """The calling contract of the published Inception, with three features."""

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        assert img.dtype == torch.uint8
        means = img.float().mean((2, 3))
        return means if return_features else means[:, :1]


@pytest.fixture
def inception(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Stand()).save(str(tmp_path / "stand.pt"))
    return f"inception:{tmp_path / 'stand.pt'}"


@pytest.fixture
def photos(tmp_path):
    """A folder of twelve images of 16 x 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=generator)
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(levels):
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def results_of(folder):
    return json.loads((folder / "run.json").read_text())["results"]


@pytest.mark.parametrize("text", NOISY)
def test_a_jump_of_a_solver_that_draws_noise_is_a_node_of_its_denoising_trajectory(text):
    """The run that is cut draws the noise of the full run up to the jump. Churn at its cap does so for any length, and
    a solver of order 3 takes the same steps if it does not lower its order at the end."""
    model, solver, grid, seeds = mixture(0), build_solver(text), polynomial(6), range(4)
    x = noise((48,), seeds, 80.0, dtype=torch.float64)
    run = list(package.trace(model, x, grid, solver, seeds))
    for node in range(6):
        ends = package.sample(model, x, jump(grid, float(grid[node])), solver, seeds)
        torch.testing.assert_close(ends, run[node].step.denoised, rtol=1e-10, atol=1e-10)


def test_figures_of_a_noisy_jump_are_those_of_its_samples(tmp_path):
    """Node 3 again from the parts, with the seeds of the half that nothing was chosen on."""
    config = JumpsConfig("grid2", "ancestral", steps=5, count=24, block=30)
    found = results_of(compare(config, tmp_path / "run"))
    setup, _ = prepare(config.sampling())
    seeds = range(24, 48)
    cut = jump(setup.sigmas, float(setup.sigmas[3]))
    ends = package.sample(setup.network, noise((2,), seeds, 80.0), cut, setup.solver, seeds)
    assert setup.dataset is not None
    real = setup.dataset.data("held out", 24).x
    assert found["reported"]["denoised"][3]["fid"]["value"] == pytest.approx(fid(ends, real).value, rel=1e-4)
    assert found["calls"]["denoised"] == [1, 2, 3, 4, 5]


def test_latents_are_judged_by_their_pictures_in_a_users_features(tmp_path, inception, photos, monkeypatch):
    """A tiny Stable Diffusion with a prompt: the distance of node 2 is that of its decoded predictions."""
    pytest.importorskip("diffusers")
    import pipelines

    monkeypatch.chdir(tmp_path)
    pipelines.make_sd().save_pretrained(tmp_path / "sd")
    given = ("--prompt", "a red dog", "--guidance", 3, "--steps", 4, "--solver", "euler", "--count", 6, "--block", 4)
    where = ("--real", photos, "--features", inception, "--out", tmp_path / "run")
    told = fanal("bench", "jumps", "diffusers:sd", *given, *where)
    assert told.exit_code == 0, told.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    own = record["results"]["reported"]
    assert record["identity"]["features"].startswith("inception ")
    assert "right" not in own["denoised"][2]  # nobody knows a wrong picture here
    config = JumpsConfig("diffusers:sd", "euler", steps=4, count=6, prompt="a red dog", guidance=3.0)
    setup, _ = prepare(config.sampling())
    # blocks of 4: rows 4 to 8 and 8 to 12 hold the second half
    x = noise(setup.network.shape, range(6, 12), float(setup.sigmas[0]))
    steps = list(package.trace(setup.bound(range(6, 12)), x, setup.sigmas, setup.solver))
    image = to_bytes(network_of(setup.network).decode(steps[2].step.denoised))  # pyright: ignore
    real = open_samples(str(photos)).read(0, 6)
    means = [side.float().mean((2, 3)) for side in (image, real)]
    assert own["denoised"][2]["fid"]["value"] == pytest.approx(fid(*means).value, rel=1e-3)
    assert own["x"][2]["fid"]["value"] != own["denoised"][2]["fid"]["value"]


def test_a_model_without_data_needs_real_samples(tmp_path, photos):
    with pytest.raises(FanalError, match="names no data set"):
        compare(JumpsConfig("gaussian:tilted2", steps=3, count=4), tmp_path / "run")
    with pytest.raises(FanalError, match="no run folder"):
        compare(JumpsConfig("gaussian:tilted2", steps=3, count=4, real="./nothing"), tmp_path / "run")
    config = JumpsConfig("gaussian:tilted2", "euler", steps=3, count=8, real="grid2")
    assert "right" not in results_of(compare(config, tmp_path / "run"))["reported"]["x"][0]
