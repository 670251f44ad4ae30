"""What a network is fed and what it predicts, in terms of x, sigma and the denoised prediction D.

fanal works in x-space, `x = x0 + sigma·n`. A process scales it, `z = s·x`:

| process | network's input z | D from its output |
| --- | --- | --- |
| `ve` | x | sample: `out`; epsilon: `x − sigma·out`; score: `x + sigma²·out` |
| `vp` | `x/√(1 + sigma²)` | sample, epsilon: as above; v_prediction: `x/(1 + sigma²) − sigma/√(1 + sigma²)·out` |
| `flow` | `x/(1 + sigma)` | flow_prediction: `(x − sigma·out)/(1 + sigma)`, out = noise − x0 |

At infinite sigma x does not exist; there x stands for the unit noise z itself (see `fanal.sampling.depart`), the input
is z in each process, and the limits hold: sample `out`, v_prediction `−out`, flow_prediction `z − out`. A noise
prediction says nothing about x0 there.

Sources: [GEO] prop. 7, [REG] lemma 4 (one process up to scale); Salimans & Ho 2022, arXiv:2202.00512, app. D (v);
Lipman et al. 2023, arXiv:2210.02747 (flow).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import expand
from fanal.errors import FanalError, unknown_name

__all__ = [
    "PREDICTIONS",
    "PROCESSES",
    "Timesteps",
    "denoised_of",
    "flow_sigma",
    "flow_time",
    "input_of",
    "output_of",
    "x_of",
]

PREDICTIONS = ("sample", "epsilon", "v_prediction", "flow_prediction", "score")
"""What networks predict, by diffusers' names."""

PROCESSES = ("ve", "vp", "flow")
"""How x is scaled before a network sees it."""


def _level(sigma: Tensor, x: Tensor) -> Tensor:
    """Sigma in float64 on the CPU where it is 0-d, else in the dtype of x with x's axes."""
    return sigma.double() if sigma.ndim == 0 else expand(sigma.to(x.dtype).to(x.device), x)


def _infinite(sigma: Tensor) -> bool:
    return sigma.ndim == 0 and math.isinf(float(sigma))


def input_of(x: Float[Tensor, "b *d"], sigma: Tensor, process: str) -> Float[Tensor, "b *d"]:
    """Return what the network sees: x, `x/√(1 + sigma²)` or `x/(1 + sigma)`; at infinite sigma x itself, the noise.

    Raises:
        FanalError: the process is unknown.
    """
    if process not in PROCESSES:
        raise unknown_name("process", process, PROCESSES)
    if process == "ve" or _infinite(sigma):
        return x
    level = _level(sigma, x)
    return x / (1 + level**2).sqrt() if process == "vp" else x / (1 + level)


def flow_time(sigma: Tensor) -> Float[Tensor, "*b"]:
    """Return the time `t = sigma/(1 + sigma)` of flow matching, in float64 and 1 at infinite sigma."""
    level = sigma.double()
    return torch.where(torch.isinf(level), torch.ones_like(level), level / (1 + level))


def flow_sigma(t: Tensor) -> Float[Tensor, "*b"]:
    """Return the noise level `sigma = t/(1 − t)` of a time of flow matching, in float64; infinite at t = 1."""
    t = t.double()
    return t / (1 - t)


def x_of(z: Float[Tensor, "b *d"], sigma: Tensor, process: str) -> Float[Tensor, "b *d"]:
    """Return x from what the network sees: the inverse of `input_of`; at infinite sigma the noise stands for itself.

    Raises:
        FanalError: the process is unknown.
    """
    if process not in PROCESSES:
        raise unknown_name("process", process, PROCESSES)
    if process == "ve" or _infinite(sigma):
        return z
    level = _level(sigma, z)
    return z * (1 + level**2).sqrt() if process == "vp" else z * (1 + level)


def denoised_of(
    output: Float[Tensor, "b *d"], x: Float[Tensor, "b *d"], sigma: Tensor, prediction: str
) -> Float[Tensor, "b *d"]:
    """Return D(x, sigma) from a network's output.

    Args:
        output: what the network answered.
        x: the state in x-space; the unit noise at infinite sigma.
        sigma: noise level, 0-d or (B,).
        prediction: one of `PREDICTIONS`.

    Raises:
        FanalError: the prediction is unknown, or says nothing at infinite sigma.
    """
    if prediction not in PREDICTIONS:
        raise unknown_name("prediction", prediction, PREDICTIONS)
    if prediction == "sample":
        return output
    if _infinite(sigma):
        if prediction in ("epsilon", "score"):
            raise FanalError(f"a network that predicts {prediction} says nothing about x0 at infinite sigma")
        return -output if prediction == "v_prediction" else x - output
    level = _level(sigma, x)
    if prediction == "epsilon":
        return x - level * output
    if prediction == "score":
        return x + level**2 * output
    if prediction == "v_prediction":
        return x / (1 + level**2) - level / (1 + level**2).sqrt() * output
    return (x - level * output) / (1 + level)


def output_of(
    denoised: Float[Tensor, "b *d"], x: Float[Tensor, "b *d"], sigma: Tensor, prediction: str
) -> Float[Tensor, "b *d"]:
    """Return what a network of this kind would have answered: the inverse of `denoised_of`, at finite sigma > 0.

    Raises:
        FanalError: the prediction is unknown, or sigma is infinite.
    """
    if prediction not in PREDICTIONS:
        raise unknown_name("prediction", prediction, PREDICTIONS)
    if _infinite(sigma):
        raise FanalError("the output at infinite sigma does not follow from x: ask the network")
    level = _level(sigma, x)
    if prediction == "sample":
        return denoised
    if prediction == "epsilon":
        return (x - denoised) / level
    if prediction == "score":
        return (denoised - x) / level**2
    if prediction == "v_prediction":
        return (x / (1 + level**2) - denoised) * (1 + level**2).sqrt() / level
    return (x - (1 + level) * denoised) / level


@dataclass(frozen=True, eq=False)
class Timesteps:
    """The discrete times of a variance-preserving network and their noise levels, both ways.

    `sigma_t = sqrt((1 − ᾱ_t)/ᾱ_t)`; between two of them time is linear in log sigma. With zero terminal SNR (the last
    ᾱ is 0, Lin et al. 2024, arXiv:2305.08891) the last sigma is infinite, and time rises to it linearly in 1/sigma.

    Attributes:
        sigmas: (T,) float64, strictly increasing; only the last may be infinite.
    """

    sigmas: Float[Tensor, " t"]

    def __post_init__(self) -> None:
        values = self.sigmas
        finite = torch.isfinite(values[:-1]).all() if len(values) > 1 else False
        if values.ndim != 1 or not finite or not bool((values.diff() > 0).all()) or not float(values[0]) > 0:
            raise FanalError("the noise levels of timesteps must be positive and strictly increasing")

    @classmethod
    def of_alphas(cls, alphas_cumprod: Tensor | Any) -> Timesteps:
        """Build the table from ᾱ_t in [0, 1), strictly decreasing; only the last may be 0.

        Raises:
            FanalError: ᾱ is no such table.
        """
        alpha = torch.as_tensor(alphas_cumprod).to("cpu", torch.float64)
        return cls(((1 - alpha) / alpha).sqrt())

    @property
    def sigma_min(self) -> float:
        """Noise level of time 0."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """Noise level of the last time; infinite with zero terminal SNR."""
        return float(self.sigmas[-1])

    def time_of(self, sigma: Tensor) -> Float[Tensor, "*b"]:
        """Return the (fractional) time of a noise level, float64; levels outside of the table get its ends.

        Derivatives to sigma pass, forward and backward: solvers may differentiate a network along its trajectory.
        """
        where = sigma.to("cpu", torch.float64)
        levels = self.sigmas[torch.isfinite(self.sigmas)]
        logs, last = levels.log(), len(levels) - 1
        log = where.log().clamp(logs[0], logs[-1])
        below = (torch.searchsorted(logs, log.detach().contiguous(), right=True) - 1).clamp(0, max(last - 1, 0))
        above = (below + 1).clamp(max=last)
        gap = (logs[above] - logs[below]) if last else logs.new_ones(())
        time = below + (log - logs[below]) / gap
        if last + 1 < len(self.sigmas):
            time = torch.where(where > levels[-1], last + 1 - levels[-1] / where, time)
        return time

    def sigma_of(self, time: Tensor) -> Float[Tensor, "*b"]:
        """Return the noise level of a (fractional) time, float64: the inverse of `time_of`."""
        levels = self.sigmas.numpy()
        where = time.detach().to("cpu", torch.float64).numpy()
        finite = levels[np.isfinite(levels)]
        last = len(finite) - 1
        sigma = np.exp(np.interp(where, np.arange(len(finite)), np.log(finite)))
        whole = np.clip(np.rint(where), 0, last).astype(int)
        sigma = np.where(where == whole, finite[whole], sigma)  # whole times give the table's own numbers
        if len(finite) < len(levels):
            with np.errstate(divide="ignore"):
                sigma = np.where(where > last, finite[-1] / np.maximum(last + 1 - where, 0), sigma)
        return torch.as_tensor(sigma, dtype=torch.float64)
