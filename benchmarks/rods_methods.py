"""RODS on models whose mistakes a rule can name: what it corrects, what it breaks, what it costs, beside its controls.

Every method starts from the same noise. On each data set a few settings of RODS-CAS are tried on tuning seeds; the one
that leaves the fewest wrong samples is reported on other seeds, and on the first of those the controls at the same
radius and window. "cheap" is chosen the same way among guards that reuse their perturbations and cost at most 1.3 times
Euler, in calls plus 1.5 times products. "cas-gated" corrects the samples whose index exceeds, at that step, what three
in five samples of the tuning seeds have. Methods take turns block by block, and seconds are compared within a block.
Counts of calls and products are made while the run goes. Finished blocks are kept beside --out: the same command goes
on where it stopped.

    python benchmarks/rods_methods.py --out benchmarks/results/rods_methods.json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fanal
from fanal import metrics
from fanal.datasets import get
from fanal.denoiser import Temperature
from fanal.files import read_json, read_tensors, write_json, write_tensors
from fanal.hallucination import rods
from fanal.schedules import polynomial
from fanal.solvers import Euler, Heun
from fanal.summary import as_json, summarize

TUNING, REPORT = 2**41, 0  # first seeds; the first is far from every seed that fanal trains or calibrates on
STEPS, BUDGET, PRODUCT = 40, 1.3, 1.5  # a product is taken to cost 1.5 calls where guards are chosen by their counts
SIGMAS = polynomial(STEPS)


@dataclass(frozen=True)
class Plan:
    """What is run on one data set: sizes, settings to choose from, and the temperature beside them."""

    tuning: int
    report: int
    block: int
    radii: tuple[float, ...]
    windows: tuple[tuple[int, int], ...]
    kappa: float
    sigmas: tuple[float, float]
    reuse: tuple[dict[str, Any], ...]  # ways to reuse a perturbation
    few: int  # report samples that also run under the controls
    several: int  # report samples that also run with 5 and 10 gradient steps
    shorter: tuple[tuple[int, int], ...] = ()  # windows of the cheap ones; none: that of CAS


LONG = ({"hold": 4}, {"hold": 8}, {"lag": True, "hold": 4})
SHORT = ({"hold": 2}, {"hold": 3}, {"lag": True, "hold": 2}, *LONG)
IMAGES = {"tuning": 128, "report": 1024, "block": 128, "radii": (0.1,), "reuse": LONG, "few": 128, "several": 128}
COOL = {"kappa": 3 / 32, "sigmas": (0.8, 25.0)}
PLANS = {
    "hands32": Plan(windows=((8, 24), (4, 20)), **IMAGES, **COOL),
    "shapes32": Plan(windows=((12, 28), (4, 20)), **IMAGES, **COOL),
    "grid2": Plan(
        tuning=4096,
        report=4096,
        block=1024,
        radii=(0.05, 0.1, 0.2),
        windows=((16, 32), (24, 32), (4, 20)),
        kappa=0.1,
        sigmas=(0.1, 4.0),
        reuse=SHORT,
        shorter=((16, 32), (24, 32)),
        few=4096,
        several=4096,
    ),
}
CORE = ("plain", "cas", "cheap", "cas-lag", "sas-lag", "temperature")


@dataclass(frozen=True)
class Method:
    """A solver, and the temperature it runs at."""

    solver: Any
    kappa: float = 0.0
    sigmas: tuple[float, float] = (0.0, math.inf)


def run(model, method: Method, seeds: range) -> dict[str, torch.Tensor]:
    """One block: its samples, who was corrected, and calls, products, wall and CPU seconds per sample."""
    x, before = fanal.noise(model.shape, seeds, 80.0), model.evaluations
    asked = Temperature(model, method.kappa, method.sigmas) if method.kappa else model
    corrected, products = torch.zeros(len(seeds), dtype=torch.bool), 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for transition in fanal.trace(asked, x, SIGMAS, method.solver, seeds):
            x, info = transition.step.x_next, transition.step.info
            products += float(info.get("rods_products", torch.zeros(1))[0])
            corrected |= info.get("rods_corrected", torch.zeros(len(seeds))).bool()
    seconds = [(time.perf_counter() - wall) / len(seeds), (time.process_time() - cpu) / len(seeds)]
    cost = [(model.evaluations - before) / len(seeds), products, *seconds]
    return {"x": x, "corrected": corrected, "cost": torch.tensor(cost, dtype=torch.float64)}


def blocks(first: int, count: int, size: int) -> list[range]:
    """The seeds, in blocks."""
    return [range(first + k, first + min(k + size, count)) for k in range(0, count, size)]


def tuned(model, dataset, plan: Plan, solver) -> tuple[float, float]:
    """Share of wrong tuning samples, and the cost of one in Euler steps by its counts."""
    found = [run(model, Method(solver), some) for some in blocks(TUNING, plan.tuning, plan.block)]
    wrong = dataset.verify(torch.cat([part["x"] for part in found])) != 0
    calls, products = found[0]["cost"][:2].tolist()
    return float(wrong.double().mean()), (calls + PRODUCT * products) / STEPS


def settings(guard: rods.Guard) -> dict[str, Any]:
    """What was varied."""
    return {name: getattr(guard, name) for name in ("method", "rho", "window", "hold", "lag")}


def best(rows: list[tuple[rods.Guard, float, float]], budget: float) -> rods.Guard:
    """The guard that leaves the fewest wrong samples within a budget; the cheaper one of two that are alike."""
    return min((row for row in rows if row[2] <= budget), key=lambda row: (row[1], row[2]))[0]


def tune(model, dataset, plan: Plan) -> dict[str, Any]:
    """Choose CAS and its cheap variant on the tuning seeds, and measure the thresholds of the gated one."""
    full = [rods.Guard(rho=rho, window=window) for rho, window in itertools.product(plan.radii, plan.windows)]
    full = [(guard, *tuned(model, dataset, plan, guard)) for guard in track(full, "tuning CAS")]
    cas = best(full, math.inf)
    ways = [
        {"window": window, **reuse} for window, reuse in itertools.product(plan.shorter or [cas.window], plan.reuse)
    ]
    ways += [{"window": window, "method": "sas", "lag": True} for window in plan.shorter or [cas.window]]
    cheap = [dataclasses.replace(cas, **way) for way in ways]
    cheap = [(guard, *tuned(model, dataset, plan, guard)) for guard in track(cheap, "tuning the cheap ones")]
    seeing = dataclasses.replace(cas, threshold=math.inf, v="residual")
    found = [[] for _ in range(STEPS)]
    for some in blocks(TUNING, plan.tuning, plan.block):
        with torch.no_grad():
            for t in fanal.trace(model, fanal.noise(model.shape, some, 80.0), SIGMAS, seeing, some):
                found[t.span.i].append(t.step.info["rods_index"].double())
    limits = [float(torch.cat(values).quantile(0.6)) for values in found]
    tried = [settings(guard) | {"wrong": wrong, "cost": cost} for guard, wrong, cost in full + cheap]
    return {
        "cas": settings(cas),
        "cheap": settings(best(cheap, BUDGET)),
        "tried": tried,
        "limits": [None if math.isnan(limit) else limit for limit in limits],
    }


def guard_of(chosen: dict[str, Any]) -> rods.Guard:
    """A guard from what was written down."""
    return rods.Guard(**{**chosen, "window": tuple(chosen["window"])})


def methods_of(chosen: dict[str, Any], plan: Plan) -> dict[str, Method]:
    """Every method by its name, in the order of the table."""
    cas, change = guard_of(chosen["cas"]), dataclasses.replace
    limits = [math.inf if limit is None else limit for limit in chosen["limits"]]
    solvers = {
        "plain": Euler(),
        "heun": Heun(),
        "cas": cas,
        "cheap": guard_of(chosen["cheap"]),
        "cas-lag": change(cas, lag=True, hold=4),
        "sas-lag": change(cas, method="sas", lag=True),
        "cas-gated": change(cas, threshold=limits, v="residual"),
        "cas-difference": change(cas, product="difference"),
        "sas": change(cas, method="sas"),
        "random": change(cas, method="random"),
        "reversed": change(cas, method="reversed"),
    }
    cold = {"temperature": Method(Euler(), plan.kappa, plan.sigmas)}
    return {name: Method(solver) for name, solver in solvers.items()} | cold


def measured(model, methods: dict[str, Method], seeds: range, turn: int, path: Path) -> dict[str, torch.Tensor]:
    """One block under every method, in an order that turns from block to block; read back where it was finished."""
    if path.exists():
        return read_tensors(path)[0]
    names = list(methods)
    turn %= len(names)
    found = {}
    for name in names[turn:] + names[:turn]:
        found |= {f"{key}.{name}": value for key, value in run(model, methods[name], seeds).items()}
    write_tensors(path, found)
    return found


def gathered(model, methods: dict[str, Method], plan: Plan, counts: dict[str, int], path: Path) -> dict[str, Any]:
    """All blocks: samples of every method, so many of each; costs are stacked, (blocks, 4)."""
    parts = blocks(REPORT, max(counts.values()), plan.block)
    found: dict[str, list[torch.Tensor]] = {}
    for k, seeds in enumerate(track(parts, path.name)):
        now = {name: method for name, method in methods.items() if seeds.start < REPORT + counts[name]}
        block = measured(model, now, seeds, k, path.with_name(f"{path.name}-{seeds.start}-{seeds.stop}.safetensors"))
        for key, value in block.items():
            found.setdefault(key, []).append(value)
    return {key: (torch.stack if key.startswith("cost") else torch.cat)(values) for key, values in found.items()}


def kept(before: torch.Tensor, full: torch.Tensor, other: torch.Tensor) -> metrics.Estimate:
    """Corrections of another method as a share of those of CAS, paired by sample; jackknife over the wrong samples."""
    one, two = (~full[before]).double(), (~other[before]).double()
    if len(one) < 2 or float(one.sum()) < 2:
        return metrics.Estimate(math.nan, math.nan, len(one))
    without = (two.sum() - two) / (one.sum() - one)
    return metrics.Estimate(float(two.sum() / one.sum()), metrics.estimates.jackknife(without), len(one))


def rows_of(found: dict[str, torch.Tensor], names: list[str], dataset) -> list[dict[str, Any]]:
    """One row per method: figures of its samples, and its cost beside plain Euler's within each block."""
    count, turns = len(found[f"x.{names[-1]}"]), len(found[f"cost.{names[-1]}"])
    whole = {"risk": torch.zeros(count)}
    for name in names:
        tail, x = "" if name == "plain" else f".{name}", found[f"x.{name}"][:count]
        whole |= {f"x{tail}": x, f"verdict{tail}": dataset.verify(x)}
        whole[f"evaluations{tail}"] = found[f"cost.{name}"][:turns, 0]
    seconds = {name: found[f"cost.{name}"][:turns, 3] for name in names}
    rows = summarize(whole, seconds, names, dataset)["table"]
    before, full = whole["verdict"] != 0, whole["verdict.cas"] != 0
    for row, name in zip(rows, names, strict=True):
        tail = "" if name == "plain" else f".{name}"
        wrong, cost = whole[f"verdict{tail}"] != 0, found[f"cost.{name}"][:turns]
        ratio = (cost / found["cost.plain"][:turns])[:, 2:].median(0).values
        row |= {"calls": float(cost[0, 0]), "products": float(cost[0, 1])}
        row |= {"wall": float(ratio[0]), "cpu": float(ratio[1])}
        row["against_cas"] = as_json(metrics.paired_rate(full, wrong))
        row["kept"] = as_json(kept(before, full, wrong)) if name not in ("plain", "cas") else None
    return rows


def moved(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each sample, in units of the data."""
    return (x - y).flatten(1).double().square().mean(1).sqrt()


def quantiles(values: torch.Tensor) -> list[float | None]:
    """Median, 90 % quantile and largest value."""
    if not len(values):
        return [None] * 3
    return [float(values.quantile(q)) for q in (0.5, 0.9, 1.0)]


def by_steps(found: dict[str, torch.Tensor], several: dict[str, torch.Tensor], dataset) -> dict[str, Any]:
    """[RODS] fig. 8: what 5 and 10 gradient steps change, beside one."""
    count = len(several["x.cas-5"])
    one, plain = found["x.cas"][:count], found["x.plain"][:count]
    verdict, rows = dataset.verify(one), {}
    rows["1 against plain"] = {
        "verdict": as_json(metrics.rate(verdict != dataset.verify(plain))),
        "pixels": quantiles(moved(one, plain)),
    }
    for k in (5, 10):
        x, seconds = several[f"x.cas-{k}"], several[f"cost.cas-{k}"][:, 3]
        codes = dataset.verify(x)
        rows[f"{k} against 1"] = {
            "verdict": as_json(metrics.rate(codes != verdict)),
            "right_or_wrong": as_json(metrics.rate((codes != 0) != (verdict != 0))),
            "wrong": as_json(metrics.rate(codes != 0)),
            "difference": as_json(metrics.paired_rate(verdict != 0, codes != 0)),
            "pixels": quantiles(moved(x, one)),
            "cpu": float((seconds / found["cost.plain"][: len(seconds), 3]).median()),
        }
    return {"count": count, "rows": rows}


def false_positives(found: dict[str, torch.Tensor], dataset) -> dict[str, Any]:
    """What the gated guard did to samples that were right without it."""
    plain, after = found["x.plain"], found["x.cas-gated"]
    plain = plain[: len(after)]
    right = dataset.verify(plain) == 0
    rows = right & found["corrected.cas-gated"]
    alone = ~found["corrected.cas-gated"]
    return {
        "corrected": as_json(metrics.rate(rows[right])),
        "pixels": quantiles(moved(after[rows], plain[rows])),
        "broken": as_json(metrics.rate(dataset.verify(after[rows]) != 0)),
        "others_changed": int((after[alone] != plain[alone]).flatten(1).any(1).sum()),
    }


def compare(name: str, plan: Plan, work: Path) -> dict[str, Any]:
    """Tune, then run every method on the report seeds."""
    model, dataset = fanal.load(name), get(name)
    tuning = work / "tuning.json"
    if not tuning.exists():
        write_json(tuning, tune(model, dataset, plan))
    chosen = read_json(tuning)
    methods = methods_of(chosen, plan)
    counts = {name: plan.report if name in CORE else plan.few for name in methods}
    found = gathered(model, methods, plan, counts, work / "methods")
    cas = guard_of(chosen["cas"])
    more = {f"cas-{k}": Method(dataclasses.replace(cas, steps=k)) for k in (5, 10)}
    several = gathered(model, more, plan, dict.fromkeys(more, plan.several), work / "steps")
    others = [name for name in methods if name not in CORE]
    return {
        "count": plan.report,
        "few": plan.few,
        "chosen": {key: chosen[key] for key in ("cas", "cheap", "tried")},
        "temperature": [plan.kappa, plan.sigmas],
        "table": rows_of(found, list(CORE), dataset),
        "controls": rows_of(found, ["plain", "cas", *others], dataset),
        "steps": by_steps(found, several, dataset),
        "false_positives": false_positives(found, dataset),
    }


def text(value: dict | None, scale: float = 100.0, digits: int = 1) -> str:
    """A figure with its standard error."""
    if value is None or value["value"] is None:
        return "–"
    error = "" if value["se"] is None else f" ± {scale * value['se']:.{digits}f}"
    return f"{scale * value['value']:.{digits}f}{error}"


def tabled(title: str, rows: list[dict[str, Any]], varied: str, digits: int) -> Table:
    """One table of methods."""
    table = Table(title=title)
    for column in ("method", "wrong %", "corrected %", "of CAS's %", "newly wrong %", f"{varied} std", "spread"):
        table.add_column(column, justify="right")
    for column in ("calls", "products", "wall", "cpu"):
        table.add_column(column, justify="right")
    for row in rows:
        rates = [text(row.get(key), 100.0, digits) for key in ("wrong", "corrected", "kept", "newly_wrong")]
        spread = [text(row["diversity"][varied], 1.0, 2), text(row["spread"], 1.0, 3)]
        cost = [f"{row['calls']:.0f}", f"{row['products']:.0f}", f"{row['wall']:.2f}", f"{row['cpu']:.2f}"]
        table.add_row(row["name"], *rates, *spread, *cost)
    return table


def show(name: str, result: dict, console: Console) -> None:
    """Print the tables of one data set."""
    chosen, varied = result["chosen"], {"hands32": "palm_radius", "shapes32": "shapes", "grid2": "distance"}[name]
    console.print(f"cas {chosen['cas']}\ncheap {chosen['cheap']}")
    digits = 2 if name == "grid2" else 1
    console.print(tabled(f"{name}: N = {result['count']}", result["table"], varied, digits))
    console.print(tabled(f"{name}, controls: N = {result['few']}", result["controls"], varied, digits))
    for words, row in result["steps"]["rows"].items():
        console.print(f"{words} gradient step(s): verdict changed {text(row['verdict'])} %, pixels {row['pixels']}")
    console.print(f"right samples that the gated guard corrected: {result['false_positives']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples, for a quick look")
    parser.add_argument("--out", type=Path, default=Path("rods_methods.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, results = Console(width=160), {}
    for name in options.data:
        plan = PLANS[name]
        scaled = ("tuning", "report", "few", "several", "block")
        sizes = {key: max(32, round(options.scale * getattr(plan, key))) for key in scaled}
        work = options.out.with_suffix("") / f"{name}-{sizes['report']}"
        results[name] = compare(name, dataclasses.replace(plan, **sizes), work)
        show(name, results[name], console)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    seeds = {"tuning": TUNING, "report": REPORT}
    content = {"seeds": seeds, "device": "cpu", "threads": 1, "versions": versions, "results": results}
    write_json(options.out, json.loads(json.dumps(content), parse_constant=lambda _: None))


if __name__ == "__main__":
    main()
