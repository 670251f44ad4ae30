"""The network of `fanal bench overlay`: small, trained on draws of a law in the plane, looked at on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fanal.datasets import Data
from fanal.datasets.partition import Unjudged
from fanal.denoiser import Denoiser, Wrapper
from fanal.nets.mlp import MLPConfig
from fanal.nets.preconditioning import Preconditioned
from fanal.objectives import LogNormal
from fanal.optimization import TrainingState
from fanal.pde.laws import Law
from fanal.recipes import Recipe
from fanal.runs import Progress

__all__ = ["recipe_of", "restored", "train_on"]

_HELD = 512


class _Draws(Unjudged):
    """A law as a data set to train on."""

    def __init__(self, own: Law, count: int, seed: int) -> None:
        self.name, self.shape, self.classes = own.name, (2,), ()
        self.law, self.count, self.seed = own, count, seed

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return draws; those held out have another seed."""
        seed += 2 * self.seed + (split != "train")
        return Data(torch.from_numpy(self.law.draw(count or self.count, 0.0, seed)).float())

    def broken(self, kind: str, count: int, seed: int = 0) -> Tensor:
        """Raise: no rule tells a broken sample.

        Raises:
            FanalError: always.
        """
        raise self._no_verifier()


class _Single(Wrapper):
    """A network in float32 behind the float64 of the equations."""

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        return self.denoiser(x.float(), sigma.float()).to(x.dtype)


def recipe_of(law: Law, iterations: int, train: int, width: int, seed: int, threads: int) -> Recipe:
    """Return how the network is trained.

    Args:
        law: of the data.
        iterations: of training.
        train: draws that it is trained on.
        width: of its layers.
        seed: of the training.
        threads: CPU threads.
    """
    return Recipe(
        law.name,
        MLPConfig(width=width),
        iterations=iterations,
        batch=256,
        learning_rate=3e-3,
        noise_levels=LogNormal(-0.5, 1.4),
        train_count=train,
        held_out_count=_HELD,
        seed=seed,
        threads=threads,
    )


def train_on(
    law: Law, recipe: Recipe, looks: Sequence[int], progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train once; return the averaged weights after some iterations, and the held-out loss there.

    Args:
        law: of the data.
        recipe: from `recipe_of`.
        looks: iterations, increasing; the last one is the recipe's.
        progress: wraps the loop.
    """
    tensors: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        data = _Draws(law, recipe.train_count or 0, recipe.seed)
        state = TrainingState.start(recipe, data, None, torch.device("cpu"))
        for _ in progress(range(recipe.iterations), "training"):
            state.step()
            if state.iteration in looks:
                weights = state.averaged.state_dict()
                tensors |= {f"{state.iteration}.{name}": value.clone() for name, value in weights.items()}
                losses[str(state.iteration)] = state.held_out_loss()["mean"]
    return tensors, {"sigma_data": state.model.sigma_data, "losses": losses}


def restored(
    recipe: Recipe, tensors: Mapping[str, Tensor], sigma_data: float, looks: Sequence[int]
) -> dict[int, Denoiser]:
    """Return the network after each of some iterations, from what `train_on` returned.

    Args:
        recipe: as there.
        tensors: weights.
        sigma_data: from its notes.
        looks: as there.
    """
    out: dict[int, Denoiser] = {}
    for iteration in looks:
        net, start = Preconditioned(recipe.net, (2,), sigma_data=sigma_data), f"{iteration}."
        net.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
        out[iteration] = _Single(net.eval().requires_grad_(False))
    return out
