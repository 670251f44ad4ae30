"""`fanal interpolate`: sample along paths between two seeds."""

from __future__ import annotations

import math
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
    from fanal.metrics.estimates import Estimate

    value, se = (math.nan if found[name] is None else found[name] for name in ("value", "se"))
    figure = Estimate(value, se, found["n"])
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
    model: Annotated[str, typer.Argument(help="Any model spec, as for fanal sample.")],
    start: Annotated[str, typer.Option("--from", help="Seeds that paths start from: 3, 3,8 or 0..7.")],
    end: Annotated[str, typer.Option("--to", help="Seeds that they end at, one for each.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")] = Path("fanal-interpolate"),
    method: Annotated[str, typer.Option(help="slerp, in_distribution or linear.")] = "slerp",
    points: Annotated[int, typer.Option(help="Points of a path, both ends included.", min=2)] = 9,
    neighbors: Annotated[int, typer.Option(help="Nearest training samples to find for each point.", min=0)] = 0,
    data: Annotated[
        str | None, typer.Option(help=f"Where they are found: {options.DATA}; default: the model's own.")
    ] = None,
    solver: Annotated[str, typer.Option(help="As for fanal sample.")] = "euler",
    schedule: Annotated[
        str | None, typer.Option(help="As for fanal sample. Default: native for a pipeline, else polynomial.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of intervals.", min=1)] = 40,
    sigma_min: Annotated[float | None, typer.Option(help="Smallest positive sigma; default: the model's.")] = None,
    sigma_max: Annotated[float | None, typer.Option(help="First sigma; default: the model's.")] = None,
    zero: Annotated[bool, typer.Option("--zero/--no-zero", help="End the grid at 0, or at --sigma-min.")] = True,
    label: Annotated[int | None, typer.Option(help="Class label, for a conditional model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What a text-to-image model is asked for.")] = None,
    negative: Annotated[str, typer.Option(help="What guidance leads away from; needs a prompt.")] = "",
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance; needs --label or a prompt.")
    ] = None,
    allow_bin: Annotated[
        bool, typer.Option("--allow-bin", help="Read a pipeline's .bin weights where it has no safetensors.")
    ] = False,
    block: Annotated[int, typer.Option(help="Samples computed together.", min=1)] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run at --out.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; they decide rounding.", min=1)] = 1,
) -> None:
    """Sample along paths between the noise of two seeds.

    The run folder holds samples.safetensors, samples.png (one row per path) and run.json.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.interpolation.command import InterpolationConfig, parse_seeds
        from fanal.interpolation.command import interpolate as run

        config = InterpolationConfig(
            model=model,
            start=parse_seeds(start),
            end=parse_seeds(end),
            method=method,
            points=points,
            neighbors=neighbors,
            data=data,
            solver=solver,
            schedule=schedule,
            steps=steps,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            zero=zero,
            label=label,
            prompt=prompt,
            negative=negative,
            guidance=guidance,
            allow_bin=allow_bin,
            block=block,
            device=device,
            threads=threads,
        )
        folder = run(config, out, overwrite=overwrite, progress=progress)
        with finished(folder):
            _show(folder)
