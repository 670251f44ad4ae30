"""Nodes for ComfyUI that guard: a guarded solver, any sampler watched by a detector, flagged latents apart.

`FanalWatch` wraps a SAMPLER, fanal's or ComfyUI's own; `FanalFlag` reads what it saw once the latents are there. They
are two nodes, because in ComfyUI the sampling lies between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fanal.adapters.comfyui_sampling import Watched, comfy_sampler, hash_of, redrawing, text, watching
from fanal.calibration_files import read_calibration
from fanal.config import build_solver
from fanal.errors import FanalError
from fanal.hallucination.calibration import Calibration
from fanal.hallucination.detectors import FREE
from fanal.hallucination.repair import Renoise
from fanal.hallucination.rods import METHODS, Guard
from fanal.solvers import SOLVERS

__all__ = ["GUARD_NODES", "FanalFlag", "FanalGuard", "FanalRedraw", "FanalWatch"]

_SAMPLERS = "sampling/custom_sampling/samplers"
_SIGMA = {"min": 0.0, "max": 100000.0, "step": 0.001, "round": False}
_RISK = {"min": 0.0, "max": 1e9, "step": 1e-6, "round": False}


def _calibration(file: str) -> Calibration | None:
    return read_calibration(file.strip()).calibration if file.strip() else None


def _limit(threshold: float, calibration: Calibration | None) -> float:
    if threshold > 0:
        return threshold
    if calibration is None:
        raise FanalError("give a threshold above 0, or a calibration file of fanal guard --save")
    return calibration.threshold


class FanalGuard:
    """A solver guarded by RODS, as SAMPLER."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "build"
    CATEGORY = _SAMPLERS
    DESCRIPTION = (
        "A solver of fanal whose steps look where the residual grows fastest (RODS), between two sigmas. rho is a "
        "share of the noise's norm. threshold 0: for all latents; above 0: for those whose index exceeds it. "
        "difference calls the model more often and works with every one; backward needs weights that keep gradients."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's widgets."""
        return {
            "required": {
                "solver": (list(SOLVERS),),
                "options": ("STRING", {"default": ""}),
                "method": (list(METHODS),),
                "rho": ("FLOAT", {"default": 0.1, "min": 0.0, "max": 10.0, "step": 0.001, "round": False}),
                "sigma_high": ("FLOAT", {"default": 5.0, **_SIGMA}),
                "sigma_low": ("FLOAT", {"default": 0.5, **_SIGMA}),
                "threshold": ("FLOAT", {"default": 0.0, **_RISK}),
                "product": (["difference", "backward"],),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, solver: str, options: str) -> bool | str:
        """Return True, or what is wrong, before the workflow runs."""
        try:
            build_solver(text(solver, options))
        except FanalError as error:
            return str(error)
        return True

    def build(
        self,
        solver: str,
        options: str,
        method: str,
        rho: float,
        sigma_high: float,
        sigma_low: float,
        threshold: float,
        product: str,
    ) -> tuple[Any]:
        """Return the sampler.

        Raises:
            FanalError: the solver has no such option, or the window is none.
        """
        from comfy.samplers import KSAMPLER  # pyright: ignore[reportMissingImports]

        guarded = Guard(
            build_solver(text(solver, options)),
            method=method,
            rho=rho,
            window=(sigma_low, sigma_high),
            window_units="sigma",
            threshold=threshold or None,
            product=product,
        )
        return (KSAMPLER(comfy_sampler(guarded, f"fanal_rods_{solver}"), {}, {}),)


class FanalWatch:
    """Any SAMPLER, watched by a detector."""

    RETURN_TYPES = ("SAMPLER", "FANAL_WATCH")
    RETURN_NAMES = ("sampler", "watch")
    FUNCTION = "build"
    CATEGORY = _SAMPLERS
    DESCRIPTION = (
        "The same sampler, watched at no call of the model. Sample with it, and give the latents and the watch to "
        "fanal flag. A calibration file of fanal guard --save names the detector, its window and the threshold."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's inputs."""
        return {
            "required": {
                "sampler": ("SAMPLER",),
                "detector": (list(FREE),),
                "calibration": ("STRING", {"default": ""}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, sampler: Any, detector: str, calibration: str) -> str:
        """Return a hash of the calibration file."""
        return f"{hash_of(calibration)} {detector}"

    def build(self, sampler: Any, detector: str, calibration: str) -> tuple[Any, Watched]:
        """Return the watched sampler, and what it will have seen.

        Raises:
            FanalError: the sampler is of another kind, or the file is no calibration.
        """
        from comfy.samplers import KSAMPLER  # pyright: ignore[reportMissingImports]

        if not isinstance(sampler, KSAMPLER):
            raise FanalError(f"only samplers with k-diffusion's interface can be watched, got {type(sampler).__name__}")
        handle = Watched(detector, _calibration(calibration))
        function = watching(sampler.sampler_function, handle)
        return KSAMPLER(function, sampler.extra_options, sampler.inpaint_options), handle


class FanalRedraw:
    """A solver that draws flagged latents again, as SAMPLER."""

    RETURN_TYPES = ("SAMPLER", "FANAL_WATCH")
    RETURN_NAMES = ("sampler", "watch")
    FUNCTION = "build"
    CATEGORY = _SAMPLERS
    DESCRIPTION = (
        "Samples, flags latents whose risk exceeds the threshold (0: the calibration file's), takes those back to "
        "sigma with fresh noise and down again, for a few rounds; keeps the try with the lowest risk. Not for masks."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's widgets."""
        return {
            "required": {
                "solver": (list(SOLVERS),),
                "options": ("STRING", {"default": ""}),
                "detector": (list(FREE),),
                "calibration": ("STRING", {"default": ""}),
                "threshold": ("FLOAT", {"default": 0.0, **_RISK}),
                "sigma": ("FLOAT", {"default": 4.0, **_SIGMA}),
                "rounds": ("INT", {"default": 2, "min": 1, "max": 16}),
            }
        }

    @classmethod
    def IS_CHANGED(
        cls, solver: str, options: str, detector: str, calibration: str, threshold: float, sigma: float, rounds: int
    ) -> str:
        """Return a hash of the calibration file and the widgets."""
        return f"{hash_of(calibration)} {(solver, options, detector, threshold, sigma, rounds)}"

    def build(
        self, solver: str, options: str, detector: str, calibration: str, threshold: float, sigma: float, rounds: int
    ) -> tuple[Any, Watched]:
        """Return the sampler, and the risks that it will leave.

        Raises:
            FanalError: there is no threshold, or the solver has no such option.
        """
        from comfy.samplers import KSAMPLER  # pyright: ignore[reportMissingImports]

        found = _calibration(calibration)
        handle = Watched(detector, found)
        function = redrawing(
            build_solver(text(solver, options)), handle, _limit(threshold, found), Renoise(sigma, rounds)
        )
        return KSAMPLER(function, {}, {}), handle


class FanalFlag:
    """Latents whose risk exceeds a threshold, apart from the others."""

    RETURN_TYPES = ("LATENT", "LATENT", "STRING")
    RETURN_NAMES = ("kept", "flagged", "risk")
    FUNCTION = "split"
    CATEGORY = "sampling/custom_sampling"
    DESCRIPTION = (
        "Splits a batch by what the watched sampler saw. threshold 0: that of the watch's calibration. risk is a JSON "
        "list, one number per latent. An output without latents stops what hangs on it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the node's inputs."""
        return {
            "required": {
                "samples": ("LATENT",),
                "watch": ("FANAL_WATCH",),
                "threshold": ("FLOAT", {"default": 0.0, **_RISK}),
            }
        }

    def split(self, samples: Mapping[str, Any], watch: Watched, threshold: float) -> tuple[Any, Any, str]:
        """Return the latents under the threshold, those above it, and all risks.

        Raises:
            FanalError: there is no threshold, or the watch saw another batch.
        """
        risk = watch.risk()
        if len(risk) != len(samples["samples"]):
            raise FanalError(
                f"the watch saw {len(risk)} latents, and here are {len(samples['samples'])}: give those it saw sampled"
            )
        flagged = risk > _limit(threshold, watch.calibration)
        return _part(samples, ~flagged), _part(samples, flagged), json.dumps(risk.tolist())


def _part(samples: Mapping[str, Any], rows: Tensor) -> Any:
    """Some latents of a batch, with whatever else has one entry for each; none of them: what ComfyUI stops at."""
    if not bool(rows.any()):
        from comfy_execution.graph import ExecutionBlocker  # pyright: ignore[reportMissingImports]

        return ExecutionBlocker(None)
    count, places = len(rows), rows.nonzero().flatten()

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            return value[places.to(value.device)]
        return [value[b] for b in places.tolist()] if isinstance(value, list) and len(value) == count else value

    return {name: cut(value) for name, value in samples.items()}


GUARD_NODES: dict[str, tuple[type, str]] = {
    "FanalGuard": (FanalGuard, "fanal guarded sampler (RODS)"),
    "FanalWatch": (FanalWatch, "fanal watch"),
    "FanalRedraw": (FanalRedraw, "fanal redraw sampler"),
    "FanalFlag": (FanalFlag, "fanal flag"),
}
"""Name → class and title."""
