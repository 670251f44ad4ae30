"""What the findings page tells of closed forms beside its runs: shells, mean shift, and processes' own samplers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from findings_told import rows
from torch import Tensor

import fanal
from fanal.datasets import get
from fanal.denoiser import Denoiser
from fanal.exact import Dataset, Gaussian
from fanal.exact.named import closed_form
from fanal.exact.reference import first_points
from fanal.geometry import AnnealedMeanShift, expected_residual, measure
from fanal.metrics.estimates import Estimate, mean, rate
from fanal.sampling import Solver, Span, Step, trace
from fanal.schedules import polynomial
from fanal.sde import LinearProcess
from fanal.sde.named import flow, vp
from fanal.seeding import noise
from fanal.solvers import Euler, Heun
from fanal.trajectory import Trajectory

COUNT, POINTS = 128, 2000
STARTS, MOVES, _STILL = 64, 300, 1e-6  # of mean shift: the last, per entry, is no move
SETS = ("grid2", "digits8", "hands32")
GROWTH = (1.0, 0.3, 0.1, 0.03, 0.01)
BANDWIDTHS = {"grid2": (3.0, 1.0, 0.3), "digits8": (3.0, 1.0, 0.3), "hands32": (5.0, 2.0, 1.0)}
STEPS = (10, 20, 50, 100)
_ROUNDING = 1e-9  # nats per dimension
_FINE = 1000
_NONE = 1e-12  # of the largest eigenvalue


def exact_set(name: str) -> Dataset:
    """The exact denoiser of the first training points, as the runs have it."""
    return Dataset(first_points(get(name), "train", POINTS)[0])


def _points(data: Dataset, count: int | None = None) -> Tensor:
    """Its first points, flat."""
    return data.points.block(slice(count), torch.float64)


def residual_of(name: str, sigmas: Tensor) -> tuple[Tensor, ...]:
    """Root of the expected squared residual of [REG] prop. 4 from `x_T = sigma_T·n`, per √d, at each level.

    Whole, as the proposition has it, and less what of it lies along the chord, which is no distance from it.
    """
    gaussian = closed_form("gaussian", name)
    assert isinstance(gaussian, Gaussian)
    values = gaussian.cov.values
    count, size = int((values > _NONE * values.max()).sum()), math.sqrt(float(values.max()))
    print(f"\ngaussian:{name}: {count} of {len(values)} eigenvalues are not 0, largest standard deviation {size:.2f}")
    found = expected_residual(gaussian, sigmas, float(sigmas[0]))
    return tuple(each / math.sqrt(len(gaussian.mean)) for each in found)


def growth() -> None:
    """Share of points whose magnitude noise makes larger ([GEO] prop. 2)."""
    body = []
    for name in SETS:
        points = _points(exact_set(name))
        white = noise(points.shape[1:], range(len(points)), stream="growth", dtype=torch.float64)
        shares = [rate((points + s * white).norm(dim=1) > points.norm(dim=1)) for s in GROWTH]
        body.append([name, str(points.shape[1]), *(each.percent() for each in shares)])
    rows("magnitude grows", ["data", "d", *(f"{s:g}" for s in GROWTH)], body)


def _distinct(data: Dataset, ends: Tensor) -> int:
    """Different ends: those that lie within a hundredth per √d of an earlier one are the same."""
    kept: list[Tensor] = []
    for end in ends.flatten(1).double():
        if all(float((end - other).norm()) > 0.01 * math.sqrt(len(end)) for other in kept):
            kept.append(end)
    return len(kept)


def shifts() -> None:
    """Mean shift from the data's own noisy points: likelihood at each move, and how many ends there are."""
    body = []
    for name in SETS:
        data = exact_set(name)
        clean = _points(data, STARTS).reshape(-1, *data.shape)
        for h in BANDWIDTHS[name]:
            x, level = clean + h * noise(data.shape, range(len(clean)), stream="shift", dtype=torch.float64), h
            moved, likelihood = torch.inf, []
            while len(likelihood) <= MOVES and moved > _STILL:
                found = data.posterior(x, level)
                likelihood.append(found.log_density)
                moved = float((found.denoised - x).flatten(1).square().mean(1).sqrt().max())
                x = found.denoised
            hits = torch.stack(likelihood).diff(dim=0) >= -_ROUNDING * data.points.dim
            ends = f"{_distinct(data, x)} of {len(x)}" if moved <= _STILL else f"still moving after {MOVES}"
            body.append([name, f"{h:g}", f"{int(hits.sum())} of {hits.numel()}", str(len(hits)), ends])
    rows("mean shift", ["data", "bandwidth", "moves up", "moves", "different ends"], body)


def annealed() -> None:
    """Where annealed mean shift goes from noise, beside the Euler run of the same denoiser."""
    body = []
    for name in SETS:
        data = exact_set(name)
        x, sigmas = noise(data.shape, range(COUNT), sigma=80.0, stream="shift", dtype=torch.float64), polynomial(100)
        euler, whole = (fanal.sample(data, x, sigmas, solver) for solver in (Euler(), AnnealedMeanShift()))
        near = [data.nearest(end)[1][:, 0] for end in (euler, whole)]
        spread = (euler - whole).flatten(1).norm(dim=1) / math.sqrt(data.points.dim)
        counts = [f"{_distinct(data, end)} of {COUNT}" for end in (euler, whole)]
        body.append([name, *counts, rate(near[0] == near[1]).percent(), mean(spread).plain(3)])
    rows("annealed", ["data", "Euler's ends", "annealed mean shift's", "the same point", "apart / √d"], body)


@dataclass(frozen=True)
class Direct:
    """Euler's method in a process's own space and time: the direct form ([REG] eq. 28), drift and all."""

    process: LinearProcess

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span` by one step of the time between its levels."""
        process, denoised = self.process, denoiser(x, span.sigma)
        t, end = process.t_of_sigma(span.sigma), process.t_of_sigma(span.sigma_next)
        z, s, level = process.from_x(x, t), process.s(t).to(x), span.sigma.to(x)
        score = (s * denoised - z) / (s * level) ** 2
        speed = process.f(t).to(x) * z - process.g(t).to(x) ** 2 / 2 * score
        return Step(process.to_x(z + (end - t).to(x) * speed, end), denoised)


@dataclass(frozen=True)
class SemiLinear:
    """Euler's method for the semi-linear form in a process's own space ([REG] eq. 29)."""

    process: LinearProcess

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross `span`: the drift exactly, the score as it is at its start."""
        process, denoised = self.process, denoiser(x, span.sigma)
        t, end = process.t_of_sigma(span.sigma), process.t_of_sigma(span.sigma_next)
        z, s, s_end, level = process.from_x(x, t), process.s(t).to(x), process.s(end).to(x), span.sigma.to(x)
        score = (s * denoised - z) / (s * level) ** 2
        gain = s_end * s * level * (span.sigma_next - span.sigma).to(x)
        return Step(process.to_x(s_end / s * z - gain * score, end), denoised)


PROCESSES = {"variance-preserving": vp(), "flow matching": flow()}


def process_grid(process: LinearProcess, steps: int) -> Tensor:
    """Levels at equal steps of a process's time, from 80 to 0.002."""
    ends = process.t_of_sigma(torch.tensor([80.0, 0.002], dtype=torch.float64))
    t = torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64)
    return process.sigma(t)


def _run(model: Denoiser, start: Tensor, sigmas: Tensor, solver: Solver) -> Trajectory:
    return Trajectory.record(trace(model, start, sigmas, solver))


def processes(specs: Sequence[str]) -> None:
    """Ends of Euler runs in processes' own spaces and times, and in x-space on the same levels."""
    body = []
    for spec in specs:
        model = fanal.load(spec)
        dtype = torch.float64 if ":" in spec else torch.float32
        start = noise(model.shape, range(32), sigma=80.0, stream="processes", dtype=dtype)
        truth = fanal.sample(model, start, polynomial(_FINE if ":" in spec else 200, zero=False), Heun())

        def off(a: Tensor, b: Tensor) -> Estimate:
            return mean((a - b).flatten(1).double().norm(dim=1) / math.sqrt(a[0].numel()))

        for name, process in PROCESSES.items():
            for steps in STEPS:
                sigmas = process_grid(process, steps)
                solvers = (Direct(process), SemiLinear(process), Euler())
                direct, linear, plain = (fanal.sample(model, start, sigmas, solver) for solver in solvers)
                pairs = ((direct, plain), (linear, plain), (direct, truth), (plain, truth))
                found = [off(a, b) for a, b in pairs]
                body.append([spec, name, str(steps), *(each.rounded() for each in found)])
    head = ["model", "process", "steps", "28 in z − x", "29 in z − x", "error of 28 in z", "error in x"]
    rows("processes: ends apart per √d", head, body)


OWN = {
    "deviation / chord": ("largest deviation / chord", 4),
    "predictions' deviation / chord": ("denoised largest deviation / chord", 3),
    "steps nearer to the end": ("steps nearer to the end", 3),
    "states near from sigma": ("states near the end from sigma", 3),
    "predictions near from sigma": ("predictions near the end from sigma", 3),
    "explained by 1": ("explained by 1", 3),
    "explained by 2": ("explained by 2", 3),
    "z, deviation / chord": ("z largest deviation / chord", 3),
}


def own_samplers(specs: Sequence[str], steps: int = 100) -> None:
    """Geometry of a VP model's own sampler (Euler in z, equal steps of time) and of Euler in x on the same levels."""
    body, process = [], vp()
    for spec in specs:
        model = fanal.load(spec)
        dtype = torch.float64 if ":" in spec else torch.float32
        start = noise(model.shape, range(COUNT), sigma=80.0, stream="processes", dtype=dtype)
        for name, solver in (("z, time", Direct(process)), ("x, the same levels", Euler())):
            found = measure(_run(model, start, process_grid(process, steps), solver)).numbers
            body.append([spec, name, *(mean(found[key]).plain(digits) for key, digits in OWN.values())])
    rows("a VP model's own sampler", ["model", "Euler in", *OWN], body)
