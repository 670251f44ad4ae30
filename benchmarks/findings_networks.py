"""What the findings page's runs start from: two networks of one architecture, and images with noise added.

One of the networks predicts as EDM does, the other noise, as a VP model does.

The same DDPM++ (Karras et al. 2022, arXiv:2206.00364, table 1), the same digits, batches and number of steps; what
differs is what makes a model of another type: the input is `x` over the data's and the noise's size or `z = s·x`, the
answer a mixture of data and noise or the noise alone, the loss EDM's or the plain one of the noise, and the levels
log-normal around 0.45 or about as a uniform VP time gives them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from fanal.datasets import get
from fanal.files import write_tensors
from fanal.nets.edm import SongUNetConfig
from fanal.nets.folder import save_model
from fanal.objectives import LogNormal
from fanal.optimization import TrainingState
from fanal.recipes import Recipe
from fanal.seeding import noise

ITERATIONS = 2500
LEVELS = {"edm": LogNormal(-0.8, 1.2), "vp": LogNormal(1.2, 1.9)}
"""Levels by preconditioning; uniform times of the VP process have this mean and spread of ln sigma."""


class _Noise(TrainingState):
    """Training on `|F − n|²`, which is `|D − clean|²/sigma²` where `D = x − sigma·F`."""

    def _weight(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 * math.prod(self.model.shape))


def train_networks(out: Path, iterations: int = ITERATIONS) -> None:
    """Train the networks that are missing into model folders `ddpmpp-edm` and `ddpmpp-vp`."""
    net = SongUNetConfig(24, (1, 2), channel_mult_emb=2, num_blocks=1, attn_resolutions=(4,), dropout=0.0)
    for kind, levels in LEVELS.items():
        folder = out / f"ddpmpp-{kind}"
        if (folder / "model.json").is_file():
            continue
        objective, state = ("edm", TrainingState) if kind == "edm" else ("dae", _Noise)
        recipe = Recipe("digits8", net, iterations, batch=64, objective=objective, noise_levels=levels)
        torch.set_num_threads(recipe.threads)
        run = state.start(recipe, get(recipe.data), None, torch.device("cpu"))
        for model in (run.model, *run.averages):
            model.preconditioning = kind
        print(f"training {folder}: {iterations} steps", flush=True)
        while run.iteration < iterations:
            run.step()
        save_model(folder, run.averaged, {"summary": f"DDPM++ on digits8, {kind} preconditioning"})


def noised_images(data: str, count: int, path: Path) -> None:
    """Write unit noise `x/sigma_max + n` of training images x: forward-noised images as starts ([GEO] figs. 15, 19)."""
    x = get(data).data("train", count).x
    if not path.exists():
        write_tensors(path, {"noise": x / 80.0 + noise(x.shape[1:], range(count), stream="noised"), "x": x})
