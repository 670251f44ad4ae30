"""The figures of `fanal bench hallucination`: detection, correction by kind of error, cost, variety."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fanal import metrics
from fanal.bench.hallucination import PLAIN, Measured
from fanal.bench.hallucination_cells import GATE
from fanal.bench.hallucination_diversity import GROUPS, Figure, Real, against, figures
from fanal.errors import FanalError
from fanal.hallucination import evaluate
from fanal.hallucination.calibration import threshold_at
from fanal.hallucination.combination import fit
from fanal.hallucination.detectors import Combined
from fanal.hallucination.evaluate import Change, Confusion
from fanal.metrics import Estimate
from fanal.metrics.estimates import jackknife
from fanal.runs import Progress
from fanal.schedules import plain_sigmas
from fanal.summary import as_json

__all__ = ["COMBINED", "results_of"]

COMBINED = "combined"
"""Name of the logistic regression on all free detectors, fitted on the calibration seeds."""

_POINTS = 101
_SWEEP = 21


def _thinned(curve: evaluate.Roc) -> dict[str, list[float]]:
    """A curve with so many points at most."""
    keep = torch.linspace(0, len(curve.fpr) - 1, min(_POINTS, len(curve.fpr))).round().long()
    return {"fpr": curve.fpr[keep].tolist(), "tpr": curve.tpr[keep].tolist()}


def _confusion(found: Confusion) -> dict[str, Any]:
    rates = {name: as_json(getattr(found, name)) for name in ("tpr", "fpr", "precision", "flagged")}
    return {"tp": found.tp, "fp": found.fp, "fn": found.fn, "tn": found.tn, "threshold": found.threshold, **rates}


def _detector(risk: Tensor, codes: Tensor, threshold: float, verdicts: Sequence[str]) -> dict[str, Any]:
    """What one detector is worth; NaN risks and a batch of one kind are told by missing figures."""
    wrong = codes != 0
    out: dict[str, Any] = {
        "n": len(risk),
        "confusion": _confusion(evaluate.confusion(risk > threshold, codes, threshold=threshold)),
    }
    if not bool(wrong.any()) or bool(wrong.all()):
        return out
    curve = evaluate.roc(risk, codes)
    out |= {"auc": as_json(curve.auc), "tpr_at_20": as_json(evaluate.tpr_at(risk, codes)), "roc": _thinned(curve)}
    out["sweep"] = [_confusion(row) for row in evaluate.sweep(risk, codes, count=_SWEEP)[1:-1]]
    out["by_class"] = {
        name: as_json(metrics.auc(risk[rows], codes[rows] == k))
        for k, name in enumerate(verdicts)
        if k and bool((codes == k).any())
        for rows in [(codes == 0) | (codes == k)]
    }
    return out


def _by_step(per_step: Tensor, codes: Tensor, sigmas: Tensor) -> dict[str, Any]:
    curve = evaluate.auc_by_step(per_step.T, codes, sigmas)
    numbers = [[None if math.isnan(v) else v for v in part.tolist()] for part in (curve.auc, curve.se)]
    return {"sigma": curve.sigmas.tolist(), "auc": numbers[0], "se": numbers[1]}


def _raised(per_step: Tensor) -> list[float]:
    """Share of samples whose risk was last raised at each step: where a largest value over the steps was found."""
    now, before = per_step, torch.cat([torch.zeros_like(per_step[:, :1]), per_step[:, :-1]], 1)
    steps = torch.arange(per_step.shape[1]).expand_as(per_step)
    last = torch.where(now > before, steps, torch.zeros_like(steps)).amax(1)
    return (torch.bincount(last, minlength=per_step.shape[1]).double() / len(per_step)).tolist()


def _cost(blocks: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Evaluations, products and seconds per sample, and the time's ratio to the plain run's in the same blocks."""
    weight = torch.tensor([b["samples"] for b in blocks], dtype=torch.float64)

    def per(name: str, rows: Sequence[Mapping[str, float]]) -> Tensor:
        return torch.tensor([row[name] / row["samples"] for row in rows], dtype=torch.float64)[: len(blocks)]

    def over(values: Tensor) -> dict[str, Any]:
        mean = float((values * weight).sum() / weight.sum())
        se = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return as_json(Estimate(mean, se, int(weight.sum())))

    own, plain = per("seconds", blocks) * weight, per("seconds", base) * weight
    ratio, n = float(own.sum() / plain.sum()), len(blocks)
    without = (own.sum() - own) / (plain.sum() - plain) if n > 1 else torch.full((1,), math.nan)
    return {
        "calls": over(per("evaluations", blocks)),
        "products": over(per("products", blocks)),
        "seconds": over(per("seconds", blocks)),
        "time": as_json(Estimate(ratio, jackknife(without) if n > 1 else math.nan, n)),
    }


def _combination(measured: Measured) -> tuple[Tensor, Tensor, Combined] | None:
    """The free detectors' combination, fitted on the calibration seeds: its risk there and on the report seeds."""
    cal, plain = measured.calibration, measured.plain
    free = {name: own for name, own in measured.subject.free.items() if not name.startswith(GATE)}
    try:
        found = fit(free, {name: cal[f"risk.{name}"] for name in free}, cal["verdict"] != 0).detector
    except FanalError:  # too few wrong samples
        return None
    known, new = ([part[f"risk.{name}"] for name in free] for part in (cal, plain))
    return found.join(known), found.join(new), found


def _detectors(measured: Measured) -> dict[str, Any]:
    """Every detector's figures: free ones and their combination on all samples, costly ones on those they saw."""
    subject, plain, looks, cal = measured.subject, measured.plain, measured.looks, measured.calibration
    codes, verdicts, out = plain["verdict"], subject.dataset.verdicts, {}
    for name in subject.free:
        limit = threshold_at(cal[f"risk.{name}"], subject.flag)
        found = _detector(plain[f"risk.{name}"], codes, limit, verdicts)
        by_step = _by_step(plain[f"step.{name}"], codes, subject.sigmas)
        out[name] = {"free": True, **found, "by_step": by_step, "raised": _raised(plain[f"step.{name}"])}
    combination = _combination(measured)
    if combination is not None:
        known, new, fitted = combination
        found = _detector(new, codes, threshold_at(known, subject.flag), verdicts)
        weights = [{"detector": type(part.detector).__name__, "weight": part.weight} for part in fitted.parts]
        out[COMBINED] = {"free": True, **found, "weights": weights}
    for name in (*subject.costly, *subject.probes):
        risk, steps = looks[f"risk.{name}"], looks[f"step.{name}"]
        found = _detector(risk, looks["verdict"], threshold_at(risk, subject.flag), verdicts)
        by_step = _by_step(steps, looks["verdict"], subject.sigmas)
        cost = measured.about["costs"][name]
        out[name] = {"free": False, **found, **cost, "by_step": by_step, "raised": _raised(steps)}
    return out


def _decision(measured: Measured) -> dict[str, Any]:
    """From which noise level on the prediction is judged as the sample will be; right or wrong, and by kind."""
    levels = torch.tensor(measured.about["judged"], dtype=torch.float64)
    found = evaluate.decision(measured.looks["path"].T, measured.looks["verdict"], levels)
    return {
        "sigma": found.sigmas.tolist(),
        "same": [as_json(e) for e in found.same],
        "settled": [as_json(e) for e in found.settled],
        "half": found.reached(0.5),
        "nine tenths": found.reached(0.9),
    }


def _mechanism(measured: Measured) -> dict[str, Any]:
    """Cosine of the directions of CAS and SAS, and ‖x − D‖/(sigma·√d) with its spread over samples."""
    tensors, notes = measured.mechanism
    ratio = tensors["ratio"].double()
    return {
        "sigma": notes["sigma"],
        "cosine": [as_json(metrics.mean(part)) for part in tensors["cosine"].T],
        "ratio": ratio.mean(0).tolist(),
        "spread": ratio.std(0).tolist(),
    }


def _change(found: Change) -> dict[str, Any]:
    return {name: as_json(getattr(found, name)) for name in ("before", "after", "difference", "corrected")}


class _Diversity:
    """Figures of diversity over the first n samples, those of the plain run kept."""

    def __init__(self, measured: Measured) -> None:
        self.measured, self.known = measured, dict[int, dict[str, Figure]]()
        self.real = Real.of(measured.real["features"], _factors(measured.real))

    def plain(self, count: int) -> dict[str, Figure]:
        if count not in self.known:
            self.known[count] = self.own({k: v[:count] for k, v in self.measured.plain.items()})
        return self.known[count]

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Figure]:
        return figures(tensors["features"], _factors(tensors), tensors["verdict"] == 0, self.real)


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("factor."): v for name, v in tensors.items() if name.startswith("factor.")}


def _methods(measured: Measured, budget: int, progress: Progress) -> list[dict[str, Any]]:
    """One row per method, the plain run first."""
    codes, verdicts, diversity = measured.plain["verdict"], measured.subject.dataset.verdicts, _Diversity(measured)
    names, rows = [PLAIN, *measured.methods], []
    for i in progress(range(len(names)), f"{measured.subject.spec}: figures"):
        name = names[i]
        own = measured.plain if name == PLAIN else measured.methods[name]
        n = len(own["verdict"])
        found, base = evaluate.compare(codes[:n], own["verdict"]), diversity.plain(n)
        cost = _cost(measured.costs[name], measured.costs[PLAIN])
        mine = base if name == PLAIN else diversity.own(own)
        rows.append(
            {
                "name": name,
                "n": n,
                **{key: as_json(getattr(found, key)) for key in ("before", "wrong", "difference", "corrected", "new")},
                "p": found.p,
                "by_class": {verdicts[code]: _change(change) for code, change in found.by_class.items()},
                **cost,
                "over_budget": cost["calls"]["value"] + cost["products"]["value"] > budget,
                "diversity": {key: against(mine[key], base[key]) for key in base if key in mine},
            }
        )
    return rows


def results_of(measured: Measured, budget: int, progress: Progress) -> dict[str, Any]:
    """Return everything that is told about one model, as plain JSON.

    Args:
        measured: what was computed.
        budget: evaluations and products that a sample may cost on average.
        progress: wraps the loop over methods.
    """
    subject, settings = measured.subject, measured.settings
    return {
        "data": subject.dataset.name,
        "verdicts": list(subject.dataset.verdicts),
        "n": len(measured.plain["verdict"]),
        "budget": budget,
        "groups": GROUPS,
        "sigmas": plain_sigmas(subject.sigmas),
        "gate": {"detector": subject.gate, "flag": subject.flag, "threshold": settings.threshold},
        "window": list(settings.window),
        "settings": repr(settings),
        "calibration": as_json(metrics.rate(measured.calibration["verdict"] != 0)),
        "detectors": _detectors(measured),
        "decision": _decision(measured),
        "mechanism": _mechanism(measured),
        "methods": _methods(measured, budget, progress),
    }
