"""What a model is measured against: the points of a data set, and their exact denoiser under the model's conditions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fanal.denoiser import Denoiser, Labelled, Model, Wrapper
from fanal.exact.dataset import Dataset
from fanal.exact.streaming import Points, Rows

if TYPE_CHECKING:
    from fanal.datasets import Dataset as Source

__all__ = ["digest", "first_points", "labels_of", "names_of", "reference"]


def first_points(
    source: Source, split: str = "train", most: int | None = None
) -> tuple[Tensor | np.ndarray | Rows, Tensor | None]:
    """Return the first points of a split and their classes; images stay bytes, and a mapped file stays on the disk.

    Args:
        source: the data set.
        split: "train" or "held out".
        most: points at most; None: all of a finite set, else as many as it gives.

    Raises:
        FanalError: the split is unknown or empty, or an image cannot be read.
    """
    from fanal.datasets import Folder, Mapped
    from fanal.datasets.levels import levels_of

    if isinstance(source, Mapped):
        return source.rows(split, None if most is None else min(most, source.count(split))), None
    count = min(most, source.count(split)) if isinstance(source, Folder) and most is not None else None
    levels = levels_of(source, split, count or None)
    kept = slice(0, most)
    values = levels.values[kept] if levels.values.dtype == np.uint8 else levels.take(kept)
    return values, None if levels.labels is None else levels.labels[kept]


def names_of(source: Source, index: Sequence[int], most: int | None = None) -> list[str]:
    """Return names of training points of `first_points`: files of a folder, rows of a mapped file, else numbers.

    Args:
        source: the data set.
        index: the points.
        most: as there.
    """
    from fanal.datasets import Folder, Mapped

    if isinstance(source, Folder):
        names = source.names("train")
        return [names[i] for i in index]
    if isinstance(source, Mapped):
        rows = first_points(source, "train", most)[0]
        assert isinstance(rows, Rows)
        return [f"row {rows.index[i]}" for i in index]
    return [str(i) for i in index]


def reference(source: Source, network: Model, most: int | None = None) -> Dataset:
    """Return the exact denoiser of a data set's first training points, with classes where they are the network's.

    Args:
        source: the data set.
        network: the model that is put beside it.
        most: points at most.

    Raises:
        FanalError: the samples have another shape, or as `first_points`.
    """
    from fanal.datasets.base import check_shape

    check_shape(source, network.shape, "the model")
    points, labels = first_points(source, "train", most)
    same = len(source.classes) > 0 and getattr(network, "classes", 0) == len(source.classes)
    return Dataset(points, labels, classes=len(source.classes)) if same and labels is not None else Dataset(points)


def labels_of(exact: Dataset, model: Denoiser, count: int) -> Int[Tensor, " b"] | None:
    """Return the classes that a bound model draws its samples from, where the points have classes; None: from all.

    Args:
        exact: the denoiser of the points.
        model: as `fanal.loading.bind` returns it; of guided ones, the class that is led to.
        count: samples of the batch.
    """
    while isinstance(model, Wrapper) and not isinstance(model, Labelled):
        model = model.denoiser
    if not isinstance(model, Labelled) or exact.counts is None:
        return None
    labels, network = model.labels.cpu().expand(count), model.denoiser
    while isinstance(network, Wrapper):
        network = network.denoiser
    null = getattr(network, "classes", math.inf)  # the label that stands for all
    return None if bool((labels == null).all()) else labels


def digest(*sets: Points) -> str:
    """Return a hash of points and of their classes, so that a resumed run notices when its data were replaced."""
    found = hashlib.sha256()
    for points in sets:
        found.update(str((points.count, points.shape)).encode())
        for rows in points.spans():
            found.update(points.block(rows, torch.float32).numpy().tobytes())
        found.update(b"" if points.labels is None else points.labels.cpu().numpy().tobytes())
    return found.hexdigest()
