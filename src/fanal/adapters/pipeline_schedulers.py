"""What a diffusers scheduler says about its network, in terms of sigma: the process, the times, and its own grid.

| scheduler | its samples | network's time | sigma |
| --- | --- | --- | --- |
| DDPM, DDIM, PNDM, DPM-Solver, DEIS, UniPC | `z = x/√(1 + sigma²)` | 0 … T − 1 | `√((1 − ᾱ)/ᾱ)` |
| Euler, Heun, LMS, KDPM2 | x | the same | the same |
| FlowMatch…, and the others with `use_flow_sigmas` | `z = x/(1 + sigma)` | `T·t` | `t/(1 − t)` |
| ScoreSdeVe | x | sigma | its own |

Between two whole times, time is linear in log sigma, as in diffusers' Euler; the table is `Timesteps`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.predictions import PREDICTIONS, Timesteps, input_of
from fanal.denoiser import expand
from fanal.errors import FanalError, unknown_name

__all__ = ["SCHEDULERS", "Process", "latents_of", "native_sigmas", "process_of", "state_of"]

SCHEDULERS = {
    **dict.fromkeys(("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"), "vp"),
    **dict.fromkeys(("DDPMParallelScheduler", "DDIMParallelScheduler", "DEISMultistepScheduler"), "vp"),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"), "vp"),
    **dict.fromkeys(("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"), "ve"),
    **dict.fromkeys(("LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), "ve"),
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "ScoreSdeVeScheduler": "sde",
}
"""The schedulers that are read, and the space in which each keeps its samples."""

_NEAR = 1e-6  # float32 copies of the table's numbers are replaced by the table's


@dataclass(frozen=True, eq=False)
class Process:
    """How a pipeline's network sees x and sigma.

    Attributes:
        kind: one of `fanal.adapters.predictions.PROCESSES`.
        prediction: one of `fanal.adapters.predictions.PREDICTIONS`.
        space: where the scheduler keeps its samples: `vp`, `ve`, `flow` or `sde`.
        sigma_min: noise level of the network's first time.
        sigma_max: noise level of its last time; may be infinite.
        times: the table of a variance-preserving network.
        scale: network's time at t = 1, for flow matching.
    """

    kind: str
    prediction: str
    space: str
    sigma_min: float
    sigma_max: float
    times: Timesteps | None = None
    scale: float = 1000.0

    def time_of(self, sigma: Tensor) -> Float[Tensor, "*b"]:
        """Return the network's time of a noise level, float64 on the CPU.

        `vp`: the time whose level is sigma; `flow`: `T·sigma/(1 + sigma)`; `ve` (score-SDE): sigma itself.
        """
        level = sigma.to("cpu", torch.float64)
        if self.times is not None:
            return self.times.time_of(level)
        if self.kind == "flow":
            # 1 − 1/(1 + sigma) is T·t at infinity too
            return self.scale * torch.where(torch.isinf(level), torch.ones_like(level), level / (1 + level))
        return level


def process_of(scheduler: Any) -> Process:
    """Read the process, the prediction and the range of sigma off a scheduler.

    Raises:
        FanalError: the scheduler is not among `SCHEDULERS`, or it is used in a way that is not read.
    """
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        raise unknown_name("scheduler", name, SCHEDULERS)
    config = scheduler.config
    space = "flow" if config.get("use_flow_sigmas") else SCHEDULERS[name]
    if space == "sde":
        return Process("ve", "score", space, float(config.sigma_min), float(config.sigma_max))
    if space == "flow":
        return _flow(scheduler)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or prediction == "flow_prediction":
        raise unknown_name(f"prediction_type of {name}", str(prediction), ("epsilon", "sample", "v_prediction"))
    if config.get("timestep_type", "discrete") != "discrete":
        raise FanalError(f"{name} with timestep_type={config.timestep_type!r} is not read, only 'discrete' is")
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
    levels = ((1 - alphas) / alphas).sqrt()  # infinite where the last ᾱ is 0: zero terminal SNR
    if not bool((levels.diff() > 0).all()):
        # Euler, DPM-Solver and UniPC write 2^-24 for a last ᾱ of 0, which can be more than the one before it.
        raise FanalError(
            f"the noise levels of this {name} do not increase with time: give the pipeline a DDIMScheduler"
        )
    times = Timesteps(levels)
    return Process("vp", prediction, space, times.sigma_min, times.sigma_max, times)


def _flow(scheduler: Any) -> Process:
    config = scheduler.config
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise FanalError(f"a flow scheduler with prediction_type={config.prediction_type!r} is not read")
    if config.get("invert_sigmas"):
        raise FanalError("a flow scheduler with invert_sigmas (time that runs from 0 to 1) is not read")
    total = config.num_train_timesteps
    first = 1 / total
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if not config.get("use_dynamic_shifting"):
        first = shift * first / (1 + (shift - 1) * first)
    return Process("flow", "flow_prediction", "flow", first / (1 - first), math.inf, scale=float(total))


def native_sigmas(scheduler: Any, process: Process, steps: int, settings: dict[str, Any]) -> Float[Tensor, " n"]:
    """Return the noise levels that a scheduler steps through: strictly decreasing, float64.

    What happens inside a step (Heun's second call, KDPM2's middle, PNDM's first repeat) is left out, and so is a last
    step that goes nowhere (`set_alpha_to_one=False` after time 0).

    Args:
        scheduler: left as it is.
        process: what `process_of` says about it.
        steps: number of inference steps.
        settings: further arguments of its `set_timesteps`.

    Raises:
        FanalError: the scheduler refuses this number of steps.
    """
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(steps, **settings)
        if process.space == "sde":
            own.set_sigmas(steps)
    except (ValueError, TypeError, ZeroDivisionError, IndexError) as error:
        raise FanalError(f"{type(scheduler).__name__} cannot take {steps} steps: {error}") from error
    if process.space == "flow":
        t = own.sigmas.to("cpu", torch.float64)
        return _decreasing(t / (1 - t))
    if process.space == "sde":
        return _decreasing(torch.cat([own.sigmas.double(), torch.zeros(1, dtype=torch.float64)]))
    assert process.times is not None
    if hasattr(own, "sigmas"):
        return _decreasing(_on_table(own.sigmas.to("cpu", torch.float64), process.times))
    asked = getattr(own, "_timesteps", own.timesteps)  # PNDM's: without its Runge-Kutta stages
    times = torch.as_tensor(asked).to("cpu", torch.int64).unique().flip(0)
    last = _after(own, int(times[-1]), steps)
    return _decreasing(torch.cat([process.times.sigmas[times], last[None]]))


def _after(scheduler: Any, time: int, steps: int) -> Tensor:
    """The level that the last step ends at: DDIM and PNDM choose between 0 and the level of the first time."""
    if not hasattr(scheduler, "final_alpha_cumprod"):
        return torch.zeros((), dtype=torch.float64)
    before = time - scheduler.config.num_train_timesteps // steps
    alpha = (scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod).double()
    return ((1 - alpha) / alpha).sqrt()


def _on_table(levels: Tensor, times: Timesteps) -> Tensor:
    """Replace levels that are whole times up to rounding by the table's own numbers."""
    table = times.sigmas
    place = torch.searchsorted(table, levels).clamp(1, len(table) - 1)
    near = torch.where((levels - table[place - 1]).abs() < (table[place] - levels).abs(), place - 1, place)
    return torch.where((table[near] - levels).abs() <= _NEAR * levels, table[near], levels)


def _decreasing(levels: Tensor) -> Tensor:
    """Keep each entry that lies below all before it."""
    lowest = torch.cummin(levels, 0).values
    keep = torch.ones(len(levels), dtype=torch.bool)
    keep[1:] = levels[1:] < lowest[:-1]
    return levels[keep]


def state_of(x: Float[Tensor, "b *d"], sigma: Tensor, process: Process) -> Float[Tensor, "b *d"]:
    """Return what the scheduler calls the sample at this x: x itself, `x/√(1 + sigma²)` or `x/(1 + sigma)`."""
    return input_of(x, sigma, process.space if process.space in ("vp", "flow") else "ve")


def latents_of(x: Float[Tensor, "b *d"], sigma: Tensor, process: Process, spacing: str) -> Float[Tensor, "b *d"]:
    """Return the `latents=` from which a pipeline that starts at sigma gets to x.

    Pipelines multiply what they are given by `init_noise_sigma`: 1 for samples in z-space; for samples in x-space
    sigma, or `√(1 + sigma²)` where timestep_spacing is `leading`.
    """
    if process.space in ("vp", "flow") or (sigma.ndim == 0 and math.isinf(float(sigma))):
        return state_of(x, sigma, process)
    return input_of(x, sigma, "vp") if spacing == "leading" and process.space == "ve" else x / expand(sigma, x).to(x)
