"""Solvers: frozen objects whose pure `step` crosses one interval of sigma."""

from __future__ import annotations

from fanal.sampling import Solver as Solver
from fanal.solvers.onestep import Euler as Euler
from fanal.solvers.onestep import Heun as Heun
from fanal.solvers.stochastic import DDPM as DDPM
from fanal.solvers.stochastic import Ancestral as Ancestral
from fanal.solvers.stochastic import Churn as Churn

SOLVERS: dict[str, type] = {
    "euler": Euler,
    "heun": Heun,
    "ddpm": DDPM,
    "ancestral": Ancestral,
    "churn": Churn,
}
"""Name → class, for the command line and for parametrized tests."""
