"""The page of `fanal encode`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fanal.report.geometry.run import estimate
from fanal.report.plots import Figure, Line, Panel, Picture
from fanal.report.study import Page, Section, Table, study
from fanal.summary import estimated

__all__ = ["encode_page", "hint"]

_ERRORS = ("round trip", "other round trip", "codes apart", "codes of other images apart")
_APART = ("codes apart", "codes of other images apart", "predictions apart")


_UNIT = 0.2
"""How far the mean norm over √d of codes may be from 1 before they are told not to be unit noise."""


def hint(results: Mapping[str, Any]) -> str:
    """Return what to try where codes are no unit noise; empty where they are, by the last number of steps."""
    norm = results["table"][-1]["norm / sqrt d"]["value"]
    if abs(norm - 1) <= _UNIT:
        return ""
    return (
        f"Codes have a mean norm of {norm:.2g}·√d, where unit noise has √d: at the smallest sigma these images are not "
        "what the model expects, as where pixels never vary. Try --noisy, and a higher --sigma-min."
    )


def _line(rows: Sequence[Mapping[str, Any]], key: str, name: str, x: str = "steps") -> Line:
    found = [estimated(row[key]) for row in rows]
    at = [float(row[x]) for row in rows]
    return Line(name, at, [each.value for each in found], [each.se for each in found], points=True)


def _solvers(results: Mapping[str, Any]) -> list[Figure]:
    """Round-trip errors of several solvers by what they cost."""
    found = results.get("solvers", [])
    names = list(dict.fromkeys(row["solver"] for row in found))
    if len(names) < 2:
        return []
    lines = [
        _line([row for row in found if row["solver"] == name], "round trip", name, "evaluations") for name in names
    ]
    caption = "Root mean square round-trip error per entry by solver, over predictions per image, there and back."
    return [Figure("solvers", caption, [Panel("predictions per image", "per entry", lines, log_x=True, log_y=True)])]


def _pairs(results: Mapping[str, Any]) -> list[Section]:
    """How far the codes of several models are apart."""
    found = results.get("pairs", [])
    keys = [key for key in _APART if any(key in row for row in found)]
    rows = [
        [" and ".join(row["models"]), *(estimate(row[key]) if key in row else "–" for key in keys)] for row in found
    ]
    if not rows:
        return []
    return [
        Section(
            "Codes of several models",
            "Networks that learned one law give one image one code, up to their score error: codes of one image are "
            "nearer than those of different ones.",
            tables=[Table("pairs-of-models", ["models", *keys], rows, "Root mean square per entry.")],
        )
    ]


def encode_page(folder: Path, record: Mapping[str, Any]) -> Page:
    """Return the page of an encoding run, from its record and its `samples.png`."""
    config, rows = record["config"], record["results"]["table"]
    names = [name for name in rows[0] if name != "steps"]
    lines = [_line(rows, name, name) for name in _ERRORS if name in names]
    error = Figure(
        "round-trip",
        "Root mean square per entry, each with its standard error: of an image that was encoded and decoded again"
        + (", and of the codes that two models give one image, beside those of different images." if len(lines) > 1
           else "."),
        [Panel("steps", "per entry", lines, log_x=True, log_y=True)],
    )  # fmt: skip
    shown = Figure(
        "codes",
        "From above: images, their codes at half contrast, what comes back; for points from left to right.",
        [Picture(folder / "samples.png", "images, their codes, and what comes back")],
    )
    cells = [[str(row["steps"]), *(estimate(row[name]) for name in names)] for row in rows]
    sections = [
        Section(
            "What is lost",
            "The error falls with the number of steps at the solver's order, while the equation is one to one; codes "
            "are unit noise where their norm over √d and the spread of their entries are 1.",
            [error, *_solvers(record["results"])],
            tables=[Table("codes", ["steps", *names], cells)],
        ),
        *_pairs(record["results"]),
        Section("Images and codes", "A code looks like noise, and holds the image.", [shown]),
    ]
    last = rows[-1]
    told = [
        f"{config['count']} images of {config['data']} to the noise of {config['model']} with {config['solver']}, and "
        "back.",
        f"With {last['steps']} steps an image comes back to {estimate(last['round trip'])} per entry.",
        *filter(None, [hint(record["results"])]),
    ]
    return study(f"encode: {config['model']}", told, sections, record)
