"""Folders of pipelines: what is read, and what is refused without running anything."""

import hashlib
import json
import shutil

import pytest
import torch

import fanal
import pipeline_folders
import pipelines
from fanal.adapters.pipeline_files import PIPELINES, read_layout
from fanal.adapters.pipelines import load_pipeline
from fanal.errors import FanalError
from pipeline_folders import INDEX, SCHEDULER, UNET, WEIGHTS, answer, edit

# Fixtures
folder = pipeline_folders.folder
originals = pipeline_folders.originals

pytest.importorskip("diffusers")


# What is read.


def test_variants_and_dtypes(originals, tmp_path):
    """Weights of a variant are asked for by name; half-precision networks take and give float32."""
    pipe = pipelines.make_sd()
    place = tmp_path / "half"
    pipe.to(torch.bfloat16).save_pretrained(place, variant="bf16")
    with pytest.raises(FanalError, match="no safetensors weights; it has"):
        load_pipeline(place)
    with pytest.raises(FanalError, match="of variant 'fp16'"):
        load_pipeline(place, variant="fp16")
    with pytest.raises(FanalError, match="a short word"):
        load_pipeline(place, variant="../x")
    net = load_pipeline(place, variant="bf16", dtype=torch.bfloat16)
    assert net.network.dtype == torch.bfloat16
    D, exact = answer(net), answer(load_pipeline(originals / "sd"))
    assert D.dtype == torch.float32
    assert 0 < float((D - exact).abs().max()) < 0.1
    assert net.decode(D).dtype == torch.float32


def test_sharded_weights(folder, originals):
    """Weights in several files with an index, as large networks have them."""
    place = folder()
    pipe = pipelines.make_ddim()
    (place / WEIGHTS).unlink()
    pipe.unet.save_pretrained(place / "unet", max_shard_size="200KB")
    assert len(list((place / "unet").glob("*-of-*.safetensors"))) > 1
    torch.testing.assert_close(answer(load_pipeline(place)), answer(load_pipeline(originals / "ddim")))


def test_a_folder_of_an_old_dit(tmp_path):
    """DiT's first folders call the transformer by its old class."""
    pipelines.make_dit().save_pretrained(tmp_path)
    edit(tmp_path / INDEX, transformer=["diffusers", "Transformer2DModel"])
    edit(tmp_path / "transformer/config.json", _class_name="Transformer2DModel")
    net = load_pipeline(tmp_path)
    assert (net.classes, type(net.network).__name__) == (1000, "DiTTransformer2DModel")


def test_stable_diffusion_3_without_t5(tmp_path):
    """The folder may leave T5 out, as small machines do; the pipeline then encodes zeros for it."""
    pipe = pipelines.make_sd3()
    pipe.save_pretrained(tmp_path)
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / name)
    edit(tmp_path / INDEX, text_encoder_3=[None, None], tokenizer_3=[None, None])
    net = load_pipeline(tmp_path)
    assert net.pipeline.text_encoder_3 is None
    table = net.with_prompts(["a dog"]).table
    told, _, _, _ = pipe.encode_prompt("a dog", None, None)
    width = told.shape[1] - 256  # the CLIP part; T5's is zero
    torch.testing.assert_close(table["text"][:1, :width], told[:, :width])
    assert float(table["text"][:, width:].abs().max()) == 0


def test_a_folder_that_fanal_exported(tmp_path):
    """fanal's own network and scheduler are known names too; the replaced scheduler's grid is read."""
    from fanal.adapters.export import export_pipeline
    from fanal.adapters.scheduler import FanalScheduler

    export_pipeline("digits8", tmp_path / "digits")
    own, back = fanal.load("digits8"), load_pipeline(tmp_path / "digits")
    assert (back.shape, back.classes, back.null_label) == (tuple(own.shape), 10, True)
    labels = torch.tensor([3, 10])
    for sigma in back.grid(4)[:-1]:
        x = torch.randn(2, *own.shape, generator=torch.Generator().manual_seed(0)) * float(sigma)
        with torch.no_grad():
            mine, theirs = back(x, sigma, labels), own(x, sigma, labels)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * max(1.0, float(sigma)))
    pipe = pipelines.make_sd3()
    grid = load_pipeline(pipe).grid(5)
    pipe.scheduler = FanalScheduler.from_scheduler(pipe.scheduler, "heun")
    pipe.save_pretrained(tmp_path / "sd3")
    for source in (pipe, tmp_path / "sd3"):
        assert load_pipeline(source).grid(5).tolist() == grid.tolist()
    edit(tmp_path / "sd3/scheduler/scheduler_config.json", replaces="MyScheduler")
    with pytest.raises(FanalError, match="unknown replaced scheduler 'MyScheduler'"):
        load_pipeline(tmp_path / "sd3")


def test_a_network_that_does_not_say_its_size(folder):
    place = folder("sd")
    edit(place / UNET, sample_size=None)
    with pytest.raises(FanalError, match="give size="):
        load_pipeline(place)
    assert load_pipeline(place, size=(24, 16)).shape == (4, 12, 8)


def test_cards_and_fingerprints(originals, folder):
    net = load_pipeline(originals / "sd")
    card = json.loads(json.dumps(net.card(), allow_nan=False))
    assert card["summary"].startswith("StableDiffusionPipeline: UNet2DConditionModel, 4x8x8, predicts epsilon")
    assert (card["process"], card["sigma_min"]) == ("vp", pytest.approx(0.0292, rel=1e-2))
    assert card["source"] == {"format": "diffusers pipeline", "folder": "sd"}
    file = originals / "sd/unet/diffusion_pytorch_model.safetensors"
    listed = card["components"]["unet"]["files"]
    assert listed[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(card["components"]) == {*PIPELINES["StableDiffusionPipeline"], "scheduler"}
    flow = load_pipeline(pipelines.make_sd3())
    assert json.loads(json.dumps(flow.card(), allow_nan=False))["sigma_max"] == "inf"
    place = folder("sd")
    assert load_pipeline(place).fingerprint() == net.fingerprint()
    edit(place / SCHEDULER, beta_end=0.0125)
    assert load_pipeline(place).fingerprint() != net.fingerprint()
    first, second = (load_pipeline(pipelines.make_ddim()).fingerprint() for _ in range(2))
    assert first == second != load_pipeline(pipelines.make_ddim(beta_end=0.0125)).fingerprint()
    changed = pipelines.make_ddim()
    changed.unet.conv_in.weight.add_(1e-3)
    assert load_pipeline(changed).fingerprint() != first


def test_sources_that_are_no_pipeline(tmp_path):
    with pytest.raises(FanalError, match="there is no folder"):
        load_pipeline(tmp_path / "nothing")
    with pytest.raises(FanalError, match="no diffusers pipeline"):
        read_layout(tmp_path)
