"""Folders of small pipelines, to be changed and read."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import pipelines

F64 = torch.float64


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A small and a prompted pipeline as folders, and the same weights as pickles."""
    root = tmp_path_factory.mktemp("originals")
    for name in ("ddim", "sd"):
        pipelines.MAKERS[name]().save_pretrained(root / name)
    pipe = pipelines.make_sd()
    pipe.save_pretrained(root / "bin", safe_serialization=False)
    (root / "bin/text_encoder/model.safetensors").unlink(missing_ok=True)  # transformers writes nothing else any more
    torch.save(pipe.text_encoder.state_dict(), root / "bin/text_encoder/pytorch_model.bin")
    return root


@pytest.fixture
def folder(originals, tmp_path):
    """Make a copy to spoil."""

    def copy(name="ddim"):
        return Path(shutil.copytree(originals / name, tmp_path / f"{name}-copy"))

    return copy


def edit(file, **changes):
    """Change entries of a JSON file; ... removes one."""
    value = json.loads(file.read_text())
    for key, new in changes.items():
        value.pop(key, None)
        if new is not ...:
            value[key] = new
    file.write_text(json.dumps(value))


def answer(net):
    x = torch.randn(1, *net.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net(x, torch.tensor(1.0, dtype=F64))


UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
