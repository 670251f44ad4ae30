"""What a check compared, as curves: its figure shows the numbers that decided, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fanal.errors import unknown_name
from fanal.pde.grid import Array

__all__ = ["LOOKS", "Curve", "Panel", "decay", "deviations", "local", "overlaid", "sides"]

LOOKS = ("line", "wide", "dashed", "points", "dots", "joined")
"""How a curve is drawn: a line, a pale, wide one (what should be found), dashed, points, small ones, joined points."""

_LEAST = 1e-18  # where a difference that is 0 is drawn on an axis in powers of ten


@dataclass(frozen=True, eq=False)
class Curve:
    """Numbers over numbers.

    Attributes:
        name: in the legend; empty: not shown there.
        x: (n,), where.
        y: (n,).
        look: one of `LOOKS`.
        color: number of its color; −1: gray; None: that of its place among the panel's curves.
        spread: (n,) half the length of error bars; None: none.
    """

    name: str
    x: Array
    y: Array
    look: str = "line"
    color: int | None = None
    spread: Array | None = None

    def __post_init__(self) -> None:
        if self.look not in LOOKS:
            raise unknown_name("look of a curve", self.look, LOOKS)

    @property
    def tells(self) -> bool:
        """Whether it has two or more finite values that differ."""
        y = np.asarray(self.y, dtype=np.float64)
        y = y[np.isfinite(y)]
        return len(y) > 1 and bool(np.ptp(y) > 0)


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a check.

    Attributes:
        title: what is compared.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        curves: what is drawn.
        log: which axes are in powers of ten: "", "x", "y" or "xy".
        levels: values of y that are marked across, by name: a rate in theory, a tolerance.
        square: whether both axes have one scale, as in a plane.
        falling: whether the horizontal axis runs from large to small, as a run does.
        image: edges of x, edges of y and values (len(y) − 1, len(x) − 1) of a density under the curves; None: none.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)
    square: bool = False
    falling: bool = False
    image: tuple[Array, Array, Array] | None = None


def overlaid(x: Array, wanted: Array, found: Array, names: Sequence[str], wide: str, look: str = "line") -> list[Curve]:
    """Return what should be found as pale, wide lines, and what was found over it, case by case in one color.

    Args:
        x: (n,).
        wanted: (cases, n).
        found: (cases, n).
        names: of the cases.
        wide: what the pale lines are.
        look: of what was found.
    """
    out = []
    for k, (name, one, other) in enumerate(zip(names, np.atleast_2d(wanted), np.atleast_2d(found), strict=True)):
        out += [Curve(wide if k == 0 else "", x, one, "wide", k), Curve(name, x, other, look, k)]
    return out


def sides(left: Array, right: Array, tolerance: float, what: str = "relative difference") -> tuple[Panel, Panel]:
    """Return both sides of an identity against each other, and their difference over the right side's largest value.

    Args:
        left: (n,) one side.
        right: (n,) the other.
        tolerance: of the difference.
        what: name of the difference.
    """
    left, right = np.ravel(left), np.ravel(right)
    ends = np.array([min(left.min(), right.min()), max(left.max(), right.max())])
    error = np.maximum(np.abs(left - right) / np.abs(right).max(), _LEAST)
    both = [Curve("equal", ends, ends, "wide", -1), Curve("one point each", right, left, "points", 0)]
    return (
        Panel("both sides", "right side", "left side", both),
        Panel(what, "right side", what, [Curve("", right, error, "points", 0)], "y", {"tolerance": tolerance}),
    )


def local(x: Array, y: Array, power: bool) -> tuple[Array, Array]:
    """Return the exponents between each two neighbors, and where: of `x^p`, or of `e^{−px}`.

    Args:
        x: (n,) monotone, positive where it is a power.
        y: (n,) positive.
        power: whether it is one.
    """
    steps = np.diff(np.log(x)) if power else -np.diff(x)
    middle = np.sqrt(x[1:] * x[:-1]) if power else (x[1:] + x[:-1]) / 2
    return middle, np.diff(np.log(y)) / steps


def decay(
    x: Array, sizes: Mapping[str, Array], wanted: Mapping[str, float], axis: str, value: str, power: bool = False
) -> tuple[Panel, Panel]:
    """Return sizes that should fall as a power or exponentially, with the slope that they should have, and exponents.

    Args:
        x: (n,) time, or whatever they fall with.
        sizes: (n,) by name.
        wanted: exponent in theory, by the same names.
        axis: name of x.
        value: name of the sizes.
        power: whether sizes go as `x^p`; else as `e^{−px}`.
    """
    x, curves, slopes = np.asarray(x, dtype=np.float64), [], []
    for k, (name, y) in enumerate(sizes.items()):
        y, p = np.asarray(y, dtype=np.float64), wanted[name]
        at = int(np.argmin(y))  # theory is of the end where sizes are small
        guide = y[at] * (x / x[at]) ** p if power else y[at] * np.exp(-p * (x - x[at]))
        curves += [Curve("slope in theory" if k == 0 else "", x, guide, "wide", k), Curve(name, x, y, "joined", k)]
        slopes.append(Curve(name, *local(x, y, power), "joined", k))
    levels = {f"theory: {p:g}": p for p in dict.fromkeys(wanted.values())}
    word = "power" if power else "rate"
    return (
        Panel(f"{value} against {axis}", axis, value, curves, "xy" if power else "y"),
        Panel(f"{word} between neighbors", axis, word, slopes, "x" if power else "", levels),
    )


def deviations(
    x: Array,
    found: Array,
    wanted: Array,
    errors: Array,
    axis: str,
    allowed: float,
    log: str = "",
    falling: bool = False,
) -> Panel:
    """Return by how many standard errors measurements are off.

    Args:
        x: (n,).
        found: (n,) measured.
        wanted: (n,) in theory.
        errors: (n,) standard errors.
        axis: name of x.
        allowed: how many are allowed.
        log: as a panel's.
        falling: likewise.
    """
    off = (np.asarray(found) - np.asarray(wanted)) / np.asarray(errors)
    levels = {f"±{allowed:g}": allowed, "": -allowed, "theory": 0.0}
    curves = [Curve("", np.asarray(x), off, "joined", 0)]
    return Panel("measured − theory", axis, "standard errors", curves, log, levels, falling=falling)
