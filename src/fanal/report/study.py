"""Pages of measurements: sections with interactive figures, one sentence on how to read each, and their numbers."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go

from fanal.errors import FanalError
from fanal.files import write_atomically
from fanal.report.figures import script

__all__ = ["COLORS", "Line", "Section", "band_figure", "histogram_figure", "picture", "space_figure", "write_study"]

COLORS = ("#2f6fdb", "#d1495b", "#2a9d5c", "#e09f3e", "#7b5ea7", "#4aa3a2")
"""Of the lines of a figure, in order."""

_INK, _GRID = "#7d8894", "rgba(128,136,148,0.25)"  # seen on a light page and on a dark one


@dataclass(frozen=True)
class Line:
    """A curve with a band around it.

    Attributes:
        name: shown in the legend.
        x: where.
        y: the curve.
        spread: half the height of the band; None: no band.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: what it is about.
        reading: one sentence on how to read it.
        figures: HTML fragments.
        head: of the table.
        rows: of the table; none: no table.
    """

    title: str
    reading: str
    figures: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)


def picture(path: Path, alternative: str) -> str:
    """Return a picture file as HTML.

    Args:
        path: a PNG file.
        alternative: what it shows, in words.

    Raises:
        FanalError: it cannot be read.
    """
    try:
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise FanalError(f"cannot read {path}: {error.strerror or error}") from error
    style = "max-width:100%;image-rendering:pixelated"
    return f'<img src="data:image/png;base64,{content}" alt="{html.escape(alternative)}" style="{style}">'


def _clear(color: str, alpha: float) -> str:
    red, green, blue = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _html(figure: go.Figure, name: str, height: int) -> str:
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 15, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.1},
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def band_figure(
    lines: Sequence[Line], name: str, x: str, y: str, *, log_x: bool = False, log_y: bool = False, falling: bool = False
) -> str:
    """Draw curves with bands.

    Args:
        lines: what to draw.
        name: id of the figure, unique on its page.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        log_x: whether it is in powers of ten.
        log_y: likewise.
        falling: whether the horizontal axis runs from large to small, as a run does.
    """
    figure = go.Figure()
    for line, color in zip(lines, COLORS * (len(lines) // len(COLORS) + 1), strict=False):
        at, values = list(line.x), list(line.y)
        if line.spread is not None:
            high = [a + b for a, b in zip(values, line.spread, strict=True)]
            low = [a - b for a, b in zip(values, line.spread, strict=True)]
            low = [max(b, a * 1e-2) if log_y else b for a, b in zip(values, low, strict=True)]
            figure.add_trace(
                go.Scatter(
                    x=at + at[::-1],
                    y=high + low[::-1],
                    fill="toself",
                    fillcolor=_clear(color, 0.18),
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
        figure.add_trace(
            go.Scatter(
                x=at,
                y=values,
                mode="lines",
                name=line.name,
                line={"color": color, "width": 2},
                showlegend=bool(line.name),
            )
        )
    axis: dict[str, Any] = {"gridcolor": _GRID, "zerolinecolor": _GRID, "exponentformat": "power"}
    figure.update_xaxes(title=x, type="log" if log_x else "linear", autorange="reversed" if falling else True, **axis)
    figure.update_yaxes(title=y, type="log" if log_y else "linear", **axis)
    return _html(figure, name, 360)


def histogram_figure(groups: Mapping[str, Sequence[float]], name: str, x: str, mark: float | None = None) -> str:
    """Draw distributions over each other, as shares of their group.

    Args:
        groups: values by name.
        name: id of the figure, unique on its page.
        x: title of the horizontal axis.
        mark: where to draw a vertical line.
    """
    figure = go.Figure()
    every = [value for values in groups.values() for value in values]
    low, high = min(every), max(every)
    bins = {"start": low, "end": high + 1e-9, "size": max((high - low) / 50, 1e-9)}
    for (label, values), color in zip(groups.items(), COLORS, strict=False):
        trace = go.Histogram(
            x=list(values), name=label, marker_color=color, opacity=0.6, xbins=bins, histnorm="percent"
        )
        figure.add_trace(trace)
    if mark is not None:
        figure.add_vline(mark, line={"color": _INK, "dash": "dash"}, annotation_text="threshold")
    figure.update_layout(barmode="overlay")
    axis: dict[str, Any] = {"gridcolor": _GRID, "zerolinecolor": _GRID}
    figure.update_xaxes(title=x, **axis)
    figure.update_yaxes(title="% of the group", **axis)
    return _html(figure, name, 360)


def space_figure(curves: Sequence[Sequence[Sequence[float]]], name: str, axes: tuple[str, str, str]) -> str:
    """Draw curves in three dimensions, to be turned with the mouse.

    Args:
        curves: each a list of points of three coordinates.
        name: id of the figure, unique on its page.
        axes: titles of the axes.
    """
    figure = go.Figure()
    for k, points in enumerate(curves):
        x, y, z = (list(column) for column in zip(*points, strict=True))
        color = _clear(COLORS[k % len(COLORS)], 0.6)
        figure.add_trace(go.Scatter3d(x=x, y=y, z=z, mode="lines", line={"width": 3, "color": color}, showlegend=False))
    axis = {"gridcolor": _GRID, "backgroundcolor": "rgba(0,0,0,0)", "color": _INK}
    figure.update_scenes(
        xaxis={"title": axes[0], **axis},
        yaxis={"title": axes[1], **axis},
        zaxis={"title": axes[2], **axis},
        aspectmode="manual",
        aspectratio={"x": 1.6, "y": 1, "z": 1},
    )
    return _html(figure, name, 520)


def write_study(
    path: Path, title: str, lines: Sequence[str], sections: Sequence[Section], record: Mapping[str, Any]
) -> None:
    """Write a page that opens offline.

    Args:
        path: the file.
        title: of the page, after "fanal".
        lines: what was found, in a few sentences.
        sections: the page's parts.
        record: the run's `run.json`, whose settings end the page.

    Raises:
        FanalError: it cannot be written.
    """
    facts = [(key, str(value)) for key, value in record["config"].items() if value not in (None, [], "")]
    facts += [(f"network {key}", str(value)) for key, value in record.get("network", {}).items()]
    facts += [("seconds", f"{record['seconds']:.1f}")] if "seconds" in record else []
    facts += [(f"{name} version", value) for name, value in record.get("versions", {}).items()]
    source = (resources.files("fanal.report") / "study.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    page = template.render(title=title, lines=lines, sections=sections, facts=facts, script=script())
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
