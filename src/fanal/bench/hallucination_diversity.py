"""Diversity beside quality: what a method loses against the plain run on the same noise, and how surely.

Every figure comes with its values when each of some groups of samples is left out, so that the ratio of two figures
over the same samples has a standard error of its own (the delete-a-group jackknife).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fanal import metrics
from fanal.metrics.estimates import jackknife
from fanal.metrics.statistics import Statistics

__all__ = ["GROUPS", "LOSS", "Figure", "Real", "against", "figures"]

GROUPS = 20
"""How many groups are left out in turn."""

LOSS = 0.05
"""A figure that is worse than the plain run's by more than this share has lost diversity."""

_NEIGHBOR = 5  # as in `metrics.density_coverage`
_BINS = 20
_KINDS = 30  # a factor with at most so many values is counted value by value


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure of one set of samples.

    Attributes:
        value: over all of them.
        without: (GROUPS,) with each group left out.
        better: sign of what is better.
        most: beyond this, more is no better: more variety than real data have is no gain.
    """

    value: float
    without: Float[Tensor, " g"]
    better: int
    most: float = math.inf


@dataclass(frozen=True, eq=False)
class Real:
    """What diversity is measured against: held-out real samples.

    Attributes:
        features: (M, F).
        factors: what the verifier measures, by name, (M,) each.
        radii: (M,) distance of each to its fifth neighbor.
    """

    features: Float[Tensor, "m f"]
    factors: Mapping[str, Tensor]
    radii: Float[Tensor, " m"]

    @classmethod
    def of(cls, features: Float[Tensor, "m f"], factors: Mapping[str, Tensor]) -> Real:
        """Take in the features and factors of real samples."""
        x = features.double()
        radii = torch.cat([torch.cdist(part, x).kthvalue(_NEIGHBOR + 1, dim=1).values for part in x.split(512)])
        return cls(x, factors, radii)

    def edges(self, name: str) -> Tensor:
        """Return the inner borders of a factor's bins: between its values where they are few, else at quantiles."""
        values = self.factors[name].double()
        kinds = values.unique()
        if len(kinds) <= _KINDS:
            return (kinds[1:] + kinds[:-1]) / 2
        return torch.quantile(values, torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1])

    def named(self, name: str) -> bool:
        """Whether a factor is a name written as a number, such as the index of a mode, whose spread means nothing."""
        return not self.factors[name].is_floating_point() and len(self.factors[name].unique()) > 8


def _groups(count: int) -> Tensor:
    return torch.arange(count) * GROUPS // count


def _left(keep: Tensor) -> Iterator[Tensor]:
    """Yield the rows of the whole, then those without each group."""
    group = _groups(len(keep))
    yield keep
    for g in range(GROUPS):
        yield keep & (group != g)


def _frechet(features: Tensor, real: Real) -> Figure:
    target = Statistics.of(real.features, keep=False)
    rows = _left(torch.ones(len(features), dtype=torch.bool))
    values = [metrics.fid(Statistics.of(features[keep], keep=False), target).value for keep in rows]
    return Figure(values[0], torch.tensor(values[1:], dtype=torch.float64), -1)


def _coverage(features: Tensor, real: Real) -> Figure:
    """Share of the real samples whose ball holds a sample."""
    group, x = _groups(len(features)), features.double()
    held = torch.stack([(torch.cdist(x[group == g], real.features) <= real.radii).any(0) for g in range(GROUPS)])
    count = held.sum(0)
    without = ((count - held.long()) > 0).double().mean(1)
    return Figure(float((count > 0).double().mean()), without, 1)


def _spread(values: Tensor, right: Tensor, real: Tensor) -> Figure:
    found = [float(values[keep].double().std()) / float(real.double().std()) for keep in _left(right)]
    return Figure(found[0], torch.tensor(found[1:], dtype=torch.float64), 1, most=1.0)


def _histogram(values: Tensor, right: Tensor, real: Tensor, edges: Tensor) -> Figure:
    """Total variation between the histograms, ½·Σ|p − q|."""

    def shares(x: Tensor) -> Tensor:
        counts = torch.bincount(torch.bucketize(x.double(), edges), minlength=len(edges) + 1).double()
        return counts / counts.sum()

    target = shares(real)
    found = [float((shares(values[keep]) - target).abs().sum() / 2) for keep in _left(right)]
    return Figure(found[0], torch.tensor(found[1:], dtype=torch.float64), -1)


def figures(
    features: Float[Tensor, "n f"], factors: Mapping[str, Tensor], right: Bool[Tensor, " n"], real: Real
) -> dict[str, Figure]:
    """Return the diversity of samples: Fréchet distance and coverage of all, spread and histograms of right ones.

    Args:
        features: of all samples, in the order of their seeds.
        factors: what the verifier measures, by name, (N,) each.
        right: which samples are right; factors of wrong ones say nothing.
        real: what they are compared with.
    """
    found = {"Fréchet distance": _frechet(features, real), "coverage": _coverage(features, real)}
    for name in factors if int(right.sum()) > 2 * GROUPS else ():
        if not real.named(name):
            found[f"std {name}"] = _spread(factors[name], right, real.factors[name])
        found[f"histogram {name}"] = _histogram(factors[name], right, real.factors[name], real.edges(name))
    return found


def against(own: Figure, plain: Figure) -> dict[str, Any]:
    """Return a figure with its error, its ratio to the plain run's, paired by sample, and the judgment on it.

    "worse": by more than 5 %, two standard errors beyond that; "kept": worse by less than 5 %, two standard errors
    below that; "open": these samples do not decide.
    """
    top, bottom = (torch.tensor([f.value, *f.without.tolist()]).double().clamp(max=f.most) for f in (own, plain))
    ratio = top / bottom
    value, se = float(ratio[0]), jackknife(ratio[1:])
    loss = -own.better * (value - 1)
    judged = "worse" if loss - 2 * se > LOSS else "kept" if loss + 2 * se <= LOSS else "open"
    numbers = {"value": own.value, "se": jackknife(own.without), "ratio": value, "ratio_se": se}
    plain_json = {key: number if math.isfinite(number) else None for key, number in numbers.items()}
    return {**plain_json, "better": own.better, "judged": judged if math.isfinite(value + se) else "open"}
