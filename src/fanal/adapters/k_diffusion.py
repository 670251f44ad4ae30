"""k-diffusion's call signatures, both ways: a fanal solver as one of its samplers, one of its models as a denoiser.

    sample_heun = sampler(fanal.solvers.Heun())
    x = sample_heun(model, x, sigmas, extra_args={"cond": cond}, callback=show)   # like k_diffusion.sampling.sample_*

k-diffusion itself is not needed. Programs that kept its interface, ComfyUI among them, take such samplers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.predictions import flow_sigma, flow_time, input_of, x_of
from fanal.denoiser import Denoiser
from fanal.errors import FanalError
from fanal.sampling import Solver, trace
from fanal.schedules import check_sigmas

__all__ = ["KDiffusionModel", "KDiffusionSampler", "from_k_diffusion", "grid_of", "sampler"]


@runtime_checkable
class KDiffusionModel(Protocol):
    """A model as k-diffusion wraps it: sigma has shape (B,), and the answer is the denoised prediction."""

    def __call__(self, x: Tensor, sigma: Tensor, /, **extra_args: Any) -> Tensor:
        """Return the denoised prediction at noise levels sigma (B,)."""
        ...


@runtime_checkable
class KDiffusionSampler(Protocol):
    """A sampler as k-diffusion writes them."""

    def __call__(
        self,
        model: KDiffusionModel,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """Return x at the last of sigmas."""
        ...


def from_k_diffusion(
    model: KDiffusionModel, extra_args: Mapping[str, Any] | None = None, process: str = "ve"
) -> Denoiser:
    """Return a k-diffusion model as a denoiser.

    Args:
        model: called as `model(x, sigma, **extra_args)` with one sigma per sample, in the dtype of x.
        extra_args: passed on at each call (conditions and the like).
        process: `ve`; or `flow` for models that keep k-diffusion's signature but mean `z = (1 − t)·x0 + t·n` and t
            (flow matching in ComfyUI).
    """
    extra = dict(extra_args or {})

    def denoiser(x: Tensor, sigma: Tensor, /) -> Tensor:
        level = flow_time(sigma) if process == "flow" else sigma.double()
        # The dtype first: a float64 tensor cannot move to every device.
        return model(input_of(x, sigma, process), level.to(x.dtype).to(x.device).expand(len(x)), **extra)

    return denoiser


def _bar(steps: int, disable: bool | None) -> Any:
    """A progress bar as k-diffusion's samplers show one: not on request, and not without a terminal."""
    if disable or (disable is None and not sys.stderr.isatty()):
        return nullcontext()
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True))
    bar.add_task("sampling", total=steps)
    return bar


def grid_of(sigmas: Tensor, process: str) -> Float[Tensor, " n"]:
    """Return a grid in x-space from what a sampler is given: sigmas, or for `flow` times in [0, 1].

    Raises:
        FanalError: it is no schedule.
    """
    if process == "ve":
        return check_sigmas(sigmas)
    t = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
    if t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
        raise FanalError(f"the times of a flow model lie in [0, 1], got {float(t.min()):.4g} to {float(t.max()):.4g}")
    return check_sigmas(flow_sigma(t))


def sampler(solver: Solver, *, seeds: Iterable[int] | None = None, process: str = "ve") -> KDiffusionSampler:
    """Return a solver as a function with the signature of k-diffusion's samplers.

    After each interval the callback gets a dict with `i`, `x` and `sigma_hat` (where the model was called first in this
    interval), `sigma`, and `denoised`. Raise an exception in it to stop.

    Args:
        solver: how an interval is crossed.
        seeds: one per sample, for solvers that draw noise.
        process: as in `from_k_diffusion`; with `flow`, x and sigmas mean z and t on both sides.

    Raises:
        FanalError: of the returned function: sigmas are no schedule, or as `fanal.trace`.
    """
    keys = None if seeds is None else tuple(seeds)

    def sample(
        model: KDiffusionModel,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        if len(sigmas) < 2:
            return x
        grid = grid_of(sigmas, process)
        denoiser = from_k_diffusion(model, extra_args, process)
        state = x_of(x, grid[0], process)
        with torch.no_grad(), _bar(len(grid) - 1, disable) as bar:
            for transition in trace(denoiser, state, grid, solver, keys):
                span, step = transition.span, transition.step
                state = step.x_next
                if callback is not None:
                    at, sigma_hat = step.at or (transition.x, span.sigma)
                    shown = {"x": input_of(at, sigma_hat, process), "i": span.i, "denoised": step.denoised}
                    callback(shown | {"sigma": sigmas[span.i], "sigma_hat": _told(sigma_hat, sigmas, process)})
                if bar is not None:
                    bar.advance(bar.task_ids[0])
        return input_of(state, grid[-1], process)

    return sample


def _told(sigma: Tensor, sigmas: Tensor, process: str) -> Tensor:
    """A noise level as the caller writes it, on the device of its sigmas."""
    return (flow_time(sigma) if process == "flow" else sigma).detach().to(sigmas.dtype).to(sigmas.device)
