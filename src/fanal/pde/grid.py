"""Boxes cut into cells, of even width or not, in one or two dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fanal.errors import FanalError

__all__ = ["Array", "Grid"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells of a box; densities live in them, fluxes on the faces between them.

    Attributes:
        edges: per axis, the borders of its cells, increasing.

    Raises:
        FanalError: an axis has fewer than two cells, or its edges do not increase.
    """

    edges: tuple[Array, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.edges) <= 3:
            raise FanalError(f"a grid has one to three axes, got {len(self.edges)}")
        for axis in self.edges:
            if axis.ndim != 1 or len(axis) < 3 or not np.isfinite(axis).all() or not (np.diff(axis) > 0).all():
                raise FanalError("each axis of a grid needs three or more finite, increasing edges")

    @classmethod
    def even(cls, low: float | Sequence[float], high: float | Sequence[float], cells: int | Sequence[int]) -> Grid:
        """Return cells of even width; one number each for one axis, a sequence for several.

        Raises:
            FanalError: the numbers do not make a grid.
        """
        lows, highs, counts = (np.atleast_1d(value) for value in (low, high, cells))
        if not len(lows) == len(highs) == len(counts):
            raise FanalError("low, high and cells name the same axes")
        return cls(tuple(np.linspace(a, b, int(n) + 1) for a, b, n in zip(lows, highs, counts, strict=True)))

    @classmethod
    def graded(cls, low: float, high: float, cells: int, monitor: Callable[[Array], Array]) -> Grid:
        """Return cells of one axis that are narrow where a function is large: each holds as much of its integral.

        Widths are about `∫m / (cells·m(x))`. With the root of a density's bend plus a constant, narrow bumps get the
        cells they need; a smooth m keeps the solver's order.

        Args:
            low: where the axis begins.
            high: where it ends.
            cells: how many.
            monitor: m at points (n,), above 0; resolved by 64 points per cell.

        Raises:
            FanalError: the numbers do not make a grid, or m is not above 0 everywhere.
        """
        x = np.linspace(low, high, 64 * int(cells) + 1)
        values = np.asarray(monitor(x), dtype=np.float64)
        if values.shape != x.shape or not np.isfinite(values).all() or not (values > 0).all():
            raise FanalError("a monitor of cell widths is finite and above 0 at each of its points")
        total = np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2 * np.diff(x))])
        edges = np.interp(np.linspace(0, total[-1], int(cells) + 1), total, x)
        edges[0], edges[-1] = low, high
        return cls((edges,))

    @cached_property
    def centers(self) -> tuple[Array, ...]:
        """Per axis, the middles of its cells."""
        return tuple((axis[1:] + axis[:-1]) / 2 for axis in self.edges)

    @cached_property
    def widths(self) -> tuple[Array, ...]:
        """Per axis, the widths of its cells."""
        return tuple(np.diff(axis) for axis in self.edges)

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells per axis."""
        return tuple(len(axis) - 1 for axis in self.edges)

    @cached_property
    def volumes(self) -> Array:
        """Volume of each cell, (*shape)."""
        out = np.ones(())
        for axis in self.widths:
            out = np.multiply.outer(out, axis)
        return out

    @cached_property
    def points(self) -> Array:
        """Middles of all cells, (cells, axes), the last axis running fastest."""
        return np.stack(np.meshgrid(*self.centers, indexing="ij"), -1).reshape(-1, len(self.edges))

    def faces(self, axis: int) -> Array:
        """Return the middles of the inner faces across an axis, (faces, axes)."""
        own = [*self.centers]
        own[axis] = self.edges[axis][1:-1]
        return np.stack(np.meshgrid(*own, indexing="ij"), -1).reshape(-1, len(self.edges))

    def mass(self, density: Array) -> float:
        """Return the mass of a density, (*shape) or flat."""
        return float((density.reshape(self.shape) * self.volumes).sum())
