"""Guided hallucination: does guidance of a conditional network raise or lower the share of wrong samples, and does it
help to guide in the critical steps of [RODS] alone.

Windows are found on tuning seeds and reported on others. Each holds a quarter of the steps, so that all cost the same:
the critical one, where the index exceeds its threshold most often, and as controls the first steps of a run, those
right above the critical ones and those right below. The core is where the condition decides most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fanal import metrics
from fanal.bench.hallucination_diversity import Figure, Real, against, figures
from fanal.bench.plans import Found
from fanal.bench.quality import dataset_of
from fanal.bench.support_studies import Block
from fanal.datasets import Dataset
from fanal.denoiser import Labelled, Model, evaluations, network_of
from fanal.errors import FanalError
from fanal.guidance import ClassifierFree, Window
from fanal.hallucination.critical import CriticalSteps, critical_steps, index_path
from fanal.loading import card, load
from fanal.metrics.features import is_image
from fanal.pictures import to_bytes
from fanal.sampling import sample, trace
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Euler
from fanal.summary import as_json

__all__ = ["Subject", "busiest", "deciding", "guided_blocks", "guided_results", "guided_settings", "placed"]

_TUNING = 2**41  # seeds that the windows are found on
_TUNED, _BLOCK, _REAL = 256, 64, 2048
_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
_WHERE = ("everywhere", "critical", "first", "above", "below", "core")
_PART = 4  # a window holds this part of the steps
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


def deciding(differences: Tensor, sigmas: Tensor, shares: tuple[float, float] = _CORE) -> Window:
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


def busiest(hits: Float[Tensor, " n"], length: int) -> int:
    """Return the first of the `length` successive steps that have the most hits together; of equals, the earliest.

    Args:
        hits: (N,), by step, at least as many as `length`.
        length: how many steps.
    """
    return int(hits.double().unfold(0, length, 1).sum(1).argmax())


def placed(first: int, length: int, sigmas: Float[Tensor, " m"]) -> dict[str, Window]:
    """Return the critical window and its controls, all of as many steps, pushed inside where there are too few.

    Args:
        first: the first critical step.
        length: how many steps each has.
        sigmas: (N + 1,), the grid.
    """
    most = len(sigmas) - 1 - length
    begins = {"critical": first, "first": 0, "above": max(first - length, 0), "below": min(first + length, most)}
    return {name: (float(sigmas[k + length - 1]), float(sigmas[k])) for name, k in begins.items()}


def _profile(found: CriticalSteps) -> dict[str, Any]:
    return {
        "threshold": found.threshold,
        "share": [each.value for each in found.share],
        "largest": found.largest.tolist(),
    }


def _windows(subject: Subject, steps: int, count: int) -> tuple[dict[str, Window], dict[str, Any]]:
    """The windows, and how the index of [RODS] runs: of the residual, threshold reached by one sample in five."""
    seeds = range(_TUNING, _TUNING + count)
    grid = polynomial(steps, subject.model.sigma_min, subject.model.sigma_max)
    apart, index = [], []
    for begin in range(0, count, _BLOCK):
        x, labels = _start(subject, seeds[begin : begin + _BLOCK])
        told, free = subject.guided(labels, 1.0, None), subject.guided(labels, 0.0, None)
        with torch.no_grad():
            for transition in trace(told, x, grid, Euler()):
                other = free(transition.x, transition.span.sigma)
                apart.append((transition.step.denoised - other).flatten(1).norm(dim=1).double())
        index.append(index_path(told, x, grid))
    found = critical_steps(torch.cat(index, 1), grid)
    length = max(1, steps // _PART)
    hits = torch.tensor([each.value for each in found.share])
    first = busiest(hits, length)
    parted = torch.cat([torch.stack(apart[k : k + steps]) for k in range(0, len(apart), steps)], 1).mean(1)
    inside = float(hits[first : first + length].sum() / hits.sum())
    about = {"sigmas": grid.tolist(), "first": first, "length": length, "inside": inside, **_profile(found)}
    return {**placed(first, length, grid), "core": deciding(parted, grid)}, about


def _present(subject: Subject, x: Tensor) -> Tensor | None:
    """The class that the verifier sees in each sample; None where classes are not sets of shapes."""
    seen = subject.dataset.measure(x.float())
    kinds = [name for name in ("triangles", "squares", "pentagons") if name in seen]
    if len(kinds) < 3:
        return None
    return sum((seen[name].clamp_max(1) << k for k, name in enumerate(kinds)), torch.zeros(len(x)).long()) - 1


def _run(
    subject: Subject, extract: metrics.Extractor, scale: float, window: Window | None, steps: int, seeds: range
) -> dict[str, Tensor]:
    x, labels = _start(subject, seeds)
    model = subject.guided(labels, scale, window)
    before = evaluations(model)
    grid = polynomial(steps, subject.model.sigma_min, subject.model.sigma_max)
    end = sample(model, x, grid, Euler(), seeds)
    spent = torch.full((len(seeds),), (evaluations(model) - before) / len(seeds))
    out = {"evaluations": spent, "x": end.half(), **_judged(subject.dataset, extract, end)}
    shown = _present(subject, end)
    return out if shown is None else out | {"asked": (shown == labels).long()}


def _extractor(dataset: Dataset) -> metrics.Extractor:
    return metrics.extractor("own" if is_image(dataset.shape) else "pixels")


def _judged(dataset: Dataset, extract: metrics.Extractor, x: Tensor) -> dict[str, Tensor]:
    """Verdicts, features and what the verifier measures."""
    known = dataset.measure(x.float())
    features = extract(to_bytes(x) if is_image(dataset.shape) else x)
    factors = {f"factor.{name}": known[name] for name in dataset.features}
    return {"verdict": dataset.verify(x.float()), "features": features, **factors}


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
    extract = _extractor(subject.dataset)

    def choose(found: Sequence[Found]) -> Found:
        windows, index = _windows(subject, steps, min(_TUNED, max(8, count // 8)))
        about = {"part": "windows", "windows": windows, "index": index, "model": spec, "steps": steps}
        tensors = {name: torch.tensor(window, dtype=torch.float64) for name, window in windows.items()}
        return tensors, {"study": "hallucination", "cells": [], "guided": about}

    def work(found: Sequence[Found], scale: float, where: str, seeds: range) -> Found:
        chosen = next(tensors for tensors, notes in found if notes.get("guided", {}).get("part") == "windows")
        window = None if where == "everywhere" else (float(chosen[where][0]), float(chosen[where][1]))
        notes = {"study": "hallucination", "cells": [], "guided": {"part": "samples", "scale": scale, "where": where}}
        return _run(subject, extract, scale, window, steps, seeds), notes

    blocks: list[Block] = [choose]
    for begin in range(first, first + count, _BLOCK):  # batch by batch, so that a stopped run has every setting
        seeds = range(begin, min(begin + _BLOCK, first + count))
        for scale in _SCALES:
            for where in _WHERE if scale > 1 else _WHERE[:1]:
                blocks.append(lambda found, scale=scale, where=where, seeds=seeds: work(found, scale, where, seeds))
    return blocks


def guided_settings(found: Sequence[Found]) -> dict[tuple[float, str], dict[str, Tensor]]:
    """Return what each setting's samples are judged as, all batches together; nothing without this study.

    Args:
        found: all blocks.
    """
    groups: dict[tuple[float, str], list[dict[str, Tensor]]] = {}
    for tensors, notes in found:
        if notes.get("guided", {}).get("part") == "samples":
            groups.setdefault((notes["guided"]["scale"], notes["guided"]["where"]), []).append(tensors)
    return {key: {name: torch.cat([row[name] for row in rows]) for name in rows[0]} for key, rows in groups.items()}


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("factor."): value for name, value in sorted(tensors.items()) if name.startswith("factor.")
    }


def _diversity(own: Mapping[str, Tensor], real: Real) -> dict[str, Figure]:
    return figures(own["features"], _factors(own), own["verdict"] == 0, real)


def _row(
    key: tuple[float, str], settings: Mapping[tuple[float, str], dict[str, Tensor]], dataset: Dataset, real: Tensor
) -> dict[str, Any]:
    """Rates of one setting, and their changes on the same noise."""
    own, (scale, where) = settings[key], key
    wrong = own["verdict"] != 0
    row: dict[str, Any] = {"scale": scale, "where": where, "n": len(wrong), "wrong": as_json(metrics.rate(wrong))}
    others = {
        "change": (1.0, _WHERE[0]),
        "against everywhere": (scale, _WHERE[0]),
        "against critical": (scale, "critical"),
    }
    for name, other in others.items():
        if other in settings:
            row[name] = as_json(metrics.paired_rate(settings[other]["verdict"] != 0, wrong))
    row["verdicts"] = torch.bincount(own["verdict"], minlength=len(dataset.verdicts)).tolist()
    row["evaluations"] = float(own["evaluations"].mean())
    row["spread"] = as_json(metrics.spread(own["x"].float(), real))
    if "asked" in own:
        row["asked"] = as_json(metrics.rate(own["asked"] > 0))
        row["served"] = as_json(metrics.rate(_served(own)))
        row["served change"] = as_json(metrics.paired_rate(_served(settings[others["change"]]), _served(own)))
    return row


def _served(own: Mapping[str, Tensor]) -> Tensor:
    """Which samples are right and show what was asked for."""
    return (own["asked"] > 0) & (own["verdict"] == 0)


def guided_results(spec: str, found: Sequence[Found]) -> dict[str, Any]:
    """Return the figures of the study: rates, changes on the same noise, diversity against no guidance.

    Args:
        spec: of the model.
        found: all blocks.
    """
    about = next(notes["guided"] for _, notes in found if notes.get("guided", {}).get("part") == "windows")
    settings = guided_settings(found)
    dataset = Subject.of(spec).dataset
    held = dataset.data("held out", _REAL).x
    judged = _judged(dataset, _extractor(dataset), held)
    real = Real.of(judged["features"], _factors(judged))
    plain, rows = _diversity(settings[1.0, _WHERE[0]], real), []
    for key, tensors in settings.items():
        row, varied = _row(key, settings, dataset, held), _diversity(tensors, real)
        row["diversity"] = {name: against(varied[name], plain[name]) for name in varied if name in plain}
        rows.append(row)
    return {**about, "verdicts": list(dataset.verdicts), "rows": rows}
