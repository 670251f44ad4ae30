"""Sheets of small panels: what checks compared, one row for each, as pictures for the docs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fanal.files import write_atomically
from fanal.report.paper import formats_of
from fanal.report.plots import COLORS, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from fanal.pde.theory.findings import Finding
    from fanal.pde.theory.panels import Curve, Panel

__all__ = ["LIMIT", "Row", "compact", "row", "sheet", "write_sheet"]

LIMIT = 150 * 1024
"""Largest size of a picture in the docs, in bytes."""

_WIDTH, _HEIGHT, _DPI = 8.4, 1.95, 110  # inches of a sheet and of a row's panels: as wide as a page's text
_LETTERS = 145  # of a heading's line
_DARK, _PALE = "#1d2733", 0.35
_LOOK: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.edgecolor": "#cfd8e0",
    "axes.labelcolor": _DARK,
    "axes.titlesize": 8,
    "axes.titlecolor": _DARK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.use_mathtext": True,
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "legend.fontsize": 6.5,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.handlelength": 1.5,
    "legend.borderpad": 0.2,
    "legend.labelspacing": 0.25,
    "xtick.color": "#47535f",
    "ytick.color": "#47535f",
    "lines.linewidth": 1.2,
}
_LOOKS: dict[str, dict[str, Any]] = {
    "line": {},
    "wide": {"linewidth": 4.5, "alpha": _PALE, "zorder": 1.5},
    "dashed": {"linestyle": "--", "linewidth": 1.0},
    "points": {"linestyle": "none", "marker": "o", "markersize": 3},
    "dots": {"linestyle": "none", "marker": "o", "markersize": 1.3, "markeredgewidth": 0},
    "joined": {"marker": "o", "markersize": 3, "linewidth": 0.9},
}


@dataclass(frozen=True, eq=False)
class Row:
    """Panels side by side under a heading.

    Attributes:
        heading: what they show.
        note: figures, under it.
        panels: from left to right.
    """

    heading: str
    note: str
    panels: Sequence[Panel]


def row(name: str, found: Finding) -> Row:
    """Return a check as a row: its equation, what it says, what was measured, and its panels.

    Args:
        name: of the check.
        found: what it returned.
    """
    verdict = "holds" if found.holds else "DOES NOT HOLD"
    said = f"{found.measured}: {found.error:.2g}, allowed {found.tolerance:.2g}; {verdict}"
    return Row(f"{found.number} · {name} · {found.says}", said, found.panels)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _curve(axes: Any, curve: Curve, color: str) -> None:
    look = {**_LOOKS[curve.look], "color": color, "label": _plain(curve.name) or None}
    if curve.spread is None:
        axes.plot(curve.x, curve.y, **look)
    else:
        low = curve.spread if axes.get_yscale() == "linear" else np.minimum(curve.spread, 0.9 * curve.y)
        axes.errorbar(curve.x, curve.y, [low, curve.spread], capsize=1.5, elinewidth=0.8, **look)


def _powers(axis: Any) -> None:
    """Label powers of ten, and where there are few, what lies between them."""
    from matplotlib import ticker

    low, high = sorted(axis.get_view_interval())
    few = high < 40 * low
    if few:
        axis.set_major_locator(
            ticker.LogLocator(subs=[1.0, 2.0, 5.0] if high > 5 * low else [float(k) for k in range(1, 10)])
        )
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:.4g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _draw(axes: Any, panel: Panel) -> None:
    axes.set_xscale("log" if "x" in panel.log else "linear")
    axes.set_yscale("log" if "y" in panel.log else "linear")
    if panel.image is not None:
        x, y, values = panel.image
        axes.pcolormesh(x, y, values, cmap="Blues", alpha=0.7, linewidth=0, rasterized=True)
        axes.grid(visible=False)
    for k, curve in enumerate(panel.curves):
        place = k if curve.color is None else curve.color
        _curve(axes, curve, INK if place < 0 else COLORS[place % len(COLORS)])
    for name, at in panel.levels.items():
        axes.axhline(at, color=_DARK, linestyle=":", linewidth=1.0, label=_plain(name))
    if panel.square:
        axes.set_aspect("equal", adjustable="box" if panel.image is not None else "datalim")
    if panel.falling:
        axes.invert_xaxis()
    axes.margins(y=0.08)
    for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if letter in panel.log:
            _powers(axis)
    axes.set_title(_plain(panel.title))
    axes.set(xlabel=_plain(panel.x), ylabel=_plain(panel.y))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _headed(rows: Sequence[Row]) -> list[str]:
    return ["\n".join([*textwrap.wrap(each.heading, _LETTERS), *textwrap.wrap(each.note, _LETTERS)]) for each in rows]


def sheet(rows: Sequence[Row]) -> Canvas:
    """Draw rows of panels below each other.

    Raises:
        FanalError: Matplotlib is not installed.
    """
    formats_of("png")
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    headings = _headed(rows)
    heights = [_HEIGHT + 0.16 * (text.count("\n") + 1) for text in headings]
    with mpl.rc_context(_LOOK):
        canvas = Canvas(figsize=(_WIDTH, sum(heights)), layout="constrained", facecolor="white")
        parts: Any = np.ravel(np.array(canvas.subfigures(len(rows), 1, height_ratios=heights)))
        for part, each, text in zip(parts, rows, headings, strict=True):
            part.suptitle(_plain(text), x=0.01, ha="left", fontsize=7.5, color=_DARK)
            for axes, panel in zip(np.ravel(part.subplots(1, len(each.panels))), each.panels, strict=True):
                _draw(axes, panel)
        canvas.draw_without_rendering()
        return canvas


def compact(image: Image.Image, target: Path, limit: int = LIMIT) -> None:
    """Write a picture as a PNG with as many colors as fit under a limit, or with the fewest.

    Args:
        image: what to write.
        target: a PNG file.
        limit: in bytes.
    """
    for colors in (256, 128, 64, 32, 16):
        small = image.quantize(colors, kmeans=2, dither=Image.Dither.NONE)
        write_atomically(target, lambda part, s=small: s.save(part, format="PNG", optimize=True))
        if target.stat().st_size <= limit:
            break


def write_sheet(rows: Sequence[Row], target: Path) -> None:
    """Draw rows of panels into a PNG file of at most `LIMIT`.

    Args:
        rows: from the top.
        target: the file.

    Raises:
        FanalError: Matplotlib is not installed, or the file cannot be written.
    """
    import io

    import matplotlib as mpl

    drawn = io.BytesIO()
    canvas = sheet(rows)
    with mpl.rc_context(_LOOK):
        canvas.savefig(drawn, dpi=_DPI, format="png", metadata={"Software": None})
    compact(Image.open(drawn).convert("RGB"), target)
