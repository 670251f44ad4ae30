"""`fanal models`: what comes with the package, and what its cards say."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fanal.cli.console import errors_shown, say, table

app = typer.Typer(help="List the embedded models, or show a model's card.", no_args_is_help=True)


def _percent(figure: dict[str, Any] | None) -> str:
    return f"{100 * figure['value']:.1f} ± {100 * figure['se']:.1f} %" if figure else "–"


@app.command("list", epilog="Example:\n\n  fanal models list")
def list_models() -> None:
    """List the embedded models with their data and hallucination rates."""
    with errors_shown():
        from fanal.loading import card, embedded

        rows = []
        for name in embedded():
            about = card(name)
            steps = about.get("recipe", {}).get("iterations")
            rows.append([name, about.get("summary", ""), f"{steps:,}", _percent(about.get("hallucination"))])
        table(["model", "what it is", "training steps", "wrong samples, Euler-40"], rows)


@app.command("info", epilog="Examples:\n\n  fanal models info hands32\n\n  fanal models info ./my-training-run")
def info(
    model: Annotated[
        str, typer.Argument(help="Embedded model, edm:FILE.pkl, or a folder that train or convert wrote.")
    ],
) -> None:
    """Show a model's card as JSON: data, recipe, seed, losses, hallucination rate, calibration."""
    with errors_shown():
        from fanal.errors import FanalError
        from fanal.loading import card, load

        loaded = load(model)
        about = card(model)
        if "recipe" not in about and "source" not in about:
            raise FanalError(f"{model} is a closed form or a function: it has no card")
        shape = {"shape": list(loaded.shape), "sigma_min": loaded.sigma_min, "sigma_max": loaded.sigma_max}
        say(json.dumps({**shape, **about}, indent=2, ensure_ascii=False))
