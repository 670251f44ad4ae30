"""Schemes in discrete time for the reverse SDE, driven by any noise: Euler–Maruyama beside the exact step ([PDE] 4.3).

`fanal.solvers.DDPM` is the exact-step scheme (eq. 4.21 = 4.22). `Driven` hands a solver the noise that it draws, so
that runs on different grids can follow one Brownian path, and a run can answer to single impulses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError, unknown_name
from fanal.particles.reverse import FORMS, time_of
from fanal.sampling import Solver, Span, Step, finish, sample
from fanal.seeding import noise
from fanal.solvers.stochastic import check_decreasing

__all__ = ["WEIGHTS", "Affine", "Driven", "EulerMaruyama", "Path", "affine", "bulk"]

Draw = Callable[[Span, Tensor], Tensor]
"""Standard normal noise like a state, for a span."""


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler–Maruyama for the reverse SDE, the drift and the noise of a step frozen at its start ([PDE] eq. 4.19).

    `ou`: `z' = z + Δt·drift(z, t) + sqrt(2Δt)·n` for `z = x/sqrt(1 + sigma²)` and the time `t = log(1 + sigma²)/2`;
    `brownian`: `x' = x + (1 − sigma'²/sigma²)·(D − x) + sqrt(sigma² − sigma'²)·n`. The paper prints `sqrt(Δt)` for the
    noise, with which data of variance 1 come back with 0.5.

    Unlike `DDPM`, whose steps are exact where D is constant, a step longer than the time left is unstable.

    Attributes:
        process: "ou" or "brownian".
        denoise: whether the step into sigma = 0 ends at the prediction; the scheme's own step leaves noise there.
    """

    process: str = "ou"
    denoise: bool = True

    def __post_init__(self) -> None:
        if self.process not in ("ou", "brownian"):
            raise unknown_name("process", self.process, ["ou", "brownian"])

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with one call and fresh noise."""
        if span.sigma_next == 0 and self.denoise:
            return finish(denoiser, x, span)
        check_decreasing(span, "Euler–Maruyama")
        denoised, normal = denoiser(x, span.sigma), span.noise(x, "euler-maruyama")
        sigma, below = float(span.sigma), float(span.sigma_next)
        if self.process == "brownian":
            gap = sigma**2 - below**2
            return Step(x + gap / sigma**2 * (denoised - x) + math.sqrt(gap) * normal, denoised)
        time, end = time_of(sigma), time_of(below)
        z = math.exp(-time) * x
        z = z + (time - end) * FORMS["csch"](z, denoised, time) + math.sqrt(2 * (time - end)) * normal
        return Step(math.exp(end) * z, denoised)


@dataclass(frozen=True, slots=True, eq=False)
class _Driven(Span):
    """A span whose noise is given."""

    draw: Draw | None = None

    def noise(self, x: Tensor, stream: str) -> Tensor:
        assert self.draw is not None
        return self.draw(self, x)


@dataclass(frozen=True)
class Driven:
    """A solver whose noise comes from a function of the span, whatever its seeds.

    Attributes:
        solver: what takes the steps; it may draw once per step.
        draw: standard normal noise like the state.
    """

    solver: Solver
    draw: Draw

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` with the given noise."""
        own = {field.name: getattr(span, field.name) for field in fields(Span)}
        return self.solver.step(denoiser, x, _Driven(**own, draw=self.draw), memory)


def bulk(seed: int) -> Draw:
    """Return noise for `Driven` that is drawn for a whole batch at once: fast for many small samples.

    Unlike the noise of `fanal.noise` it depends on the size of the batch.
    """
    return lambda span, x: noise(x.shape, [seed], step=span.i, stream="particles", dtype=x.dtype)[0].to(x.device)


WEIGHTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": np.ones_like,
    "bridge": lambda t: 1 / np.sinh(t),
}
"""Weights w(t) of a path's integrals `∫ w dB`: what Euler–Maruyama sees of it, and what the exact step sees."""


@dataclass(frozen=True, eq=False)
class Path:
    """Brownian paths through fine intervals of time, by the integrals `∫ w(t) dB` over each, exactly jointly normal.

    Attributes:
        times: (M+1,) decreasing.
        integrals: by weight, (M, B, *shape).
        variances: by weight, (M,).
    """

    times: np.ndarray
    integrals: Mapping[str, Tensor]
    variances: Mapping[str, np.ndarray]

    @classmethod
    def draw(
        cls,
        times: Sequence[float] | np.ndarray,
        count: int,
        shape: tuple[int, ...],
        seed: int = 0,
        weights: Mapping[str, Callable[[np.ndarray], np.ndarray]] = WEIGHTS,
    ) -> Path:
        """Draw paths.

        Args:
            times: of the process, decreasing and positive.
            count: B.
            shape: of one sample.
            seed: of the paths.
            weights: functions of time by name.

        Raises:
            FanalError: the times do not decrease, or are not positive.
        """
        t = np.asarray(times, dtype=np.float64)
        if t.ndim != 1 or len(t) < 2 or not (np.diff(t) < 0).all() or not t[-1] > 0:
            raise FanalError("a path runs through two or more decreasing times above 0")
        nodes, shares = np.polynomial.legendre.leggauss(8)
        middle, half = (t[:-1] + t[1:]) / 2, (t[:-1] - t[1:]) / 2
        at = np.stack([weight(middle[:, None] + half[:, None] * nodes) for weight in weights.values()], 1)
        gram = np.einsum("mwk,mvk,k,m->mwv", at, at, shares, half)  # covariance of the integrals, per interval
        values, vectors = np.linalg.eigh(gram)
        root = torch.from_numpy(vectors * np.sqrt(np.maximum(values, 0))[:, None])
        drawn = [
            torch.einsum(
                "wv,bv...->wb...",
                part,
                noise((count, len(weights), *shape), [seed], step=m, stream="path", dtype=torch.float64)[0],
            )
            for m, part in enumerate(root)
        ]
        stacked = torch.stack(drawn, 1)
        return cls(
            t,
            dict(zip(weights, stacked, strict=True)),
            {name: gram[:, k, k] for k, name in enumerate(weights)},
        )

    def normal(self, weight: str, time: float, end: float) -> Tensor:
        """Return the normalized integral between two of the path's times, (B, *shape), standard normal.

        Raises:
            FanalError: one of them is none of the path's.
        """
        first, last = (int(np.argmin(np.abs(self.times - t))) for t in (time, end))
        if not np.allclose(self.times[[first, last]], [time, end], rtol=1e-9, atol=0.0) or first >= last:
            raise FanalError(f"the path has no interval from time {time:.6g} to {end:.6g}")
        part = slice(first, last)
        return self.integrals[weight][part].sum(0) / math.sqrt(self.variances[weight][part].sum())

    def noise(self, weight: str) -> Draw:
        """Return the path as noise for `Driven`, seen through a weight."""
        return lambda span, x: self.normal(weight, time_of(span.sigma), time_of(span.sigma_next)).to(x)


@dataclass(frozen=True, eq=False)
class Affine:
    """What a scheme does to one-dimensional Gaussian data, exactly: `x_N = offset + keep·x_0 + Σ gains_i·n_i`.

    Attributes:
        offset: where 0 goes without noise.
        keep: factor of the start.
        gains: (N,), factor of each step's noise.
    """

    offset: float
    keep: float
    gains: Tensor

    def std(self, start: float = 0.0) -> float:
        """Return the standard deviation at the end, given that at the start."""
        return math.sqrt((self.keep * start) ** 2 + float(self.gains.square().sum()))


def affine(solver: Solver, denoiser: Denoiser, sigmas: Tensor) -> Affine:
    """Return the law of a run whose denoiser is affine in x, from one run of impulses; no randomness.

    Args:
        solver: draws noise at most once per step.
        denoiser: of samples of shape (1,), affine in x.
        sigmas: (N+1,).
    """
    n = len(sigmas) - 1
    start = torch.zeros(n + 2, 1, dtype=torch.float64)
    start[1] = 1.0

    def impulse(span: Span, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[span.i + 2] = 1.0
        return out

    end = sample(denoiser, start, sigmas, Driven(solver, impulse))[:, 0]
    return Affine(float(end[0]), float(end[1] - end[0]), end[2:] - end[0])
