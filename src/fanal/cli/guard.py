"""`fanal guard`: score, flag and repair the samples of any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, progress, say, show_run

EPILOG = """
Examples:\n
  fanal guard hands32 --count 256 --repair renoise --out hands\n
  fanal guard diffusers:my-pipe --prompt "a red boat" --guidance 5 --steps 30 --count 16 --calibrate 64 --out boats\n
  fanal guard edm:edm-ffhq-64x64-uncond-vp.pkl --flag 0.2 --save ffhq.json --device cuda --out faces\n
  fanal guard edm:edm-ffhq-64x64-uncond-vp.pkl --calibration ffhq.json --seed 1 --device cuda --out more-faces\n
  fanal guard ./my-model --run earlier-run --repair none --out scores\n
  fanal guard ./my-model --run earlier-run --labels earlier-run/labels.json --catch 0.9 --out labeled\n
  fanal guard hands32 --count 256 --repair ladder --out climbed\n
  fanal guard ./my-model --labels earlier-run/labels.json --repair ladder --seed 1 --save judge.json --out mended\n
  fanal guard shapes32 --detector combined:parts=variance+undecided --flag 0.3 --repair none --out two\n
  fanal guard shapes32 --solver rods:rho=0.1,window=12..28 --repair none --out robust
"""


def guard(
    context: typer.Context,
    model: options.Model,
    out: options.Out = Path("fanal-guard"),
    repair: Annotated[
        list[str] | None,
        typer.Option(
            help="What is done with flagged samples: redo, renoise, fresh or ladder, with fields as in "
            "redo:kappa=0.1, or none; may be given twice. Default: redo."
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="What watches: variance, path_length, …, with fields as in rods_index:v=score,window=0.2..1.5; probe "
            "or combined, fitted to labels or a rule, or with file=PATH. Default: what the ladder needs, else the "
            "card's, else variance."
        ),
    ] = None,
    flag: Annotated[
        float | None, typer.Option(help="Share of samples to flag; default: the ladder's, else the card's, else 0.35.")
    ] = None,
    catch: Annotated[
        float | None, typer.Option(help="Share of the wrong samples to flag instead, where labels or a rule know them.")
    ] = None,
    alarms: Annotated[
        float | None, typer.Option(help="Share of the right samples to flag at most, instead; likewise.")
    ] = None,
    calibrate: Annotated[int, typer.Option(help="Samples to calibrate on, where no calibration fits.", min=8)] = 256,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration file, or run folder with one: nothing is calibrated.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Label file of fanal label, beside its run: sets the threshold, and fits what must be fitted."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the calibration to this file too.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Watch the samples of this run folder again; options that are given win.")
    ] = None,
    noise: Annotated[
        Path | None, typer.Option(help="Start from the unit noise in this safetensors file (noise), not from seeds.")
    ] = None,
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
    """Score every sample of a model by how it came about, flag the risky ones, and repair them. No verifier is needed.

    The threshold is calibrated for the model, solver and grid on seeds of its own, and kept with the run.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.guarding import guard as run_guard
        from fanal.preparation import SampleConfig, settings_of
        from fanal.schedule_files import completed

        settings: dict[str, Any] = {} if run is None else settings_of(run)
        settings |= _settings(context, every=run is None)
        chosen = (settings.get(name) for name in ("schedule", "solver", "steps"))
        settings["solver"], settings["steps"] = completed(*chosen)
        settings |= {"model": model, "guard": tuple(repair or ("redo",))}
        folder = run_guard(
            SampleConfig(**settings), out, run=run, save=save, overwrite=overwrite, progress=progress, say=say
        )
        show_run(folder)


def _settings(context: typer.Context, every: bool) -> dict[str, Any]:
    """The options that belong to the configuration: every one, or those that were given on the command line."""
    found = options.given(context, "model", "repair", "save", "run")
    on_line = {name for name in found if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    return {name: value for name, value in found.items() if every or name in on_line}
