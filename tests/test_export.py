"""fanal's models in stock diffusers: the same samples, loaded without code from the folder, and back."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

import fanal
from fanal.adapters.pipelines import PipelineNetwork
from fanal.errors import FanalError
from fanal.nets import Preconditioned, SongUNetConfig
from fanal.solvers import DDPM, Euler, Heun
from toys import environment, refused, tiny
from toys import fanal as command

diffusers = pytest.importorskip("diffusers")

from fanal.adapters.export import FanalUNet, beta_table, export_pipeline  # noqa: E402

F64 = torch.float64


@pytest.fixture(scope="module")
def hands(tmp_path_factory):
    """The embedded model hands32 as a pipeline's folder."""
    out = tmp_path_factory.mktemp("exported") / "hands"
    card = export_pipeline("hands32", out)
    assert card["data"] == "hands32"
    return out


def loaded(folder, kind="DDIMPipeline"):
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start(shape, seed=0, count=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def drawn(pipe, steps, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    images = pipe(batch_size=count, num_inference_steps=steps, output_type="np", generator=generator).images
    return torch.as_tensor(images).permute(0, 3, 1, 2)


def grid_of(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    alphas = pipe.scheduler.alphas_cumprod.double()[pipe.scheduler.timesteps]
    return torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1, dtype=F64)])


def pixels(x):
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", ["DDIMPipeline", "DDPMPipeline", "DiffusionPipeline"])
def test_stock_ddim_is_fanals_euler(hands, kind):
    """The same noise and grid, 20 steps; the default of each class of pipeline."""
    pipe = loaded(hands, kind)
    grid, D = grid_of(pipe, 20), fanal.load("hands32")
    want = fanal.sample(D, start(D.shape) * (1 + grid[0] ** 2).sqrt(), grid, Euler())
    torch.testing.assert_close(drawn(pipe, 20), pixels(want), rtol=0, atol=2e-4)
    assert D.calls == 20
    sure = (pixels(want) - 0.5).abs() > 0.45
    assert float(sure.float().mean()) > 0.5  # pictures, not grey


def test_its_even_times_are_karras_grid(hands):
    """The polynomial schedule between the range's ends, up to the float32 of the scheduler's table."""
    grid = grid_of(loaded(hands), 1000)
    torch.testing.assert_close(grid[:-1], fanal.schedules.polynomial(999, zero=False), rtol=5e-3, atol=0)
    assert float(grid[0]) == pytest.approx(80, rel=1e-5)


def test_stock_ddpm_is_fanals_ddpm(hands, monkeypatch):
    """With the stochastic scheduler, and fanal's noise handed to both."""
    from diffusers.schedulers import scheduling_ddpm as module

    drawn_ = iter(range(10))
    monkeypatch.setattr(
        module,
        "randn_tensor",
        lambda *a, **k: fanal.noise((1, 32, 32), range(3), step=next(drawn_), stream="ancestral"),
    )
    pipe = loaded(hands, "DDPMPipeline")
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    grid, D = grid_of(pipe, 10), fanal.load("hands32")
    want = fanal.sample(D, start(D.shape) * (1 + grid[0] ** 2).sqrt(), grid, DDPM(), range(3))
    torch.testing.assert_close(drawn(pipe, 10), pixels(want), rtol=0, atol=2e-4)


def test_back_in_fanal_it_is_the_same_denoiser(hands):
    """As a pipeline that fanal reads: D to rounding at every time, and the scheduler's grid."""
    pipe = loaded(hands)
    D, back = fanal.load("hands32"), PipelineNetwork(pipe)
    assert back.shape == tuple(D.shape)
    assert back.sigma_min == pytest.approx(D.sigma_min, rel=1e-2)
    for sigma in back.grid(6)[:-1]:
        x = start(D.shape) * sigma
        torch.testing.assert_close(back(x, sigma), D(x, sigma), rtol=0, atol=1e-5 * max(1.0, float(sigma)))
    grid = back.grid(8)
    x = start(D.shape) * grid[0]
    torch.testing.assert_close(fanal.sample(back, x, grid, Heun()), fanal.sample(D, x, grid, Heun()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("classes", [0, 3])
def test_any_image_model_can_be_exported(tmp_path, classes):
    """A trained folder, of any size, with classes; the weights keep their dtype and the names of UNet2DModel hold."""
    model = tiny(tmp_path / "model", shape=(3, 8, 16), classes=classes)
    export_pipeline(str(tmp_path / "model"), tmp_path / "out")
    pipe = loaded(tmp_path / "out")
    assert pipe.unet.config.sample_size == [8, 16]
    assert pipe.unet.config.num_class_embeds == (classes or None)
    z, t = start((3, 8, 16)), torch.tensor([999, 500, 3])
    sigma = pipe.unet.times.sigmas[t]
    x = z * (1 + sigma[:, None, None, None] ** 2).sqrt().float()
    for labels in (None, torch.tensor([0, 2, 1])) if classes else (None,):
        noise = pipe.unet(z, t, class_labels=labels).sample
        want = (x - model(x, sigma, labels)) / sigma[:, None, None, None].float()
        torch.testing.assert_close(noise, want, rtol=1e-4, atol=1e-4)
    assert drawn(pipe, 5).shape == (3, 3, 8, 16)
    (one,) = pipe.unet(z, 500, return_dict=False)
    torch.testing.assert_close(one[1], pipe.unet(z, torch.tensor([999, 500, 3])).sample[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preconditioning", ["vp", "ve", "iddpm"])
def test_other_preconditionings_keep_their_range(tmp_path, preconditioning):
    limits = {"vp": (0.002, 150.0), "ve": (0.02, 100.0), "iddpm": (0.008, 2000.0)}[preconditioning]
    config = SongUNetConfig(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=())
    model = Preconditioned(
        config, (3, 8, 8), preconditioning=preconditioning, sigma_min=limits[0], sigma_max=limits[1]
    ).eval()
    export_pipeline(model, tmp_path / "out")
    pipe = loaded(tmp_path / "out")
    times = pipe.unet.times
    assert (times.sigma_min, times.sigma_max) == (
        pytest.approx(limits[0], rel=1e-2),
        pytest.approx(limits[1], rel=1e-3),
    )
    z = start((3, 8, 8))
    for t in (0, 400, 999):
        sigma = times.sigmas[t]
        x = z * (1 + sigma**2).sqrt()
        want = (x - model(x, sigma)) / sigma
        with torch.no_grad():
            torch.testing.assert_close(pipe.unet(z, t).sample, want, rtol=1e-4, atol=1e-3)


def test_half_precision_is_computed_in_float32(hands):
    pipe = loaded(hands)
    half = diffusers.DDIMPipeline.from_pretrained(hands, torch_dtype=torch.bfloat16)
    z = start((1, 32, 32)).bfloat16()
    noise = half.unet(z, 800).sample
    assert noise.dtype == torch.bfloat16
    torch.testing.assert_close(noise.float(), pipe.unet(z.float(), 800).sample, rtol=0, atol=0.05)


def test_it_can_be_described_without_memory(hands):
    """As loaders do that look at sizes first; the times are real nevertheless."""
    config = json.loads((hands / "unet" / "config.json").read_text())
    with torch.device("meta"):
        empty = FanalUNet.from_config(config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert torch.equal(empty.times.sigmas, loaded(hands).unet.times.sigmas)


def test_betas_are_the_documented_process():
    """ᾱ_t = 1/(1 + sigma_t²), every beta in (0, 1), and a range that ends at 0 begins at 0.002."""
    betas = torch.tensor(beta_table(0.002, 80.0), dtype=F64)
    assert bool(((betas > 0) & (betas < 1)).all())
    alphas = (1 - betas).cumprod(0)
    sigmas = fanal.schedules.polynomial(999, zero=False).flip(0)
    torch.testing.assert_close(alphas, 1 / (1 + sigmas**2), rtol=1e-12, atol=0)
    assert beta_table(0.0, 80.0) == betas.tolist()
    assert len(beta_table(0.02, 50.0, 10)) == 10


def test_the_folder_says_what_it_is(hands):
    index = json.loads((hands / "model_index.json").read_text())
    assert index["unet"] == ["fanal.adapters.export", "FanalUNet"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    files = sorted(str(path.relative_to(hands)) for path in hands.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    text = (hands / "README.md").read_text()
    assert "DDIMPipeline.from_pretrained" in text
    assert "0.002^(1/7)" in text
    scheduler = json.loads((hands / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["trained_betas"] == pytest.approx(beta_table(0.002, 80.0))
    assert (scheduler["clip_sample"], scheduler["timestep_spacing"]) == (False, "trailing")


def test_places_that_are_taken(tmp_path, monkeypatch):
    model = tiny(tmp_path / "model")
    out = tmp_path / "out"
    export_pipeline(model, out)
    before = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(FanalError, match="holds a pipeline"):
        export_pipeline(model, out)
    other = tiny(tmp_path / "other", seed=1)
    monkeypatch.setattr(diffusers.DDIMPipeline, "save_pretrained", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(FanalError, match="cannot write"):
        export_pipeline(other, out, overwrite=True)
    monkeypatch.undo()
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    export_pipeline(other, out, overwrite=True)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other", "out"]  # nothing half-written
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FanalError, match="other files"):
        export_pipeline(model, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(FanalError, match="no place"):
        export_pipeline(model, tmp_path / "mine" / "notes.txt")


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(FanalError, match="makes images"):
        export_pipeline("grid2", tmp_path / "out")
    with pytest.raises(FanalError, match="no network of fanal's"):
        export_pipeline("mixture:grid2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": {"architecture": "os.system"}}, "unknown architecture"),
        ({"network": {"architecture": "unet", "width": 8}}, "unknown field"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"sigma_max": 0.001}, "sigma"),
        ({"in_channels": 2**30}, "shape of a sample"),
    ],
)
def test_a_folder_with_another_configuration_is_refused(hands, tmp_path, change, words):
    config = json.loads((hands / "unet" / "config.json").read_text()) | change
    with pytest.raises(FanalError, match=words):
        FanalUNet.from_config(config)


def test_on_the_command_line(tmp_path):
    tiny(tmp_path / "model")
    done = command("convert", tmp_path / "model", tmp_path / "out", "--to", "diffusers")
    assert done.exit_code == 0, done.output
    assert "DDIMPipeline.from_pretrained" in done.output
    assert isinstance(loaded(tmp_path / "out").unet, FanalUNet)
    assert refused(command("convert", tmp_path / "model", tmp_path / "out", "--to", "diffusers"), "--overwrite")
    assert command("convert", tmp_path / "model", tmp_path / "out", "--to", "diffusers", "--overwrite").exit_code == 0
    assert refused(
        command("convert", tmp_path / "model", tmp_path / "x", "--to", "difusers"), "did you mean 'diffusers'"
    )
    assert refused(command("convert", "no-such", tmp_path / "x", "--to", "diffusers"), "unknown model")


def test_loading_it_warns_of_nothing_but_the_class(hands, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(hands)
    assert all("Expected types" in record.message for record in caplog.records)


def test_its_own_readme_loads_it_in_a_fresh_process(hands):
    """What the folder tells a reader to type works where nothing of fanal was imported before."""
    text = (hands / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0].replace("THIS FOLDER", str(hands))
    code = code.replace("num_inference_steps=40", "num_inference_steps=2").replace("batch_size=4", "batch_size=1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_fanals_already_needs_no_conversion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(command("convert", "hands32", "m"), "is a model of fanal already; --to diffusers")
    assert not (tmp_path / "m").exists()
