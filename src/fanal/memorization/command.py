"""What `fanal audit` calls: samples against their training set, block by block, into a run folder with a page."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fanal import pictures
from fanal.datasets import Dataset as Source
from fanal.datasets import get
from fanal.denoiser import Latent, counters, network_of
from fanal.errors import FanalError
from fanal.exact import Dataset
from fanal.exact.reference import digest, first_points, labels_of, names_of, reference
from fanal.exact.streaming import Points
from fanal.files import write_atomically, write_tensors
from fanal.generation import identity
from fanal.memorization.copies import LEVEL, check_level, copied, neighbors, threshold
from fanal.memorization.settling import ENDS, settling, typical
from fanal.metrics.estimates import auc, mean
from fanal.preparation import SampleConfig, Setup, prepare, sampling_of
from fanal.runs import Block, Progress, Run, cpu_threads, quiet
from fanal.sampling import sample, trace
from fanal.schedules import plain_sigmas
from fanal.summary import as_json
from fanal.trajectory import Trajectory

__all__ = ["AuditConfig", "audit"]

_GALLERY = 40  # pairs in the picture
_MOST_HELD = 10_000
_LOOKED = 512  # states looked up together: one pass over the training points for all of them


@dataclass(frozen=True)
class AuditConfig:
    """What an audit depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`.
        data: data set the model was trained on: its train split is what may be copied, its held-out split says what
            chance looks like.
        solver, schedule, steps, sigma_min, sigma_max, zero: as in `SampleConfig`.
        count: number of samples.
        points: training points that are searched, the first ones; None: all.
        held: held-out points that set the threshold; None: all, at most 10,000.
        level: share of held-out points that the threshold calls copies.
        traced: samples, the first ones, whose runs are followed for when they settle: a random part, as seeds are.
        label, prompt, negative, guidance: conditions of all samples, as in `SampleConfig`.
        seed, allow_bin, block, device, threads: as in `SampleConfig`.
    """

    model: str
    data: str
    solver: str = "heun"
    schedule: str | None = None
    steps: int = 20
    sigma_min: float | None = None
    sigma_max: float | None = None
    zero: bool = True
    count: int = 1000
    points: int | None = None
    held: int | None = None
    level: float = LEVEL
    traced: int = 64
    label: int | str | None = None
    prompt: str | None = None
    negative: str = ""
    guidance: float | None = None
    seed: int = 0
    allow_bin: bool = False
    block: int = 64
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.traced <= self.count:
            raise FanalError(f"traced must be in [0, {self.count}], the number of samples, got {self.traced}")
        if self.points is not None and self.points < 2:
            raise FanalError(f"points must be at least 2, got {self.points}")
        if self.held is not None and self.held < 1:
            raise FanalError(f"held must be at least 1, got {self.held}")
        if self.traced and self.steps < 2:
            raise FanalError("runs of one step settle nowhere: give 2 or more steps, or traced 0")

    def sampling(self) -> SampleConfig:
        """Return the settings of the same run without its audit."""
        return sampling_of(self)


def _sets(config: AuditConfig, setup: Setup) -> tuple[Source, Dataset, Points]:
    """The data, the exact denoiser of the training points, and held-out points."""
    source = get(config.data)
    exact = reference(source, setup.network, config.points)
    if len(exact) < 2:
        raise FanalError(f"{config.data} has one training point: copies are told from two or more")
    held = _held_out(config, setup, exact, source)
    check_level(held.count, config.level)
    return source, exact, held


def _held_out(config: AuditConfig, setup: Setup, exact: Dataset, source: Source) -> Points:
    """Held-out points; for samples of one class, those of that class: others may lie on more dimensions."""
    x, classes = first_points(source, "held out", config.held or _MOST_HELD)
    one = None if config.label in (None, "each") else labels_of(exact, setup.bound(range(1)), 1)
    if one is None or classes is None:
        return Points(x)
    kept = torch.nonzero(classes.cpu() == one)[:, 0]
    if not len(kept):
        raise FanalError(
            f"none of the {len(x)} held-out points of {config.data} is of class {int(one)}, whose samples "
            "they must judge: give a larger --held, or audit all classes"
        )
    return Points(x[kept] if isinstance(x, Tensor) else np.asarray(x[kept.numpy()]))


def _block(config: AuditConfig, setup: Setup, exact: Dataset, rows: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sample one block; runs that are traced are compared with the exact ones."""
    begin, model = time.perf_counter(), setup.bound(rows)
    seeds, start = setup.config.seeds()[rows.start : rows.stop], setup.start(rows)
    tensors: dict[str, Tensor] = {}
    if rows.stop <= config.traced:
        run = Trajectory.record(trace(model, start, setup.sigmas, setup.solver, seeds))
        finite = slice(_finite(setup), None)  # states at infinite sigma lie nowhere among the points
        x, kept = run.x[-1], Trajectory(run.sigmas[finite], run.x[finite], run.denoised[finite])
        found = settling(exact, kept, labels=labels_of(exact, model, len(rows)))
        curves = {"gap": found.gap.T, "entropy": found.entropy.T}  # samples first, as in all blocks
        ends = {name: getattr(found, name) for name in ENDS}
        tensors |= {f"settling.{name}": value for name, value in (curves | ends).items()}
    else:
        x = sample(model, start, setup.sigmas, setup.solver, seeds)
    spent = {key: sum(getattr(count, key) for count in counters(model)) for key in ("calls", "evaluations")}
    return tensors | {"x": x.float()}, {"seconds": time.perf_counter() - begin, **spent}


def _looked(exact: Dataset, x: Tensor, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training points around some states."""
    begin = time.perf_counter()
    found = neighbors(exact, x.reshape(len(x), *exact.shape).to(device))
    tensors = {"ratio": found.ratio, "distance": found.distance, "index": found.index}
    return tensors, {"seconds": time.perf_counter() - begin}


def _finite(setup: Setup) -> int:
    """Place of the first finite level."""
    return int(bool(torch.isinf(setup.sigmas[0])))


class _Stages:
    """The stages of an audit: each is done part by part, shows its progress, and is timed."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.seconds: dict[str, float] = {}
        self.network = {"calls": 0, "evaluations": 0}

    def all(self, what: str, rows: range, size: int, work: Callable[[range], Block]) -> dict[str, Tensor]:
        """Return the tensors of all parts of a stage, put together."""
        stage = what.replace(" ", "-")
        done = list(self.run.blocks(rows, size, work, what=what, progress=self.progress, stage=stage))
        self.seconds[what] = math.fsum(notes["seconds"] for _, notes in done)
        for key in self.network:
            self.network[key] += sum(notes.get(key, 0) for _, notes in done)
        return {name: torch.cat([tensors[name] for tensors, _ in done]) for name in (done[0][0] if done else ())}


def _settled(whole: dict[str, Tensor], config: AuditConfig, setup: Setup) -> dict[str, Any]:
    """Where runs settle, as figures with 95 % intervals, and the curves behind them."""
    if not config.traced:
        return {}
    out: dict[str, Any] = {name: typical(whole[f"settling.{name}"]) for name in ENDS}
    for name in ("gap", "entropy"):
        values = whole[f"settling.{name}"]
        std = values.std(0).nan_to_num()
        se = (std / math.sqrt(len(values))).tolist()
        out[name] = {"mean": values.mean(0).tolist(), "std": std.tolist(), "se": se}
    return {"runs": config.traced, "sigmas": plain_sigmas(setup.sigmas[_finite(setup) : -1]), **out}


def _results(
    config: AuditConfig, setup: Setup, whole: dict[str, Tensor], held: dict[str, Tensor], points: int
) -> dict[str, Any]:
    share = copied(whole["ratio"], held["ratio"], config.level)
    both = torch.cat([whole["ratio"], held["ratio"]])
    is_sample = torch.arange(len(both)) < len(whole["ratio"])
    limit = threshold(held["ratio"], config.level)
    hits = whole["ratio"] < limit
    again = torch.bincount(whole["index"][hits]) if bool(hits.any()) else torch.zeros(1, dtype=torch.int64)
    return {
        "points": points,
        "first only": config.points is not None,
        "copies": dataclasses.asdict(share),
        "threshold": limit,
        "ratio": {"samples": as_json(mean(whole["ratio"])), "held out": as_json(mean(held["ratio"]))},
        "distance": {"samples": as_json(mean(whole["distance"])), "held out": as_json(mean(held["distance"]))},
        "nearer than held-out": as_json(auc(-both, is_sample)),
        "training points copied": int((again > 0).sum()),
        "most often": int(again.max()),
        "settling": _settled(whole, config, setup),
    }


def _closest(whole: dict[str, Tensor]) -> Tensor:
    """The samples with the smallest ratios, in rows of ten."""
    columns = min(10, len(whole["ratio"]))
    order = whole["ratio"].argsort()[: _GALLERY // columns * columns]
    return order[: len(order) // columns * columns]


def _pairs(whole: dict[str, Tensor], source: Source, most: int | None) -> list[dict[str, Any]]:
    """The pairs of the gallery, with the names of the training points' files, or their rows in a file of many."""
    order = _closest(whole)
    names = names_of(source, whole["index"][order].tolist(), most)
    return [
        {"sample": b, "point": int(whole["index"][b]), "name": name, "ratio": float(whole["ratio"][b])}
        for b, name in zip(order.tolist(), names, strict=True)
    ]


def _gallery(whole: dict[str, Tensor], exact: Dataset, decode: Callable[[Tensor], Tensor]) -> Image.Image:
    """The closest samples above their nearest training points, in rows of ten."""
    order, columns = _closest(whole), min(10, len(whole["ratio"]))
    near = exact.points.rows(whole["index"][order][:, None], "cpu", torch.float32)[:, 0]
    pairs = [decode(part.reshape(len(order), *exact.shape)) for part in (whole["x"][order], near)]
    if len(exact.shape) == 1:
        return pictures.beside([pictures.grid(part) for part in pairs])
    rows = [part[a : a + columns] for a in range(0, len(order), columns) for part in pairs]
    return pictures.grid(torch.cat(rows), columns=columns)


def _sampled(stages: _Stages, config: AuditConfig, setup: Setup, exact: Dataset) -> dict[str, Tensor]:
    """All samples, those whose runs are followed first, with their neighbors."""
    edges = (("runs followed", 0, config.traced), ("samples", config.traced, config.count))
    first, rest = (
        stages.all(what, range(a, b), config.block, lambda rows: _block(config, setup, exact, rows))
        for what, a, b in edges
    )
    x = torch.cat([part["x"] for part in (first, rest) if part])
    near = stages.all(
        "neighbors", range(len(x)), _LOOKED, lambda rows: _looked(exact, x[rows.start : rows.stop], config.device)
    )
    return first | {"x": x} | near


def audit(config: AuditConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet) -> Path:
    """Audit a model into a run folder: `run.json`, `samples.safetensors`, `pairs.png` and `report.html`.

    Args:
        config: what to audit.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: the configuration or the place does not work, or the data have another shape than the samples.
    """
    sampling = config.sampling()
    setup, _ = prepare(sampling)
    source, exact, held_out = _sets(config, setup)
    head = dataclasses.asdict(config)
    decides = identity(sampling, setup.network) | {"data": digest(exact.points, held_out)}
    with cpu_threads(config.threads), Run(out, "audit", head, identity=decides, overwrite=overwrite) as run:
        stages = _Stages(run, progress)
        held = stages.all("held-out points", range(held_out.count), _LOOKED, lambda rows: _looked(
            exact, held_out.block(slice(rows.start, rows.stop), torch.float32), config.device
        ))  # fmt: skip
        whole = _sampled(stages, config, setup, exact)
        kept = {name: whole[name] for name in ("x", "ratio", "distance", "index")}
        tensors = kept | {f"held.{name}": held[name] for name in ("ratio", "distance")}
        write_tensors(run.path("samples.safetensors"), tensors)
        network = network_of(setup.network)
        decode = network.decode if isinstance(network, Latent) else lambda x: x
        picture = _gallery(whole, exact, decode)
        write_atomically(run.path("pairs.png"), lambda part: picture.save(part, "PNG"))
        run.describe(
            {
                "network": stages.network,
                "seconds": math.fsum(stages.seconds.values()),
                "stages": stages.seconds,
                "results": _results(config, setup, whole, held, len(exact))
                | {"closest": _pairs(whole, source, config.points)},
            }
        )
        from fanal.report import write_report

        write_report(run.part)
        return run.finish()
