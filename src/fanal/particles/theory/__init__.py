"""The statements of [PDE] sec. 4 and 5, each checked to rounding, by a rate, or within what chance allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fanal.particles.theory import cells, equation, losses, schemes
from fanal.pde.theory.findings import Finding

__all__ = ["SHEETS", "STATEMENTS"]

STATEMENTS: dict[str, Callable[[], Finding]] = {
    "forms of the drift": equation.forms,
    "far from the data": equation.far,
    "far, centered data": partial(equation.far, 0.0),
    "near the data": equation.near,
    "Brownian bridge": equation.brownian,
    "Dirac case": equation.dirac,
    "distance to a point": equation.to_the_point,
    "vanishing distance": equation.vanishing_distance,
    "Euler–Maruyama's noise": schemes.printed_noise,
    "exact step": schemes.exact_step,
    "weak order, Gaussian": schemes.weak_gaussian,
    "weak order, mixture": schemes.weak_mixture,
    "strong order": schemes.strong,
    "equal losses": losses.same,
    "loss without weight": losses.unweighted,
    "loss and floor": losses.split,
    "floor and information": losses.fisher,
    "floor of normal data": losses.normal_data,
    "infinite loss": losses.infinite,
    "kernel": cells.kernel,
    "uniform weights": cells.uniform,
    "one-hot weights": cells.one_hot,
    "trapped particles": cells.trapped,
    "bound off the points": cells.bounded,
    "last level": cells.last_level,
    "ends on points": cells.endings,
    "noise that is left": cells.left_noise,
    "particles and density": cells.densities,
}
"""Checks by name, in the paper's order; each returns a `Finding`."""

SHEETS: dict[str, tuple[str, ...]] = {
    "drift": ("forms of the drift", "far from the data", "far, centered data", "near the data", "Brownian bridge"),
    "dirac": ("Dirac case", "distance to a point", "vanishing distance"),
    "schemes": ("Euler–Maruyama's noise", "exact step"),
    "orders": ("weak order, Gaussian", "weak order, mixture", "strong order"),
    "losses": (
        "equal losses",
        "loss without weight",
        "loss and floor",
        "floor and information",
        "floor of normal data",
        "infinite loss",
    ),
    "cells": ("kernel", "uniform weights", "one-hot weights", "trapped particles"),
    "points": ("bound off the points", "last level", "ends on points", "noise that is left"),
    "particles": ("particles and density",),
}
"""Checks whose figures are drawn together, by name of the picture."""
