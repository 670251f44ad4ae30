"""What `fanal geometry` calls: the shape of a model's trajectories, block by block, into a run folder with a page."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal.datasets import get
from fanal.denoiser import counters
from fanal.errors import FanalError
from fanal.exact import Dataset
from fanal.exact.reference import digest, labels_of, reference
from fanal.files import write_tensors
from fanal.generation import identity
from fanal.geometry import alignment, frames, stages, subspace
from fanal.geometry.measures import COMPONENTS, beside, curves, numbers
from fanal.geometry.streaming import Band
from fanal.metrics.estimates import mean
from fanal.preparation import SampleConfig, Setup, prepare, sampling_of
from fanal.runs import Progress, Run, cpu_threads, quiet
from fanal.sampling import trace
from fanal.schedules import plain_sigmas
from fanal.summary import as_json
from fanal.trajectory import Trajectory

__all__ = ["GeometryConfig", "geometry"]


@dataclass(frozen=True)
class GeometryConfig:
    """What the measurement depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`.
        solver, schedule, steps, sigma_min, sigma_max, zero: as in `SampleConfig`.
        count: number of trajectories.
        drawn: how many of them are drawn, and measured for curvature and torsion.
        window: points on each side that curvature and torsion are fitted to.
        data: data set or folder whose exact denoiser is put beside the model; None: none is.
        points: points of it that are used, the first ones.
        label, prompt, negative, guidance: conditions of all trajectories, as in `SampleConfig`.
        seed, allow_bin, block, device, threads: as in `SampleConfig`.
    """

    model: str
    solver: str = "euler"
    schedule: str | None = None
    steps: int = 100
    sigma_min: float | None = None
    sigma_max: float | None = None
    zero: bool = True
    count: int = 256
    drawn: int = 30
    window: int = 5
    data: str | None = None
    points: int = 2000
    label: int | str | None = None
    prompt: str | None = None
    negative: str = ""
    guidance: float | None = None
    seed: int = 0
    allow_bin: bool = False
    block: int = 32
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.steps < COMPONENTS:
            raise FanalError(f"steps must be at least {COMPONENTS}, one per principal component, got {self.steps}")
        if not 1 <= self.drawn <= self.count:
            raise FanalError(f"drawn must be in [1, {self.count}], the number of trajectories, got {self.drawn}")
        if not 2 <= self.window <= self.steps // 2:
            raise FanalError(f"window must be in [2, {self.steps // 2}] for {self.steps} steps, got {self.window}")
        if self.points < 2:
            raise FanalError(f"points must be at least 2, got {self.points}")

    def sampling(self) -> SampleConfig:
        """Return the settings of the same run without its geometry."""
        return sampling_of(self)


def _block(config: GeometryConfig, setup: Setup, exact: Dataset | None, rows: range) -> tuple[dict[str, Tensor], dict]:
    """Run some trajectories and keep their bands, their numbers, and the first ones' projections."""
    begin, model = time.perf_counter(), setup.bound(rows)
    seeds = setup.config.seeds()[rows.start : rows.stop]
    run = Trajectory.record(trace(model, setup.start(rows), setup.sigmas, setup.solver, seeds))
    labels = None if exact is None else labels_of(exact, model, len(rows))
    found = curves(run) | (beside(exact, run, labels) if exact is not None else {})
    tensors = {f"number.{name}": value for name, value in numbers(run).items()}
    for name, values in found.items():
        band = Band.of(values)
        for part in ("mean", "squares", "low", "high"):
            tensors[f"band.{name}.{part}"] = getattr(band, part)
    if exact is not None:
        limits = stages.by_entropy(found["entropy"], run.sigmas[:-1], _flat(exact, labels))
        tensors |= {"stage.entropy.first": limits.first, "stage.entropy.last": limits.last}
    own = max(0, min(len(rows), config.drawn - rows.start))
    if own:
        tensors["curve"] = subspace.project(run.x[:, :own], 2).coordinates.cpu()
    spent = {key: sum(getattr(count, key) for count in counters(model)) for key in ("calls", "evaluations")}
    return tensors, {"seconds": time.perf_counter() - begin, "count": len(rows), **spent}


def _flat(exact: Dataset, labels: Tensor | None) -> float | Tensor:
    """Entropy where all points are alike: one number, or one per sample."""
    own = None if labels is None or exact.counts is None else exact.counts[labels].double().log()
    return math.log(len(exact)) if own is None else own


def _bands(blocks: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> dict[str, Band]:
    """The bands of all blocks together."""
    out: dict[str, Band] = {}
    for tensors, notes in blocks:
        names = {key.split(".")[1] for key in tensors if key.startswith("band.")}
        for name in sorted(names):
            parts = [tensors[f"band.{name}.{part}"] for part in ("mean", "squares", "low", "high")]
            own = Band(notes["count"], *parts)
            out[name] = out[name].merge(own) if name in out else own
    return out


def _shapes(curve: Tensor, sigmas: Tensor, d: int, config: GeometryConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Curvature and torsion of the drawn trajectories, times sigma √d; their alignment, and how alike they are."""
    turned, common, left = alignment.align(curve)
    size = (common - common.mean(0)).norm()
    frenet = frames.frenet(curve, config.window)
    # Per unit of length a run bends most in its last, tiny steps; as sigma falls by a factor of e it moves by sigma √d.
    unit = sigmas * math.sqrt(d)
    curvature, torsion = frenet.curvature * unit, frenet.torsion * unit
    borders = stages.by_curvature(curvature.T, sigmas)
    tensors = {"aligned": turned, "length": frenet.length, "curvature": curvature, "torsion": torsion}
    across = torch.linalg.matrix_norm(turned[:, :, 1:] - common[:, 1:]) / torch.linalg.matrix_norm(common[:, 1:])
    results = {
        "procrustes residual / size": as_json(mean(left / size)),
        "procrustes residual across / size across": as_json(mean(across)),
        "fit error / length": as_json(mean(frenet.error.mean(1) / frenet.length[:, -1])),
        "curved from sigma": as_json(mean(borders.first[~borders.first.isnan()])),
        "curved to sigma": as_json(mean(borders.last[~borders.last.isnan()])),
    }
    return tensors, results


def _results(
    config: GeometryConfig, setup: Setup, blocks: list[tuple[dict[str, Tensor], dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every figure as JSON, and the tensors behind the pictures."""
    bands = _bands(blocks)
    names = [key for key in blocks[0][0] if key.startswith(("number.", "stage."))]
    columns = {name.removeprefix("number."): torch.cat([tensors[name] for tensors, _ in blocks]) for name in names}
    curve = torch.cat([tensors["curve"] for tensors, _ in blocks if "curve" in tensors])
    drawn, shape = _shapes(curve, setup.sigmas, math.prod(setup.network.shape), config)
    results: dict[str, Any] = {
        "sigmas": plain_sigmas(setup.sigmas),
        "d": math.prod(setup.network.shape),
        "numbers": {name: as_json(mean(values[~values.isnan()])) for name, values in columns.items()},
        "shape": shape,
        "bands": {
            name: {part: getattr(band, part).tolist() for part in ("mean", "std", "se", "low", "high")}
            for name, band in bands.items()
        },
    }
    return results, drawn


def _network(blocks: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> Mapping[str, int]:
    return {key: sum(notes[key] for _, notes in blocks) for key in ("calls", "evaluations")}


def geometry(config: GeometryConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet) -> Path:
    """Measure trajectories into a run folder: `run.json`, `geometry.safetensors` and `report.html`.

    Args:
        config: what to measure.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: the configuration or the place does not work, or trajectories start at infinite sigma.
    """
    sampling = config.sampling()
    setup, _ = prepare(sampling)
    if not bool(torch.isfinite(setup.sigmas[0])):
        raise FanalError(f"{config.model} starts at infinite sigma, where nothing has a length: give --sigma-max 80")
    exact = None if config.data is None else reference(get(config.data), setup.network, config.points)
    spans = [range(a, min(a + config.block, config.count)) for a in range(0, config.count, config.block)]
    head, decides = dataclasses.asdict(config), identity(sampling, setup.network)
    decides |= {} if exact is None else {"data": digest(exact.points)}
    with cpu_threads(config.threads), Run(out, "geometry", head, identity=decides, overwrite=overwrite) as run:
        blocks = [
            run.block(i, lambda rows=spans[i]: _block(config, setup, exact, rows))
            for i in progress(range(len(spans)), "trajectories")
        ]
        results, drawn = _results(config, setup, blocks)
        write_tensors(run.path("geometry.safetensors"), drawn)
        seconds = sum(notes["seconds"] for _, notes in blocks)
        run.describe({"network": _network(blocks), "seconds": seconds, "results": results})
        from fanal.report.geometry import write_geometry

        write_geometry(run.part)
        return run.finish()
