"""What `fanal interpolate` calls: samples along paths between two seeds, block by block, into a run folder."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal import pictures
from fanal.datasets import DATASETS, Dataset, get
from fanal.datasets.base import check_shape
from fanal.denoiser import Latent, counters, network_of
from fanal.errors import FanalError, unknown_name
from fanal.files import write_atomically, write_tensors
from fanal.generation import add_samples, identity
from fanal.interpolation.methods import METHODS
from fanal.metrics.estimates import mean, rate
from fanal.preparation import SampleConfig, Setup, prepare, sampling_of
from fanal.runs import Progress, Run, cpu_threads, quiet
from fanal.sampling import sample
from fanal.schedules import plain_sigmas
from fanal.seeding import check_seeds, noise
from fanal.summary import as_json

__all__ = ["InterpolationConfig", "interpolate", "nearest", "parse_seeds"]

_MOST = 100_000  # paths in one run; also training samples that neighbors are looked for among
_SHOWN = 24  # paths in the picture


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds that `3`, `3,8` or `0..7` (both ends included) stand for.

    Raises:
        FanalError: it is none of these, or the seeds are too many.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        numbers = [first, last] if dots else [first]
        if not all(number.isascii() and number.isdigit() and len(number) <= 20 for number in numbers):
            raise FanalError(f"seeds are whole numbers such as 3, 3,8 or 0..7, got {text!r:.60}")
        low, high = int(numbers[0]), int(numbers[-1])
        if not 0 <= high - low < _MOST - len(found):
            raise FanalError(f"a range of seeds ascends, and there are at most {_MOST} seeds, got {text!r:.60}")
        found += range(low, high + 1)
    return check_seeds(found)


@dataclass(frozen=True)
class InterpolationConfig:
    """What an interpolation depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`.
        start: seeds of the samples at weight 0, one per path.
        end: seeds of the samples at weight 1, as many.
        method: a key of `fanal.interpolation.METHODS`.
        points: points of each path, both ends included.
        neighbors: nearest training samples to find for each point.
        data: data set to find them in; None: the one that the model's card names, where it comes with fanal.
        solver, schedule, steps, sigma_min, sigma_max, zero: as in `SampleConfig`.
        label, prompt, negative, guidance: conditions of all points, as in `SampleConfig`.
        allow_bin, block, device, threads: as in `SampleConfig`.
    """

    model: str
    start: tuple[int, ...]
    end: tuple[int, ...]
    method: str = "slerp"
    points: int = 9
    neighbors: int = 0
    data: str | None = None
    solver: str = "euler"
    schedule: str | None = None
    steps: int = 40
    sigma_min: float | None = None
    sigma_max: float | None = None
    zero: bool = True
    label: int | None = None
    prompt: str | None = None
    negative: str = ""
    guidance: float | None = None
    allow_bin: bool = False
    block: int = 32
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("interpolation", self.method, METHODS)
        if not 0 < len(self.start) == len(self.end):
            raise FanalError(
                f"each path needs two seeds: got {len(self.start)} to start from, {len(self.end)} to end at"
            )
        check_seeds((*self.start, *self.end))
        if self.points < 2:
            raise FanalError(f"a path has at least 2 points, its ends, got {self.points}")
        if self.neighbors < 0:
            raise FanalError(f"neighbors must be at least 0, got {self.neighbors}")
        if self.data is not None and not self.neighbors:
            raise FanalError("data is for the nearest neighbors alone: give neighbors (--neighbors 3) as well")

    def sampling(self) -> SampleConfig:
        """Return the settings of the same run without paths."""
        return sampling_of(self, count=len(self.start) * self.points)


def _starts(config: InterpolationConfig, setup: Setup, rows: range) -> tuple[Tensor, Tensor, Tensor]:
    """The points' unit noise, (B, *shape) float64 on the CPU, with the weight and the path of each."""
    index = torch.tensor(rows)
    pair = index.div(config.points, rounding_mode="floor")
    weight = (index % config.points).double() / (config.points - 1)
    known = range(int(pair[0]), int(pair[-1]) + 1)
    ends = [
        noise(setup.network.shape, [seeds[p] for p in known], dtype=torch.float64)[pair - known.start]
        for seeds in (config.start, config.end)
    ]
    return METHODS[config.method](ends[0], ends[1], weight), weight, pair


def _work(config: InterpolationConfig, setup: Setup, rows: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sample one block of points."""
    unit, weight, pair = _starts(config, setup, rows)
    sigma = float(setup.sigmas[0])
    x = ((1.0 if math.isinf(sigma) else sigma) * unit).float().to(config.device)
    model, begin = setup.bound(rows), time.perf_counter()
    # One seed for a whole path: a solver that draws noise draws the same for all its points.
    done = sample(model, x, setup.sigmas, setup.solver, [config.start[p] for p in pair.tolist()])
    seconds = time.perf_counter() - begin
    tensors = {"weight": weight, "path": pair, "start_variance": unit.flatten(1).square().mean(1)}
    add_samples(setup, tensors, "", done)
    spent = {key: sum(getattr(count, key) for count in counters(model)) for key in ("calls", "evaluations")}
    return tensors, {"seconds": seconds, **spent}


def nearest(x: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest of some real samples: their indices and their distances, both (N, k), nearest first.

    Args:
        x: (N, *shape).
        real: (M, *shape).
        k: how many; at most M.

    Raises:
        FanalError: the shapes differ, or there are fewer than k real samples.
    """
    if x.shape[1:] != real.shape[1:]:
        raise FanalError(f"samples of shape {tuple(x.shape[1:])} have no neighbors of shape {tuple(real.shape[1:])}")
    if not 1 <= k <= len(real):
        raise FanalError(f"asked for {k} nearest of {len(real)} samples; ask for 1 to {len(real)}")
    flat, exact = real.flatten(1).float(), "donot_use_mm_for_euclid_dist"  # the other way loses close pairs to rounding
    found = [
        torch.cdist(part, flat, compute_mode=exact).topk(k, largest=False) for part in x.flatten(1).float().split(32)
    ]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _real(config: InterpolationConfig, setup: Setup, about: dict[str, Any]) -> tuple[Dataset, Tensor] | None:
    """The training samples that neighbors are looked for among, where they are asked for."""
    if not config.neighbors:
        return None
    name = config.data or about.get("data", "")
    if config.data is None and name not in DATASETS:  # a card from anywhere does not get to open folders
        raise FanalError(
            f"the card of {config.model} names no data set that comes with fanal ({name or 'none'}): name the data, "
            "e.g. --data folder:DIR, or leave --neighbors out"
        )
    dataset, network = get(name), network_of(setup.network)
    shape = tuple(setup.network.shape)
    if isinstance(network, Latent):
        with torch.no_grad():
            shape = tuple(network.decode(torch.zeros(1, *shape, device=config.device)).shape[1:])
    check_shape(dataset, shape, config.model)
    recipe = about.get("recipe")
    count = recipe.get("train_count") if isinstance(recipe, dict) and name == about.get("data") else None
    real = dataset.data("train", min(count, _MOST) if isinstance(count, int) else None).x
    if config.neighbors > len(real):
        raise FanalError(f"asked for {config.neighbors} neighbors, but {name} has {len(real)} training samples")
    return dataset, real


def _picture(config: InterpolationConfig, setup: Setup, whole: dict[str, Tensor], real: Tensor | None) -> Any:
    """One row per path, framed where a rule judged the samples, with its points' neighbors in the rows below."""
    limit = len(whole["x"]) if setup.network.shape == (2,) else _SHOWN * config.points
    images = pictures.shown(whole, "x")[:limit]
    frames: list[str | None] = [None] * len(images)
    if "verdict" in whole:
        frames = [pictures.COLORS["bad" if code else "good"] for code in whole["verdict"][:limit].tolist()]
    if real is not None and images.ndim == 4:
        below = real[whole["neighbor"][:limit]]  # (N, k, *shape)
        tiles, colors = [], []
        for i in range(0, len(images), config.points):
            tiles += [images[i : i + config.points], *below[i : i + config.points].transpose(0, 1)]
            colors += [*frames[i : i + config.points], *[None] * (config.points * config.neighbors)]
        images, frames = torch.cat(tiles), colors
    return pictures.grid(images, columns=config.points, frames=frames)


def _along(config: InterpolationConfig, setup: Setup, whole: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One row of figures per weight, over the paths."""
    judge, rows = setup.dataset, []
    for i in range(config.points):
        here = {name: value[i :: config.points] for name, value in whole.items()}
        row: dict[str, Any] = {
            "weight": float(here["weight"][0]),
            "start_variance": as_json(mean(here["start_variance"])),
        }
        if "verdict" in here:
            row["wrong"] = as_json(rate(here["verdict"] != 0))
        if judge is not None and judge.features:
            seen = judge.measure(here["x"].float())
            row["seen"] = {name: as_json(mean(seen[name])) for name in judge.features}
        if "neighbor_distance" in here:
            row["nearest"] = as_json(mean(here["neighbor_distance"][:, 0]))
        rows.append(row)
    return rows


def _run(
    config: InterpolationConfig, setup: Setup, run: Run, found: tuple[Dataset, Tensor] | None, progress: Progress
) -> None:
    """Sample every block, then write the run's files."""
    rows, work = range(len(config.start) * config.points), functools.partial(_work, config, setup)
    parts, notes = zip(*run.blocks(rows, config.block, work, what="sampling", progress=progress), strict=True)
    whole = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    results: dict[str, Any] = {}
    real = None
    if found is not None:
        dataset, real = found
        index, distance = nearest(pictures.shown(whole, "x"), real, config.neighbors)
        whole |= {"neighbor": index, "neighbor_distance": distance}
        results["neighbors"] = {"data": dataset.name, "split": "train", "count": len(real)}
    write_tensors(run.path("samples.safetensors"), whole, {"format": "fanal-samples-1"})
    sheet = _picture(config, setup, whole, real)
    write_atomically(run.path("samples.png"), lambda part: sheet.save(part, "PNG"))
    if setup.dataset is not None:
        results["verdicts"] = list(setup.dataset.verdicts)
    run.describe(
        {
            "network": {key: sum(note[key] for note in notes) for key in ("calls", "evaluations")},
            "seconds": sum(note["seconds"] for note in notes),
            "results": {"along": _along(config, setup, whole), "sigmas": plain_sigmas(setup.sigmas), **results},
        }
    )


def interpolate(
    config: InterpolationConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet
) -> Path:
    """Sample along paths between the noise of two seeds, one path per pair, into a run folder.

    The ends of a path are the samples that `fanal sample` draws from these seeds with the same settings.

    Args:
        config: what to do.
        out: the run folder.
        overwrite: replace what is there.
        progress: wraps loops over blocks, given what they do.

    Returns:
        The run folder, holding `run.json`, `samples.safetensors` and `samples.png`.

    Raises:
        FanalError: the configuration, the model or the place does not work.
    """
    with cpu_threads(config.threads):
        plain = config.sampling()
        setup, about = prepare(plain)
        head, decides = dataclasses.asdict(config), identity(plain, setup.network)
        with Run(out, "interpolate", head, identity=decides, overwrite=overwrite) as run:
            _run(config, setup, run, _real(config, setup, about), progress)
            return run.finish()
