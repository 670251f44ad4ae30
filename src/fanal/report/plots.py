"""What figures show, not how they are drawn: pages (Plotly) and papers (Matplotlib) draw the same descriptions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

__all__ = [
    "BLUE",
    "COLORS",
    "INK",
    "RED",
    "Bars",
    "Drawing",
    "Figure",
    "Film",
    "Heat",
    "Line",
    "Mark",
    "Panel",
    "Picture",
    "Sheet",
    "Space",
    "colored",
    "histogram",
]

COLORS = BLUE, RED, *_ = ("#2f6fdb", "#d1495b", "#2a9d5c", "#e09f3e", "#7b5ea7", "#4aa3a2")
"""Of the lines of a figure, in order."""

INK = "#7d8894"
"""Of marks: seen on a light page and on a dark one."""


@dataclass(frozen=True)
class Line:
    """A curve with a band around it.

    Attributes:
        name: shown in the legend, once for all lines of that name; empty: not shown.
        x: where.
        y: the curve.
        spread: half the height of the band, or an error bar's where points are drawn; None: none.
        color: its color; None: the next one.
        points: whether its points are marked.
        dashed: whether it is dashed.
        faint: one of many curves.
        hover: what is said of it under the mouse, beside its coordinates.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    color: str | None = None
    points: bool = False
    dashed: bool = False
    faint: bool = False
    hover: str = ""


@dataclass(frozen=True)
class Mark:
    """A straight line across a plot, with a word beside it.

    Attributes:
        at: where.
        text: the word.
        level: whether it is level, at a value of y; else it is upright, at a value of x.
        color: its color.
    """

    at: float
    text: str = ""
    level: bool = False
    color: str = INK


@dataclass(frozen=True)
class Panel:
    """Curves over one axis.

    Attributes:
        x: title of the horizontal axis.
        y: title of the vertical axis.
        lines: what is drawn.
        marks: lines across it.
        log_x: whether the horizontal axis is in powers of ten.
        log_y: likewise.
        falling: whether the horizontal axis runs from large to small, as a run does.
        from_zero: whether the vertical axis begins at 0.
    """

    x: str
    y: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False
    falling: bool = False
    from_zero: bool = False

    def ticks(self) -> list[float]:
        """Where the horizontal axis is labeled: at the points, where few are marked; else where it is fit, and none."""
        at = sorted({float(value) for line in self.lines if line.points for value in line.x})
        return at if len(at) <= 12 else []


@dataclass(frozen=True)
class Bars:
    """Distributions drawn over each other.

    Attributes:
        x: title of the horizontal axis.
        y: title of the vertical axis.
        edges: of the bins, one more than there are bars.
        groups: heights by name.
        colors: one per group.
        marks: lines across it.
    """

    x: str
    y: str
    edges: Sequence[float]
    groups: Mapping[str, Sequence[float]]
    colors: Sequence[str] = COLORS
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Space:
    """Curves in three dimensions, which turn under the mouse.

    Attributes:
        axes: their titles.
        curves: each a list of points of three coordinates.
    """

    axes: tuple[str, str, str]
    curves: Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Heat:
    """A matrix as colors.

    Attributes:
        x: title of the horizontal axis.
        y: title of the vertical axis.
        columns: names, or places on an axis in powers of ten.
        rows: likewise.
        values: one list per row; None: nothing is drawn there.
        scale: what the colors mean.
        written: whether the values are written into the fields.
        falling: whether the horizontal axis runs from large to small.
    """

    x: str
    y: str
    columns: Sequence[str] | Sequence[float]
    rows: Sequence[str] | Sequence[float]
    values: Sequence[Sequence[float | None]]
    scale: str
    written: bool = False
    falling: bool = False


@dataclass(frozen=True, eq=False)
class Film:
    """Pictures along runs, with a slider.

    Attributes:
        layers: uint8 images (K, N, H, W, C) by name, drawn one above the other for each of K runs.
        labels: what each of the N steps is called.
        start: the step that a page shows first; from the end where it is negative.
    """

    layers: Mapping[str, Tensor]
    labels: Sequence[str]
    start: int = -1


@dataclass(frozen=True, eq=False)
class Sheet:
    """Pictures in rows.

    Attributes:
        images: uint8, (rows, columns, H, W, C).
        rows: their names.
        columns: their names; none: they have none.
    """

    images: Tensor
    rows: Sequence[str]
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A picture file.

    Attributes:
        path: a PNG file.
        alternative: what it shows, in words.
    """

    path: Path
    alternative: str


Drawing = Panel | Bars | Space | Heat | Film | Sheet | Picture


@dataclass(frozen=True)
class Figure:
    """One figure: a row of drawings with a caption.

    Attributes:
        name: of its file, and its id on the page.
        caption: how to read it, and whose figure it is in the form of.
        drawings: side by side.
    """

    name: str
    caption: str
    drawings: Sequence[Drawing] = field(default_factory=tuple)


def colored(lines: Sequence[Line]) -> list[tuple[Line, str, bool]]:
    """Return lines with their colors, and whether each is the first of its name, which the legend shows."""
    out, seen, place = [], set(), 0
    for line in lines:
        color = line.color
        if color is None:
            color, place = COLORS[place % len(COLORS)], place + 1
        out.append((line, color, bool(line.name) and line.name not in seen))
        seen.add(line.name)
    return out


def histogram(
    x: str,
    groups: Mapping[str, Sequence[float]],
    *,
    bins: int = 50,
    share: bool = True,
    colors: Sequence[str] = COLORS,
    marks: Sequence[Mark] = (),
) -> Bars:
    """Count values in equal bins.

    Args:
        x: what they are.
        groups: values by name.
        bins: how many there are from the smallest to the largest value.
        share: in percent of each group; else as counts.
        colors: one per group.
        marks: lines across it.
    """
    finite = {name: [value for value in values if math.isfinite(value)] for name, values in groups.items()}
    every = [value for values in finite.values() for value in values] or [0.0]
    low, high = min(every), max(every)
    edges = np.linspace(low, high if high > low else low + 1e-9, bins + 1)
    heights = {}
    for name, values in finite.items():
        counts = np.histogram(values, edges)[0]
        heights[name] = (100 * counts / max(len(values), 1) if share else counts).tolist()
    return Bars(x, "% of the group" if share else "samples", edges.tolist(), heights, colors, marks)
