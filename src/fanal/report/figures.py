"""Figures on a page: interactive, as HTML that shares one embedded script."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from PIL import Image
from plotly.offline import get_plotlyjs
from torch import Tensor

from fanal.errors import FanalError, reason
from fanal.report.plots import (
    COLORS,
    INK,
    Bars,
    Drawing,
    Figure,
    Film,
    Heat,
    Mark,
    Panel,
    Picture,
    Sheet,
    Space,
    colored,
)

__all__ = ["markup", "script"]

_GRID, _CLEAR = "rgba(128,136,148,0.25)", "rgba(0,0,0,0)"
_MOST_EXACT, _MOST_BYTES = 40, 200_000  # side of pictures that are stored as they are, and size of their sheet
_MOST_PIXELS, _MOST_TOGETHER = 250_000, 600_000  # of a film's sheet, and of all sheets of a film
_HINTS = {Space: "Drag to turn.", Film: "Drag the slider to go along the run."}
_SIDE = 64  # of a picture at most


def script() -> str:
    """Return the plotting library's own script, to be embedded once."""
    return get_plotlyjs()


def _faint(color: str, alpha: float) -> str:
    red, green, blue = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _axis(title: str, log: bool = False, falling: bool = False, ticks: Sequence[float] = ()) -> dict[str, Any]:
    """Settings of a flat axis."""
    places = {"tickvals": list(ticks)} if ticks else {"dtick": 1} if log else {}
    return {
        "title": {"text": title, "standoff": 8},
        "type": "log" if log else "-",
        "autorange": "reversed" if falling else True,
        "gridcolor": _GRID,
        "zerolinecolor": _GRID,
        "exponentformat": "power",
        "minexponent": 4,
        "automargin": True,
        **places,
    }


def _mark(figure: go.Figure, marks: Sequence[Mark], log_x: bool = False, log_y: bool = False) -> None:
    for mark in marks:
        log = log_y if mark.level else log_x
        spot = math.log10(mark.at) if log else mark.at  # lines are placed by value, words by its logarithm
        own, other = ("y", "x") if mark.level else ("x", "y")
        figure.add_shape(
            type="line",
            line={"color": mark.color, "dash": "dash", "width": 1.5},
            **{
                f"{own}0": mark.at,
                f"{own}1": mark.at,
                f"{other}0": 0,
                f"{other}1": 1,
                f"{other}ref": f"{other} domain",
            },
        )
        if mark.text:
            side = {"xanchor": "right"} if mark.level else {"xanchor": "center"}
            look = {"text": mark.text, "showarrow": False, "yanchor": "bottom", **side}
            figure.add_annotation(**{own: spot, other: 1, f"{other}ref": f"{other} domain"}, **look)


def _band(x: list[float], y: list[float], spread: Sequence[float], color: str, log_y: bool) -> go.Scatter:
    high = [a + b for a, b in zip(y, spread, strict=True)]
    low = [a - b for a, b in zip(y, spread, strict=True)]
    low = [max(b, a * 1e-2) if log_y else b for a, b in zip(y, low, strict=True)]
    fill = {"fill": "toself", "fillcolor": _faint(color, 0.18), "line": {"width": 0}}
    return go.Scatter(x=x + x[::-1], y=high + low[::-1], mode="lines", hoverinfo="skip", showlegend=False, **fill)


def _panel(panel: Panel) -> go.Figure:
    figure = go.Figure()
    for line, color, first in colored(panel.lines):
        x, y = list(line.x), list(line.y)
        bars = None
        if line.spread is not None and line.points:
            bars = {"type": "data", "array": list(line.spread), "color": color}
        elif line.spread is not None:
            figure.add_trace(_band(x, y, line.spread, color, panel.log_y))
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines+markers" if line.points else "lines",
                name=line.name,
                legendgroup=line.name or None,
                showlegend=first,
                opacity=0.55 if line.faint else 1,
                error_y=bars,
                line={"color": color, "width": 1 if line.faint else 2, "dash": "dash" if line.dashed else "solid"},
                hovertemplate=f"{line.hover}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>" if line.hover else None,
            )
        )
    _mark(figure, panel.marks, panel.log_x, panel.log_y)
    figure.update_xaxes(**_axis(panel.x, panel.log_x, panel.falling, panel.ticks()))
    figure.update_yaxes(**_axis(panel.y, panel.log_y), rangemode="tozero" if panel.from_zero else "normal")
    if panel.log_x and not panel.ticks():
        figure.update_xaxes(**_decades([value for line in panel.lines for value in line.x]))
    if panel.log_y:
        figure.update_yaxes(**_decades([value for line in panel.lines for value in line.y]))
    return figure


def _decades(values: Sequence[float]) -> dict[str, Any]:
    """Labels of a logarithmic axis: few enough not to overlap, and more than one where it is short."""
    shown = [value for value in values if value and value > 0]
    if not shown:
        return {"dtick": 1}
    low, high = min(shown), max(shown)
    if high >= 10 * low or high == low:
        return {"dtick": max(1, math.ceil(math.log10(high / low) / 8))}
    first = math.floor(math.log10(low))
    inside = [lead * 10.0**k for k in (first, first + 1) for lead in (1, 2, 5) if low <= lead * 10.0**k <= high]
    return {"tickvals": inside, "dtick": None} if len(inside) > 1 else {"dtick": None}


def _bars(bars: Bars) -> go.Figure:
    figure, edges = go.Figure(), list(bars.edges)
    middles = [(a + b) / 2 for a, b in zip(edges[:-1], edges[1:], strict=True)]
    for (name, heights), color in zip(bars.groups.items(), bars.colors, strict=False):
        width = edges[1] - edges[0]
        figure.add_trace(go.Bar(x=middles, y=list(heights), width=width, name=name, marker_color=color, opacity=0.6))
    _mark(figure, bars.marks)
    figure.update_layout(barmode="overlay", showlegend=len(bars.groups) > 1)
    figure.update_xaxes(**_axis(bars.x))
    figure.update_yaxes(**_axis(bars.y))
    return figure


def _space(space: Space) -> go.Figure:
    figure = go.Figure()
    for k, points in enumerate(space.curves):
        x, y, z = (list(column) for column in zip(*points, strict=True))
        look = {"width": 4, "color": _faint(COLORS[k % len(COLORS)], 0.8)}
        figure.add_trace(go.Scatter3d(x=x, y=y, z=z, mode="lines", line=look, showlegend=False))
    grid = "rgba(128,136,148,0.55)"
    axis = {"gridcolor": grid, "backgroundcolor": _CLEAR, "color": INK, "zerolinecolor": grid, "nticks": 5}
    named: Any = {f"{key}axis": {"title": {"text": word}, **axis} for key, word in zip("xyz", space.axes, strict=True)}
    figure.update_scenes(
        **named,
        aspectmode="manual",
        aspectratio={"x": 1.5, "y": 1, "z": 1},
        camera={"eye": {"x": 1.3, "y": -2.2, "z": 1.0}, "center": {"x": 0, "y": 0, "z": -0.15}},
    )
    return figure


def _heat(heat: Heat) -> go.Figure:
    figure, written = go.Figure(), {}
    if heat.written:
        words = [["" if value is None else f"{value:.3g}" for value in row] for row in heat.values]
        written = {"text": words, "texttemplate": "%{text}"}
    figure.add_trace(
        go.Heatmap(
            x=list(heat.columns),
            y=list(heat.rows),
            z=[list(row) for row in heat.values],
            colorscale="Viridis",
            colorbar={"title": {"text": heat.scale, "side": "right"}, "thickness": 12},
            **written,
        )
    )
    names = isinstance(heat.columns[0], str)
    figure.update_xaxes(**_axis(heat.x, not names, heat.falling))
    figure.update_yaxes(**_axis(heat.y, not names), showgrid=False)
    return figure


def _plotted(figure: go.Figure, name: str, height: int) -> str:
    notes: Any = figure.layout["annotations"]
    marked = any(note.yref == "y domain" for note in notes)  # words above the plot
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 55, "r": 12, "t": 54 if marked else 34, "b": 45},
        legend={"orientation": "h", "y": 1.1 if marked else 1.02, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
    )
    config = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)


def _packed(images: Tensor, most: int = _MOST_PIXELS) -> str:
    """Pictures (rows, columns, H, W, C) side by side as a `data:` URI, large ones on so many pixels at most."""
    k, n, high, wide, depth = images.shape
    exact = max(high, wide) <= _MOST_EXACT  # noise does not pack: larger pictures lose what nobody sees
    scale = 1 if exact else min(_SIDE / max(high, wide), math.sqrt(most / (k * n * high * wide)), 1)
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    pixels = images.permute(0, 2, 1, 3, 4).reshape(k * high, n * wide, depth).numpy()
    whole = Image.fromarray(pixels[:, :, 0] if depth == 1 else pixels[:, :, :3]).convert("RGB")
    if (wide, high) != size:
        whole = whole.resize((n * size[0], k * size[1]), Image.Resampling.BOX)
    content, kind = _file(whole, "png", optimize=True) if exact else b"", "png"
    if not content or len(content) > _MOST_BYTES:
        content, kind = _file(whole, "jpeg", quality=75), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _film(film: Film, name: str) -> str:
    """Boxes that show one picture each of a layer's sheet, and a slider that says which."""
    shape = next(iter(film.layers.values())).shape
    k, n = int(shape[0]), int(shape[1])
    at = film.start % n
    most = min(_MOST_PIXELS, _MOST_TOGETHER // len(film.layers))
    sheets = "".join(
        f"#{name} .layer-{i}{{background-image:url({_packed(images, most)})}}"
        for i, images in enumerate(film.layers.values())
    )
    rows = []
    for i, layer in enumerate(film.layers):
        down = [100 * run / max(k - 1, 1) for run in range(k)]
        boxes = "".join(f'<i class="frame layer-{i}" style="--down:{at:.4f}%"></i>' for at in down)
        rows.append(f'<span class="soft">{html.escape(layer)}</span><div class="frames">{boxes}</div>')
    labels = html.escape("\n".join(film.labels))
    return (
        f'<div id="{name}" class="film" data-labels="{labels}" style="--count:{n};--runs:{k};--at:{at};'
        f'--shape:{int(shape[3])}/{int(shape[2])}"><style>{sheets}</style>{"".join(rows)}'
        f'<label><input type="range" min="0" max="{n - 1}" value="{at}" aria-label="step">'
        f"<output>{html.escape(film.labels[at])}</output></label></div>"
    )


def _sheet(sheet: Sheet) -> str:
    """Rows of pictures, each row's name above it."""
    rows = []
    for name, images in zip(sheet.rows, sheet.images, strict=True):
        n, high, wide = images.shape[:3]
        boxes = "".join(f'<i class="frame" style="--at:{i}" title="{html.escape(t)}"></i>' for i, t in
                        enumerate(sheet.columns or [""] * n))  # fmt: skip
        look = f"--count:{n};--shape:{wide}/{high};--picture:url({_packed(images[None])})"
        rows.append(f'<div style="{look}"><span class="soft">{html.escape(name)}</span>'
                    f'<div class="frames">{boxes}</div></div>')  # fmt: skip
    return f'<div class="sheet">{"".join(rows)}</div>'


def _picture(picture: Picture) -> str:
    try:
        content = base64.b64encode(picture.path.read_bytes()).decode()
    except OSError as error:
        raise FanalError(f"cannot read {picture.path}: {reason(error)}") from error
    return f'<img class="wide" src="data:image/png;base64,{content}" alt="{html.escape(picture.alternative)}">'


def _drawn(drawing: Drawing, name: str) -> str:
    if isinstance(drawing, Panel):
        return _plotted(_panel(drawing), name, 340)
    if isinstance(drawing, Bars):
        return _plotted(_bars(drawing), name, 340)
    if isinstance(drawing, Heat):
        return _plotted(_heat(drawing), name, 360)
    if isinstance(drawing, Space):
        return _plotted(_space(drawing), name, 480)
    if isinstance(drawing, Film):
        return _film(drawing, name)
    return _sheet(drawing) if isinstance(drawing, Sheet) else _picture(drawing)


def markup(figure: Figure) -> str:
    """Return a figure as HTML; the id of its first drawing is its name, then come `NAME-2`, ….

    Raises:
        FanalError: a picture of it cannot be read.
    """
    parts = [
        _drawn(drawing, figure.name if i == 0 else f"{figure.name}-{i + 1}")
        for i, drawing in enumerate(figure.drawings)
    ]
    inner = "".join(f"<div>{part}</div>" for part in parts)
    words = [
        figure.caption,
        *(hint for kind, hint in _HINTS.items() if any(isinstance(d, kind) for d in figure.drawings)),
    ]
    caption = f"<figcaption>{html.escape(' '.join(filter(None, words)))}</figcaption>" if any(words) else ""
    wide = any(isinstance(drawing, Heat) for drawing in figure.drawings)  # names take room
    columns = min(len(parts), 2) if wide else len(parts)
    return f'<figure class="plot"><div class="drawings n{columns}">{inner}</div>{caption}</figure>'
