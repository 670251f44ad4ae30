"""`fanal geometry`: the shape of a model's trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import carry_out, errors_shown, say, table

EPILOG = """
Examples:\n
  fanal geometry hands32 --out hands\n
  fanal geometry mixture:grid2 --count 1000 --steps 200 --out grid\n
  fanal geometry digits8 --data digits8 --label 3 --out threes\n
  fanal geometry digits8 --label each --drawn 100 --out classes\n
  fanal geometry hands32 --against shapes32 --against gaussian:hands32 --out alike\n
  fanal geometry hands32 --noise codes/noise.safetensors --count 16 --data hands32 --out from-images\n
  fanal geometry hands32 --images hands32 --count 16 --data hands32 --out from-noised-images\n
  fanal geometry digits8 --data digits8 --label 3 --figures pdf,png --out figures\n
  fanal geometry edm:model.pkl --data folder:PHOTOS --points 5000 --count 64 --out photos
"""


def _show(folder: Path) -> None:
    """Print what a run found, in words, and its numbers."""
    from fanal.files import read_json
    from fanal.report.geometry.words import SPREAD, sentences, tables

    results = read_json(folder / "run.json")["results"]
    for line in sentences(results):
        say(line)
    for each in tables(results):
        table(each.head, each.rows)
    say(SPREAD)


def geometry(
    context: typer.Context,
    model: options.Model,
    out: options.Out = Path("fanal-geometry"),
    count: Annotated[int, typer.Option(help="Number of trajectories.", min=1)] = 256,
    drawn: Annotated[int, typer.Option(help="How many are drawn and measured for curvature and torsion.", min=1)] = 30,
    window: Annotated[
        int | None,
        typer.Option(
            help="Points on each side that curvature is fitted to; default: 5, or if more a twentieth of --steps.",
            min=2,
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Model, or run folder of this command, to compare the trajectories with; repeatable."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help=f"Data whose exact denoiser is put beside the model: {options.DATA}.")
    ] = None,
    points: Annotated[int, typer.Option(help="Points of the data that are used.", min=2)] = 2000,
    noise: Annotated[
        str | None, typer.Option(help="File of unit noise to start from, as fanal encode writes it of real images.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help=f"Data whose first training points the runs start from, with noise added: {options.DATA}."),
    ] = None,
    solver: options.Solver = "euler",
    schedule: options.Schedule = None,
    steps: Annotated[int, typer.Option(help="Number of intervals.", min=5)] = 100,
    sigma_min: options.SigmaMin = None,
    sigma_max: options.SigmaMax = None,
    zero: options.Zero = True,
    label: options.Label = None,
    prompt: options.Prompt = None,
    negative: options.Negative = "",
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    allow_bin: options.AllowBin = False,
    block: options.Block = 32,
    figures: options.Figures = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Measure how straight trajectories are, in how many dimensions they lie, how they bend, and how alike they are.

    The run folder holds run.json, geometry.safetensors and report.html, a page that opens offline.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.geometry.command import GeometryConfig
        from fanal.geometry.command import geometry as run

        config = GeometryConfig(**options.given(context, drawn=min(drawn, count)))
        carry_out(run, config, out, overwrite=overwrite, show=_show, figures=figures)
