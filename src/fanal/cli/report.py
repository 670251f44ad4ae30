"""`fanal report`: write a run's page again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli.console import errors_shown, say

EPILOG = """
Examples:\n
  fanal report fanal-demo\n
  fanal report fanal-demo --open
"""


def report(
    folder: Annotated[Path, typer.Argument(help="Run folder of fanal sample or fanal demo.")],
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write report.html again from a run folder: one self-contained page that opens offline."""
    with errors_shown():
        from fanal.report import write_report

        page = write_report(folder)
        say(f"report: {page}")
        if show:
            typer.launch(page.absolute().as_uri())
