"""`fanal pde`: diffusion as equations of densities, forward and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import carry_out, errors_shown, say

EPILOG = """
Examples:\n
  fanal pde\n
  fanal pde box --start normal --end 1 --out box\n
  fanal pde ring --score forward --out ring\n
  fanal pde shell --dimension 784 --steps 1000 --out shell\n
  fanal pde two-bumps --process brownian --reach 4 --end 3 --out walls\n
  fanal pde mixture:grid2 --score grid2 --cells 100 --steps 60 --back stable --out network\n
  fanal pde --figures pdf,png --out figures
"""


def _show(folder: Path) -> None:
    """Print what a run found."""
    from fanal.files import read_json
    from fanal.report.pde import headlines

    for line in headlines(read_json(folder / "run.json")):
        say(line)


def pde(
    context: typer.Context,
    law: Annotated[
        str,
        typer.Argument(
            help="Law to start from: two-bumps, box, ring, shell, core-and-halo (the last two by distance from 0, in "
            "any dimension), mixture:NAME or gaussian:NAME of one or two coordinates."
        ),
    ] = "two-bumps",
    out: options.Out = Path("fanal-pde"),
    dimension: Annotated[
        int | None, typer.Option(help="Coordinates of a sample. Default: the law's fewest, 3 for radial laws.", min=1)
    ] = None,
    process: Annotated[
        str, typer.Option(help="ou (Ornstein–Uhlenbeck), or brownian, between walls that let nothing through.")
    ] = "ou",
    back: Annotated[
        list[str] | None,
        typer.Option(help="Way back: stable, ode or unstable; may be repeated. Default: all three."),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="exact (closed form), forward (read off the forward solution), or a model such as grid2, "
            "mixture:grid2 or data:SET. Default: exact, where the process has a closed form."
        ),
    ] = None,
    start: Annotated[str, typer.Option(help="What ways back start from: forward, normal or uniform.")] = "forward",
    end: Annotated[float, typer.Option(help="T*, the forward time at which they start.")] = 2.0,
    early: Annotated[float, typer.Option(help="Forward time at which they end.")] = 0.01,
    cells: Annotated[int | None, typer.Option(help="Cells per axis. Default: 400 on one axis, 80 on two.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps in time, shorter near 0. Default: 200 on one axis, 80 on two.")
    ] = None,
    reach: Annotated[
        float | None, typer.Option(help="Half the width of the box, or the largest distance. Default: by the law.")
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="In time: implicit (order 1, never negative) or trapezoid (order 2, checked).")
    ] = "implicit",
    particles: Annotated[
        int, typer.Option(help="Exact draws that the forward density is tested with; 0: none.", min=0)
    ] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0)] = 0,
    figures: options.Figures = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Solve the equations of diffusion for densities: forward to noise, and back in three ways.

    The run folder holds run.json, densities.safetensors and report.html, a page that opens offline.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.pde.command import DensityConfig, densities

        config = DensityConfig(**options.given(context))
        carry_out(densities, config, out, overwrite=overwrite, show=_show, figures=figures)
