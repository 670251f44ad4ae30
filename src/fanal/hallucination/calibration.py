"""Calibration: a threshold for a detector, found on seeds that nothing is reported on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal import metrics
from fanal.denoiser import Model
from fanal.errors import FanalError
from fanal.hallucination.detectors import Detector, build
from fanal.hallucination.repair import watch_seeds
from fanal.sampling import Solver
from fanal.schedules import check_sigmas, plain_sigmas

__all__ = ["FIRST_SEED", "FLAG", "HINTS", "Calibration", "calibrate", "threshold_at"]

FIRST_SEED = 2**40
"""Calibration seeds start here, far from the small numbers that users pick for their runs."""

FLAG = 0.35
"""Share of samples flagged by default, where a card says nothing else."""

HINTS: dict[str, dict[str, Any]] = {
    "grid2": {
        "detector": "last_slope",
        "flag": 0.05,
        "repair": {
            "redo": {"kappa": 0.1, "window": [0.1, 4.0]},
            "renoise": {"sigma": 1.5, "rounds": 4},
        },
    },
}
"""What a data set asks for, where the defaults, made for images in [−1, 1], do not fit; the start of its cards."""


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
        flag: share of them above the threshold.
        threshold: risk above which a sample is flagged.
        auc: area under the ROC curve against the verifier; None without one.
        auc_se: its standard error.
        caught: share of wrong calibration samples above the threshold; None without a verifier.
        wrong: share of calibration samples that the verifier calls wrong; None without a verifier.
        evaluations: network evaluations that it took, counted.
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

    def build(self) -> Detector:
        """Build the detector that was calibrated."""
        return build(self.detector, self.window)

    def fits(self, solver: str, sigmas: Tensor) -> bool:
        """Whether it was measured with this solver on this grid; a threshold holds for no other."""
        mine = torch.tensor(self.sigmas, dtype=torch.float64)
        return solver == self.solver and len(mine) == len(sigmas) and torch.allclose(mine, sigmas, rtol=1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Describe it as plain JSON values."""
        return dataclasses.asdict(self) | {"sigmas": plain_sigmas(torch.tensor(self.sigmas, dtype=torch.float64))}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Calibration:
        """Read what `to_dict` wrote.

        Raises:
            FanalError: a field is missing, unknown or of the wrong kind.
        """
        try:
            low, high = (float(v) for v in value["window"])
            sigmas = tuple(float(v) for v in value["sigmas"])
            result = cls(**{**value, "window": (low, high), "sigmas": sigmas})
            _check(result)
        except (KeyError, TypeError, ValueError) as error:
            raise FanalError(f"the model's card holds no readable calibration ({error}); calibrate again") from error
        return result


def _check(found: Calibration) -> None:
    """Raise ValueError where a field is not of its kind."""
    check_sigmas(found.sigmas)
    build(found.detector, found.window)
    needed = {name: getattr(found, name) for name in ("threshold", "flag", "count", "first_seed", "evaluations")}
    known = {name: getattr(found, name) for name in ("auc", "auc_se", "caught", "wrong")}
    for name, number in {**needed, **{k: v for k, v in known.items() if v is not None}}.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{name} is {number!r:.40}")
    if not isinstance(found.solver, str):
        raise ValueError(f"solver is {found.solver!r:.40}")


def threshold_at(risk: Float[Tensor, " b"], flag: float) -> float:
    """Return the risk that a share `flag` of the samples exceeds.

    Raises:
        FanalError: `flag` is not strictly between 0 and 1.
    """
    if not 0 < flag < 1:
        raise FanalError(f"the flagged share must be strictly between 0 and 1, got {flag}")
    return float(torch.quantile(risk.double(), 1 - flag))


def calibrate(
    model: Model,
    sigmas: Float[Tensor, " n"],
    solver: Solver,
    detector: str,
    window: tuple[float, float],
    *,
    solver_name: str,
    count: int = 256,
    flag: float = FLAG,
    first_seed: int = FIRST_SEED,
    block: int = 64,
    device: torch.device | str = "cpu",
    verify: Callable[[Tensor], Bool[Tensor, " b"]] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Calibration:
    """Sample with calibration seeds while the detector watches, and set its threshold.

    Args:
        model: the denoiser, with its shape.
        sigmas: the grid to calibrate for.
        solver: the solver to calibrate for.
        detector: name of the detector.
        window: its window in sigma.
        solver_name: how the solver is written down.
        count: number of calibration samples.
        flag: share to flag.
        first_seed: first calibration seed.
        block: samples run at a time.
        device: where the model is.
        verify: tells which samples are wrong, where something knows.
        progress: wraps the loop over blocks.

    Raises:
        FanalError: the run fails, or `flag` or the detector is none.
    """
    grid = check_sigmas(sigmas)
    eye = build(detector, window)
    risks, wrongs, evaluations = [], [], 0.0
    seeds = range(first_seed, first_seed + count)
    for outcome in watch_seeds(model, grid, solver, eye, seeds, block=block, device=device, progress=progress):
        risks.append(outcome.risk)
        evaluations += float(outcome.evaluations.sum())
        if verify is not None:
            wrongs.append(verify(outcome.x))
    risk = torch.cat(risks)
    threshold = threshold_at(risk, flag)
    result = Calibration(
        detector=detector,
        window=window,
        solver=solver_name,
        sigmas=tuple(grid.tolist()),
        first_seed=first_seed,
        count=count,
        flag=flag,
        threshold=threshold,
        evaluations=round(evaluations),
    )
    if not wrongs:
        return result
    wrong = torch.cat(wrongs)
    area = metrics.auc(risk, wrong)
    known = math.isfinite(area.value)
    return dataclasses.replace(
        result,
        auc=area.value if known else None,
        auc_se=area.se if math.isfinite(area.se) else None,
        caught=float((risk[wrong] > threshold).double().mean()) if bool(wrong.any()) else None,
        wrong=float(wrong.double().mean()),
    )
