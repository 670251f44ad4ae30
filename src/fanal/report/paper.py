"""The figures of a page as files for papers: PDF, PNG or SVG, and its tables as LaTeX."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanal.errors import FanalError
from fanal.files import write_atomically
from fanal.report.plots import COLORS, Bars, Drawing, Figure, Film, Heat, Mark, Panel, Picture, Sheet, Space, colored

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from fanal.report.study import Table

__all__ = ["FORMATS", "formats_of", "write_all"]

FORMATS = ("pdf", "png", "svg")
"""Kinds of files that figures are written as."""

_LOOK: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # fonts that editors can read
    "svg.hashsalt": "fanal",  # the same figure is the same file
    "lines.linewidth": 1.2,
}
_MOST_FRAMES, _MOST_ROWS = 10, 12
_LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "√": r"$\surd$",
    "‖": r"$\|$",
    "–": "--",
    "−": "$-$",
    "…": r"\dots{}",
}
_LATEX |= {"σ": r"$\sigma$", "^": r"\^{}", "~": r"\~{}"} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def formats_of(text: str | None) -> tuple[str, ...]:
    """Return what `--figures` asks for, as in `pdf` or `pdf,png`; nothing where it is not given.

    Raises:
        FanalError: a format is unknown, or Matplotlib is not installed.
    """
    if text is None:
        return ()
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    wrong = [name for name in names if name not in FORMATS]
    if wrong:
        raise FanalError(f"figures are written as {', '.join(FORMATS)}, with commas; got {wrong[0]!r:.40}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise FanalError("figures for papers need Matplotlib: pip install 'fanal[figures]'") from error
    return names


def _plain(text: str) -> str:
    """Text without the signs that Matplotlib reads as a formula."""
    return text.replace("$", r"\$")


def _mark(axes: Any, marks: Sequence[Mark]) -> None:
    for mark in marks:
        look = {"color": mark.color, "linestyle": "--", "linewidth": 0.9}
        if mark.level:
            axes.axhline(mark.at, **look)
            spot, where = (0.99, mark.at), axes.get_yaxis_transform()
        else:
            axes.axvline(mark.at, **look)
            spot, where = (mark.at, 1.0), axes.get_xaxis_transform()
        side = {"ha": "right", "va": "bottom"} if mark.level else {"ha": "center", "va": "bottom"}
        axes.text(*spot, _plain(mark.text), transform=where, color=mark.color, fontsize=6.5, **side)


def _panel(axes: Any, panel: Panel) -> None:
    axes.set_xscale("log" if panel.log_x else "linear")
    axes.set_yscale("log" if panel.log_y else "linear")
    for line, color, first in colored(panel.lines):
        look: dict[str, Any] = {"color": color, "label": _plain(line.name) if first else None}
        look |= {"linestyle": "--"} if line.dashed else {}
        look |= {"alpha": 0.55, "linewidth": 0.7} if line.faint else {}
        x, y = list(line.x), list(line.y)
        if line.points:
            axes.errorbar(x, y, line.spread, marker="o", markersize=3, capsize=2, **look)
            continue
        axes.plot(x, y, **look)
        if line.spread is not None:
            high = [a + b for a, b in zip(y, line.spread, strict=True)]
            low = [max(a - b, a * 1e-2) if panel.log_y else a - b for a, b in zip(y, line.spread, strict=True)]
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.ticks():
        axes.set_xticks(panel.ticks(), [f"{at:g}" for at in panel.ticks()])
        axes.minorticks_off()
    if panel.falling:
        axes.invert_xaxis()
    _mark(axes, panel.marks)
    axes.set(xlabel=_plain(panel.x), ylabel=_plain(panel.y))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _bars(axes: Any, bars: Bars) -> None:
    for (name, heights), color in zip(bars.groups.items(), bars.colors, strict=False):
        axes.stairs(list(heights), list(bars.edges), fill=True, color=color, alpha=0.6, label=_plain(name))
    _mark(axes, bars.marks)
    axes.set(xlabel=_plain(bars.x), ylabel=_plain(bars.y))
    if len(bars.groups) > 1:
        axes.legend()


def _space(axes: Any, space: Space) -> None:
    for k, points in enumerate(space.curves):
        axes.plot(*zip(*points, strict=True), color=COLORS[k % len(COLORS)], alpha=0.6, linewidth=0.8)
    axes.set(xlabel=_plain(space.axes[0]), ylabel=_plain(space.axes[1]), zlabel=_plain(space.axes[2]))
    axes.set_box_aspect((1.5, 1, 1), zoom=0.85)
    axes.view_init(elev=22, azim=-58)
    axes.tick_params(labelsize=6)
    axes.locator_params(nbins=5)


def _heat(axes: Any, heat: Heat) -> None:
    values = [[math.nan if value is None else value for value in row] for row in heat.values]
    axes.grid(visible=False)
    if isinstance(heat.columns[0], str):
        drawn = axes.imshow(values, cmap="viridis", origin="lower", aspect="auto")
        names = [_plain(str(name)) for name in heat.columns], [_plain(str(name)) for name in heat.rows]
        axes.set_xticks(range(len(names[0])), names[0], rotation=30, ha="right")
        axes.set_yticks(range(len(names[1])), names[1])
    else:
        drawn = axes.pcolormesh(heat.columns, heat.rows, values, cmap="viridis", shading="nearest", rasterized=True)
        axes.set(xscale="log", yscale="log")
        if heat.falling:
            axes.invert_xaxis()
    if heat.written:
        for i, row in enumerate(heat.values):
            for j, value in enumerate(row):
                if value is not None:
                    light = drawn.norm(value) > 0.6
                    words = {"ha": "center", "va": "center", "fontsize": 7, "color": "black" if light else "white"}
                    axes.text(j, i, f"{value:.3g}", **words)
    axes.figure.colorbar(drawn, ax=axes, label=_plain(heat.scale))
    axes.set(xlabel=_plain(heat.x), ylabel=_plain(heat.y))


def _laid(film: Film) -> Sheet:
    """Some steps of the first runs from left to right, their layers below each other."""
    import torch

    layers, names = list(film.layers.values()), list(film.layers)
    count = layers[0].shape[1]
    keep = torch.linspace(0, count - 1, min(_MOST_FRAMES, count)).round().long().unique()
    runs = max(1, _MOST_ROWS // len(layers))
    rows = torch.stack(layers, 1)[:runs, :, keep].flatten(0, 1)  # (runs·layers, n, H, W, C)
    return Sheet(rows, names * (len(rows) // len(names)), [film.labels[int(i)] for i in keep.tolist()])


def _sheet(axes: Any, sheet: Sheet) -> None:
    from torch.nn import functional

    gap = max(1, max(sheet.images.shape[2:4]) // 12)
    images = functional.pad(sheet.images, (0, 0, 0, gap, 0, gap), value=255)
    rows, columns, high, wide, depth = images.shape
    pixels = images.permute(0, 2, 1, 3, 4).reshape(rows * high, columns * wide, depth).numpy()
    shown = pixels[:, :, 0] if depth == 1 else pixels[:, :, :3]
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.grid(visible=False)
    small: Any = {"fontsize": 6}
    axes.set_yticks([(i + 0.5) * high - 0.5 for i in range(rows)], [_plain(name) for name in sheet.rows], **small)
    middles = [(i + 0.5) * wide - 0.5 for i in range(len(sheet.columns))]
    axes.set_xticks(middles, [_plain(name) for name in sheet.columns], rotation=30, ha="right", **small)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _picture(axes: Any, picture: Picture) -> None:
    from PIL import Image

    try:
        with Image.open(picture.path) as image:
            axes.imshow(image.convert("RGB"), interpolation="nearest")
    except OSError as error:
        raise FanalError(f"cannot read {picture.path}: {error}") from error
    axes.axis("off")


def _size(drawing: Drawing) -> tuple[float, float]:
    """Inches."""
    if isinstance(drawing, Film):
        return _size(_laid(drawing))
    if isinstance(drawing, Sheet):
        rows, columns, high, wide = drawing.images.shape[:4]
        inches = min(6.5, 0.62 * columns)
        return inches + 0.9, inches * rows * high / (columns * wide) + 0.5
    return (4.0, 3.4) if isinstance(drawing, Space) else (3.4, 2.6)


def canvas(figure: Figure) -> Canvas:
    """Draw a figure with Matplotlib, its drawings side by side, with letters where there are several.

    Raises:
        FanalError: a picture of it cannot be read.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    sizes = [_size(drawing) for drawing in figure.drawings]
    with mpl.rc_context(_LOOK):
        size = sum(wide for wide, _ in sizes), max(high for _, high in sizes)
        sheet = Canvas(figsize=size, layout="constrained")
        for i, drawing in enumerate(figure.drawings):
            kind = {"projection": "3d"} if isinstance(drawing, Space) else {}
            axes: Any = sheet.add_subplot(1, len(sizes), i + 1, **kind)
            _DRAW[type(drawing)](axes, drawing)
            if len(sizes) > 1:
                axes.set_title(f"({chr(97 + i)})", loc="left", fontsize=8)
        return sheet


_DRAW: dict[type, Any] = {
    Panel: _panel,
    Bars: _bars,
    Space: _space,
    Heat: _heat,
    Film: lambda axes, film: _sheet(axes, _laid(film)),
    Sheet: _sheet,
    Picture: _picture,
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _tabular(table: Table) -> str:
    lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (table.head, *table.rows)]
    columns = "l" + "r" * (len(table.head) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", lines[0], r"\hline", *lines[1:], r"\end{tabular}", ""])


def write_all(
    folder: Path, figures: Sequence[Figure], tables: Sequence[Table], formats: Sequence[str] = ("pdf",)
) -> list[Path]:
    """Write figures as `NAME.FORMAT` and tables as `NAME.tex`, with their captions in `captions.txt`.

    Args:
        folder: where; it is made if it is not there.
        figures: of a page.
        tables: likewise.
        formats: of `FORMATS`.

    Returns:
        The files of figures and tables.

    Raises:
        FanalError: a picture cannot be read, or a file cannot be written.
    """
    import matplotlib as mpl

    plain: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "png": {"Software": None}, "svg": {"Date": None}}
    written = []
    for figure, kind in itertools.product(figures, formats):
        sheet = canvas(figure)  # anew for each file: a layout depends on what was drawn before
        target, extra = folder / f"{figure.name}.{kind}", {"metadata": plain[kind], "dpi": 200}
        with mpl.rc_context(_LOOK):
            write_atomically(target, lambda part, k=kind, s=sheet, e=extra: s.savefig(part, format=k, **e))
        written.append(target)
    for table in tables:
        target, text = folder / f"{table.name}.tex", _tabular(table)
        write_atomically(target, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        written.append(target)
    words = "".join(f"{each.name}: {each.caption}\n" for each in (*figures, *tables))
    write_atomically(folder / "captions.txt", lambda part: part.write_text(words, encoding="utf-8"))
    return written
