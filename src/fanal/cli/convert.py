"""`fanal convert`: a foreign checkpoint becomes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanal.cli.console import errors_shown, say

EPILOG = """
Examples:\n
  fanal convert edm-cifar10-32x32-cond-vp.pkl cifar10\n
  fanal convert adm:64x64_diffusion.pt imagenet64\n
  fanal convert adm:mine.pt,size=32,heads=4,order=legacy,schedule=linear mine\n
  fanal convert consistency:cd_bedroom256_lpips.pt bedroom\n
  fanal convert hands32 hands32-diffusers --to diffusers\n
  fanal sample ./cifar10 --solver heun --steps 18 --label 3 --out cars
"""


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="FILE.pkl or edm:FILE.pkl (EDM), adm:FILE.pt (guided-diffusion), consistency:FILE.pt; "
            "with --to diffusers any model of fanal's own networks.",
            metavar="CHECKPOINT",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Model folder to write.")],
    to: Annotated[str, typer.Option(help="fanal: a model folder; diffusers: a pipeline's folder.")] = "fanal",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at OUT.")] = False,
) -> None:
    """Turn a checkpoint into a model folder (safetensors and JSON) that every command accepts.

    Checkpoints are pickles, which can run code when they are opened; nothing in them is run here. Outputs stay the same
    bit for bit.
    """
    with errors_shown():
        if to != "fanal":
            export(source, out, to, overwrite)
            return
        from fanal.adapters import convert as run
        from fanal.errors import FanalError
        from fanal.loading import embedded

        if source in embedded() or (Path(source) / "model.json").is_file():
            raise FanalError(f"{source} is a model of fanal already; --to diffusers makes a pipeline of it")
        card = run(source, out, overwrite=overwrite)
        say(card["summary"])
        say(f"model: {out}; try: fanal sample {out if out.is_absolute() else f'./{out}'}")


def export(model: str, out: Path, to: str, overwrite: bool) -> None:
    """Write a model in another program's form."""
    from fanal.errors import FanalError, unknown_name

    if to != "diffusers":
        raise unknown_name("--to", to, ("fanal", "diffusers"))
    try:
        from fanal.adapters.export import export_pipeline
    except ImportError as error:
        raise FanalError(f"--to diffusers needs diffusers ({error}): pip install 'fanal[diffusers]'") from error
    export_pipeline(model, out, overwrite=overwrite)
    say(f"pipeline: {out}; try, in Python:")
    say("  import fanal.adapters.export, diffusers")
    say(f'  pipe = diffusers.DDIMPipeline.from_pretrained("{out}")')
