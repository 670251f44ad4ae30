"""Options that several commands have, so that each means the same everywhere, and how a configuration takes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fanal.errors import FanalError

Model = Annotated[
    str,
    typer.Argument(
        help="Embedded name, folder, diffusers:DIR, hub:ORG/NAME, edm:FILE.pkl, adm:FILE.pt, consistency:FILE.pt, "
        "mixture:NAME, gaussian:NAME, data:NAME or python:MODULE:FUNC."
    ),
]
DATA = "a data set of the package, folder:DIR (with ,size=N for smaller pictures) or array:FILE.npy"
"""The forms of data, for the help of the options that take them."""

Out = Annotated[Path, typer.Option(help="Run folder to write.")]
_SOLVER = (
    "name or name:field=value,… (euler = DDIM, heun, ipndm, dpmpp, unipc, deis, sde, …, rods), "
    "or a schedule file with a searched solver."
)
Solver = Annotated[str, typer.Option(help=_SOLVER)]
SolverOrFile = Annotated[str | None, typer.Option(help=f"{_SOLVER} Default: that of a schedule file, else euler.")]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="name or name:field=value,… (polynomial = Karras, logsnr, uniform, …), or native: a pipeline's own, "
        "or FILE.json, from fanal schedule. "
        "Default: native for a diffusers pipeline, else polynomial."
    ),
]
Steps = Annotated[int, typer.Option(help="Number of intervals.", min=1)]
StepsOrFile = Annotated[
    int | None, typer.Option(help="Number of intervals. Default: the most of a schedule file, else 40.", min=1)
]
SigmaMin = Annotated[float | None, typer.Option(help="Smallest positive sigma; default: the model's.")]
SigmaMax = Annotated[float | None, typer.Option(help="First sigma; default: the model's.")]
Zero = Annotated[bool, typer.Option("--zero/--no-zero", help="End the grid at 0, or at --sigma-min.")]
Jump = Annotated[
    float | None, typer.Option(help="Sigma from which the run goes straight to its denoised prediction (ODE-Jump).")
]
Count = Annotated[int, typer.Option(help="Number of samples.", min=1)]
Seed = Annotated[int, typer.Option(help="Run seed; sample b has seed 1,000,000·SEED + b.", min=0)]
Block = Annotated[int, typer.Option(help="Samples computed together.", min=1)]
Label = Annotated[
    str | None, typer.Option(help="Class label or its name, for a conditional model; each: all classes in turn.")
]
Number = Annotated[int | None, typer.Option(help="Class label, for a conditional model.")]
Prompt = Annotated[str | None, typer.Option(help="What a text-to-image model is asked for.")]
Captions = Annotated[Path | None, typer.Option(help="Caption file instead of a prompt: sample b gets caption b.")]
Negative = Annotated[str, typer.Option(help="What guidance leads away from; needs a prompt.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; needs --label or a prompt.")]
AllowBin = Annotated[
    bool, typer.Option("--allow-bin", help="Read a pipeline's .bin weights where it has no safetensors.")
]
Trajectory = Annotated[bool, typer.Option("--trajectory", help="Keep the trajectories.")]
Figures = Annotated[
    str | None,
    typer.Option(help="Also write the page's figures for papers, into its folder figures: pdf, png, svg, with commas."),
]
Near = Annotated[float, typer.Option(help="Distance that counts as on the support, in units of the support's size.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished run at --out.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
Threads = Annotated[int, typer.Option(help="CPU threads; they decide rounding.", min=1)]


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them.

    Raises:
        FanalError: they are something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 19 for part in parts):
        raise FanalError(f"{option} takes whole numbers with commas, such as 6,12,24, got {text!r:.60}")
    return tuple(int(part) for part in parts)


def given(context: typer.Context, *aside: str, **changed: Any) -> dict[str, Any]:
    """The options of a command by name, as the fields of its configuration.

    Lists are tuples, paths are text, and a class label is a number where it is one.

    Args:
        context: the command's.
        aside: options that are no fields, beside those about the run folder: out, overwrite and figures.
        changed: fields with another value than their option's.
    """
    left = {"out", "overwrite", "figures", *aside}
    return {name: _field(name, value) for name, value in context.params.items() if name not in left} | changed


def _field(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Path):
        return str(value)
    if name == "label" and isinstance(value, str):  # other words are for the configuration to judge
        return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value
    return value
