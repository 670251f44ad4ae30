"""The RODS index under a loupe: how near it is to what it stands for, and at which steps it is large.

"bounds", by noise level: the index by one gradient step, the same along the best δ, the largest turn of the gradient
over all δ, and r·|λ| by Lanczos, all with v = residual; on mixtures whose Hessian is known, and on the networks at
states of their own runs. "critical", by radius and reading: at which steps the index is largest, and which share of the
samples reaches the level that one sample in five ever reaches, or a level of the paper.

    python benchmarks/rods_index.py --out benchmarks/results/rods_index.json
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fanal
from fanal.bench.plots import Line, Panel, write_plots
from fanal.exact import Mixture
from fanal.files import write_json
from fanal.hallucination.critical import CriticalSteps, critical_steps, index_path, read_as
from fanal.hallucination.robustness import bounds
from fanal.metrics import mean
from fanal.schedules import polynomial
from fanal.summary import as_json

SIGMAS, SEED = polynomial(40), 0
LEVELS = {"grid2": (4.0, 1.0, 0.3, 0.1), "default": (20.0, 4.0, 1.4, 0.5, 0.15)}
MODELS = {"mixture2": 32, "mixture48": 16, "grid2": 32, "hands32": 3}  # points per noise level
RADII = ((0.1, "shell"), (0.01, "shell"), (1.0, "absolute"))
RUNS = {"grid2": 2048, "hands32": 63, "shapes32": 63}  # samples of the critical-step maps
PAPER = (0.1, 0.09, 0.005)  # thresholds of the paper, all for the reading it calls v = d/t


def model_of(name: str):
    """A network, or a mixture of five components in 2 or 48 dimensions."""
    if name.startswith("mixture"):
        shape = (int(name.removeprefix("mixture")),)
        means = fanal.noise(shape, range(1000, 1005), 1.0, dtype=torch.float64)
        return Mixture(means, [0.3, 0.25, 0.2, 0.15, 0.1], std=0.3)
    return fanal.load(name)


def states(model, count: int) -> list[tuple[float, torch.Tensor]]:
    """States of a plain Euler run, with their noise levels."""
    dtype = torch.float64 if isinstance(model, Mixture) else torch.float32
    x = fanal.noise(model.shape, range(SEED, SEED + count), 80.0, dtype=dtype)
    with torch.no_grad():
        return [(float(t.span.sigma), t.x) for t in fanal.trace(model, x, SIGMAS, fanal.solvers.Euler())]


def compared(name: str, count: int) -> list[dict[str, Any]]:
    """One row per noise level: medians, and means of the ratios."""
    model, rows = model_of(name), []
    path = states(model, count)
    for wanted in track(LEVELS.get(name, LEVELS["default"]), f"{name}: bounds"):
        sigma, x = min(path, key=lambda pair: abs(pair[0] - wanted))
        found = bounds(model, x, sigma, rho=0.1, steps=12, starts=2)
        row: dict[str, Any] = {"sigma": sigma, "n": count}
        row |= {key: float(getattr(found, key).median()) for key in ("index", "maximized", "turned", "linear")}
        row["index_of_turned"] = as_json(mean(found.index / found.turned))
        row["maximized_of_turned"] = as_json(mean(found.maximized / found.turned))
        row["turned_of_linear"] = as_json(mean(found.turned / found.linear))
        row["gained"] = as_json(mean(found.gained))
        rows.append(row)
    return rows


def described(found: CriticalSteps) -> dict[str, Any]:
    """A map as plain JSON."""
    low, mid, high = found.middle()
    return {
        "threshold": found.threshold,
        "ever": as_json(found.ever),
        "share": [share.value for share in found.share],
        "share_se": [share.se for share in found.share],
        "batches": found.batches.double().mean(1).tolist(),
        "largest": found.largest.tolist(),
        "middle_half": [low, mid, high],
        "sigma_of_median": float(found.sigmas[mid]),
        "between_10_and_50_percent": as_json(found.between(0.1, 0.5)),
        "last_tenth": as_json(found.between(0.9, 1.0)),
    }


def mapped(name: str, count: int) -> list[dict[str, Any]]:
    """The maps of one network: every radius, reading and threshold."""
    model, rows = fanal.load(name), []
    for rho, units in track(RADII, f"{name}: critical steps"):
        size = 63 if count < 1000 else 512
        parts = [range(k, min(k + size, count)) for k in range(SEED, SEED + count, size)]
        found = [
            index_path(model, fanal.noise(model.shape, seeds, 80.0), SIGMAS, rho=rho, rho_units=units)
            for seeds in parts
        ]
        index = torch.cat(found, 1)
        for v in ("score", "direction", "residual"):
            for threshold in (None, *(PAPER if v == "score" and units == "absolute" else ())):
                steps = critical_steps(read_as(index, SIGMAS, v), SIGMAS, threshold=threshold)
                head = {"rho": rho, "rho_units": units, "v": v, "n": count, "of_paper": threshold is not None}
                rows.append(head | described(steps))
    return rows


def figure(estimate: dict[str, Any]) -> str:
    """A share with its standard error."""
    return f"{estimate['value']:.2f}" + ("" if estimate["se"] is None else f" ± {estimate['se']:.2f}")


def show(results: dict[str, Any], console: Console) -> None:
    """Print both tables."""
    table = Table(title="the index and what it stands for (medians; mean ratios)")
    for column in ("model", "sigma", "index", "best δ", "largest turn", "r·|λ|"):
        table.add_column(column, justify="right")
    for column in ("index / turn", "best δ / turn", "turn / r·|λ|", "gain of a step"):
        table.add_column(column, justify="right")
    for name, rows in results["bounds"].items():
        for row in rows:
            plain = [f"{row[key]:.3g}" for key in ("index", "maximized", "turned", "linear")]
            keys = ("index_of_turned", "maximized_of_turned", "turned_of_linear", "gained")
            table.add_row(name, f"{row['sigma']:.3g}", *plain, *[figure(row[key]) for key in keys])
    console.print(table)
    table = Table(title="critical steps, of 40")
    for column in ("model", "radius", "v", "threshold", "ever", "largest: middle half", "median at sigma"):
        table.add_column(column, justify="right")
    table.add_column("largest in steps 4 to 19", justify="right")
    table.add_column("in the last 4", justify="right")
    for name, rows in results["critical"].items():
        for row in rows:
            low, mid, high = row["middle_half"]
            radius = f"{row['rho']} {row['rho_units']}"
            level = f"{row['threshold']:.3g}" + (" (paper)" if row["of_paper"] else "")
            shares = [figure(row["between_10_and_50_percent"]), figure(row["last_tenth"])]
            where = [f"{low} … {mid} … {high}", f"{row['sigma_of_median']:.3g}"]
            table.add_row(name, radius, row["v"], level, figure(row["ever"]), *where, *shares)
    console.print(table)


def plots(results: dict[str, Any], path: Path) -> None:
    """Draw, for each network and radius, the share above the threshold and the histogram of the largest, by step."""
    panels = []
    for name, rows in results["critical"].items():
        for rho, units in RADII:
            own = [r for r in rows if (r["rho"], r["rho_units"]) == (rho, units) and not r["of_paper"]]
            steps, words = list(range(len(SIGMAS) - 1)), f"{name}, radius {rho} {units}"
            share = [Line(row["v"], steps, row["share"], row["share_se"]) for row in own]
            largest = [
                Line(row["v"], steps, [k / row["n"] for k in row["largest"]], [None] * len(steps)) for row in own
            ]
            panels.append(Panel(f"{words}: share of samples above the threshold", share, "step", "share", log=False))
            panels.append(Panel(f"{words}: where the index is largest", largest, "step", "share", log=False))
    write_plots(path, "Critical steps of RODS", panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the points and samples, for a quick look")
    parser.add_argument("--out", type=Path, default=Path("rods_index.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    def scaled(count: int) -> int:
        return max(2, round(options.scale * count))

    results = {
        "bounds": {name: compared(name, scaled(count)) for name, count in MODELS.items()},
        "critical": {name: mapped(name, max(9, scaled(count))) for name, count in RUNS.items()},
    }
    show(results, Console(width=170))
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    content = {"seed": SEED, "device": "cpu", "threads": 1, "versions": versions, "results": results}
    write_json(options.out, json.loads(json.dumps(content), parse_constant=lambda _: None))
    plots(results, options.out.with_suffix(".html"))


if __name__ == "__main__":
    main()
