"""The page of `fanal bench overlay`: density, particles and network over each other, under one slider of time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from fanal.bench.overlay_tables import KINDS, PARTS, between, course, entry
from fanal.files import read_tensors
from fanal.report.pde import slider
from fanal.report.plots import COLORS, Figure, Line, Mark, Panel
from fanal.report.study import Page, Section, Table, study

__all__ = ["overlay_page"]

_SHOWN = 400
_WAYS = {"sde": "exact step (SDE)", "ode": "Heun (ODE)"}
_COLORS = {"sde": COLORS[0], "ode": COLORS[1]}
_AXES = {"sliced W2": "sliced W2", "MMD²": "MMD²", "twins": "distance from twins"}


def _moving(tensors: Mapping[str, Tensor]) -> str:
    """The density as colors and both sets of particles as points, at each frame's time."""
    edges = tensors["edges"].numpy()
    centers = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)
    names = {"particles": "particles, exact score", "network": "particles, network"}

    def traces(i: int) -> list[Any]:
        z = tensors["density"][i].numpy().T.astype(np.float32)
        out: list[Any] = [go.Heatmap(x=centers, y=centers, z=z, colorscale="Blues", showscale=False, zmin=0)]
        for (key, name), color in zip(names.items(), (COLORS[1], COLORS[2]), strict=True):
            x, y = tensors[key][i, :_SHOWN].numpy().T.astype(np.float32)
            marker = {"color": color, "size": 5, "opacity": 0.8}
            out.append(go.Scatter(x=x, y=y, mode="markers", name=name, marker=marker))
        return out

    times = tensors["times"].tolist()
    figure = go.Figure(traces(0))
    figure.update_xaxes(range=[-3.5, 3.5], constrain="domain")
    figure.update_yaxes(range=[-3.5, 3.5], constrain="domain", scaleanchor="x")
    frames = [go.Frame(data=traces(i), name=str(i)) for i in range(len(times))]
    return slider(figure, frames, [f"t = {t:.3g}" for t in times], "ways", 640)


def _curves(results: Mapping[str, Any], part: str) -> Figure:
    """Distances against steps or training, with what two perfect sets differ by."""
    panels, axis = [], PARTS[part]
    for kind in (*KINDS, "twins"):
        lines = []
        for way, found in results[part].items():
            kept = {float(name): own[kind] for name, own in found.items() if kind in own}
            if kept:
                values, errors = ([v[key] for v in kept.values()] for key in ("value", "se"))
                lines.append(Line(_WAYS[way], list(kept), values, errors, _COLORS[way], points=True))
        # MMD² is unbiased, so that it may be negative, which has no place on an axis in powers of ten.
        marks, log = _marks(results["floor"], kind), kind != "MMD²"
        panels.append(Panel(axis, _AXES[kind], lines, marks, log_x=True, log_y=log))
    return Figure(f"by-{part}", f"Distances at the end, against {axis}.", panels)


def _marks(floor: Mapping[str, Any], kind: str) -> list[Mark]:
    if kind not in floor:
        return []
    return [Mark(max(floor[kind]["value"], 0.0) + 2 * floor[kind]["se"], "chance", level=True)]


def _lines(record: Mapping[str, Any]) -> list[str]:
    """What was found, in a few sentences."""
    results, config = record["results"], record["config"]
    own, floor = results["truth"], results["floor"]["sliced W2"]["value"]
    ks, density = results["ks"], results["density"]["exact score"]
    parts = ", ".join(f"{name} {entry(figures['sliced W2'])}" for name, figures in own.items())
    verb = "agree" if ks["agree"] else "do NOT agree"
    return [
        f"Sliced W2 from exact draws at t = {config['early']:g}: {parts}; two sets of exact draws: {floor:.4f}.",
        f"{ks['count']:,} particles in {config['steps']} steps {verb} with the density on both axes "
        f"(Kolmogorov–Smirnov, p = {ks['p'][0]:.3g} and {ks['p'][1]:.3g}, level {ks['level']:g} for both).",
        f"The density keeps its mass to {density['mass error']:.0e}, is nowhere below {density['least']:.0e}, and ends "
        f"{density['tv']:.3g} in total variation from the closed form.",
    ]


def overlay_page(folder: Path, record: Mapping[str, Any]) -> Page:
    """Return the page of a run of `fanal bench overlay`.

    Args:
        folder: the run.
        record: its `run.json`.

    Raises:
        FanalError: the run cannot be read.
    """
    tensors, _ = read_tensors(folder / "ways.safetensors")
    results = record["results"]
    courses = {part: Table(f"distances-by-{part}", *course(results, part)) for part in PARTS}
    sections = [
        Section(
            "Density, particles, network",
            "The density of the reverse equation in blue, particles with the exact score in red, particles with the "
            "network in green, all from the same start; the slider goes from noise to data.",
            [_moving(tensors)],
        ),
        Section(
            "How far apart they are at the end",
            "The first line is what two perfect sets of that size differ by: nothing can be told below it.",
            tables=[Table("between", *between(results))],
        ),
        Section(
            "Against step size",
            "Particles with the exact score: their law's distance from exact draws, and each particle's distance from "
            "its twin, the same start followed with four times the shown steps; twins see what sets of draws cannot.",
            [_curves(results, "steps")],
            tables=[courses["steps"]],
        ),
        Section(
            "Against training",
            "Particles with the network; a twin has the same start and the same noise, and the exact score.",
            [_curves(results, "training")],
            tables=[courses["training"]],
        ),
    ]
    return study(f"bench overlay: {record['config']['law']}", _lines(record), sections, record)
