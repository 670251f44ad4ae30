"""`fanal schedule`: search the grids on which a solver with few steps ends nearest to one with many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, progress, say, table

EPILOG = """
Examples:\n
  fanal schedule hands32 --steps 5,6,8,10 --out hands.json\n
  fanal schedule hands32 --steps 5,6 --solver dpmpp:order=2 --method fit --out hands-2m.json\n
  fanal schedule shapes32 --steps 6 --method fit-weights --out shapes.json\n
  fanal schedule diffusers:my-pipeline --steps 8 --solver euler --method fit --export diffusers --out mine.json\n
  fanal sample hands32 --schedule hands.json --steps 6 --out fast\n
"""


def schedule(
    context: typer.Context,
    model: options.Model,
    steps: Annotated[str, typer.Option(help="Numbers of steps, with commas; one search yields them all.")] = "5,6,8,10",
    solver: Annotated[
        str, typer.Option(help="name or name:field=value,…; or several with + between them: the best for the calls.")
    ] = "ipndm",
    out: Annotated[Path, typer.Option(help="Schedule file to write; a picture FILE.png comes with it.")] = Path(
        "schedule.json"
    ),
    method: Annotated[
        str,
        typer.Option(help="gits: as published. fit: fitted to this solver. fit-weights: and its multistep weights."),
    ] = "gits",
    export: Annotated[
        list[str] | None,
        typer.Option(help="Also write the grids for diffusers, comfyui, kdiffusion or edm; may be given again."),
    ] = None,
    warmup: Annotated[int, typer.Option(help="Samples that the search runs on.", min=1)] = 64,
    holdout: Annotated[
        int, typer.Option(help="Other samples that the error is measured on; 0: do not measure.", min=0)
    ] = 64,
    seed: Annotated[int, typer.Option(help="Run seed of both.", min=0)] = 0,
    coeff: Annotated[float, typer.Option(help="GITS's γ: above 1 it moves nodes to smaller sigma.")] = 1.15,
    metric: Annotated[str, typer.Option(help="GITS's cost of a jump: dev, l1 or l2.")] = "dev",
    afs: Annotated[
        bool,
        typer.Option("--afs", help="Put a free interval, not counted in --steps, first: the analytical first step."),
    ] = False,
    objective: Annotated[
        str, typer.Option(help="What a fit makes small: robust, typical or mean (square) misses.")
    ] = "robust",
    tries: Annotated[int, typer.Option(help="How many of the best starts are fitted.", min=1)] = 1,
    teacher: Annotated[str, typer.Option(help="The teacher's solver.")] = "ipndm",
    teacher_steps: Annotated[int, typer.Option(help="Intervals of the teacher's grid.", min=2)] = 60,
    batch: Annotated[int, typer.Option(help="Samples computed together.", min=1)] = 64,
    label: options.Number = None,
    prompt: options.Prompt = None,
    guidance: options.Guidance = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files at --out.")] = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Search the grids on which a solver with few steps ends nearest to a teacher with many.

    With several solvers each of --steps is a number of network calls, and the best solver for it is chosen.
    """
    with errors_shown():
        import torch

        from fanal.schedule_search.command import ScheduleConfig, search_schedules

        torch.set_num_threads(threads)
        config = ScheduleConfig(**options.given(context, "threads"))
        done = search_schedules(config, out, overwrite=overwrite, progress=progress)
        rows = [
            [
                str(entry.asked),
                str(entry.calls),
                entry.start or "–",
                entry.error.median.plain(4) if entry.error else "–",
                entry.error.rms.plain(4) if entry.error else "–",
                " ".join(f"{sigma:.3g}" for sigma in entry.sigmas.tolist()),
            ]
            for entry in done.schedules.entries.values()
        ]
        table(["steps", "calls", "start", "median error", "RMS error", "sigmas"], rows, title=done.title)
        for line in done.lines:
            say(line)
