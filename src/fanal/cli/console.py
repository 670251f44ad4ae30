"""What the commands share: errors as one line, progress bars, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from fanal.errors import FanalError

__all__ = ["carry_out", "draw", "errors_shown", "finished", "progress", "say", "show_run", "table"]


def say(line: str) -> None:
    """Print one line for the user."""
    typer.echo(line)


@contextmanager
def errors_shown(resumable: bool = False) -> Iterator[None]:
    """Turn fanal's errors into one line and exit status 2, and Ctrl-C into a clean stop with status 130.

    Args:
        resumable: whether the same command can go on where it was stopped.
    """
    try:
        yield
    except FanalError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        more = "; run the same command again to go on" if resumable else ""
        typer.echo(f"stopped{more}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def finished(folder: Path) -> Iterator[None]:
    """Let Ctrl-C say that a run is whole, while what it found is printed: there is nothing to go on with.

    Args:
        folder: of the finished run.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; the run in {folder} is finished", err=True)
        raise typer.Exit(130) from None


def progress(items: Iterable[int], what: str) -> Iterable[int]:
    """Show a progress bar with the time left, on a terminal only."""
    steps = list(items)
    if not sys.stderr.isatty() or len(steps) < 2:
        yield from steps
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, description=what, console=Console(stderr=True), transient=True)


def draw(folder: Path, formats: Sequence[str]) -> None:
    """Write a run's figures for papers, where some are asked for, and say where they are."""
    if formats:
        from fanal.report import write_figures

        files = write_figures(folder, formats)
        say(f"figures: {len(files)} files in {folder / 'figures'}")


def carry_out(
    run: Callable[..., Path],
    config: Any,
    out: Path,
    *,
    overwrite: bool,
    show: Callable[[Path], None],
    figures: str | None = None,
) -> None:
    """Run a command into its run folder with a progress bar, print what it found, name its page, and draw its figures.

    Args:
        run: takes the configuration, the folder, `overwrite` and `progress`, and returns the folder.
        config: the command's configuration.
        out: run folder to write.
        overwrite: replace a finished run there.
        show: prints what is in a finished run folder.
        figures: formats of figures for papers, as `--figures` takes them.
    """
    from fanal.report.paper import formats_of

    formats = formats_of(figures)
    folder = run(config, out, overwrite=overwrite, progress=progress)
    with finished(folder):
        show(folder)
        say(f"page: {folder / 'report.html'}")
        draw(folder, formats)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, name in enumerate(head):
        grid.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(grid)


def show_run(folder: Path) -> None:
    """Print what a finished run found, and where its report is."""
    from fanal.files import read_json
    from fanal.report import diversity, headline
    from fanal.report import table as figures

    with finished(folder):
        record = read_json(folder / "run.json")
        head, rows = figures(record["results"])
        legend = "each figure ± one standard error"
        legend += "; spread: total variance relative to held-out real data" if "spread" in head else ""
        table(head, rows, title=legend)
        head, rows = diversity(record["results"])
        if rows:
            table(head, rows, title="diversity among right samples: standard deviation relative to real data")
        for line in headline(record):
            say(line)
        say(f"report: {folder / 'report.html'}")
