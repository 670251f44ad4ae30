"""The threshold of a run: from the model's card, a calibration file, labeled samples, or fresh calibration seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal.calibration_files import Saved, read_calibration, write_calibration
from fanal.cards import wrong_of
from fanal.config import build_detector
from fanal.denoiser import Denoiser, evaluations, take
from fanal.detecting import chosen, wanted_of
from fanal.errors import FanalError
from fanal.files import read_tensors
from fanal.hallucination import calibration, probe
from fanal.hallucination.calibration import FIRST_SEED, FLAG, Calibration
from fanal.hallucination.detectors import FITTED, Detector, describe
from fanal.hallucination.fitting import Fitting
from fanal.hallucination.ladder import Judge, Ladder
from fanal.hallucination.probe import LinearProbe
from fanal.hallucination.repair import watch
from fanal.labeling.labels import open_labels, read_samples
from fanal.preparation import SampleConfig, Setup, prepare, record_of, settings_of
from fanal.runs import Block, Progress, Run
from fanal.seeding import noise

__all__ = ["Settled", "first_samples", "settle"]

Say = Callable[[str], None]
Rates = dict[str, float]

_APART = 2**20
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


def first_samples(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a run's samples before any repair, from the tensors of its folder."""
    return tensors["before"] if "before" in tensors else tensors["x"]


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
        saved = kept or _from_labels(run, setup, about, fingerprint, progress, say)
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


def _rates_or_own(setup: Setup, about: dict[str, Any], detector: Detector) -> Rates:
    """The same; where none is asked for, the share that the ladder flags by its judge, or else the card's."""
    ladder = setup.repairs.get("ladder")
    own = ladder.flag if isinstance(ladder, Ladder) and isinstance(detector, Judge) else about.get("flag", FLAG)
    return _rates(setup.config) or {"flag": own}


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
    if "calibration" not in about:
        return None
    found = Calibration.from_dict(about["calibration"])
    return None if _differences(setup, about, found) else found


def _differences(setup: Setup, about: dict[str, Any], found: Calibration) -> list[str]:
    """In what the card's calibration is not one for this run, with both values."""
    config, pairs = setup.config, []
    pairs.append(("solver", found.solver, config.solver))
    if not found.fits(found.solver, setup.sigmas):
        pairs.append(("grid", *_grid_words(found.sigmas, setup.sigmas.tolist())))
    wanted = wanted_of(setup)
    if wanted not in ("", found.detector):
        fitted = wanted.partition(":")[0] in FITTED
        if fitted or build_detector(wanted, found.window) != found.build():
            pairs.append(("detector", found.detector, wanted))
    pairs += [(name, "none", str(v)) for name in ("catch", "alarms") if (v := getattr(config, name)) is not None]
    if config.catch is None and config.alarms is None:
        pairs.append(("share to flag", f"{found.flag:g}", f"{config.flag or about.get('flag', FLAG):g}"))
    pairs += [(name, "none", repr(v)) for name in _CONDITIONS[:3] if (v := getattr(config, name)) is not None]
    return [f"{name} {theirs} there, {mine} here" for name, theirs, mine in pairs if theirs != mine]


# From fresh seeds.


def _measured(run: Run, setup: Setup, about: dict[str, Any], fingerprint: str, progress: Progress, say: Say) -> Saved:
    config = setup.config
    if (config.catch or config.alarms) and not (setup.dataset and setup.dataset.verdicts):
        raise FanalError(
            "catch and alarms (--catch, --alarms) are shares of samples that are known to be wrong or right, and "
            "nothing knows that here: give labels (--labels), or the share to flag (--flag)"
        )
    detector = chosen(setup)
    if isinstance(detector, Fitting) and not (setup.dataset and setup.dataset.verdicts):
        raise _nothing_to_fit(config, detector)
    why = "is missing"
    if "calibration" in about:
        card = Calibration.from_dict(about["calibration"])
        why = f"does not fit ({'; '.join(_differences(setup, about, card))})"
    say(f"the card's calibration {why}: calibrating on other seeds, {config.calibrate} samples")
    # one that was fitted before may have been so on the first of the calibration seeds
    first = FIRST_SEED + (
        0 if isinstance(detector, Fitting) or describe(detector)["detector"] not in FITTED else _APART
    )
    seeds = range(first, first + config.calibrate)

    def start(rows: range) -> Tensor:
        sigma = float(setup.sigmas[0])
        return noise(setup.network.shape, seeds[rows.start : rows.stop], sigma, device=config.device)

    whole = _watch(run, setup, detector, seeds, start, progress)
    wrong, spent = whole["wrong"].bool() if "wrong" in whole else None, round(float(whole["evaluations"].sum()))
    if isinstance(detector, Fitting):
        assert wrong is not None
        try:
            detector, risk, asked = _fit(detector, setup.bound(range(len(seeds))), whole, wrong)
        except FanalError as error:
            raise FanalError(f"{error}; --calibrate N takes more samples than {config.calibrate}") from error
        whole, spent = {"risk": risk}, spent + asked
    found = _Measured(whole["risk"], wrong, seeds.start, spent)
    settled = _settled(setup, detector, found, _rates_or_own(setup, about, detector))
    return _saved(config, fingerprint, settled, found)


def _nothing_to_fit(config: SampleConfig, detector: Fitting) -> FanalError:
    """Nobody knows which samples are wrong, so that nothing can be fitted to them."""
    asks = f"--detector {detector.kind}" if config.detector else "--repair ladder, judged by a linear probe,"
    return FanalError(
        f"{asks} needs labelled samples of {config.model}: no fitted one comes with fanal for this network. Label some "
        f"(fanal sample {config.model} --out first; fanal label first) and give --labels first/labels.json, or name "
        "what was fitted before (--detector "
        f"{detector.kind}:file=FILE), or another detector (--detector variance)"
    )


def _fit(
    detector: Fitting, model: Denoiser, tensors: Mapping[str, Tensor], wrong: Tensor
) -> tuple[Detector, Float[Tensor, " b"], int]:
    """Fit to labelled samples: the detector, the risk of each by a fit to the others, and what was asked for it."""
    before = evaluations(model)  # what a run binds counts
    found, risk = detector.fit(model, tensors, wrong)
    return found, risk, evaluations(model) - before


def _watch(
    run: Run,
    setup: Setup,
    detector: Detector | Fitting,
    seeds: range,
    start: Callable[[range], Tensor],
    progress: Progress,
) -> dict[str, Tensor]:
    """Watch samples to calibrate on, block by block, and judge them where a rule can.

    Returns:
        `evaluations`, `risk` or what a fit needs, and `wrong` where a rule knows, each (B, …).
    """
    block, judge = min(64, setup.config.block), wrong_of(setup.dataset) if setup.dataset else None

    def work(rows: range) -> Block:
        keys = seeds[rows.start : rows.stop]
        run_of = (setup.bound(rows), start(rows), setup.sigmas, setup.solver)
        if isinstance(detector, Fitting):
            tensors = detector.watch(*run_of, keys)
        else:
            done = watch(*run_of, detector, keys)
            tensors = {"risk": done.risk, "evaluations": done.evaluations, "x": done.x}
        if judge:
            tensors["wrong"] = judge(tensors["x"]).to(torch.uint8)
        if not isinstance(detector, Fitting):
            del tensors["x"]
        return tensors, {}

    rows, stage = range(len(seeds)), "calibration"
    blocks = run.blocks(rows, block, work, what="calibrating", progress=progress, stage=stage)
    parts = [own for own, _ in blocks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _settled(setup: Setup, detector: Detector, found: _Measured, rates: Rates) -> Calibration:
    """Set the threshold by the share that the run asks for."""
    if isinstance(detector, LinearProbe):  # shares are those of this run's solver and grid
        detector = dataclasses.replace(detector, quantiles=probe.quantiles_of(found.risk))
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


def _grid_words(theirs: Sequence[float], mine: Sequence[float]) -> tuple[str, str]:
    """Two grids in words that tell them apart."""
    words = [f"{len(sigmas) - 1} steps from sigma {sigmas[0]:.4g} to {sigmas[-1]:.4g}" for sigmas in (theirs, mine)]
    if words[0] == words[1] and theirs != mine:
        i = max(range(len(mine)), key=lambda k: abs(theirs[k] - mine[k]))
        words = [f"{text} by way of {sigmas[i]:.4g}" for text, sigmas in zip(words, (theirs, mine), strict=True)]
    return words[0], words[1]


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
        there, here = _grid_words(found.sigmas, setup.sigmas.tolist())
        raise FanalError(
            f"{place} was calibrated with {found.solver} on {there}; this run has {config.solver} on {here}: a "
            "threshold holds for no other"
        )
    if found.probe is not None:
        found.probe.of(setup.network)
    _tell_conditions(place, saved.conditions, config, say)
    if not _rates(config):
        return saved
    if saved.risk is None:
        raise FanalError(f"{place} keeps no risks to set another threshold by: leave flag, catch and alarms out")
    measured = _Measured(saved.risk, saved.wrong, found.first_seed, found.evaluations)
    again = _settled(setup, found.build(), measured, _rates(config))
    return Saved(saved.model, saved.fingerprint, again, saved.conditions, saved.risk, saved.wrong)


# From labels.


def _from_labels(
    run: Run, setup: Setup, about: dict[str, Any], fingerprint: str, progress: Progress, say: Say
) -> Saved:
    """A threshold from a person's labels of an earlier run, with that run's risks, or watched again.

    A linear probe needs the labelled samples alone; one that is still to be fitted is fitted to them.
    """
    config, place = setup.config, Path(str(setup.config.labels))
    folder = place.parent
    record = record_of(folder)
    theirs = SampleConfig(**{**settings_of(folder), "model": config.model, "device": config.device})
    there, _ = prepare(theirs, setup.network)
    same = theirs.solver == config.solver and torch.equal(there.sigmas, setup.sigmas)
    if record.get("identity", {}).get("model") != fingerprint or not same:
        was, now = _grid_words(there.sigmas.tolist(), setup.sigmas.tolist())
        raise FanalError(
            f"the labels in {place} are of {record['config'].get('model')} with {theirs.solver} on {was}; this run "
            f"has {config.model} with {config.solver} on {now}: label a run like this one"
        )
    labels = open_labels(read_samples(folder))
    if place.name != labels.path.name:
        raise FanalError(f"{place} labels samples that the detector did not watch: label those before the repair")
    rows, codes = calibration.labelled(labels.codes, labels.count)
    if not len(rows):
        raise FanalError(f"{place} holds no label yet: fanal label {folder} serves a page to set some")
    if set(config.seeds()) & {theirs.seeds()[b] for b in rows.tolist()}:
        say("the labels are of samples of this run, so its flags look better than those of other seeds would")
    detector, again = chosen(setup), dataclasses.replace(there, config=theirs, dataset=None, detector=setup.detector)
    known, spent = _known(record, folder, detector), 0
    if known is None:
        say(f"{folder} was watched by another detector: watching its {theirs.count} samples again")
        known = _watch(run, again, detector, theirs.seeds(), again.start, progress)
        spent = round(float(known["evaluations"].sum()))
    known = {name: value[rows] for name, value in known.items()}
    detector, risk, asked = _judged(detector, take(again.bound(range(theirs.count)), rows), known, codes, config)
    found = _Measured(risk, codes != 0, theirs.seeds().start, spent + asked)
    settled = _settled(setup, detector, found, _rates_or_own(setup, about, detector))
    saved = _saved(theirs, fingerprint, settled, found)
    _tell_conditions(place, saved.conditions, config, say)
    return saved


def _judged(
    detector: Detector | Fitting, model: Denoiser, known: Mapping[str, Tensor], codes: Tensor, config: SampleConfig
) -> tuple[Detector, Float[Tensor, " b"], int]:
    """The risks of labelled samples, as `_fit`: as they are known, by a linear probe, or by what is fitted to them."""
    known = {name: value.to(config.device) if name == "x" else value for name, value in known.items()}
    if isinstance(detector, Fitting):
        return _fit(detector, model, known, codes)
    if "risk" in known:
        return detector, known["risk"], 0
    assert isinstance(detector, LinearProbe)
    before, blocks = evaluations(model), torch.arange(len(codes)).split(config.block)
    risk = torch.cat([detector.judge(take(model, rows), known["x"][rows]) for rows in blocks])
    return detector, risk, evaluations(model) - before


def _known(record: dict[str, Any], folder: Path, detector: Detector | Fitting) -> dict[str, Tensor] | None:
    """What a run folder has of what is needed: the samples for a linear probe, else the risks of this detector."""
    tensors = read_tensors(folder / "samples.safetensors")[0]
    if isinstance(detector, LinearProbe) or (isinstance(detector, Fitting) and not detector.parts):
        return {"x": first_samples(tensors)}
    told = None if isinstance(detector, Fitting) else json.loads(json.dumps(describe(detector)))
    if told is None or record.get("results", {}).get("detector") != told or "risk" not in tensors:
        return None
    return {"risk": tensors["risk"]}
