"""A geometry run as its page reads it: curves over sigma, numbers, pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fanal.report.plots import Figure, Film, Line, Mark, Panel
from fanal.report.study import Table
from fanal.summary import estimated

__all__ = ["LABELS", "GeometryRun", "estimate", "short"]

_MOST = 200
"""States of a curve that are drawn; longer runs are thinned, both ends kept."""

_ROUNDING = 1e-6

_DRAWN = 30
"""Trajectories that are drawn."""

LABELS = {"stage.entropy.first": "undecided from sigma", "stage.entropy.last": "undecided to sigma"}
"""Names of numbers on the page, where they are not those of `run.json`."""

_TOLD = 12
"""Levels at which tables tell a curve."""

_FEW, _MUCH = 3, 500_000  # runs in films of many layers, where their pictures have more bytes than this


def estimate(found: Mapping[str, Any]) -> str:
    """Return a figure with its standard error in words."""
    return estimated(found).rounded()


def short(values: Iterable[float]) -> list[float]:
    """Return numbers with six digits, so that pages stay small."""
    return [float(f"{value:.6g}") for value in values]


def _cut(line: Line, top: float) -> Line:
    """A curve without its values that are 0 but for rounding, beside the largest of its panel."""
    keep = [i for i, value in enumerate(line.y) if value > _ROUNDING * top]
    spread = None if line.spread is None else [line.spread[i] for i in keep]
    return dataclasses.replace(line, x=[line.x[i] for i in keep], y=[line.y[i] for i in keep], spread=spread)


class GeometryRun:
    """A run's curves, numbers and tensors.

    Args:
        record: its `run.json`.
        tensors: its `geometry.safetensors`.
    """

    def __init__(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config, self.results, self.tensors = record["config"], record["results"], tensors
        self.sigmas = [float(sigma) for sigma in self.results["sigmas"]]
        floor = min(sigma for sigma in self.sigmas if sigma > 0) / 2
        self.levels = [sigma or floor for sigma in self.sigmas]  # a logarithmic axis has no 0
        self.d = int(self.results["d"])
        self.bands: Mapping[str, Any] = self.results["bands"]
        self.numbers: Mapping[str, Any] = self.results["numbers"] | self.results["shape"]

    def kept(self, count: int) -> list[int]:
        """Places of the states that are drawn, of so many."""
        return torch.linspace(0, count - 1, min(count, _MOST)).round().long().unique().tolist()

    def line(
        self, name: str, label: str, *, at: Sequence[float] | None = None, offset: int = 0, color: str | None = None
    ) -> Line:
        """A band by name over the levels, or over `at`; curves of turns begin one state later."""
        band, levels = self.bands[name], self.levels if at is None else at
        keep = self.kept(len(band["mean"]))
        x = short(levels[offset + i] for i in keep)
        return Line(label, x, short(band["mean"][i] for i in keep), short(band["std"][i] for i in keep), color)

    def along(self, values: Sequence[float], label: str, *, offset: int = 0, dashed: bool = False) -> Line:
        """A curve without a band over the levels."""
        keep = self.kept(len(values))
        x = short(self.levels[offset + i] for i in keep)
        return Line(label, x, short(float(values[i]) for i in keep), dashed=dashed)

    def lines(self, *pairs: tuple[str, str]) -> list[Line]:
        """Bands by name with their labels, those that were measured."""
        return [self.line(name, label) for name, label in pairs if name in self.bands]

    def panel(self, y: str, lines: Sequence[Line], *, log_y: bool = False, marks: Sequence[Mark] = ()) -> Panel:
        """Curves over sigma in powers of ten, which falls as the run goes; no rounding where y is in powers too."""
        lines = [line for line in lines if line.y]
        lines = [_cut(line, max(map(max, (each.y for each in lines)))) for line in lines] if log_y else lines
        return Panel("sigma", y, lines, marks, log_x=True, log_y=log_y, falling=True)

    def drawn(self, name: str) -> Tensor:
        """Tensors of the trajectories that are drawn, the first axis theirs."""
        return self.tensors[name][:_DRAWN]

    def value(self, name: str) -> float | None:
        """A number's mean, where it was measured and is one."""
        found = self.numbers.get(name, {}).get("value")
        return None if found is None or not math.isfinite(found) else float(found)

    def table(self, name: str, numbers: Sequence[str], caption: str, *, what: str = "per trajectory") -> Table:
        """Those of the numbers that were measured."""
        rows = [[LABELS.get(each, each), estimate(self.numbers[each])] for each in numbers if each in self.numbers]
        return Table(name, [what, "mean ± standard error"], rows, caption)

    def told(self, name: str, bands: Mapping[str, str], caption: str) -> Table:
        """Means of bands, by their labels, at some of the levels: those that were measured."""
        known = {label: self.bands[band] for label, band in bands.items() if band in self.bands}
        count = min(len(band["mean"]) for band in known.values())
        rows = [
            [f"{self.sigmas[i]:.4g}"]
            + [estimate({"value": band["mean"][i], "se": band["se"][i]}) for band in known.values()]
            for i in torch.linspace(0, count - 1, min(count, _TOLD)).round().long().tolist()
        ]
        return Table(name, ["sigma", *known], rows, caption)

    def film(self, name: str, caption: str, layers: Mapping[str, str]) -> list[Figure]:
        """Pictures along the drawn trajectories, those that were kept."""
        kept = {label: self.tensors[key] for label, key in layers.items() if key in self.tensors}
        if not kept:
            return []
        if len(kept) > 2 and sum(images.numel() for images in kept.values()) > _MUCH:
            kept = {label: images[:_FEW] for label, images in kept.items()}
        sigmas = self.tensors["strip_sigmas"]
        labels = [f"sigma {float(sigma):.3g}" for sigma in sigmas]
        middle = int((sigmas - 1).abs().argmin())  # at both ends all layers are alike: noise, or the sample
        return [Figure(name, caption, [Film(kept, labels, middle)])]
