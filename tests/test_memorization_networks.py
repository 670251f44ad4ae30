"""The audit of networks that are trained here, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fanal.memorization.command import AuditConfig, audit
from fanal.nets import MLPConfig
from fanal.objectives import LogNormal
from fanal.recipes import Recipe
from fanal.report.audit import verdict
from fanal.training import train
from toys import environment, record


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_a_network_that_saw_plenty_is_cleared(tmp_path):
    config = AuditConfig("digits8", "digits8", count=500, traced=0, label="each")
    assert verdict(record(audit(config, tmp_path / "cleared"))["results"]).startswith("No sign")


def trained(place, data, count, width, iterations, batch):
    """Write a network trained on the first samples of a set, without what keeps it from learning them by heart."""
    recipe = Recipe(
        data,
        MLPConfig(width=width, depth=3, frequencies=(1.0, 2.0, 4.0)),
        iterations,
        batch=batch,
        learning_rate=3e-3,
        ema=0.99,
        noise_levels=LogNormal(-0.3, 1.1),
        train_count=count,
        held_out_count=0,
    )
    train(recipe, place, sample_every=0)
    return str(place)


def test_a_network_of_few_points_is_caught_and_one_of_many_is_cleared(tmp_path):
    """The same network, trained as long; no closed form."""
    np.save(tmp_path / "normal.npy", normal(500, 10).float().numpy())
    data = f"array:{tmp_path}/normal.npy"
    found = {}
    for count in (6, 400):
        model = trained(tmp_path / f"of-{count}", data, count, width=128, iterations=500, batch=64)
        config = AuditConfig(model, data, count=100, points=count, steps=10, traced=10, level=0.05)
        found[count] = record(audit(config, tmp_path / f"audit-{count}"))["results"]
    assert verdict(found[6]).startswith("The model replays")
    assert found[6]["copies"]["low"] > 0.7
    assert found[6]["training points copied"] == 6
    assert verdict(found[400]).startswith("No sign")
    assert found[400]["settling"]["apart"]["share"] > found[6]["settling"]["apart"]["share"]


@pytest.mark.slow
def test_a_network_of_64_digits_is_caught(tmp_path):
    model = trained(tmp_path / "model", "digits8", 64, width=256, iterations=6000, batch=128)
    config = AuditConfig(model, "digits8", count=200, points=64, traced=32)
    results = record(audit(config, tmp_path / "run"))["results"]
    assert verdict(results).startswith("The model replays")
    assert results["copies"]["low"] > 0.75
    assert results["training points copied"] > 48


@pytest.mark.slow
def test_memory_does_not_grow_with_the_training_set(tmp_path):
    """40,000 images of 32x32x3 would take 0.46 GiB as float32, and their norms once left 0.9 GiB of holes."""
    sizes = ("--train", 40_000, "--count", 128, "--held", 128, "--steps", 3, "--traced", 4)
    script = Path(__file__).parents[1] / "benchmarks" / "audit_memory.py"
    peaks = []
    for own in (sizes, ("--train", 2000, *sizes[2:])):
        words = [sys.executable, str(script), "--out", str(tmp_path / "found.json"), *map(str, own)]
        subprocess.run(words, check=True, capture_output=True, env=environment())
        found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
        assert found["points"] == own[1]
        peaks.append(found["peak GiB"])
    mapped = 40_000 * 5 / 4 * 3072 / 2**30  # the file's pages, which the system takes back when it needs them
    assert peaks[0] - peaks[1] < mapped + 0.15
