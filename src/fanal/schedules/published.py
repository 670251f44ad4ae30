"""Grids that others searched and printed, as named data, and resampling to another number of steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fanal.errors import FanalError, unknown_name
from fanal.schedules.discrete import from_timesteps, stable_diffusion_alphas
from fanal.schedules.grids import Grid, check_sigmas

__all__ = ["SOURCES", "TIMESTEPS", "resample", "table", "tables"]

TIMESTEPS: dict[str, tuple[int, ...]] = {
    "ays-sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "ays-sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
    "gits-sd15": (999, 783, 632, 483, 350, 233, 133, 67, 33, 17),
}
"""Ten steps in Stable Diffusion's timesteps, by name; the step after the last ends the run."""

SOURCES: dict[str, str] = {
    "ays-sd15": "Sabour, Fidler & Kreis 2024, arXiv:2404.14507, Align Your Steps; for Stable Diffusion 1.5",
    "ays-sdxl": "Sabour, Fidler & Kreis 2024, arXiv:2404.14507, Align Your Steps; for Stable Diffusion XL",
    "ays-svd": "Sabour, Fidler & Kreis 2024, arXiv:2404.14507, Align Your Steps; for Stable Video Diffusion",
    "gits-cifar10": "[REG] table 9: GITS with iPNDM on CIFAR-10, coefficient 1.15; printed to 4 decimals",
    "gits-sd15": "[REG] sec. C.3, fig. 11: GITS with DPM-Solver++(2M) on Stable Diffusion 1.5, as timesteps",
}
"""Where each table was printed."""

tables: dict[str, dict[int, tuple[float, ...]]] = {
    "ays-sd15": {10: (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0)},
    "ays-sdxl": {10: (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0)},
    "ays-svd": {10: (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.0)},
    "gits-cifar10": {
        3: (80.0, 3.8811, 0.9654, 0.002),
        4: (80.0, 5.8389, 1.8543, 0.47, 0.002),
        5: (80.0, 6.6563, 2.1632, 0.8119, 0.2107, 0.002),
        6: (80.0, 10.9836, 3.8811, 1.584, 0.5666, 0.1698, 0.002),
        7: (80.0, 12.3816, 3.8811, 1.584, 0.5666, 0.1698, 0.0395, 0.002),
        8: (80.0, 10.9836, 3.8811, 1.8543, 0.9654, 0.47, 0.2107, 0.0665, 0.002),
        9: (80.0, 12.3816, 4.459, 2.1632, 1.1431, 0.5666, 0.2597, 0.1079, 0.03, 0.002),
        10: (80.0, 12.3816, 4.459, 2.1632, 1.1431, 0.5666, 0.3183, 0.1698, 0.0665, 0.0225, 0.002),
    },
    "gits-sd15": {10: tuple(from_timesteps(TIMESTEPS["gits-sd15"], stable_diffusion_alphas()).tolist())},
}
"""Name → number of steps → sigmas, each as its source has it: AYS and Stable Diffusion's end at 0, CIFAR-10's above."""

_ENDS = {"ays-sd15": 0.02917, "ays-sdxl": 0.02917, "gits-sd15": 0.02917, "ays-svd": 0.002}
# The model's smallest noise level: the node that the final 0 stands for when a table is resampled.


def resample(sigmas: Tensor | Sequence[float], steps: int, end: float | None = None) -> Grid:
    """Return a grid with another number of steps, by interpolation of log sigma over the nodes, as AYS does.

    Args:
        sigmas: decreasing; a final 0 has no logarithm and is kept as it is.
        steps: number of intervals of the result.
        end: what stands in the final 0's place while interpolating, such as the model's smallest noise level; None: the
            positive nodes alone are resampled, and 0 follows them.

    Raises:
        FanalError: sigmas is no decreasing grid from a finite sigma, steps is no whole number, or there are too few.
    """
    grid = check_sigmas(sigmas)
    zero = float(grid[-1]) == 0
    if not float(grid[1]) < float(grid[0]) < float("inf"):
        raise FanalError("resample needs a decreasing grid that begins at a finite sigma")
    if end is not None and not (zero and 0 < end < float(grid[-2])):
        raise FanalError(f"end takes the place of a final 0 and lies below the last positive sigma, got {end}")
    least = 2 if zero and end is None else 1
    if isinstance(steps, bool) or int(steps) != steps or steps < least:
        raise FanalError(f"steps must be a whole number >= {least}, got {steps}")
    positive = grid[:-1].tolist() if zero else grid.tolist()
    nodes = [*positive, end] if end is not None else positive
    count = int(steps) + 1 if end is not None or not zero else int(steps)
    levels = np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(nodes)), np.log(nodes))
    out = torch.from_numpy(np.exp(levels))
    out[0], out[-1] = nodes[0], nodes[-1]
    if zero:
        kept = out[:-1] if end is not None else out
        out = torch.cat([kept, out.new_zeros(1)])
    return check_sigmas(out)


def table(name: str, steps: int) -> Grid:
    """Return a published grid; a number of steps that was not published comes from the nearest one, resampled.

    The ends are the source's: the noise levels of the model it was searched for.

    Args:
        name: a key of `tables`.
        steps: number of intervals.

    Raises:
        FanalError: the name is unknown, or steps is no whole number >= 1.
    """
    if name not in tables:
        raise unknown_name("table", name, tables)
    known = tables[name]
    if steps in known:
        return check_sigmas(known[steps])
    nearest = min(known, key=lambda count: abs(count - steps))
    return resample(known[nearest], steps, _ENDS.get(name))
