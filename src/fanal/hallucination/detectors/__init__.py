"""Detectors: consumers of finished transitions that give every sample a risk.

A detector is a frozen description; `start()` gives a watch that sees one run. Free ones need no call of the network
beyond the run's own; the others get the denoiser, `start(denoiser)`, and what they ask is counted where the run's own
calls are. `begin` does the right one of the two. Windows are in sigma, so that a run that starts half-way is judged
like a whole one, and no watch keeps a trajectory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fanal.errors import FanalError, unknown_name
from fanal.hallucination.detectors.asking import OVER as OVER
from fanal.hallucination.detectors.asking import GradientNorm as GradientNorm
from fanal.hallucination.detectors.asking import JacobianProbe as JacobianProbe
from fanal.hallucination.detectors.asking import RodsIndex as RodsIndex
from fanal.hallucination.detectors.combined import Combined as Combined
from fanal.hallucination.detectors.combined import Part as Part
from fanal.hallucination.detectors.free import Contrast as Contrast
from fanal.hallucination.detectors.free import EarlyStop as EarlyStop
from fanal.hallucination.detectors.free import Gray as Gray
from fanal.hallucination.detectors.free import LastSlope as LastSlope
from fanal.hallucination.detectors.free import PathLength as PathLength
from fanal.hallucination.detectors.free import SecondDifference as SecondDifference
from fanal.hallucination.detectors.free import SlopeChange as SlopeChange
from fanal.hallucination.detectors.free import Undecided as Undecided
from fanal.hallucination.detectors.free import Variance as Variance
from fanal.hallucination.detectors.watching import Detector as Detector
from fanal.hallucination.detectors.watching import Running as Running
from fanal.hallucination.detectors.watching import Watch as Watch
from fanal.hallucination.detectors.watching import begin as begin
from fanal.hallucination.detectors.watching import last_window as last_window

__all__ = [
    "DETECTORS",
    "FITTED",
    "FREE",
    "Combined",
    "Contrast",
    "Detector",
    "EarlyStop",
    "GradientNorm",
    "Gray",
    "JacobianProbe",
    "LastSlope",
    "Part",
    "PathLength",
    "RodsIndex",
    "Running",
    "SecondDifference",
    "SlopeChange",
    "Undecided",
    "Variance",
    "Watch",
    "begin",
    "build",
    "describe",
    "last_window",
]

DETECTORS: dict[str, type] = {
    "variance": Variance,
    "path_length": PathLength,
    "second_difference": SecondDifference,
    "slope_change": SlopeChange,
    "early_stop": EarlyStop,
    "undecided": Undecided,
    "last_slope": LastSlope,
    "gray": Gray,
    "contrast": Contrast,
    "jacobian": JacobianProbe,
    "gradient_norm": GradientNorm,
    "rods_index": RodsIndex,
}
"""Name → class, for cards and the command line."""

FITTED: tuple[str, ...] = ("combined", "probe")
"""Detectors that exist only once they were fitted to labelled samples; they describe themselves."""

FREE: tuple[str, ...] = tuple(
    name
    for name, kind in DETECTORS.items()
    if next(field.default for field in dataclasses.fields(kind) if field.name == "free")
)
"""Names of the detectors that need no call beyond the run's own."""


def _kind(name: str) -> type:
    kinds = {**DETECTORS, "combined": Combined}  # which is no detector of its own, and so not in the registry
    if not isinstance(name, str) or name not in kinds:
        raise unknown_name("detector", str(name), kinds)
    return kinds[name]


def build(name: str, window: tuple[float, float], **options: Any) -> Detector:
    """Build a detector from its name; those that need no window ignore it.

    Args:
        name: one of `DETECTORS`, or "combined".
        window: closed range of sigma that it looks at.
        options: its further fields, such as `v="score"` for the index of RODS.

    Raises:
        FanalError: no detector has this name, it has no such option, or a value is none of the option's.
    """
    if name == "probe":
        raise FanalError("a linear probe is no set of options but a file: fanal.hallucination.probe.read opens it")
    kind = _kind(name)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    known = [field for field in fields if field != "window"]
    for option in options:
        if option not in known:
            raise FanalError(f"{name} has no option {option!r:.40}: it has {', '.join(known) or 'none'}")
    if kind is Combined:
        return Combined.from_dict(options)
    return kind(**({"window": window} if "window" in fields else {}), **options)


def describe(detector: Detector) -> dict[str, Any]:
    """Return one of fanal's detectors as plain JSON values: `detector`, `window`, and the `options` that `build` takes.

    Raises:
        FanalError: it is none of them.
    """
    window = [float(v) for v in detector.window]
    kind = getattr(type(detector), "kind", None)
    if kind in FITTED:
        return {"detector": kind, "window": window, "options": detector.to_dict()}  # pyright: ignore
    name = next((name for name, kind in DETECTORS.items() if type(detector) is kind), None)
    if name is None:
        raise FanalError(f"{type(detector).__name__} is none of fanal's detectors: {', '.join(DETECTORS)}")
    fields = [field.name for field in dataclasses.fields(DETECTORS[name]) if field.init and field.name != "window"]
    return {"detector": name, "window": window, "options": {field: getattr(detector, field) for field in fields}}
