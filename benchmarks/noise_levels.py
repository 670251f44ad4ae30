"""Which noise levels to train on: the wide log-normal, or one that favors the middle of the trajectory?

Both are trained at equal cost (same network, iterations, seeds and learning rate). On `grid2` the error is measured
against the exact denoiser of the data's distribution, by noise level; on images the held-out loss takes its place.
Differences are paired by seed.

    python benchmarks/noise_levels.py --data grid2 shapes32 --seeds 5 --out noise_levels.json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fanal.datasets import get
from fanal.datasets.grid import STD, modes
from fanal.exact import Mixture
from fanal.files import write_json
from fanal.objectives import LogNormal, Middle, NoiseLevels
from fanal.optimization import LEVELS, validate
from fanal.recipes import RECIPES
from fanal.seeding import noise
from fanal.training import train

CANDIDATES: dict[str, NoiseLevels] = {"lognormal": LogNormal(), "middle": Middle()}


def exact_grid() -> Mixture:
    """The distribution that `grid2` is drawn from."""
    return Mixture(torch.from_numpy(modes()), std=STD)


def errors(model, data: str, count: int, seed: int) -> dict[str, float]:
    """Mean squared error by noise level, in units of c_out² per value: against the exact denoiser or the data."""
    held_out = get(data).data("held out", count)
    if data != "grid2":
        return {f"{s:g}": float(validate(model, held_out, torch.full((count,), s)).mean()) for s in LEVELS}
    exact, result = exact_grid(), {}
    for s in LEVELS:
        sigma = torch.tensor(s, dtype=torch.float64)
        x = held_out.x + noise((2,), range(count), s, stream="benchmark", round=seed % 2**12)
        with torch.no_grad():
            gap = (model(x, sigma).double() - exact(x.double(), sigma)).square().mean()
        result[f"{s:g}"] = float(gap) * (s**2 + model.sigma_data**2) / (s * model.sigma_data) ** 2
    return result


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN where one value gives none."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread


def compare(data: str, seeds: int, iterations: int | None, count: int, console: Console) -> dict:
    """Train every candidate with every seed on one data set."""
    runs: dict[str, list[dict]] = {name: [] for name in CANDIDATES}
    for seed, (name, levels) in itertools.product(range(seeds), CANDIDATES.items()):
        base = RECIPES[data]
        recipe = dataclasses.replace(
            base, noise_levels=levels, seed=seed, iterations=iterations or base.iterations, held_out_count=0
        )
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            model = train(recipe, folder, sample_every=0)
        seconds = time.perf_counter() - begin
        by_sigma = errors(model, data, count, seed)
        runs[name].append({"seed": seed, "seconds": seconds, "by_sigma": by_sigma})
        console.print(f"{data} {name} seed {seed}: {statistics.fmean(by_sigma.values()):.5f} in {seconds:.0f} s")
    return {"iterations": iterations or RECIPES[data].iterations, "held_out": count, "runs": runs} | _summary(runs)


def _summary(runs: dict[str, list[dict]]) -> dict:
    rows = {}
    for level in [f"{s:g}" for s in LEVELS] + ["mean"]:
        values = {
            name: [statistics.fmean(r["by_sigma"].values()) if level == "mean" else r["by_sigma"][level] for r in rs]
            for name, rs in runs.items()
        }
        first, second = (values[name] for name in CANDIDATES)
        rows[level] = {name: mean_and_error(v) for name, v in values.items()} | {
            "difference": mean_and_error([b - a for a, b in zip(first, second, strict=True)])
        }
    return {"by_sigma": rows}


def show(data: str, result: dict, console: Console) -> None:
    """Print one table."""
    what = "squared error to the exact denoiser" if data == "grid2" else "held-out loss"
    seeds = len(next(iter(result["runs"].values())))
    table = Table(title=f"{data}: {what} / c_out², {result['iterations']} iterations, {seeds} seeds (± standard error)")
    for column in ("sigma", *CANDIDATES, "difference, paired"):
        table.add_column(column, justify="right")
    for level, row in result["by_sigma"].items():
        table.add_row(level, *(f"{m:.5f} ± {e:.5f}" for m, e in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["grid2", "digits8"], choices=sorted(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, help="instead of the recipe's")
    parser.add_argument("--count", type=int, default=2000, help="held-out samples; digits8 has fewer")
    parser.add_argument("--out", type=Path, default=Path("noise_levels.json"))
    options = parser.parse_args()
    console, results = Console(), {}
    for data in options.data:
        count = min(options.count, 256) if data == "digits8" else options.count
        results[data] = compare(data, options.seeds, options.iterations, count, console)
        show(data, results[data], console)
    settings = {name: dataclasses.asdict(levels) for name, levels in CANDIDATES.items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    content = {"candidates": settings, "device": "cpu", "threads": 1, "versions": versions, "results": results}
    # A standard error of one seed is not a number, which JSON has no word for.
    write_json(options.out, json.loads(json.dumps(content), parse_constant=lambda _: None))


if __name__ == "__main__":
    main()
