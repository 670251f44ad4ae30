"""Calibration: a threshold for a detector, found on seeds that nothing is reported on, or from a person's labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fanal import metrics
from fanal.denoiser import Model
from fanal.errors import FanalError, is_number
from fanal.hallucination.detectors import Detector, build, describe
from fanal.hallucination.hints import FLAG as FLAG
from fanal.hallucination.hints import HINTS as HINTS
from fanal.hallucination.hints import WINDOWS as WINDOWS
from fanal.hallucination.hints import window_of as window_of
from fanal.hallucination.observation import observe
from fanal.hallucination.probe import LinearProbe
from fanal.hallucination.thresholds import Threshold, threshold_at, threshold_for
from fanal.sampling import Solver
from fanal.schedules import check_sigmas, plain_sigmas

__all__ = [
    "FIRST_SEED",
    "FLAG",
    "HINTS",
    "WINDOWS",
    "Calibration",
    "calibrate",
    "calibrate_each",
    "labelled",
    "settle",
    "threshold_at",
    "threshold_for",
    "window_of",
]

FIRST_SEED = 2**40
"""Calibration seeds start here, far from the small numbers that users pick for their runs."""


@dataclass(frozen=True)
class Calibration:
    """A threshold, and everything it depends on.

    Attributes:
        detector: name of the detector.
        window: its window in sigma.
        solver: the solver it was measured with, as written on the command line.
        sigmas: the grid it was measured on.
        first_seed: first of the calibration seeds.
        count: number of calibration samples.
        flag: share of them to flag; where another share was asked for, the one that is above the threshold.
        threshold: risk above which a sample is flagged.
        auc: area under the ROC curve against the verifier; None without one.
        auc_se: its standard error.
        caught: share of wrong calibration samples above the threshold; None without a verifier.
        wrong: share of calibration samples that the verifier calls wrong; None without a verifier.
        evaluations: network evaluations that it took, counted.
        options: the detector's further options.
        caught_ci: 95 % confidence interval of `caught` (Clopper–Pearson).
        alarms: share of right calibration samples above the threshold; None without a verifier.
        alarms_ci: its confidence interval.
        probe: the linear probe itself, where it is the detector; it is no part of the plain values.
    """

    detector: str
    window: tuple[float, float]
    solver: str
    sigmas: tuple[float, ...]
    first_seed: int
    count: int
    flag: float
    threshold: float
    auc: float | None = None
    auc_se: float | None = None
    caught: float | None = None
    wrong: float | None = None
    evaluations: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    caught_ci: tuple[float, float] | None = None
    alarms: float | None = None
    alarms_ci: tuple[float, float] | None = None
    probe: LinearProbe | None = field(default=None, repr=False, compare=False)

    def build(self) -> Detector:
        """Build the detector that was calibrated.

        Raises:
            FanalError: it is a linear probe, and these are the plain values alone.
        """
        if self.probe is not None:
            return self.probe
        return build(self.detector, self.window, **self.options)

    def fits(self, solver: str, sigmas: Tensor) -> bool:
        """Whether it was measured with this solver on this grid; a threshold holds for no other."""
        mine = torch.tensor(self.sigmas, dtype=torch.float64)
        return solver == self.solver and len(mine) == len(sigmas) and torch.allclose(mine, sigmas, rtol=1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Describe it as plain JSON values."""
        found = dataclasses.asdict(dataclasses.replace(self, probe=None))
        del found["probe"]
        return found | {"sigmas": plain_sigmas(torch.tensor(self.sigmas, dtype=torch.float64))}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Calibration:
        """Read what `to_dict` wrote.

        Raises:
            FanalError: a field is missing, unknown or of the wrong kind.
        """
        try:
            sigmas = tuple(float(v) for v in value["sigmas"])
            pairs = {name: _pair(value.get(name)) for name in ("caught_ci", "alarms_ci")}
            result = cls(**{**value, **pairs, "window": _pair(value["window"]), "sigmas": sigmas})
            _check(result)
        except (KeyError, TypeError, ValueError) as error:
            raise FanalError(f"the model's card holds no readable calibration ({error}); calibrate again") from error
        return result


def _pair(value: Any) -> tuple[float, float] | None:
    """Two numbers, or None."""
    if value is None:
        return None
    low, high = value
    if not is_number(low) or not is_number(high):
        raise ValueError(f"{value!r:.40} is no pair of numbers")
    return float(low), float(high)


def _check(found: Calibration) -> None:
    """Raise ValueError or TypeError where a field is not of its kind."""
    check_sigmas(found.sigmas)
    if found.probe is not None:
        raise ValueError("a probe is kept in a file of its own")
    if found.detector != LinearProbe.kind:
        build(found.detector, found.window, **found.options)
    needed = {name: getattr(found, name) for name in ("threshold", "flag", "count", "first_seed", "evaluations")}
    known = {name: getattr(found, name) for name in ("auc", "auc_se", "caught", "wrong", "alarms")}
    for name, number in {**needed, **{k: v for k, v in known.items() if v is not None}}.items():
        if not is_number(number):
            raise ValueError(f"{name} is {number!r:.40}")
    if not isinstance(found.solver, str):
        raise ValueError(f"solver is {found.solver!r:.40}")


def labelled(labels: Mapping[int, int | bool | None], count: int) -> tuple[Int[Tensor, " l"], Int[Tensor, " l"]]:
    """Return which samples a person has labelled, and how: rows and codes, both (L,), in the order of the samples.

    Args:
        labels: sample → label; 0 or False: right, any other number: wrong, None: not labelled.
        count: number of samples that there are.

    Raises:
        FanalError: a key is no sample's number, or a label is no whole number.
    """
    given = {key: value for key, value in labels.items() if value is not None}
    for key, value in given.items():
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < count:
            raise FanalError(f"labels name the samples 0 to {count - 1}, got {key!r:.40}")
        if not isinstance(value, int):
            raise FanalError(f"the label of sample {key} must be a whole number, 0 for right, got {value!r:.40}")
    rows = sorted(given)
    return torch.tensor(rows, dtype=torch.int64), torch.tensor([int(given[row]) for row in rows], dtype=torch.int64)


def settle(
    detector: Detector,
    risk: Float[Tensor, " b"],
    wrong: Tensor | None = None,
    *,
    solver_name: str,
    sigmas: Float[Tensor, " n"],
    first_seed: int,
    flag: float | None = None,
    tpr: float | None = None,
    fpr: float | None = None,
    evaluations: int = 0,
) -> Calibration:
    """Set the threshold from the risks of calibration samples, and write down what is known about it.

    Labels of a verifier and of a person do alike. A person's must be of samples that were not chosen by their risk:
    whoever labels only what was flagged cannot know what was missed.

    Args:
        detector: what gave the risks, one of fanal's.
        risk: (B,), higher means more likely wrong.
        wrong: (B,) labels, 0 or False for right; None: nobody knows.
        solver_name: the solver, as written on the command line.
        sigmas: the grid.
        first_seed: first seed of the samples.
        flag: share to flag; with `tpr` and `fpr` None, `FLAG`.
        tpr: share of the wrong samples to catch, at least.
        fpr: share of the right samples to flag, at most.
        evaluations: network evaluations that it took.

    Raises:
        FanalError: more than one share is asked for, one is not between 0 and 1, or the labels do not allow it.
    """
    share = FLAG if flag is None and tpr is None and fpr is None else flag
    found = threshold_for(risk, wrong, tpr=tpr, fpr=fpr, flag=share)
    what = describe(detector)
    result = Calibration(
        detector=what["detector"],
        window=(what["window"][0], what["window"][1]),
        solver=solver_name,
        sigmas=tuple(sigmas.tolist()),
        first_seed=first_seed,
        count=len(risk),
        flag=found.flagged.value if share is None else share,
        threshold=found.value,
        evaluations=evaluations,
        options=what["options"],
        probe=detector if isinstance(detector, LinearProbe) else None,
    )
    return result if wrong is None else _with_truth(result, found, risk, wrong != 0)


def _with_truth(result: Calibration, found: Threshold, risk: Tensor, wrong: Bool[Tensor, " b"]) -> Calibration:
    """Add what the labels say."""
    area, caught, alarms = metrics.auc(risk, wrong), found.caught, found.alarms
    return dataclasses.replace(
        result,
        auc=area.value if math.isfinite(area.value) else None,
        auc_se=area.se if math.isfinite(area.se) else None,
        caught=caught.value if caught else None,
        caught_ci=(caught.low, caught.high) if caught else None,
        alarms=alarms.value if alarms else None,
        alarms_ci=(alarms.low, alarms.high) if alarms else None,
        wrong=float(wrong.double().mean()),
    )


def calibrate_each(
    model: Model,
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    detectors: Mapping[str, Detector],
    *,
    solver_name: str,
    count: int = 256,
    flag: float | None = None,
    tpr: float | None = None,
    fpr: float | None = None,
    first_seed: int = FIRST_SEED,
    block: int = 64,
    device: torch.device | str = "cpu",
    verify: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Calibration]:
    """Sample once with calibration seeds while all detectors watch, and set the threshold of each.

    Args:
        model: the denoiser, with its shape.
        sigmas: the grid to calibrate for.
        solver: the solver to calibrate for.
        detectors: by name.
        solver_name: how the solver is written down.
        count: number of calibration samples.
        flag: share to flag; with `tpr` and `fpr` None, `FLAG`.
        tpr: share of the wrong samples to catch; needs `verify`.
        fpr: share of the right samples to flag; needs `verify`.
        first_seed: first calibration seed.
        block: samples run at a time.
        device: where the model is.
        verify: tells which samples are wrong (not 0), where something knows.
        progress: wraps the loop over blocks.

    Raises:
        FanalError: the run fails, or a share is none.
    """
    grid = check_sigmas(sigmas)
    seeds = range(first_seed, first_seed + count)
    seen = observe(
        model,
        grid,
        solver,
        detectors,
        seeds,
        block=block,
        device=device,
        verify=verify,
        keep=False,
        progress=progress,
    )
    return {
        name: settle(
            detector,
            seen.risks[name],
            seen.verdicts,
            solver_name=solver_name,
            sigmas=grid,
            first_seed=first_seed,
            flag=flag,
            tpr=tpr,
            fpr=fpr,
            evaluations=round(count * (seen.evaluations + seen.costs[name].evaluations)),
        )
        for name, detector in detectors.items()
    }


def calibrate(
    model: Model,
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    detector: str,
    window: tuple[float, float],
    *,
    solver_name: str,
    options: Mapping[str, Any] | None = None,
    count: int = 256,
    flag: float | None = None,
    tpr: float | None = None,
    fpr: float | None = None,
    first_seed: int = FIRST_SEED,
    block: int = 64,
    device: torch.device | str = "cpu",
    verify: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Calibration:
    """Sample with calibration seeds while a detector watches, and set its threshold.

    Args:
        model: the denoiser, with its shape.
        sigmas: the grid to calibrate for.
        solver: the solver to calibrate for.
        detector: name of the detector.
        window: its window in sigma.
        solver_name: how the solver is written down.
        options: the detector's further options.
        count: number of calibration samples.
        flag: share to flag; with `tpr` and `fpr` None, `FLAG`.
        tpr: share of the wrong samples to catch; needs `verify`.
        fpr: share of the right samples to flag; needs `verify`.
        first_seed: first calibration seed.
        block: samples run at a time.
        device: where the model is.
        verify: tells which samples are wrong (not 0), where something knows.
        progress: wraps the loop over blocks.

    Raises:
        FanalError: the run fails, or a share or the detector is none.
    """
    found = calibrate_each(
        model,
        sigmas,
        solver,
        {detector: build(detector, window, **(options or {}))},
        solver_name=solver_name,
        count=count,
        flag=flag,
        tpr=tpr,
        fpr=fpr,
        first_seed=first_seed,
        block=block,
        device=device,
        verify=verify,
        progress=progress,
    )
    return dataclasses.replace(found[detector], window=window)
