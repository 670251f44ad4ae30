"""`generate`: sample, watch, flag, repair and judge, block by block, into a run folder."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fanal import pictures
from fanal.denoiser import Latent, Model, Native, counters, network_of
from fanal.detecting import detector_of
from fanal.files import sha256_of, write_atomically, write_tensors
from fanal.flagging import Settled, settle
from fanal.hallucination import Calibration, Outcome, watch
from fanal.hallucination.detectors import describe
from fanal.loading import fingerprint
from fanal.preparation import SampleConfig, Setup, prepare
from fanal.runs import Block, Progress, Run, cpu_threads, quiet
from fanal.schedule_files import read_schedules
from fanal.schedules import plain_sigmas
from fanal.schedules.files import holds_many
from fanal.summary import summarize
from fanal.trajectory import Trajectory

__all__ = [
    "SampleConfig",
    "add_samples",
    "generate",
    "identity",
]


def add_samples(setup: Setup, tensors: dict[str, Tensor], tail: str, x: Tensor) -> None:
    """Keep samples under their name, decoded where they are latents, with the verdicts of the data's rule.

    Args:
        setup: the run's parts.
        tensors: takes `x`, `image` and `verdict`, each with the tail.
        tail: "" or `.NAME`.
        x: (B, *shape), the samples.
    """
    tensors[f"x{tail}"] = x
    network = network_of(setup.network)
    if isinstance(network, Latent):
        with torch.no_grad():
            tensors[f"image{tail}"] = pictures.to_bytes(network.decode(x))
    if setup.dataset is not None:
        tensors[f"verdict{tail}"] = setup.dataset.verify(x.float().cpu())


def _work(setup: Setup, rows: range, calibration: Calibration | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compute one block: its tensors by name, and the seconds each stage took."""
    config, seeds = setup.config, setup.config.seeds()[rows.start : rows.stop]
    model = setup.bound(rows)
    detector = calibration.build() if calibration else detector_of(setup)
    x = setup.start(rows)
    begin = time.perf_counter()
    first = watch(model, x, setup.sigmas, setup.solver, detector, seeds, record=config.trajectory)
    seconds = {"plain": time.perf_counter() - begin}
    tensors = {"risk": first.risk, "per_step": first.per_step.T, "evaluations": first.evaluations}
    add_samples(setup, tensors, "", first.x)
    if first.trajectory is not None:
        tensors |= {"t.x": first.trajectory.x.transpose(0, 1), "t.denoised": first.trajectory.denoised.transpose(0, 1)}
    if calibration is not None:
        tensors["flagged"] = (first.risk > calibration.threshold).to(torch.uint8)
        for name, repair in setup.repairs.items():
            begin = time.perf_counter()
            after: Outcome = repair.repair(
                model, x, setup.sigmas, setup.solver, detector, seeds, first, calibration.threshold
            )
            seconds[name] = seconds["plain"] + time.perf_counter() - begin
            tensors |= {f"risk.{name}": after.risk, f"evaluations.{name}": after.evaluations}
            tensors[f"rounds.{name}"] = after.rounds
            add_samples(setup, tensors, f".{name}", after.x)
    counts = counters(model)
    spent = {key: sum(getattr(count, key) for count in counts) for key in ("calls", "evaluations", "products")}
    return tensors, {"seconds": seconds, "samples": len(seeds), **spent}


def _total(seconds: dict[str, float]) -> float:
    """Seconds of a block: the plain run once, and what each repair added to it."""
    plain = seconds["plain"]
    return plain + sum(value - plain for value in seconds.values())


def _results(
    setup: Setup, whole: dict[str, Tensor], notes: Sequence[dict[str, Any]], settled: Settled | None
) -> dict[str, Any]:
    methods = ["plain", *setup.repairs]
    seconds = {name: torch.tensor([n["seconds"][name] / n["samples"] for n in notes]) for name in methods}
    results = summarize(whole, seconds, methods, setup.dataset) | {"sigmas": plain_sigmas(setup.sigmas)}
    results["detector"] = describe(settled.calibration.build() if settled else detector_of(setup))
    if settled is not None:
        results["calibration"], results["threshold_from"] = settled.calibration.to_dict(), settled.origin
        results["flagged"] = int(whole["flagged"].sum())
        if "verdict" in whole:
            results["flagged_wrong"] = int((whole["flagged"].bool() & (whole["verdict"] != 0)).sum())
        results["repairs"] = {name: dataclasses.asdict(r) for name, r in setup.repairs.items()}  # pyright: ignore
    return results


def _picture(samples: dict[str, Tensor], most: int | None) -> Image.Image:
    """The samples, flagged ones framed; where some were repaired, before it on the left and after it on the right."""
    frames = None
    if "flagged" in samples:
        frames = [pictures.COLORS["flag"] if hit else None for hit in samples["flagged"].tolist()][:most]
    names = ("before", "x") if "before" in samples else ("x",)
    return pictures.beside([pictures.grid(pictures.shown(samples, name)[:most], frames=frames) for name in names])


def _write(run: Run, setup: Setup, whole: dict[str, Tensor]) -> None:
    """Write the run's tensors and picture."""
    config = setup.config
    samples = {name: value for name, value in whole.items() if not name.startswith("t.")}
    if config.methods():
        first = config.methods()[0]
        for name, before in (("x", "before"), ("image", "image.before")):
            if name in samples:
                samples[before], samples[name] = samples[name], samples.pop(f"{name}.{first}")
    write_tensors(run.path("samples.safetensors"), samples, {"format": "fanal-samples-1"})
    sheet = _picture(samples, 400 if setup.network.shape != (2,) else None)
    write_atomically(run.path("samples.png"), lambda part: sheet.save(part, "PNG"))
    if config.trajectory:
        meta = {"model": config.model, "solver": config.solver, "schedule": config.schedule}
        seeds = tuple(config.seeds())
        kept = Trajectory(
            setup.sigmas, whole["t.x"].transpose(0, 1), whole["t.denoised"].transpose(0, 1), seeds=seeds, meta=meta
        )
        kept.save(run.path("trajectory.safetensors"))


def identity(config: SampleConfig, network: Model) -> dict[str, str]:
    """Return what decides the numbers beside the configuration: the content of the files it names, and the device.

    Raises:
        FanalError: a file cannot be read.
    """
    where = torch.device(config.device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    own = network.fingerprint() if isinstance(network, Native) else fingerprint(config.model)
    files = {key: " ".join(map(sha256_of, found)) for key, found in config.files().items() if found}
    if isinstance(network, Native):  # others' code decides the numbers too
        files |= {package: metadata.version(package) for package in ("diffusers", "transformers")}
    return {"model": own, "device": name, **files}


def _remark(config: SampleConfig, say: Callable[[str], None]) -> None:
    """Say where a searched schedule is used for another model or solver than it was searched for."""
    place = str(config.schedule)
    if not place.endswith(".json") or not holds_many(place):
        return  # a plain grid says nothing about its making
    found = read_schedules(place)
    if found.model != config.model:
        say(f"{place} was searched on {found.model}, not on {config.model}")
    entry = found.entry(config.steps)
    if config.solver not in (entry.solver, place):
        say(f"{place} was searched for {entry.solver}, not for {config.solver}; --solver {place} takes what it names")


def generate(
    config: SampleConfig,
    out: str | Path,
    *,
    command: str = "sample",
    overwrite: bool = False,
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Sample a model into a run folder, watching every trajectory; flag and repair where `config.guard` asks for it.

    On the CPU the same seeds give the same bits however often the run is interrupted: work is cut into blocks by
    sample index and each block is computed whole, with a fixed number of threads.

    Args:
        config: what to do.
        out: the run folder.
        command: name recorded in `run.json`.
        overwrite: replace what is there.
        progress: wraps loops over blocks, given what they do.
        say: takes one line for the user.

    Returns:
        The run folder, holding `run.json`, `samples.safetensors`, `samples.png`, `report.html`, and
        `trajectory.safetensors` if asked for.

    Raises:
        FanalError: the configuration, the model or the place does not work.
    """
    from fanal.report import write_report

    with cpu_threads(config.threads):
        setup, about = prepare(config)
        identified = identity(config, setup.network)
        with Run(out, command, dataclasses.asdict(config), identity=identified, overwrite=overwrite) as run:
            if run.resumed:
                say(f"resuming: {run.resumed} blocks are there already")
            _remark(config, say)
            settled = settle(run, setup, about, identified["model"], progress, say) if config.guard else None
            calibration = settled.calibration if settled else None
            seeds, rows = config.seeds(), range(config.count)

            def work(some: range) -> Block:
                return _work(setup, some, calibration)

            parts, notes = zip(*run.blocks(rows, config.block, work, what="sampling", progress=progress), strict=True)
            whole = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
            _write(run, setup, whole)
            record = {
                "seeds": {"first": seeds.start, "count": config.count},
                "network": {
                    "calls": sum(n["calls"] for n in notes),
                    "evaluations": sum(n["evaluations"] for n in notes),
                    "calibration": settled.paid if settled else 0,
                    **({"products": products} if (products := sum(n["products"] for n in notes)) else {}),
                },
                "seconds": sum(_total(n["seconds"]) for n in notes),
                "results": _results(setup, whole, notes, settled),
            }
            run.describe(record)
            write_report(run.part)
            return run.finish()
