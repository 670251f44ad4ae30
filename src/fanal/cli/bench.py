"""`fanal bench`: comparisons that reproduce the tables of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli.console import errors_shown, progress, say

app = typer.Typer(help="Run the comparisons behind the documentation's tables.", no_args_is_help=True)


@app.command(
    "schedules",
    epilog="Examples:\n\n  fanal bench schedules --quick --out quick\n\n  fanal bench schedules --out bench-schedules",
)
def schedules(
    out: Annotated[Path, typer.Option(help="Run folder to write.")] = Path("bench-schedules"),
    quick: Annotated[bool, typer.Option("--quick", help="Two mixtures and two solvers: seconds, not minutes.")] = False,
    mixtures: Annotated[int, typer.Option(help="Number of mixtures.", min=0)] = 10,
    models: Annotated[str, typer.Option(help="Embedded models, with commas; empty: none.")] = "hands32,shapes32",
    seed: Annotated[int, typer.Option(help="Run seed of all samples.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run at --out.")] = False,
) -> None:
    """Compare fixed grids, GITS and fitted grids on ten mixtures and two embedded models.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        import dataclasses

        from fanal.bench.schedules import SchedulesConfig, bench_schedules

        names = tuple(name for name in models.split(",") if name)
        chosen = SchedulesConfig.quick() if quick else SchedulesConfig(mixtures=mixtures, models=names)
        config = dataclasses.replace(chosen, seed=seed)
        folder = bench_schedules(config, out, overwrite=overwrite, progress=progress, say=say)
        say((folder / "tables.md").read_text(encoding="utf-8"))
