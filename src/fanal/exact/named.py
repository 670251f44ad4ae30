"""Closed forms by name: example laws, data sets as they are, and Gaussians fitted to data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fanal.denoiser import Model
from fanal.errors import FanalError, unknown_name
from fanal.exact.dataset import Dataset
from fanal.exact.gaussian import Gaussian
from fanal.exact.mixture import Mixture
from fanal.files import sha256_of

if TYPE_CHECKING:
    from fanal.datasets import Dataset as Source

__all__ = ["GAUSSIANS", "MIXTURES", "closed_form", "content", "named_set"]

_FIELDS = {"data": ("count", "split"), "gaussian": ("count", "split", "rank"), "mixture": ("count", "split", "rank")}


def _grid2() -> Model:
    axis = 2.0 * (torch.arange(5, dtype=torch.float64) - 2)
    return Mixture(torch.cartesian_prod(axis, axis), std=0.1)


def _ring8() -> Model:
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    return Mixture(4 * torch.stack([angle.cos(), angle.sin()], 1), std=0.2)


def _tilted2() -> Model:
    return Gaussian(torch.tensor([1.0, -1.0]), torch.tensor([[4.0, 1.5], [1.5, 1.0]]))


MIXTURES: dict[str, Callable[[], Model]] = {"grid2": _grid2, "ring8": _ring8}
"""Example mixtures; `mixture:SET` of any other data set with classes is fitted, one Gaussian per class."""

GAUSSIANS: dict[str, Callable[[], Model]] = {"tilted2": _tilted2}
"""Example Gaussians; `gaussian:SET` of any other data set is fitted."""


def _settings(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """The name of a set, with a folder's own settings, and the closed form's settings."""
    from fanal.config import split_settings

    place, rest = split_settings(text)
    own, given = [], {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key in _FIELDS[kind]:
            if key in given:
                raise FanalError(f"{kind}:{text}: {key} is given twice")
            given[key] = value
        elif key in ("size", "bad"):
            own.append(part)
        else:
            raise unknown_name(f"setting of {kind}:", key, (*_FIELDS[kind], "size", "bad"))
    return ",".join([place, *own]), given


def _whole(kind: str, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise FanalError(f"{name} in {kind}: is a whole number >= 1, got {text!r:.40}")
    return int(text)


def named_set(kind: str, text: str) -> str:
    """Return the data set that a closed form is of: `data:DIR,size=32,count=100` is of `folder:DIR,size=32`.

    Raises:
        FanalError: there is no such data set, folder, zip file or array, or a setting is unknown.
    """
    from fanal.datasets import DATASETS

    place, _ = _settings(kind, text)
    if place in DATASETS or place.startswith(("folder:", "array:")):
        return place
    if place.endswith(".npy"):
        return f"array:{place}"
    if Path(place.split(",")[0]).exists():
        return f"folder:{place}"
    examples = {"mixture": MIXTURES, "gaussian": GAUSSIANS}.get(kind, {})
    raise unknown_name(kind, place, dict.fromkeys([*examples, *DATASETS, "a folder or zip file of images", "FILE.npy"]))


def _asked(given: dict[str, str], kind: str) -> tuple[str, int | None]:
    """Split and number of points."""
    return given.get("split", "train"), _whole(kind, "count", given["count"]) if "count" in given else None


def _dataset(source: Source, split: str, count: int | None) -> Dataset:
    """The points as they are stored: images of a folder as bytes, a mapped file on the disk."""
    from fanal.datasets import Folder, Mapped

    if isinstance(source, Mapped):
        return Dataset(source.rows(split, count))
    if isinstance(source, Folder):
        levels = source.levels(split, count)
        if levels.values.dtype == np.uint8:
            return Dataset(levels.values, levels.labels)
    found = source.data(split, count)
    return Dataset(found.x, found.labels)


def closed_form(kind: str, text: str) -> Model:
    """Return what a spec names: `mixture:NAME`, `gaussian:NAME` or `data:NAME`.

    Args:
        kind: "mixture", "gaussian" or "data".
        text: an example (`MIXTURES`, `GAUSSIANS`), or a data set, folder, zip file or `FILE.npy` with settings:
            `count` of points and `split` ("train" or "held_out"), and for a fit the `rank` of its covariances.

    Raises:
        FanalError: there is nothing of that name, or a setting is none.
    """
    examples = {"mixture": MIXTURES, "gaussian": GAUSSIANS}.get(kind, {})
    if text in examples:
        return examples[text]()
    from fanal.datasets import get

    source, (_, given) = get(named_set(kind, text)), _settings(kind, text)
    split, count = _asked(given, kind)
    if kind == "data":
        return _dataset(source, split, count)
    found, rank = source.data(split, count), _whole(kind, "rank", given["rank"]) if "rank" in given else None
    if kind == "gaussian":
        return Gaussian.fit(found.x, rank=rank)
    if found.labels is None:
        raise FanalError(f"mixture:{text} is fitted class by class, and {source.name} has no classes: try gaussian:")
    return Mixture.fit(found.x, found.labels, rank=rank)


def content(kind: str, text: str) -> str:
    """Return a hash of what a closed form is over, where that can change: a folder's or a file's bytes; else nothing.

    Raises:
        FanalError: there is no such data set, or a file cannot be read.
    """
    from fanal.datasets import Folder, Mapped, get

    if text in MIXTURES or text in GAUSSIANS:
        return ""
    source = get(named_set(kind, text))
    if isinstance(source, Mapped):
        return sha256_of(source.path)
    return source.digest() if isinstance(source, Folder) else ""
