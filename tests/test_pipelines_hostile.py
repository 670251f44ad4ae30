"""Hostile and damaged folders of pipelines: read as they should be or refused, and nothing in them is run."""

import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import pipeline_folders
import pipelines
from fanal.adapters.pipelines import load_pipeline
from fanal.errors import FanalError
from pipeline_folders import INDEX, SCHEDULER, UNET, WEIGHTS, answer, edit

# Fixtures
folder = pipeline_folders.folder
originals = pipeline_folders.originals

pytest.importorskip("diffusers")


# Hostile folders.

EVIL = "import pathlib; pathlib.Path({marker!r}).write_text('run')\n"

SPOILED = {
    "another class": (INDEX, {"_class_name": "MyPipeline"}, "unknown pipeline class 'MyPipeline'"),
    "a class of its own code": (INDEX, {"_class_name": ["pipeline", "Mine"]}, "unknown pipeline class"),
    "no class": (INDEX, {"_class_name": ...}, "unknown pipeline class 'None'"),
    "a class that is an attribute of diffusers": (INDEX, {"_class_name": "logging"}, "unknown pipeline class"),
    "another library": (INDEX, {"unet": ["my_module", "UNet2DModel"]}, "comes from 'my_module'"),
    "a module of python": (INDEX, {"unet": ["os", "system"]}, "comes from 'os'"),
    "its own code": (INDEX, {"unet": ["pipeline", "UNet2DModel"]}, "comes from 'pipeline'"),
    "another class of diffusers": (INDEX, {"unet": ["diffusers", "ControlNetModel"]}, "unknown class of unet"),
    "a scheduler of its own": (INDEX, {"scheduler": ["diffusers", "MyScheduler"]}, "unknown class of scheduler"),
    "a component that is no pair": (INDEX, {"unet": ["diffusers"]}, "should be"),
    "a component that is a number": (INDEX, {"unet": 3}, "should be"),
    "a component too many": (INDEX, {"extra": ["diffusers", "UNet2DModel"]}, "no place for"),
    "a component too few": (INDEX, {"unet": ...}, "has no unet"),
    "a component set to nothing": (INDEX, {"unet": [None, None]}, "has no unet"),
    "a custom pipeline": (INDEX, {"custom_pipelines": {"a": 1}}, "own code"),
    "an auto map": (UNET, {"auto_map": {"AutoModel": "evil.Model"}}, "own code"),
    "an auto map inside": (UNET, {"down_block_types": [{"auto_map": "x"}]}, "own code"),
    "quantized weights": (UNET, {"quantization_config": {"quant_method": "x"}}, "quantized"),
    "too many layers": (UNET, {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
    "many layers of many blocks": (UNET, {"layers_per_block": 65}, "layers_per_block is 65, at most 64"),
    "many blocks": (UNET, {"down_block_types": ["DownBlock2D"] * 17}, "has 17 entries, at most 16"),
    "a number too large": (UNET, {"norm_num_groups": 10**12}, "norm_num_groups"),
    "a list too long": (UNET, {"attention_head_dim": [16] * 5000}, "5000 entries"),
    "not a number": (UNET, {"norm_eps": float("nan")}, "not a number"),
    "more memory than weights": (UNET, {"block_out_channels": [4096, 8192]}, "describes"),
    "layers without weights": (UNET, {"layers_per_block": 2}, "lack|expected shape"),
    "other shapes": (UNET, {"block_out_channels": [16, 32]}, "size mismatch|lack|shape"),
    "an unknown block": (UNET, {"down_block_types": ["Evil", "Evil"]}, "cannot read .*unet"),
    "a text for a number": (UNET, {"in_channels": "three"}, "cannot read .*unet"),
    "too many training steps": (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps"),
    "betas that are not numbers": (SCHEDULER, {"trained_betas": ["x"]}, "cannot read .*scheduler"),
    "betas above 1": (SCHEDULER, {"trained_betas": [0.5, 1.5, 0.5]}, "do not increase"),
    "betas below 0": (SCHEDULER, {"beta_start": -0.5, "beta_end": -0.1}, "do not increase"),
    "an unknown prediction": (SCHEDULER, {"prediction_type": "magic"}, "prediction_type"),
    "an unknown table": (SCHEDULER, {"beta_schedule": "magic"}, "cannot read .*scheduler"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_spoiled_settings_are_refused(folder, spoiled):
    file, changes, said = SPOILED[spoiled]
    place = folder()
    edit(place / file, **changes)
    with pytest.raises(FanalError, match=said):
        load_pipeline(place)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def drop(path, name):
    tensors = safetensors.torch.load_file(path)
    del tensors[name]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


FILES = {
    "no index": (lambda f: (f / INDEX).unlink(), "no model_index.json"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), "cannot read"),
    "an index that is a list": (lambda f: (f / INDEX).write_text("[]"), "must hold a JSON object"),
    "an index that is no text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00"), "cannot read"),
    "an index too large": (lambda f: (f / INDEX).write_text(" " * (2**24 + 1)), "larger than"),
    "an index nested too deeply": (
        lambda f: (f / INDEX).write_text('{"_class_name": "DDIMPipeline", "a": ' + "[" * 500 + "]" * 500 + "}"),
        "nested too deeply",
    ),
    "a folder too few": (lambda f: shutil.rmtree(f / "unet"), "no folder unet"),
    "a configuration too few": (lambda f: (f / UNET).unlink(), "cannot read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no safetensors weights"),
    "weights cut off": (lambda f: truncate(f / WEIGHTS, 100_000), "cannot read .*unet"),
    "weights of nothing": (lambda f: truncate(f / WEIGHTS, 0), "describes|cannot read"),
    "weights that are no tensors": (lambda f: (f / WEIGHTS).write_bytes(os.urandom(500_000)), "cannot read .*unet"),
    "a header that promises too much": (
        lambda f: (f / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + b"{" * 500_000),
        "cannot read .*unet",
    ),
    "weights without one tensor": (lambda f: drop(f / WEIGHTS, "conv_in.bias"), "lack 1 tensors.*conv_in.bias"),
    "an adapter": (lambda f: (f / "unet" / "adapter_config.json").write_text("{}"), "an adapter"),
    "code": (lambda f: (f / "pipeline.py").write_text("1"), "holds code"),
    "code in a component": (lambda f: (f / "unet" / "modeling.py").write_text("1"), "holds code"),
    "a pickle": (lambda f: (f / "unet" / "extra.pkl").write_text("1"), "holds code"),
    "shards that lead out": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "../../../model.safetensors"}})
        ),
        "no weights file of this folder",
    ),
    "shards without a map": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        "no weight_map",
    ),
}


@pytest.mark.parametrize("spoiled", FILES)
def test_spoiled_files_are_refused(folder, spoiled):
    spoil, said = FILES[spoiled]
    place = folder()
    spoil(place)
    with pytest.raises(FanalError, match=said):
        load_pipeline(place)


PROMPTED = {
    "no tokenizer": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "no tokenizer files"),
    "a broken tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"), "cannot read .*tokenizer"),
    "a tokenizer too large": (
        lambda f: (f / "tokenizer/merges.txt").write_bytes(b" " * (2**26 + 1)),
        "no tokenizer needs",
    ),
    "a tokenizer of its own": (
        lambda f: edit(f / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "own code",
    ),
    "a kernel from the hub": (
        lambda f: edit(f / "text_encoder/config.json", attn_implementation="someone/kernel"),
        "attention kernel",
    ),
    "a text encoder of another library": (
        lambda f: edit(f / INDEX, text_encoder=["diffusers", "CLIPTextModel"]),
        "comes from 'diffusers'",
    ),
    "a text encoder larger than its file": (
        lambda f: edit(f / "text_encoder/config.json", hidden_size=4096, intermediate_size=16384),
        "describes",
    ),
    "a text encoder without weights": (
        lambda f: edit(f / "text_encoder/config.json", num_hidden_layers=3),
        "lack",
    ),
}


@pytest.mark.parametrize("spoiled", PROMPTED)
def test_spoiled_prompted_pipelines_are_refused(folder, spoiled):
    spoil, said = PROMPTED[spoiled]
    place = folder("sd")
    spoil(place)
    with pytest.raises(FanalError, match=said):
        load_pipeline(place)


def test_nothing_in_a_folder_is_run(folder, tmp_path):
    """Code where loaders that trust a folder would look for it: refused, and nothing of it was imported."""
    marker = tmp_path / "marker"
    place = folder()
    (place / "pipeline.py").write_text(EVIL.format(marker=str(marker)) + "class Mine: pass\n")
    edit(place / INDEX, _class_name=["pipeline", "Mine"])
    with pytest.raises(FanalError, match="unknown pipeline class"):
        load_pipeline(place)
    edit(place / INDEX, _class_name="DDIMPipeline")
    with pytest.raises(FanalError, match="holds code"):
        load_pipeline(place)
    (place / "pipeline.py").unlink()
    assert load_pipeline(place).shape == (3, 8, 8)
    assert not marker.exists()


def test_skipped_components_are_not_even_looked_at(folder):
    """Safety checkers and image processors may name anything: they are not loaded."""
    place = folder("sd")
    edit(place / INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    edit(place / INDEX, feature_extractor=["evil", "Evil"], image_encoder=[None, None])
    net = load_pipeline(place)
    assert net.pipeline.safety_checker is None
    assert net.pipeline.feature_extractor is None


class Boom:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def test_pickled_weights_need_a_word_and_run_nothing(folder, tmp_path, monkeypatch):
    place = folder("bin")
    with pytest.raises(FanalError, match="allow_bin=True"):
        load_pipeline(place)
    seen = []
    original = torch.load

    @functools.wraps(original)
    def load(*args, **kwargs):
        seen.append(kwargs.get("weights_only"))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    net = load_pipeline(place, allow_bin=True)
    assert len(seen) >= 3
    assert all(seen)
    torch.testing.assert_close(answer(net), answer(load_pipeline(pipelines.make_sd())), rtol=1e-5, atol=1e-5)
    marker = tmp_path / "marker"
    for file in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        whole = (place / file).read_bytes()
        torch.save({"conv_in.weight": Boom(marker)}, place / file)
        pad = 2**20 - (place / file).stat().st_size
        with open(place / file, "ab") as out:
            out.write(b"\0" * pad)
        with pytest.raises(FanalError, match="cannot read"):
            load_pipeline(place, allow_bin=True)
        (place / file).write_bytes(pickle.dumps({"conv_in.weight": Boom(marker)}, 2) + b" " * 2**20)
        with pytest.raises(FanalError, match="cannot read"):
            load_pipeline(place, allow_bin=True)
        (place / file).write_bytes(whole)
    assert not marker.exists()


def test_safetensors_are_preferred_to_pickles(folder, originals):
    place = folder("sd")
    shutil.copy(originals / "bin/unet/diffusion_pytorch_model.bin", place / "unet")
    (place / "unet/diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    for allowed in (False, True):
        load_pipeline(place, allow_bin=allowed)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_load_or_are_told(folder, seed):
    """Random damage anywhere in the JSON files and in the headers: a denoiser, or one clear error."""
    place, generator = folder(), torch.Generator().manual_seed(seed)
    files = [place / name for name in (INDEX, UNET, SCHEDULER, WEIGHTS)]
    told = 0
    for i in range(24):
        file = files[i % len(files)]
        whole = file.read_bytes()
        data = bytearray(whole)
        for _ in range(1 + i % 3):
            at = int(torch.randint(min(len(data), 6000), (1,), generator=generator))
            data[at] = int(torch.randint(256, (1,), generator=generator))
        file.write_bytes(bytes(data))
        try:
            load_pipeline(place)
        except FanalError:
            told += 1
        file.write_bytes(whole)
    assert told >= 6
