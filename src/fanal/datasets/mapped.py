"""array:FILE.npy: samples in a numpy file, mapped from the disk, so that a set may be larger than memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fanal.datasets.base import Data, check_count, check_split
from fanal.datasets.levels import Levels
from fanal.datasets.partition import Unjudged, partition
from fanal.errors import FanalError, reason
from fanal.exact.streaming import Rows

__all__ = ["Mapped"]

_DTYPES = ("uint8", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Mapped(Unjudged):
    """Samples in a `.npy` file, (N, *shape): floats as they are, or bytes 0 to 255 for images in [-1, 1].

    A fixed fifth is held out, whatever the seed; the seed only orders the samples of a split. There are no classes.

    Attributes:
        name: the spec.
        shape: of one sample; images are (C, H, W).
        path: the file.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    _values: NDArray[Any] = field(repr=False)
    classes: tuple[str, ...] = field(default=(), init=False)

    @classmethod
    def open(cls, spec: str) -> Mapped:
        """Map the file of `array:FILE.npy`; its samples are read when they are needed.

        Raises:
            FanalError: there is no such file, or it holds no array of samples.
        """
        path = Path(spec.removeprefix("array:")).expanduser()
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            why = reason(error) if isinstance(error, OSError) else "it is no array of numbers"
            raise FanalError(
                f"cannot map {path}: {why}; {spec!r} should name a file as numpy.save writes it"
            ) from error
        if not isinstance(values, np.ndarray):  # an archive of several
            values.close()
            raise FanalError(f"{path} holds several arrays: save the samples alone, as a .npy file")
        if values.ndim < 2 or 0 in values.shape or values.dtype.name not in _DTYPES:
            raise FanalError(
                f"{path} holds {values.dtype} of shape {values.shape}: samples are (N, *shape), images (N, C, H, W), "
                f"as {', '.join(_DTYPES)}"
            )
        return cls(spec, tuple(int(n) for n in values.shape[1:]), path, values)

    def _index(self, split: str, count: int | None, seed: int) -> NDArray[Any]:
        index = partition(np.zeros(len(self._values), dtype=np.int64), check_split(split), seed)
        if len(index) == 0:
            raise FanalError(f"{self.name} has too few samples ({len(self._values)}) for a {split} split")
        return index[: len(index) if count is None else check_count(count, len(index), f"samples ({split})")]

    def rows(self, split: str = "train", count: int | None = None) -> Rows:
        """Return the samples of `levels`, in the file's order, left in the file.

        Raises:
            FanalError: as in `data`.
        """
        return Rows(self._values, np.sort(self._index(split, count, 0)))

    def levels(self, split: str = "train", count: int | None = None, seed: int = 0) -> Levels:
        """Return `count` samples (all of the split by default) in memory, as they are stored.

        Raises:
            FanalError: as in `data`.
        """
        values = self._values[self._index(split, count, seed)]
        if values.dtype == np.uint8:
            return Levels(values)
        if not np.isfinite(values).all():
            raise FanalError(f"{self.name}: a sample is not finite: leave it out")
        return Levels(values.astype(np.float32))

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` samples (all of the split by default) as float32.

        Raises:
            FanalError: the split is unknown or empty, `count` is not positive or more than the split has, or a sample
                is not finite.
        """
        return self.levels(split, count, seed).data()

    def count(self, split: str) -> int:
        """Return the number of samples of a split."""
        return len(partition(np.zeros(len(self._values), dtype=np.int64), check_split(split), 0))
