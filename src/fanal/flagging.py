"""The threshold of a run: from the model's card, a calibration file, labeled samples, or fresh calibration seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal.calibration_files import Saved, read_calibration, write_calibration
from fanal.cards import wrong_of
from fanal.errors import FanalError
from fanal.files import read_tensors
from fanal.hallucination import calibration
from fanal.hallucination.calibration import FIRST_SEED, FLAG, Calibration, window_of
from fanal.hallucination.detectors import Contrast, Detector, LastSlope, Running, build, describe, last_window
from fanal.hallucination.repair import watch
from fanal.labeling.labels import open_labels, read_samples
from fanal.preparation import SampleConfig, Setup, prepare, record_of, settings_of
from fanal.runs import Progress, Run
from fanal.seeding import noise

__all__ = ["Settled", "detector_of", "settle"]

Say = Callable[[str], None]
Rates = dict[str, float]

_CONDITIONS = ("label", "prompt", "captions", "negative", "guidance")


@dataclass(frozen=True)
class Settled:
    """What a run flags by.

    Attributes:
        calibration: the detector and its threshold.
        paid: network evaluations that this run spent on it.
        origin: where it comes from, in words.
    """

    calibration: Calibration
    paid: int
    origin: str


@dataclass(frozen=True, eq=False)
class _Measured:
    """Risks of the samples to calibrate on, which of them are wrong, and what that cost."""

    risk: Float[Tensor, " b"]
    wrong: Bool[Tensor, " b"] | None
    first_seed: int
    evaluations: int


def detector_of(setup: Setup) -> Detector:
    """Return what watches a run that has no calibration: the wanted detector, or else the model's.

    The model's looks at its tuned window, or at the last part of the grid where that holds too few steps. Where this
    does too, the last slope takes its place, and on a single step from infinite sigma, which has no slope, the contrast
    of the prediction: a run is not refused for the sake of a figure that nobody asked for.
    """
    data, wanted = setup.dataset.name if setup.dataset else "", setup.config.detector
    if wanted:
        return build(wanted, window_of(wanted, setup.sigmas, data))
    own = (build(setup.detector, window) for window in _windows(setup.detector, setup.sigmas, data))
    return next((detector for detector in (*own, LastSlope()) if _sees(detector, setup.sigmas)), Contrast())


def _windows(detector: str, sigmas: Tensor, data: str) -> Iterator[tuple[float, float]]:
    yield window_of(detector, sigmas, data)
    yield last_window(sigmas)


def _sees(detector: Detector, sigmas: Tensor) -> bool:
    """Whether a grid has as many steps in a detector's window as it needs."""
    (low, high), needs = detector.window, 1
    if detector.free and isinstance(eye := detector.start(), Running):
        (low, high), needs = eye.window, eye.needs  # those of the last step have no window of their own
    return sum(low <= sigma <= high for sigma in sigmas[:-1].tolist() if not math.isinf(sigma)) >= needs


def settle(run: Run, setup: Setup, about: dict[str, Any], fingerprint: str, progress: Progress, say: Say) -> Settled:
    """Find a run's calibration, and keep it in the run so that it never changes again.

    It is that of the file or the labels which the configuration names; else that of the model's card, where it fits;
    else a new one, measured block by block on seeds of its own.

    Args:
        run: the run folder in the making.
        setup: the run's parts.
        about: the model's card.
        fingerprint: hash of the model's content.
        progress: wraps loops over blocks.
        say: takes one line for the user.

    Raises:
        FanalError: what is named does not fit the run, or cannot be read.
    """
    config, path = setup.config, run.path("calibration.json")
    kept = read_calibration(path) if path.is_file() else None
    if config.calibration is not None:
        saved = kept or _from_file(setup, fingerprint, say)
        paid, origin = 0, f"the calibration {config.calibration}"
    elif config.labels is not None:
        saved = kept or _from_labels(run, setup, fingerprint, progress, say)
        paid, origin = saved.calibration.evaluations, f"the labels {config.labels}"
    else:
        card = _of_card(setup, about)
        saved = kept or (
            _saved(config, fingerprint, card) if card else _measured(run, setup, about, fingerprint, progress, say)
        )
        fresh = saved.calibration != card
        paid = saved.calibration.evaluations if fresh else 0
        origin = "calibration seeds" if fresh else "the model's card"
    if kept is None:
        write_calibration(path, saved)
    return Settled(saved.calibration, paid, origin)


def _rates(config: SampleConfig) -> Rates:
    """The share that the threshold is asked for, as `calibration.settle` takes it; {}: none."""
    asked = {"flag": config.flag, "tpr": config.catch, "fpr": config.alarms}
    return {name: share for name, share in asked.items() if share is not None}


def _saved(config: SampleConfig, fingerprint: str, found: Calibration, measured: _Measured | None = None) -> Saved:
    """A calibration as a file keeps it, with the conditions that its samples were made under."""
    conditions = {name: getattr(config, name) for name in _CONDITIONS}
    risk, wrong = (measured.risk, measured.wrong) if measured else (None, None)
    return Saved(config.model, fingerprint, found, conditions, risk, wrong)


def _tell_conditions(place: str | Path, conditions: Mapping[str, Any], config: SampleConfig, say: Say) -> None:
    """Say under which other conditions a threshold was found."""
    for name, told in conditions.items():
        if getattr(config, name, None) != told:
            say(f"{place} was calibrated with {name} {told!r}, this run has {getattr(config, name, None)!r}")


# From the model's card.


def _of_card(setup: Setup, about: dict[str, Any]) -> Calibration | None:
    """The calibration on the model's card, where it holds for this run: its solver, grid, detector and share."""
    config = setup.config
    if "calibration" not in about:
        return None
    found = Calibration.from_dict(about["calibration"])
    plain = config.label is None and config.prompt is None and config.captions is None
    same = config.detector in (None, found.detector) and config.catch is None and config.alarms is None
    same = same and found.flag == (config.flag or about.get("flag", FLAG))
    return found if plain and same and found.fits(config.solver, setup.sigmas) else None


# From fresh seeds.


def _measured(run: Run, setup: Setup, about: dict[str, Any], fingerprint: str, progress: Progress, say: Say) -> Saved:
    config = setup.config
    if (config.catch or config.alarms) and not (setup.dataset and setup.dataset.verdicts):
        raise FanalError(
            "catch and alarms (--catch, --alarms) are shares of samples that are known to be wrong or right, and "
            "nothing knows that here: give labels (--labels), or the share to flag (--flag)"
        )
    why = "is missing"
    if "calibration" in about:
        why = "is for another solver, grid, label, detector or share"
    say(f"the card's calibration {why}: calibrating on other seeds, {config.calibrate} samples")
    detector = detector_of(setup)
    seeds = range(FIRST_SEED, FIRST_SEED + config.calibrate)

    def start(rows: range) -> Tensor:
        sigma = float(setup.sigmas[0])
        return noise(setup.network.shape, seeds[rows.start : rows.stop], sigma, device=config.device)

    found = _watch(run, setup, detector, seeds, start, progress)
    rates = _rates(config) or {"flag": about.get("flag", FLAG)}
    return _saved(config, fingerprint, _settled(setup, detector, found, rates), found)


def _watch(
    run: Run,
    setup: Setup,
    detector: Detector,
    seeds: range,
    start: Callable[[range], Tensor],
    progress: Progress,
) -> _Measured:
    """Watch samples to calibrate on, block by block, and judge them where a rule can."""
    block, judge = min(64, setup.config.block), wrong_of(setup.dataset) if setup.dataset else None

    def work(rows: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
        keys = seeds[rows.start : rows.stop]
        done = watch(setup.bound(rows), start(rows), setup.sigmas, setup.solver, detector, keys)
        tensors = {"risk": done.risk, "evaluations": done.evaluations}
        return tensors | ({"wrong": judge(done.x).to(torch.uint8)} if judge else {}), {}

    parts = []
    for i in progress(range(0, len(seeds), block), "calibrating"):
        rows = range(i, min(i + block, len(seeds)))
        parts.append(run.block(i // block, lambda: work(rows), stage="calibration")[0])  # noqa: B023
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    wrong = whole["wrong"].bool() if judge else None
    return _Measured(whole["risk"], wrong, seeds.start, round(float(whole["evaluations"].sum())))


def _settled(setup: Setup, detector: Detector, found: _Measured, rates: Rates) -> Calibration:
    """Set the threshold by the share that the run asks for."""
    return calibration.settle(
        detector,
        found.risk,
        found.wrong,
        solver_name=setup.config.solver,
        sigmas=setup.sigmas,
        first_seed=found.first_seed,
        evaluations=found.evaluations,
        **rates,
    )


# From a file.


def _grid_words(sigmas: Sequence[float]) -> str:
    return f"{len(sigmas) - 1} steps from sigma {sigmas[0]:.4g} to {sigmas[-1]:.4g}"


def _from_file(setup: Setup, fingerprint: str, say: Say) -> Saved:
    """The named calibration, if it is for this model, solver and grid; with another threshold where one is wanted."""
    config, place = setup.config, str(setup.config.calibration)
    saved = read_calibration(place)
    found = saved.calibration
    if saved.fingerprint != fingerprint or (not fingerprint and saved.model != config.model):
        raise FanalError(
            f"{place} was calibrated on {saved.model}, which is not {config.model} as it is now: calibrate again"
        )
    if not found.fits(config.solver, setup.sigmas):
        raise FanalError(
            f"{place} was calibrated with {found.solver} on {_grid_words(found.sigmas)}; this run has {config.solver} "
            f"on {_grid_words(setup.sigmas.tolist())}: a threshold holds for no other"
        )
    _tell_conditions(place, saved.conditions, config, say)
    if not _rates(config):
        return saved
    if saved.risk is None:
        raise FanalError(f"{place} keeps no risks to set another threshold by: leave flag, catch and alarms out")
    measured = _Measured(saved.risk, saved.wrong, found.first_seed, found.evaluations)
    again = _settled(setup, found.build(), measured, _rates(config))
    return Saved(saved.model, saved.fingerprint, again, saved.conditions, saved.risk, saved.wrong)


# From labels.


def _from_labels(run: Run, setup: Setup, fingerprint: str, progress: Progress, say: Say) -> Saved:
    """A threshold from a person's labels of an earlier run, with that run's risks, or watched again."""
    config, place = setup.config, Path(str(setup.config.labels))
    folder = place.parent
    record = record_of(folder)
    theirs = SampleConfig(**{**settings_of(folder), "model": config.model, "device": config.device})
    there, _ = prepare(theirs, setup.network)
    same = theirs.solver == config.solver and torch.equal(there.sigmas, setup.sigmas)
    if record.get("identity", {}).get("model") != fingerprint or not same:
        raise FanalError(
            f"the labels in {place} are of {record['config'].get('model')} with {theirs.solver} on "
            f"{_grid_words(there.sigmas.tolist())}; this run has {config.model} with {config.solver} on "
            f"{_grid_words(setup.sigmas.tolist())}: label a run like this one"
        )
    labels = open_labels(read_samples(folder))
    if place.name != labels.path.name:
        raise FanalError(f"{place} labels samples that the detector did not watch: label those before the repair")
    rows, codes = calibration.labelled(labels.codes, labels.count)
    if not len(rows):
        raise FanalError(f"{place} holds no label yet: fanal label {folder} serves a page to set some")
    if set(config.seeds()) & {theirs.seeds()[b] for b in rows.tolist()}:
        say("the labels are of samples of this run, so its flags look better than those of other seeds would")
    detector = detector_of(setup)
    risk, evaluations = _risk_of(record, folder, detector), 0
    if risk is None:
        say(f"{folder} was watched by another detector: watching its {theirs.count} samples again")
        again = dataclasses.replace(there, config=theirs, dataset=None, detector=setup.detector)
        watched = _watch(run, again, detector, theirs.seeds(), again.start, progress)
        risk, evaluations = watched.risk, watched.evaluations
    found = _Measured(risk[rows], codes != 0, theirs.seeds().start, evaluations)
    saved = _saved(theirs, fingerprint, _settled(setup, detector, found, _rates(config)), found)
    _tell_conditions(place, saved.conditions, config, say)
    return saved


def _risk_of(record: dict[str, Any], folder: Path, detector: Detector) -> Tensor | None:
    """The risks that a run recorded, if this detector gave them."""
    told = json.loads(json.dumps(describe(detector)))
    if record.get("results", {}).get("detector") != told:
        return None
    return read_tensors(folder / "samples.safetensors")[0].get("risk")
