"""The distances by name, and what a reader of their figures must know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fanal.errors import FanalError
from fanal.metrics.distances import Distance, fid, sliced_wasserstein
from fanal.metrics.kernels import kid, mmd
from fanal.metrics.manifolds import density_coverage, precision_recall
from fanal.metrics.statistics import Statistics

__all__ = ["METRICS", "Metric", "cautions"]

_UNLIKE = 2  # sets whose sizes differ by this factor or more are worth a warning


@dataclass(frozen=True)
class Metric:
    """A way to compare two sets.

    Attributes:
        measure: maps the statistics of samples and real ones, and a seed, to figures by name.
        least: number of samples that each set must have.
        features: whether it needs the features themselves and not only their mean and covariance.
    """

    measure: Callable[[Statistics, Statistics, int], dict[str, Distance]]
    least: int
    features: bool = True


def _raw(side: Statistics) -> Tensor:
    if side.features is None:
        raise FanalError("this figure needs features, and the statistics hold only their mean and covariance")
    return side.features


def _pair(names: tuple[str, str], pair: tuple[Distance, Distance]) -> dict[str, Distance]:
    return dict(zip(names, pair, strict=True))


METRICS: Mapping[str, Metric] = {
    "fid": Metric(lambda x, real, seed: {"fid": fid(x, real)}, 2, features=False),
    "kid": Metric(lambda x, real, seed: {"kid": kid(_raw(x), _raw(real))}, 3),
    "pr": Metric(
        lambda x, real, seed: _pair(("precision", "recall"), precision_recall(_raw(x), _raw(real), seed=seed)), 8
    ),
    "dc": Metric(
        lambda x, real, seed: _pair(("density", "coverage"), density_coverage(_raw(x), _raw(real), seed=seed)), 12
    ),
    "sw": Metric(lambda x, real, seed: {"sliced_wasserstein": sliced_wasserstein(_raw(x), _raw(real), seed=seed)}, 2),
    "mmd": Metric(lambda x, real, seed: {"mmd": mmd(_raw(x), _raw(real), seed=seed)}, 3),
}
"""Distances by the names that `--metric` takes."""


def _copies(x: Tensor, real: Tensor) -> int:
    """How many samples have exactly the features of a real one."""
    known = {row.tobytes() for row in real.numpy()}
    return sum(row.tobytes() in known for row in x.numpy())


def cautions(x: Statistics, real: Statistics, figures: Mapping[str, Distance]) -> list[str]:
    """Return what a reader of the figures must know: too few samples, unlike sets, copies, unknown extractors."""
    found = [f"{name}: {figure.warning}" for name, figure in figures.items() if figure.warning]
    if not real.extractor:
        found.append(f"the file of statistics does not say what made it: that it was {x.label()} is taken on trust")
    if x.n and real.n and max(x.n, real.n) >= _UNLIKE * min(x.n, real.n):
        found.append(
            f"the sets differ in size ({x.n} and {real.n}): FID, precision, recall and coverage depend on both sizes"
        )
    same = _copies(x.features, real.features) if x.features is not None and real.features is not None else 0
    if same:
        found.append(f"{same} of {x.n} samples have exactly the features of a real one: do the sets overlap?")
    return found
