"""Nodes for ComfyUI: fanal's solvers as a SAMPLER, its schedules as SIGMAS; guards and flags in `comfyui_guard`.

ComfyUI finds them through the folder `integrations/comfyui` of the repository, which is put into `custom_nodes`. It
keeps k-diffusion's interface: a sampler is a function of (model, x, sigmas, extra_args, callback, disable). For
flow-matching models (SD3, Flux, Wan) its sigmas are times t in [0, 1] and its latents are `(1 − t)·x0 + t·n`; the
sampler sees which kind the model is of and converts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.comfyui_guard import GUARD_NODES
from fanal.adapters.comfyui_sampling import comfy_sampler, hash_of, text
from fanal.adapters.predictions import flow_time
from fanal.config import build_schedule, build_solver
from fanal.errors import FanalError
from fanal.schedule_files import read_schedules
from fanal.schedules import SCHEDULES
from fanal.schedules.files import from_file, holds_many
from fanal.solvers import SOLVERS

__all__ = [
    "INPUT_KINDS",
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "FanalSampler",
    "FanalSamplerFromFile",
    "FanalSigmas",
    "FanalSigmasFromFile",
    "comfy_sampler",
    "read_sigmas",
]

_NODES = 10_000

INPUT_KINDS = {"sigma (SD, SDXL)": "ve", "flow time (SD3, Flux, Wan)": "flow"}
"""What SIGMAS mean to a model, as shown → process."""


def _sigmas(grid: Float[Tensor, " n"], kind: str) -> Float[Tensor, " n"]:
    """A grid in x-space as ComfyUI passes SIGMAS around."""
    if INPUT_KINDS[kind] == "flow":
        return flow_time(grid).float()
    if math.isinf(float(grid[0])):
        raise FanalError("only flow-matching models start at infinite sigma: choose flow time")
    return grid.float()


def read_sigmas(path: str | Path, steps: int = 0) -> Float[Tensor, " n"]:
    """Read a grid from a JSON file: a list of numbers, an object with such a list under `sigmas`, or a schedule file.

    Args:
        path: the file.
        steps: which grid of a schedule file; 0: its only one.

    Raises:
        FanalError: the file is missing, too large, not JSON, or what it holds is no decreasing grid.
    """
    if holds_many(path):
        return read_schedules(path).entry(steps).sigmas
    grid = from_file(path)
    if grid[0] < grid[1]:
        raise FanalError(f"{Path(path).name} rises from {float(grid[0]):.6g}: a grid for sampling decreases")
    return grid


class FanalSampler:
    """A solver, by name and options, as SAMPLER."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "build"
    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "A solver of fanal. Options as on its command line, e.g. s_churn=20,solver=heun."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's widgets."""
        return {"required": {"solver": (list(SOLVERS),), "options": ("STRING", {"default": ""})}}

    @classmethod
    def VALIDATE_INPUTS(cls, solver: str, options: str) -> bool | str:
        """Return True, or what is wrong, before the workflow runs."""
        try:
            build_solver(text(solver, options))
        except FanalError as error:
            return str(error)
        return True

    def build(self, solver: str, options: str) -> tuple[Any]:
        """Return the sampler.

        Raises:
            FanalError: the solver has no such option.
        """
        from comfy.samplers import KSAMPLER  # pyright: ignore[reportMissingImports]

        return (KSAMPLER(comfy_sampler(build_solver(text(solver, options)), f"fanal_{solver}"), {}, {}),)


class FanalSamplerFromFile:
    """The solver of a schedule file, with its searched weights, as SAMPLER."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "load"
    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "The solver that a file of fanal schedule was searched for, with its weights. Take its sigmas too."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's widgets."""
        return {"required": {"file": ("STRING", {"default": "schedule.json"})}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        """Return a hash of the file."""
        return hash_of(file)

    def load(self, file: str) -> tuple[Any]:
        """Return the sampler.

        Raises:
            FanalError: the file is no schedule file.
        """
        from comfy.samplers import KSAMPLER  # pyright: ignore[reportMissingImports]

        solver = read_schedules(file).build_solver(build_solver)
        return (KSAMPLER(comfy_sampler(solver, "fanal_from_file"), {}, {}),)


class FanalSigmas:
    """A named schedule as SIGMAS."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "build"
    CATEGORY = "sampling/custom_sampling/schedulers"
    DESCRIPTION = (
        "A schedule of fanal between two sigmas. For flow models choose flow time: the grid then begins at t = 1, and "
        "sigma_max is where its second node lies."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's widgets; the range is that of Stable Diffusion."""
        limits = {"min": 0.0, "max": 100000.0, "step": 0.001, "round": False}
        return {
            "required": {
                "schedule": (list(SCHEDULES),),
                "options": ("STRING", {"default": ""}),
                "steps": ("INT", {"default": 20, "min": 1, "max": _NODES - 1}),
                "sigma_max": ("FLOAT", {"default": 14.614642, **limits}),
                "sigma_min": ("FLOAT", {"default": 0.0291675, **limits}),
                "end_at_zero": ("BOOLEAN", {"default": True}),
                "kind": (list(INPUT_KINDS),),
            }
        }

    def build(
        self, schedule: str, options: str, steps: int, sigma_max: float, sigma_min: float, end_at_zero: bool, kind: str
    ) -> tuple[Tensor]:
        """Return the sigmas.

        Raises:
            FanalError: the schedule has no such option, or the range makes no grid.
        """
        far = INPUT_KINDS[kind] == "flow"
        if steps - far < 1:
            raise FanalError("a flow model needs two steps or more: the first leads from t = 1 to sigma_max")
        grid = build_schedule(text(schedule, options), steps - far, sigma_min, sigma_max, zero=end_at_zero)
        return (_sigmas(torch.cat([grid.new_full((int(far),), math.inf), grid]), kind),)


class FanalSigmasFromFile:
    """A grid from a JSON file as SIGMAS."""

    RETURN_TYPES = ("SIGMAS", "STRING")
    RETURN_NAMES = ("sigmas", "end")
    FUNCTION = "load"
    CATEGORY = "sampling/custom_sampling/schedulers"
    DESCRIPTION = (
        "Sigmas from a JSON file: a list of numbers, an object with such a list under 'sigmas', or a file of fanal "
        "schedule, where steps says which grid (0: the only one)."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's widgets."""
        return {
            "required": {
                "file": ("STRING", {"default": "sigmas.json"}),
                "steps": ("INT", {"default": 0, "min": 0, "max": _NODES - 1}),
                "kind": (list(INPUT_KINDS),),
            }
        }

    @classmethod
    def IS_CHANGED(cls, file: str, steps: int, kind: str) -> str:
        """Return a hash of the file and the widgets."""
        return f"{hash_of(file)} {steps} {kind}"

    def load(self, file: str, steps: int, kind: str) -> tuple[Tensor, str]:
        """Return the sigmas, and in words whether they end at 0.

        Raises:
            FanalError: the file holds no grid.
        """
        grid = read_sigmas(file, steps)
        last = float(grid[-1])
        end = "ends at 0" if last == 0 else f"ends at sigma_min = {last:.6g}: that much noise is left in the sample"
        return _sigmas(grid, kind), end


_NODES_BY_NAME: dict[str, tuple[type, str]] = {
    **GUARD_NODES,
    "FanalSampler": (FanalSampler, "fanal sampler"),
    "FanalSamplerFromFile": (FanalSamplerFromFile, "fanal sampler from file"),
    "FanalSigmas": (FanalSigmas, "fanal sigmas"),
    "FanalSigmasFromFile": (FanalSigmasFromFile, "fanal sigmas from file"),
}

NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in _NODES_BY_NAME.items()}
"""Name → class, for ComfyUI."""

NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in _NODES_BY_NAME.items()}
"""Name → title, for ComfyUI."""
