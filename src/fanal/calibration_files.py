"""Calibration files: a detector with its threshold, what it was measured on, and the risks to set another one by.

A linear probe has many numbers, and lies in a file of its own beside: `NAME.probe.safetensors` of `NAME.json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal.errors import FanalError, is_number
from fanal.files import read_json, write_json
from fanal.hallucination import probe
from fanal.hallucination.calibration import Calibration

__all__ = ["FORMAT", "Saved", "calibration_file", "read_calibration", "write_calibration"]

FORMAT = "fanal-calibration-1"
"""What a calibration file says it is."""


@dataclass(frozen=True, eq=False)
class Saved:
    """A calibration with where it comes from.

    Attributes:
        model: spec of the model, as in `fanal.load`.
        fingerprint: hash of its content; "" for closed forms.
        calibration: the detector and its threshold.
        conditions: label, prompt, captions, negative prompt and guidance that it was measured under.
        risk: (B,) of the samples it was measured on; None: not kept.
        wrong: (B,) which of them are wrong; None: nobody knows.
    """

    model: str
    fingerprint: str
    calibration: Calibration
    conditions: Mapping[str, Any] = field(default_factory=dict)
    risk: Float[Tensor, " b"] | None = None
    wrong: Bool[Tensor, " b"] | None = None


def write_calibration(path: str | Path, saved: Saved) -> None:
    """Write a calibration file, atomically.

    Raises:
        FanalError: it cannot be written.
    """
    value = {
        "format": FORMAT,
        "model": saved.model,
        "fingerprint": saved.fingerprint,
        "conditions": dict(saved.conditions),
        "calibration": saved.calibration.to_dict(),
        "risk": None if saved.risk is None else saved.risk.tolist(),
        "wrong": None if saved.wrong is None else saved.wrong.tolist(),
    }
    if saved.calibration.probe is not None:
        told = f"{saved.model}: the judge of the calibration {Path(path).name}"
        probe.write(_probe_file(Path(path)), saved.calibration.probe, told)
    write_json(Path(path), value)


def _probe_file(place: Path) -> Path:
    return place.with_suffix(".probe.safetensors")


def _with_probe(found: Calibration, place: Path) -> Calibration:
    """Open the linear probe beside a calibration file."""
    if found.detector != probe.LinearProbe.kind:
        return found
    judge = probe.read(_probe_file(place))
    if judge.to_dict() != found.options:
        raise FanalError(f"{_probe_file(place)} is not the probe that {place} was measured with: calibrate again")
    return dataclasses.replace(found, probe=judge)


def calibration_file(path: str | Path) -> Path:
    """Return the calibration file that a path means: itself, or the one in a run folder.

    Raises:
        FanalError: there is none.
    """
    place = Path(path) / "calibration.json" if Path(path).is_dir() else Path(path)
    if not place.is_file():
        made = "a run of fanal guard, or of fanal sample --guard, has one, and fanal guard --save FILE writes one"
        raise FanalError(f"there is no calibration at {place}: {made}")
    return place


def read_calibration(path: str | Path) -> Saved:
    """Read a calibration file, or the one in a run folder.

    Raises:
        FanalError: there is none, or it is damaged.
    """
    place = calibration_file(path)
    value = read_json(place)
    if value.get("format") != FORMAT:
        raise FanalError(f"{place} is no calibration file (format {value.get('format')!r:.40}, wanted {FORMAT})")
    try:
        saved = Saved(
            model=value["model"],
            fingerprint=value["fingerprint"],
            calibration=Calibration.from_dict(value["calibration"]),
            conditions=dict(value["conditions"]),
            risk=_numbers(value["risk"]),
            wrong=_truths(value["wrong"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FanalError(f"{place} is damaged ({error!r:.80}): calibrate again") from error
    texts = isinstance(saved.model, str) and isinstance(saved.fingerprint, str)
    lengths = {len(part) for part in (saved.risk, saved.wrong) if part is not None}
    if not texts or len(lengths) > 1:
        raise FanalError(f"{place} is damaged (model, fingerprint, risk or wrong): calibrate again")
    return dataclasses.replace(saved, calibration=_with_probe(saved.calibration, place))


def _numbers(value: Any) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(is_number(v) and math.isfinite(v) for v in value):
        raise ValueError("risk is a list of numbers")
    return torch.tensor(value, dtype=torch.float64)


def _truths(value: Any) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, bool) for v in value):
        raise ValueError("wrong is a list of true and false")
    return torch.tensor(value, dtype=torch.bool)
