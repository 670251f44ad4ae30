"""Problems whose answers are known, and how fast each solver should come near them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.integrate import solve_ivp

from fanal.exact import Gaussian, Mixture
from fanal.sampling import trace
from fanal.seeding import noise
from fanal.solvers import SOLVERS


@dataclass(frozen=True)
class Expected:
    """What a solver promises.

    Attributes:
        order: slope of log error against log step; of the marginal variance where `weak`.
        calls: network calls per interval that ends above 0 (with the solver's defaults).
        last: network calls of an interval that ends at 0.
        first: calls of the first intervals, where they differ.
        options: how to turn its noise off, or which variant the order is for.
        encodes: whether it also runs up in sigma.
        weak: it always draws noise, so that only its law converges.
        scales: the data's scale times c gives the samples times c, on the grid times c.
        asks: the network is asked at the start of each interval; without that its first answer is no prediction.
        refined: numbers of steps that show the order.
    """

    order: float
    calls: int
    last: int = 1
    first: tuple[int, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    encodes: bool = True
    weak: bool = False
    scales: bool = True
    asks: bool = True
    refined: tuple[int, ...] = (48, 96, 192)

    def cost(self, intervals: int, zero: bool) -> int:
        """Network calls over a grid."""
        costs = [*self.first, *[self.calls] * intervals][:intervals]
        return sum(costs[:-1]) + self.last if zero else sum(costs)


EXPECTED = {
    "euler": Expected(order=1, calls=1),
    "heun": Expected(order=2, calls=2),
    "dpm2": Expected(order=2, calls=2),
    "rk4": Expected(order=4, calls=4),
    "taylor2": Expected(order=2, calls=2, refined=(16, 32, 64)),
    "dpms": Expected(order=3, calls=3),
    "dpmpp2s": Expected(order=2, calls=2),
    "dpmpp": Expected(order=2, calls=1),
    "unipc": Expected(order=3, calls=1, options={"lower_final": "never"}),
    "res": Expected(order=2, calls=1),
    "spndm": Expected(order=2, calls=1, first=(2,)),
    "pndm": Expected(order=2, calls=1, first=(4, 4, 4)),
    "ipndm": Expected(order=2, calls=1),
    "lms": Expected(order=2, calls=1, options={"order": 2}),
    "deis": Expected(order=2, calls=1, options={"order": 2}, scales=False),
    "ddpm": Expected(order=1, calls=1, encodes=False, weak=True),
    "ancestral": Expected(order=1, calls=1, options={"eta": 0.0}, encodes=False),
    "churn": Expected(order=2, calls=2, options={"s_churn": 0.0}, encodes=False),
    "sde": Expected(order=2, calls=1, options={"eta": 0.0}, encodes=False),
    "dpmpp_sde": Expected(order=2, calls=2, options={"eta": 0.0}, encodes=False),
    "afs": Expected(order=1, calls=1, first=(0,), encodes=False, scales=False, asks=False),
}


def expected(name: str) -> Expected:
    """What the solver of this name promises; a solver without an entry is a failure, not a skip."""
    assert name in EXPECTED, f"solver {name!r} is in SOLVERS but has no entry in problems.EXPECTED: add its order"
    return EXPECTED[name]


def quiet(name: str):
    """The solver of this name with its noise turned off."""
    return SOLVERS[name](**expected(name).options)


DETERMINISTIC = [name for name in SOLVERS if name not in EXPECTED or not EXPECTED[name].weak]
ASKING = [name for name in DETERMINISTIC if name not in EXPECTED or EXPECTED[name].asks]
ENCODERS = [name for name in DETERMINISTIC if name not in EXPECTED or EXPECTED[name].encodes]


def gaussian() -> Gaussian:
    """Three-dimensional data with a full covariance and a mean away from 0."""
    root = torch.tensor([[1.0, 0.3, -0.2], [0.0, 0.6, 0.4], [0.0, 0.0, 0.25]], dtype=torch.float64)
    return Gaussian(torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64), root @ root.T)


def mixture() -> Mixture:
    """Four unequal components in the plane."""
    means = torch.tensor([[1.0, 0.2], [-0.8, 0.9], [-0.3, -1.1], [0.6, -0.7]], dtype=torch.float64)
    return Mixture(means, [0.4, 0.3, 0.2, 0.1], std=torch.tensor([0.4, 0.5, 0.35, 0.6]))


def scattered(dim: int = 48, seed: int = 0) -> Mixture:
    """Six components of std 0.3 with random weights and means of RMS entry 0.5: what the peers were compared on."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(6, dim, generator=generator, dtype=torch.float64)
    weights = torch.rand(6, generator=generator, dtype=torch.float64) + 0.05
    return Mixture(means / (means**2).mean().sqrt() / 2, weights, std=0.3)


def start(denoiser, count: int = 4, sigma: float = 10.0, dtype=torch.float64):
    """A batch of pure noise at sigma."""
    return noise(denoiser.shape, range(count), sigma, dtype=dtype)


def run(denoiser, x, sigmas, solver, seeds=None):
    """The last state of a trace, in the caller's gradient mode."""
    for transition in trace(denoiser, x, sigmas, solver, seeds):
        x = transition.step.x_next
    return x


def reference(denoiser, x, sigma: float, sigma_next: float):
    """The end of the trajectory by scipy's DOP853 in log sigma, with tolerances far below any solver's error."""

    def slope(log_sigma: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).reshape(x.shape)
        level = torch.tensor(math.exp(log_sigma), dtype=torch.float64)
        return (state - denoiser(state, level)).flatten().numpy()  # dx/dlog sigma = x − D

    out = solve_ivp(
        slope,
        (math.log(sigma), math.log(sigma_next)),
        x.flatten().numpy(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
    )
    assert out.success
    return torch.from_numpy(out.y[:, -1]).reshape(x.shape)


def observed_order(steps: list[int], errors: list[float]) -> float:
    """Slope of log error against log step size."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
