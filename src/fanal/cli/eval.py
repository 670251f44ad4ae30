"""`fanal eval`: compare samples with real ones, and images with their captions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, finished, progress, say, table

EPILOG = """
Examples:\n
  fanal eval hands --real hands32 --out hands-eval\n
  fanal eval hands --real hands32 --tensor before --metric fid,kid,sw --out before-eval\n
  fanal eval images --real photos.zip --size 64 --features inception:inception-2015-12-05.pt --out fid\n
  fanal eval images --captions prompts.tsv --clip ORG/NAME --out clip\n
  fanal eval --real hands32 --write-stats hands32.safetensors --out stats
"""


def _figure(figure: dict[str, Any]) -> tuple[str, str]:
    """A figure and its standard error, to two digits of the error."""
    value, se = figure["value"], figure["se"]
    digits = 4 if not se else min(max(1 - math.floor(math.log10(se)), 0), 9)
    return f"{value:.{digits}f}", "–" if se is None else f"{se:.{digits}f}"


def _show(folder: Path) -> None:
    from fanal.files import read_json

    record = read_json(folder / "run.json")
    results = record["results"]
    rows = []
    for name, figure in results["figures"].items():
        n_real = "" if name == "clip" else figure["n_real"] or "?"
        rows.append([name.replace("_", " "), *_figure(figure), str(figure["n"]), str(n_real)])
    made = results.get("features")
    if made is not None:
        sha = f", sha256 {made['sha256'][:12]}" if made["sha256"] else ""
        say(f"features: {made['name']}, {made['per_sample']} per sample{sha}")
    if "clip" in results:
        say(f"CLIP: {results['clip']['name']}, sha256 {results['clip']['sha256'][:12]}")
    if rows:
        table(["figure", "value", "standard error", "samples", "real"], rows)
    for line in results["warnings"]:
        say(f"warning: {line}")
    if record["config"]["write_stats"]:
        say(f"statistics of {results['real']['n']} real samples: {record['config']['write_stats']}")
    say(f"run: {folder}")


def _write_captions(source: str | None, count: int | None, seed: int | None, path: Path, overwrite: bool) -> None:
    from fanal.errors import FanalError
    from fanal.metrics import PROTOCOL, choose_captions, read_captions, write_captions

    if source is None:
        raise FanalError("--write-captions chooses from --captions FILE: give that too")
    chosen = choose_captions(read_captions(source), PROTOCOL if count is None else count, seed or 0)
    if path.exists() and not overwrite:
        raise FanalError(f"{path} exists: choose another --write-captions, or pass --overwrite")
    write_captions(path, chosen)
    say(f"{len(chosen.texts)} captions, one per image, seed {seed or 0}: {path}")


def evaluate(
    context: typer.Context,
    samples: Annotated[
        str | None,
        typer.Argument(help="Run folder, .safetensors file, folder or .zip of images, or a data set."),
    ] = None,
    real: Annotated[
        str | None, typer.Option(help="The same, or a file of statistics (.safetensors, .npz with mu and sigma).")
    ] = None,
    out: options.Out = Path("fanal-eval"),
    metric: Annotated[
        str | None,
        typer.Option(help="Of fid, kid, pr, dc, sw, mmd, clip; with commas. Default: fid,kid,pr,dc."),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="own, pixels, inception:PATH or torchscript:PATH (these files run their own code; PATH may be "
            "hub:ORG/REPO/FILE). auto: own for images."
        ),
    ] = "auto",
    tensor: Annotated[
        str | None, typer.Option(help="Tensor of a run folder, e.g. before or x.redo. Default: image, else x.")
    ] = None,
    split: Annotated[str, typer.Option(help="Part of a data set that is --real.")] = "held out",
    samples_split: Annotated[str, typer.Option(help="Part of a data set that is SAMPLES.")] = "train",
    count: Annotated[int | None, typer.Option(help="Number of samples; default: all.", min=1)] = None,
    real_count: Annotated[int | None, typer.Option(help="Number of real ones; default: all.", min=1)] = None,
    size: Annotated[int | None, typer.Option(help="Resize the images of folders and zips.", min=1)] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Captions: .txt (a line each), .tsv (id, caption) or .json (COCO).")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIP, for --captions.")] = None,
    caption_seed: Annotated[
        int | None, typer.Option(help="The samples were made from this choice of captions, one per image.", min=0)
    ] = None,
    write_captions: Annotated[
        Path | None, typer.Option(help="Choose --count captions (30,000) with --caption-seed, write them, and stop.")
    ] = None,
    write_stats: Annotated[
        Path | None, typer.Option(help="Write the statistics of --real to this .safetensors file.")
    ] = None,
    moments_only: Annotated[
        bool, typer.Option("--moments-only", help="Leave the features out of files of statistics.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random directions and halves.", min=0)] = 0,
    block: Annotated[int, typer.Option(help="Samples whose features are computed together.", min=1)] = 128,
    overwrite: options.Overwrite = False,
    device: options.Device = "cpu",
    threads: options.Threads = 1,
) -> None:
    """Compare samples with real ones: FID, KID, precision and recall, density and coverage, and more.

    Each figure has its standard error and names the network that made its features. With --captions also CLIP scores.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        if write_captions is not None:
            _write_captions(str(captions) if captions else None, count, caption_seed, write_captions, overwrite)
            return
        from fanal.evaluation import EvalConfig
        from fanal.evaluation import evaluate as run

        metrics = tuple(name.strip() for name in metric.split(",")) if metric else ()
        config = EvalConfig(**options.given(context, "metric", "write_captions", metrics=metrics))
        folder = run(config, out, overwrite=overwrite, progress=progress, say=say)
        with finished(folder):
            _show(folder)
