"""The U-Nets of EDM checkpoints: parity with figures of the official networks, sizes, and the model folder."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edm_files import PRECONDITIONING, build, reference
from fanal.errors import FanalError
from fanal.nets import DhariwalUNetConfig, Preconditioned, SongUNetConfig, load_model, read_card, save_model
from fanal.nets.preconditioning import iddpm_levels, vp_level, vp_time

FIGURES = Path(__file__).parent / "figures" / "edm_networks"
INDEX = json.loads((FIGURES / "index.json").read_text())["networks"]


@pytest.mark.parametrize("name", INDEX)
def test_outputs_are_those_of_the_official_networks(name):
    model, tensors = reference(name)
    x, sigmas = tensors["io.x"], tensors["io.sigma"]
    labels = tensors["io.labels"].argmax(1) if "io.labels" in tensors else None
    for out in (model(x, sigmas, labels), torch.cat([model(x[i : i + 1], sigmas[i], None if labels is None else labels[i : i + 1]) for i in range(3)])):
        for got, expected in zip(out, tensors["io.D"], strict=True):
            assert float((got - expected).norm() / expected.norm()) <= 1e-5
            assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-5
