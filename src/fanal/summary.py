"""The figures of a run: one row per method, each figure with its standard error, errors by kind, diversity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fanal import metrics
from fanal.datasets import Dataset

__all__ = ["as_json", "estimated", "summarize"]

_REAL = 1000  # held-out samples that diversity is measured against


def as_json(value: metrics.Estimate) -> dict[str, float | int | None]:
    """Return an estimate as plain JSON, where NaN is null."""
    fields = dataclasses.asdict(value)
    return {key: None if number != number else number for key, number in fields.items()}


def estimated(found: Mapping[str, Any]) -> metrics.Estimate:
    """Return the estimate that `as_json` wrote, where null, or what is left out, is NaN."""
    value, se = (math.nan if found.get(key) is None else float(found[key]) for key in ("value", "se"))
    return metrics.Estimate(value, se, int(found.get("n", 0)))


def _judged(x: Tensor, codes: Tensor, before: Tensor, dataset: Dataset, tail: str) -> dict[str, Any]:
    """What a verifier adds to a row."""
    wrong, real = codes != 0, dataset.data("held out", _REAL).x
    row: dict[str, Any] = {
        "wrong": as_json(metrics.rate(wrong)),
        "verdicts": torch.bincount(codes, minlength=len(dataset.verdicts)).tolist(),
    }
    if tail:
        row["change"] = as_json(metrics.paired_rate(before, wrong))
        row["corrected"] = as_json(metrics.rate(~wrong[before]))
        row["newly_wrong"] = as_json(metrics.rate(wrong & ~before))
    if len(x) >= 3:
        row["spread"] = as_json(metrics.spread(x, real))
    if int((~wrong).sum()) >= 8:
        seen, true = dataset.measure(x[~wrong].float()), dataset.measure(real)
        row["diversity"] = {name: as_json(metrics.std_ratio(seen[name], true[name])) for name in dataset.features}
    return row


def summarize(
    whole: dict[str, Tensor], seconds: dict[str, Tensor], methods: list[str], dataset: Dataset | None
) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        whole: the run's tensors by name; those of a repair end in `.NAME`.
        seconds: per method, seconds per sample of each block.
        methods: "plain", then the repairs.
        dataset: judges the samples, where there is a verifier.
    """
    before = whole["verdict"] != 0 if dataset else torch.zeros(len(whole["x"]), dtype=torch.bool)
    rows = []
    for name in methods:
        tail = "" if name == "plain" else f".{name}"
        row: dict[str, Any] = {
            "name": name,
            "evaluations": as_json(metrics.mean(whole[f"evaluations{tail}"])),
            "seconds": as_json(metrics.mean(seconds[name])),
        }
        if dataset is not None:
            row |= _judged(whole[f"x{tail}"], whole[f"verdict{tail}"], before, dataset, tail)
        rows.append(row)
    results: dict[str, Any] = {"table": rows}
    if dataset is not None:
        risk, codes = whole["risk"], whole["verdict"]
        results["verdicts"] = list(dataset.verdicts)
        results["auc"] = as_json(metrics.auc(risk, codes != 0))
        results["auc_by_verdict"] = {
            name: as_json(metrics.auc(risk[rows_of], codes[rows_of] == k))
            for k, name in enumerate(dataset.verdicts)
            if k and bool((codes == k).any())
            for rows_of in [(codes == 0) | (codes == k)]
        }
    return results
