"""One optimizer step after another: a training run's state, without files.

Every random draw is a function of (seed, iteration).
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fanal import objectives
from fanal.datasets import Data, Dataset
from fanal.denoiser import Denoiser
from fanal.errors import FanalError, NonFiniteError
from fanal.nets.preconditioning import Preconditioned
from fanal.objectives import Batch, edm_weight
from fanal.recipes import Recipe
from fanal.seeding import noise

__all__ = ["LEVELS", "Draw", "Score", "TrainingState", "bind", "draw", "validate"]

LEVELS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)  # the noise levels that validation reports

_SCORE_BASED = {"dsm", "esm", "ism", "ssm"}

Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Draw:
    """The random part of one step: a function of the recipe's seed and the iteration."""

    indices: Tensor
    sigma: Tensor
    noise: Tensor
    drop: Tensor
    probe: Tensor | None
    torch_seed: int


def draw(recipe: Recipe, iteration: int, count: int, shape: tuple[int, ...]) -> Draw:
    """Draw a step's batch indices, noise levels, noise, dropped labels and probes, all on the CPU.

    Args:
        recipe: gives the seed, batch size and noise levels.
        iteration: the step.
        count: size of the training set.
        shape: shape of one sample.
    """
    key = np.array([recipe.seed, (zlib.crc32(b"training") << 32) | iteration], dtype=np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    indices = torch.from_numpy(random.integers(count, size=recipe.batch))
    u = torch.from_numpy(random.random(recipe.batch)).clamp_min(1e-12)
    drop = torch.from_numpy(random.random(recipe.batch) < recipe.label_dropout)
    seed = int(random.integers(2**32))
    values = torch.from_numpy(random.standard_normal((recipe.batch, *shape), dtype=np.float32))
    probe = None
    if recipe.objective == "ssm":
        probe = torch.from_numpy(random.choice(np.array([-1, 1], dtype=np.float32), size=(recipe.batch, *shape)))
    return Draw(indices, recipe.noise_levels.sample(u).float(), values, drop, probe, seed)


def bind(model: Preconditioned, labels: Tensor | None) -> Denoiser:
    """Fix a model's labels; None means no label."""
    return lambda x, sigma: model(x, sigma, labels)


def validate(model: Preconditioned, data: Data, sigma: Tensor) -> Tensor:
    """Return the "edm" loss of each held-out sample, shape (N,), with noise that is always the same.

    Args:
        model: the denoiser.
        data: held-out samples.
        sigma: noise level, one per sample, (N,).
    """
    device = next(model.parameters()).device
    losses = []
    for start in range(0, len(data.x), 128):
        part = slice(start, start + 128)
        clean = data.x[part]
        seeds = range(start, start + len(clean))
        batch = Batch(
            clean.to(device),
            noise(model.shape, seeds, stream="validation", device=device),
            sigma[part].float().to(device),
            model.sigma_data,
        )
        labels = data.labels[part] if model.classes and data.labels is not None else None
        with torch.no_grad():
            losses.append(objectives.edm(bind(model, labels), batch).cpu())
    return torch.cat(losses).double()


@dataclass(eq=False)
class TrainingState:
    """A training run between two steps: everything that a checkpoint holds, and what it can be made again from."""

    recipe: Recipe
    data: Data
    held_out: Data | None
    score: Score | None
    device: torch.device
    model: Preconditioned
    averaged: Preconditioned
    optimizer: torch.optim.Adam
    iteration: int = 0
    losses: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, recipe: Recipe, dataset: Dataset, score: Score | None, device: torch.device) -> TrainingState:
        """Make the data and the initial weights."""
        if recipe.conditional and not dataset.classes:
            raise FanalError(f"the recipe is conditional, but {dataset.name} has no classes: set conditional = false")
        if (recipe.objective == "esm") is (score is None):
            raise FanalError(
                'the objective "esm" needs the true score, which a closed form knows: train from Python with score=…'
                if score is None
                else f'a true score was given, but the objective is {recipe.objective!r}, not "esm"'
            )
        data = dataset.data("train", recipe.train_count)
        held_out = dataset.data("held out", recipe.held_out_count) if recipe.held_out_count else None
        torch.manual_seed(recipe.seed)
        model = Preconditioned(
            recipe.net,
            tuple(dataset.shape),
            sigma_data=recipe.sigma_data or float(data.x.double().std()),
            sigma_min=recipe.sigma_min,
            sigma_max=recipe.sigma_max,
            classes=len(dataset.classes) if recipe.conditional else 0,
        ).to(device)
        averaged = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate, recipe.betas)
        return cls(recipe, data, held_out, score, device, model.train(), averaged, optimizer)

    def step(self) -> float:
        """Take one optimizer step and return its loss."""
        recipe, i = self.recipe, self.iteration
        chance = draw(recipe, i, len(self.data.x), self.model.shape)
        torch.manual_seed(chance.torch_seed)  # for the network's dropout
        clean = self.data.x[chance.indices].to(self.device)
        sigma = chance.sigma.to(self.device)
        probe = None if chance.probe is None else chance.probe.to(self.device)
        batch = Batch(clean, chance.noise.to(self.device), sigma, self.model.sigma_data, self.score, probe)
        labels = None
        if self.model.classes and self.data.labels is not None:
            labels = self.data.labels[chance.indices].masked_fill(chance.drop, self.model.classes)
        per_sample = objectives.OBJECTIVES[recipe.objective](bind(self.model, labels), batch)
        loss = (self._weight(sigma) * per_sample).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"training diverged: the loss is {value} at iteration {i}, noise levels "
                f"{float(sigma.min()):.3g} to {float(sigma.max()):.3g}, seed {recipe.seed}; lower learning_rate "
                f"({recipe.learning_rate:g}) or clip ({recipe.clip:g})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(i)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        decay = min(recipe.ema, (i + 1) / (i + 10))
        with torch.no_grad():
            for mean, now in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        self.iteration += 1
        self.losses.append(value)
        return value

    def _weight(self, sigma: Tensor) -> Tensor | float:
        if self.recipe.objective == "edm" or self.recipe.weighting == "none":
            return 1.0
        power = 4 if self.recipe.objective in _SCORE_BASED else 0
        return sigma**power * edm_weight(sigma, self.model.sigma_data) / math.prod(self.model.shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the live tensors that a checkpoint stores, by name; makes the optimizer's on first use."""
        for (name, now), mean in zip(self.model.named_parameters(), self.averaged.parameters(), strict=True):
            state = self.optimizer.state[now]
            if not state:
                state["step"] = torch.tensor(float(self.iteration))
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(now), torch.zeros_like(now)
            yield f"weights.{name}", now.data
            yield f"averaged.{name}", mean.data
            yield f"adam.first.{name}", state["exp_avg"]
            yield f"adam.second.{name}", state["exp_avg_sq"]

    def restore(self, stored: dict[str, Tensor], iteration: int) -> None:
        """Go on from stored tensors.

        Raises:
            FanalError: they are not those of this run's recipe.
        """
        self.iteration = iteration
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors()} | {"losses": (iteration,)}
        if {name: tuple(tensor.shape) for name, tensor in stored.items()} != shapes:
            raise FanalError("the checkpoint does not hold this recipe's tensors: remove it to start over")
        for name, tensor in self.tensors():
            tensor.copy_(stored[name])
        self.losses = stored["losses"].tolist()

    def fingerprint(self) -> dict[str, float | int]:
        """Describe the training samples, so that a resumed run notices when they have changed."""
        crc = zlib.crc32(self.data.x.numpy().tobytes())
        return {"count": len(self.data.x), "sigma_data": self.model.sigma_data, "crc": crc}

    def held_out_loss(self) -> dict[str, Any]:
        """Measure the averaged weights on held-out samples: at the recipe's noise levels, and at each of `LEVELS`."""
        if self.held_out is None:
            return {}
        count = len(self.held_out.x)
        # Stratified, in an order that has nothing to do with the samples' order.
        u = (torch.from_numpy(np.random.default_rng(0).permutation(count)).double() + 0.5) / count
        loss = validate(self.averaged, self.held_out, self.recipe.noise_levels.sample(u))
        levels = {f"{s:g}": validate(self.averaged, self.held_out, torch.full((count,), s)) for s in LEVELS}
        return {
            "mean": float(loss.mean()),
            "standard_error": float(loss.std() / math.sqrt(count)) if count > 1 else None,
            "by_sigma": {name: float(values.mean()) for name, values in levels.items()},
        }
