"""`fanal report`: write a run's page again, and its figures for papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import draw, errors_shown, say

EPILOG = """
Examples:\n
  fanal report fanal-demo\n
  fanal report fanal-demo --open\n
  fanal report fanal-geometry --figures pdf,png
"""


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Run folder of fanal sample, demo, guard, geometry, audit, encode, guide, pde or bench overlay."
        ),
    ],
    figures: options.Figures = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write report.html again from a run folder: one self-contained page that opens offline."""
    with errors_shown():
        from fanal.report import write_report
        from fanal.report.paper import formats_of

        formats = formats_of(figures)
        page = write_report(folder)
        say(f"report: {page}")
        draw(folder, formats)
        if show:
            typer.launch(page.absolute().as_uri())
