"""Sigmas and the discrete timesteps of a beta schedule, both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.errors import FanalError
from fanal.schedules.grids import Grid, check_sigmas, double

__all__ = ["from_timesteps", "stable_diffusion_alphas", "to_timesteps"]


def stable_diffusion_alphas() -> Float[Tensor, " t"]:
    """Return the ᾱ_t of Stable Diffusion 1 and XL: β linear in its root from 0.00085 to 0.012 over 1,000 steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def from_timesteps(
    timesteps: Sequence[int] | Tensor, alphas_cumprod: Sequence[float] | Tensor, zero: bool = True
) -> Grid:
    """Sigmas of discrete VP timesteps: `sigma_t = sqrt((1 − ᾱ_t)/ᾱ_t)`, followed by 0 if `zero`.

    Args:
        timesteps: whole numbers, strictly decreasing, indices into `alphas_cumprod`.
        alphas_cumprod: ᾱ_t in (0, 1), one per training step.
        zero: append 0.

    Raises:
        FanalError: a timestep is outside the table, ᾱ is outside (0, 1), or the result is not a schedule.
    """
    table = double(alphas_cumprod)
    index = torch.as_tensor(timesteps)
    if index.is_floating_point() or index.ndim != 1 or len(index) == 0:
        raise FanalError("timesteps must be a list of whole numbers; convert fractional times to sigmas first")
    if int(index.min()) < 0 or int(index.max()) >= len(table):
        raise FanalError(f"timesteps must lie in [0, {len(table) - 1}], got {int(index.min())} to {int(index.max())}")
    alpha = table[index]
    if not bool(((alpha > 0) & (alpha < 1)).all()):
        raise FanalError("alphas_cumprod must lie in (0, 1) at the timesteps; zero-terminal-SNR has no finite sigma")
    sigmas = ((1 - alpha) / alpha).sqrt()
    return check_sigmas(torch.cat([sigmas, sigmas.new_zeros(1)]) if zero else sigmas)


def to_timesteps(
    sigmas: Sequence[float] | Tensor, alphas_cumprod: Sequence[float] | Tensor, whole: bool = True
) -> Int[Tensor, " n"] | Float[Tensor, " n"]:
    """Timesteps whose noise levels are these sigmas, or nearest to them: the inverse of `from_timesteps`.

    Between two timesteps time is linear in log sigma (`fanal.adapters.predictions.Timesteps`).

    Args:
        sigmas: a grid; a final 0 has no timestep and is left out.
        alphas_cumprod: ᾱ_t in (0, 1), one per training step.
        whole: round to whole timesteps (int64), as schedulers take them; False: fractional ones (float64).

    Raises:
        FanalError: a sigma lies outside of the table, or two of them fall on one timestep.
    """
    from fanal.adapters.predictions import Timesteps

    grid, times = check_sigmas(sigmas), Timesteps.of_alphas(double(alphas_cumprod))
    kept = grid[:-1] if float(grid[-1]) == 0 else grid
    low, high = times.sigma_min, times.sigma_max
    # printed tables are rounded, and so are the tables of schedulers
    if float(kept.min()) < low * (1 - 1e-3) or float(kept.max()) > high * (1 + 1e-3):
        raise FanalError(
            f"the sigmas run from {float(kept.max()):.6g} to {float(kept.min()):.6g}, the timesteps' noise levels from "
            f"{high:.6g} to {low:.6g}: choose a grid within them"
        )
    found = times.time_of(kept)
    if not whole:
        return found
    steps = found.round().to(torch.int64)
    same = (steps.diff() == 0).nonzero().flatten().tolist()
    if same:
        i = same[0]
        raise FanalError(
            f"sigmas[{i}] = {float(kept[i]):.6g} and sigmas[{i + 1}] = {float(kept[i + 1]):.6g} are both nearest to "
            f"timestep {int(steps[i])}: use fewer steps, or whole=False"
        )
    return steps
