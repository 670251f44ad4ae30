"""What fanal's nodes for ComfyUI share: solvers as sampler functions, and samplers that are watched or drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.k_diffusion import KDiffusionModel, from_k_diffusion, grid_of, sampler
from fanal.adapters.predictions import flow_sigma, input_of, x_of
from fanal.errors import FanalError
from fanal.hallucination.calibration import Calibration
from fanal.hallucination.detectors import Detector, Watch, build, last_window
from fanal.hallucination.repair import Renoise, watch
from fanal.sampling import Solver, Span, Step, Transition

__all__ = ["Watched", "comfy_sampler", "hash_of", "is_flow", "redrawing", "text", "watching"]

BYTES = 2**20
"""The most that is read of a file."""


def text(name: str, options: str) -> str:
    """Name and options as on the command line."""
    return f"{name}:{options.strip()}" if options.strip() else name


def is_flow(model: Any) -> bool:
    """Whether the model that ComfyUI wrapped is of the flow-matching kind."""
    from comfy.model_sampling import CONST  # pyright: ignore[reportMissingImports]

    return isinstance(model.inner_model.inner_model.model_sampling, CONST)


def comfy_sampler(solver: Solver, name: str = "fanal") -> Callable[..., Tensor]:
    """Return a solver as a function that ComfyUI's KSAMPLER takes.

    Noise that the solver draws is keyed by the workflow's seed: sample b of the batch has seed + b.

    Args:
        solver: how an interval is crossed.
        name: shown in ComfyUI's log.
    """

    def sample(
        model: KDiffusionModel,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        seed = (extra_args or {}).get("seed")
        keys = None if seed is None else [(int(seed) + b) % 2**64 for b in range(len(x))]
        run = sampler(solver, seeds=keys, process="flow" if is_flow(model) else "ve")
        return run(model, x, sigmas, extra_args, callback, disable)

    sample.__name__ = name
    return sample


def hash_of(file: str) -> str:
    """A hash of the start of a file, so that ComfyUI notices when it was replaced; empty where there is none."""
    try:
        with open(file, "rb") as stream:
            return hashlib.sha256(stream.read(BYTES + 1)).hexdigest()
    except OSError:
        return ""


class Watched:
    """What a detector saw of the latest run of a sampler.

    Args:
        detector: name of a free detector.
        calibration: gives the detector, its window and the threshold instead.
    """

    def __init__(self, detector: str = "variance", calibration: Calibration | None = None) -> None:
        self.detector, self.calibration = detector, calibration
        self.grid: Tensor | None = None
        self.known: Tensor | None = None
        self._eye: Watch | None = None
        self._held: Transition | None = None

    def watcher(self, grid: Float[Tensor, " n"]) -> Detector:
        """Return the detector for a grid.

        Raises:
            FanalError: the calibration is of another grid.
        """
        if self.calibration is None:
            return build(self.detector if len(grid) > 2 else "last_slope", last_window(grid))
        known = torch.tensor(self.calibration.sigmas, dtype=torch.float64)
        if len(known) != len(grid) or not torch.allclose(known, grid, rtol=1e-3):
            raise FanalError(
                f"calibrated on {len(known) - 1} steps from sigma {float(known[0]):.4g}, and sampled on "
                f"{len(grid) - 1} from {float(grid[0]):.4g}: a threshold holds for no other grid"
            )
        return self.calibration.build()

    def start(self, sigmas: Tensor, process: str) -> None:
        """Begin to watch a run."""
        self.grid, self.process = grid_of(sigmas, process), process
        self._eye, self._held = self.watcher(self.grid).start(), None

    def see(self, told: Mapping[str, Any]) -> None:
        """Take what a sampler of k-diffusion tells its callback."""
        assert self.grid is not None
        i = int(told["i"])
        if i + 1 >= len(self.grid):
            raise FanalError(f"this sampler reports step {i} of {len(self.grid) - 1}: it cannot be watched")
        level = torch.as_tensor(told.get("sigma_hat", told["sigma"])).detach().to("cpu", torch.float64).reshape(-1)[0]
        sigma = flow_sigma(level) if self.process == "flow" else level
        x = x_of(told["x"].detach(), sigma, self.process)
        self._complete(x)
        span = Span(i, len(self.grid) - 1, self.grid[i], self.grid[i + 1])
        self._held = Transition(span, x, Step(x, told["denoised"].detach(), at=(x, sigma)))

    def finish(self, end: Tensor) -> None:
        """Complete the last interval."""
        assert self.grid is not None
        self._complete(x_of(end.detach(), self.grid[-1], self.process))

    def _complete(self, x_next: Tensor) -> None:
        if self._held is not None and self._eye is not None:
            held, step = self._held, self._held.step
            self._eye.see(Transition(held.span, held.x, Step(x_next, step.denoised, at=step.at)))
        self._held = None

    def risk(self) -> Float[Tensor, " b"]:
        """Return the risk of each latent of the latest run.

        Raises:
            FanalError: there was no run, or it crossed too little of the detector's window.
        """
        if self.known is not None:
            return self.known
        if self._eye is None:
            raise FanalError("this watch has seen no run: sample with the SAMPLER of the same fanal watch node")
        return self._eye.risk()


def watching(function: Callable[..., Tensor], handle: Watched) -> Callable[..., Tensor]:
    """A sampler function that tells a watch what it does."""

    def watched(
        model: KDiffusionModel,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        handle.start(sigmas, "flow" if is_flow(model) else "ve")

        def seen(told: dict[str, Any]) -> None:
            handle.see(told)
            if callback is not None:
                callback(told)

        end = function(model, x, sigmas, extra_args=extra_args, callback=seen, disable=disable, **options)
        handle.finish(end)
        return end

    return watched


class _Shown:
    """A detector whose watch also tells ComfyUI about each interval: the progress bar and the preview."""

    def __init__(self, detector: Detector, tell: Callable[[Transition], object]) -> None:
        self.inner, self.tell = detector, tell
        self.window, self.free = detector.window, detector.free

    def start(self) -> Watch:
        eye, tell = self.inner.start(), self.tell
        see = eye.see

        def shown(transition: Transition) -> None:
            see(transition)
            tell(transition)

        eye.see = shown
        return eye


def redrawing(solver: Solver, handle: Watched, threshold: float, repair: Renoise) -> Callable[..., Tensor]:
    """A sampler function that samples, watches, and draws flagged latents again."""

    def redrawn(
        model: KDiffusionModel,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        extra, process = dict(extra_args or {}), "flow" if is_flow(model) else "ve"
        if extra.get("denoise_mask") is not None:
            raise FanalError("a masked latent cannot be drawn again in part: take the fanal sampler for inpainting")
        denoiser, grid = from_k_diffusion(model, extra, process), grid_of(sigmas, process)
        keys = [(int(extra.get("seed") or 0) + b) % 2**64 for b in range(len(x))]
        state, detector = x_of(x, grid[0], process), handle.watcher(grid)

        def tell(transition: Transition) -> None:
            i, at = transition.span.i, input_of(transition.x, transition.span.sigma, process)
            if callback is not None:
                callback(
                    {"i": i, "x": at, "denoised": transition.step.denoised, "sigma": sigmas[i], "sigma_hat": sigmas[i]}
                )

        first = watch(denoiser, state, grid, solver, _Shown(detector, tell), keys)
        after = repair.repair(denoiser, state, grid, solver, detector, keys, first, threshold)
        handle.known = after.risk
        return input_of(after.x, grid[-1], process)

    return redrawn
