"""What `fanal geometry` calls: the shape of a model's trajectories, block by block, into a run folder with a page."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fanal.datasets import get
from fanal.errors import FanalError
from fanal.exact.reference import digest, reference
from fanal.files import read_tensors, write_tensors
from fanal.generation import identity
from fanal.geometry.arrival import Arrival, arrival_of
from fanal.geometry.blocks import Gathering, measured_block, projected_block
from fanal.geometry.groups import Rival, rival_of
from fanal.geometry.measures import COMPONENTS
from fanal.geometry.results import results_of
from fanal.preparation import SampleConfig, Setup, prepare, sampling_of
from fanal.runs import Block, Progress, Run, cpu_threads, quiet
from fanal.seeding import noise

__all__ = ["GeometryConfig", "geometry"]

_DATA_BLOCK = 500  # points whose features are kept at a time
_WINDOW = 5
_WINDOW_SHARE = 20  # of the steps: in narrower windows float32's rounding decides torsion


@dataclass(frozen=True)
class GeometryConfig:
    """What the measurement depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`.
        solver, schedule, steps, sigma_min, sigma_max, zero: as in `SampleConfig`.
        count: number of trajectories.
        drawn: how many of them are drawn, measured for curvature and torsion, and compared with others.
        window: points on each side that curvature and torsion are fitted to; None: the larger of 5 and a twentieth of
            the steps, at most half of them.
        against: models, or run folders of this command, whose trajectories are compared with these.
        data: data set or folder whose exact denoiser is put beside the model; None: none is.
        points: points of it that are used, the first ones.
        noise: file of unit noise to start from, as `fanal encode` writes it of real images; None: the seeds' own.
        images: data set or folder whose first training points the runs start from, with the seeds' noise of the first
            sigma added; None: from noise alone.
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
    window: int | None = None
    against: tuple[str, ...] = ()
    data: str | None = None
    points: int = 2000
    noise: str | None = None
    images: str | None = None
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
        if self.window is None:
            wide = max(_WINDOW, self.steps // _WINDOW_SHARE)
            object.__setattr__(self, "window", min(wide, self.steps // 2))
        if not 2 <= self.fitted <= self.steps // 2:
            raise FanalError(f"window must be in [2, {self.steps // 2}] for {self.steps} steps, got {self.window}")
        if len({self.model, *self.against}) <= len(self.against):
            raise FanalError(f"what is compared with {self.model} is given once each, got {', '.join(self.against)}")
        if self.noise is not None and self.images is not None:
            raise FanalError("runs start from a file of noise or from noised images: give one of noise and images")
        if self.points < 2:
            raise FanalError(f"points must be at least 2, got {self.points}")

    @property
    def fitted(self) -> int:
        """The window, settled."""
        return int(self.window or 0)

    def sampling(self) -> SampleConfig:
        """Return the settings of the same run without its geometry."""
        return sampling_of(self)


def _begun(config: GeometryConfig, setup: Setup) -> tuple[Setup, Tensor | None, dict[str, str]]:
    """The run with what it starts from, real images behind that, and what tells whether they were replaced."""
    if config.images is None:
        return setup, None if config.noise is None else read_tensors(Path(config.noise))[0].get("x"), {}
    points = reference(get(config.images), setup.network, config.count).points
    if points.count < config.count:
        raise FanalError(
            f"{config.images} has {points.count} training points, {config.count} are wanted: lower --count"
        )
    x = points.block(slice(0, config.count), torch.float32).reshape(config.count, *points.shape)
    unit = noise(points.shape, setup.config.seeds())
    return dataclasses.replace(setup, given=x / float(setup.sigmas[0]) + unit), x, {"images": digest(points)}


def _check_size(name: str, d: int) -> None:
    if d < 2:
        raise FanalError(
            f"samples of {name} have one number each, so that trajectories are straight and have no shape: measure a "
            "model of samples with two or more, such as mixture:ring8"
        )


def _compared(config: GeometryConfig, rivals: list[Rival], run: Run, progress: Progress) -> list[Block]:
    """The projected trajectories of the models that the run is compared with; each rival keeps its own."""
    blocks: list[Block] = []
    for i, rival in enumerate(rivals):
        if rival.setup is None:
            continue
        work = functools.partial(projected_block, rival.setup)
        rows, stage = range(config.drawn), f"against{i}"
        own = list(run.blocks(rows, config.block, work, what=rival.name, progress=progress, stage=stage))
        rival.curve = torch.cat([tensors["curve"] for tensors, _ in own])
        blocks += own
    return blocks


def _features(arrival: Arrival | None, run: Run, progress: Progress) -> Iterator[Block]:
    """The features of the data that the run is compared with; nothing where it is not."""
    if arrival is not None:
        rows, work = range(len(arrival.rows)), arrival.real_block
        yield from run.blocks(rows, _DATA_BLOCK, work, what="features of the data", progress=progress, stage="data")


def geometry(config: GeometryConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet) -> Path:
    """Measure trajectories into a run folder: `run.json`, `geometry.safetensors` and `report.html`.

    Args:
        config: what to measure.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: the configuration or the place does not work, trajectories start at infinite sigma, or samples are
            single numbers.
    """
    sampling = config.sampling()
    setup, _ = prepare(sampling)
    _check_size(config.model, math.prod(setup.network.shape))
    if not bool(torch.isfinite(setup.sigmas[0])):
        raise FanalError(f"{config.model} starts at infinite sigma, where nothing has a length: give --sigma-max 80")
    setup, images, begun = _begun(config, setup)
    exact = None if config.data is None else reference(get(config.data), setup.network, config.points)
    arrival = None if exact is None else arrival_of(setup, exact)
    rivals = [rival_of(text, dataclasses.replace(sampling, count=config.drawn), setup) for text in config.against]
    for rival in rivals:
        _check_size(rival.name, rival.d)
    head, decides = dataclasses.asdict(config), identity(sampling, setup.network) | begun
    decides |= {} if exact is None else {"data": digest(exact.points)}
    decides |= {f"against {i}": rival.content for i, rival in enumerate(rivals)}
    with cpu_threads(config.threads), Run(out, "geometry", head, identity=decides, overwrite=overwrite) as run:
        found = Gathering()

        def work(rows: range) -> Block:
            return measured_block(setup, exact, rows, config.drawn, images, arrival)

        for block in run.blocks(range(config.count), config.block, work, what="trajectories", progress=progress):
            found.add(block)
        for block in _features(arrival, run, progress):
            found.add(block)
        others = _compared(config, rivals, run, progress)
        results, drawn = results_of(setup, exact, arrival, found, rivals, config.fitted)
        write_tensors(run.path("geometry.safetensors"), drawn)
        notes = [found.spent, *(note for _, note in others)]
        spent = {key: sum(note[key] for note in notes) for key in ("calls", "evaluations")}
        run.describe({"network": spent, "seconds": sum(note["seconds"] for note in notes), "results": results})
        from fanal.report import write_report

        write_report(run.part)
        return run.finish()
