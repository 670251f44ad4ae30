"""Methods: whole ways to sample, side by side, each a function of (denoiser, noise, seeds, budget).

build = METHODS["renoise"]
method = build(Settings(sigmas, Variance(window), threshold))
x0 = method(denoiser, fanal.noise(shape, seeds, 80.0), seeds, budget=60)

`budget` is the average number of network evaluations that a sample may cost; whoever compares methods counts them at
the network (`fanal.Counted`). Those that repair what a first pass left behind are also `Mending`: they take a first
pass that is already there, so that many of them can share one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Counted, Denoiser, Temperature, counters, evaluations
from fanal.errors import FanalError
from fanal.hallucination import hints
from fanal.hallucination.detectors import Detector
from fanal.hallucination.ladder import Ladder
from fanal.hallucination.localized import Localized
from fanal.hallucination.probe import LinearProbe, shipped
from fanal.hallucination.repair import Fresh, Outcome, Redo, Renoise, Repair, watch
from fanal.hallucination.rods import Guard
from fanal.sampling import Solver, sample, trace
from fanal.schedules import check_sigmas, jump, polynomial
from fanal.seeding import noise
from fanal.solvers.onestep import Euler, Heun
from fanal.solvers.stochastic import Churn

__all__ = [
    "HINTS",
    "METHODS",
    "Best",
    "Climbed",
    "Fixed",
    "Gated",
    "Mending",
    "Method",
    "Restart",
    "Settings",
    "ladder_of",
]


@runtime_checkable
class Method(Protocol):
    """A way to sample: anything that can be called like this, a plain function for one."""

    def __call__(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int) -> Tensor:
        """Return the samples (B, *shape) that this noise leads to.

        Args:
            denoiser: D(x, sigma).
            x: (B, *shape), the noise at the largest sigma, scaled by it.
            seeds: one per sample; all further noise is a function of them.
            budget: network evaluations that a sample may cost on average.
        """
        ...


@runtime_checkable
class Mending(Method, Protocol):
    """A method that begins with the plain run and works on what became of it."""

    @property
    def detector(self) -> Detector:
        """What must watch the first pass."""
        ...

    def mend(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int, first: Outcome) -> Outcome:
        """Return what becomes of a first pass; its evaluations are those of the first pass and its own."""
        ...


@dataclass(frozen=True, eq=False)
class Settings:
    """What the built-in methods need to know about a model: its grid, its calibration, and strengths.

    The defaults suit images in [−1, 1]; `HINTS` has what other data sets ask for.

    Attributes:
        sigmas: the grid of the plain run.
        detector: a free detector.
        threshold: risk above which a sample is flagged.
        window: closed range of sigma in which samples are decided; guards and the lower temperature act there.
        rho: radius of the guards, as a share of the noise's norm sigma·√d.
        hold: steps that a perturbation of CAS is kept for, where it is held.
        kappa: strength of the temperature that all samples get.
        redo: strength of the temperature that flagged samples get.
        renoise: sigma that flagged samples return to.
        rounds: how often they do, at most; half as often where only a region does, which helps fewer out of the loop.
        restart: (low, high), the interval of sigma that restarts go through again.
        stop: sigma at which an early stop takes the denoised prediction.
        s_churn: amount of churn.
        ladder: its rungs, and the shares that its judge flags and accepts.
        probe: what judges samples on the ladder; None: the linear probe that comes with fanal for this very network,
            or where there is none `detector`, with `threshold`.
    """

    sigmas: Float[Tensor, " n"]
    detector: Detector
    threshold: float
    window: tuple[float, float] = (0.8, 25.0)
    rho: float = 3 / 32
    hold: int = 4
    kappa: float = 3 / 32
    redo: float = 6 / 32
    renoise: float = 4.0
    rounds: int = 4
    restart: tuple[float, float] = (0.8, 8.1)
    stop: float = 0.5
    s_churn: float = 40.0
    ladder: Ladder = Ladder()
    probe: LinearProbe | None = None


def ladder_of(data: str) -> Ladder:
    """Return the ladder that a data set asks for."""
    return Ladder(**hints.tuples(hints.HINTS[data]["repair"]["ladder"]))


HINTS: dict[str, dict[str, Any]] = {
    "grid2": {
        "window": (0.1, 4.0),
        "rho": 0.2,
        "hold": 3,
        "kappa": 0.1,
        "redo": 0.1,
        "renoise": 1.5,
        "restart": (0.1, 1.5),
        "stop": 0.05,
        "ladder": ladder_of("grid2"),
    },
    "shapes32": {
        "window": (0.2, 12.0),
        "hold": 8,
        "renoise": 2.3,
        "restart": (0.25, 3.6),
        "ladder": ladder_of("shapes32"),
    },
    "hands32": {"ladder": ladder_of("hands32")},
}
"""Fields of `Settings` that a data set asks for; chosen on tuning seeds."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """One run over one grid, at a price that is known beforehand.

    Attributes:
        sigmas: the grid.
        solver: how an interval is crossed.
        kappa: strength of the temperature.
        window: closed range of sigma in which it acts.
    """

    sigmas: Float[Tensor, " n"]
    solver: Solver
    kappa: float = 0.0
    window: tuple[float, float] = (0.0, float("inf"))

    def __call__(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int) -> Tensor:
        """Sample; the price is the same whatever the budget."""
        cool = Temperature(denoiser, self.kappa, self.window) if self.kappa else denoiser
        return sample(cool, x, self.sigmas, self.solver, seeds)


@dataclass(frozen=True, eq=False)
class Gated:
    """A plain run that a free detector watches, then a repair of the samples above the threshold.

    The threshold is calibrated, so a batch may cost more or less than the average.

    Attributes:
        sigmas: the grid.
        detector: what watches.
        threshold: risk above which a sample is flagged.
        repair: what is done with those.
        solver: how an interval is crossed.
    """

    sigmas: Float[Tensor, " n"]
    detector: Detector
    threshold: float
    repair: Repair
    solver: Solver

    def __call__(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int) -> Tensor:
        """Sample, flag, repair."""
        first = watch(denoiser, x, self.sigmas, self.solver, self.detector, seeds)
        return self.mend(denoiser, x, seeds, budget, first).x

    def mend(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int, first: Outcome) -> Outcome:
        """Repair what a first pass flagged."""
        return self.repair.repair(denoiser, x, self.sigmas, self.solver, self.detector, seeds, first, self.threshold)


@dataclass(frozen=True, eq=False)
class Climbed:
    """A plain run, a judge of finished samples, and the ladder for those that it flags: counts cured, contents kept.

    The judge is a linear probe of the network (`fanal.hallucination.probe`); without one the free detector judges.

    Attributes:
        sigmas: the grid.
        detector: what watches the first pass.
        threshold: its risk above which a sample is flagged, where it is the judge.
        ladder: what is done with flagged samples.
        probe: the judge; None: the one that comes with fanal for this network.
        solver: how an interval is crossed.
    """

    sigmas: Float[Tensor, " n"]
    detector: Detector
    threshold: float
    ladder: Ladder
    probe: LinearProbe | None
    solver: Solver

    def __call__(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int) -> Tensor:
        """Sample, judge, and climb where it is needed."""
        first = watch(denoiser, x, self.sigmas, self.solver, self.detector, seeds)
        return self.mend(denoiser, x, seeds, budget, first).x

    def mend(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int, first: Outcome) -> Outcome:
        """Judge a first pass and send what is flagged up the ladder, as far as the budget goes."""
        net = denoiser if counters(denoiser) else Counted(denoiser)
        probe = self.probe.of(net) if self.probe else shipped(net)
        if probe is None:
            return self.ladder.repair(net, x, self.sigmas, self.solver, self.detector, seeds, first, self.threshold)
        before = evaluations(net)
        risk = probe.judge(net, first.x)
        spent = first.evaluations + (evaluations(net) - before) / len(x)
        ladder = self.ladder.within(budget - float(spent.mean()), len(probe.sigmas))
        judged = dataclasses.replace(first, risk=risk, evaluations=spent)
        limit = probe.threshold(ladder.flag)
        return ladder.repair(net, x, self.sigmas, self.solver, probe, seeds, judged, limit)


def _cross(denoiser: Denoiser, x: Tensor, grid: Tensor, solver: Solver, seeds: Sequence[int], round: int) -> Tensor:
    """Cross one segment; its round keys the noise of its steps, whose indices start anew."""
    with torch.no_grad():
        for transition in trace(denoiser, x, grid, solver, seeds, round=round):
            x = transition.step.x_next
    return x


@dataclass(frozen=True, eq=False)
class Restart:
    """Go through an interval of sigma again and again, all samples (Xu et al. 2023, arXiv 2306.14878).

    At the interval's low end, noise of variance `high² − low²` takes the samples back up to its high end, from where
    the same grid leads down again; after the last time the run goes on to 0. Errors made above the interval contract.

    Attributes:
        sigmas: the grid.
        interval: (low, high); the nodes nearest in log sigma are taken.
        solver: how an interval of the grid is crossed.
    """

    sigmas: Float[Tensor, " n"]
    interval: tuple[float, float]
    solver: Solver

    def nodes(self) -> tuple[int, int]:
        """Return the indices of the interval's high and low node.

        Raises:
            FanalError: they are not two different positive nodes, the high one first.
        """
        grid = check_sigmas(self.sigmas)
        logs = grid[grid > 0].log()
        low, high = (int((logs - torch.tensor(s, dtype=torch.float64).log()).abs().argmin()) for s in self.interval)
        if not high < low:
            raise FanalError(f"a restart needs an interval (low, high) that spans a step of the grid: {self.interval}")
        return high, low

    def __call__(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int) -> Tensor:
        """Sample, with as many restarts as the budget allows, one at least."""
        grid = check_sigmas(self.sigmas)
        high, low = self.nodes()
        times = max(1, (budget - (len(grid) - 1)) // (low - high))
        x = _cross(denoiser, x, grid[: low + 1], self.solver, seeds, 0)
        up = float((grid[high] ** 2 - grid[low] ** 2).sqrt())
        for number in range(1, times + 1):
            fresh = noise(x.shape[1:], seeds, up, round=number, stream="restart", dtype=x.dtype, device=x.device)
            x = _cross(denoiser, x + fresh, grid[high : low + 1], self.solver, seeds, number)
        return _cross(denoiser, x, grid[low:], self.solver, seeds, times + 1)


@dataclass(frozen=True, eq=False)
class Best:
    """Several runs from different noise, of which the one with the lowest risk is kept; no threshold is needed.

    The budget is shared: each run takes `budget / count` steps of Karras' grid between the same ends.

    Attributes:
        sigmas: the grid whose ends are taken.
        detector: what gives the risk.
        solver: how an interval is crossed.
        count: number of runs.
    """

    sigmas: Float[Tensor, " n"]
    detector: Detector
    solver: Solver
    count: int = 2

    def __call__(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], budget: int) -> Tensor:
        """Sample so often and keep the best."""
        grid = check_sigmas(self.sigmas)
        ends = grid[grid > 0]
        share = polynomial(max(2, budget // self.count), float(ends[-1]), float(ends[0]))
        best = watch(denoiser, x, share, self.solver, self.detector, seeds)
        for number in range(1, self.count):
            fresh = noise(x.shape[1:], seeds, float(share[0]), round=number, stream="best", dtype=x.dtype)
            other = watch(denoiser, fresh.to(x.device), share, self.solver, self.detector, seeds, round=number)
            better = other.risk < best.risk
            best.x[better.to(x.device)] = other.x[better.to(x.device)]
            best.risk[better] = other.risk[better]
        return best.x


def _fixed(solver: Solver) -> Callable[[Settings], Method]:
    return lambda s: Fixed(s.sigmas, solver)


def _guarded(direction: str, held: bool = False) -> Callable[[Settings], Method]:
    """RODS, always on, in the window where samples are decided."""

    def build(s: Settings) -> Method:
        hold = s.hold if held else 1
        guard = Guard(Euler(), direction, rho=s.rho, window=s.window, window_units="sigma", hold=hold)
        return Fixed(s.sigmas, guard)

    return build


def _gated(repair: Callable[[Settings], Repair]) -> Callable[[Settings], Method]:
    return lambda s: Gated(s.sigmas, s.detector, s.threshold, repair(s), Euler())


def _finer(steps: int) -> Callable[[Settings], Method]:
    def build(s: Settings) -> Method:
        ends = s.sigmas[s.sigmas > 0]
        return Fixed(polynomial(steps, float(ends[-1]), float(ends[0])), Euler())

    return build


METHODS: dict[str, Callable[[Settings], Method]] = {
    "euler": _fixed(Euler()),
    "heun": _fixed(Heun()),
    "euler200": _finer(200),
    "cas": _guarded("cas"),
    "held": _guarded("cas", held=True),
    "sas": _guarded("sas"),
    "random": _guarded("random"),
    "reversed": _guarded("reversed"),
    "temperature": lambda s: Fixed(s.sigmas, Euler(), s.kappa, s.window),
    "churn": lambda s: Fixed(s.sigmas, Churn(Euler(), s_churn=s.s_churn)),
    "early": lambda s: Fixed(jump(s.sigmas, s.stop), Euler()),
    "restart": lambda s: Restart(s.sigmas, s.restart, Euler()),
    "best": lambda s: Best(s.sigmas, s.detector, Euler()),
    "redo": _gated(lambda s: Redo(s.redo, s.window)),
    "renoise": _gated(lambda s: Renoise(s.renoise, s.rounds)),
    "fresh": _gated(lambda s: Fresh(1)),
    "localized": _gated(lambda s: Localized(s.renoise, max(1, s.rounds // 2))),
    "ladder": lambda s: Climbed(s.sigmas, s.detector, s.threshold, s.ladder, s.probe, Euler()),
}
"""Name → maker."""
