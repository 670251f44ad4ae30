"""Cards: judge a trained model by the verifier of its data, calibrate its detector, and write both down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal import metrics
from fanal.config import build_schedule, build_solver
from fanal.datasets import DATASETS, Dataset
from fanal.denoiser import Model
from fanal.errors import FanalError
from fanal.hallucination.calibration import FLAG, HINTS, Calibration, calibrate_each, window_of
from fanal.hallucination.detectors import FREE, build
from fanal.hallucination.repair import watch_seeds
from fanal.nets import Preconditioned, load_model, read_card, save_model
from fanal.runs import Progress, quiet

__all__ = ["REPORT_SEED", "evaluate_model", "wrong_of"]

REPORT_SEED = 2**42
"""Figures on new cards come from seeds that start here; settings are tuned on seeds below, from 2**41."""

_SOLVER, _SCHEDULE, _STEPS = "euler", "polynomial", 40
_BLOCK = 64


def wrong_of(dataset: Dataset) -> Callable[[Tensor], Tensor] | None:
    """Return what tells a data set's wrong samples, or None where it has no verifier."""
    if not dataset.verdicts:
        return None
    return lambda x: dataset.verify(x.float().cpu()) != 0


def _calibrations(
    model: Model, dataset: Dataset | None, count: int, flag: float, device: str, progress: Progress
) -> dict[str, Calibration]:
    """Calibrate every free detector for Euler on Karras' 40-step grid, all in one run."""
    sigmas = build_schedule(_SCHEDULE, _STEPS, model.sigma_min, model.sigma_max)
    verify = wrong_of(dataset) if dataset else None
    names = FREE if verify else ("variance",)
    data = dataset.name if dataset else ""
    return calibrate_each(
        model,
        sigmas,
        build_solver(_SOLVER),
        {name: build(name, window_of(name, sigmas, data)) for name in names},
        solver_name=_SOLVER,
        count=count,
        flag=flag,
        block=_BLOCK,
        device=device,
        verify=verify,
        progress=lambda items: progress(items, "calibrating"),
    )


def _judge(
    model: Model, dataset: Dataset, chosen: Calibration, count: int, device: str, progress: Progress
) -> dict[str, Any]:
    """Measure the share of wrong samples and the detector's AUC on the report seeds."""
    sigmas = torch.tensor(chosen.sigmas, dtype=torch.float64)
    detector, solver = chosen.build(), build_solver(chosen.solver)
    codes, risks = [], []
    seeds = range(REPORT_SEED, REPORT_SEED + count)
    for outcome in watch_seeds(
        model,
        sigmas,
        solver,
        detector,
        seeds,
        block=_BLOCK,
        device=device,
        progress=lambda items: progress(items, "judging"),
    ):
        codes.append(dataset.verify(outcome.x.float().cpu()))
        risks.append(outcome.risk)
    code, risk = torch.cat(codes), torch.cat(risks)
    area = metrics.auc(risk, code != 0)
    found = {
        name: round(float((code == i).double().mean()), 6)
        for i, name in enumerate(dataset.verdicts)
        if bool((code == i).any())
    }
    figures: dict[str, Any] = {
        "hallucination": {
            **dataclasses.asdict(metrics.rate(code != 0)),
            "first_seed": REPORT_SEED,
            "solver": f"{chosen.solver}, {_SCHEDULE} schedule, {_STEPS} steps",
            "verdicts": found,
        }
    }
    if area.se == area.se:  # NaN is no JSON, and with one wrong sample there is nothing to say
        figures["detection"] = {"auc": area.value, "se": area.se, "detector": chosen.detector}
    return figures


def evaluate_model(
    folder: str | Path, *, count: int = 1024, device: str = "cpu", progress: Progress = quiet
) -> dict[str, Any]:
    """Calibrate a model's detector on one set of seeds, judge the model on another, and write both into its card.

    The free detector with the highest AUC on the calibration seeds is kept; without a verifier it is the trajectory
    variance, and nothing is judged.

    Args:
        folder: a model folder that training wrote.
        count: samples for each of the two.
        device: where the network runs.
        progress: wraps loops over blocks, given what they do.

    Returns:
        The card.

    Raises:
        FanalError: the folder is no model folder, or cannot be written.
    """
    if count < 8:
        raise FanalError(f"a calibration needs at least 8 samples, got {count}")
    model: Preconditioned = load_model(folder).to(device)
    card = read_card(folder)
    data = card["recipe"]["data"]
    dataset = DATASETS.get(data)
    hints = HINTS.get(data, {})
    flag = hints.get("flag", FLAG)
    found = _calibrations(model, dataset, count, flag, device, progress)
    chosen = max(found.values(), key=lambda c: c.auc if c.auc is not None else 0.0)
    parameters = f"{card['parameters']:,} parameters"
    card |= {"summary": f"{type(model.net).__name__} on {data}, {parameters}", "data": data, "flag": flag}
    card |= {"calibration": chosen.to_dict(), "repair": hints.get("repair", {})}
    if dataset is not None and dataset.verdicts:
        card |= _judge(model, dataset, chosen, count, device, progress)
    save_model(folder, model.cpu(), card)
    return card
