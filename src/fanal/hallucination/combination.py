"""Fit a combination of detectors to labels, judge it honestly, and keep any detector in a small file.

seen = observe(model, sigmas, solver, detectors, range(FIRST_SEED, FIRST_SEED + 512), verify=verify)
found = fit(detectors, seen.risks, seen.wrong)
found.auc                           # cross-validated; report it on seeds that nothing was fitted on
save("detector.json", found.detector)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal import metrics
from fanal.errors import FanalError
from fanal.files import read_json, write_json
from fanal.hallucination.detectors import Combined, Detector, Part, build, describe
from fanal.metrics import Estimate

__all__ = ["Fit", "fit", "load", "save"]

_FORMAT = "fanal-detector-1"


@dataclass(frozen=True, eq=False)
class Fit:
    """A combination and how well it does on samples that it was not fitted to.

    Attributes:
        detector: fitted to all the samples.
        risk: (B,) the probability of each sample by a fit to the other folds.
        auc: area under the ROC curve of `risk`, with DeLong's standard error.
    """

    detector: Combined
    risk: Float[Tensor, " b"]
    auc: Estimate


def _logs(risks: Sequence[Tensor]) -> tuple[np.ndarray, list[float]]:
    """Log risks (B, K), and what each was floored at: its smallest positive value."""
    data = np.stack([risk.detach().cpu().double().numpy() for risk in risks], 1)
    if not np.isfinite(data).all():
        raise FanalError("a risk is not finite: leave those samples out")
    floors = [float(column[column > 0].min()) if (column > 0).any() else 1.0 for column in data.T]
    return np.log(np.maximum(data, floors)), floors


def fit(
    detectors: Mapping[str, Detector],
    risks: Mapping[str, Float[Tensor, " b"]],
    wrong: Tensor,
    *,
    folds: int = 5,
    strength: float = 1.0,
) -> Fit:
    """Fit a logistic regression to the standardized log risks, and judge it by cross-validation.

    Args:
        detectors: by name.
        risks: name → (B,), what each of them gave.
        wrong: (B,) labels; 0 or False is right.
        folds: parts of the cross-validation, stratified; each sample is judged by a fit to the other parts.
        strength: inverse of the regularization, scikit-learn's `C`.

    Raises:
        FanalError: names or samples do not fit, or a kind has fewer samples than there are folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names = list(detectors)
    missing = [name for name in names if name not in risks or risks[name].shape != wrong.shape]
    if not names or missing or wrong.ndim != 1:
        raise FanalError(
            f"a fit needs detectors, and a risk of each for every one of the {len(wrong)} labelled samples; "
            f"missing or of another length: {missing}"
        )
    bad = (wrong != 0).cpu().numpy()
    few = int(min(bad.sum(), (~bad).sum()))
    if folds < 2 or few < folds:
        raise FanalError(
            f"{few} samples of the rarer kind do not fill {folds} folds of a cross-validation: label more samples, "
            "or take fewer folds (at least 2)"
        )
    logs, floors = _logs([risks[name] for name in names])
    scaler, regression = StandardScaler(), LogisticRegression(C=strength)
    model = make_pipeline(scaler, regression)
    parts = StratifiedKFold(folds, shuffle=True, random_state=0)
    risk = torch.from_numpy(np.asarray(cross_val_predict(model, logs, bad, cv=parts, method="predict_proba"))[:, 1])
    model.fit(logs, bad)
    center, scale, weight = (np.asarray(own) for own in (scaler.mean_, scaler.scale_, regression.coef_))
    numbers = zip(floors, center, scale, weight[0], strict=True)
    combined = Combined(
        tuple(Part(detector, *map(float, some)) for detector, some in zip(detectors.values(), numbers, strict=True)),
        float(np.asarray(regression.intercept_)[0]),
    )
    return Fit(combined, risk, metrics.auc(risk, torch.from_numpy(bad)))


def save(path: str | Path, detector: Detector, about: Mapping[str, Any] | None = None) -> None:
    """Write a detector as a small JSON file.

    Args:
        path: the file.
        detector: one of fanal's detectors, or a combination of them.
        about: what else to keep: how it was fitted, its figures.

    Raises:
        FanalError: it is none of fanal's detectors, or the place cannot be written.
    """
    write_json(Path(path), {"format": _FORMAT, **describe(detector), "about": dict(about or {})})


def load(path: str | Path) -> Detector:
    """Read a detector that `save` wrote; names are looked up, nothing in the file is executed.

    Raises:
        FanalError: the file is missing, too large, or no such detector.
    """
    value = read_json(Path(path))
    if value.get("format") != _FORMAT:
        raise FanalError(f"{path} is not a detector that fanal wrote (format {value.get('format')!r:.40})")
    try:
        low, high = (float(v) for v in value["window"])
        return build(value["detector"], (low, high), **value["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise FanalError(f"{path} holds no readable detector ({error}); fit it again") from error
