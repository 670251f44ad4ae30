"""A mixture, its noise, and a teacher's run on it."""

from __future__ import annotations

import pytest
import torch

from fanal.exact import Mixture
from fanal.schedule_search import teach
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Heun


def mixture(seed=0, components=4, d=12):
    """Unequal components with room between them."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, d, dtype=torch.float64, generator=generator)
    means *= 0.5 / means.square().mean().sqrt()
    share = torch.rand(components, dtype=torch.float64, generator=generator) + 0.1
    return Mixture(means, share, std=0.3)


def warm(denoiser, count=8, stream="test"):
    return noise(denoiser.shape, range(count), 80.0, stream=stream, dtype=torch.float64)


@pytest.fixture(scope="module")
def run():
    """A small teacher's run."""
    denoiser = mixture()
    return teach(denoiser, warm(denoiser), polynomial(14, zero=False), Heun())
