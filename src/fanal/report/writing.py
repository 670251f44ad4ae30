"""Writing a run's page and its figures: one way for every kind of run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fanal.errors import FanalError
from fanal.files import read_json
from fanal.report.audit import audit_page
from fanal.report.encode import encode_page
from fanal.report.geometry import geometry_page
from fanal.report.guide import guide_page
from fanal.report.overlay import overlay_page
from fanal.report.paper import write_all
from fanal.report.pde import densities_page
from fanal.report.sampling import sampling_page
from fanal.report.study import Page

__all__ = ["PAGES", "write_figures", "write_report"]

PAGES: dict[str, Callable[[Path, Mapping[str, Any]], Page]] = {
    "sample": sampling_page,
    "demo": sampling_page,
    "guard": sampling_page,
    "geometry": geometry_page,
    "audit": audit_page,
    "encode": encode_page,
    "guide": guide_page,
    "pde": densities_page,
    "bench overlay": overlay_page,
}
"""What makes the page of a run, by the command that wrote it."""

_INSTEAD = ("tables.md", "plots.html")
"""What runs without a page leave to read."""

_BROKEN = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, jinja2.UndefinedError)


def _page_of(folder: Path) -> Page:
    if not folder.exists():
        raise FanalError(
            f"{folder} is not a run folder: there is no such folder; give the one that a command wrote, its --out"
        )
    if folder.is_file():
        raise FanalError(f"{folder} is not a run folder but a file: give the folder, {folder.parent}")
    if not (folder / "run.json").is_file():
        raise FanalError(f"{folder} is not a run folder: commands that sample or measure write a run.json")
    record = read_json(folder / "run.json")
    command = record.get("command")
    make = PAGES.get(command) if isinstance(command, str) else None
    if make is None:
        told = [str(folder / name) for name in _INSTEAD if (folder / name).is_file()] or [f"{folder / 'run.json'}"]
        raise FanalError(
            f"{folder} has no page: pages are of runs of fanal {', '.join(PAGES)}, got {command!r:.60}; what it found "
            f"is in {' and '.join(told)}"
        )
    if "results" not in record:
        raise FanalError(f"{folder} is an unfinished run of fanal {command}: run its command again to finish it")
    try:
        return make(folder, record)
    except FanalError:
        raise
    except _BROKEN as error:
        raise FanalError(f"{folder} is not a whole run of fanal {command}: {error!r:.200}") from error


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder, from the run's own files: one page that opens offline.

    Args:
        folder: of a finished run, of a command in `PAGES`.

    Raises:
        FanalError: the folder is no finished run, or cannot be written.
    """
    target = Path(folder) / "report.html"
    _page_of(Path(folder)).write(target)
    return target


def write_figures(folder: str | Path, formats: Sequence[str] = ("pdf",)) -> list[Path]:
    """Write the figures of a run's page as files for papers, into the folder's `figures`.

    Figures are `NAME.FORMAT`, tables are LaTeX, `NAME.tex`, and `captions.txt` says what each shows.

    Args:
        folder: as in `write_report`.
        formats: of `fanal.report.paper.FORMATS`: "pdf", "png" and "svg".

    Returns:
        The files.

    Raises:
        FanalError: as `write_report`, a format is unknown, or Matplotlib is not installed.
    """
    page = _page_of(Path(folder))
    return write_all(Path(folder) / "figures", page.figures, page.tables, formats)
