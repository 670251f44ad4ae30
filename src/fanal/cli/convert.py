"""`fanal convert`: a foreign checkpoint becomes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli.console import errors_shown, say

EPILOG = """
Examples:\n
  fanal convert edm-cifar10-32x32-cond-vp.pkl cifar10\n
  fanal sample ./cifar10 --solver heun --steps 18 --label 3 --out cars
"""


def convert(
    source: Annotated[Path, typer.Argument(help="Official EDM pickle.", metavar="FILE.pkl")],
    out: Annotated[Path, typer.Argument(help="Model folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at OUT.")] = False,
) -> None:
    """Turn an EDM checkpoint into a model folder (safetensors and JSON) that every command accepts.

    The pickle carries source code; it is read without running any of it. Outputs stay the same bit for bit.
    """
    with errors_shown():
        from fanal.adapters import convert as run

        card = run(str(source).removeprefix("edm:"), out, overwrite=overwrite)
        say(card["summary"])
        say(f"model: {out}; try: fanal sample {out if out.is_absolute() else f'./{out}'}")
