"""Encoding: an image to the noise that it comes from, by the same equation run upwards.

`dx/dsigma = (x − D)/sigma` has one solution through each point, so a deterministic sampler is a code: up from the image
to sigma_max, down to the image again ([GEO] app. E; [PDE] sec. 2). What is lost on the way is the solver's error.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fanal import pictures
from fanal.datasets import Data, get
from fanal.datasets.base import check_shape
from fanal.denoiser import Denoiser, Latent, Model, counters, network_of
from fanal.errors import FanalError
from fanal.exact.reference import digest
from fanal.exact.streaming import Points
from fanal.files import write_atomically, write_tensors
from fanal.generation import identity
from fanal.loading import open_network
from fanal.metrics.estimates import mean
from fanal.preparation import SampleConfig, Setup, prepare, sampling_of
from fanal.runs import Progress, Run, cpu_threads, quiet
from fanal.sampling import Solver, sample, trace
from fanal.seeding import noise
from fanal.summary import as_json
from fanal.trajectory import Trajectory

__all__ = ["EncodeConfig", "encode", "encode_run", "predictions_apart"]

_SHOWN = 8  # images in the picture


def encode(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], sigmas: Float[Tensor, " n"], solver: Solver
) -> Float[Tensor, "b *d"]:
    """Return the state at the largest sigma of a sampling grid that leads to x at its smallest positive one.

    Args:
        denoiser: D(x, sigma).
        x: the images, taken as states at the smallest positive sigma.
        sigmas: a sampling grid, decreasing; a final 0 is left out.
        solver: one without noise of its own.

    Raises:
        FanalError: the grid starts at infinity or has fewer than two positive levels, or as `fanal.trace`.
    """
    return sample(denoiser, x, _rising(sigmas), solver)


def _rising(sigmas: Tensor) -> Tensor:
    rising = sigmas[sigmas > 0].flip(0)
    if len(rising) < 2 or not bool(torch.isfinite(rising).all()):
        raise FanalError("encoding runs up between two finite positive sigmas: give such a grid")
    return rising


def predictions_apart(
    denoiser: Denoiser, other: Denoiser, x: Float[Tensor, "b *d"], sigmas: Float[Tensor, " n"], solver: Solver
) -> Float[Tensor, " b"]:
    """Return how far two models' predictions are apart along the first one's way up, as far as codes can feel it.

    `∫ ‖D(x, sigma) − D'(x, sigma)‖/sigma² dsigma/√d`. In unit noise `u = x/sigma` the equation is
    `du/dsigma = −D/sigma²`, so the predictions' difference is what drives codes apart. Where D' is exact for some data,
    its Jacobian is `Cov/sigma²` and never negative: it only pulls codes together, and the integral is an upper bound of
    the distance of the two codes per entry. By the trapezoidal rule in 1/sigma.

    Args:
        denoiser: D, whose way it is.
        other: D'.
        x: the images, as in `encode`.
        sigmas: as in `encode`.
        solver: as in `encode`.

    Raises:
        FanalError: as `encode`.
    """
    run = Trajectory.record(trace(denoiser, x, _rising(sigmas), solver))
    ends = torch.cat([run.denoised, denoiser(run.x[-1], run.sigmas[-1])[None]])
    gaps = []
    with torch.no_grad():
        for state, denoised, sigma in zip(run.x, ends, run.sigmas, strict=True):
            gaps.append(_error(denoised, other(state, sigma)))
    return -torch.trapezoid(torch.stack(gaps), 1 / run.sigmas.double()[:, None], dim=0)


@dataclass(frozen=True)
class EncodeConfig:
    """What an encoding depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`.
        data: data set or `folder:DIR` whose images are encoded.
        split: of it, "held out" or "train".
        steps: numbers of intervals; the codes are those of the last, the errors are told for each.
        other: other models, whose codes of the same images are compared.
        also: other solvers, whose round trips are measured too.
        noisy: add the noise of the smallest sigma to the images, so that they are states which a model meets there.
        solver, schedule, sigma_min, sigma_max: as in `SampleConfig`.
        count: number of images.
        seed: of the noise that is added, as in `SampleConfig`.
        label, prompt: conditions of all images, as in `SampleConfig`; "data": each image's own class.
        allow_bin, block, device, threads: as in `SampleConfig`.
    """

    model: str
    data: str
    split: str = "held out"
    steps: tuple[int, ...] = (10, 20, 40)
    other: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    noisy: bool = False
    solver: str = "heun"
    schedule: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    count: int = 16
    seed: int = 0
    label: int | str | None = None
    prompt: str | None = None
    allow_bin: bool = False
    block: int = 32
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.steps or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in self.steps):
            given = ", ".join(map(repr, self.steps)) or "none"
            raise FanalError(f"steps are whole numbers >= 2, got {given}")
        for what, names in (("model", (self.model, *self.other)), ("solver", (self.solver, *self.also))):
            if len(set(names)) < len(names):
                raise FanalError(f"each {what} can be given once, got {', '.join(names)}")

    def sampling(self, steps: int) -> SampleConfig:
        """Return the settings of a sampling run over the same grid."""
        native = SampleConfig(self.model, schedule=self.schedule).schedule == "native"
        return sampling_of(self, steps=steps, zero=native, label=None if self.label == "data" else self.label)


def _error(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square distance per entry, (B,) float64."""
    return (a - b).flatten(1).cpu().double().square().mean(1).sqrt()


@dataclass(frozen=True, eq=False)
class _Plan:
    """The sampling runs of an encoding, for each number of steps: of the model, of others, by other solvers."""

    config: EncodeConfig
    data: Data
    setups: list[Setup]
    others: list[list[Setup]]
    also: list[list[Setup]]

    def groups(self) -> dict[str, list[Setup]]:
        """Name them: what their tensors' names begin with."""
        found = {"": self.setups}
        found |= {f"other-{k}.": group for k, group in enumerate(self.others)}
        return found | {f"also-{k}.": group for k, group in enumerate(self.also)}


def _work(plan: _Plan, rows: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode one block of images with every number of steps, and decode them again."""
    begin, config = time.perf_counter(), plan.config
    x = plan.data.x[rows.start : rows.stop].to(config.device)
    if config.noisy:
        low, seeds = float(_rising(plan.setups[0].sigmas)[0]), plan.setups[0].config.seeds()[rows.start : rows.stop]
        x = x + noise(x.shape[1:], seeds, low, device=config.device)
    tensors: dict[str, Tensor] = {"x": x}
    spent, asked = {"calls": 0, "evaluations": 0}, {}
    for which, group in plan.groups().items():
        for setup in group:
            model, n = _bound(plan, setup, rows), setup.config.steps
            code = encode(model, x, setup.sigmas, setup.solver)
            back = sample(model, code, setup.sigmas[setup.sigmas > 0], setup.solver)
            tensors[f"{which}error.{n}"] = _error(back, x)
            if not which.startswith("also"):
                tensors |= {f"{which}noise.{n}": code / float(setup.sigmas[0]), f"{which}back.{n}": back}
            own = {key: sum(getattr(count, key) for count in counters(model)) for key in spent}
            spent, asked[f"{which}{n}"] = {key: spent[key] + own[key] for key in spent}, own["evaluations"]
    last = plan.setups[-1]
    for k, group in enumerate(plan.others):
        first, second = _bound(plan, last, rows), _bound(plan, group[-1], rows)
        tensors[f"other-{k}.apart"] = predictions_apart(first, second, x, last.sigmas, last.solver)
        for count in (*counters(first), *counters(second)):
            spent = {key: spent[key] + getattr(count, key) for key in spent}
    return tensors, {"seconds": time.perf_counter() - begin, "asked": asked, **spent}


def _bound(plan: _Plan, setup: Setup, rows: range) -> Model:
    if plan.config.label != "data":
        return setup.bound(rows)
    if plan.data.labels is None:
        raise FanalError(f"{plan.config.data} has no classes: leave the label out, or give one")
    from fanal.loading import Conditions, bind

    return bind(setup.network, Conditions(plan.data.labels[rows.start : rows.stop]), setup.config.model)


def _between(a: Tensor, b: Tensor) -> dict[str, Any]:
    """How far two models' codes are apart, of the same images and of different ones."""
    mixed = a.roll(1, 0)[: len(a) if len(a) > 1 else 0]  # a single image has no other
    return {
        "codes apart": as_json(mean(_error(b, a))),
        "codes of other images apart": as_json(mean(_error(b[: len(mixed)], mixed))),
    }


def _table(config: EncodeConfig, whole: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Round-trip errors by steps, how Gaussian the codes are, and how far the first other model's are apart."""
    rows = []
    for n in config.steps:
        unit = whole[f"noise.{n}"].flatten(1).double()
        row: dict[str, Any] = {"steps": n, "round trip": as_json(mean(whole[f"error.{n}"]))}
        row["norm / sqrt d"] = as_json(mean(unit.norm(dim=1) / math.sqrt(unit.shape[1])))
        row["entry mean"], row["entry std"] = as_json(mean(unit.mean(1))), as_json(mean(unit.std(1)))
        if config.other:
            row["other round trip"] = as_json(mean(whole[f"other-0.error.{n}"]))
            row |= _between(whole[f"noise.{n}"], whole[f"other-0.noise.{n}"])
        rows.append(row)
    return rows


def _results(config: EncodeConfig, whole: dict[str, Tensor], asked: dict[str, int]) -> dict[str, Any]:
    """The table by steps, round trips by solver and steps, and all pairs of models with the last number of steps."""
    solvers = [
        {
            "solver": solver,
            "steps": n,
            "evaluations": asked[f"{which}{n}"] / len(whole["x"]),
            "round trip": as_json(mean(whole[f"{which}error.{n}"])),
        }
        for which, solver in [("", config.solver), *((f"also-{k}.", name) for k, name in enumerate(config.also))]
        for n in config.steps
    ]
    names = {"": config.model} | {f"other-{k}.": name for k, name in enumerate(config.other)}
    pairs = []
    for (a, first), (b, second) in itertools.combinations(names.items(), 2):
        pair = {"models": [first, second], **_between(*(whole[f"{key}noise.{config.steps[-1]}"] for key in (a, b)))}
        if not a:
            pair["predictions apart"] = as_json(mean(whole[f"{b}apart"]))
        pairs.append(pair)
    return {"table": _table(config, whole), "solvers": solvers, "pairs": pairs}


def _picture(whole: dict[str, Tensor], steps: int, network: Any) -> Any:
    """Images, their codes, and what comes back."""
    latent = network_of(network)
    decode = latent.decode if isinstance(latent, Latent) else lambda x: x
    count = min(_SHOWN, len(whole["x"]))
    parts = [decode(whole["x"][:count]), whole[f"noise.{steps}"][:count] / 2, decode(whole[f"back.{steps}"][:count])]
    if whole["x"].shape[1:] == (2,):
        return pictures.beside([pictures.grid(part) for part in parts])
    return pictures.grid(torch.cat(parts), columns=count)


def encode_run(config: EncodeConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet) -> Path:
    """Encode images into a run folder: `noise.safetensors`, `samples.png`, `run.json` and `report.html`.

    `noise.safetensors` holds unit noise as `noise`, (count, *shape), which `fanal guard --noise` starts from.

    Args:
        config: what to encode.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: the configuration or the place does not work, or images have another shape than the model's.
    """
    plan, decides = _prepared(config)
    decides["data"] = digest(Points(plan.data.x, plan.data.labels if config.label == "data" else None))
    head = dataclasses.asdict(config)
    with cpu_threads(config.threads), Run(out, "encode", head, identity=decides, overwrite=overwrite) as run:
        work = functools.partial(_work, plan)
        blocks = list(run.blocks(range(config.count), config.block, work, what="images", progress=progress))
        whole = {name: torch.cat([tensors[name] for tensors, _ in blocks]) for name in blocks[0][0]}
        notes, last = [own for _, own in blocks], config.steps[-1]
        write_tensors(run.path("noise.safetensors"), {"noise": whole[f"noise.{last}"], "x": whole["x"]})
        sheet = _picture(whole, last, plan.setups[0].network)
        write_atomically(run.path("samples.png"), lambda part: sheet.save(part, "PNG"))
        spent = {key: sum(own[key] for own in notes) for key in ("calls", "evaluations")}
        asked = {key: sum(own["asked"][key] for own in notes) for key in notes[0]["asked"]}
        seconds = math.fsum(own["seconds"] for own in notes)
        run.describe({"network": spent, "seconds": seconds, "results": _results(config, whole, asked)})
        from fanal.report import write_report

        write_report(run.part)
        return run.finish()


def _prepared(config: EncodeConfig) -> tuple[_Plan, dict[str, str]]:
    """Everything a block needs, and what decides the numbers beside the configuration."""
    networks = {
        name: open_network(name, device=config.device, allow_bin=config.allow_bin)
        for name in (config.model, *config.other)
    }

    def runs(model: str, solver: str) -> list[Setup]:
        wanted = [dataclasses.replace(config.sampling(n), model=model, solver=solver) for n in config.steps]
        return [prepare(each, networks[model])[0] for each in wanted]

    source = get(config.data)
    for name, network in networks.items():
        check_shape(source, network.shape, name)
    setups = runs(config.model, config.solver)
    others = [runs(name, config.solver) for name in config.other]
    also = [runs(config.model, solver) for solver in config.also]
    decides = identity(setups[0].config, setups[0].network)
    for k, group in enumerate(others):
        if not torch.equal(group[0].sigmas, setups[0].sigmas):
            raise FanalError(
                f"{config.model} and {config.other[k]} start and end at different sigmas: give --sigma-min and "
                "--sigma-max, so that their codes can be compared"
            )
        decides[f"other-{k}"] = identity(group[0].config, group[0].network)["model"]
    return _Plan(config, source.data(config.split, config.count), setups, others, also), decides
