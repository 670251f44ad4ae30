"""What a run's folder tells, for the tables of the findings page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from fanal.files import read_json, read_tensors
from fanal.geometry import frenet, rebuild
from fanal.metrics.estimates import Estimate, mean
from fanal.summary import estimated

CLEAR = 0.1  # sigma down to which small networks have settled predictions


class Told:
    """A run's results."""

    def __init__(self, name: str, folder: Path) -> None:
        record = read_json(folder / "run.json")
        self.name, self.config, self.results = name, record["config"], record["results"]
        self.model, self.count = str(self.config["model"]), int(self.config["count"])
        self.sigmas = [float(sigma) for sigma in self.results["sigmas"]]
        self.d = int(self.results["d"])
        self.tensors = read_tensors(folder / "geometry.safetensors")[0]

    def number(self, name: str) -> Estimate | None:
        """A figure per trajectory, or of the drawn ones."""
        found = (self.results["numbers"] | self.results["shape"]).get(name)
        return None if found is None or found["value"] is None else estimated(found)

    def band(self, name: str, part: str = "mean") -> Tensor:
        """A curve over the levels."""
        return torch.tensor(self.results["bands"][name][part], dtype=torch.float64)

    def squared(self, name: str) -> Tensor:
        """Root mean square of a curve over trajectories."""
        return (self.band(name) ** 2 + self.band(name, "std") ** 2 * (1 - 1 / self.count)).sqrt()

    def near(self, sigma: float, length: int | None = None) -> int:
        """Where in the grid, or in the first `length` levels of it, the level nearest in log sigma is."""
        levels = range(len(self.sigmas) if length is None else length)
        return min(levels, key=lambda k: abs(math.log(max(self.sigmas[k], 1e-9) / sigma)))

    def at(self, name: str, sigma: float) -> str:
        """A curve's mean ± standard error at the level that is nearest in log sigma."""
        band = self.results["bands"].get(name)
        if band is None:
            return "–"
        i = self.near(sigma, len(band["mean"]))
        return f"{band['mean'][i]:.3f} ± {band['se'][i]:.3f}"

    def rises(self, name: str) -> str:
        """Number of steps at which a curve's mean rises, above rounding, where they end, and by how much in all."""
        told = self.results["bands"][name]["mean"]
        steps = [(b - a, k + 1) for k, (a, b) in enumerate(itertools.pairwise(told)) if b - a > 1e-4 * told[0]]
        if not steps:
            return "never rises"
        risen, ends = sum(up for up, _ in steps) / told[0], sorted({steps[0][1], steps[-1][1]})
        levels = " to ".join(f"{self.sigmas[k]:.2g}" for k in ends)
        return f"rises at {len(steps)} of {len(told) - 1} steps, sigma {levels}, by {risen:.1%} of the first"

    def least(self, name: str) -> str:
        """A curve's smallest mean, and its level."""
        value, k = self.band(name).min(0)
        return f"{float(value):.3f} at {self.sigmas[int(k)]:.2g}"

    def bend(self, sigma: float) -> str:
        """Mean curvature of the drawn trajectories times sigma √d, ± standard error, near a level."""
        return mean(self.tensors["curvature"][:, self.near(sigma, len(self.sigmas) - 1)]).plain(3)

    def largest(self, name: str) -> str:
        """A curve's largest mean over its mean first distance: max E[deviation]/E[chord], as [GEO] has it."""
        if f"{name}deviation" not in self.results["bands"]:
            return "–"
        return f"{float(self.band(f'{name}deviation').max() / self.band(f'{name}distance')[0]):.4f}"

    def peaks(self, name: str) -> list[float]:
        """Levels at which a curve's mean has a maximum."""
        return peaks(self.band(name), self.sigmas)

    def rebuilt(self) -> tuple[Estimate, Estimate, Estimate]:
        """What curvature and torsion leave of the drawn curves, over their size across the chord: as they are, with the
        torsion's sign turned, and without torsion; after the best shift and proper rotation."""
        found: list[list[float]] = []
        for own, shape in self._curves():
            size = float((own[:, 1:] - own[:, 1:].mean(0)).norm())
            twists = (shape[2], -shape[2], torch.zeros_like(shape[2]))
            found.append([_left(rebuild(shape[0], shape[1], twist), own) / size for twist in twists])
        kinds = torch.tensor(found, dtype=torch.float64)
        return mean(kinds[:, 0]), mean(kinds[:, 1]), mean(kinds[:, 2])

    def _curves(self) -> list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
        """The drawn curves, and length, curvature and torsion of each."""
        curves = self.tensors["aligned"].double()
        shape = frenet(curves, int(self.config["window"]))
        return list(zip(curves, zip(shape.length, shape.curvature, shape.torsion, strict=True), strict=True))


def _left(again: Tensor, own: Tensor) -> float:
    """Frobenius norm of what the best shift and rotation leave."""
    _, left = Rotation.align_vectors((own - own.mean(0)).numpy(), (again - again.mean(0)).numpy())[:2]
    return float(left)


def peaks(values: Tensor, sigmas: Sequence[float]) -> list[float]:
    """Levels at which a curve has a maximum inside."""
    inner = range(1, len(values) - 1)
    return [sigmas[k] for k in inner if float(values[k]) > float(values[k - 1]) and values[k] >= values[k + 1]]


def cell(found: Estimate | None, digits: int) -> str:
    """A figure ± its error; no error where it is no mean over trajectories."""
    if found is None:
        return "–"
    return f"{found.value:.{digits}f}" if found.se == 0 else found.plain(digits)


def percent(found: Estimate | None, digits: int = 1) -> str:
    """A share in percent."""
    if found is None:
        return "–"
    return Estimate(100 * found.value, 100 * found.se, found.n).plain(digits) + " %"


def spread(found: Estimate | None) -> str:
    """A share in the form of [REG] table 7: percent, ± one standard deviation over trajectories."""
    if found is None:
        return "–"
    return f"{100 * found.value:.5f} ± {100 * found.se * math.sqrt(found.n):.5f} %"


Column = tuple[str, Callable[[Told], str]]


def numbers(names: Mapping[str, tuple[str, int]]) -> list[Column]:
    """Columns by heading: a figure's name, and its digits."""
    return [(head, lambda t, n=name, k=digits: cell(t.number(n), k)) for head, (name, digits) in names.items()]


def rows(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *body):
        print(f"| {' | '.join(row)} |")


def table(title: str, told: Sequence[Told], columns: Sequence[Column]) -> None:
    """Print a table of runs, less those that have nothing to tell."""
    body = [[t.name, *(make(t) for _, make in columns)] for t in told]
    rows(title, ["run", *(name for name, _ in columns)], [row for row in body if any(each != "–" for each in row[1:])])
