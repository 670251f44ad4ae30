"""`fanal interpolate`: sample along paths between two seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, finished, progress, say, table

EPILOG = """
Examples:\n
  fanal interpolate shapes32 --from 0 --to 1 --out path\n
  fanal interpolate shapes32 --from 0..31 --to 32..63 --method linear --out blurred\n
  fanal interpolate digits8 --label 3 --from 2,5 --to 4,7 --neighbors 3 --out threes\n
  fanal interpolate diffusers:my-pipeline --prompt "a red boat" --guidance 5 --from 0 --to 1 --points 5 --out boats
"""


def _figure(found: dict[str, Any], percent: bool) -> str:
    from fanal.summary import estimated

    figure = estimated(found)
    return figure.percent() if percent else figure.plain(3)


def _show(folder: Path) -> None:
    """Print what changes along the paths."""
    from fanal.files import read_json

    rows = read_json(folder / "run.json")["results"]["along"]
    heads = {"start_variance": "variance of the start", "wrong": "wrong samples", "nearest": "nearest neighbor"}
    shown = [key for key in heads if key in rows[0]]
    seen = list(rows[0].get("seen", {}))
    lines = [
        [
            f"{row['weight']:.3f}",
            *(_figure(row[key], key == "wrong") for key in shown),
            *(_figure(row["seen"][name], False) for name in seen),
        ]
        for row in rows
    ]
    table(
        ["weight", *(heads[key] for key in shown), *seen],
        lines,
        title="along the paths, each figure ± one standard error",
    )
    say(f"picture: {folder / 'samples.png'}")


def interpolate(
    context: typer.Context,
    model: options.Model,
    start: Annotated[str, typer.Option("--from", help="Seeds that paths start from: 3, 3,8 or 0..7.")],
    end: Annotated[str, typer.Option("--to", help="Seeds that they end at, one for each.")],
    out: options.Out = Path("fanal-interpolate"),
    method: Annotated[str, typer.Option(help="slerp, in_distribution or linear.")] = "slerp",
    points: Annotated[int, typer.Option(help="Points of a path, both ends included.", min=2)] = 9,
    neighbors: Annotated[int, typer.Option(help="Nearest training samples to find for each point.", min=0)] = 0,
    data: Annotated[
        str | None, typer.Option(help=f"Where they are found: {options.DATA}; default: the model's own.")
    ] = None,
    solver: options.Solver = "euler",
    schedule: options.Schedule = None,
    steps: options.Steps = 40,
    sigma_min: options.SigmaMin = None,
    sigma_max: options.SigmaMax = None,
    zero: options.Zero = True,
    label: options.Number = None,
    prompt: options.Prompt = None,
    negative: options.Negative = "",
    guidance: options.Guidance = None,
    allow_bin: options.AllowBin = False,
    block: options.Block = 32,
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Sample along paths between the noise of two seeds.

    The run folder holds samples.safetensors, samples.png (one row per path) and run.json.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.interpolation.command import InterpolationConfig, parse_seeds
        from fanal.interpolation.command import interpolate as run

        config = InterpolationConfig(**options.given(context, start=parse_seeds(start), end=parse_seeds(end)))
        folder = run(config, out, overwrite=overwrite, progress=progress)
        with finished(folder):
            _show(folder)
