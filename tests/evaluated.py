"""Samples to evaluate: a run folder, pictures, and the figures that are found."""

from __future__ import annotations

import zipfile

import pytest
import torch
from PIL import Image

from fanal.datasets import get
from fanal.files import write_json, write_tensors
from fanal.metrics import as_bytes
from toys import record

HANDS = get("hands32")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def hands():
    return HANDS.data("train", 90, seed=5).x


@pytest.fixture
def run(tmp_path, hands):
    """A run folder as `fanal sample --guard redo` leaves it: x is after the repair."""
    before = hands.clone()
    before[:40] = HANDS.broken("6 fingers", 40)
    write_tensors(tmp_path / "run" / "samples.safetensors", {"x": hands, "before": before, "risk": torch.zeros(90)})
    write_json(tmp_path / "run" / "run.json", {"config": {"guard": ["redo:kappa=0.1"]}})
    return tmp_path / "run"


def save(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(as_bytes(images)):
        pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}{suffix}")
    return folder


def packed(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"images/{file.name}")
    return path


def color(n, side=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


def figures(folder):
    return record(folder)["results"]["figures"]
