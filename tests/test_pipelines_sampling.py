"""`fanal sample diffusers:DIR`: the pipeline's own pictures from the same noise, with prompts, classes and captions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import fanal as library
import pipelines
from fanal.denoiser import network_of
from fanal.errors import FanalError
from fanal.loading import card, fingerprint
from fanal.seeding import noise
from fanal.solvers import Euler
from toys import fanal, record, refused, samples

pytest.importorskip("diffusers")

PROMPT, NEGATIVE = "a red dog", "bad"


def saved(folder, pipe):
    """Save a pipeline as a folder in the current one; returns the spec."""
    pipe.save_pretrained(folder)
    return f"diffusers:{folder}"


def told(*words):
    result = fanal(*words)
    assert result.exit_code == 0, result.output
    return result


def pictures_of(pipe, latents, **options):
    """The pipeline's own pictures, uint8 (B, 3, H, W)."""
    shown = pipe(latents=latents, output_type="np", **options).images
    return torch.from_numpy(np.asarray(shown)).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    pipe = pipelines.make_sd(scheduler="DDIMScheduler")
    folder = tmp_path_factory.mktemp("sd")
    return pipe, saved(folder, pipe), folder


def near(a, b, within=1):
    """Whether two sets of uint8 pictures agree to rounding."""
    assert a.shape == b.shape
    assert int((a.int() - b.int()).abs().max()) <= within
    return True


def test_stable_diffusion_with_guidance(sd, tmp_path, monkeypatch):
    """The same latents give the same pictures, at one network call per step for both halves of the guidance."""
    monkeypatch.chdir(tmp_path)
    pipe, spec, _ = sd
    words = ("--steps", 6, "--count", 3, "--block", 2, "--prompt", PROMPT, "--negative", NEGATIVE, "--guidance", 3)
    told("sample", spec, *words, "--out", "run")
    run = record(tmp_path / "run")
    assert run["config"]["schedule"] == "native"
    assert run["network"] == {"calls": 2 * 6, "evaluations": 2 * 3 * 6, "calibration": 0}
    net = network_of(library.load(spec))
    x = noise(net.shape, range(3), run["results"]["sigmas"][0])
    latents = net.latents_of(x, torch.tensor(run["results"]["sigmas"][0], dtype=torch.float64))
    options = {"prompt": [PROMPT] * 3, "negative_prompt": [NEGATIVE] * 3, "guidance_scale": 3.0}
    assert near(samples(tmp_path / "run")["image"], pictures_of(pipe, latents, num_inference_steps=6, **options))


def test_captions_reach_their_samples(sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["a red dog", "two small cats", "a red dog"]
    (tmp_path / "captions.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    words = ("--steps", 4, "--count", 3, "--block", 2, "--guidance", 2)
    told("sample", sd[1], *words, "--captions", "captions.txt", "--out", "run")
    got = samples(tmp_path / "run")["x"]
    model = library.load(sd[1], prompt=texts, guidance=2.0)
    grid = network_of(model).grid(4)
    wanted = library.sample(model, noise(model.shape, range(3), float(grid[0])), grid, Euler())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert refused(
        fanal("sample", sd[1], "--count", 4, "--captions", "captions.txt", "--out", "more"), "3 captions for 4 samples"
    )
    changed = tmp_path / "captions.txt"
    before = record(tmp_path / "run")["identity"]["captions"]
    changed.write_text("another\n" * 3, encoding="utf-8")
    told("sample", sd[1], *words, "--captions", "captions.txt", "--out", "again")
    assert record(tmp_path / "again")["identity"]["captions"] != before


def test_flow_matching_starts_at_infinity(tmp_path, monkeypatch):
    """Stable Diffusion 3: pure noise in, the pipeline's pictures out; run.json stays plain JSON."""
    monkeypatch.chdir(tmp_path)
    pipe = pipelines.make_sd3()
    spec = saved(tmp_path / "sd3", pipe)
    told("sample", spec, "--steps", 5, "--count", 2, "--prompt", PROMPT, "--guidance", 3, "--guard", "redo",
         "--trajectory", "--out", "run")  # fmt: skip
    text = (tmp_path / "run" / "run.json").read_text(encoding="utf-8")
    sigmas = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["results"]["sigmas"]
    assert sigmas[0] == "inf"
    assert sigmas[-1] == 0
    kept = library.Trajectory.load(tmp_path / "run" / "trajectory.safetensors")
    assert torch.isinf(kept.sigmas[0])
    net = network_of(library.load(spec))
    unit = noise(net.shape, range(2))
    options = {"prompt": [PROMPT] * 2, "guidance_scale": 3.0, "num_inference_steps": 5}
    assert near(samples(tmp_path / "run")["image.before"], pictures_of(pipe, unit, **options))
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    told("report", "run")


def test_classes_in_turn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = saved(tmp_path / "dit", pipelines.make_dit())
    told("sample", spec, "--steps", 3, "--count", 4, "--label", "each", "--guidance", 2, "--out", "run")
    model = library.load(spec, labels=[b % network_of(library.load(spec)).classes for b in range(4)], guidance=2.0)
    grid = network_of(model).grid(3)
    wanted = library.sample(model, noise(model.shape, range(4), float(grid[0])), grid, Euler())
    torch.testing.assert_close(samples(tmp_path / "run")["x"], wanted, rtol=1e-4, atol=1e-5)


def test_settings_of_a_spec(sd):
    """Precision and size are part of the spec, so that every command takes them."""
    _, spec, _ = sd
    plain, other = library.load(spec), library.load(f"{spec},dtype=bfloat16,size=32x24")
    assert network_of(other).network.dtype == torch.bfloat16
    assert other.shape == (plain.shape[0], plain.shape[1] * 32 // 16, plain.shape[2] * 24 // 16)
    x = noise(other.shape, range(2), 1.5)
    assert other(x, torch.tensor(1.5)).dtype == torch.float32
    for text, words in (
        ("dtype=float8", "unknown dtype 'float8'"),
        ("size=32", "size is HEIGHTxWIDTH in pixels"),
        ("sise=32x32", "unknown field of pipeline diffusers 'sise': did you mean 'size'"),
        ("revision=main", "unknown field of pipeline diffusers 'revision'"),
        ("variant=fp16", "fp16"),
    ):
        with pytest.raises(FanalError, match=words):
            library.load(f"{spec},{text}")


def test_an_object_is_a_model_too():
    pipe = pipelines.make_ddim()
    model = library.load(pipe)
    x = noise(model.shape, range(2), 1.5)
    sigma = torch.tensor(1.5, dtype=torch.float64)
    assert torch.equal(model(x, sigma), network_of(model)(x, sigma))
    assert model.calls == 1


def test_what_does_not_fit_is_told(sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = sd[1]
    assert refused(fanal("sample", spec, "--label", 3), "takes a prompt, no class labels")
    assert refused(fanal("sample", spec, "--guidance", 3), "guidance needs labels or a prompt")
    assert refused(fanal("sample", spec, "--negative", "bad"), "a negative prompt needs a prompt")
    assert refused(fanal("sample", spec, "--sigma-max", 10), "the native schedule has its own ends")
    assert refused(fanal("sample", "diffusers:nowhere"), "there is no folder nowhere")
    with pytest.raises(FanalError, match="a list with one text per sample"):
        library.load(spec, prompt=[3])


def test_cards_and_fingerprints(sd, tmp_path):
    _, spec, folder = sd
    about = card(spec)
    assert about["prediction"] == "epsilon"
    assert "unet" in about["components"]
    before = fingerprint(spec)
    assert before == network_of(library.load(spec)).fingerprint()
    shown = told("models", "info", spec)
    assert json.loads(shown.stdout)["parameters"] == about["parameters"]
    (folder / "scheduler" / "scheduler_config.json").write_text(
        (folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8") + " ", encoding="utf-8"
    )
    assert fingerprint(spec) != before


def test_a_negative_prompt_needs_guidance(sd):
    with pytest.raises(FanalError, match="a negative prompt needs guidance"):
        library.load(sd[1], prompt=PROMPT, negative=NEGATIVE)


def test_prompts_are_encoded_once_over_blocks(sd, tmp_path, monkeypatch):
    """Blocks that ask for the same prompt share its encoding."""
    monkeypatch.chdir(tmp_path)
    net = network_of(library.load(sd[1]))
    asked, encode = [], type(net.family).encode
    monkeypatch.setattr(type(net.family), "encode", lambda *words: asked.append(words[2]) or encode(*words))
    told("sample", sd[1], "--steps", 1, "--count", 4, "--block", 1, "--prompt", PROMPT, "--out", "run")
    assert asked == [PROMPT]
