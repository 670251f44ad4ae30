"""`fanal train`: train a model, or reproduce an embedded one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fanal.cli.console import errors_shown, progress, say, table

if TYPE_CHECKING:
    from fanal.recipes import Recipe

EPILOG = """
Examples:\n
  fanal train grid2 --out my-grid\n
  fanal train hands32 --out hands-again\n
  fanal train hands32 --iterations 24000 --out hands-long\n
  fanal train my-recipe.toml --out mine\n
  fanal sample ./mine --out mine-samples
"""


def _recipe(name: str, changes: dict[str, int | str | None]) -> Recipe:
    """The recipe of a name or of a TOML file, with what the command line changes."""
    import tomllib

    from fanal.errors import FanalError, unknown_name
    from fanal.recipes import RECIPES, Recipe

    if name in RECIPES:
        recipe = RECIPES[name]
    elif name.endswith(".toml"):
        try:
            recipe = Recipe.from_dict(tomllib.loads(Path(name).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise FanalError(f"cannot read the recipe {name}: {error}") from error
    else:
        raise unknown_name("recipe", name, [*RECIPES, "FILE.toml"])
    return dataclasses.replace(recipe, **{key: value for key, value in changes.items() if value is not None})  # pyright: ignore[reportArgumentType]


def _only_unjudged(out: Path, plan: Recipe) -> bool:
    """Whether this recipe's training is done there, and only its evaluation was interrupted or left out."""
    from fanal.loading import card

    if not (out / "model.json").is_file():
        return False
    about = card(str(out))
    return "calibration" not in about and about.get("recipe") == json.loads(json.dumps(plan.to_dict()))


def _figures(about: dict[str, Any]) -> list[list[str]]:
    """The card's main figures, as rows."""
    loss = about["loss"]
    rows = [["loss, first and last 200 steps", f"{loss['first_200']:.4f}, {loss['last_200']:.4f}"]]
    if "hallucination" in about:
        wrong = about["hallucination"]
        rows.append(["wrong samples, Euler-40", f"{100 * wrong['value']:.1f} ± {100 * wrong['se']:.1f} %"])
    rows.append(["seconds of training", f"{about['seconds']:.0f}"])
    return rows


def train(
    recipe: Annotated[str, typer.Argument(help="Name of an embedded model, or a recipe in a TOML file.")],
    out: Annotated[Path, typer.Option(help="Model folder to write; an unfinished one is continued.")],
    iterations: Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=0)] = None,
    objective: Annotated[str | None, typer.Option(help="edm, dae, dsm, ism or ssm, instead of the recipe's.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads, instead of the recipe's.", min=1)] = None,
    evaluate: Annotated[
        int, typer.Option(help="Samples to judge and calibrate on when the training is done; 0 for none.", min=0)
    ] = 1024,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train again over a finished model.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Train a denoiser, and write a model folder that every command accepts.

    Checkpoints survive a kill at any moment: the same command goes on to the same weights.

    The card gets the share of wrong samples, where the data have a verifier, and the detector's calibration.
    """
    with errors_shown(resumable=True):
        from fanal.cards import evaluate_model
        from fanal.errors import FanalError
        from fanal.loading import card
        from fanal.training import train as run

        if 0 < evaluate < 8:
            raise FanalError(f"--evaluate needs at least 8 samples to calibrate on, or 0 for none, got {evaluate}")
        changes = {"iterations": iterations, "batch": batch, "seed": seed, "objective": objective, "threads": threads}
        plan = _recipe(recipe, changes)
        if not (evaluate and not overwrite and _only_unjudged(out, plan)):
            run(plan, out, overwrite=overwrite, device=device)
        if evaluate:
            evaluate_model(out, count=evaluate, device=device, progress=progress)
        table(["figure", "value"], _figures(card(str(out))))
        say(f"model: {out}; try: fanal sample {out} --guard redo")
