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
from fanal.datasets.scenes import Scenes as Scenes
from fanal.datasets.shapes import Shapes as Shapes
from fanal.errors import unknown_name

__all__ = ["DATASETS", "Data", "Dataset", "Digits", "Folder", "Grid", "Hands", "Scenes", "Shapes", "get"]

DATASETS: Mapping[str, Dataset] = {d.name: d for d in (Grid(), Shapes(), Hands(), Scenes(), Digits())}


def get(spec: str) -> Dataset:
    """Return the data set that a spec names: a key of `DATASETS`, or "folder:DIR" or "folder:DIR,size=64".

    Raises:
        FanalError: there is no such data set, or the folder holds no images.
    """
    if spec.startswith("folder:"):
        return Folder.open(spec)
    if spec not in DATASETS:
        place = spec.split(",")[0]
        found = [f"folder:{spec}"] if place and Path(place).exists() else []
        raise unknown_name("data set", spec, [*found, *DATASETS, "folder:DIR"])
    return DATASETS[spec]
