"""`fanal models`: what comes with the package, and what its cards say."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fanal.cli import options
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
        str, typer.Argument(help="Embedded model, a folder that train or convert wrote, a checkpoint or a pipeline.")
    ],
) -> None:
    """Show a model's card as JSON: data, recipe, seed, losses, hallucination rate, calibration."""
    with errors_shown():
        from fanal.denoiser import Native, network_of
        from fanal.errors import FanalError
        from fanal.loading import card, load

        loaded = load(model)
        network = network_of(loaded)
        about = network.card() if isinstance(network, Native) else card(model)
        if "recipe" not in about and "source" not in about:
            raise FanalError(f"{model} is a closed form or a function: it has no card")
        shape = {"shape": list(loaded.shape), "sigma_min": loaded.sigma_min, "sigma_max": loaded.sigma_max}
        say(json.dumps({**shape, **about}, indent=2, ensure_ascii=False))


@app.command(
    "cost",
    epilog="Examples:\n\n  fanal models cost hands32 --calls 40 --count 1024\n\n"
    "  fanal models cost edm:edm-cifar10-32x32-uncond-vp.pkl --batch 256 --calls 35 --count 50000 --device cuda",
)
def cost(
    model: options.Model,
    batch: Annotated[int, typer.Option(help="Samples per network call.", min=1)] = 16,
    calls: Annotated[float, typer.Option(help="Network calls per sample of the run to project.", min=0)] = 40,
    count: Annotated[int, typer.Option(help="Samples of the run to project.", min=1)] = 1024,
    repeats: Annotated[int, typer.Option(help="Timed calls.", min=1)] = 5,
    threads: options.Threads = 1,
    label: options.Number = None,
    allow_bin: options.AllowBin = False,
    device: options.Device = "cpu",
) -> None:
    """Measure a model on this machine: seconds and memory of a network call, and what a run would take."""
    with errors_shown():
        import torch

        from fanal.cost import measure_cost
        from fanal.loading import load

        torch.set_num_threads(threads)
        loaded = load(model, labels=label, device=device, allow_bin=allow_bin)
        found = measure_cost(loaded, batch=batch, repeats=repeats, device=device)
        low, high = found.quartiles
        rows = [
            ["parameters", f"{found.parameters:,}"],
            ["seconds per call", f"{found.seconds:.4f} (quartiles {low:.4f} to {high:.4f})"],
            ["memory at the peak", f"{found.memory / 2**20:,.0f} MiB"],
            [f"{count:,} samples at {calls:g} calls", f"{found.projected(calls, count):,.1f} s"],
        ]
        table(["figure", f"batch of {batch} on {found.device}"], rows)
