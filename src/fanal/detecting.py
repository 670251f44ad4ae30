"""What watches a run: the detector that was asked for, the judge that a repair needs, or the model's own."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from fanal.config import build_detector, fitted_options
from fanal.errors import FanalError
from fanal.hallucination import combination, probe
from fanal.hallucination.calibration import window_of
from fanal.hallucination.detectors import FITTED, FREE, Contrast, Detector, LastSlope, Running, build, last_window
from fanal.hallucination.fitting import Fitting
from fanal.preparation import Setup

__all__ = ["chosen", "detector_of", "wanted_of"]


def detector_of(setup: Setup) -> Detector:
    """Return what watches a run that has no calibration.

    Raises:
        FanalError: it has to be fitted first.
    """
    found = chosen(setup)
    if isinstance(found, Fitting):
        raise FanalError(f"{found.kind} is fitted to labelled samples: fanal guard does that before it samples")
    return found


def wanted_of(setup: Setup) -> str:
    """Return the detector that was asked for, as it was written; a ladder asks for a judge of finished samples."""
    ladder = "probe" if "ladder" in setup.repairs else ""
    return setup.config.detector or ladder


def chosen(setup: Setup) -> Detector | Fitting:
    """Return what watches, or has to be fitted to do so: the wanted detector, or else the model's.

    The model's looks at its tuned window, or at the last part of the grid where that holds too few steps. Where this
    does too, the last slope takes its place, and on a single step from infinite sigma, which has no slope, the contrast
    of the prediction: a run is not refused for the sake of a figure that nobody asked for.
    """
    data, wanted = setup.dataset.name if setup.dataset else "", wanted_of(setup)
    name = wanted.partition(":")[0]
    if name in FITTED:
        return _fitted(setup, name, wanted, data)
    if wanted:
        return build_detector(wanted, window_of(name, setup.sigmas, data))
    own = (build(setup.detector, window) for window in _windows(setup.detector, setup.sigmas, data))
    return next((detector for detector in (*own, LastSlope()) if _sees(detector, setup.sigmas)), Contrast())


def _fitted(setup: Setup, name: str, wanted: str, data: str) -> Detector | Fitting:
    """A detector that was fitted before: in a file, or for this network; else what has to be fitted."""
    options = fitted_options(wanted)
    if options["file"]:
        return probe.read(options["file"]).of(setup.network) if name == "probe" else combination.load(options["file"])
    if name == "probe":
        own = probe.shipped(setup.network) if wanted == "probe" else None
        return own or Fitting({}, options["strength"], options["sigmas"])
    # the contrast is left out unless it is asked for: with it a gate may select by what is in the picture
    names = options["parts"] or tuple(part for part in FREE if part != "contrast")
    eyes = ((part, build(part, window)) for part in names for window in _windows(part, setup.sigmas, data))
    parts: dict[str, Detector] = {}
    for part, eye in eyes:
        if part not in parts and _sees(eye, setup.sigmas):
            parts[part] = eye
    if not parts:
        raise FanalError(f"none of {', '.join(names)} sees enough steps of this grid to be combined: take more steps")
    return Fitting(parts, options["strength"])


def _windows(detector: str, sigmas: Tensor, data: str) -> Iterator[tuple[float, float]]:
    yield window_of(detector, sigmas, data)
    yield last_window(sigmas)


def _sees(detector: Detector, sigmas: Tensor) -> bool:
    """Whether a grid has as many steps in a detector's window as it needs."""
    (low, high), needs = detector.window, 1
    if detector.free and isinstance(eye := detector.start(), Running):
        (low, high), needs = eye.window, eye.needs  # those of the last step have no window of their own
    return sum(low <= sigma <= high for sigma in sigmas[:-1].tolist() if not math.isinf(sigma)) >= needs
