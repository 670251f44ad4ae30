"""Guided hallucination: does guidance of a conditional network raise or lower the share of wrong samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fanal import metrics
from fanal.bench.plans import Found
from fanal.bench.quality import dataset_of
from fanal.bench.support_studies import NONLINEAR, Block, nonlinear
from fanal.datasets import Dataset
from fanal.denoiser import Labelled, Model, evaluations, network_of
from fanal.errors import FanalError
from fanal.guidance import ClassifierFree, Window
from fanal.loading import card, load
from fanal.sampling import sample, trace
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Euler
from fanal.summary import as_json
from fanal.trajectory import Trajectory

__all__ = ["Subject", "deciding", "guided_blocks", "guided_results"]

_TUNING = 2**41  # seeds that the interval is chosen on
_BLOCK, _REAL = 64, 1000
_SCALES = (1.0, 2.0, 4.0, 8.0)
_WHERE = ("everywhere", "turning", "deciding", "core")
_CORE = (0.25, 0.75)  # shares of the deciding between which its core lies


@dataclass(frozen=True, eq=False)
class Subject:
    """A conditional model whose data have a rule.

    Attributes:
        model: with labels.
        dataset: judges its samples.
        classes: how many there are.
    """

    model: Model
    dataset: Dataset
    classes: int

    @classmethod
    def of(cls, spec: str) -> Subject:
        """Load a model.

        Raises:
            FanalError: it takes no labels, or its data have no rule.
        """
        model, about = load(spec), card(spec)
        classes = int(getattr(network_of(model), "classes", 0))
        named = about.get("data") or about.get("recipe", {}).get("data")  # unjudged models name their data there alone
        dataset = dataset_of({"data": named}, model)
        if not classes or not dataset.verdicts or not dataset.classes:
            raise FanalError(
                f"{spec} must take class labels and its card must name data with a rule and classes: train one with "
                "fanal train shapes32 --conditional --label-dropout 0.15 --out DIR"
            )
        return cls(model, dataset, classes)

    def guided(self, labels: Tensor, scale: float, window: Window | None) -> Model:
        """Return the model under guidance; at scale 1 the plain conditional one."""
        told, free = Labelled(self.model, labels), Labelled(self.model, self.classes)
        return ClassifierFree(told, free, scale, window)


def _start(subject: Subject, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    labels = torch.tensor([seed % subject.classes for seed in seeds])
    return noise(subject.model.shape, seeds, subject.model.sigma_max), labels


def deciding(differences: Tensor, sigmas: Tensor, shares: tuple[float, float] = NONLINEAR) -> Window:
    """Return where the condition matters: between two shares of `∫ ‖D_c − D_u‖ d log sigma`, as runs fall through it.

    Args:
        differences: (N,), mean distance of both predictions at the start of each interval.
        sigmas: (N + 1,), the grid; it may end at 0.
        shares: of the integral, at the window's begin and end.
    """
    ends = torch.where(sigmas[1:] > 0, sigmas[1:], sigmas[:-1])
    share = (differences * (sigmas[:-1] / ends).log()).cumsum(0)
    first, last = (int((share >= level * share[-1]).nonzero()[0]) for level in shares)
    return float(ends[last]), float(sigmas[first])


def _windows(subject: Subject, steps: int, count: int) -> dict[str, Window]:
    """Where runs of the conditional model turn, and where they part from those without a label; on tuning seeds."""
    seeds = range(_TUNING, _TUNING + count)
    x, labels = _start(subject, seeds)
    grid = polynomial(steps, subject.model.sigma_min, subject.model.sigma_max)
    with torch.no_grad():
        run = Trajectory.record(trace(subject.guided(labels, 1.0, None), x, grid, Euler()))
        free = [subject.guided(labels, 0.0, None)(x, sigma) for x, sigma in zip(run.x[:-1], run.sigmas, strict=False)]
    apart = (run.denoised - torch.stack(free)).flatten(2).norm(dim=2).mean(1).double()
    return {
        "turning": nonlinear(run.x.double(), run.sigmas),
        "deciding": deciding(apart, run.sigmas),
        "core": deciding(apart, run.sigmas, _CORE),
    }


def _present(subject: Subject, x: Tensor) -> Tensor | None:
    """The class that the verifier sees in each sample; None where classes are not sets of shapes."""
    seen = subject.dataset.measure(x.float())
    kinds = [name for name in ("triangles", "squares", "pentagons") if name in seen]
    if len(kinds) < 3:
        return None
    return sum((seen[name].clamp_max(1) << k for k, name in enumerate(kinds)), torch.zeros(len(x)).long()) - 1


def _run(subject: Subject, scale: float, window: Window | None, steps: int, seeds: range) -> dict[str, Tensor]:
    x, labels = _start(subject, seeds)
    model = subject.guided(labels, scale, window)
    before = evaluations(model)
    grid = polynomial(steps, subject.model.sigma_min, subject.model.sigma_max)
    end = sample(model, x, grid, Euler(), seeds)
    spent = torch.full((len(seeds),), (evaluations(model) - before) / len(seeds))
    out = {"verdict": subject.dataset.verify(end.float()), "evaluations": spent, "x": end.half()}
    shown = _present(subject, end)
    return out if shown is None else out | {"asked": (shown == labels).long()}


def guided_blocks(spec: str, count: int, steps: int, first: int) -> list[Block]:
    """Return one block for the windows, and then one per scale, window and batch of samples.

    Args:
        spec: of the model.
        count: samples of each setting.
        steps: of each run.
        first: seed of the first sample.

    Raises:
        FanalError: the model does not serve.
    """
    subject = Subject.of(spec)

    def choose(found: Sequence[Found]) -> Found:
        windows = _windows(subject, steps, min(32, count))
        about = {"part": "windows", "windows": windows, "model": spec, "steps": steps}
        tensors = {name: torch.tensor(window, dtype=torch.float64) for name, window in windows.items()}
        return tensors, {"study": "hallucination", "cells": [], "guided": about}

    def work(found: Sequence[Found], scale: float, where: str, seeds: range) -> Found:
        chosen = next(tensors for tensors, notes in found if notes.get("guided", {}).get("part") == "windows")
        window = None if where == "everywhere" else (float(chosen[where][0]), float(chosen[where][1]))
        notes = {"study": "hallucination", "cells": [], "guided": {"part": "samples", "scale": scale, "where": where}}
        return _run(subject, scale, window, steps, seeds), notes

    blocks: list[Block] = [choose]
    for begin in range(first, first + count, _BLOCK):  # batch by batch, so that a stopped run has every setting
        seeds = range(begin, min(begin + _BLOCK, first + count))
        for scale in _SCALES:
            for where in _WHERE if scale != 1 else _WHERE[:1]:
                blocks.append(lambda found, scale=scale, where=where, seeds=seeds: work(found, scale, where, seeds))
    return blocks


def _setting(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def guided_results(spec: str, found: Sequence[Found]) -> dict[str, Any]:
    """Return the figures of the study: rates, changes on the same noise, diversity among right samples.

    Args:
        spec: of the model.
        found: all blocks.
    """
    own = [(tensors, notes["guided"]) for tensors, notes in found if notes["study"] == "hallucination"]
    about = next(notes for _, notes in own if notes["part"] == "windows")
    dataset = Subject.of(spec).dataset
    real = dataset.data("held out", _REAL).x
    true = dataset.measure(real)
    groups: dict[tuple[float, str], list[dict[str, Tensor]]] = {}
    for tensors, notes in own:
        if notes["part"] == "samples":
            groups.setdefault((notes["scale"], notes["where"]), []).append(tensors)
    plain, rows = _setting(groups[1.0, _WHERE[0]])["verdict"] != 0, []
    for (scale, where), parts in groups.items():
        whole = _setting(parts)
        wrong, x = whole["verdict"] != 0, whole["x"].float()
        row: dict[str, Any] = {"scale": scale, "where": where, "n": len(wrong)}
        row["wrong"] = as_json(metrics.rate(wrong))
        row["change"] = as_json(metrics.paired_rate(plain, wrong))
        row["verdicts"] = torch.bincount(whole["verdict"], minlength=len(dataset.verdicts)).tolist()
        row["evaluations"] = float(whole["evaluations"].mean())
        row["spread"] = as_json(metrics.spread(x, real))
        if "asked" in whole:
            row["asked"] = as_json(metrics.rate(whole["asked"] > 0))
        if int((~wrong).sum()) >= 8:
            seen = dataset.measure(x[~wrong])
            row["diversity"] = {name: as_json(metrics.std_ratio(seen[name], true[name])) for name in dataset.features}
        rows.append(row)
    return {**about, "verdicts": list(dataset.verdicts), "rows": rows}
