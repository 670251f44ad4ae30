"""What a sampling run depends on, and everything it needs, built once."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal.calibration_files import calibration_file
from fanal.config import build_repair, build_schedule, build_solver, check_detector, fitted_options
from fanal.datasets import DATASETS, Dataset
from fanal.denoiser import Model, Native
from fanal.errors import FanalError, is_number, unknown_name
from fanal.files import read_json, read_tensors
from fanal.hallucination import Repair
from fanal.hallucination.hints import FLAG, HINTS
from fanal.loading import PIPELINES, Conditions, bind, card, open_network
from fanal.sampling import Solver
from fanal.schedules import check_sigmas, jump
from fanal.seeding import noise, run_seeds

__all__ = [
    "CALIBRATING",
    "REPEATABLE",
    "SampleConfig",
    "Setup",
    "prepare",
    "record_of",
    "sampling_of",
    "settings_of",
]

REPEATABLE: tuple[str, ...] = ("sample", "demo", "guard")
"""Commands whose runs can be watched again."""

_SCHEDULE_FILE = re.compile(r"[^(),=]+\.json")  # a solver may hold another one, in parentheses

CALIBRATING = 256
"""Samples that a run without a fitting calibration calibrates on."""


@dataclass(frozen=True)
class SampleConfig:
    """What a sampling run depends on; written to `run.json`.

    Attributes:
        model: spec, as in `fanal.load`.
        solver: as written on the command line.
        schedule: as written on the command line; None: `native`, the scheduler's own, for a diffusers pipeline, else
            `polynomial`.
        steps: number of intervals.
        sigma_min: smallest positive sigma; None: the model's.
        sigma_max: first sigma; None: the model's.
        zero: whether the grid ends at 0.
        jump: sigma from which the run goes straight to its denoised prediction (ODE-Jump); None: nowhere.
        count: number of samples.
        seed: run seed; see `fanal.seeding.run_seeds`.
        block: samples computed together.
        guard: repairs to try, as written on the command line (`redo`, `redo:kappa=0.1`); the first one gives the
            run's samples; ("none",) flags and repairs nothing; () samples and watches only.
        flag: share of samples to flag, in calibration; None: what the model's card says, else 0.35.
        catch: share of the wrong samples to flag, instead, where something knows them: `labels`, or the data's rule.
        alarms: share of the right samples to flag at most, instead; likewise.
        detector: what watches, as written on the command line (`variance`, `rods_index:v=score`); None: the judge that
            a ladder needs, else the model's card's, else the variance of the prediction.
        calibrate: samples to calibrate on, where no calibration fits.
        calibration: a calibration file to take the detector and its threshold from, or the run folder that has one.
        labels: label file beside a run, to set the threshold by.
        noise: file of unit noise to start from (`noise`, (count, *shape)) in place of the seeds' own.
        label: class label for all samples, by number or by the name on the model's card, or "each": sample b gets class
            b modulo their number; None: unconditional.
        prompt: what a text-to-image model is asked for, for all samples.
        captions: a caption file instead of one prompt: sample b gets its caption b.
        negative: what guidance leads away from, for a text-to-image model.
        guidance: scale of classifier-free guidance.
        allow_bin: read a pipeline's `.bin` weights where it has no safetensors.
        trajectory: keep the trajectories.
        device: where the network runs.
        threads: CPU threads; they decide rounding, so a resumed run keeps them.
    """

    model: str
    solver: str = "euler"
    schedule: str | None = None
    steps: int = 40
    sigma_min: float | None = None
    sigma_max: float | None = None
    zero: bool = True
    jump: float | None = None
    count: int = 64
    seed: int = 0
    block: int = 32
    guard: tuple[str, ...] = ()
    flag: float | None = None
    catch: float | None = None
    alarms: float | None = None
    detector: str | None = None
    calibrate: int = CALIBRATING
    calibration: str | None = None
    labels: str | None = None
    noise: str | None = None
    label: int | str | None = None
    prompt: str | None = None
    captions: str | None = None
    negative: str = ""
    guidance: float | None = None
    allow_bin: bool = False
    trajectory: bool = False
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        self.seeds()
        if self.block < 1 or self.threads < 1:
            raise FanalError(f"block and threads must be at least 1, got {self.block} and {self.threads}")
        if self.schedule is None:
            native = self.model.startswith(PIPELINES)
            object.__setattr__(self, "schedule", "native" if native else "polynomial")
        if self.prompt is not None and self.captions is not None:
            raise FanalError("give one prompt for all samples or a caption file, not both")
        self._check_guard()

    def _check_guard(self) -> None:
        if "none" in self.guard and len(self.guard) > 1:
            raise FanalError(f"none stands for no repair: give it alone, got {', '.join(self.guard)}")
        for text in self._repairs():
            build_repair(text)
        if len(set(self.methods())) < len(self._repairs()):
            raise FanalError(f"each guard can be given once, got {', '.join(self.guard)}")
        shares = {name: getattr(self, name) for name in ("flag", "catch", "alarms")}
        shares = {name: share for name, share in shares.items() if share is not None}
        for name, share in shares.items():
            if not 0 < share < 1:
                raise FanalError(f"{name} is a share strictly between 0 and 1, got {share}")
        if len(shares) > 1:
            raise FanalError(f"a threshold is set by one share, got {' and '.join(shares)}: give one of them")
        if self.detector is not None:
            check_detector(self.detector)
        if self.calibrate < 8:
            raise FanalError(f"a calibration needs at least 8 samples, got {self.calibrate}")
        if self.calibration is not None and (self.labels is not None or self.detector is not None):
            raise FanalError("a calibration names its detector and was set by what was known: give it without those")

    def _repairs(self) -> tuple[str, ...]:
        return () if self.guard == ("none",) else self.guard

    def methods(self) -> list[str]:
        """Names of the repairs, without their fields."""
        return [text.partition(":")[0] for text in self._repairs()]

    def seeds(self) -> range:
        """Seeds of the samples."""
        return run_seeds(self.seed, self.count)

    def files(self) -> dict[str, list[str]]:
        """Files that decide the numbers, by the setting that names them."""
        found = {key: _SCHEDULE_FILE.findall(getattr(self, key) or "") for key in ("schedule", "solver")}
        named = {key: getattr(self, key) for key in ("captions", "labels", "noise")}
        if self.calibration is not None:
            named["calibration"] = str(calibration_file(self.calibration))
        if self.detector is not None:
            named["detector"] = fitted_options(self.detector).get("file")
        return {key: [value] for key, value in named.items() if value} | found


def sampling_of(config: Any, **own: Any) -> SampleConfig:
    """Return the sampling run that another command's settings describe: the fields that both have.

    Args:
        config: a dataclass of settings, whose fields of the same name mean the same.
        own: values that stand in for its own.

    Raises:
        FanalError: the settings do not work.
    """
    shared = {f.name for f in dataclasses.fields(SampleConfig)} & {f.name for f in dataclasses.fields(config)}
    return SampleConfig(**{name: getattr(config, name) for name in shared - own.keys()}, **own)


def record_of(run: str | Path) -> dict[str, Any]:
    """Return the record of an earlier run that this module's settings describe.

    Raises:
        FanalError: it is no run folder, or one of another command.
    """
    place = Path(run) / "run.json"
    if not place.is_file():
        raise FanalError(f"{run} is not a run folder: it has no run.json")
    record = read_json(place)
    if record.get("command") not in REPEATABLE or not isinstance(record.get("config"), dict):
        raise FanalError(f"{run} is not a run of {', '.join(f'fanal {name}' for name in REPEATABLE)}")
    return record


def settings_of(run: str | Path) -> dict[str, Any]:
    """Return the settings that decided the samples of an earlier run, before any repair.

    Raises:
        FanalError: it is no run that can be watched again.
    """
    own = {"guard", "flag", "catch", "alarms", "detector", "calibrate", "calibration", "labels", "trajectory"}
    known = {field.name for field in dataclasses.fields(SampleConfig)} - own
    return {name: value for name, value in record_of(run)["config"].items() if name in known}


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything a block needs, built once.

    Attributes:
        config: the run's settings.
        network: the model without conditions.
        solver: how an interval is crossed.
        sigmas: the grid.
        dataset: the data whose rule judges the samples; None where there is none.
        repairs: what is tried on flagged samples, by name.
        detector: name of the detector.
        captions: one text per sample, where the run has a caption file.
        class_names: of a model that was trained on named classes.
        given: (B, *shape), unit noise to start from in place of the seeds' own.
    """

    config: SampleConfig
    network: Model
    solver: Solver
    sigmas: Tensor
    dataset: Dataset | None
    repairs: dict[str, Repair]
    detector: str
    captions: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    given: Tensor | None = None

    def start(self, rows: range) -> Tensor:
        """Return the noise that some samples start from, at the first sigma.

        Args:
            rows: indices of the samples.
        """
        sigma, device = float(self.sigmas[0]), self.config.device
        if self.given is None:
            return noise(self.network.shape, self.config.seeds()[rows.start : rows.stop], sigma, device=device)
        unit = self.given[rows.start : rows.stop].to(device)
        return unit if math.isinf(sigma) else unit * sigma

    def bound(self, rows: range) -> Model:
        """Return the network with the conditions of some samples, one per sample where they differ.

        Args:
            rows: indices of the samples; captions are encoded for these alone, and begin again after the last.

        Raises:
            FanalError: a condition does not fit the model.
        """
        config, labels = self.config, self.config.label
        if labels == "each":
            labels = torch.tensor(rows) % max(getattr(self.network, "classes", 0), 1)
        elif isinstance(labels, str):
            if not self.class_names:
                raise FanalError(f"label is a whole number or 'each', got {labels!r}: this model names no classes")
            if labels not in self.class_names:
                raise unknown_name("class", labels, self.class_names)
            labels = self.class_names.index(labels)
        prompt = [self.captions[b % len(self.captions)] for b in rows] if self.captions else config.prompt
        wanted = Conditions(labels, prompt, config.negative, config.guidance)  # pyright: ignore[reportArgumentType]
        return bind(self.network, wanted, config.model)


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


def _captions(config: SampleConfig) -> tuple[str, ...]:
    if config.captions is None:
        return ()
    from fanal.metrics.captions import read_captions

    texts = read_captions(config.captions).texts
    if len(texts) < config.count:
        raise FanalError(f"{config.captions} has {len(texts)} captions for {config.count} samples")
    return texts[: config.count]


def _given(config: SampleConfig, shape: tuple[int, ...]) -> Tensor:
    """The unit noise of a file."""
    tensors, _ = read_tensors(Path(str(config.noise)))
    found = tensors.get("noise")
    if found is None or not found.is_floating_point() or tuple(found.shape[1:]) != shape:
        got = ", ".join(f"{name} {tuple(value.shape)}" for name, value in list(tensors.items())[:5])
        wanted = ", ".join(["count", *map(str, shape)])
        raise FanalError(f"{config.noise} must hold unit noise as 'noise', ({wanted}), got {got or 'nothing'}")
    if len(found) < config.count:
        raise FanalError(f"{config.noise} has noise for {len(found)} samples, {config.count} are wanted: lower --count")
    return found[: config.count]


def _grid(config: SampleConfig, network: Model) -> Tensor:
    """The run's sigmas."""
    if config.schedule == "native":
        if not isinstance(network, Native):
            raise FanalError(f"{config.model} has no schedule of its own: name one, e.g. --schedule polynomial")
        if config.sigma_min is not None or config.sigma_max is not None or not config.zero:
            raise FanalError("the native schedule has its own ends: leave sigma_min, sigma_max and zero as they are")
        sigmas = check_sigmas(network.grid(config.steps))
    else:
        sigmas = build_schedule(
            str(config.schedule),
            config.steps,
            network.sigma_min if config.sigma_min is None else config.sigma_min,
            network.sigma_max if config.sigma_max is None else config.sigma_max,
            zero=config.zero,
        )
    return sigmas if config.jump is None else jump(sigmas, config.jump)


def prepare(config: SampleConfig, network: Model | None = None) -> tuple[Setup, dict[str, Any]]:
    """Build what a configuration names; returns it with the model's card.

    Args:
        config: what to do.
        network: its model, where it is open already.

    Raises:
        FanalError: the configuration does not fit the model.
    """
    network = network or open_network(config.model, device=config.device, allow_bin=config.allow_bin)
    about = network.card() if isinstance(network, Native) else card(config.model)
    sigmas = _grid(config, network)
    _check_card(about, config.model)
    judged = DATASETS.get(about.get("data", ""))
    fits = judged is not None and judged.verdicts and judged.shape == tuple(network.shape)
    dataset = judged if fits else None
    # the data's scale, where the defaults do not fit
    hints = HINTS.get(about.get("data", ""), {}).get("repair", {}) | about.get("repair", {})
    repairs: dict[str, Repair] = {}
    for name, text in zip(config.methods(), config.guard, strict=False):  # "none" has no method
        try:
            repairs[name] = build_repair(text, hints.get(name))
        except (TypeError, FanalError) as error:
            raise FanalError(f"the card of {config.model} asks for an impossible repair: {error}") from error
    known = about["calibration"] if isinstance(about.get("calibration"), dict) else about
    detector = known.get("detector", "variance")
    names = about.get("class_names", [])
    named = tuple(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else ()
    solver, texts = build_solver(config.solver), _captions(config)
    given = None if config.noise is None else _given(config, tuple(network.shape))
    setup = Setup(config, network, solver, sigmas, dataset, repairs, detector, texts, named, given)
    setup.bound(range(min(config.block, config.count)))  # so that a condition that does not fit is found at once
    return setup, about
