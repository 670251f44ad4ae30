"""digits8: the 1,797 handwritten digits that come with scikit-learn, the only real images of the bundle."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fanal.datasets.base import Data, check_count, check_split
from fanal.datasets.partition import Unjudged, partition

__all__ = ["Digits"]


@dataclass(frozen=True, eq=False)
class Digits(Unjudged):
    """Handwritten digits of 8 x 8 pixels with 17 gray levels (UCI optical recognition, test part).

    A fixed fifth of each digit is held out, whatever the seed; the seed only orders the images of a split.
    """

    name: str = field(default="digits8", init=False)
    shape: tuple[int, ...] = field(default=(1, 8, 8), init=False)
    classes: tuple[str, ...] = field(default=tuple("0123456789"), init=False)

    def data(self, split: str = "train", count: int | None = None, seed: int = 0) -> Data:
        """Return `count` digits (all of the split by default) and their classes.

        Raises:
            FanalError: the split is unknown, or `count` is not positive or more than the split has.
        """
        from sklearn.datasets import load_digits  # slow to import

        images, labels = load_digits(return_X_y=True)
        index = partition(np.asarray(labels), check_split(split), seed)
        index = index[: len(index) if count is None else check_count(count, len(index), f"digits ({split})")]
        x = (np.asarray(images)[index] / 8.0 - 1.0).astype(np.float32).reshape(-1, *self.shape)
        return Data(torch.from_numpy(x), torch.from_numpy(np.asarray(labels)[index].astype(np.int64)))
