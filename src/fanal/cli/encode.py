"""`fanal encode`: images to the noise that they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import carry_out, errors_shown, say, table

EPILOG = """
Examples:\n
  fanal encode hands32 --data hands32 --out codes\n
  fanal encode ./my-model --data folder:PHOTOS --count 64 --steps 20,40,80 --out photo-codes\n
  fanal encode shapes32 --data shapes32 --other shapes32-long --out two-models\n
  fanal encode grid2 --data grid2 --other mixture:grid2 --count 256 --out learned-and-exact\n
  fanal encode hands32 --data hands32 --also euler --also ipndm --steps 20,40,80 --out by-solver\n
  fanal encode digits8 --data digits8 --label data --out digit-codes
"""


def _show(folder: Path) -> None:
    """Print the errors by steps."""
    from fanal.files import read_json
    from fanal.report.encode import hint
    from fanal.report.geometry.run import estimate

    results = read_json(folder / "run.json")["results"]
    rows = results["table"]
    names = [name for name in rows[0] if name != "steps"]
    cells = [[str(row["steps"]), *(estimate(row[name]) for name in names)] for row in rows]
    table(["steps", *names], cells, title="root mean square per entry, each figure ± one standard error")
    if len(results["solvers"]) > len(rows):
        found = [[one["solver"], str(one["steps"]), f"{one['evaluations']:g}", estimate(one["round trip"])]
                 for one in results["solvers"]]  # fmt: skip
        table(["solver", "steps", "evaluations per image", "round trip"], found)
    if results["pairs"]:
        measured = ("codes apart", "predictions apart", "codes of other images apart")
        found = [[" and ".join(pair["models"]), *(estimate(pair[name]) if name in pair else "" for name in measured)]
                 for pair in results["pairs"]]  # fmt: skip
        table(["models", *measured], found)
    if told := hint(results):
        say(told)


def encode(
    context: typer.Context,
    model: options.Model,
    data: Annotated[str, typer.Option(help=f"Images to encode: {options.DATA}.")],
    out: options.Out = Path("fanal-encode"),
    split: Annotated[str, typer.Option(help="Which of them: held_out or train.")] = "held_out",
    count: Annotated[int, typer.Option(help="Number of images.", min=1)] = 16,
    steps: Annotated[str, typer.Option(help="Numbers of intervals, with commas; codes are those of the last.")] = (
        "10,20,40"
    ),
    other: Annotated[
        list[str] | None,
        typer.Option(help="Another model, whose codes of the same images are compared; may be given again."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another solver, whose round trips are measured too; may be given again."),
    ] = None,
    noisy: Annotated[
        bool, typer.Option("--noisy", help="Add the noise of the smallest sigma to the images first.")
    ] = False,
    solver: options.Solver = "heun",
    schedule: options.Schedule = None,
    sigma_min: Annotated[
        float | None, typer.Option(help="Sigma that images are taken to be at; default: the model's smallest.")
    ] = None,
    sigma_max: Annotated[
        float | None, typer.Option(help="Sigma that codes are at; default: the model's largest.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Class of all images by number, or data: each one's own.")] = None,
    prompt: options.Prompt = None,
    seed: Annotated[int, typer.Option(help="Of the noise of --noisy; image b has seed 1,000,000·SEED + b.", min=0)] = 0,
    allow_bin: options.AllowBin = False,
    block: options.Block = 32,
    figures: options.Figures = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Encode images to noise by the equation run upwards, decode them again, and tell what is lost.

    The run folder holds noise.safetensors (unit noise), samples.png (images, codes, what comes back), run.json and
    report.html.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.encoding import EncodeConfig, encode_run

        config = EncodeConfig(**options.given(context, steps=options.whole_numbers(steps, "--steps")))
        carry_out(encode_run, config, out, overwrite=overwrite, show=_show, figures=figures)
