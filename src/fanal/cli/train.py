"""`fanal train`: train a model on your own images, by a recipe, or reproduce an embedded one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, progress, say, table

if TYPE_CHECKING:
    from fanal.datasets import Folder
    from fanal.recipes import Recipe

EPILOG = """
Examples:\n
  fanal train photos --out my-model\n
  fanal train photos.zip --size 64 --device cuda --out my-model\n
  fanal train photos --size 32 --iterations 20000 --ema 0.999 --ema power:0.1 --out my-model\n
  fanal train photos --set net.widths=[32,64,128] --set learning_rate=1e-3 --out my-model\n
  torchrun --nproc_per_node 2 -m fanal.cli train photos --device cuda --out my-model\n
  fanal train hands32 --out hands-again\n
  fanal train my-recipe.toml --out mine\n
  fanal sample ./my-model --out my-samples
"""


@contextlib.contextmanager
def _first_speaks() -> Iterator[None]:
    """Of several processes, let only the first one talk to the user."""
    from fanal.processes import launched

    if not launched():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def _recipe(name: str) -> Recipe:
    """The recipe of a name or of a TOML file."""
    import tomllib

    from fanal.errors import FanalError, reason, unknown_name
    from fanal.recipes import RECIPES, Recipe

    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".toml"):
        raise unknown_name("recipe", name, [*RECIPES, "FILE.toml", "a folder or zip file of images"])
    try:
        return Recipe.from_dict(tomllib.loads(Path(name).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FanalError(f"cannot read the recipe {name}: {reason(error)}") from error


def _images(name: str) -> bool:
    """Whether what is to be trained on is a folder or zip file of images, not a recipe."""
    from fanal.recipes import RECIPES

    return name not in RECIPES and not name.endswith(".toml") and Path(name).expanduser().exists()


def _settings(pairs: list[str]) -> dict[str, Any]:
    """The values of KEY=VALUE, as TOML reads them; what is no TOML is text."""
    import tomllib

    from fanal.errors import FanalError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise FanalError(f"--set takes KEY=VALUE, e.g. learning_rate=1e-3 or net.dropout=0.1, got {pair!r}")
        try:
            found[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = value
    return found


def _averages(ema: list[str]) -> float | str | list[float | str]:
    """The recipe's `ema`, from words."""
    found: list[float | str] = []
    for word in ema:
        try:
            found.append(float(word))
        except ValueError:
            found.append(word)
    return found[0] if len(found) == 1 else found


def _only_unjudged(out: Path, plan: Recipe) -> bool:
    """Whether this recipe's training is done there, and only its evaluation was interrupted or left out."""
    from fanal.nets import read_card

    if not (out / "model.json").is_file():
        return False
    about = read_card(out)
    return "calibration" not in about and about.get("recipe") == json.loads(json.dumps(plan.to_dict()))


def _plan(recipe: Recipe, dataset: Folder, device: str) -> list[list[str]]:
    """What is about to be trained, as rows."""
    import torch

    from fanal.nets import Preconditioned

    with torch.device("meta"):
        net = Preconditioned(recipe.net, dataset.shape, classes=len(dataset.classes) if recipe.conditional else 0)
    size = sum(p.numel() for p in net.parameters())
    channels, height, width = dataset.shape
    train, held_out = dataset.count("train"), dataset.count("held out")
    images = f"{train:,} to train on, {held_out:,} held out"
    if dataset.skipped:
        images += f", {len(dataset.skipped):,} unusable ones skipped"
    views = recipe.iterations * recipe.batch / (recipe.train_count or train)
    classes = f"{len(dataset.classes)}, {'told' if recipe.conditional else 'not told'} to the model"
    pieces = f" in {recipe.accumulate} pieces" if recipe.accumulate > 1 else ""
    how = f"augmented with probability {recipe.augment:g}" if recipe.augment else "not augmented"
    return [
        ["images", images],
        ["size", f"{width}x{height}, {'gray' if channels == 1 else 'color'}"],
        ["classes", classes if dataset.classes else "none"],
        ["network", f"{type(recipe.net).__name__.removesuffix('Config')}, {size:,} parameters"],
        ["iterations", f"{recipe.iterations:,} of {recipe.batch} images{pieces}: each image {views:,.0f} times, {how}"],
        ["averages", ", ".join(profile.name for profile in recipe.averages)],
        ["device", f"{device}, {recipe.precision}, {recipe.threads} CPU threads"],
    ]


def _figures(about: dict[str, Any]) -> list[list[str]]:
    """The card's main figures, as rows."""
    loss = about["loss"]
    rows = [["loss, first and last 200 steps", f"{loss['first_200']:.4f}, {loss['last_200']:.4f}"]]
    for name, average in about.get("averages", {}).items():
        if average["held_out_loss"] is not None:
            rows.append([f"held-out loss of {name}, in {average['folder']}", f"{average['held_out_loss']:.4f}"])
    if about.get("held_out_loss"):
        rows.append(["loss, held out", f"{about['held_out_loss']['mean']:.4f}"])
    if "hallucination" in about:
        wrong = about["hallucination"]
        rows.append(["wrong samples, Euler-40", f"{100 * wrong['value']:.1f} ± {100 * wrong['se']:.1f} %"])
    if about.get("class_names"):
        rows.append(["classes", ", ".join(f"{i} {name}" for i, name in enumerate(about["class_names"][:20]))])
    rows.append(["seconds of training", f"{about['seconds']:.0f}"])
    return rows


def _changes(conditional: bool | None, ema: list[str] | None, settings: list[str] | None, **values: Any) -> dict:
    """The recipe's values that options change."""
    changes = {key: value for key, value in values.items() if value is not None}
    if conditional is not None:
        changes["conditional"] = conditional
    if conditional is False:
        changes.setdefault("label_dropout", 0.0)
    if ema:
        changes["ema"] = _averages(ema)
    return changes | _settings(settings or [])


def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A folder or zip file of images, an embedded model's name, or a recipe in a TOML file."),
    ],
    out: Annotated[Path, typer.Option(help="Model folder to write; an unfinished one is continued.")],
    size: Annotated[int | None, typer.Option(help="Side to which images are cropped and resized.", min=1)] = None,
    conditional: Annotated[
        bool | None, typer.Option("--conditional/--unconditional", help="Whether the model is told the classes.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out unusable images instead of stopping.")
    ] = False,
    iterations: Annotated[int | None, typer.Option(help="Optimizer steps.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all processes.", min=1)] = None,
    accumulate: Annotated[int | None, typer.Option(help="Pieces to cut a process' batch into.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bf16 or fp16.")] = None,
    augment: Annotated[float | None, typer.Option(help="Probability of each geometric augmentation.")] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Mirror half of the images.")] = None,
    label_dropout: Annotated[float | None, typer.Option(help="Share of labels that are left out.")] = None,
    ema: Annotated[
        list[str] | None, typer.Option(help="A decay, or power:SIGMA_REL; may be given again, the first is the model.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches, noise and dropout.", min=0)] = None,
    objective: Annotated[str | None, typer.Option(help="edm, dae, dsm, ism or ssm.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for any other field of the recipe; may be given again.")
    ] = None,
    evaluate: Annotated[
        int | None,
        typer.Option(
            help="Samples to judge and calibrate on at the end; 0: none; default 1024, own images 256.", min=0
        ),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Iterations between checkpoints.", min=1)] = 500,
    sample_every: Annotated[int, typer.Option(help="Iterations between pictures of samples; 0: none.", min=0)] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train again over a finished model.")] = False,
    device: options.Device = "cpu",
) -> None:
    """Train a denoiser, and write a model folder that every command accepts.

    On your own images, everything has a default by their size and the device; options change the recipe's values.

    Checkpoints survive a kill at any moment: the same command goes on to the same weights.

    The card gets the share of wrong samples, where the data have a verifier, and the detector's calibration.
    """
    with _first_speaks(), errors_shown(resumable=True):
        from fanal.cards import evaluate_model
        from fanal.errors import FanalError
        from fanal.nets import read_card
        from fanal.presets import own_images
        from fanal.processes import check_device, launched
        from fanal.recipes import change
        from fanal.training import train as run

        own = _images(recipe)
        samples = evaluate if evaluate is not None else 256 if own else 1024
        if 0 < samples < 8:
            raise FanalError(f"--evaluate needs at least 8 samples to calibrate on, or 0 for none, got {samples}")
        check_device(device)
        changes = _changes(
            conditional,
            ema,
            settings,
            iterations=iterations,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            precision=precision,
            augment=augment,
            flip=flip,
            label_dropout=label_dropout,
            seed=seed,
            objective=objective,
            threads=threads,
        )
        dataset = None
        if own:
            base, dataset = own_images(
                recipe,
                None if overwrite else out,
                size=size,
                skip_bad=skip_bad,
                conditional=conditional,
                device=device,
                progress=progress,
            )
        elif size is not None or skip_bad:
            raise FanalError("--size and --skip-bad are for a folder or zip file of images; a recipe names its data")
        else:
            base = _recipe(recipe)
        plan = change(base, changes)
        if dataset is not None:
            table(["training", recipe], _plan(plan, dataset, device))
        if not (samples and not overwrite and _only_unjudged(out, plan)):
            run(
                plan,
                out,
                dataset=dataset,
                overwrite=overwrite,
                device=device,
                checkpoint_every=checkpoint_every,
                sample_every=sample_every,
            )
        if launched():
            return
        if samples:
            evaluate_model(out, count=samples, device=device, progress=progress)
        table(["figure", "value"], _figures(read_card(out)))
        say(f"model: {out}; try: fanal sample {out if out.is_absolute() else f'./{out}'} --guard redo")
