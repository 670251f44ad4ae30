"""Data with ground truth: small sets whose samples a rule can judge, and two kinds of real images to train on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fanal.datasets.base import Data as Data
from fanal.datasets.base import Dataset as Dataset
from fanal.datasets.digits import Digits as Digits
from fanal.datasets.folder import Folder as Folder
from fanal.datasets.grid import Grid as Grid
from fanal.datasets.hands import Hands as Hands
from fanal.datasets.mapped import Mapped as Mapped
from fanal.datasets.scenes import Scenes as Scenes
from fanal.datasets.shapes import Shapes as Shapes
from fanal.errors import unknown_name

__all__ = ["DATASETS", "Data", "Dataset", "Digits", "Folder", "Grid", "Hands", "Mapped", "Scenes", "Shapes", "get"]

DATASETS: Mapping[str, Dataset] = {d.name: d for d in (Grid(), Shapes(), Hands(), Scenes(), Digits())}


def get(spec: str) -> Dataset:
    """Return the data set that a spec names.

    Args:
        spec: a key of `DATASETS`, "folder:DIR", "folder:DIR,size=64" or "array:FILE.npy".

    Raises:
        FanalError: there is no such data set, the folder holds no images, or the file no samples.
    """
    if spec.startswith("array:"):
        return Mapped.open(spec)
    if spec.startswith("folder:"):
        return Folder.open(spec)
    if spec not in DATASETS:
        place = spec.split(",")[0]
        kind = "array" if place.endswith(".npy") else "folder"
        found = [f"{kind}:{spec}"] if place and Path(place).exists() else []
        raise unknown_name("data set", spec, [*found, *DATASETS, "folder:DIR", "array:FILE.npy"])
    return DATASETS[spec]
