"""The section on how alike trajectories are, within and between models, and by chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fanal.geometry.regularity import MEASURES as KEYS
from fanal.metrics import Estimate
from fanal.report.geometry.run import GeometryRun, estimate
from fanal.report.geometry.shape import curve_points
from fanal.report.plots import Figure, Heat, Line, Panel, Space
from fanal.report.study import Section, Table
from fanal.summary import estimated

__all__ = ["KEYS", "NULLS", "SECTIONS", "cell", "compared"]

_MOST_WRITTEN, _MOST_TOLD = 8, 210  # groups in a map with numbers, rows of a page's table

NULLS = {"smooth": "random smooth curves", "forward": "noise paths"}
"""What chance is measured by, in words."""


def cell(found: Mapping[str, Any], key: str, i: int, j: int) -> Estimate:
    """Return how far two groups' curves are apart by one measure, as `regularity` of the results holds it."""
    error = found.get("se", {}).get(key)
    return estimated({"value": found[key][i][j], "se": None if error is None else error[i][j], "n": 2})


def compared(found: Mapping[str, Any], most: int = 3 * _MOST_WRITTEN) -> list[list[str]]:
    """Return rows of how alike curves are: within groups, between pairs of them, and by chance.

    Args:
        found: `regularity` of the results.
        most: rows of groups and pairs at most; one row more says how many are left out.
    """
    names = found["names"]
    size = range(len(names))
    pairs = [(i, i) for i in size] + [(i, j) for i in size for j in size if i < j]
    rows = []
    for i, j in pairs[:most]:
        who = f"within {names[i]}" if i == j else f"{names[i]} and {names[j]}"
        rows.append([who, *(cell(found, key, i, j).rounded() for key in KEYS)])
    if len(pairs) > most:
        rows.append([f"{len(pairs) - most} more pairs, in run.json", *("" for _ in KEYS)])
    for key, word in NULLS.items():
        chance = found.get("nulls", {}).get(key, {})
        if chance:
            rows.append([f"by chance: {word}", *(estimate(chance[k]) if k in chance else "–" for k in KEYS)])
    return rows


def _tables(found: Mapping[str, Any]) -> Figure:
    names = list(found["names"])
    heats = []
    for key in KEYS:
        cells = [[None if v is None or not math.isfinite(v) else float(v) for v in row] for row in found[key]]
        heats.append(Heat("", "", names, names, cells, key, written=len(names) <= _MOST_WRITTEN))
    return Figure(
        "regularity",
        "How far curves of one group are from those of another, mean over pairs: residual of the best motion, and "
        "distance of curvature and of torsion as functions of log sigma. 0: one curve; within a group on the diagonal.",
        heats,
    )


def _forward(run: GeometryRun, found: Mapping[str, Any]) -> list[Figure]:
    """Paths of noise alone: their projections, and the shares that their components explain."""
    figures = []
    if "forward" in run.tensors:
        axes = ("sigma √d", "first component", "second component")
        figures.append(
            Figure(
                "forward-paths",
                "Forward noise paths from the same ends, projected as the trajectories are: in many dimensions "
                "cosines, which two by two draw Lissajous curves ([REG] sec. 7).",
                [Space(axes, curve_points(run, "forward"))],
            )
        )
    chance = found.get("nulls", {}).get("forward", {})
    counts = [k for k in range(1, 20) if f"explained by {k}" in chance]
    if counts:
        own = [k for k in counts if f"explained by {k}" in run.numbers]
        law = [chance.get(f"explained by {k}, in many dimensions") for k in counts]
        lines = [
            _spectrum("trajectories", own, [run.numbers[f"explained by {k}"] for k in own]),
            _spectrum(NULLS["forward"], counts, [chance[f"explained by {k}"] for k in counts]),
        ]
        if all(share is not None for share in law):
            lines.append(Line("in many dimensions", counts, [100 * float(share) for share in law], dashed=True))
        figures.append(
            Figure(
                "spectra",
                "Share of the variance off the chord that k principal components explain: of trajectories, of noise "
                "paths of the same dimension, and of noise paths in many dimensions.",
                [Panel("components", "% explained", lines)],
            )
        )
    return figures


def _spectrum(name: str, counts: list[int], found: list[Mapping[str, Any]]) -> Line:
    values = [math.nan if each["value"] is None else 100 * each["value"] for each in found]
    errors = [0.0 if each["se"] is None else 100 * each["se"] for each in found]
    return Line(name, counts, values, errors, points=True)


def _regularity(run: GeometryRun) -> list[Section]:
    found = run.results.get("regularity")
    if not found:
        return []
    several = [_tables(found)] if len(found["names"]) > 1 else []
    return [
        Section(
            "How alike, and how alike by chance",
            "Trajectories share a shape where distances between them are well below those by chance. "
            "Each figure is a mean over pairs of curves with its standard error.",
            [*several, *_forward(run, found)],
            tables=[
                Table(
                    "regularity-numbers",
                    ["curves", *KEYS],
                    compared(found, _MOST_TOLD),
                    "How far curves are apart: mean over pairs of them ± standard error.",
                )
            ],
        )
    ]


SECTIONS = (_regularity,)
"""In the order of the page."""
