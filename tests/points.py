"""Points in the plane, and a recipe that learns them in a second."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from fanal.datasets import Data
from fanal.nets import MLPConfig
from fanal.objectives import LogNormal
from fanal.recipes import Recipe
from fanal.training import train

MEANS = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
TINY = Recipe(
    "points",
    MLPConfig(width=16, depth=2, embedding=8),
    iterations=60,
    batch=16,
    warmup=5,
    train_count=200,
    held_out_count=32,
    conditional=True,
    label_dropout=0.2,
)


class Points:
    """Three blobs in the plane; the label is the blob."""

    name, shape, verdicts, classes = "points", (2,), (), ("left", "top", "bottom")
    broken_kinds: dict[str, tuple[str, ...]] = {}

    def data(self, split="train", count=None, seed=0):
        generator = torch.Generator().manual_seed(seed + (split != "train"))
        labels = torch.randint(3, (count or 1000,), generator=generator)
        return Data(MEANS[labels] + 0.3 * torch.randn(len(labels), 2, generator=generator), labels)


class Blank(Points):
    """Points with another shape, as images."""

    shape = (1, 8, 8)

    def data(self, split="train", count=None, seed=0):
        generator = torch.Generator().manual_seed(seed + (split != "train"))
        return Data(torch.randn(count or 50, 1, 8, 8, generator=generator), torch.zeros(count or 50, dtype=torch.long))


def weights(folder):
    return load_file(folder / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def interrupted(recipe, folder, dataset, at):
    """Press Ctrl-C during step `at`."""
    calls = []

    class Watched(LogNormal):
        def sample(self, u):
            calls.append(u)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().sample(u)

    watched = dataclasses.replace(recipe, noise_levels=Watched())
    with pytest.raises(KeyboardInterrupt):
        train(watched, folder, dataset=dataset, sample_every=0, validate_every=10**6)
    assert len(calls) == at
