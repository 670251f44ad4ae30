"""RODS on models whose mistakes a rule can name: what it corrects, what it breaks, what it costs, beside its controls.

Every method starts from the same noise. On each data set a few settings of RODS-CAS are tried on tuning seeds; the one
that leaves the fewest wrong samples is reported on other seeds, with the controls at the same radius and window.
"cas-gated" corrects the samples whose index exceeds, at that step, what three in five samples of the tuning seeds have.
Counts of forward calls and Jacobian products are made while the run goes; time is that of this machine.

    python benchmarks/rods_first_look.py --out benchmarks/results/rods_first_look.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fanal
from fanal.datasets import get
from fanal.denoiser import Temperature
from fanal.files import write_json
from fanal.hallucination import rods
from fanal.schedules import polynomial
from fanal.solvers import Euler, Heun
from fanal.summary import summarize

TUNING, REPORT = 3_000_000_000, 4_000_000_000  # first seeds; neither is a seed that fanal trains or calibrates on
BLOCK = 128


@dataclass(frozen=True)
class Plan:
    """What is run on one data set: sizes, settings of CAS to choose from, and the temperature beside it."""

    tuning: int
    report: int
    radii: tuple[float, ...]
    windows: tuple[tuple[int, int], ...]
    kappa: float
    sigmas: tuple[float, float]


PLANS = {
    "hands32": Plan(256, 512, (0.05, 0.1), ((8, 24), (4, 20)), 3 / 32, (0.8, 25.0)),
    "grid2": Plan(2048, 4096, (0.05, 0.1, 0.2), ((16, 32), (4, 20)), 0.1, (0.1, 4.0)),
}


def run(model, solver, sigmas, seeds: range, kappa: float = 0.0, window=(0.0, math.inf)) -> dict:
    """Sample and count: samples, and calls, products and seconds of each one."""
    parts, calls, products, begin = [], 0.0, 0.0, time.process_time()
    for first in range(0, len(seeds), BLOCK):
        some = seeds[first : first + BLOCK]
        x, before = fanal.noise(model.shape, some, 80.0), model.evaluations
        asked = Temperature(model, kappa, window) if kappa else model
        with torch.no_grad():
            for transition in fanal.trace(asked, x, sigmas, solver, some):
                x = transition.step.x_next
                products += float(transition.step.info.get("rods_products", torch.zeros(1)).sum())
        calls += model.evaluations - before
        parts.append(x)
    count = len(seeds)
    return {
        "x": torch.cat(parts),
        "calls": calls / count,
        "products": products / count,
        "seconds": (time.process_time() - begin) / count,
    }


def guards(plan: Plan) -> list[rods.Guard]:
    """The settings of CAS to choose from."""
    return [rods.Guard(rho=rho, window=window) for rho in plan.radii for window in plan.windows]


def tune(model, dataset, sigmas, plan: Plan, console: Console) -> tuple[rods.Guard, list[dict]]:
    """The setting with the fewest wrong samples on the tuning seeds, and what all of them left."""
    tried, seeds = [], range(TUNING, TUNING + plan.tuning)
    for guard in guards(plan):
        wrong = float((dataset.verify(run(model, guard, sigmas, seeds)["x"]) != 0).double().mean())
        tried.append({"rho": guard.rho, "window": guard.window, "wrong": wrong})
        console.print(f"tuning: radius {guard.rho}, steps {guard.window}: {100 * wrong:.2f} % wrong")
    best = min(range(len(tried)), key=lambda i: tried[i]["wrong"])
    return guards(plan)[best], tried


def gated(model, sigmas, guard: rods.Guard, seeds: range) -> rods.Guard:
    """The guard with a threshold per step: the 60 % quantile of the index on the tuning seeds."""
    seeing = dataclasses.replace(guard, threshold=math.inf, v="residual")
    found = [[] for _ in sigmas[:-1]]
    for first in range(0, len(seeds), BLOCK):
        some = seeds[first : first + BLOCK]
        with torch.no_grad():
            for t in fanal.trace(model, fanal.noise(model.shape, some, 80.0), sigmas, seeing, some):
                found[t.span.i].append(t.step.info["rods_index"].double())
    limits = [float(torch.cat(values).quantile(0.6)) for values in found]
    return dataclasses.replace(seeing, threshold=[math.inf if math.isnan(v) else v for v in limits])


def compare(name: str, plan: Plan, console: Console) -> dict:
    """Tune, then run every method on the report seeds."""
    model, dataset, sigmas = fanal.load(name), get(name), polynomial(40)
    guard, tried = tune(model, dataset, sigmas, plan, console)
    seeds = range(REPORT, REPORT + plan.report)
    change = dataclasses.replace
    methods = {
        "plain": run(model, Euler(), sigmas, seeds),
        "heun": run(model, Heun(), sigmas, seeds),
        "cas": run(model, guard, sigmas, seeds),
        "cas-gated": run(model, gated(model, sigmas, guard, range(TUNING, TUNING + plan.tuning)), sigmas, seeds),
        "cas-difference": run(model, change(guard, product="difference"), sigmas, seeds),
        "sas": run(model, change(guard, method="sas"), sigmas, seeds),
        "random": run(model, change(guard, method="random"), sigmas, seeds),
        "reversed": run(model, change(guard, method="reversed"), sigmas, seeds),
        "temperature": run(model, Euler(), sigmas, seeds, plan.kappa, plan.sigmas),
    }
    whole = {"risk": torch.zeros(plan.report)}
    for method, found in methods.items():
        tail = "" if method == "plain" else f".{method}"
        whole |= {f"x{tail}": found["x"], f"verdict{tail}": dataset.verify(found["x"])}
        whole[f"evaluations{tail}"] = torch.full((plan.report,), found["calls"])
    seconds = {method: torch.tensor([found["seconds"]]) for method, found in methods.items()}
    rows = summarize(whole, seconds, list(methods), dataset)["table"]
    for row in rows:
        row["products"] = methods[row["name"]]["products"]
    chosen = {"rho": guard.rho, "rho_units": guard.rho_units, "window": guard.window, "tried": tried}
    return {"count": plan.report, "chosen": chosen, "temperature": [plan.kappa, plan.sigmas], "table": rows}


def text(value: dict | None, scale: float = 100.0, digits: int = 1) -> str:
    """A figure with its standard error."""
    if value is None or value["value"] is None:
        return "–"
    error = "" if value["se"] is None else f" ± {scale * value['se']:.{digits}f}"
    return f"{scale * value['value']:.{digits}f}{error}"


def show(name: str, result: dict, console: Console) -> None:
    """Print one table."""
    chosen, varied = result["chosen"], "palm_radius" if name == "hands32" else "distance"
    title = f"{name}: N = {result['count']}, rho = {chosen['rho']}, steps {chosen['window']}"
    table = Table(title=title)
    digits = 1 if name == "hands32" else 2
    for column in ("method", "wrong %", "corrected %", "newly wrong %", f"{varied} std", "spread", "calls", "products"):
        table.add_column(column, justify="right")
    table.add_column("s / sample", justify="right")
    for row in result["table"]:
        rates = [text(row.get(key), 100.0, digits) for key in ("wrong", "corrected", "newly_wrong")]
        kept = [text(row["diversity"][varied], 1.0, 2), text(row["spread"], 1.0, 3)]
        cost = [f"{row['evaluations']['value']:.0f}", f"{row['products']:.0f}", f"{row['seconds']['value']:.4f}"]
        table.add_row(row["name"], *rates, *kept, *cost)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples, for a quick look")
    parser.add_argument("--out", type=Path, default=Path("rods_first_look.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, results = Console(width=140), {}
    for name in options.data:
        plan = PLANS[name]
        sizes = {key: max(32, round(options.scale * getattr(plan, key))) for key in ("tuning", "report")}
        results[name] = compare(name, dataclasses.replace(plan, **sizes), console)
        show(name, results[name], console)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    seeds = {"tuning": TUNING, "report": REPORT}
    content = {"seeds": seeds, "device": "cpu", "threads": 1, "versions": versions, "results": results}
    write_json(options.out, json.loads(json.dumps(content), parse_constant=lambda _: None))


if __name__ == "__main__":
    main()
