"""Encoding: an image to the noise that it comes from, by the same equation run upwards.

`dx/dsigma = (x − D)/sigma` has one solution through each point, so a deterministic sampler is a code: up from the image
to sigma_max, down to the image again ([GEO] app. E; [PDE] sec. 2). What is lost on the way is the solver's error.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fanal import pictures
from fanal.datasets import get
from fanal.datasets.base import check_shape
from fanal.denoiser import Denoiser, Latent, counters
from fanal.errors import FanalError
from fanal.exact.reference import digest
from fanal.exact.streaming import Points
from fanal.files import write_atomically, write_tensors
from fanal.generation import identity
from fanal.loading import open_network
from fanal.metrics.estimates import mean
from fanal.preparation import SampleConfig, Setup, prepare, sampling_of
from fanal.runs import Progress, Run, cpu_threads, quiet
from fanal.sampling import Solver, sample
from fanal.summary import as_json

__all__ = ["EncodeConfig", "encode", "encode_run"]

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
    rising = sigmas[sigmas > 0].flip(0)
    if len(rising) < 2 or not bool(torch.isfinite(rising).all()):
        raise FanalError("encoding runs up between two finite positive sigmas: give such a grid")
    return sample(denoiser, x, rising, solver)


@dataclass(frozen=True)
class EncodeConfig:
    """What an encoding depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`.
        data: data set or `folder:DIR` whose images are encoded.
        split: of it, "held out" or "train".
        steps: numbers of intervals; the codes are those of the last, the errors are told for each.
        other: a second model, whose codes of the same images are compared; None: none.
        solver, schedule, sigma_min, sigma_max: as in `SampleConfig`.
        count: number of images.
        label, prompt: conditions of all images, as in `SampleConfig`; "data": each image's own class.
        allow_bin, block, device, threads: as in `SampleConfig`.
    """

    model: str
    data: str
    split: str = "held out"
    steps: tuple[int, ...] = (10, 20, 40)
    other: str | None = None
    solver: str = "heun"
    schedule: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    count: int = 16
    label: int | str | None = None
    prompt: str | None = None
    allow_bin: bool = False
    block: int = 32
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.steps or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in self.steps):
            raise FanalError(f"steps are whole numbers >= 2, got {self.steps!r}")

    def sampling(self, steps: int) -> SampleConfig:
        """Return the settings of a sampling run over the same grid."""
        native = SampleConfig(self.model, schedule=self.schedule).schedule == "native"
        return sampling_of(self, steps=steps, zero=native, label=None if self.label == "data" else self.label)


def _error(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square distance per entry, (B,) float64."""
    return (a - b).flatten(1).cpu().double().square().mean(1).sqrt()


def _work(
    config: EncodeConfig, setups: Sequence[Setup], others: Sequence[Setup], data: Any, rows: range
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode one block of images with every number of steps, and decode them again."""
    begin, spent = time.perf_counter(), {"calls": 0, "evaluations": 0}
    x = data.x[rows.start : rows.stop].to(config.device)
    tensors: dict[str, Tensor] = {"x": x}
    for which, group in (("", setups), ("other.", others)):
        for setup in group:
            model = _bound(config, setup, data, rows)
            code = encode(model, x, setup.sigmas, setup.solver)
            back = sample(model, code, setup.sigmas[setup.sigmas > 0], setup.solver)
            n = setup.config.steps
            unit = code / float(setup.sigmas[0])
            tensors |= {f"{which}noise.{n}": unit, f"{which}back.{n}": back, f"{which}error.{n}": _error(back, x)}
            for count in counters(model):
                spent = {key: spent[key] + getattr(count, key) for key in spent}
    return tensors, {"seconds": time.perf_counter() - begin, **spent}


def _bound(config: EncodeConfig, setup: Setup, data: Any, rows: range) -> Denoiser:
    if config.label != "data":
        return setup.bound(rows)
    if data.labels is None:
        raise FanalError(f"{config.data} has no classes: leave the label out, or give one")
    from fanal.loading import Conditions, bind

    return bind(setup.network, Conditions(data.labels[rows.start : rows.stop]), setup.config.model)


def _results(config: EncodeConfig, whole: dict[str, Tensor]) -> dict[str, Any]:
    """Round-trip errors by steps, how Gaussian the codes are, and how far two models' codes are apart."""
    rows = []
    for n in config.steps:
        unit = whole[f"noise.{n}"].flatten(1).double()
        row: dict[str, Any] = {"steps": n, "round trip": as_json(mean(whole[f"error.{n}"]))}
        row["norm / sqrt d"] = as_json(mean(unit.norm(dim=1) / math.sqrt(unit.shape[1])))
        row["entry mean"], row["entry std"] = as_json(mean(unit.mean(1))), as_json(mean(unit.std(1)))
        if config.other is not None:
            second = whole[f"other.noise.{n}"].flatten(1).double()
            row["other round trip"] = as_json(mean(whole[f"other.error.{n}"]))
            row["codes apart"] = as_json(mean((second - unit).square().mean(1).sqrt()))
            mixed = unit.roll(1, 0)[: len(unit) if len(unit) > 1 else 0]  # a single image has no other
            row["codes of other images apart"] = as_json(mean((second[: len(mixed)] - mixed).square().mean(1).sqrt()))
        rows.append(row)
    return {"table": rows}


def _picture(whole: dict[str, Tensor], steps: int, network: Any) -> Any:
    """Images, their codes, and what comes back."""
    decode = network.decode if isinstance(network, Latent) else lambda x: x
    count = min(_SHOWN, len(whole["x"]))
    parts = [decode(whole["x"][:count]), whole[f"noise.{steps}"][:count] / 2, decode(whole[f"back.{steps}"][:count])]
    if whole["x"].shape[1:] == (2,):
        return pictures.beside([pictures.grid(part) for part in parts])
    return pictures.grid(torch.cat(parts), columns=count)


def encode_run(config: EncodeConfig, out: str | Path, *, overwrite: bool = False, progress: Progress = quiet) -> Path:
    """Encode images into a run folder: `noise.safetensors`, `samples.png` and `run.json`.

    `noise.safetensors` holds unit noise as `noise`, (count, *shape), which `fanal guard --noise` starts from.

    Args:
        config: what to encode.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.

    Raises:
        FanalError: the configuration or the place does not work, or images have another shape than the model's.
    """
    network = open_network(config.model, device=config.device, allow_bin=config.allow_bin)
    setups = [prepare(config.sampling(n), network)[0] for n in config.steps]
    source = get(config.data)
    others: list[Setup] = []
    decides = identity(setups[0].config, network)
    if config.other is not None:
        second = open_network(config.other, device=config.device, allow_bin=config.allow_bin)
        plain = [dataclasses.replace(setup.config, model=config.other) for setup in setups]
        others = [prepare(each, second)[0] for each in plain]
        decides |= {"other": identity(plain[0], second)["model"]}
    for one in (*setups[:1], *others[:1]):
        check_shape(source, one.network.shape, one.config.model)
    data = source.data(config.split, config.count)
    decides["data"] = digest(Points(data.x))
    spans = [range(a, min(a + config.block, config.count)) for a in range(0, config.count, config.block)]
    head = dataclasses.asdict(config)
    with cpu_threads(config.threads), Run(out, "encode", head, identity=decides, overwrite=overwrite) as run:
        blocks = [
            run.block(i, lambda rows=spans[i]: _work(config, setups, others, data, rows))
            for i in progress(range(len(spans)), "images")
        ]
        whole = {name: torch.cat([tensors[name] for tensors, _ in blocks]) for name in blocks[0][0]}
        last = config.steps[-1]
        write_tensors(run.path("noise.safetensors"), {"noise": whole[f"noise.{last}"], "x": whole["x"]})
        sheet = _picture(whole, last, network)
        write_atomically(run.path("samples.png"), lambda part: sheet.save(part, "PNG"))
        spent = {key: sum(notes[key] for _, notes in blocks) for key in ("calls", "evaluations")}
        seconds = sum(notes["seconds"] for _, notes in blocks)
        run.describe({"network": spent, "seconds": seconds, "results": _results(config, whole)})
        return run.finish()
