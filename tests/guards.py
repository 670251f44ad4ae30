"""What guards of RODS are tested on, and their perturbation by its definition."""

from __future__ import annotations

import torch

from fanal import schedules
from fanal.exact import Mixture
from fanal.hallucination.perturbation import differentiate
from fanal.seeding import noise
from problems import mixture

F64 = torch.float64
GRID = schedules.polynomial(8, sigma_min=0.05, sigma_max=10.0)
INSIDE = {"window": (2, 5)}


def level(sigma):
    return torch.tensor(sigma, dtype=F64)


def high():
    """A mixture in 48 dimensions, its means about as far apart as the noise levels below."""
    means = noise((48,), range(3), 0.1, dtype=F64)
    return Mixture(means, [0.5, 0.3, 0.2], std=torch.tensor([0.2, 0.3, 0.25]))


MIXTURES = {2: mixture, 48: high}


def points(D, sigma, count=5):
    return D.draw(count, seed=3) + noise(D.shape, range(count), sigma, dtype=F64)


# --- the guard is the formula -------------------------------------------------------------------------------------


def plan(D, x, sigma, method, r):
    """δ by its definition."""
    gradient = differentiate(D, x, sigma).gradient
    away = {"cas": gradient, "reversed": -gradient, "sas": x - D(x, sigma)}[method]
    return r * away / away.norm(dim=1, keepdim=True)
