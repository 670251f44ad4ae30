"""Schedules: strictly monotone float64 grids of sigma, the only thing that says where a run goes.

Every maker returns a decreasing CPU tensor. `steps` counts intervals. With `zero=True` the grid has `steps` positive
values and ends at 0 (Karras' form); with `zero=False` it has `steps + 1` values and ends at `sigma_min`
([REG] sec. C.3).
"""

from __future__ import annotations

from fanal.schedules.discrete import from_timesteps as from_timesteps
from fanal.schedules.discrete import stable_diffusion_alphas as stable_diffusion_alphas
from fanal.schedules.discrete import to_timesteps as to_timesteps
from fanal.schedules.files import from_file as from_file
from fanal.schedules.grids import SCHEDULES as SCHEDULES
from fanal.schedules.grids import check_sigmas as check_sigmas
from fanal.schedules.grids import cosine as cosine
from fanal.schedules.grids import jump as jump
from fanal.schedules.grids import logsnr as logsnr
from fanal.schedules.grids import plain_sigmas as plain_sigmas
from fanal.schedules.grids import polynomial as polynomial
from fanal.schedules.grids import quadratic as quadratic
from fanal.schedules.grids import uniform as uniform
from fanal.schedules.grids import vp_rates as vp_rates
from fanal.schedules.published import SOURCES as SOURCES
from fanal.schedules.published import TIMESTEPS as TIMESTEPS
from fanal.schedules.published import resample as resample
from fanal.schedules.published import table as table
from fanal.schedules.published import tables as tables
