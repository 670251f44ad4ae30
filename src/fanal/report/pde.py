"""The page of `fanal pde`: densities under a slider, with their mass, their sign and their error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from fanal.files import read_tensors
from fanal.pde.laws import RADIAL
from fanal.report.plots import COLORS, INK, Figure, Line, Mark, Panel
from fanal.report.study import Page, Section, Table, study

__all__ = ["densities_page", "headlines", "slider"]

_FRAMES, _CURVE, _MAP = 40, 1000, 150
_LEAST_MAP = 190  # width of a map, in pixels
_OPENED = 1  # place of the frame that is seen first: at t = 0 ways back have no density
_NAMES = {
    "forward": "forward",
    "truth": "closed form",
    "stable": "stable reverse",
    "ode": "deterministic reverse",
    "unstable": "unstable reverse",
}
_GRID, _CLEAR = "rgba(128,136,148,0.25)", "rgba(0,0,0,0)"
_BUTTON = {
    "type": "buttons",
    "x": 0.0,
    "xanchor": "left",
    "y": 0,
    "yanchor": "top",
    "showactive": False,
    "bgcolor": _CLEAR,
    "bordercolor": INK,
}
# Plotly paints a button that was pressed, or that the mouse is over, nearly white, which in the dark its word is too.
_STYLE = "<style>#{name} .updatemenu-item-rect {{ fill: transparent !important; }}</style>"

Array = NDArray[np.float64]


def _frames(count: int, most: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def slider(
    figure: go.Figure, frames: Sequence[go.Frame], labels: Sequence[str], name: str, height: int, active: int = 0
) -> str:
    """Return a figure that a slider, or a button, takes from frame to frame, as HTML.

    Args:
        figure: as it is first.
        frames: what the slider leads through, by their names.
        labels: one per frame.
        name: id of the figure, unique on its page.
        height: in pixels.
        active: place of the frame that the figure is first.
    """
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [
        {"args": [[frame.name], still], "label": label, "method": "animate"}
        for frame, label in zip(frames, labels, strict=True)
    ]
    moving = {"frame": {"duration": 120, "redraw": True}, "transition": {"duration": 0}, "fromcurrent": True}
    play = {"label": "play", "method": "animate", "args": [None, moving]}
    figure.frames = list(frames)
    layouts: list[Any] = [frame.layout for frame in frames]
    breaks = max(str(layout["title"]["text"]).count("<br>") for layout in layouts)
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 15, "t": 116 + 16 * breaks, "b": 100},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        sliders=[
            {
                "steps": steps,
                "active": active,
                "x": 0.0,
                "len": 1.0,
                "y": 0,
                "pad": {"t": 60},
                "currentvalue": {"xanchor": "right"},
            }
        ],
        updatemenus=[{"buttons": [play], "pad": {"t": 48}, **_BUTTON}],
    )
    axis: Any = {"gridcolor": _GRID, "zerolinecolor": _GRID}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    config = {"displaylogo": False, "displayModeBar": False, "responsive": True}  # its tools would cover the legend
    html = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config, auto_play=False)
    return _STYLE.format(name=name) + html


class _Run:
    """A run's densities and figures."""

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.record, self.results = record, record["results"]
        tensors, _ = read_tensors(folder / "densities.safetensors")
        self.arrays: dict[str, Array] = {key: value.numpy() for key, value in tensors.items()}
        self.times: Array = self.arrays["times"]
        self.centers = [self.arrays[f"centers.{k}"] for k in range(len(self.results["cells"]))]
        self.exact = self.results.get("closed form", self.record["config"]["process"] == "ou")
        self.ways = [way for way in ("stable", "ode") if way in self.arrays]

    @property
    def drawn(self) -> slice:
        """Cells of an axis that are drawn: a page is for eyes."""
        most = _CURVE if len(self.centers) == 1 else _MAP
        return slice(None, None, math.ceil(max(self.results["cells"]) / most))

    def kept(self, most: int) -> list[int]:
        """Times that are frames: 0, the early time, and others up to the last."""
        return [0, *(1 + i for i in _frames(len(self.times) - 1, most - 1))]

    @property
    def axis(self) -> str:
        """What the one axis is."""
        return "distance from 0" if self.record["config"]["law"] in RADIAL else "x"

    def at(self, name: str, index: int) -> Array | None:
        """Density of a solution at the forward time of an index; none where a way back does not get there."""
        if name in ("forward", "truth"):
            return self.arrays[name][index]
        return self.arrays[name][len(self.times) - 1 - index] if index else None

    def shown(self) -> list[str]:
        """Solutions in the order they are drawn."""
        return ["forward", *(["truth"] if self.exact else []), *self.ways]

    def told(self, index: int) -> str:
        """Mass and least density of all solutions at a time, for the title."""
        volume = float(np.prod([c[1] - c[0] for c in self.centers]))
        parts = []
        for name in (n for n in self.shown() if n != "truth"):
            p = self.at(name, index)
            if p is not None:
                off = float(p.sum()) * volume - 1
                parts.append(f"{_NAMES[name]}: mass 1 {'+' if off >= 0 else '−'} {abs(off):.0e}, least {p.min():.0e}")
        return "<br>".join(parts)


def _lines(page: _Run) -> str:
    """Curves on one axis."""
    x = page.centers[0][page.drawn]
    kept = page.kept(_FRAMES)

    def traces(index: int) -> list[go.Scatter]:
        out = []
        for k, name in enumerate(page.shown()):
            p = page.at(name, index)
            line: dict[str, Any] = {"color": COLORS[k], "width": 2, "dash": "dash" if name == "truth" else "solid"}
            out.append(
                go.Scatter(x=x, y=np.full_like(x, np.nan) if p is None else p[page.drawn], name=_NAMES[name], line=line)
            )
        return out

    figure = go.Figure(traces(kept[_OPENED]))
    top = 1.05 * max(float(page.arrays[name].max()) for name in page.shown())
    figure.update_yaxes(range=[-0.03 * top, top], title="density")
    figure.update_xaxes(title=page.axis)
    return _animated(page, figure, kept, traces, 520)


def _animated(page: _Run, figure: go.Figure, kept: Sequence[int], traces: Any, height: int) -> str:
    """Frames at forward times, the title telling mass and sign."""

    def title(index: int) -> dict[str, Any]:
        look = {"font": {"size": 12}, "x": 0, "y": 1, "yanchor": "top", "pad": {"t": 18}}
        return {"title": {"text": page.told(index), **look}}

    frames = [go.Frame(data=traces(i), name=str(i), layout=title(i)) for i in kept]
    figure.update_layout(title(kept[_OPENED]))
    return slider(figure, frames, [f"t = {page.times[i]:.3g}" for i in kept], "densities", height, _OPENED)


def _maps(page: _Run) -> str:
    """Pictures on two axes, side by side, each frame on its own scale."""
    names = [name for name in page.shown() if name != "truth"]
    kept = page.kept(25)

    def traces(index: int) -> list[go.Heatmap]:
        x, y = (c[page.drawn].astype(np.float32) for c in page.centers)
        out = []
        for k, name in enumerate(names):
            p = page.at(name, index)
            z = (
                np.full((len(y), len(x)), np.nan, np.float32)
                if p is None
                else p[page.drawn, page.drawn].T.astype(np.float32)
            )
            axes = {"xaxis": f"x{k + 1}", "yaxis": f"y{k + 1}"}
            out.append(go.Heatmap(x=x, y=y, z=z, colorscale="Viridis", showscale=False, zmin=0, **axes))
        return out

    figure = make_subplots(1, len(names), subplot_titles=[_NAMES[name].replace(" ", "<br>") for name in names])
    figure.update_annotations(font={"size": 13})
    figure.add_traces(traces(kept[_OPENED]))
    ranges = [[float(c[0] - (c[1] - c[0]) / 2), float(c[-1] + (c[1] - c[0]) / 2)] for c in page.centers]
    figure.update_xaxes(range=ranges[0], constrain="domain", nticks=4)
    for k in range(len(names)):
        figure.update_yaxes(range=ranges[1], constrain="domain", scaleanchor=f"x{k + 1}", nticks=5, row=1, col=k + 1)
    wide = f"min-width: {_LEAST_MAP * len(names)}px"  # a phone scrolls, so that maps can be read there
    return f'<div class="scroll"><div style="{wide}">{_animated(page, figure, kept, traces, 480)}</div></div>'


def _number(value: float | None, digits: int = 3) -> str:
    return "infinite" if value is None else f"{value:.{digits}g}"


def _rate(value: float | None, digits: int) -> str:
    return "not measured (too short a run for these cells)" if value is None else _number(value, digits)


def _moving(page: _Run) -> Section:
    return Section(
        "Densities",
        "All solutions at one forward time under the slider; a way back passes the same times from right to left, "
        f"and ends at t = {page.times[1]:.3g}, where the page opens: at 0 there is only the law. "
        "The title says how much mass each has, and its smallest value.",
        [_lines(page) if len(page.centers) == 1 else _maps(page)],
    )


def _densities(page: _Run) -> Section:
    rows = []
    for name in ("forward", *page.ways):
        own = page.results[name]
        end = own["end"]
        rows.append(
            [
                _NAMES[name],
                f"{own['mass error']:.1e}",
                f"{own['least density']:.1e}",
                _number(own["largest tv"]),
                *(_number(end[key]) if key in end else "–" for key in ("tv", "kl", "w2")),
            ]
        )
    against = "the closed form" if page.exact else "the forward solution"
    head = ["solution", "largest mass error", "least density", "largest TV", "TV at its end", "KL", "W2"]
    return Section(
        "Mass, sign and distance",
        f"Distances are from {against}: total variation at any time, and three distances at a solution's end, which "
        "for a way back is the early time.",
        [_errors(page), *([_snapshots(page)] if len(page.centers) == 1 else [])],
        [Table("solutions", head, rows)],
    )


def _errors(page: _Run) -> Figure:
    lines = []
    for name in ("forward", *page.ways):
        values = page.results[name]["tv"]
        at, values = (page.times[1:], values[1:]) if name == "forward" else (page.times[:0:-1], values)
        color = COLORS[page.shown().index(name)]
        lines.append(Line(_NAMES[name], at.tolist(), [max(v, 1e-17) for v in values], color=color))
    return Figure(
        "errors",
        "Total variation from what each solution should be at that time; ways back go from right to left.",
        [Panel("t", "total variation", lines, log_x=True, log_y=True)],
    )


def _snapshots(page: _Run) -> Figure:
    """Still curves at a few times, which papers can print."""
    x = page.centers[0][page.drawn].tolist()
    panels = []
    for index in [1 + i for i in _frames(len(page.times) - 1, 4)][::-1]:
        lines = []
        for k, name in enumerate(page.shown()):
            p = page.at(name, index)
            if p is not None:
                lines.append(Line(_NAMES[name], x, p[page.drawn].tolist(), color=COLORS[k], dashed=name == "truth"))
        panels.append(Panel(page.axis, f"density at t = {page.times[index]:.3g}", lines))
    return Figure("snapshots", "The same densities at four forward times.", panels)


def _wave(number: int | Sequence[int]) -> str:
    return ", ".join(map(str, number)) if isinstance(number, Sequence) else str(number)


def _unstable(page: _Run) -> Section:
    found, times = page.results["unstable"], page.arrays["unstable.times"].tolist()
    growth = page.arrays["unstable.growth"].tolist()
    seen = [i for i, value in enumerate(growth) if value > 0]
    measured = Line("difference from the true density", [times[i] for i in seen], [growth[i] for i in seen])
    # The line of the theory ends where the measured one does, and begins where that has risen above its own first part.
    slope = {s: growth[-1] * float(np.exp(found["theory"] * (s - times[-1]))) for s in times}
    slope = {s: value for s, value in slope.items() if value > 0.1 * min(growth[i] for i in seen)}
    rows = [[f"wave {_wave(w['wave'])}", _number(w["theory"], 6), _number(w["measured"], 6)] for w in found["waves"]]
    shortest = "4/h²" if len(page.centers) == 1 else "4/hx² + 4/hy²"
    rows += [[f"shortest wave of the grid, {shortest}", _number(found["theory"], 6), _rate(found["rate"], 6)]]
    fastest = found["fastest"]
    known = "" if fastest is None else f" Largest growth rate of the grid's matrix: {fastest:.6g}."
    marks = [] if found["lost"] is None else [Mark(found["lost"], "lost")]
    theory = Line(f"rate {shortest}", list(slope), list(slope.values()), dashed=True)
    panel = Panel("s = T* − t", "difference", [measured, theory], marks, log_y=True)
    return Section(
        "The unstable reverse",
        "Run backwards as it stands, the equation makes each wave grow, the shortest fastest: soon rounding is larger "
        f"than the density. Its time s runs from the late end: s = T* − t.{known}",
        [Figure("growth", "Size of the difference from the density that it should follow.", [panel])],
        [Table("rates", ["wave", "rate in theory", "rate measured"], rows)],
    )


def headlines(record: Mapping[str, Any]) -> list[str]:
    """What a run found, in a few sentences.

    Args:
        record: its `run.json`.
    """
    results = record["results"]
    solved = [results[name] for name in ("forward", "stable", "ode") if name in results]
    least = min(own["least density"] for own in solved)
    lines = [
        f"Mass is kept to {max(own['mass error'] for own in solved):.0e}, and "
        + ("no density is negative." if least >= 0 else f"no density is below {least:.0e}.")
    ]
    for name in ("stable", "ode"):
        if name in results:
            end = results[name]["end"]
            goal = "where it should" if record["config"]["start"] == "forward" else "the forward density"
            lines.append(
                f"The {_NAMES[name]} ends {_number(end['tv'])} in total variation from {goal}"
                + (f", {_number(end['w2'])} in W2." if "w2" in end else ".")
            )
        if "told" in results.get(name, {}):
            told = {key: _number(value) for key, value in results[name]["told"].items()}
            lines.append(
                f"By eq. 3.19 such a start ends {told['wanted tv']} from the forward density; it ends {told['tv']} "
                "from there."
            )
    if "particles" in results:
        own = results["particles"]
        verb = "agree" if own["agree"] else "do NOT agree"
        cure = "" if own["agree"] else " More --steps or --cells bring the solution nearer."
        lines.append(
            f"{own['count']:,} exact particles {verb} with the forward density at the end (Kolmogorov–Smirnov, "
            f"p = {own['p-value']:.3g}, level {own['level']:g}).{cure}"
        )
    if "unstable" in results:
        own = results["unstable"]
        lines.append(
            f"The unstable reverse grows at rate {_rate(own['rate'], 4)}, in theory {_number(own['theory'], 4)}"
            + ("." if own["lost"] is None else f", and is lost {own['lost']:.3g} after it starts.")
        )
    return lines


def densities_page(folder: Path, record: Mapping[str, Any]) -> Page:
    """Return the page of a run of `fanal pde`.

    Args:
        folder: the run.
        record: its `run.json`.

    Raises:
        FanalError: the run cannot be read.
    """
    run = _Run(folder, record)
    sections = [_moving(run), _densities(run)] + ([_unstable(run)] if "unstable" in run.results else [])
    return study(f"pde: {record['config']['law']}", headlines(record), sections, record)
