"""fanal watches a diffusion model's sampling trajectories, finds the samples that went wrong, and repairs them.

A denoiser is any function `D(x, sigma) ≈ E[x0 | x0 + sigma·n = x]`; everything else is built on that.
Names are imported on first use, so that `import fanal` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fanal import datasets as datasets
    from fanal import exact as exact
    from fanal import geometry as geometry
    from fanal import gits as gits
    from fanal import guidance as guidance
    from fanal import hallucination as hallucination
    from fanal import interpolation as interpolation
    from fanal import memorization as memorization
    from fanal import metrics as metrics
    from fanal import nets as nets
    from fanal import pde as pde
    from fanal import pictures as pictures
    from fanal import report as report
    from fanal import schedules as schedules
    from fanal import sde as sde
    from fanal import solvers as solvers
    from fanal import supports as supports
    from fanal import training as training
    from fanal.denoiser import Counted as Counted
    from fanal.denoiser import Denoiser as Denoiser
    from fanal.denoiser import Model as Model
    from fanal.denoiser import Temperature as Temperature
    from fanal.errors import FanalError as FanalError
    from fanal.errors import NonFiniteError as NonFiniteError
    from fanal.loading import load as load
    from fanal.sampling import Solver as Solver
    from fanal.sampling import Span as Span
    from fanal.sampling import Step as Step
    from fanal.sampling import Transition as Transition
    from fanal.sampling import sample as sample
    from fanal.sampling import trace as trace
    from fanal.seeding import noise as noise
    from fanal.trajectory import Trajectory as Trajectory

__version__ = "0.1.0"

_MODULES = frozenset(
    {
        "datasets",
        "exact",
        "geometry",
        "gits",
        "guidance",
        "hallucination",
        "interpolation",
        "memorization",
        "metrics",
        "nets",
        "pictures",
        "pde",
        "report",
        "schedules",
        "sde",
        "solvers",
        "supports",
        "training",
    }
)
_HOMES = {
    "Counted": "denoiser",
    "Denoiser": "denoiser",
    "FanalError": "errors",
    "Model": "denoiser",
    "NonFiniteError": "errors",
    "Solver": "sampling",
    "Span": "sampling",
    "Step": "sampling",
    "Temperature": "denoiser",
    "Trajectory": "trajectory",
    "Transition": "sampling",
    "load": "loading",
    "noise": "seeding",
    "sample": "sampling",
    "trace": "sampling",
}

__all__ = sorted([*_HOMES, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"fanal.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"fanal.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fanal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
