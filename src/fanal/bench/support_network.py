"""A small conditional network of a target, trained inside the comparison: scores as they are learned."""

from __future__ import annotations

import torch

from fanal.bench.plans import Found
from fanal.datasets.base import Data, check_count, check_split
from fanal.datasets.partition import Unjudged
from fanal.denoiser import Labelled
from fanal.errors import FanalError
from fanal.nets.mlp import MLPConfig
from fanal.nets.preconditioning import Preconditioned
from fanal.objectives import LogNormal
from fanal.optimization import TrainingState
from fanal.recipes import Recipe
from fanal.supports import Box, Polyline, Sphere, Target
from fanal.supports.forms import Scores

__all__ = ["Drawn", "network_scores", "train_network"]

_ON = 1e-6  # of the target's size: a drawn point lies on the condition's support up to rounding


class Drawn(Unjudged):
    """Points drawn from a target; class 0 lies on the condition's support, class 1 elsewhere.

    Args:
        goal: the target.

    Raises:
        FanalError: the target's law cannot be drawn from.
    """

    classes: tuple[str, ...] = ("condition", "rest")

    def __init__(self, goal: Target) -> None:
        if not isinstance(goal.whole, Box | Sphere | Polyline):
            raise FanalError(f"a network learns from points that are drawn: of circle or square, not of {goal.name}")
        self.goal, self.law, self.name, self.shape = goal, goal.whole, goal.name, goal.shape

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return points and their classes; the splits are drawn from seeds of their own.

        Raises:
            FanalError: the split is unknown or `count` is not positive.
        """
        part = 2 * seed + (check_split(split) != "train")
        x = self.law.draw(check_count(20_000 if count is None else count), part)
        labels = (self.goal.part.distance(x) > _ON * self.goal.size).long()
        return Data(x.float(), labels)


def _model(goal: Target, sigma_data: float) -> Preconditioned:
    return Preconditioned(MLPConfig(), goal.shape, sigma_data=sigma_data, classes=2)


def train_network(goal: Target, iterations: int) -> Found:
    """Train an MLP on a target's points and return its weights."""
    recipe = Recipe(
        goal.name,
        MLPConfig(),
        iterations=iterations,
        batch=256,
        learning_rate=3e-3,
        noise_levels=LogNormal(-0.8, 1.6),
        conditional=True,
        label_dropout=0.3,
        ema=0.995,
        held_out_count=1024,
    )
    with torch.random.fork_rng(devices=[]):
        run = TrainingState.start(recipe, Drawn(goal), None, torch.device("cpu"))
        while run.iteration < iterations:
            run.step()
    tensors = {name: value.clone() for name, value in run.averaged.state_dict().items()}
    notes = {"study": "network", "cells": [], "held out": run.held_out_loss(), "sigma_data": run.model.sigma_data}
    return tensors, notes


def network_scores(goal: Target, found: Found) -> Scores:
    """Return the scores of a trained network."""
    tensors, notes = found
    model = _model(goal, notes["sigma_data"])
    model.load_state_dict(tensors)
    model.eval().requires_grad_(False)
    return Scores(Labelled(model, 0), Labelled(model, 2))
