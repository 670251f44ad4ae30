"""What `fanal bench hallucination` computes: the watched plain run, costly detectors, methods, all counted and timed.

A cell is one of these on some of the seeds. Every cell of a model starts from the same noise, so that all comparisons
are paired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fanal import metrics
from fanal.bench.quality import dataset_of
from fanal.config import build_detector
from fanal.datasets import Dataset
from fanal.denoiser import Counted, Denoiser, Model
from fanal.errors import FanalError
from fanal.hallucination.calibration import FIRST_SEED, FLAG
from fanal.hallucination.detectors import DETECTORS, Detector, build, last_window
from fanal.hallucination.hints import window_of
from fanal.hallucination.methods import HINTS, Mending, Method, Settings
from fanal.hallucination.observation import Observed, observe_block
from fanal.hallucination.perturbation import differentiate
from fanal.hallucination.probe import shipped
from fanal.hallucination.regions import unit
from fanal.hallucination.repair import Outcome
from fanal.loading import fingerprint
from fanal.metrics.features import is_image
from fanal.pictures import to_bytes
from fanal.preparation import SampleConfig, prepare
from fanal.sampling import Solver, Span, Step, trace
from fanal.seeding import noise
from fanal.solvers.onestep import Euler

__all__ = [
    "GATE",
    "JUDGED",
    "PARTS",
    "Meter",
    "Subject",
    "calibration_cell",
    "first_cell",
    "look_cell",
    "mechanism_cell",
    "method_cell",
    "seeds",
]

GATE = "gate"
"""Detector of the model's card over the last part of the run, where none of the others is just that."""

JUDGED = (0.05, 20.0)
"""Range of sigma in which predictions are judged on the way: above it they are blurs, below it nothing changes."""

PARTS: Mapping[str, int] = {"report": 0, "calibration": FIRST_SEED, "tuning": 2 * FIRST_SEED}
"""First seed of what figures are reported on, of what thresholds and combinations are fitted on, and of what strengths
are chosen on. No part has more than 2⁴⁰ seeds, so none reaches into the next."""

Cell = tuple[dict[str, Tensor], dict[str, Any]]

_STEPS = 40
_GATES = {"hands32": "variance", "shapes32": "variance"}  # that the settings of repairs were chosen with
_RUNAWAY, _LEAST = 8, 200  # a method that asks for 8 times its budget, or 8·200 if that is more, is stopped


def seeds(part: str, count: int, start: int = 0) -> range:
    """Return seeds of a part of the benchmark; those of different parts never meet.

    Args:
        part: "report", "calibration" or "tuning".
        count: how many.
        start: the first of them, counted from the part's own first.

    Raises:
        FanalError: the part has not so many.
    """
    if not 0 <= start <= start + count <= FIRST_SEED:
        raise FanalError(f"a part of the benchmark has the seeds 0 to 2^40, got {start} to {start + count}")
    return range(PARTS[part] + start, PARTS[part] + start + count)


class Meter(Counted):
    """Counts evaluations and products sample by sample, and stops whoever asks for far too many.

    Args:
        denoiser: the network.
        most: evaluations after which no more are made.
    """

    def __init__(self, denoiser: Denoiser, most: float = math.inf) -> None:
        super().__init__(denoiser)
        self.most = most

    def _product(self, gradient: Tensor) -> None:
        self.products += len(gradient)

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """Count, then ask.

        Raises:
            FanalError: more was asked for than any method may.
        """
        if self.evaluations + len(x) > self.most:
            raise FanalError(
                f"stopped after {self.evaluations} network evaluations in one block, of {self.most:g} that any method "
                "may make: sample within the budget that the method is called with"
            )
        return super().__call__(x, sigma, labels)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under test, with all that belongs to its data.

    Attributes:
        spec: as in `fanal.load`.
        model: the network.
        dataset: its rule tells wrong samples.
        sigmas: the grid of the plain run.
        free: detectors that watch the plain run, by name.
        costly: detectors that ask the network more.
        probes: the linear probe that comes with fanal for this very network, if there is one.
        gate: name of the free detector that flags samples for repair.
        flag: share that it flags.
        extract: makes the features of the distances.
        content: hash of the model.
    """

    spec: str
    model: Model
    dataset: Dataset
    sigmas: Tensor
    free: Mapping[str, Detector]
    costly: Mapping[str, Detector]
    probes: Mapping[str, Detector]
    gate: str
    flag: float
    extract: metrics.Extractor
    content: str

    @classmethod
    def of(cls, spec: str, names: Sequence[str]) -> Subject:
        """Open a model and build the detectors.

        Raises:
            FanalError: the model or a detector is unknown, or its card names no data whose rule could judge it.
        """
        setup, about = prepare(SampleConfig(spec, steps=_STEPS))
        dataset = dataset_of(about, setup.network)
        if not dataset.verdicts:
            raise FanalError(f"{spec} was trained on {dataset.name}, which has no rule that knows a wrong sample")
        card = _GATES.get(dataset.name, setup.detector)
        free, costly, gate = _detectors(names, card, setup.sigmas, dataset.name)
        extract = metrics.extractor("own" if is_image(dataset.shape) else "pixels")
        flag, probe = float(about.get("flag", FLAG)), shipped(setup.network)
        probes = {} if probe is None else {"linear_probe": probe}
        content = fingerprint(spec)
        return cls(spec, setup.network, dataset, setup.sigmas, free, costly, probes, gate, flag, extract, content)

    def settings(self, threshold: float) -> Settings:
        """Return what the methods need to know, with the calibrated threshold of the gate."""
        return Settings(self.sigmas, self.free[self.gate], threshold, **HINTS.get(self.dataset.name, {}))

    def start(self, some: range) -> Tensor:
        """Return the noise of some seeds."""
        return noise(self.model.shape, some, float(self.sigmas[0]))

    def judged(self, x: Tensor) -> dict[str, Tensor]:
        """Return verdicts, what the verifier measures, features, and the samples as they are shown."""
        known = self.dataset.measure(x.float())
        image = is_image(self.dataset.shape)
        return {
            "verdict": self.dataset.verify(x.float()),
            "features": self.extract(to_bytes(x) if image else x),
            "shown": to_bytes(x) if image else x.float(),
            **{f"factor.{name}": known[name] for name in self.dataset.features},
        }


def _detectors(
    names: Sequence[str], card: str, sigmas: Tensor, data: str
) -> tuple[dict[str, Detector], dict[str, Detector], str]:
    """Free detectors, costly ones, and the name of the free one that flags.

    Each looks where it told most on tuning seeds, free ones also where samples are decided: *mid*. The gate is that of
    the model's card, where `_GATES` names no other.
    """
    free: dict[str, Detector] = {}
    costly: dict[str, Detector] = {}
    late = last_window(sigmas)
    mid = Settings(sigmas, build(card, late), 0.0, **HINTS.get(data, {})).window
    for text in dict.fromkeys(names):
        name = text.partition(":")[0]
        own = build_detector(text, window_of(name, sigmas, data) if name in DETECTORS else late)
        if not own.free:
            costly[text] = own
            continue
        free[text], early = own, build_detector(text, mid)
        if early != own:
            free[f"{text}, mid"] = early
    gate = build(card, late)
    known = next((name for name, detector in free.items() if detector == gate), None)
    if known is None:
        free[f"{GATE} ({card})"] = gate
    return free, costly, known or f"{GATE} ({card})"


class _Timed:
    """A solver with a clock: what the run itself takes, without those who watch it."""

    def __init__(self, solver: Solver) -> None:
        self.solver, self.seconds = solver, 0.0

    def step(self, denoiser: Denoiser, x: Tensor, span: Span, memory: tuple[Tensor, ...] = ()) -> Step:
        """Cross the interval as the solver does."""
        begin = time.process_time()
        step = self.solver.step(denoiser, x, span, memory)
        self.seconds += time.process_time() - begin
        return step


def _observed(
    subject: Subject, some: range, detectors: Mapping[str, Detector], judged: tuple[float, float] | None = None
) -> tuple[Observed, float]:
    """Take the plain run under the eyes of detectors; returns its own seconds too."""
    solver, verify = _Timed(Euler()), lambda x: subject.dataset.verify(x.float())
    x = subject.start(some)
    seen = observe_block(subject.model, x, subject.sigmas, solver, detectors, some, verify=verify, judged=judged)
    return seen, solver.seconds


def calibration_cell(subject: Subject, some: range) -> Cell:
    """Take the plain run on calibration seeds: verdicts and the risks of every free detector."""
    seen, _ = _observed(subject, some, subject.free)
    assert seen.verdicts is not None
    return {"verdict": seen.verdicts, **_risks(seen)}, {}


def first_cell(subject: Subject, some: range) -> Cell:
    """Take the plain run under the eyes of every free detector, and judge it."""
    seen, seconds = _observed(subject, some, subject.free)
    tensors = {"x": seen.x, **subject.judged(seen.x), **_risks(seen), **_steps(seen)}
    return tensors, {"seconds": seconds, "evaluations": seen.evaluations * len(some), "products": 0}


def look_cell(
    subject: Subject, some: range, detectors: Mapping[str, Detector], judged: tuple[float, float] | None
) -> Cell:
    """Take the plain run under the eyes of costly detectors, and judge its predictions on the way.

    Args:
        subject: the model.
        some: the seeds.
        detectors: by name.
        judged: range of sigma in which predictions are judged; None: nowhere.
    """
    seen, _ = _observed(subject, some, detectors, judged)
    assert seen.verdicts is not None
    costs = {name: {"evaluations": c.evaluations, "products": c.products} for name, c in seen.costs.items()}
    tensors = {"verdict": seen.verdicts, **_risks(seen), **_steps(seen)}
    if judged is not None:
        tensors["path"] = seen.by_step.T.contiguous()
    return tensors, {"costs": costs, "judged": seen.judged.tolist()}


def mechanism_cell(subject: Subject, some: range, every: int = 4) -> Cell:
    """Compare the directions of CAS and SAS along the plain run, and the residual's norm with that of the noise.

    Args:
        subject: the model.
        some: the seeds.
        every: of how many steps one is looked at.
    """
    cosines, ratios, levels = [], [], []
    x, root = subject.start(some), math.sqrt(math.prod(subject.dataset.shape))
    with torch.no_grad():
        for transition in trace(subject.model, x, subject.sigmas, Euler(), some):
            sigma = transition.span.sigma
            if transition.span.i % every == 0:
                here = differentiate(subject.model, transition.x, sigma)
                cosines.append((unit(here.gradient) * unit(here.residual)).flatten(1).sum(1))
                ratios.append(here.residual.flatten(1).norm(dim=1) / (float(sigma) * root))
                levels.append(float(sigma))
    return {"cosine": torch.stack(cosines, 1), "ratio": torch.stack(ratios, 1)}, {"sigma": levels}


def _risks(seen: Observed) -> dict[str, Tensor]:
    return {f"risk.{name}": risk for name, risk in seen.risks.items()}


def _steps(seen: Observed) -> dict[str, Tensor]:
    return {f"step.{name}": steps.T.float().contiguous() for name, steps in seen.per_step.items()}


def _outcome(subject: Subject, detector: Detector, first: Mapping[str, Tensor]) -> Outcome | None:
    """The plain run as a repair wants it, where its detector was among those that watched."""
    for name, own in subject.free.items():
        if own == detector:
            count = len(first["x"])
            return Outcome(
                first["x"].clone(),
                first[f"risk.{name}"].clone(),
                torch.full((count,), float(len(subject.sigmas) - 1), dtype=torch.float64),
                first[f"step.{name}"].T.double(),
                torch.zeros(count, dtype=torch.int64),
            )
    return None


def method_cell(
    subject: Subject, method: Method, some: range, budget: int, first: tuple[Mapping[str, Tensor], Mapping[str, Any]]
) -> Cell:
    """Sample by a method, from the same noise; one that begins with the plain run takes it over, and its price.

    Args:
        subject: the model.
        method: a function of (denoiser, x, seeds, budget).
        some: the seeds.
        budget: evaluations that a sample may cost on average.
        first: the plain run's cell.

    Raises:
        FanalError: the method asks for far more than its budget, or returns other things than samples.
    """
    meter = Meter(subject.model, most=_RUNAWAY * max(budget, _LEAST) * len(some))
    x, done = subject.start(some), None
    if isinstance(method, Mending):
        done = _outcome(subject, method.detector, first[0])
    begin = time.process_time()
    if done is not None and isinstance(method, Mending):
        end = method.mend(meter, x, tuple(some), budget, done).x
    else:
        end = method(meter, x, tuple(some), budget)
    spent = time.process_time() - begin
    _check_samples(end, x)
    notes = {"seconds": spent, "evaluations": meter.evaluations, "products": meter.products}
    if done is not None:
        notes = {key: value + first[1][key] for key, value in notes.items()}
    return subject.judged(end), notes


def _check_samples(end: Tensor, x: Tensor) -> None:
    if not isinstance(end, Tensor) or end.shape != x.shape or not end.is_floating_point():
        got = tuple(end.shape) if isinstance(end, Tensor) else type(end).__name__
        raise FanalError(f"a method returns the samples, of shape {tuple(x.shape)} like the noise, got {got}")
    bad = (~torch.isfinite(end)).flatten(1).any(1)
    if bool(bad.any()):
        raise FanalError(f"a method returned NaN or infinity, {int(bad.sum())} of {len(end)} samples")
