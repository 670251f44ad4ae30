"""`fanal sample`: draw samples from any model into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli.console import errors_shown, progress, say, show_run

EPILOG = """
Examples:\n
  fanal sample hands32 --count 256 --guard redo --out hands\n
  fanal sample shapes32 --solver heun --steps 18 --guard renoise --out shapes\n
  fanal sample digits8 --label 3 --guidance 2 --out threes\n
  fanal sample diffusers:my-pipeline --prompt "a red boat" --guidance 5 --steps 30 --count 4 --out boats\n
  fanal sample mixture:grid2 --solver churn:s_churn=20 --schedule logsnr --count 5000 --out grid\n
  fanal sample hands32 --solver ipndm:order=3 --schedule quadratic --steps 8 --no-zero --out few\n
  fanal sample grid2 --solver rods:rho=0.1,window=16..32 --out robust\n
  fanal sample python:mymodule:make_denoiser --steps 30 --out mine
"""


def _label(text: str | None) -> int | str | None:
    """A whole number as such; other words are for the configuration to judge."""
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


def sample(
    model: Annotated[
        str,
        typer.Argument(
            help="Embedded name, folder, diffusers:DIR, hub:ORG/NAME, edm:FILE.pkl, adm:FILE.pt, consistency:FILE.pt, "
            "mixture:NAME, gaussian:NAME or python:MODULE:FUNC."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write.")] = Path("fanal-sample"),
    solver: Annotated[
        str,
        typer.Option(
            help="name or name:field=value,… (euler = DDIM, heun, ipndm, dpmpp, unipc, deis, sde, …, rods), "
            "or a schedule file with a searched solver."
        ),
    ] = "euler",
    schedule: Annotated[
        str | None,
        typer.Option(
            help="name or name:field=value,… (polynomial = Karras, logsnr, uniform, …), or native: a pipeline's own, "
            "or FILE.json, from fanal schedule. "
            "Default: native for a diffusers pipeline, else polynomial."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of intervals.", min=1)] = 40,
    sigma_min: Annotated[float | None, typer.Option(help="Smallest positive sigma; default: the model's.")] = None,
    sigma_max: Annotated[float | None, typer.Option(help="First sigma; default: the model's.")] = None,
    zero: Annotated[bool, typer.Option("--zero/--no-zero", help="End the grid at 0, or at --sigma-min.")] = True,
    jump: Annotated[
        float | None, typer.Option(help="Sigma from which the run goes straight to its denoised prediction (ODE-Jump).")
    ] = None,
    count: Annotated[int, typer.Option(help="Number of samples.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Run seed; sample b has seed 1,000,000·SEED + b.", min=0)] = 0,
    block: Annotated[int, typer.Option(help="Samples computed together.", min=1)] = 32,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="Repair flagged samples: redo or renoise, with fields as in redo:kappa=0.1; may be given twice."
        ),
    ] = None,
    flag: Annotated[
        float | None, typer.Option(help="Share of samples to flag; default: the card's, else 0.35.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Class label or its name, for a conditional model; each: all classes in turn.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What a text-to-image model is asked for.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Caption file instead of a prompt: sample b gets caption b.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What guidance leads away from; needs a prompt.")] = "",
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance; needs --label or a prompt.")
    ] = None,
    allow_bin: Annotated[
        bool, typer.Option("--allow-bin", help="Read a pipeline's .bin weights where it has no safetensors.")
    ] = False,
    trajectory: Annotated[bool, typer.Option("--trajectory", help="Keep the trajectories.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run at --out.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; they decide rounding.", min=1)] = 1,
) -> None:
    """Sample a model, watch every trajectory, and with --guard flag and repair what went wrong.

    The run folder holds samples.safetensors, samples.png, run.json and report.html.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.generation import SampleConfig, generate

        config = SampleConfig(
            model=model,
            solver=solver,
            schedule=schedule,
            steps=steps,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            zero=zero,
            jump=jump,
            count=count,
            seed=seed,
            block=block,
            guard=tuple(guard or ()),
            flag=flag,
            label=_label(label),
            prompt=prompt,
            captions=None if captions is None else str(captions),
            negative=negative,
            guidance=guidance,
            allow_bin=allow_bin,
            trajectory=trajectory,
            device=device,
            threads=threads,
        )
        folder = generate(config, out, overwrite=overwrite, progress=progress, say=say)
        show_run(folder)
