"""`fanal guide`: does a guided run end on the support."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import carry_out, errors_shown, say, table

EPILOG = """
Examples:\n
  fanal guide\n
  fanal guide --process maruyama --steps 5 --out jumps\n
  fanal guide --support outlier --scale 30 --steps 20 --out counter-example\n
  fanal guide --scale 100 --error 0.05 --out wrong-scores\n
  fanal guide --scale -3 --steps 40 --out away\n
  fanal guide --form autoguidance --scale 3 --process exponential3 --steps 40 --out auto\n
  fanal guide --support digits8 --label 3 --model digits8 --scale 4 --count 64 --out threes
"""


def _show(folder: Path) -> None:
    """Print what a run found."""
    from fanal.files import read_json
    from fanal.report.guide import headline
    from fanal.report.guide import table as figures

    record = read_json(folder / "run.json")
    table(*figures(record["results"]))
    for line in headline(record):
        say(line)


def guide(
    context: typer.Context,
    support: Annotated[
        str,
        typer.Option(
            help="circle, square, segments, spheres, outlier, fork, or a data set: its training points are the support."
        ),
    ] = "circle",
    label: Annotated[int | None, typer.Option(help="Class of a data set that is the condition.", min=0)] = None,
    form: Annotated[
        str,
        typer.Option(help="classifier-free, interval, classifier, autoguidance, negative, reward or inverse."),
    ] = "classifier-free",
    scale: Annotated[
        float, typer.Option(help="Scale of guidance; 1: the plain conditional, below 0: away from the condition.")
    ] = 30.0,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(help="LOW HIGH: sigmas in which guidance acts; not with interval. \\[default: all]"),
    ] = None,
    process: Annotated[
        str,
        typer.Option(
            help="ddim, ddpm, eta0.5, eta2, exponential2, exponential3, sde2, maruyama, or any solver of fanal sample."
        ),
    ] = "ddim",
    error: Annotated[float, typer.Option(help="Relative error of both scores; 0: exact.", min=0)] = 0.0,
    model: Annotated[
        str | None,
        typer.Option(help="A conditional model instead of exact scores; its class --label is the condition."),
    ] = None,
    schedule: Annotated[str, typer.Option(help="Grid: name or name:field=value,….")] = "polynomial",
    steps: options.Steps = 20,
    sigma_min: Annotated[float, typer.Option(help="Smallest positive sigma.")] = 0.002,
    sigma_max: Annotated[float, typer.Option(help="First sigma.")] = 80.0,
    near: options.Near = 0.01,
    count: options.Count = 512,
    seed: options.Seed = 0,
    block: options.Block = 128,
    threads: options.Threads = 1,
    out: options.Out = Path("fanal-guide"),
    figures: options.Figures = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Run guided sampling on a support with an exact denoiser, and measure how far the samples end from it.

    Distances are told to the support of the condition, p(x|c), and to that of the whole, p. The run folder holds
    run.json, guide.safetensors and report.html, a page that opens offline.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.supports.command import GuideConfig
        from fanal.supports.command import guide as run

        carry_out(run, GuideConfig(**options.given(context)), out, overwrite=overwrite, show=_show, figures=figures)
