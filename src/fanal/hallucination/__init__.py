"""Find the samples that went wrong and repair them: detectors, repairs, calibration on other seeds, and RODS."""

from __future__ import annotations

from fanal.hallucination import calibration as calibration
from fanal.hallucination import combination as combination
from fanal.hallucination import detectors as detectors
from fanal.hallucination import evaluate as evaluate
from fanal.hallucination import observation as observation
from fanal.hallucination import repair as repair
from fanal.hallucination import rods as rods
from fanal.hallucination.calibration import Calibration as Calibration
from fanal.hallucination.calibration import calibrate as calibrate
from fanal.hallucination.detectors import DETECTORS as DETECTORS
from fanal.hallucination.detectors import Combined as Combined
from fanal.hallucination.detectors import Detector as Detector
from fanal.hallucination.detectors import LastSlope as LastSlope
from fanal.hallucination.detectors import Variance as Variance
from fanal.hallucination.ladder import Ladder as Ladder
from fanal.hallucination.repair import Fresh as Fresh
from fanal.hallucination.repair import Outcome as Outcome
from fanal.hallucination.repair import Redo as Redo
from fanal.hallucination.repair import Renoise as Renoise
from fanal.hallucination.repair import Repair as Repair
from fanal.hallucination.repair import watch as watch

REPAIRS: dict[str, type] = {"redo": Redo, "renoise": Renoise, "fresh": Fresh, "ladder": Ladder}
"""Name → class, for cards and the command line."""
