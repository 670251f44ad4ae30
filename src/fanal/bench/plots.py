"""Pages of line plots with error bars, which open offline."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fanal.files import write_atomically

__all__ = ["Line", "Panel", "write_plots"]


@dataclass(frozen=True)
class Line:
    """Points of one method.

    Attributes:
        name: of the method.
        x: where.
        y: the figures.
        se: their standard errors; None where there is none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    se: Sequence[float | None]


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: above it.
        lines: what it shows.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        log: both axes in powers of ten.
    """

    title: str
    lines: Sequence[Line]
    x: str
    y: str
    log: bool = True


def _fragment(panel: Panel, index: int) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for line in panel.lines:
        bars = {"type": "data", "array": [se or 0.0 for se in line.se]}
        figure.add_trace(go.Scatter(x=list(line.x), y=list(line.y), error_y=bars, mode="lines+markers", name=line.name))
    kind = "log" if panel.log else "linear"
    figure.update_xaxes(title=panel.x, type=kind)
    figure.update_yaxes(title=panel.y, type=kind)
    figure.update_layout(template="plotly_white", height=520, title=panel.title)
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot-{index}")


def write_plots(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write a page with every panel and the script that draws them.

    Raises:
        FanalError: the place cannot be written.
    """
    from fanal.report.figures import script

    body = "\n".join(_fragment(panel, i) for i, panel in enumerate(panels))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><script>{script()}</script>'
    page = f"<!DOCTYPE html>\n<html><head>{head}</head>\n<body>{body}</body></html>\n"
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
