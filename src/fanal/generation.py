"""`generate`: sample, watch, flag, repair and judge, block by block, into a run folder."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal import pictures
from fanal.cards import wrong_of
from fanal.config import build_repair, build_schedule, build_solver
from fanal.datasets import DATASETS, Dataset
from fanal.denoiser import Model, counters
from fanal.errors import FanalError, is_number
from fanal.files import read_json, write_atomically, write_json, write_tensors
from fanal.hallucination import Calibration, Outcome, Repair, calibrate, watch
from fanal.hallucination.calibration import FLAG
from fanal.hallucination.detectors import build as build_detector
from fanal.hallucination.detectors import last_window
from fanal.loading import card, fingerprint, load
from fanal.runs import Progress, Run, quiet
from fanal.sampling import Solver
from fanal.seeding import noise
from fanal.summary import summarize
from fanal.trajectory import Trajectory

__all__ = ["SEED_STRIDE", "SampleConfig", "generate"]

SEED_STRIDE = 1_000_000
"""`--seed k` gives sample b the seed k·SEED_STRIDE + b, so that runs with different seeds share no noise."""


@dataclass(frozen=True)
class SampleConfig:
    """What a sampling run depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`.
        solver: as written on the command line.
        schedule: as written on the command line.
        steps: number of intervals.
        sigma_min: smallest positive sigma; None: the model's.
        sigma_max: first sigma; None: the model's.
        zero: whether the grid ends at 0.
        count: number of samples.
        seed: run seed; see `SEED_STRIDE`.
        block: samples computed together.
        guard: repairs to try, as written on the command line (`redo`, `redo:kappa=0.1`); the first one gives the
            run's samples; () samples and watches only.
        flag: share of samples to flag, in calibration; None: what the model's card says, else 0.35.
        label: class label for all samples; None: unconditional.
        guidance: scale of classifier-free guidance.
        trajectory: keep the trajectories.
        device: where the network runs.
        threads: CPU threads; they decide rounding, so a resumed run keeps them.
    """

    model: str
    solver: str = "euler"
    schedule: str = "polynomial"
    steps: int = 40
    sigma_min: float | None = None
    sigma_max: float | None = None
    zero: bool = True
    count: int = 64
    seed: int = 0
    block: int = 32
    guard: tuple[str, ...] = ()
    flag: float | None = None
    label: int | None = None
    guidance: float | None = None
    trajectory: bool = False
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.count <= SEED_STRIDE:
            raise FanalError(f"count must be in [1, {SEED_STRIDE}], got {self.count}")
        if self.block < 1 or self.threads < 1:
            raise FanalError(f"block and threads must be at least 1, got {self.block} and {self.threads}")
        if not 0 <= self.seed < 2**40 // SEED_STRIDE:
            raise FanalError(f"seed must be in [0, {2**40 // SEED_STRIDE}), got {self.seed}")
        for text in self.guard:
            build_repair(text)
        if len(set(self.methods())) < len(self.guard):
            raise FanalError(f"each guard can be given once, got {', '.join(self.guard)}")
        if self.flag is not None and not 0 < self.flag < 1:
            raise FanalError(f"flag is a share strictly between 0 and 1, got {self.flag}")

    def methods(self) -> list[str]:
        """Names of the repairs, without their fields."""
        return [text.partition(":")[0] for text in self.guard]

    def seeds(self) -> range:
        """Seeds of the samples."""
        return range(self.seed * SEED_STRIDE, self.seed * SEED_STRIDE + self.count)


@dataclass(frozen=True, eq=False)
class _Setup:
    """Everything a block needs, built once."""

    config: SampleConfig
    model: Model
    solver: Solver
    sigmas: Tensor
    dataset: Dataset | None
    repairs: dict[str, Repair]
    detector: str


def _check_card(about: dict[str, Any], model: str) -> None:
    """Refuse a card whose entries are not of the kind that fanal writes; it may come from anywhere."""
    hints, flag = about.get("repair", {}), about.get("flag", FLAG)
    sound = (
        isinstance(about.get("data", ""), str)
        and isinstance(about.get("detector", ""), str)
        and is_number(flag)
        and 0 < flag < 1
    )
    sound = sound and isinstance(hints, dict) and all(isinstance(own, dict) for own in hints.values())
    if not sound:
        raise FanalError(f"the card of {model} has an unreadable data, flag or repair entry: fetch or train it again")


def _prepare(config: SampleConfig) -> tuple[_Setup, dict[str, Any]]:
    model = load(config.model, labels=config.label, guidance=config.guidance, device=config.device)
    about = card(config.model)
    sigmas = build_schedule(
        config.schedule,
        config.steps,
        model.sigma_min if config.sigma_min is None else config.sigma_min,
        model.sigma_max if config.sigma_max is None else config.sigma_max,
        zero=config.zero,
    )
    _check_card(about, config.model)
    judged = DATASETS.get(about.get("data", ""))
    fits = judged is not None and judged.verdicts and judged.shape == tuple(model.shape)
    dataset = judged if fits else None
    hints = about.get("repair", {})  # the data's scale, where the defaults do not fit
    repairs: dict[str, Repair] = {}
    for name, text in zip(config.methods(), config.guard, strict=True):
        try:
            repairs[name] = build_repair(text, hints.get(name))
        except (TypeError, FanalError) as error:
            raise FanalError(f"the card of {config.model} asks for an impossible repair: {error}") from error
    known = about["calibration"] if isinstance(about.get("calibration"), dict) else about
    detector = known.get("detector", "variance")
    return _Setup(config, model, build_solver(config.solver), sigmas, dataset, repairs, detector), about


def _calibration(
    run: Run, setup: _Setup, about: dict[str, Any], progress: Progress, say: Callable[[str], None]
) -> Calibration:
    """The card's calibration where it fits, the run's own where it was begun, else a new one on other seeds."""
    config, path = setup.config, run.path("calibration.json")
    if path.is_file():
        return Calibration.from_dict(read_json(path))
    found = Calibration.from_dict(about["calibration"]) if "calibration" in about else None
    flag = config.flag or about.get("flag", FLAG)
    same = config.label is None and found is not None and found.flag == flag
    if found is not None and same and found.fits(config.solver, setup.sigmas):
        result = found
    else:
        if found is not None:
            say("the card's calibration is for another solver, grid, label or share: calibrating on other seeds")
        detector = _free(setup.sigmas, found.detector if found else setup.detector)
        result = calibrate(
            setup.model,
            setup.sigmas,
            setup.solver,
            detector,
            last_window(setup.sigmas),
            solver_name=config.solver,
            flag=flag,
            device=config.device,
            verify=wrong_of(setup.dataset) if setup.dataset else None,
            progress=lambda items: progress(items, "calibrating"),
        )
    write_json(path, result.to_dict())
    return result


def _judge(setup: _Setup, tensors: dict[str, Tensor], name: str, x: Tensor) -> None:
    if setup.dataset is not None:
        tensors[name] = setup.dataset.verify(x.float().cpu())


def _work(setup: _Setup, seeds: range, calibration: Calibration | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compute one block: its tensors by name, and the seconds each stage took."""
    config = setup.config
    free = build_detector(_free(setup.sigmas, setup.detector), last_window(setup.sigmas))
    detector = calibration.build() if calibration else free
    x = noise(setup.model.shape, seeds, float(setup.sigmas[0]), device=config.device)
    counts = counters(setup.model)
    before = sum(c.calls for c in counts), sum(c.evaluations for c in counts)
    begin = time.perf_counter()
    first = watch(setup.model, x, setup.sigmas, setup.solver, detector, seeds, record=config.trajectory)
    seconds = {"plain": time.perf_counter() - begin}
    tensors = {"x": first.x, "risk": first.risk, "per_step": first.per_step.T, "evaluations": first.evaluations}
    _judge(setup, tensors, "verdict", first.x)
    if first.trajectory is not None:
        tensors |= {"t.x": first.trajectory.x.transpose(0, 1), "t.denoised": first.trajectory.denoised.transpose(0, 1)}
    if calibration is not None:
        tensors["flagged"] = (first.risk > calibration.threshold).to(torch.uint8)
        for name, repair in setup.repairs.items():
            begin = time.perf_counter()
            after: Outcome = repair.repair(
                setup.model, x, setup.sigmas, setup.solver, detector, seeds, first, calibration.threshold
            )
            seconds[name] = seconds["plain"] + time.perf_counter() - begin
            tensors |= {f"x.{name}": after.x, f"risk.{name}": after.risk, f"evaluations.{name}": after.evaluations}
            tensors[f"rounds.{name}"] = after.rounds
            _judge(setup, tensors, f"verdict.{name}", after.x)
    spent = {
        "calls": sum(c.calls for c in counts) - before[0],
        "evaluations": sum(c.evaluations for c in counts) - before[1],
    }
    return tensors, {"seconds": seconds, "samples": len(seeds), **spent}


def _free(sigmas: Tensor, wanted: str) -> str:
    """The wanted detector, or the one that can judge a single interval."""
    return wanted if len(sigmas) > 2 else "last_slope"


def _total(seconds: dict[str, float]) -> float:
    """Seconds of a block: the plain run once, and what each repair added to it."""
    plain = seconds["plain"]
    return plain + sum(value - plain for value in seconds.values())


def _results(
    setup: _Setup, whole: dict[str, Tensor], notes: list[dict[str, Any]], calibration: Calibration | None
) -> dict[str, Any]:
    methods = ["plain", *setup.repairs]
    seconds = {name: torch.tensor([n["seconds"][name] / n["samples"] for n in notes]) for name in methods}
    results = summarize(whole, seconds, methods, setup.dataset) | {"sigmas": setup.sigmas.tolist()}
    if calibration is not None:
        results["calibration"] = calibration.to_dict()
        results["flagged"] = int(whole["flagged"].sum())
        if "verdict" in whole:
            results["flagged_wrong"] = int((whole["flagged"].bool() & (whole["verdict"] != 0)).sum())
        results["repairs"] = {name: dataclasses.asdict(r) for name, r in setup.repairs.items()}  # pyright: ignore
    return results


def _write(run: Run, setup: _Setup, whole: dict[str, Tensor]) -> None:
    """Write the run's tensors and picture."""
    config = setup.config
    samples = {name: value for name, value in whole.items() if not name.startswith("t.")}
    if config.guard:
        first = config.methods()[0]
        samples["before"], samples["x"] = samples["x"], samples[f"x.{first}"]
        del samples[f"x.{first}"]
    write_tensors(run.path("samples.safetensors"), samples, {"format": "fanal-samples-1"})
    frames = None
    if "flagged" in samples:
        frames = [pictures.COLORS["flag"] if hit else None for hit in samples["flagged"].tolist()]
    shown = slice(0, 400 if setup.model.shape != (2,) else None)
    sheet = pictures.grid(samples["x"][shown], frames=frames[shown] if frames else None)
    write_atomically(run.path("samples.png"), lambda part: sheet.save(part, "PNG"))
    if config.trajectory:
        meta = {"model": config.model, "solver": config.solver, "schedule": config.schedule}
        seeds = tuple(config.seeds())
        kept = Trajectory(
            setup.sigmas, whole["t.x"].transpose(0, 1), whole["t.denoised"].transpose(0, 1), seeds=seeds, meta=meta
        )
        kept.save(run.path("trajectory.safetensors"))


def _identity(config: SampleConfig) -> dict[str, str]:
    """What decides the numbers beside the configuration: the model's content and the device."""
    where = torch.device(config.device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    return {"model": fingerprint(config.model), "device": name}


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

    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        setup, about = _prepare(config)
        with Run(out, command, dataclasses.asdict(config), identity=_identity(config), overwrite=overwrite) as run:
            if run.resumed:
                say(f"resuming: {run.resumed} blocks are there already")
            calibration = _calibration(run, setup, about, progress, say) if config.guard else None
            from_card = "calibration" in about and calibration == Calibration.from_dict(about["calibration"])
            seeds, parts, notes = config.seeds(), [], []
            for i in progress(range(0, config.count, config.block), "sampling"):
                some = seeds[i : i + config.block]
                tensors, note = run.block(i // config.block, lambda: _work(setup, some, calibration))  # noqa: B023
                parts.append(tensors)
                notes.append(note)
            whole = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
            _write(run, setup, whole)
            record = {
                "seeds": {"first": seeds.start, "count": config.count},
                "network": {
                    "calls": sum(n["calls"] for n in notes),
                    "evaluations": sum(n["evaluations"] for n in notes),
                    "calibration": 0 if calibration is None or from_card else calibration.evaluations,
                },
                "seconds": sum(_total(n["seconds"]) for n in notes),
                "results": _results(setup, whole, notes, calibration),
            }
            run.describe(record)
            write_report(run.part)
            return run.finish()
    finally:
        torch.set_num_threads(threads)
