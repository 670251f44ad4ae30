"""One optimizer step after another: a training run's state, without files.

Every random draw is a function of (seed, iteration, place in the batch): neither the number of processes nor of the
pieces that a batch is cut into changes what is learned, except for rounding.
"""

from __future__ import annotations

import copy
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fanal import objectives
from fanal.augmentation import augment, draw_augmentation
from fanal.augmentation import label as augmentation_label
from fanal.datasets import Data, Dataset
from fanal.datasets.levels import Levels, levels_of
from fanal.denoiser import Denoiser
from fanal.errors import FanalError, NonFiniteError
from fanal.nets.preconditioning import Preconditioned
from fanal.objectives import Batch, edm_weight
from fanal.processes import Processes
from fanal.recipes import Recipe
from fanal.seeding import noise

__all__ = ["LEVELS", "Draw", "Score", "TrainingState", "bind", "draw", "validate"]

LEVELS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)  # the noise levels that validation reports

_SCORE_BASED = {"dsm", "esm", "ism", "ssm"}
_LAYERS = {"bf16": torch.bfloat16, "fp16": torch.float16}

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
    flip: Tensor
    augmentation: Tensor | None


def _generator(recipe: Recipe, iteration: int, stream: str) -> np.random.Generator:
    key = np.array([recipe.seed, (zlib.crc32(stream.encode()) << 32) | iteration], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def draw(recipe: Recipe, iteration: int, count: int, shape: tuple[int, ...]) -> Draw:
    """Draw a step's batch indices, noise levels, noise, dropped labels, probes and augmentations, all on the CPU.

    Args:
        recipe: gives the seed, batch size and noise levels.
        iteration: the step.
        count: size of the training set.
        shape: shape of one sample.
    """
    random = _generator(recipe, iteration, "training")
    indices = torch.from_numpy(random.integers(count, size=recipe.batch))
    u = torch.from_numpy(random.random(recipe.batch)).clamp_min(1e-12)
    drop = torch.from_numpy(random.random(recipe.batch) < recipe.label_dropout)
    seed = int(random.integers(2**32))
    values = torch.from_numpy(random.standard_normal((recipe.batch, *shape), dtype=np.float32))
    probe = None
    if recipe.objective == "ssm":
        probe = torch.from_numpy(random.choice(np.array([-1, 1], dtype=np.float32), size=(recipe.batch, *shape)))
    flip, augmentation = torch.zeros(recipe.batch, dtype=torch.bool), None
    if recipe.flip:
        flip = torch.from_numpy(_generator(recipe, iteration, "flip").random(recipe.batch) < 0.5)
    if recipe.augment:
        augmentation = draw_augmentation(_generator(recipe, iteration, "augmentation"), recipe.batch, recipe.augment)
    sigma = recipe.noise_levels.sample(u).float()
    return Draw(indices, sigma, values, drop, probe, seed, flip, augmentation)


def bind(model: Preconditioned, labels: Tensor | None, told: Tensor | None = None) -> Denoiser:
    """Fix a model's labels, and those of its augmentations; None means no label and no augmentation."""
    return lambda x, sigma: model(x, sigma, labels, told)


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
    """A training run between two steps: everything that a checkpoint holds, and what it can be made again from.

    Attributes:
        averages: the averaged weights, one model for each of the recipe's averages.
        halted: whether a process was asked to stop during the last step; the same in all of them.
    """

    recipe: Recipe
    data: Levels
    held_out: Data | None
    score: Score | None
    processes: Processes
    model: Preconditioned
    averages: tuple[Preconditioned, ...]
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler
    iteration: int = 0
    losses: list[float] = field(default_factory=list)
    halted: bool = False

    @classmethod
    def start(
        cls, recipe: Recipe, dataset: Dataset, score: Score | None, processes: Processes | torch.device
    ) -> TrainingState:
        """Make the data and the initial weights.

        Raises:
            FanalError: the recipe does not fit the data, the device or the number of processes.
        """
        if isinstance(processes, torch.device):
            processes = Processes(processes)
        _check_fit(recipe, dataset, score, processes)
        data = levels_of(dataset, "train", recipe.train_count)
        held_out = dataset.data("held out", recipe.held_out_count) if recipe.held_out_count else None
        torch.manual_seed(recipe.seed)
        model = Preconditioned(
            recipe.net,
            tuple(dataset.shape),
            sigma_data=recipe.sigma_data or data.std(),
            sigma_min=recipe.sigma_min,
            sigma_max=recipe.sigma_max,
            classes=len(dataset.classes) if recipe.conditional else 0,
        ).to(processes.device)
        averages = tuple(copy.deepcopy(model).eval().requires_grad_(False) for _ in recipe.averages)
        optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate, recipe.betas)
        scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
        return cls(recipe, data, held_out, score, processes, model.train(), averages, optimizer, scaler)

    @property
    def averaged(self) -> Preconditioned:
        """The model: the first of the averages."""
        return self.averages[0]

    def step(self, stop: Callable[[], bool] = lambda: False) -> float:
        """Take one optimizer step and return its loss.

        Args:
            stop: tells, once the gradients are there, whether this process should stop after the step.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
        """
        recipe, i = self.recipe, self.iteration
        chance = draw(recipe, i, len(self.data), self.model.shape)
        self.optimizer.zero_grad(set_to_none=True)
        value = sum(self._backward(chance, piece) for piece in self.pieces())
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        value, halted = self.processes.add(gradients, value, float(stop()))
        if not math.isfinite(value):
            sigma = chance.sigma
            raise NonFiniteError(
                f"training diverged: the loss is {value} at iteration {i}, noise levels "
                f"{float(sigma.min()):.3g} to {float(sigma.max()):.3g}, seed {recipe.seed}; lower learning_rate "
                f"({recipe.learning_rate:g}) or clip ({recipe.clip:g}), or use a higher precision "
                f"({recipe.precision})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(i)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for profile, averaged in zip(recipe.averages, self.averages, strict=True):
                keep = profile.keep(i)
                for mean, now in zip(averaged.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(now, 1 - keep)
        self.iteration += 1
        self.losses.append(value)
        self.halted = halted > 0
        return value

    def pieces(self) -> Iterator[slice]:
        """Yield the places in the batch that this process computes together, one piece after another."""
        batch, accumulate = self.recipe.batch, self.recipe.accumulate
        count = accumulate * self.processes.count
        for k in range(self.processes.rank * accumulate, (self.processes.rank + 1) * accumulate):
            yield slice(k * batch // count, (k + 1) * batch // count)

    def _backward(self, chance: Draw, piece: slice) -> float:
        """Add a piece's share of the batch's gradient, and return its share of the loss."""
        recipe, device = self.recipe, self.processes.device
        torch.manual_seed(chance.torch_seed + piece.start)  # for the network's dropout
        clean = self.data.take(chance.indices[piece]).to(device)
        if recipe.flip:
            clean = torch.where(chance.flip[piece].to(device)[:, None, None, None], clean.flip(3), clean)
        told = None
        if chance.augmentation is not None:
            clean = augment(clean, chance.augmentation[piece])
            told = augmentation_label(chance.augmentation[piece]).to(device)
        sigma = chance.sigma[piece].to(device)
        probe = None if chance.probe is None else chance.probe[piece].to(device)
        batch = Batch(clean, chance.noise[piece].to(device), sigma, self.model.sigma_data, self.score, probe)
        labels = None
        if self.model.classes and self.data.labels is not None:
            labels = self.data.labels[chance.indices[piece]].masked_fill(chance.drop[piece], self.model.classes)
        with _layers(recipe.precision, device):
            per_sample = objectives.OBJECTIVES[recipe.objective](bind(self.model, labels, told), batch)
        loss = (self._weight(sigma) * per_sample).mean()
        if len(clean) < recipe.batch:
            loss = loss * (len(clean) / recipe.batch)
        self.scaler.scale(loss).backward()
        return float(loss.detach())

    def _weight(self, sigma: Tensor) -> Tensor | float:
        if self.recipe.objective == "edm" or self.recipe.weighting == "none":
            return 1.0
        power = 4 if self.recipe.objective in _SCORE_BASED else 0
        return sigma**power * edm_weight(sigma, self.model.sigma_data) / math.prod(self.model.shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the live tensors that a checkpoint stores, by name; makes the optimizer's on first use."""
        parameters = zip(*(average.parameters() for average in self.averages), strict=True)
        for (name, now), means in zip(self.model.named_parameters(), parameters, strict=True):
            state = self.optimizer.state[now]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(now), torch.zeros_like(now)
            yield f"weights.{name}", now.data
            for k, mean in enumerate(means):
                yield f"averaged{k or ''}.{name}", mean.data
            yield f"adam.first.{name}", state["exp_avg"]
            yield f"adam.second.{name}", state["exp_avg_sq"]
            if self.scaler.is_enabled():  # which leaves out steps
                yield f"adam.steps.{name}", state["step"]

    def restore(self, stored: dict[str, Tensor], iteration: int, scaler: dict[str, Any] | None = None) -> None:
        """Go on from stored tensors and the state of the loss's scaling.

        Raises:
            FanalError: they are not those of this run's recipe.
        """
        self.iteration = iteration
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors()} | {"losses": (iteration,)}
        if {name: tuple(tensor.shape) for name, tensor in stored.items()} != shapes:
            raise FanalError("the checkpoint does not hold this recipe's tensors: remove it to start over")
        for name, tensor in self.tensors():
            tensor.copy_(stored[name])
        if not self.scaler.is_enabled():
            for state in self.optimizer.state.values():
                state["step"].fill_(float(iteration))
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)
        self.losses = stored["losses"].tolist()

    def fingerprint(self) -> dict[str, float | int]:
        """Describe the training samples, so that a resumed run notices when they have changed."""
        return {"count": len(self.data), "sigma_data": self.model.sigma_data, "crc": self._crc}

    @functools.cached_property
    def _crc(self) -> int:
        return self.data.crc()

    def held_out_loss(self, model: Preconditioned | None = None) -> dict[str, Any]:
        """Measure averaged weights on held-out samples: at the recipe's noise levels, and at each of `LEVELS`."""
        if self.held_out is None:
            return {}
        model = model or self.averaged
        count = len(self.held_out.x)
        # Stratified, in an order that has nothing to do with the samples' order.
        u = (torch.from_numpy(np.random.default_rng(0).permutation(count)).double() + 0.5) / count
        loss = validate(model, self.held_out, self.recipe.noise_levels.sample(u))
        levels = {f"{s:g}": validate(model, self.held_out, torch.full((count,), s)) for s in LEVELS}
        return {
            "mean": float(loss.mean()),
            "standard_error": float(loss.std() / math.sqrt(count)) if count > 1 else None,
            "by_sigma": {name: float(values.mean()) for name, values in levels.items()},
        }


def _layers(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Where a network's layers run in a lower precision, if they are to."""
    return torch.autocast(device.type, _LAYERS[precision]) if precision in _LAYERS else nullcontext()


def _check_fit(recipe: Recipe, dataset: Dataset, score: Score | None, processes: Processes) -> None:
    """Refuse a recipe that does not fit the data, the device or the number of processes."""
    if recipe.conditional and not dataset.classes:
        raise FanalError(f"the recipe is conditional, but {dataset.name} has no classes: set conditional = false")
    if (recipe.objective == "esm") is (score is None):
        raise FanalError(
            'the objective "esm" needs the true score, which a closed form knows: train from Python with score=…'
            if score is None
            else f'a true score was given, but the objective is {recipe.objective!r}, not "esm"'
        )
    shape = tuple(dataset.shape)
    if (recipe.augment or recipe.flip) and (len(shape) != 3 or shape[1] != shape[2]):
        raise FanalError(f"flip and augment are for square images, but samples of {dataset.name} have shape {shape}")
    if recipe.accumulate * processes.count > recipe.batch:
        raise FanalError(
            f"a batch of {recipe.batch} cannot be shared by {processes.count} processes in {recipe.accumulate} pieces "
            "each: use a larger batch"
        )
    try:
        with _layers(recipe.precision, processes.device):
            pass
    except (RuntimeError, ValueError) as error:
        raise FanalError(
            f"precision {recipe.precision} is not to be had on {processes.device.type} ({error}); use float32"
        ) from error
