"""What it takes to stand in for a diffusers scheduler: its samples, its grid, its seeds.

The process itself, the table of times and the scheduler's own grid come from `fanal.adapters.pipeline_schedulers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.pipeline_schedulers import SCHEDULERS, Process, native_sigmas, process_of
from fanal.adapters.predictions import denoised_of, flow_sigma, input_of, x_of
from fanal.config import build_schedule
from fanal.denoiser import expand
from fanal.errors import FanalError
from fanal.schedules import check_sigmas

__all__ = [
    "covers",
    "denoised_at",
    "fed",
    "fresh",
    "keys_of",
    "lay",
    "noised",
    "place",
    "replaceable",
    "sigma_at",
    "x_at",
]


def replaceable(scheduler: Any) -> Process:
    """Read the process of a scheduler whose pipeline calls its `step`, once for each call of the network.

    Raises:
        FanalError: it is of another kind.
    """
    process = process_of(scheduler)
    if process.space == "sde":
        raise FanalError(f"the pipeline of {type(scheduler).__name__} does not leave its steps to the scheduler")
    return process


def x_at(sample: Float[Tensor, "b *d"], sigma: Tensor, process: Process) -> Float[Tensor, "b *d"]:
    """Return x from a sample as the scheduler keeps it, in at least float32: the inverse of `state_of`."""
    sample = sample if sample.dtype == torch.float64 else sample.float()
    return x_of(sample, sigma, process.space)


def fed(sample: Float[Tensor, "b *d"], sigma: Tensor, process: Process) -> Float[Tensor, "b *d"]:
    """Return what the network is fed, from a sample as the scheduler keeps it."""
    return input_of(sample, sigma, process.kind) if process.space == "ve" else sample


def denoised_at(output: Tensor, x: Float[Tensor, "b *d"], sigma: Tensor, process: Process) -> Float[Tensor, "b *d"]:
    """Return D from what the network answered; of twice the channels the second half, a variance, is dropped."""
    if output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    return denoised_of(output.to(x.dtype), x, sigma, process.prediction)


def sigma_at(time: Tensor, process: Process) -> Float[Tensor, "*n"]:
    """Return the noise level of a network's time, float64 on the CPU: the inverse of `Process.time_of`."""
    if process.times is not None:
        return process.times.sigma_of(time)
    return flow_sigma(time.detach().to("cpu", torch.float64) / process.scale)


def covers(process: Process, sigmas: Float[Tensor, " n"]) -> bool:
    """Whether the network was trained at these noise levels, or near them: half the smallest, 1.5 times the largest."""
    positive = sigmas[sigmas > 0]
    low, high = process.sigma_min / 2, process.sigma_max * 1.5  # solvers that draw noise step a little beyond both
    return process.kind == "flow" or bool(((positive >= low) & (positive <= high)).all())


def noised(clean: Float[Tensor, "b *d"], noise: Tensor, time: Tensor, process: Process) -> Float[Tensor, "b *d"]:
    """Return clean samples with noise as of a time, one for all or one per sample, as the scheduler keeps them."""
    sigma = sigma_at(time.reshape(-1) if time.numel() > 1 else time.reshape(()), process)
    keep = {"ve": torch.ones_like(sigma), "vp": (1 + sigma**2).rsqrt(), "flow": 1 / (1 + sigma)}[process.space]
    add = {"ve": sigma, "vp": (1 - keep**2).sqrt(), "flow": 1 - keep}[process.space]
    keep, add = (expand(scale.to(clean.dtype).to(clean.device), clean) for scale in (keep, add))
    return keep * clean + add * noise


def lay(
    scheduler: Any,
    process: Process,
    steps: int | None = None,
    timesteps: Any = None,
    sigmas: Any = None,
    mu: float | None = None,
) -> Float[Tensor, " n"]:
    """Return the grid that a scheduler would step on.

    Args:
        scheduler: left as it is.
        process: what it says about its network.
        steps: number of intervals.
        timesteps: times instead.
        sigmas: sigmas instead: of x-space for `vp`, the last included; the unshifted ramp for flow matching.
        mu: the dynamic shift of flow matching.

    Raises:
        FanalError: it cannot be told this, or there is no such grid.
    """
    if process.kind == "vp" and sigmas is not None:
        return check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64))
    if process.kind == "vp" and timesteps is not None:
        times = torch.as_tensor(timesteps, dtype=torch.float64)
        end = native_sigmas(scheduler, process, 2, {})[-1:]
        return check_sigmas(torch.cat([sigma_at(times, process), end]))
    settings = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    settings = {name: value for name, value in settings.items() if value is not None}
    known = inspect.signature(scheduler.set_timesteps).parameters
    for name in settings:
        if name not in known:
            raise FanalError(f"{type(scheduler).__name__}, whose grid is taken, knows no {name}: give a grid instead")
    count = steps or len(next(iter(settings.values()), []))
    return check_sigmas(native_sigmas(scheduler, process, count, settings))


def place(grid: Float[Tensor, " n"], schedule: str | Callable[..., Tensor], process: Process) -> Float[Tensor, " n"]:
    """Return as many nodes between the ends of a grid, where a schedule puts them; an infinite first one stays.

    A schedule file has ends of its own: its grid with as many intervals is returned.

    Args:
        grid: gives the number of intervals, the largest finite sigma, the smallest positive one, and whether 0 follows.
        schedule: as on the command line, or a function `(steps, sigma_min, sigma_max, zero)`.
        process: what a schedule file must fit.

    Raises:
        FanalError: the schedule is unknown, or there are too few intervals.
    """
    if isinstance(schedule, str) and schedule.endswith(".json"):
        searched = build_schedule(schedule, len(grid) - 1, process.sigma_min, process.sigma_max)
        if len(searched) != len(grid):
            raise FanalError(f"{schedule} has a grid of {len(searched) - 1} steps: pass it as num_inference_steps")
        return searched
    far, zero = bool(torch.isinf(grid[0])), float(grid[-1]) == 0
    low, high, steps = float(grid[-2 if zero else -1]), float(grid[1 if far else 0]), len(grid) - 1 - far
    if not low < high:
        raise FanalError(f"a schedule needs more intervals than {len(grid) - 1} here: raise num_inference_steps")
    if isinstance(schedule, str):
        placed = build_schedule(schedule, steps, low, high, zero=zero)
    else:
        placed = check_sigmas(schedule(steps, sigma_min=low, sigma_max=high, zero=zero))
    return torch.cat([grid[:1], placed]) if far else placed


def fresh(scheduler: Any) -> Any:
    """Return a diffusers scheduler without state, from one that may have some, or from a configuration.

    Raises:
        FanalError: it is neither.
    """
    import diffusers
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    if isinstance(scheduler, SchedulerMixin) and isinstance(scheduler, ConfigMixin):
        return type(scheduler).from_config(scheduler.config)
    if not isinstance(scheduler, Mapping):
        raise FanalError(
            "scheduler= says what the network predicts and at which times: pass the one to be replaced "
            "(pipe.scheduler), or a new one such as diffusers.DDIMScheduler(prediction_type='epsilon'), got "
            f"{type(scheduler).__name__}"
        )
    name = scheduler.get("_class_name") or _named(scheduler)
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise FanalError(f"{name!r} is no scheduler of diffusers {diffusers.__version__}: was it saved by a newer one?")
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config({key: value for key, value in scheduler.items() if key in known})  # pyright: ignore


def _named(config: Mapping[str, Any]) -> str | None:
    """The scheduler whose configuration has these fields: one that was never saved does not say its class."""
    import diffusers

    fields = {key for key in config if not key.startswith("_")}
    for name in SCHEDULERS:
        if set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "kwargs"} == fields:
            return name
    return None


def keys_of(sample: Tensor, seeds: int | Sequence[int] | None, generator: Any) -> Sequence[int] | None:
    """Return one seed per sample: the given ones, or the initial seeds of a pipeline's generators; None without either.

    Args:
        sample: the batch.
        seeds: one per sample, or the first of consecutive ones.
        generator: torch's, or a list of them.
    """
    count = len(sample)
    if isinstance(seeds, int):
        return range(seeds, seeds + count)
    if seeds is not None:  # pipelines that guide in the batch hand over every sample twice
        doubled = 2 * len(seeds) == count and torch.equal(sample[: count // 2], sample[count // 2 :])
        return [*seeds, *seeds] if doubled else list(seeds)
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return [(generator.initial_seed() + b) % 2**64 for b in range(count)]
    return [one.initial_seed() for one in generator]
