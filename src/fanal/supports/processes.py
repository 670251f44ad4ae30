"""Sampling processes under test, by name: exponential integrators with and without noise, and Euler–Maruyama."""

from __future__ import annotations

from collections.abc import Mapping

from fanal.errors import FanalError, unknown_name
from fanal.sampling import Solver

__all__ = ["PROCESSES", "process"]

_EXPONENTIAL = "sde:order={},eta=0,variant=exact,lower_final=never"
PROCESSES: Mapping[str, str] = {
    "ddim": "euler",
    "ddpm": "ddpm",
    "eta0.5": "sde:order=1,eta=0.5",
    "eta2": "sde:order=1,eta=2",
    "exponential2": _EXPONENTIAL.format(2),
    "exponential3": _EXPONENTIAL.format(3),
    "sde2": "sde:order=2,eta=1,variant=exact,lower_final=never",
    "maruyama": "",
}
"""Name → solver, as on the command line. `exponentialK` integrates the polynomial through K predictions exactly, and
`ddim` is the first of them; `etaX` is [REG] eq. 5 with η = X, 0 for DDIM and 1 for DDPM; `maruyama` is
`fanal.particles.EulerMaruyama`, no exponential integrator: those of order 1 move by a share of `D − x` below 1,
whatever the step, this one by `2Δt·(1 + sigma²)/sigma²`, which a long step takes far above 1."""


def process(name: str) -> Solver:
    """Return a process by name, or any solver as written on the command line.

    Raises:
        FanalError: it is neither.
    """
    from fanal.config import NAMED, build_solver

    if name == "maruyama":
        from fanal.particles import EulerMaruyama

        return EulerMaruyama()
    if name in PROCESSES:
        return build_solver(PROCESSES[name])
    if name.partition(":")[0] in NAMED:
        return build_solver(name)
    if name.endswith(".json"):
        raise FanalError(f"a process is one of {', '.join(PROCESSES)}, or a solver such as heun, got {name!r}")
    raise unknown_name("process", name, {*PROCESSES, *NAMED})
