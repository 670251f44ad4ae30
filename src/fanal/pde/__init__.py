"""Forward and reverse diffusion as equations of densities ([PDE]): solved by finite volumes that keep mass and sign."""

from __future__ import annotations

from fanal.pde.distances import equal_parts as equal_parts
from fanal.pde.distances import kl as kl
from fanal.pde.distances import tv as tv
from fanal.pde.distances import w2 as w2
from fanal.pde.distances import wasserstein as wasserstein
from fanal.pde.equations import brownian as brownian
from fanal.pde.equations import ornstein_uhlenbeck as ornstein_uhlenbeck
from fanal.pde.equations import radial as radial
from fanal.pde.equations import radial_score as radial_score
from fanal.pde.equations import reverse as reverse
from fanal.pde.equations import reverse_ode as reverse_ode
from fanal.pde.equations import score_of_denoiser as score_of_denoiser
from fanal.pde.equations import score_of_densities as score_of_densities
from fanal.pde.fokker_planck import SCHEMES as SCHEMES
from fanal.pde.fokker_planck import evolve as evolve
from fanal.pde.fokker_planck import generator as generator
from fanal.pde.grid import Grid as Grid
from fanal.pde.laws import LAWS as LAWS
from fanal.pde.laws import Law as Law
from fanal.pde.laws import law as law
from fanal.pde.walls import Walled as Walled
