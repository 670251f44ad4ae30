"""`fanal demo`: the main job, on an embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, progress, say, show_run

EPILOG = """
Examples:\n
  fanal demo\n
  fanal demo --model shapes32 --count 128 --seed 3 --out shapes-demo
"""


def demo(
    model: Annotated[str, typer.Option(help="Embedded model or any other spec.")] = "hands32",
    count: options.Count = 64,
    seed: options.Seed = 0,
    out: options.Out = Path("fanal-demo"),
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
) -> None:
    """Sample, watch, flag, repair in two ways, and show the evidence.

    The same as [bold]fanal sample hands32 --guard redo --guard renoise --trajectory --block 16[/bold].
    """
    with errors_shown(resumable=True):
        from fanal.generation import SampleConfig, generate

        config = SampleConfig(
            model=model,
            count=count,
            seed=seed,
            block=max(1, min(16, count // 2)),  # at least two blocks, so that seconds have a standard error
            guard=("redo", "renoise"),
            trajectory=True,
            device=device,
        )
        folder = generate(config, out, command="demo", overwrite=overwrite, progress=progress, say=say)
        show_run(folder)
