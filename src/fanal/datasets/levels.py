"""Samples in the precision they are stored with, so that a large set of images needs a byte per value, not four."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from fanal.datasets.base import Data, Dataset

__all__ = ["Levels", "Stored", "levels_of"]

_WHITE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
_ROWS = 4096  # samples looked at together


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Samples of a data set, made floats a batch at a time.

    Attributes:
        values: shape (N, *shape); float32, or uint8 or uint16 levels, where 0 stands for -1 and the highest for 1.
        labels: indices into the set's classes, shape (N,), or None where there are no classes.
    """

    values: NDArray[Any]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Int64[Tensor, " b"] | slice) -> Float[Tensor, "b *d"]:
        """Return some of the samples as float32; images lie in [-1, 1]."""
        chosen = self.values[index if isinstance(index, slice) else index.numpy()]
        white = _WHITE.get(chosen.dtype)
        if white is not None:
            chosen = 2.0 * (chosen.astype(np.float32) / np.float32(white)) - 1.0
        return torch.from_numpy(chosen)

    def std(self) -> float:
        """Return the standard deviation over all values of all samples, as floats."""
        white = _WHITE.get(self.values.dtype)
        if white is None:
            return float(torch.from_numpy(self.values).double().std())
        counts = np.zeros(int(white) + 1, dtype=np.int64)
        for start in range(0, len(self), _ROWS):
            counts += np.bincount(self.values[start : start + _ROWS].ravel(), minlength=len(counts))
        level, total = 2.0 * np.arange(len(counts)) / white - 1.0, counts.sum()
        mean = (counts * level).sum() / total
        return float(np.sqrt((counts * (level - mean) ** 2).sum() / max(total - 1, 1)))

    def crc(self) -> int:
        """Return a checksum of the values."""
        return zlib.crc32(np.ascontiguousarray(self.values).data)

    def data(self) -> Data:
        """Return all samples as float32."""
        return Data(self.take(slice(None)), self.labels)


@runtime_checkable
class Stored(Protocol):
    """A data set that can hand its samples out as they are stored."""

    def levels(self, split: str = "train", count: int | None = None, seed: int = 0) -> Levels:
        """Return what `data` returns, as it is stored."""
        ...


def levels_of(dataset: Dataset, split: str = "train", count: int | None = None) -> Levels:
    """Return a data set's samples as they are stored, or as its `data` gives them."""
    if isinstance(dataset, Stored):
        return dataset.levels(split, count)
    data = dataset.data(split, count)
    return Levels(data.x.numpy(), data.labels)
