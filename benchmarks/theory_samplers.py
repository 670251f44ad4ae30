"""How do particles of the reverse diffusion converge, what can a loss reach, and do exact runs end on training points?

    fanal bench overlay --out bench-overlay
    python benchmarks/theory_samplers.py --overlay bench-overlay --figures docs/images --out theory_samplers.json

prints the tables of docs/theory-samplers.md, keeps their figures and draws them. `--only` names parts: statements,
orders, floors, cells, bounds, endings; the others are then what the file of `--out` has already.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import theory_sampler_figures as figures
import torch
from rich.console import Console
from scipy import stats

from fanal import particles, pde
from fanal.bench.schedule_tables import markdown
from fanal.datasets import get
from fanal.exact import Dataset, Gaussian
from fanal.files import read_json, write_json
from fanal.metrics import rate
from fanal.particles.theory import SHEETS, STATEMENTS
from fanal.particles.theory.problem import EARLY, SCHEMES, START, VARIANCE, density, grid, humps, variance
from fanal.particles.theory.problem import points as scattered
from fanal.particles.theory.schemes import reference
from fanal.report.sheets import row, write_sheet
from fanal.runs import cpu_threads, versions
from fanal.sampling import sample, trace
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import DDPM, Euler
from fanal.trajectory import Trajectory

LAST = (1.0, 0.3, 0.1, 0.03, 0.01)  # last noise level over the median distance between neighbors
STEPS = (2, 5, 10, 20, 50, 100)


def orders(say) -> dict:
    """Weak and strong errors against steps, on Gaussian data in closed form and on two humps by integration."""
    data = Gaussian(torch.zeros(1, dtype=torch.float64), VARIANCE)
    steps = (8, 16, 32, 64, 128)
    z0 = math.sqrt(variance(START)) * noise((4000, 1), [1], dtype=torch.float64)[0]
    path, exact = reference(z0, steps[-1])
    cells = pde.Grid.even(-8.0, 8.0, 640)
    z = cells.centers[0]
    rows, out = [], []
    for name, (solver, weight) in SCHEMES.items():
        for n in steps:
            found = {"scheme": name, "steps": n}
            for kind, uniform in (("log", False), ("even", True)):
                run = particles.affine(solver, data, grid(n, even=uniform))
                std = run.std(math.sqrt(variance(START)) * math.exp(START)) * math.exp(-EARLY)
                found[f"variance {kind}"] = std**2 - variance(EARLY)
            driven = particles.Driven(solver, path.noise(weight))
            end = sample(data, z0 * math.exp(START), grid(n), driven) * math.exp(-EARLY)
            found["strong"] = float((end - exact).square().mean().sqrt())
            if n <= 64:
                own = particles.law(solver, humps(), grid(n), cells, density(z, START))
                found["tv"] = float(np.abs(own - density(z, EARLY)).sum() * float(cells.widths[0][0]) / 2)
            out.append(found)
            rows.append([name, str(n), *(f"{found[k]:.4f}" if k in found else "–" for k in ROWS)])
    say("Orders\n\n" + markdown(["scheme", "steps", *ROWS.values()], rows))
    return {"rows": out}


ROWS = {
    "variance log": "variance, steps even in log t",
    "variance even": "variance, steps even in t",
    "strong": "strong error",
    "tv": "total variation, two humps",
}


def floors(say) -> dict:
    """The floor of the total loss at several times, and its mean down to smaller and smaller ones."""
    times, starts = (2.0, 1.0, 0.5, 0.1, 0.01, 0.001), (0.1, 1e-2, 1e-3, 1e-4)
    at = {f"{t:g}": particles.floor(humps(), t) for t in times}
    over = {f"{e:g}": particles.mean_floor(humps(), e, START) for e in starts}
    say("Floor at a time\n\n" + markdown(["t", *at], [["floor", *(f"{v:.4g}" for v in at.values())]]))
    say(
        "Mean floor from a time to 3\n\n" + markdown(["from", *over], [["floor", *(f"{v:.3f}" for v in over.values())]])
    )
    return {"at": at, "mean": over}


def cells(say) -> dict:
    """How many runs are outside of the cell that they end in, against the forward process."""
    points, count = scattered(), 2000
    sigmas = torch.cat([polynomial(200, 1e-3, 20.0, zero=False), torch.zeros(1, dtype=torch.float64)])
    start = noise((count, 2), [3], 20.0, dtype=torch.float64)[0]
    run = Trajectory.record(trace(Dataset(points), start, sigmas, particles.Driven(DDPM(), particles.bulk(0))))
    ends, rows, out = particles.Endings.of(points, run.x[-1]), [], {}
    for wanted in (3.0, 1.0, 0.5, 0.25, 0.1, 0.03):
        k = int((sigmas - wanted).abs().argmin())
        own = rate(Dataset(points).nearest(run.x[k])[1][:, 0] != ends.index)
        forward = rate(particles.chance_outside(points, float(sigmas[k]), 20_000))
        out[f"{float(sigmas[k]):.3g}"] = {"reverse": own.__dict__, "forward": forward.__dict__}
        rows.append([f"{float(sigmas[k]):.3g}", own.percent(), forward.percent()])
    say("Outside of the cell they end in\n\n" + markdown(["sigma", "reverse run", "forward process"], rows))
    return out


def bounds(say) -> dict:
    """Share of runs of three levels that end off eight points in a square, against the bound that holds for any run."""
    points, count = scattered(8), 20_000
    start, rows, out = noise((count, 2), [3], 20.0, dtype=torch.float64)[0], [], {}
    for last in (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4):
        sigmas = torch.tensor([20.0, 3.0, last, 0.0], dtype=torch.float64)
        end = sample(Dataset(points), start, sigmas, particles.Driven(DDPM(), particles.bulk(0)))
        off = rate(particles.Endings.of(points, end).distance > 1e-3)
        limit = particles.off_bound(points, last, last * math.sqrt(1 - (last / 3) ** 2), 1e-3)
        out[f"{last:g}"] = {"off": off.__dict__, "bound": limit}
        rows.append([f"{last:g}", f"{100 * off.value:.2f} ± {100 * off.se:.2f} %", f"{100 * limit:.0f} %"])
    say("Farther than 0.001 from each point\n\n" + markdown(["last level", "measured", "bound"], rows))
    return out


def _sets() -> dict[str, torch.Tensor]:
    return {"grid2, 100 points": get("grid2").data(count=100).x.double(), "digits8": get("digits8").data().x.double()}


def endings(say, counts: dict[str, int]) -> dict:
    """Share of runs that end on a training point, their distance, and whether each point is met as often."""
    out: dict[str, list] = {}
    for (name, points), count in zip(_sets().items(), counts.values(), strict=True):
        gap = float(particles.gaps(points).median())
        x0 = noise(points.shape[1:], range(count), 80.0, dtype=torch.float64)
        rows: list[list[str]] = []
        out[name] = []
        runs = {"exact step": DDPM(), "Euler–Maruyama": particles.EulerMaruyama(), "ODE (Euler)": Euler()}
        for scheme, solver in runs.items():
            for n in STEPS:
                sigmas = [polynomial(n, share * gap, 80.0) for share in LAST]
                found = [
                    ending(points, x0, grid, solver, share * gap) for grid, share in zip(sigmas, LAST, strict=True)
                ]
                out[name].append(
                    {"scheme": scheme, "steps": n, "gap": gap, "by last level": dict(zip(LAST, found, strict=True))}
                )
                shares = [f"{100 * f['on']['value']:.1f} ± {100 * f['on']['se']:.1f}" for f in found]
                rows.append(
                    [scheme, str(n), *shares, f"{found[2]['distinct']} ({found[2]['distinct if uniform']:.0f})"]
                )
        title = f"{name}: % of {count} runs that end on a training point, by last level over the gap {gap:.3g}"
        say(title + "\n\n" + markdown(["scheme", "levels", *map(str, LAST), "distinct points met"], rows))
        heads = ["scheme", "levels", *map(str, LAST)]
        far = [
            [e["scheme"], str(e["steps"]), *(f"{f['q99']:.1e}" for f in e["by last level"].values())] for e in out[name]
        ]
        say("the same: 99 % quantile of the distance over the gap\n\n" + markdown(heads, far))
    return out


def forward(say) -> dict:
    """What the forward process leaves off the points at the last level, and from which level on the bound says it."""
    out, rows = {}, []
    for name, points in _sets().items():
        gap = float(particles.gaps(points).median())
        shares = {share: rate(~particles.chance_off(points, share * gap)) for share in LAST}
        low, high = 1e-9, 1.0  # the bound is 1 above the share that is looked for
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            bounded = particles.off_bound(points, middle * gap, middle * gap, particles.ON * gap) < 1
            low, high = (middle, high) if bounded else (low, middle)
        out[name] = {"on": {f"{share:g}": own.__dict__ for share, own in shares.items()}, "bound from": low}
        rows.append([name, *(f"{100 * own.value:.1f} ± {100 * own.se:.1f}" for own in shares.values()), f"{low:.2g}"])
    say("% on a point by the forward process\n\n" + markdown(["set", *map(str, LAST), "bound below 1 from"], rows))
    return out


def ending(points, x0, sigmas, solver, last: float) -> dict:
    end = sample(Dataset(points), x0, sigmas, particles.Driven(solver, particles.bulk(5)))
    found, n = particles.Endings.of(points, end), len(points)
    met = torch.bincount(found.index, minlength=n)
    return {
        "sigma": last,
        "on": rate(found.on).__dict__,
        "median": float(found.ratio.median()),
        "q99": float(found.ratio.quantile(0.99)),
        "distinct": int((met > 0).sum()),
        "distinct if uniform": n * (1 - (1 - 1 / n) ** len(x0)),
        # Pearson's test needs about five runs for each point.
        "uniform p": float(stats.chisquare(met.numpy()).pvalue) if len(x0) >= 5 * n else None,
    }


def statements(say, folder: Path | None) -> dict:
    """Every check: its figures, and its row on a sheet."""
    found = {name: check() for name, check in STATEMENTS.items()}
    heads = ["[PDE]", "check", "what is measured", "error", "tolerance", "holds"]
    rows = [
        [own.number, name, own.measured, f"{own.error:.2g}", f"{own.tolerance:.2g}", "yes" if own.holds else "NO"]
        for name, own in found.items()
    ]
    say("Statements\n\n" + markdown(heads, rows))
    for sheet, names in SHEETS.items() if folder else ():
        write_sheet([row(name, found[name]) for name in names], folder / f"theory-{sheet}.png")
    return {
        name: {"number": own.number, "says": own.says, "measured": own.measured, "error": float(own.error)}
        | {"tolerance": float(own.tolerance), "holds": own.holds, "values": own.values}
        for name, own in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts to measure")
    parser.add_argument("--points", type=int, default=1000, help="runs on the plane")
    parser.add_argument("--digits", type=int, default=192, help="runs on digits8")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="folder for theory-NAME.png, the sheets of figures")
    parser.add_argument("--overlay", type=Path, metavar="RUN", help="run folder of fanal bench overlay, drawn too")
    parser.add_argument("--out", type=Path, default=Path("theory_samplers.json"))
    options = parser.parse_args()
    console, began = Console(width=200), time.perf_counter()
    settings = {"points": options.points, "digits": options.digits, "threads": 1}
    results: dict[str, dict] = {}
    if options.out.exists() and set(options.only) != set(PARTS):
        before = read_json(options.out)
        results = before["results"]
        settings = settings if "endings" in options.only else before["settings"]

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)
        console.print()

    parts = {
        "statements": lambda: statements(say, options.figures),
        "orders": lambda: orders(say),
        "floors": lambda: floors(say),
        "cells": lambda: cells(say),
        "bounds": lambda: bounds(say),
        "forward": lambda: forward(say),
        "endings": lambda: endings(say, {"plane": options.points, "digits": options.digits}),
    }
    with cpu_threads(1):
        for name in options.only:
            results[name] = parts[name]()
    if options.figures:
        draw(results, options.figures, options.overlay)
    seconds = time.perf_counter() - began
    took = {"only": options.only, "seconds": seconds}
    write_json(options.out, {"settings": settings, "versions": versions(), "last run": took, "results": results})


PARTS = ("statements", "orders", "floors", "cells", "bounds", "forward", "endings")


def draw(results: dict, folder: Path, run: Path | None) -> None:
    """The sheets of the sections after the statements, of all parts that are known."""
    for name, make in (("orders", figures.orders), ("floors", figures.floors), ("cells", figures.cells)):
        if name in results:
            write_sheet(make(results[name]), folder / f"theory-section-{name}.png")
    if "endings" in results and "bounds" in results:
        write_sheet(figures.endings(results["bounds"], results["endings"]), folder / "theory-section-endings.png")
    if run:
        write_sheet(figures.overlay(run), folder / "theory-section-overlay.png")


if __name__ == "__main__":
    main()
