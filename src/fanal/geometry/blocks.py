"""One block of a geometry run: its trajectories measured, and little enough of them kept."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fanal.denoiser import Model, counters
from fanal.exact import Dataset
from fanal.exact.reference import labels_of
from fanal.geometry import stages, subspace
from fanal.geometry.arrival import Arrival
from fanal.geometry.diagnosis import Diagnosis, diagnose
from fanal.geometry.drawn import drawn_tensors
from fanal.geometry.likelihood import ascent
from fanal.geometry.measures import measure
from fanal.geometry.streaming import Band
from fanal.preparation import Setup
from fanal.runs import Block
from fanal.sampling import trace
from fanal.trajectory import Trajectory

__all__ = ["Gathering", "measured_block", "projected_block"]

_PARTS = ("mean", "squares", "low", "high")


def _bands(curves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Curves (N, B) reduced to what bands are merged from."""
    bands = {name: Band.of(values) for name, values in curves.items()}
    return {f"band.{name}.{part}": getattr(band, part) for name, band in bands.items() for part in _PARTS}


@dataclass(eq=False)
class Gathering:
    """What is kept of all blocks, merged as they come: more trajectories need no more memory.

    Attributes:
        bands: by name.
        numbers: by name, of the trajectories that have the number; None where none has.
        parts: other tensors, which the first trajectories alone have.
        spent: sums of the blocks' notes.
    """

    bands: dict[str, Band] = field(default_factory=dict)
    numbers: dict[str, Band | None] = field(default_factory=dict)
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    spent: dict[str, Any] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        """Take one block."""
        tensors, notes = block
        for name in dict.fromkeys(key.split(".")[1] for key in tensors if key.startswith("band.")):
            own = Band(notes["count"], *(tensors[f"band.{name}.{part}"] for part in _PARTS))
            self.bands[name] = self.bands[name].merge(own) if name in self.bands else own
        for key in (key for key in tensors if key.startswith("number.")):
            name, values = key.removeprefix("number."), tensors[key]
            known, before = values[~values.isnan()], self.numbers.get(name)
            own = Band.of(known[None]) if len(known) else None
            self.numbers[name] = before.merge(own) if before and own else before or own
        rest = {key: value for key, value in tensors.items() if not key.startswith(("band.", "number."))}
        self.parts += [rest] if rest else []
        self.spent = {key: self.spent.get(key, 0) + value for key, value in notes.items()}

    def stack(self, name: str) -> Tensor:
        """Return a tensor of all blocks that have it, sample by sample."""
        return torch.cat([tensors[name] for tensors in self.parts if name in tensors])


def _spent(model: Model, rows: range, begin: float) -> dict[str, Any]:
    spent = {key: sum(getattr(count, key) for count in counters(model)) for key in ("calls", "evaluations")}
    return {"seconds": time.perf_counter() - begin, "count": len(rows), **spent}


def _flat(exact: Dataset, labels: Tensor | None) -> float | Tensor:
    """Entropy where all points are alike: one number, or one per sample."""
    own = None if labels is None or exact.counts is None else exact.counts[labels].double().log()
    return math.log(len(exact)) if own is None else own


def _beside(exact: Dataset, model: Model, setup: Setup, run: Trajectory) -> tuple[dict, dict, Diagnosis]:
    """Curves and numbers of the score's diagnosis, of likelihood, and of the posterior's stages."""
    labels = labels_of(exact, model, run.x.shape[1])
    found = diagnose(model, exact, run, setup.solver, run.seeds, labels)
    grown = ascent(exact, run, labels=labels, found=found.optimal)
    rises = {"assumption met": grown.assumed, "state rises": grown.state, "prediction rises": grown.prediction}
    curves = found.curves | {name: hits.double() for name, hits in rises.items()} | {"d1 / d2": grown.ratio}
    limits = stages.by_entropy(found.curves["entropy"], run.sigmas[:-1], _flat(exact, labels))
    numbers = found.numbers | {name: hits.double().mean(0) for name, hits in rises.items()}
    numbers |= {"stage.entropy.first": limits.first, "stage.entropy.last": limits.last}
    return curves, numbers, found


def measured_block(
    setup: Setup,
    exact: Dataset | None,
    rows: range,
    drawn: int,
    images: Tensor | None = None,
    arrival: Arrival | None = None,
) -> Block:
    """Run some trajectories and keep their bands, their numbers, and of the first ones projections and pictures.

    Args:
        setup: the run.
        exact: of the data, where the model is put beside them.
        rows: which trajectories.
        drawn: how many of the run's first ones are drawn.
        images: (B, *shape), real images whose codes, or which with noise added, the run begins at.
        arrival: features of the data, where states and predictions are compared with them.
    """
    begin, model = time.perf_counter(), setup.bound(rows)
    seeds = setup.config.seeds()[rows.start : rows.stop]
    run = Trajectory.record(trace(model, setup.start(rows), setup.sigmas, setup.solver, seeds))
    measured, found = measure(run), None
    curves, numbers = measured.curves, measured.numbers
    if exact is not None:
        more, plain, found = _beside(exact, model, setup, run)
        curves, numbers = curves | more, numbers | plain
    noised = None
    if images is not None:
        own, how = images[rows.start : rows.stop], "encoded" if setup.config.noise else "noised"
        off = (run.x[-1].cpu() - own).flatten(1).double()
        numbers[f"end to {how} image / sqrt d"] = off.norm(dim=1) / math.sqrt(off.shape[1])
        noised = own if how == "noised" else None
    tensors = _bands(curves) | {f"number.{name}": value for name, value in numbers.items()}
    few = max(0, min(len(rows), drawn - rows.start))
    tensors |= {"curve": measured.coordinates[:few, :, :3].cpu()} if few else {}
    tensors |= drawn_tensors(setup, model, run, exact, found, range(rows.start, rows.start + few), noised)
    tensors |= {} if arrival is None else arrival.features(run, rows)
    return tensors, _spent(model, rows, begin)


def projected_block(setup: Setup, rows: range) -> Block:
    """Run some trajectories of another model and keep their projections alone."""
    begin, model = time.perf_counter(), setup.bound(rows)
    seeds = setup.config.seeds()[rows.start : rows.stop]
    run = Trajectory.record(trace(model, setup.start(rows), setup.sigmas, setup.solver, seeds))
    return {"curve": subspace.project(run.x, 2).coordinates.cpu()}, _spent(model, rows, begin)
