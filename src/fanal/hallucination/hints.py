"""What each data set asks for: shares to flag, settings of repairs, and where its detectors should look."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from fanal.hallucination.detectors import last_window

__all__ = ["FLAG", "HINTS", "WINDOWS", "tuples", "window_of"]

FLAG = 0.35
"""Share of samples flagged by default, where a card says nothing else."""

HINTS: dict[str, dict[str, Any]] = {
    "grid2": {
        "detector": "last_slope",
        "flag": 0.05,
        "repair": {
            "redo": {"kappa": 0.1, "window": [0.1, 4.0]},
            "renoise": {"sigma": 1.5, "rounds": 4},
            "ladder": {"rungs": [[0.5, 12], [1.5, 16], [1.5, 16]]},
        },
    },
    "shapes32": {
        "repair": {
            "ladder": {
                "rungs": [[1.4, 10], [2.3, 12], [4.4, 14], [8.1, 16], [8.1, 16]],
                "accept": [0.3, 0.25, 0.2, 0.15],
                "eta": 0.7,
                "flag": 0.45,
            },
        },
    },
    "hands32": {
        "repair": {
            "ladder": {
                "rungs": [[2.3, 20], [4.4, 22], [8.1, 24], [8.1, 24]],
                "accept": [0.22, 0.18],
                "eta": 0.0,
                "flag": 0.33,
            },
        },
    },
}
"""What a data set asks for, where the defaults, made for images in [−1, 1], do not fit; the start of its cards."""

WINDOWS: dict[str, dict[str, tuple[float, float]]] = {
    "hands32": {
        "variance": (0.0, 0.9),
        "path_length": (0.0, 0.9),
        "early_stop": (0.0, 0.9),
        "undecided": (1.0, 2.5),
        "second_difference": (0.0, 0.3),
        "slope_change": (0.15, 2.5),
        "jacobian": (0.2, 2.5),
        "gradient_norm": (0.7, 1.5),
        "rods_index": (0.2, 1.5),
    },
    "shapes32": {
        "variance": (0.0, 3.6),
        "path_length": (0.0, 2.5),
        "early_stop": (0.0, 2.5),
        "undecided": (0.7, 2.5),
        "second_difference": (0.0, 1.9),
        "slope_change": (0.5, 2.5),
        "jacobian": (0.12, 4.0),
        "gradient_norm": (2.0, 5.5),
        "rods_index": (0.7, 1.5),
    },
    "grid2": {
        "variance": (0.0, 0.005),
        "path_length": (0.0, 0.005),
        "early_stop": (0.0, 0.005),
        "second_difference": (0.0, 0.012),
        "slope_change": (0.0, 0.012),
        "jacobian": (0.12, 0.3),
        "gradient_norm": (0.025, 0.3),
        "rods_index": (0.05, 0.3),
    },
}
"""Data set → detector → the window in sigma that told most on tuning seeds, which nothing is reported on."""


def tuples(value: Any) -> Any:
    """Return what a card holds with its lists as tuples, at every depth."""
    if isinstance(value, dict):
        return {key: tuples(part) for key, part in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def window_of(detector: str, sigmas: Float[Tensor, " n"], data: str = "") -> tuple[float, float]:
    """Return the window for a detector: the tuned one of the data set, else the last 40 % of the grid's intervals.

    Args:
        detector: its name.
        sigmas: the grid.
        data: name of a data set.
    """
    return WINDOWS.get(data, {}).get(detector) or last_window(sigmas)
