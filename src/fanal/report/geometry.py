"""The page of `fanal geometry`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fanal.files import read_json, read_tensors
from fanal.metrics import Estimate
from fanal.report.study import Line, Section, band_figure, space_figure, write_study

__all__ = ["write_geometry"]

_MOST_DRAWN = 30


def _estimate(found: Mapping[str, Any], digits: int = 4) -> str:
    value, se = (math.nan if found[key] is None else float(found[key]) for key in ("value", "se"))
    return Estimate(value, se, int(found["n"])).plain(digits)


class _Page:
    """A run's figures, and the levels that they belong to."""

    def __init__(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.results, self.tensors = record["results"], tensors
        self.sigmas = [float(sigma) for sigma in self.results["sigmas"]]
        floor = min(sigma for sigma in self.sigmas if sigma > 0) / 2
        self.levels = [sigma or floor for sigma in self.sigmas]  # a logarithmic axis has no 0

    def line(self, name: str, label: str, offset: int = 0) -> Line:
        """A band by name; curves of turns begin one state later."""
        band = self.results["bands"][name]
        at = self.levels[offset : offset + len(band["mean"])]
        return Line(label, at, band["mean"], band["std"])

    def bands(self, key: str, y: str, *lines: Line, log_y: bool = False) -> str:
        """A figure over sigma, which falls as the run goes."""
        return band_figure(lines, key, "sigma", y, log_x=True, log_y=log_y, falling=True)

    def rows(self, *names: str) -> list[list[str]]:
        """Table rows of per-trajectory numbers."""
        numbers = self.results["numbers"] | self.results["shape"]
        return [[name, _estimate(numbers[name])] for name in names]


def _straightness(page: _Page) -> Section:
    return Section(
        "How far from a straight line",
        "Distance of each state from the line through both ends of its trajectory, and from its last state; each line "
        "is the mean, its band one standard deviation over trajectories.",
        [
            page.bands(
                "deviation",
                "distance",
                page.line("deviation", "from the line"),
                page.line("distance", "from the end"),
                log_y=True,
            ),
        ],
        ["per trajectory", "mean ± standard error"],
        page.rows("length / (sigma_max sqrt d)", "length / chord", "largest deviation / chord"),
    )


def _dimensions(page: _Page) -> Section:
    numbers = page.results["numbers"]
    rows = [["1 (the chord)", "–", _estimate(numbers["mean error in 1-D"])]]
    k = 1
    while f"explained by {k}" in numbers:
        error = _estimate(numbers[f"mean error in {k + 1}-D"])
        rows.append([str(k + 1), _estimate(numbers[f"explained by {k}"]), error])
        k += 1
    direct = [[f"directly, top {i}", _estimate(numbers[f"direct, top {i}"], 6), "–"] for i in (1, 2, 3)]
    return Section(
        "In how many dimensions",
        "Each trajectory, rebuilt from its chord and the first principal components of what is off the chord: the "
        "share of variance that they explain, and the mean distance that is left; below, components of the "
        "trajectory itself.",
        [],
        ["dimensions", "variance explained", "mean distance left"],
        rows + direct,
    )


def _shape(page: _Page) -> Section:
    aligned = page.tensors["aligned"][:_MOST_DRAWN]
    scale = page.sigmas[0] * math.sqrt(page.results["d"])
    curves = [
        [[sigma / page.sigmas[0] * scale, float(p[1]), float(p[2])] for sigma, p in zip(page.sigmas, c, strict=True)]
        for c in aligned
    ]
    return Section(
        "The boomerang",
        "Trajectories across their chord, turned onto each other: the first axis is the noise level times √d, and the "
        "other two, which are far smaller, are the principal components off the chord; drag to turn.",
        [space_figure(curves, "boomerang", ("sigma √d", "first component", "second component"))],
        ["drawn trajectories", "mean ± standard error"],
        page.rows("procrustes residual / size", "procrustes residual across / size across"),
    )


def _bending(page: _Page) -> Section:
    inner = [i for i, sigma in enumerate(page.sigmas) if sigma > 0]
    at, figures = [page.sigmas[i] for i in inner], []
    for name, log in (("curvature", True), ("torsion", False)):
        values = page.tensors[name][:_MOST_DRAWN, inner].nan_to_num()
        lines = [Line("", at, row.tolist()) for row in values]
        figures.append(page.bands(name, f"{name} · sigma √d", *lines, log_y=log))
    return Section(
        "Curvature and torsion",
        "How sharply each drawn trajectory bends and twists, times sigma √d: in radians while the noise level falls by "
        "a factor of e; alike curves mean that the trajectories are one curve up to a motion.",
        figures,
        ["drawn trajectories", "mean ± standard error"],
        page.rows("curved from sigma", "curved to sigma", "fit error / length"),
    )


def _turning(page: _Page) -> Section:
    return Section(
        "How it turns",
        "Cosine between each step's direction and the way to the end, and the angle between successive steps: near 1 "
        "and near 0 where the run goes straight.",
        [
            page.bands("angle", "cosine", page.line("angle", "direction and way to the end")),
            page.bands(
                "rotation",
                "radians",
                page.line("rotation", "states", 1),
                page.line("denoised rotation", "predictions", 1),
            ),
        ],
    )


def _sizes(page: _Page) -> Section:
    levels, d = page.levels, page.results["d"]
    shell = Line("sigma √d", levels, [sigma * math.sqrt(d) for sigma in levels])
    return Section(
        "Sizes",
        "Norm of the states beside that of pure noise, norm of the predictions, and norm of dx/dsigma over √d: 1 where "
        "the model sees plain noise.",
        [
            page.bands(
                "sizes",
                "norm",
                page.line("magnitude", "states"),
                shell,
                page.line("denoised magnitude", "predictions"),
                log_y=True,
            ),
            page.bands("slope", "‖dx/dsigma‖ / √d", page.line("slope", "slope")),
        ],
    )


def _predictions(page: _Page) -> Section:
    lines = [page.line("denoised distance", "prediction to the end"), page.line("distance", "state to the end")]
    if "denoised deviation" in page.results["bands"]:
        lines.append(page.line("denoised deviation", "prediction from its line"))
    return Section(
        "The denoising trajectory",
        "The predictions arrive long before the states do.",
        [page.bands("predictions", "distance", *lines, log_y=True)],
    )


def _beside(page: _Page) -> Section:
    return Section(
        "Beside the exact denoiser of the data",
        "Distance of the model's prediction from the exact one at the same state, per √d: small at both ends, and in "
        "between where the model generalizes; and the entropy of the posterior over the data, which falls from log N "
        "(all points alike) to 0 (one point).",
        [
            page.bands("score", "distance / √d", page.line("score deviation", "model to exact"), log_y=True),
            page.bands("entropy", "nats", page.line("entropy", "entropy")),
        ],
        ["per trajectory", "mean ± standard error"],
        page.rows("stage.entropy.first", "stage.entropy.last"),
    )


def write_geometry(folder: Path) -> Path:
    """Write `report.html` from a geometry run's `run.json` and `geometry.safetensors`.

    Raises:
        FanalError: the folder has no such files, or cannot be written.
    """
    record = read_json(folder / "run.json")
    tensors, _ = read_tensors(folder / "geometry.safetensors")
    page, config = _Page(record, tensors), record["config"]
    numbers = record["results"]["numbers"]
    sections: Sequence[Section] = [
        make(page) for make in (_straightness, _dimensions, _shape, _bending, _turning, _sizes, _predictions)
    ]
    if "entropy" in record["results"]["bands"]:
        sections = [*sections, _beside(page)]
    two = _estimate(numbers["explained by 2"])
    lines = [
        f"{config['count']} trajectories of {config['model']} with {config['solver']}, {config['steps']} steps.",
        f"They stray at most {_estimate(numbers['largest deviation / chord'])} of their chord from it, and two "
        f"components explain {two} of the variance that is off the chord.",
    ]
    target = folder / "report.html"
    write_study(target, f"geometry: {config['model']}", lines, sections, record)
    return target
