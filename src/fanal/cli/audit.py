"""`fanal audit`: does a model replay its training data?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import carry_out, errors_shown, say, table

EPILOG = """
Examples:\n
  fanal audit hands32 --data hands32 --out hands-audit\n
  fanal audit ./my-model --data folder:PHOTOS --count 10000 --out photos-audit\n
  fanal audit edm:cifar10.pkl --data folder:CIFAR10,size=32 --device cuda --out cifar-audit\n
  fanal audit hands32 --data hands32 --figures pdf,png --out hands-figures\n
  fanal audit data:digits8 --data digits8 --count 200 --out caught
"""


def _spread(found: dict[str, float | None], value: str, low: str, high: str, form: str, scale: float) -> str:
    """A figure with the ends of its interval."""
    middle, *ends = (
        "–" if found[key] is None else form.format(scale * (found[key] or 0)) for key in (value, low, high)
    )
    return middle if found[value] is None else f"{middle} ({ends[0]} to {ends[1]})"


def _show(folder: Path) -> None:
    """Print what was found."""
    from fanal.files import read_json
    from fanal.memorization.settling import ENDS
    from fanal.report.audit import verdict

    results = read_json(folder / "run.json")["results"]
    say(verdict(results))
    found = results["settling"]
    if found:
        rows = [
            [name, _spread(found[name], "median sigma", "median low", "median high", "{:.3g}", 1),
             _spread(found[name], "share", "share low", "share high", "{:.0f} %", 100)]
            for name in ENDS
        ]  # fmt: skip
        table(["runs", "median sigma", "of runs"], rows, title=f"when {found['runs']} runs settle, 95 % intervals")


def audit(
    context: typer.Context,
    model: options.Model,
    data: Annotated[str, typer.Option(help=f"What it was trained on: {options.DATA}.")],
    out: options.Out = Path("fanal-audit"),
    count: options.Count = 1000,
    points: Annotated[
        int | None, typer.Option(help="Training points that are searched, the first ones; default: all.", min=2)
    ] = None,
    held: Annotated[
        int | None, typer.Option(help="Held-out points that set the threshold; default: all, up to 10,000.", min=1)
    ] = None,
    level: Annotated[float, typer.Option(help="Share of held-out points that are called copies: false alarms.")] = 0.01,
    traced: Annotated[int, typer.Option(help="Samples whose runs are followed for when they settle.", min=0)] = 64,
    solver: options.Solver = "heun",
    schedule: options.Schedule = None,
    steps: options.Steps = 20,
    sigma_min: options.SigmaMin = None,
    sigma_max: options.SigmaMax = None,
    zero: options.Zero = True,
    label: options.Label = None,
    prompt: options.Prompt = None,
    negative: options.Negative = "",
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    allow_bin: options.AllowBin = False,
    block: options.Block = 64,
    figures: options.Figures = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Count samples that copy training points, against what held-out points would show, and when runs settle on one.

    The run folder holds run.json, samples.safetensors, pairs.png and report.html, a page that opens offline.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.memorization.command import AuditConfig
        from fanal.memorization.command import audit as run

        config = AuditConfig(**options.given(context, traced=min(traced, count)))
        carry_out(run, config, out, overwrite=overwrite, show=_show, figures=figures)
