"""Named laws with a condition: p and p(·|c), both with exact denoisers, and the distances to both supports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError, unknown_name
from fanal.supports.shapes import Affine, Ball, Box, FiniteSet, Polyline, Sphere, Union

__all__ = ["TARGETS", "Law", "Target", "chain", "target"]

Law = Ball | Box | Sphere | Polyline | FiniteSet | Affine | Union
"""A law on a support: a denoiser that also measures distances."""

_SIDES = 36


@dataclass(frozen=True, eq=False)
class Target:
    """What a guided run should end on.

    Attributes:
        name: of the target.
        whole: p; its support is S.
        part: p(·|c); its support is S_c, a part of S.
        about: one line that says what both are.
        size: root mean square distance of p from its mean, the unit of tolerances.
        way: (*shape), unit vector from the mean of p to that of p(·|c).
        level: mean of p(·|c) along `way`.
        outline: curves and points to draw S, each with whether it belongs to S_c; empty where S is no plane figure.
    """

    name: str
    whole: Law
    part: Law
    about: str
    size: float
    way: Tensor
    level: float
    outline: tuple[tuple[Tensor, bool], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.whole.shape)

    def distances(self, x: Float[Tensor, "b *d"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return the distances from S_c and from S, 0 inside, float64."""
        return self.part.distance(x).clamp_min(0.0), self.whole.distance(x).clamp_min(0.0)


def _direction(name: str, center: Tensor, goal: Tensor) -> tuple[Tensor, float]:
    """The unit vector from one mean to the other, and how far along it the second lies."""
    way = goal - center
    length = float(way.norm())
    if length == 0:
        raise FanalError(f"{name}: the condition has the mean of the whole, so that it has no direction")
    unit = way / length
    return unit, float((goal * unit).sum())


def _made(name: str, laws: tuple[Law, Law], drawn: tuple[Tensor, Tensor], about: str, outline: list) -> Target:
    """Measure size and direction on points of both laws."""
    whole, part = (points.double() for points in drawn)
    center = whole.mean(0)
    size = float((whole - center).flatten(1).square().sum(1).mean().sqrt())
    return Target(name, *laws, about, size, *_direction(name, center, part.mean(0)), tuple(outline))


def chain(name: str, corners: Float[Tensor, "k1 d"], first: int, last: int, about: str) -> Target:
    """Return the uniform law on a chain of segments, given that a sample lies on some successive ones of them.

    Args:
        name: of the target.
        corners: (K + 1, d), as in `Polyline`.
        first: the first segment of the condition.
        last: the segment after its last.
        about: one line that says what both are.

    Raises:
        FanalError: the condition is empty or everything.
    """
    if not 0 <= first < last <= len(corners) - 1 or last - first == len(corners) - 1:
        raise FanalError(f"a condition is some of {len(corners) - 1} segments, not none or all: {first} to {last}")
    whole, part = Polyline(corners), Polyline(corners[first : last + 1])
    own = corners[first : last + 1].detach()
    outline = [(corners.detach(), False), (own, True)]
    middles = [(law.corners[:-1] + law.corners[1:]).detach() / 2 for law in (whole, part)]
    weights = [law.lengths.detach() / law.lengths.detach().sum() for law in (whole, part)]
    center, goal = ((m * w[:, None]).sum(0) for m, w in zip(middles, weights, strict=True))
    # A segment of length l has the variance l²/12 about its middle.
    spread = (middles[0] - center).square().sum(1) + whole.lengths.detach() ** 2 / 12
    size = float((spread * weights[0]).sum().sqrt())
    return Target(name, whole, part, about, size, *_direction(name, center, goal), tuple(outline))


def _circle() -> Target:
    angle = torch.linspace(-math.pi / 3, 5 * math.pi / 3, _SIDES + 1, dtype=torch.float64)
    corners = torch.stack([angle.cos(), angle.sin()], 1)
    corners[-1] = corners[0]
    about = f"a circle of radius 1, drawn as a regular polygon with {_SIDES} sides; the third with cos θ > 0.5"
    return chain("circle", corners, 0, _SIDES // 3, about)


def _square() -> Target:
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
    whole, part = Box(low, high), Box(torch.tensor([0.0, -1.0]), high)
    edge = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])
    own = torch.tensor([[0.0, -1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 1.0], [0.0, -1.0]])
    way, size = torch.tensor([1.0, 0.0]).double(), math.sqrt(2 / 3)
    return Target(
        "square", whole, part, "a filled square; its right half", size, way, 0.5, ((edge, False), (own, True))
    )


def _segments() -> Target:
    up, down = (torch.tensor([[-1.0, y], [1.0, y]], dtype=torch.float64) for y in (0.5, -0.5))
    parts = Polyline(up), Polyline(down)
    way = torch.tensor([0.0, 1.0]).double()
    outline = ((down, False), (up, True))
    size = math.sqrt(1 / 3 + 1 / 4)
    return Target("segments", Union(parts), parts[0], "two parallel segments; the upper one", size, way, 0.5, outline)


def _spheres() -> Target:
    d = 16
    way = torch.eye(d, dtype=torch.float64)[0]
    parts = Sphere(1.5 * way, 1.0), Sphere(-1.5 * way, 1.0)
    about = f"two unit spheres in {d} dimensions, 3 apart; one of them"
    return Target("spheres", Union(parts), parts[0], about, math.sqrt(1 + 1.5**2), way, 1.5)


def _points(name: str, points: Tensor, own: slice, about: str) -> Target:
    """Some points, equally likely; a few successive ones of them are the condition."""
    rest = torch.cat([points[: own.start], points[own.stop :]])
    laws = FiniteSet(points), FiniteSet(points[own])
    outline = [(point[None], inside) for some, inside in ((rest, False), (points[own], True)) for point in some]
    return _made(name, laws, (points, points[own]), about, outline)


def _outlier() -> Target:
    points = torch.tensor([[-3.0, 0.0], [1.0, 0.0], [2.2, 0.0]], dtype=torch.float64)
    about = "three points in a row, of which the last lies behind the second; the second"
    return _points("outlier", points, slice(1, 2), about)


def _fork() -> Target:
    points = torch.tensor([[0.0, 3.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    about = "a point above and two below, left and right; the two"
    return _points("fork", points, slice(1, 3), about)


TARGETS: Mapping[str, Callable[[], Target]] = {
    "circle": _circle,
    "square": _square,
    "segments": _segments,
    "spheres": _spheres,
    "outlier": _outlier,
    "fork": _fork,
}
"""Name → maker."""


def _of_data(spec: str, label: int) -> Target:
    """A class of a data set: every training point is the support."""
    from fanal.datasets import get

    dataset = get(spec)
    data = dataset.data("train")
    if data.labels is None or not dataset.classes:
        raise FanalError(f"{spec} has no classes: a condition is a class, so choose a data set with classes")
    own = data.labels == label
    if not 0 <= label < len(dataset.classes) or not bool(own.any()):
        raise FanalError(f"{spec} has classes 0 to {len(dataset.classes) - 1}, got {label}")
    points = data.x.double()
    laws = FiniteSet(points), FiniteSet(points[own])
    about = f"the {len(points)} training points of {spec}; the {int(own.sum())} of class {dataset.classes[label]}"
    return _made(spec, laws, (points, points[own]), about, [])


def target(name: str, label: int | None = None) -> Target:
    """Return a target by name.

    Args:
        name: a key of `TARGETS`, or a data set as in `fanal.datasets.get`, whose points are the support.
        label: class of a data set that is the condition; None: 0. The named targets have their own condition.

    Raises:
        FanalError: nothing is called that, or the label does not fit.
    """
    from fanal.datasets import DATASETS

    if name in TARGETS:
        if label is not None:
            raise FanalError(f"{name} has its own condition: leave the label out")
        return TARGETS[name]()
    if name in DATASETS or name.startswith("folder:"):
        return _of_data(name, label or 0)
    raise unknown_name("support", name, [*TARGETS, *DATASETS])
