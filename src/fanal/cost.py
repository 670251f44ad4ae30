"""What a model costs on this machine: seconds per network call, memory, and what a run would take."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from fanal.denoiser import Model, network_of
from fanal.errors import FanalError
from fanal.seeding import noise

__all__ = ["Cost", "measure_cost"]


@dataclass(frozen=True)
class Cost:
    """The cost of one network call.

    Attributes:
        batch: samples per call.
        seconds: of a call, the median of the repeats.
        quartiles: of the same, so that a busy machine shows.
        memory: bytes at the peak: allocated on the accelerator, or resident in this process on the CPU.
        parameters: of the network, where it has some; else 0.
        device: where it ran.
    """

    batch: int
    seconds: float
    quartiles: tuple[float, float]
    memory: int
    parameters: int
    device: str

    def projected(self, calls: float, count: int) -> float:
        """Return the seconds that `count` samples at `calls` network calls each would take: whole batches."""
        return calls * math.ceil(count / self.batch) * self.seconds


def _peak(where: torch.device) -> int:
    """Bytes at the peak so far."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    if where.type == "mps":
        return torch.mps.driver_allocated_memory()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _wait(where: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    elif where.type == "mps":
        torch.mps.synchronize()


def measure_cost(model: Model, *, batch: int = 16, repeats: int = 5, device: torch.device | str = "cpu") -> Cost:
    """Time network calls at the middle noise level, after one call that is not timed.

    Args:
        model: the denoiser, with its conditions bound.
        batch: samples per call.
        repeats: timed calls.
        device: where the model is.

    Raises:
        FanalError: batch or repeats are not positive, or the model fails.
    """
    if batch < 1 or repeats < 1:
        raise FanalError(f"batch and repeats must be at least 1, got {batch} and {repeats}")
    where = torch.device(device)
    low, high = model.sigma_min or 1e-3, min(model.sigma_max, 1e3)
    sigma = torch.tensor(math.sqrt(low * high), dtype=torch.float64)
    x = noise(model.shape, range(batch), float(sigma), device=where)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            model(x, sigma)
            _wait(where)
            seconds.append(time.perf_counter() - begin)
    timed = sorted(seconds[1:])
    cuts = statistics.quantiles(timed, n=4) if len(timed) > 1 else [timed[0]] * 3
    network = network_of(model)
    parameters = sum(p.numel() for p in network.parameters()) if isinstance(network, nn.Module) else 0
    return Cost(batch, statistics.median(timed), (cuts[0], cuts[2]), _peak(where), parameters, str(where))
