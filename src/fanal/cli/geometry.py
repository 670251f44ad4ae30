"""`fanal geometry`: the shape of a model's trajectories."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, progress, say, table

EPILOG = """
Examples:\n
  fanal geometry hands32 --out hands\n
  fanal geometry mixture:grid2 --count 1000 --steps 200 --out grid\n
  fanal geometry digits8 --data digits8 --label 3 --out threes\n
  fanal geometry edm:model.pkl --data folder:PHOTOS --points 5000 --count 64 --out photos
"""


def _show(folder: Path) -> None:
    """Print the numbers of a run."""
    from fanal.files import read_json
    from fanal.metrics.estimates import Estimate

    results = read_json(folder / "run.json")["results"]
    rows = []
    for name, found in {**results["numbers"], **results["shape"]}.items():
        value, se = (math.nan if found[key] is None else found[key] for key in ("value", "se"))
        rows.append([name, Estimate(value, se, found["n"]).plain(4)])
    table(["per trajectory", "mean"], rows, title="each figure ± one standard error")
    say(f"page: {folder / 'report.html'}")


def geometry(
    model: options.Model,
    out: options.Out = Path("fanal-geometry"),
    count: Annotated[int, typer.Option(help="Number of trajectories.", min=1)] = 256,
    drawn: Annotated[int, typer.Option(help="How many are drawn and measured for curvature and torsion.", min=1)] = 30,
    window: Annotated[int, typer.Option(help="Points on each side that curvature is fitted to.", min=2)] = 5,
    data: Annotated[
        str | None, typer.Option(help="Data set, or folder:DIR, whose exact denoiser is put beside the model.")
    ] = None,
    points: Annotated[int, typer.Option(help="Points of the data that are used.", min=2)] = 2000,
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

        config = GeometryConfig(
            model=model,
            solver=solver,
            schedule=schedule,
            steps=steps,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            zero=zero,
            count=count,
            drawn=min(drawn, count),
            window=window,
            data=data,
            points=points,
            label=options.whole_or_name(label),
            prompt=prompt,
            negative=negative,
            guidance=guidance,
            seed=seed,
            allow_bin=allow_bin,
            block=block,
            device=device,
            threads=threads,
        )
        _show(run(config, out, overwrite=overwrite, progress=progress))
