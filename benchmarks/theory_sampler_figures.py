"""Figures of the tables of docs/theory-samplers.md, from what `theory_samplers.py` keeps; it calls this."""

from __future__ import annotations

import numpy as np

from fanal.files import read_json, read_tensors
from fanal.particles.theory.losses import growing
from fanal.pde.theory.panels import Curve, Panel
from fanal.report.sheets import Row

SHOWN, REACH = 1500, 3.0  # particles in a picture, and how far it reaches


def orders(results: dict) -> list[Row]:
    """Errors of both schemes against steps."""
    kinds = {
        "variance log": "variance, steps even in log t",
        "variance even": "variance, steps even in t",
        "strong": "strong error",
        "tv": "total variation, two humps",
    }
    panels = []
    for key, title in kinds.items():
        curves = []
        for k, name in enumerate(dict.fromkeys(each["scheme"] for each in results["rows"])):
            own = [each for each in results["rows"] if each["scheme"] == name and key in each]
            steps, sizes = (np.array([abs(each[column]) for each in own]) for column in ("steps", key))
            guide = sizes[-1] * steps[-1] / steps
            curves += [Curve("order 1" if k == 0 else "", steps, guide, "wide", k)]
            curves += [Curve(name, steps, sizes, "joined", k)]
        panels.append(Panel(title, "steps", "|error|", curves, "xy"))
    return [
        Row(
            "two schemes · errors of the final variance, Gaussian data",
            "from t = 3 to 0.05, without chance",
            panels[:2],
        ),
        Row("two schemes · path by path, and in law", "4,000 paths; by integration", panels[2:]),
    ]


def floors(results: dict) -> list[Row]:
    """The floor of the total loss at a time, and its mean down to an early one."""
    (times, at), (starts, means) = (
        (np.array([float(t) for t in own]), np.array(list(own.values()))) for own in (results["at"], results["mean"])
    )
    return [
        Row("4.29, 4.30 · what a loss can reach, two humps", "in closed form", list(growing(times, at, starts, means)))
    ]


def cells(results: dict) -> list[Row]:
    """Shares outside of the cell that runs end in, and that draws come from."""
    sigmas = np.array([float(sigma) for sigma in results])
    pairs = (
        np.array([[each[way]["value"], each[way]["se"]] for each in results.values()]).T
        for way in ("reverse", "forward")
    )
    (own, se), (forward, other) = pairs
    off, width = own - forward, np.hypot(se, other)
    count = next(iter(results.values()))["reverse"]["n"]
    bounds = [
        Curve(name, sigmas, sign * 4 * width, "dashed", -1) for name, sign in (("4 standard errors", 1), ("", -1))
    ]
    return [
        Row(
            "4.42, 4.44, 4.45 · trapped in Voronoi cells, 24 points",
            f"{count:,} runs of 200 levels, beside the forward process",
            [
                Panel(
                    "outside of the cell",
                    "sigma",
                    "share",
                    [
                        Curve("forward process", sigmas, forward, "wide", 0),
                        Curve("reverse run", sigmas, own, "points", 0, se),
                    ],
                    "x",
                    falling=True,
                ),
                Panel(
                    "reverse − forward",
                    "sigma",
                    "share",
                    [Curve("", sigmas, off, "joined", 0, se), *bounds],
                    "x",
                    falling=True,
                ),
            ],
        )
    ]


def endings(bounds: dict, results: dict) -> list[Row]:
    """Shares of runs that end on training points, by last level; first the bound on few points."""
    lasts = np.array([float(last) for last in bounds])
    off, se = np.array([[each["off"]["value"], each["off"]["se"]] for each in bounds.values()]).T
    limit = Curve("bound", lasts, np.array([each["bound"] for each in bounds.values()]), "dashed", 1)
    seen = Curve("runs", lasts, np.where(off > 0, off, np.nan), "points", 0, se)
    rows = [
        Row(
            "sec. 5 · share of runs that end off eight points, and a bound that holds for any run",
            "20,000 runs of three levels; farther than 0.001 from each point",
            [
                Panel("in powers of ten", "last level", "share off", [limit, seen], "xy", falling=True),
                Panel(
                    "the same",
                    "last level",
                    "share off",
                    [limit, Curve("runs", lasts, off, "joined", 0)],
                    "x",
                    falling=True,
                ),
            ],
        )
    ]
    for name, every in results.items():
        panels = []
        for scheme in dict.fromkeys(each["scheme"] for each in every):
            curves = []
            for each in every:
                if each["scheme"] == scheme and each["steps"] != 50:
                    found = {float(last): own["on"] for last, own in each["by last level"].items()}
                    on, spread = np.array([[own["value"], own["se"]] for own in found.values()]).T
                    curves.append(Curve(f"{each['steps']} levels", np.array(list(found)), on, "joined", None, spread))
            panels.append(Panel(scheme, "last level over the gap", "share on a point", curves, "x", falling=True))
        count = next(iter(every[0]["by last level"].values()))["on"]["n"]
        rows.append(
            Row(f"sec. 5 · runs that end on a training point · {name}", f"{count:,} runs for each mark", panels)
        )
    return rows


def overlay(folder) -> list[Row]:
    """One solution three ways: densities under particles at three times, and distances against steps and training."""
    results, (tensors, _) = read_json(folder / "run.json")["results"], read_tensors(folder / "ways.safetensors")
    edges, times = tensors["edges"].numpy(), tensors["times"].numpy()
    near, rows = slice(*np.searchsorted(edges, [-REACH, REACH])), []
    for way, said in (("particles", "with the exact"), ("network", "with a trained network's")):
        panels = []
        for k in (0, 2 * len(times) // 3, len(times) - 1):
            x, y = tensors[way][k][:SHOWN].T.numpy()
            inside = (np.abs(x) < REACH) & (np.abs(y) < REACH)
            over = Curve("", x[inside], y[inside], "dots", 1)
            image = (edges[near], edges[near], tensors["density"][k].numpy().T[near, near][:-1, :-1])
            panels.append(Panel(f"t = {times[k]:.2g}", "x", "y", [over], square=True, image=image))
        heading = f"one solution three ways · density (blue), particles {said} score (red)"
        rows.append(Row(heading, f"{SHOWN:,} particles", panels))
    panels = []
    for kind, axis in (("steps", "steps"), ("training", "iterations of training")):
        curves = []
        for k, (way, own) in enumerate(results[kind].items()):
            x = np.array([float(n) for n in own])
            for name, look in (("sliced W2", "joined"), ("twins", "dashed")):
                if all(name in each for each in own.values()):
                    y, se = np.array([[each[name]["value"], each[name]["se"]] for each in own.values()]).T
                    said = "to exact draws" if name == "sliced W2" else "to twins"
                    curves.append(Curve(f"{way}, {said}", x, y, look, k, se))
        floor = {"two sets of exact draws": results["floor"]["sliced W2"]["value"]}
        panels.append(Panel(f"against {kind}", axis, "distance", curves, "xy", floor))
    rows.append(
        Row("one solution three ways · distances", "sliced W2 to exact draws; root mean square to twins", panels)
    )
    return rows
