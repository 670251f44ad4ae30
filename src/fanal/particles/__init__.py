"""Particles of the reverse diffusion: its equation, its schemes, its losses, and where its runs end ([PDE] sec. 4)."""

from __future__ import annotations

from fanal.particles.endings import ON as ON
from fanal.particles.endings import Endings as Endings
from fanal.particles.endings import chance_off as chance_off
from fanal.particles.endings import chance_outside as chance_outside
from fanal.particles.endings import gaps as gaps
from fanal.particles.endings import off_bound as off_bound
from fanal.particles.laws import law as law
from fanal.particles.losses import Losses as Losses
from fanal.particles.losses import floor as floor
from fanal.particles.losses import mean_floor as mean_floor
from fanal.particles.losses import posterior_variance as posterior_variance
from fanal.particles.reverse import FORMS as FORMS
from fanal.particles.reverse import Bridge as Bridge
from fanal.particles.reverse import bridge as bridge
from fanal.particles.reverse import brownian_bridge as brownian_bridge
from fanal.particles.reverse import drift as drift
from fanal.particles.reverse import foot as foot
from fanal.particles.reverse import posterior as posterior
from fanal.particles.reverse import sigma_of as sigma_of
from fanal.particles.reverse import time_of as time_of
from fanal.particles.schemes import Affine as Affine
from fanal.particles.schemes import Driven as Driven
from fanal.particles.schemes import EulerMaruyama as EulerMaruyama
from fanal.particles.schemes import Path as Path
from fanal.particles.schemes import affine as affine
from fanal.particles.schemes import bulk as bulk
