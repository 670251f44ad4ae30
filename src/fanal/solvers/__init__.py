"""Solvers: frozen objects whose pure `step` crosses one interval of sigma."""

from __future__ import annotations

from fanal.sampling import Solver as Solver
from fanal.solvers.analytic import AFS as AFS
from fanal.solvers.analytic import AnalyticAbove as AnalyticAbove
from fanal.solvers.multistep import DEIS as DEIS
from fanal.solvers.multistep import IPNDM as IPNDM
from fanal.solvers.multistep import LMS as LMS
from fanal.solvers.multistep import DPMpp as DPMpp
from fanal.solvers.onestep import RK4 as RK4
from fanal.solvers.onestep import Euler as Euler
from fanal.solvers.onestep import Heun as Heun
from fanal.solvers.predictor import UniPC as UniPC
from fanal.solvers.pseudo import PNDM as PNDM
from fanal.solvers.pseudo import SPNDM as SPNDM
from fanal.solvers.sde import SDE as SDE
from fanal.solvers.sde import DPMppSDE as DPMppSDE
from fanal.solvers.singlestep import DPM2 as DPM2
from fanal.solvers.singlestep import DPMS as DPMS
from fanal.solvers.singlestep import RES as RES
from fanal.solvers.singlestep import DPMpp2S as DPMpp2S
from fanal.solvers.stochastic import DDPM as DDPM
from fanal.solvers.stochastic import Ancestral as Ancestral
from fanal.solvers.stochastic import Churn as Churn
from fanal.solvers.taylor import Taylor2 as Taylor2
from fanal.solvers.taylor import generalized as generalized
from fanal.solvers.taylor import implied as implied
from fanal.solvers.taylor import total_derivative as total_derivative

SOLVERS: dict[str, type] = {
    "euler": Euler,
    "heun": Heun,
    "dpm2": DPM2,
    "rk4": RK4,
    "taylor2": Taylor2,
    "dpms": DPMS,
    "dpmpp2s": DPMpp2S,
    "dpmpp": DPMpp,
    "unipc": UniPC,
    "res": RES,
    "spndm": SPNDM,
    "pndm": PNDM,
    "ipndm": IPNDM,
    "lms": LMS,
    "deis": DEIS,
    "ddpm": DDPM,
    "ancestral": Ancestral,
    "churn": Churn,
    "sde": SDE,
    "dpmpp_sde": DPMppSDE,
    "afs": AFS,
}
"""Name → class, for the command line and for parametrized tests."""
