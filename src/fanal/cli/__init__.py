"""The command line: parse, build a configuration, make one library call. Nothing here imports torch at start."""

from __future__ import annotations

import typer

from fanal import __version__
from fanal.cli import bench, models
from fanal.cli.audit import EPILOG as AUDIT
from fanal.cli.audit import audit
from fanal.cli.convert import EPILOG as CONVERT
from fanal.cli.convert import convert
from fanal.cli.demo import EPILOG as DEMO
from fanal.cli.demo import demo
from fanal.cli.encode import EPILOG as ENCODE
from fanal.cli.encode import encode
from fanal.cli.eval import EPILOG as EVAL
from fanal.cli.eval import evaluate
from fanal.cli.geometry import EPILOG as GEOMETRY
from fanal.cli.geometry import geometry
from fanal.cli.guard import EPILOG as GUARD
from fanal.cli.guard import guard
from fanal.cli.guide import EPILOG as GUIDE
from fanal.cli.guide import guide
from fanal.cli.interpolate import EPILOG as INTERPOLATE
from fanal.cli.interpolate import interpolate
from fanal.cli.label import EPILOG as LABEL
from fanal.cli.label import label
from fanal.cli.pde import EPILOG as PDE
from fanal.cli.pde import pde
from fanal.cli.report import EPILOG as REPORT
from fanal.cli.report import report
from fanal.cli.sample import EPILOG as SAMPLE
from fanal.cli.sample import sample
from fanal.cli.schedule import EPILOG as SCHEDULE
from fanal.cli.schedule import schedule
from fanal.cli.train import EPILOG as TRAIN
from fanal.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="fanal",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Watch a diffusion model's sampling trajectories, find the samples that went wrong, and repair them.",
    epilog="Start with [bold]fanal demo[/bold]: it samples, flags, repairs and shows the evidence.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("demo", epilog=DEMO)(demo)
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.command("sample", epilog=SAMPLE)(sample)
app.command("guard", epilog=GUARD)(guard)
app.command("audit", epilog=AUDIT)(audit)
app.command("geometry", epilog=GEOMETRY)(geometry)
app.command("pde", epilog=PDE)(pde)
app.command("guide", epilog=GUIDE)(guide)
app.command("encode", epilog=ENCODE)(encode)
app.command("interpolate", epilog=INTERPOLATE)(interpolate)
app.command("train", epilog=TRAIN)(train)
app.command("schedule", epilog=SCHEDULE)(schedule)
app.command("convert", epilog=CONVERT)(convert)
app.command("eval", epilog=EVAL)(evaluate)
app.command("label", epilog=LABEL)(label)
app.command("report", epilog=REPORT)(report)


def main() -> None:
    """Run the command line."""
    app()
