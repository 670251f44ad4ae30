"""`fanal sample`: draw samples from any model into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, progress, say, show_run

EPILOG = """
Examples:\n
  fanal sample hands32 --count 256 --guard redo --out hands\n
  fanal sample shapes32 --solver heun --steps 18 --guard renoise --out shapes\n
  fanal sample digits8 --label 3 --guidance 2 --out threes\n
  fanal sample diffusers:my-pipeline --prompt "a red boat" --guidance 5 --steps 30 --count 4 --out boats\n
  fanal sample mixture:grid2 --solver churn:s_churn=20 --schedule logsnr --count 5000 --out grid\n
  fanal sample hands32 --solver ipndm:order=3 --schedule quadratic --steps 8 --no-zero --out few\n
  fanal sample hands32 --schedule searched.json --out fast\n
  fanal sample grid2 --solver rods:rho=0.1,window=16..32 --out robust\n
  fanal sample python:mymodule:make_denoiser --steps 30 --out mine
"""


def sample(
    context: typer.Context,
    model: options.Model,
    out: options.Out = Path("fanal-sample"),
    solver: options.SolverOrFile = None,
    schedule: options.Schedule = None,
    steps: options.StepsOrFile = None,
    sigma_min: options.SigmaMin = None,
    sigma_max: options.SigmaMax = None,
    zero: options.Zero = True,
    jump: options.Jump = None,
    count: options.Count = 64,
    seed: options.Seed = 0,
    block: options.Block = 32,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="Repair flagged samples: redo, renoise, fresh or ladder, with fields as in redo:kappa=0.1; may be "
            "given twice. none flags only."
        ),
    ] = None,
    flag: Annotated[
        float | None, typer.Option(help="Share of samples to flag; default: the card's, else 0.35.")
    ] = None,
    label: options.Label = None,
    prompt: options.Prompt = None,
    captions: options.Captions = None,
    negative: options.Negative = "",
    guidance: options.Guidance = None,
    allow_bin: options.AllowBin = False,
    trajectory: options.Trajectory = False,
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Sample a model, watch every trajectory, and with --guard flag and repair what went wrong.

    The run folder holds samples.safetensors, samples.png, run.json and report.html.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.generation import SampleConfig, generate
        from fanal.schedule_files import completed

        solver, steps = completed(schedule, solver, steps)
        config = SampleConfig(**options.given(context, solver=solver, steps=steps))
        folder = generate(config, out, overwrite=overwrite, progress=progress, say=say)
        show_run(folder)
