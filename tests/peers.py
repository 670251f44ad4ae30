"""Other programs' samplers, driven on our problems in float64: what they read and cast in float32 is handed over."""

import torch

from fanal.denoiser import Counted
from fanal.seeding import noise
from problems import mixture

F64 = torch.float64
SEEDS = range(5)


class Doubled:
    """The torch that a scheduler's module sees: its casts to float32 are casts to float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def fresh(i, stream="ancestral"):
    """The noise that our solver draws at step i."""
    return noise((2,), SEEDS, step=i, stream=stream, dtype=F64)


def begin(sigma):
    """Where a run of the peers starts."""
    return noise((2,), SEEDS, float(sigma), dtype=F64)


def drive_ve(scheduler, D, x, prediction, **options):
    """Run a scheduler whose samples live in x-space, the way a pipeline does."""
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        sigma = scheduler.sigmas[scheduler.step_index].to(F64)
        denoised = D(scaled * (sigma**2 + 1).sqrt(), sigma)
        output = denoised if prediction == "sample" else (x - denoised) / sigma
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def drive_times(scheduler, D, x, grid, prediction, step):
    """Run a scheduler that knows timesteps alone; its samples are `z = √ᾱ·x`."""
    z = x / (1 + grid[0] ** 2).sqrt()
    for i, t in enumerate(scheduler.timesteps):
        x = z * (1 + grid[i] ** 2).sqrt()
        denoised = D(x, grid[i])
        output = denoised if prediction == "sample" else (x - denoised) / grid[i]
        z = step(i, output, t, z).prev_sample
    return z  # ᾱ = 1 at the end


def run_vp(scheduler, sigmas, prediction="sample", **options):
    """Run a scheduler with `sigmas` whose samples are `z = x/√(1 + sigma²)` on the mixture; x at the end, and calls.

    Its own sigmas are replaced by ours, in float64.
    """
    steps = len(sigmas) - 1
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    D, z = Counted(mixture()), begin(sigmas[0]) / (1 + sigmas[0] ** 2).sqrt()
    for i, t in enumerate(scheduler.timesteps):
        x = z * (1 + sigmas[i] ** 2).sqrt()
        denoised = D(x, sigmas[i])
        output = denoised if prediction == "sample" else (x - denoised) / sigmas[i]
        z = scheduler.step(output, t, z, **{k: v(i) for k, v in options.items()}).prev_sample
    return z * (1 + sigmas[-1] ** 2).sqrt(), D.calls
