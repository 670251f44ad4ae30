"""The page of `fanal guide`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from fanal import pictures
from fanal.files import read_tensors
from fanal.report.plots import BLUE, INK, RED, Figure, Line, Panel, histogram
from fanal.report.study import Page, Section, Table, study
from fanal.summary import estimated
from fanal.supports.targets import TARGETS

__all__ = ["guide_page", "headline", "table"]

_GREEN, _FAINT, _GRID = "#2a9d5c", "rgba(47,111,219,0.35)", "rgba(128,136,148,0.25)"

_MOST_TILES, _LEAST = 24, 1e-9
_LEADS = {
    **dict.fromkeys(("classifier-free", "interval", "classifier", "reward"), "away from the condition"),
    "negative": "towards the condition",
    "autoguidance": "past the weak model, which it should lead away from",
}
_NAMES = {"part": "support of p(x|c)", "whole": "support of p"}


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a run's distances."""
    head = [
        "distance to",
        "median",
        "90 %",
        "99 %",
        "worst",
        f"farther than {results['near']:.3g}",
        "seed of the worst",
    ]
    rows = []
    for key, name in _NAMES.items():
        own = results[key]
        values = [f"{own[q]:.3g}" for q in ("q50", "q90", "q99", "worst")]
        rows.append([name, *values, estimated(own["off"]).percent(), str(own["seed"])])
    return head, rows


def headline(record: Mapping[str, Any]) -> list[str]:
    """Return what a run found, in a few plain sentences."""
    config, results = record["config"], record["results"]
    score = f"{config['model']}" if config["model"] else "exact scores"
    score = f"scores that are wrong by {100 * config['error']:g} %" if config["error"] else score
    calls = record["network"]["per sample"]
    on = estimated(results["chosen"]).percent()
    lines = [
        f"{config['support']}: {results['about']}.",
        f"{config['count']} samples by {config['form']} guidance of scale {config['scale']:g}, {config['process']}, "
        f"{config['steps']} steps, {score}; {calls:.0f} predictions per sample.",
        f"{on} end within {results['near']:.3g} of the support of p(x|c), {config['near']:g} of its size; the "
        f"farthest ends {results['part']['worst']:.3g} from it and {results['whole']['worst']:.3g} from the support of "
        "p.",
    ]
    if config["model"] and config["support"] not in TARGETS:
        lines.append(
            f"A data set's support is its training points alone: a model that makes new samples ends between them, as "
            f"{config['model']} should; only one that replays its data ends on them."
        )
    if config["scale"] < 0 and config["form"] in _LEADS:
        lines.insert(2, f"the scale is negative: it leads {_LEADS[config['form']]}.")
    return lines


def _plane(tensors: dict[str, Tensor], near: float) -> str:
    """The supports, the paths and where samples end."""
    figure = go.Figure()
    x, off = tensors["x"], tensors["part"] > near
    reach = 1.3 * float(torch.cat([value for name, value in tensors.items() if name.startswith("outline")]).abs().max())
    reach = max(reach, min(1.1 * float(x.abs().max()), 40 * reach))
    for path in tensors["paths"].tolist():
        u, v = zip(*path, strict=True)
        line = {"color": _FAINT, "width": 1}
        figure.add_trace(go.Scatter(x=u, y=v, mode="lines", line=line, hoverinfo="skip", showlegend=False))
    seen = set()
    for name in sorted(name for name in tensors if name.startswith("outline")):
        own, curve = name.endswith(".1"), tensors[name].tolist()
        look = {"color": _GREEN if own else INK, "width": 5 if own else 2}
        spot = {"color": look["color"], "size": 3 if len(curve) > 1 else 10, "line": {"color": INK, "width": 1}}
        u, v = zip(*curve, strict=True)
        label = _NAMES["part" if own else "whole"]
        figure.add_trace(
            go.Scatter(x=u, y=v, mode="lines+markers", line=look, marker=spot, name=label, legendgroup=label,
                       showlegend=label not in seen)
        )  # fmt: skip
        seen.add(label)
    for chosen, label, color in ((~off, "ends on it", BLUE), (off, "ends elsewhere", RED)):
        points = x[chosen]
        marker = {"color": color, "size": 5}
        figure.add_trace(
            go.Scatter(x=points[:, 0].tolist(), y=points[:, 1].tolist(), mode="markers", marker=marker, name=label)
        )
    axis: dict[str, Any] = {"range": [-reach, reach], "gridcolor": _GRID, "zerolinecolor": _GRID}
    figure.update_xaxes(constrain="domain", **axis)
    figure.update_yaxes(scaleanchor="x", constrain="domain", constraintoward="top", **axis)
    figure.update_layout(
        height=620,
        margin={"l": 40, "r": 15, "t": 70, "b": 40},
        legend={"orientation": "h", "y": 1.01, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return figure.to_html(
        full_html=False, include_plotlyjs=False, div_id="plane", config={"displaylogo": False, "responsive": True}
    )


def _tiles(tensors: dict[str, Tensor]) -> str:
    """The farthest samples, as pictures."""
    order = tensors["part"].argsort(descending=True)[:_MOST_TILES]
    uri = pictures.data_uri(pictures.grid(tensors["x"][order].float()))
    return f'<img src="{uri}" alt="the samples that end farthest from the support" style="image-rendering:pixelated">'


def _where(tensors: dict[str, Tensor], near: float) -> list[Section]:
    if any(name.startswith("outline") for name in tensors):
        reading = (
            "Paths start far outside; zoom with the mouse. The support of p(x|c) is green, the rest of that of p gray; "
            "red points end off the green."
        )
        return [Section("Where samples end", reading, [_plane(tensors, near)])]
    if tensors["x"].ndim == 4:
        reading = "The samples that end farthest from the support, farthest first."
        return [Section("The farthest samples", reading, [_tiles(tensors)])]
    return []


def _levels(results: Mapping[str, Any]) -> list[float]:
    sigmas = [float(sigma) for sigma in results["sigmas"]]
    floor = min(sigma for sigma in sigmas if sigma > 0) / 2
    return [sigma or floor for sigma in sigmas]  # a logarithmic axis has no 0


def guide_page(folder: Path, record: Mapping[str, Any]) -> Page:
    """Return the page of a guided run, from its record and its `guide.safetensors`.

    Raises:
        FanalError: the folder has no such file.
    """
    tensors, _ = read_tensors(folder / "guide.safetensors")
    results, levels = record["results"], _levels(record["results"])
    lines = [
        Line(f"{what}, {name}", levels[: len(own)], [max(v, _LEAST) for v in own], dashed=name == "worst")
        for what in ("states", "predictions")
        for name in ("median", "worst")
        for own in [results["course"][what][name]]  # there is one state more than predictions
    ]
    course = Panel("sigma", "distance", lines, log_x=True, log_y=True, falling=True)
    groups = {name: tensors[key].clamp_min(_LEAST).log10().tolist() for key, name in _NAMES.items()}
    head, rows = table(results)
    sections = [
        Section(
            "Distances",
            "Quantiles over the samples, as plain norms: 0 is on the support or inside. What is farther than "
            f"{results['near']:.3g}, {record['config']['near']:g} of the support's size (--near), counts as off it.",
            tables=[Table("distances", head, rows)],
        ),
        *_where(tensors, results["near"]),
        Section(
            "On the way",
            "How far states and guided predictions are from the support of p(x|c), as the noise level falls.",
            [Figure("course", "Distance from the support of p(x|c) along the run, median and worst case.", [course])],
        ),
        Section(
            "How far samples end",
            "Logarithm of the distance to each support; what is on it stands at the left end. Where both are one "
            "distance, their colors mix.",
            [Figure("ends", "Distances of the samples' ends.", [histogram("log10 of the distance", groups)])],
        ),
    ]
    return study(f"guide: {record['config']['support']}", headline(record), sections, record)
